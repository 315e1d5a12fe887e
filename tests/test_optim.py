"""Schedules against their closed forms; optimisers against independent arithmetic."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from timm.optim.lamb import Lamb
from torch import nn

from headrace.training import schedules
from headrace.training.large_batch import LAMB, LARC, LARS
from headrace.training.method import Method
from headrace.training.optim import Schedule, build_optimizer, clip_gradients, gradient_norm
from headrace.training.preset import Optim

progresses = st.floats(0, 1)
rates = st.floats(0, 10)

# --------------------------------------------------------------------------------------- schedules


@given(progresses, rates, rates)
def test_cosine_is_half_a_cosine(progress: float, start: float, end: float) -> None:
    expected = end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))
    assert schedules.cosine(progress, start, end) == pytest.approx(expected, abs=1e-12)
    assert schedules.cosine(0, start, end) == pytest.approx(start)
    assert schedules.cosine(1, start, end) == pytest.approx(end)


@given(progresses, rates, rates)
def test_linear_is_a_straight_line(progress: float, start: float, end: float) -> None:
    value = schedules.linear(progress, start, end)
    assert value == pytest.approx((1 - progress) * start + progress * end, abs=1e-12)


@given(progresses, rates, rates, rates, st.floats(0.01, 0.99))
def test_warmup_cosine_is_its_two_parts(
    progress: float, peak: float, final: float, start: float, warmup: float
) -> None:
    value = schedules.warmup_cosine(progress, peak, final, warmup, start)
    if progress < warmup:
        expected = start + (peak - start) * progress / warmup
    else:
        angle = math.pi * (progress - warmup) / (1 - warmup)
        expected = final + 0.5 * (peak - final) * (1 + math.cos(angle))
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_schedules_are_continuous_where_the_warmup_ends() -> None:
    schedule = Schedule(Optim(warmup_epochs=3), 256, 10)
    before, after = (schedule.learning_rate_at(0.3 + d) for d in (-1e-9, 1e-9))
    assert before == pytest.approx(after, rel=1e-6)
    assert schedule.learning_rate_at(0.3) == pytest.approx(schedule.peak)


def test_the_learning_rate_scales_with_the_batch_unless_told_not_to() -> None:
    optim = Optim(learning_rate=0.1, final_learning_rate=0.01, warmup_from=0.001, warmup_epochs=1)
    schedule = Schedule(optim, 1024, 10)
    assert schedule.peak == pytest.approx(0.4)
    assert schedule.learning_rate_at(0) == pytest.approx(0.004)
    assert schedule.learning_rate_at(1) == pytest.approx(0.04)
    fixed = Schedule(Optim(learning_rate=0.1, scale_with_batch=False), 1024, 10)
    assert fixed.peak == 0.1


def test_steps_fall_at_the_milestones() -> None:
    optim = Optim(learning_rate=1, warmup_epochs=0, schedule="steps", milestones=(1 / 3, 2 / 3))
    schedule = Schedule(optim, 256, 90)
    values = [schedule.learning_rate_at(epoch / 90) for epoch in (0, 29, 30, 59, 60, 89)]
    assert values == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_a_whole_cosine_begins_with_the_run() -> None:
    """timm's CosineLRScheduler without `warmup_prefix`, as DeiT has it."""
    optim = Optim(learning_rate=1, final_learning_rate=0.1, warmup_epochs=5)
    shifted, whole = (
        Schedule(replace(optim, schedule=schedule), 256, 300)
        for schedule in ("cosine", "whole_cosine")
    )
    for progress in (0, 2 / 300):
        assert whole.learning_rate_at(progress) == shifted.learning_rate_at(progress)
    for epoch in (5, 108, 299):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * epoch / 300)) / 2
        assert whole.learning_rate_at(epoch / 300) == pytest.approx(expected)
    apart = [
        shifted.learning_rate_at(epoch / 300) - whole.learning_rate_at(epoch / 300)
        for epoch in range(300)
    ]
    assert 0.01 < max(apart) < 0.02


