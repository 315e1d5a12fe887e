"""SwAV: its loss against float64 loops over entries, codes with a queue, held prototypes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.pipelines.batch import Batch
from headrace.training.methods import swav
from headrace.training.methods.swav import SwAV, swav_loss
from headrace.training.optim import Schedule, build_optimizer
from headrace.training.preset import ConfigError, Optim
from tests.cluster_checks import cosines, sinkhorn_oracle
from tests.objective_checks import Array, assert_same, differs, log_softmax
from tests.tiny_methods import (
    batch_of,
    build,
    progress_at,
    sgd,
    share,
    train_step,
)


def swav_oracle(
    logits: Array,
    codes: Array,
    temperature: float,
    *,
    own_view: bool = False,
    divisor: int = -1,
) -> float:
    """logits [n, V, K]; codes [n, T, K]. `loss /= len(crops_for_assign)` of sub-losses that are
    divided by the number of all crops but one."""
    samples, views, prototypes = logits.shape
    loss = 0.0
    for crop in range(codes.shape[1]):
        part = 0.0
        for view in range(views):
            if view == crop and not own_view:
                continue
            per_sample = []
            for b in range(samples):
                log_p = log_softmax(logits[b, view] / temperature)
                per_sample.append(sum(codes[b, crop, k] * log_p[k] for k in range(prototypes)))
            part -= np.mean(per_sample)
        loss += part / (views + divisor)
    return float(loss / codes.shape[1])


@pytest.mark.parametrize(
    ("samples", "views", "prototypes", "temperature"),
    [(3, 2, 5, 0.1), (2, 8, 4, 0.1), (4, 3, 6, 0.5), (1, 2, 3, 1.0)],
)
def test_swav_loss(samples: int, views: int, prototypes: int, temperature: float) -> None:
    logits = cosines(samples, views, prototypes, seed=views)
    codes = np.random.default_rng(1).dirichlet(np.ones(prototypes), (samples, 2))
    codes = codes.astype(np.float32).astype(np.float64)

    def ours(x: Tensor) -> Tensor:
        return swav_loss(x, torch.tensor(codes, dtype=torch.float32), temperature)

    assert_same(ours, lambda x: swav_oracle(x, codes, temperature), logits)
    value = swav_oracle(logits, codes, temperature)
    assert differs(value, swav_oracle(logits, codes, temperature, own_view=True))
    assert differs(value, swav_oracle(logits, codes, temperature, divisor=0))
    assert differs(value, swav_oracle(logits, codes[:, ::-1], temperature))
    assert differs(value, swav_oracle(logits, codes, 1.1 * temperature))


def test_swav_takes_codes_as_constant() -> None:
    logits, codes = torch.randn(2, 3, 4, requires_grad=True), torch.rand(2, 2, 4)
    codes.requires_grad_()
    swav_loss(logits, codes, 0.1).backward()
    assert codes.grad is None
    assert logits.grad is not None


def test_the_loss_of_equal_logits_is_log_k() -> None:
    codes = torch.rand(5, 2, 3000).softmax(-1)
    assert float(swav_loss(torch.zeros(5, 8, 3000), codes, 0.1)) == pytest.approx(np.log(3000))


def make_swav(**changes: Any) -> SwAV:
    method = build("swav", "test_resnet", **changes)
    assert isinstance(method, SwAV)
    return method


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
    ("name", "epochs", "start", "peak", "final"),
    [
        ("imagenet", 800, 0.3, 4.8, 0.0048),
        ("small_batch_imagenet", 400, 0.6, 0.6, 0.0006),
    ],
)
def test_learning_rates_are_those_of_the_scripts(
    name: str, epochs: int, start: float, peak: float, final: float
) -> None:
    """swav scripts/*_pretrain.sh: --start_warmup, --base_lr, --final_lr."""
    preset = swav.PRESETS[name]
    assert preset.epochs == epochs
    schedule = Schedule(preset.optim, preset.batch_size, preset.epochs)
    rates = [schedule.learning_rate_at(0), schedule.peak, schedule.learning_rate_at(1)]
    assert rates == pytest.approx([start, peak, final])
