"""SwAV and DeepCluster-v2 beyond their losses: codes with a queue, frozen prototypes, clusters."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from headrace.pipelines.batch import Batch
from headrace.training.methods.deepcluster_v2 import DeepClusterV2
from headrace.training.methods.swav import SwAV
from headrace.training.optim import Schedule, build_optimizer
from headrace.training.preset import ConfigError, Optim
from tests.test_objectives_cluster import sinkhorn_oracle, swav_oracle
from tests.tiny_methods import (
    SAMPLES,
    TinyContext,
    batch_of,
    build,
    module_of,
    progress_at,
    sgd,
    share,
    small_preset,
    train_step,
)


def make_swav(**changes: Any) -> SwAV:
    method = build("swav", "test_resnet", **changes)
    assert isinstance(method, SwAV)
    return method


def make_deepcluster(**changes: Any) -> DeepClusterV2:
    method = build("deepcluster_v2", "test_resnet", **changes)
    assert isinstance(method, DeepClusterV2)
    return method


# ---- SwAV


def expected_loss(method: SwAV, batch: Batch, queue: Tensor | None) -> float:
    """As in main_swav.py: each view's codes by themselves, from its part of the queue and the
    batch's; all in float64."""
    embedded = method.embed(batch, progress_at(0))
    weight = method.prototypes.weight.detach().double()
    z = embedded["embedding"].detach().double()
    codes = []
    for crop in range(2):
        out = z[:, crop] @ weight.T
        if queue is not None:
            out = torch.cat([queue[:, crop].double() @ weight.T, out])
        codes.append(sinkhorn_oracle(out.numpy(), method.options.epsilon, 3)[-len(batch) :])
    return swav_oracle((z @ weight.T).numpy(), np.stack(codes, axis=1), 0.1)


def test_codes_are_of_each_view_by_itself() -> None:
    method, batch = make_swav(queue_size=0), batch_of("swav")
    ours = method(batch, progress_at(5))[0]["loss"]
    assert float(ours.detach()) == pytest.approx(expected_loss(method, batch, None), rel=1e-5)


def test_the_queue_fills_from_its_epoch_on_and_counts_once_it_is_full() -> None:
    """16 samples a step fill 32 rows in two steps."""
    method = make_swav(queue_start_epochs=1, queue_size=32)
    assert method.queue is not None
    optimizer = sgd(method)
    for step in range(8):
        batch = batch_of("swav", seed=step)
        rows = method.queue.rows.clone()
        assert bool(rows.any()) == (step > 4)
        used = step >= 6
        assert bool(rows.any(-1).all()) == used
        method.before_step(progress_at(step))
        expected = expected_loss(method, batch, rows if used else None)
        other = expected_loss(method, batch, None if used else rows)
        loss = train_step(method, optimizer, [batch], progress_at(step))
        assert float(loss) == pytest.approx(expected, rel=1e-5)
        assert not used or abs(float(loss) - other) > 1e-3


def test_the_queue_holds_the_latest_global_views_of_all_micro_batches() -> None:
    method, batch = make_swav(queue_size=32), batch_of("swav")
    assert method.queue is not None
    halves = [share(batch, slice(0, 8)), share(batch, slice(8, 16))]
    embedded = [method.embed(half, progress_at(0)) for half in halves]
    method.after_step(embedded, halves, progress_at(0))
    expected = torch.cat([entry["embedding"][:, :2] for entry in embedded])
    assert torch.equal(method.queue.rows[:16], expected)
    assert not method.queue.rows[16:].any()
    torch.testing.assert_close(expected.norm(dim=-1), torch.ones(16, 2))


def test_prototypes_stay_for_the_first_steps_and_have_length_one_in_each() -> None:
    method = make_swav(freeze_prototypes_steps=2)
    weight = method.prototypes.weight
    start = weight.detach().clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(len(start)))
    schedule = Schedule(Optim(name="larc", learning_rate=10.0, warmup_epochs=0), 256, 5)
    optimizer = build_optimizer(method.param_groups(), schedule)
    for step in range(4):
        schedule.apply(optimizer, 0.1)
        train_step(method, optimizer, [batch_of("swav", seed=step)], progress_at(step))
        frozen = step < 2
        assert torch.allclose(weight, start, atol=1e-6) == frozen
    assert not torch.allclose(weight.norm(dim=1), torch.ones(len(start)), atol=1e-4)
    method.before_step(progress_at(4))
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(start)))


def test_a_queue_of_broken_batches_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of the batch of 16"):
        build("swav", "test_resnet", queue_size=40)


@pytest.mark.parametrize(
    ("method", "preset", "epochs", "start", "peak", "final"),
    [
        ("swav", "imagenet", 800, 0.3, 4.8, 0.0048),
        ("swav", "small_batch_imagenet", 400, 0.6, 0.6, 0.0006),
        ("deepcluster_v2", "imagenet", 800, 0.3, 4.8, 0.0048),
    ],
)
def test_learning_rates_are_those_of_the_scripts(
    method: str, preset: str, epochs: int, start: float, peak: float, final: float
) -> None:
    """swav scripts/*_pretrain.sh: --start_warmup, --base_lr, --final_lr."""
    recipe = module_of(method).PRESETS[preset]
    assert recipe.epochs == epochs
    schedule = Schedule(recipe.optim, recipe.batch_size, recipe.epochs)
    rates = [schedule.learning_rate_at(0), schedule.peak, schedule.learning_rate_at(1)]
    assert rates == pytest.approx([start, peak, final])


# ---- DeepCluster-v2


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