def test_a_stable_rate_decays_at_the_end_alone() -> None:
    """Warmup-stable-decay: until the decay begins, the length of the run changes nothing."""
    optim = Optim(
        learning_rate=1,
        final_learning_rate=0.2,
        warmup_epochs=1,
        schedule="stable_decay",
        decay_epochs=2,
    )
    short, long = Schedule(optim, 256, 10), Schedule(optim, 256, 20)
    for epoch in (0, 0.5, 1, 5, 8):
        assert short.learning_rate_at(epoch / 10) == pytest.approx(
            long.learning_rate_at(epoch / 20)
        )
    assert [short.learning_rate_at(epoch / 10) for epoch in (1, 8, 9, 10)] == pytest.approx(
        [1, 1, 0.6, 0.2]
    )
    assert Schedule(optim, 256, 1).learning_rate_at(1) == 1  # nothing but its warm-up
    cut = Schedule(replace(optim, decay_epochs=50), 256, 10)
    assert [cut.learning_rate_at(epoch / 10) for epoch in (0.5, 1, 5.5, 10)] == pytest.approx(
        [0.5, 1, 0.6, 0.2]
    )


@pytest.mark.parametrize("epoch_steps", [1, 3, 7, 1251])
def test_a_rate_per_epoch_changes_with_the_first_step_of_each(epoch_steps: int) -> None:
    schedule = Schedule(Optim(learning_rate=1, warmup_epochs=0, per_epoch=True), 256, 9)
    rates = [schedule.learning_rate_at(step / (9 * epoch_steps)) for step in range(9 * epoch_steps)]
    for epoch in range(9):
        assert set(rates[epoch * epoch_steps : (epoch + 1) * epoch_steps]) == {
            schedule.learning_rate_at(epoch / 9)
        }
    assert len(set(rates)) == 9


def test_a_warmup_longer_than_the_run_is_cut_off() -> None:
    schedule = Schedule(Optim(learning_rate=1, warmup_epochs=10), 256, 5)
    assert schedule.learning_rate_at(0.5) == pytest.approx(0.25)
    assert schedule.learning_rate_at(1.0) == pytest.approx(0.5)


def test_weight_decay_is_constant_or_a_cosine() -> None:
    assert Schedule(Optim(weight_decay=0.3), 256, 1).weight_decay_at(0.7) == 0.3
    moving = Schedule(Optim(weight_decay=0.04, final_weight_decay=0.4), 256, 1)
    values = [moving.weight_decay_at(progress) for progress in (0, 0.5, 1)]
    assert values == pytest.approx([0.04, 0.22, 0.4])


# -------------------------------------------------------------------------------------- optimisers


def make(name: str, groups: list[dict[str, Any]], **changes: Any) -> torch.optim.Optimizer:
    schedule = Schedule(Optim(**{"name": name, "warmup_epochs": 0, **changes}), 256, 1)
    optimizer = build_optimizer(groups, schedule)
    schedule.apply(optimizer, 0)
    return optimizer


