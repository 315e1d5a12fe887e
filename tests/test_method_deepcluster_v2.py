"""DeepCluster-v2: its loss against float64 loops over entries, and its clusters over the epochs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from headrace.training.methods import deepcluster_v2
from headrace.training.methods.deepcluster_v2 import DeepClusterV2, deepcluster_v2_loss
from headrace.training.optim import Schedule
from headrace.training.preset import ConfigError
from tests.cluster_checks import cosines
from tests.objective_checks import Array, assert_same, differs, log_softmax
from tests.tiny_methods import (
    SAMPLES,
    TinyContext,
    batch_of,
    build,
    progress_at,
    sgd,
    share,
    small_preset,
    train_step,
)


def deepcluster_v2_oracle(
    logits: Array,
    assignments: NDArray[np.int64],
    temperature: float,
    *,
    ignored_count: bool = False,
) -> float:
    """For each head nn.CrossEntropyLoss over `idx.repeat(crops)`: all crops of a sample share its
    target, and those without one count for nothing; then the mean over heads."""
    samples, views, heads, _ = logits.shape
    loss = 0.0
    for h in range(heads):
        terms = []
        for v in range(views):
            for b in range(samples):
                target = assignments[b, h]
                if target >= 0:
                    terms.append(-log_softmax(logits[b, v, h] / temperature)[target])
                elif ignored_count:
                    terms.append(0.0)
        loss += np.mean(terms)
    return float(loss / heads)


@pytest.mark.parametrize(
    ("samples", "views", "heads", "prototypes", "temperature"),
    [(3, 2, 1, 5, 0.1), (4, 8, 3, 4, 0.1), (5, 3, 2, 6, 0.5)],
)
def test_deepcluster_v2_loss(
    samples: int, views: int, heads: int, prototypes: int, temperature: float
) -> None:
    logits = cosines(samples, views, heads, prototypes, seed=heads)
    assignments = np.random.default_rng(2).integers(0, prototypes, (samples, heads))
    assignments[1, 0] = -1

    def ours(x: Tensor) -> Tensor:
        return deepcluster_v2_loss(x, torch.tensor(assignments), temperature)

    assert_same(ours, lambda x: deepcluster_v2_oracle(x, assignments, temperature), logits)
    value = deepcluster_v2_oracle(logits, assignments, temperature)
    for mistake in (
        deepcluster_v2_oracle(logits, assignments, temperature, ignored_count=True),
        deepcluster_v2_oracle(logits, np.roll(assignments, 1, axis=0), temperature),
        deepcluster_v2_oracle(logits, assignments, 1.1 * temperature),
        heads * deepcluster_v2_oracle(logits, assignments, temperature) + (heads == 1),
    ):
        assert differs(value, mistake)


def test_deepcluster_v2_is_torch_cross_entropy_of_repeated_targets() -> None:
    logits = torch.tensor(cosines(6, 4, 3, 5), dtype=torch.float32)
    assignments = torch.randint(-1, 5, (6, 3), generator=torch.Generator().manual_seed(0))
    by_head = [
        F.cross_entropy(
            logits[:, :, h].transpose(0, 1).flatten(0, 1) / 0.1,
            assignments[:, h].repeat(4),
            ignore_index=-1,
        )
        for h in range(3)
    ]
    ours = deepcluster_v2_loss(logits, assignments, 0.1)
    torch.testing.assert_close(ours, torch.stack(by_head).mean())


def test_unknown_clusters_cost_nothing() -> None:
    logits = torch.randn(4, 2, 3, 5, requires_grad=True)
    loss = deepcluster_v2_loss(logits, torch.full((4, 3), -1), 0.1)
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_shares_with_the_mean_number_of_known_samples_make_the_global_loss() -> None:
    logits = torch.randn(8, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    assignments = torch.randint(0, 5, (8, 3), generator=torch.Generator().manual_seed(1))
    assignments[:3, 1] = -1
    known = (assignments >= 0).sum(0).float() / 2
    shares = [
        deepcluster_v2_loss(logits[rows], assignments[rows], 0.1, known)
        for rows in (slice(0, 4), slice(4, 8))
    ]
    whole = deepcluster_v2_loss(logits, assignments, 0.1)
    torch.testing.assert_close(torch.stack(shares).mean(), whole)
    naive = [
        deepcluster_v2_loss(logits[rows], assignments[rows], 0.1)
        for rows in (slice(0, 4), slice(4, 8))
    ]
    assert differs(float(whole), float(torch.stack(naive).mean()))


def make_deepcluster(**changes: Any) -> DeepClusterV2:
    method = build("deepcluster_v2", "test_resnet", **changes)
    assert isinstance(method, DeepClusterV2)
    return method


def test_assignments_are_the_nearest_centroids_of_the_heads_bank() -> None:
    """Head j looks at the memory of global view j mod 2."""
    method = make_deepcluster()
    z = F.normalize(torch.randn(SAMPLES, 2, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    method.memory.rows.copy_(z)
    before = method.prototypes.clone()
    method.before_epoch(TinyContext(small_preset("deepcluster_v2")), progress_at(4))
    assert torch.equal(method.memory.rows, z), "only the first epoch fills the memory"
    assert not torch.allclose(method.prototypes, before, atol=0.1)
    lengths = method.prototypes.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    for head in range(3):
        for bank in range(2):
            nearest = (z[:, bank] @ method.prototypes[head].T).argmax(1)
            agree = torch.equal(nearest, method.assignments.rows[:, head])
            assert agree == (bank == head % 2)
    assert not torch.equal(method.prototypes[0], method.prototypes[2])


def test_the_memory_takes_what_was_embedded_and_targets_stay_for_the_epoch() -> None:
    method, batch = make_deepcluster(), batch_of("deepcluster_v2")
    memory, targets = method.memory.rows.clone(), method.assignments.rows.clone()
    halves = [share(batch, slice(0, 8)), share(batch, slice(8, 16))]
    embedded = [method.embed(half, progress_at(1)) for half in halves]
    method.after_step(embedded, halves, progress_at(1))
    for half, entry in zip(halves, embedded, strict=True):
        assert torch.equal(method.memory(half.ids), entry["embedding"][:, :2])
    others = torch.ones(SAMPLES, dtype=torch.bool)
    others[batch.ids] = False
    assert torch.equal(method.memory.rows[others], memory[others])
    assert torch.equal(method.assignments.rows, targets)


def test_nothing_of_the_prototypes_is_trained() -> None:
    method = make_deepcluster()
    assert not [name for name, _ in method.named_parameters() if "prototypes" in name]
    before = method.prototypes.clone()
    train_step(method, sgd(method), [batch_of("deepcluster_v2")], progress_at(1))
    assert torch.equal(method.prototypes, before)


class PartOfTheSet(TinyContext):
    """What a subset leaves: samples 0 to 31."""

    def features(
        self, module: Callable[[Tensor], Tensor], view: str = "test"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for ids, features in super().features(module, view):
            if int(ids[0]) < 32:
                yield ids, features


def test_samples_outside_the_training_set_have_no_cluster() -> None:
    method = make_deepcluster()
    method.memory.rows.zero_()
    method.before_epoch(PartOfTheSet(small_preset("deepcluster_v2")), progress_at(0))
    assert bool((method.assignments.rows[:32] >= 0).all())
    assert bool((method.assignments.rows[32:] == -1).all())
    assert not method.memory.rows[32:].any()


def test_the_first_memory_is_spread_around_the_mean_embedding() -> None:
    method = make_deepcluster()
    rows = method.memory.rows
    assert torch.equal(rows[:, 0], rows[:, 1])
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(SAMPLES, 2))
    assert float(rows[:, 0].mean(0).norm()) < 0.3


@pytest.mark.parametrize("images", [8, 40])
def test_more_clusters_than_images_are_refused(images: int) -> None:
    """Of the data set when the method is built; of a subset before the first epoch."""
    method = make_deepcluster()
    method.memory.rows[images:] = 0
    method.options = replace(method.options, num_prototypes=images + 1)
    context = TinyContext(small_preset("deepcluster_v2"))
    with pytest.raises(ConfigError, match=f"is {images + 1}; there are no more than the {images} "):
        method.before_epoch(context, progress_at(4))
    with pytest.raises(ConfigError, match="no more than 64 images"):
        build("deepcluster_v2", "test_resnet", num_prototypes=65)


def test_learning_rates_are_those_of_the_script() -> None:
    """swav scripts/deepclusterv2_800ep_pretrain.sh: --start_warmup, --base_lr, --final_lr."""
    preset = deepcluster_v2.PRESETS["imagenet"]
    assert preset.epochs == 800
    schedule = Schedule(preset.optim, preset.batch_size, preset.epochs)
    rates = [schedule.learning_rate_at(0), schedule.peak, schedule.learning_rate_at(1)]
    assert rates == pytest.approx([0.3, 4.8, 0.0048])