class Reference:
    """LARS in float64 numpy, written from the formulas of You et al. and moco-v3's exclusions."""

    def __init__(self, value: NDArray[np.float64], rate: float, decay: float) -> None:
        self.value, self.rate, self.decay = value.copy(), rate, decay
        self.velocity = np.zeros_like(value)

    def step(self, gradient: NDArray[np.float64]) -> None:
        if self.value.ndim > 1:
            gradient = gradient + self.decay * self.value
            own, other = np.sqrt((self.value**2).sum()), np.sqrt((gradient**2).sum())
            trust = 0.001 * own / other if own > 0 and other > 0 else 1.0
            gradient = trust * gradient
        self.velocity = 0.9 * self.velocity + gradient
        self.value = self.value - self.rate * self.velocity


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2, 2), (7,), ()])
def test_lars_is_its_formula(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    start = generator.standard_normal(shape)
    parameter = nn.Parameter(torch.tensor(start))
    optimizer = LARS([parameter], lr=0.3, momentum=0.9, weight_decay=0.1)
    reference = Reference(start, 0.3, 0.1)
    for _ in range(5):
        gradient = np.asarray(generator.standard_normal(shape))
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        reference.step(gradient)
    np.testing.assert_allclose(parameter.detach().numpy(), reference.value, rtol=1e-12, atol=1e-14)


def test_lars_takes_a_zero_parameter_and_a_zero_gradient_as_they_are() -> None:
    zero = nn.Parameter(torch.zeros(2, 2))
    optimizer = LARS([zero], lr=1.0, momentum=0.0)
    zero.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(zero.detach(), -torch.ones(2, 2))
    zero.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(zero.detach(), -torch.ones(2, 2))


def test_larc_is_apex_around_torch_sgd() -> None:
    """apex parallel/LARC.py, `step`, with clip=False: entry by entry in float64 numpy."""
    generator = np.random.default_rng(0)
    shapes = [(5, 3), (4, 3, 2, 2), (7,), (1,)]
    values = [generator.standard_normal(shape) for shape in shapes]
    trust, decay, rate, momentum, eps = 0.001, 0.1, 0.3, 0.9, 1e-8
    parameters = [nn.Parameter(torch.tensor(value)) for value in values]
    optimizer = LARC(parameters, lr=rate, momentum=momentum, weight_decay=decay)
    buffers: dict[int, NDArray[np.float64]] = {}  # torch's SGD: the first is the gradient
    for step in range(5):
        for i, parameter in enumerate(parameters):
            gradient = 1e-6 * generator.standard_normal(shapes[i])
            if step == 3:
                gradient = np.zeros(shapes[i])
            parameter.grad = torch.tensor(gradient)
            param_norm, grad_norm = (np.sqrt(np.sum(x**2)) for x in (values[i], gradient))
            if param_norm != 0 and grad_norm != 0:
                adaptive = trust * param_norm / (grad_norm + param_norm * decay + eps)
                gradient = (gradient + decay * values[i]) * adaptive
            buffers[i] = momentum * buffers[i] + gradient if i in buffers else gradient
            values[i] = values[i] - rate * buffers[i]
        optimizer.step()
    for parameter, value in zip(parameters, values, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-12, atol=1e-14)


def test_larc_takes_a_zero_parameter_as_it_is() -> None:
    zero = nn.Parameter(torch.zeros(3))
    optimizer = LARC([zero], lr=1.0, momentum=0.0, weight_decay=0.5)
    zero.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(zero.detach(), -torch.ones(3))


def lamb_steps(
    make_optimizer: Any, gradients: list[list[torch.Tensor]], clip: float | None = None
) -> list[torch.Tensor]:
    """Parameters after these gradients; two groups, of which the second does not decay."""
    generator = torch.Generator().manual_seed(1)
    shapes = [tuple(gradient.shape) for gradient in gradients[0]]
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in shapes
    ]
    parameters[1].detach().zero_()
    groups = [
        {"params": parameters[:2], "weight_decay": 0.1},
        {"params": parameters[2:], "weight_decay": 0.0},
    ]
    optimizer = make_optimizer(groups)
    for step, step_gradients in enumerate(gradients):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = gradient.clone()
        if clip is not None:
            clip_gradients(parameters, gradient_norm(parameters), clip)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("clip", [None, 5.0])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)])
def test_lamb_is_that_of_timm(betas: tuple[float, float], clip: float | None) -> None:
    """Its clipping, which SparK sets to 5, is our --optim.clip-norm."""
    generator = torch.Generator().manual_seed(0)
    gradients = [
        [
            3 * torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in [(5, 3), (3, 3), (7,), (2, 2)]
        ]
        for _ in range(6)
    ]
    ours = lamb_steps(lambda groups: LAMB(groups, lr=1.0, betas=betas), gradients, clip)
    reference = lamb_steps(
        lambda groups: Lamb(groups, lr=1.0, betas=betas, eps=1e-6, max_grad_norm=clip), gradients
    )
    # torch's clipping adds 1e-6 to the norm.
    tolerance = 1e-9 if clip is None else 1e-6
    for parameter, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(parameter, expected, rtol=tolerance, atol=tolerance)


def test_lamb_does_not_rescale_what_does_not_decay() -> None:
    """A first step of Adam has length 1 per entry, whatever the parameter's length."""
    long, short = (nn.Parameter(torch.full((2, 2), size)) for size in (100.0, 100.0))
    optimizer = LAMB([{"params": [long], "weight_decay": 1e-9}, {"params": [short]}], lr=1e-3)
    for parameter in (long, short):
        parameter.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(100 - long.detach(), torch.full((2, 2), 0.1), rtol=1e-3, atol=0)
    torch.testing.assert_close(100 - short.detach(), torch.full((2, 2), 1e-3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["lars", "larc", "lamb"])
def test_large_batch_optimisers_continue_from_their_state(name: str) -> None:
    def run(interrupted_after: int | None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        parameter = nn.Parameter(torch.randn(3, 4, generator=generator))
        optimizer = make(name, [{"params": [parameter]}], learning_rate=0.1, weight_decay=0.1)
        for step in range(5):
            if step == interrupted_after:
                saved = optimizer.state_dict()
                optimizer = make(name, [{"params": [parameter]}])
                optimizer.load_state_dict(saved)
            parameter.grad = torch.randn(3, 4, generator=generator)
            optimizer.step()
        return parameter.detach()

    assert torch.equal(run(None), run(2))


@pytest.mark.parametrize("name", ["lars", "larc", "lamb"])
def test_a_parameter_without_gradient_stays(name: str) -> None:
    """Frozen prototypes: no decay and no momentum moves them."""
    parameter = nn.Parameter(torch.ones(3, 4))
    optimizer = make(name, [{"params": [parameter]}], learning_rate=0.1, weight_decay=0.1)
    parameter.grad = torch.ones(3, 4)
    optimizer.step()
    before = parameter.detach().clone()
    parameter.grad = None
    optimizer.step()
    assert torch.equal(parameter.detach(), before)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "lamb"])
def test_biases_and_norms_do_not_decay(name: str) -> None:
    class Small(Method):
        def __init__(self) -> None:
            super().__init__()
            linear = nn.Linear(3, 3)
            nn.init.ones_(linear.bias)
            self.encoder = nn.Sequential(linear, nn.LayerNorm(3))

    method = Small()
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    optimizer = make(name, method.param_groups(), learning_rate=0.1, weight_decay=0.5)
    for parameter in method.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"encoder.0.weight"}
    kept = before["encoder.0.weight"]
    now = method.encoder[0].weight.detach()  # pyright: ignore[reportIndexIssue]
    assert (now.abs() <= kept.abs()).all()


def test_groups_scale_and_fix_their_learning_rate() -> None:
    one, two, three = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optim = Optim(learning_rate=1, warmup_epochs=1, name="sgd")
    schedule = Schedule(optim, 256, 4)
    groups = [
        {"params": [one]},
        {"params": [two], "learning_rate_scale": 0.5},
        {"params": [three], "fixed_learning_rate": True},
        {"params": []},
    ]
    optimizer = build_optimizer(groups, schedule)
    said = schedule.apply(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25, 1.0]
    assert said["learning_rate"] == 0.5


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "larc", "lamb"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_blocked_step_changes_neither_parameters_nor_state(name: str, steps_before: int) -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(3, 4, generator=generator))
    optimizer = make(name, [{"params": [parameter]}], weight_decay=0.1)
    blocked = torch.zeros(())
    optimizer.found_inf = blocked  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(steps_before):
        parameter.grad = torch.randn(3, 4, generator=generator)
        optimizer.step()
    before = parameter.detach().clone()
    state = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    blocked.fill_(1)
    parameter.grad = torch.full((3, 4), math.nan)
    optimizer.step()
    assert torch.equal(parameter, before)
    for key, value in state.items():
        assert torch.equal(optimizer.state[parameter][key], value), key
    blocked.fill_(0)
    parameter.grad = torch.ones(3, 4)
    optimizer.step()
    assert not torch.equal(parameter, before)
    assert parameter.isfinite().all()


def test_the_global_norm_is_that_of_all_gradients_together() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3)), nn.Parameter()]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0, 0])
    norm = gradient_norm(parameters)
    assert float(norm) == pytest.approx(5)
    clip_gradients(parameters, norm, 10)
    assert float(gradient_norm(parameters)) == pytest.approx(5)
    clip_gradients(parameters, norm, 1)
    assert float(gradient_norm(parameters)) == pytest.approx(1, rel=1e-4)
