"""Two processes are one process: the mean over ranks of loss and gradient is the global batch's.

One pair of gloo processes serves all tests (two_ranks.py); it receives a method and the global
batches, and sends back what its rank saw.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from headrace.training.world import World
from tests.precision import in_float64
from tests.tiny_methods import (
    CASES,
    build,
    make_batch,
    small_preset,
)
from tests.two_ranks import (
    HALFWAY,
    TOLERANCE,
    Call,
    assert_agrees,
    cached_gradients,
    gathered,
    normalized,
    relative_error,
    smooth,
    train,
    uneven,
)

STEPS = 6  # of four in an epoch


@pytest.fixture(autouse=True, scope="module")
def float64() -> Iterator[None]:
    with in_float64():
        yield


# ---- methods


@pytest.mark.dist
@pytest.mark.parametrize(("name", "encoder"), CASES)
def test_two_ranks_are_one(name: str, encoder: str, on_two_ranks: Call) -> None:
    """Six steps over two epochs; and what two ranks began, one continues as if nothing were."""
    method = smooth(build(name, encoder, **changes_of(name)))
    preset = small_preset(name)
    # Losses of normalised features or scaled scores are flat: the steps have to move something.
    rate = 1e-2 if name in ("ijepa", "cpc") else 1e-3
    batches = [uneven(make_batch(preset.augmentation, 16, seed)) for seed in range(STEPS)]
    one = train(method, preset, batches, 0, rate, World())
    two = on_two_ranks(train, method, preset, batches, 0, rate)
    assert two[0]["digest"] == two[1]["digest"]
    moved = relative_error(method.state_dict(), one["state"])
    assert moved > 1e-4, "steps that change nothing would agree with anything"
    for seen in two:
        assert_agrees(seen, one)
    other = copy.deepcopy(method)
    other.load_state_dict(two[0]["halfway"])
    rest = train(other, preset, batches[HALFWAY:], HALFWAY, rate, World())
    rest["losses"] = torch.cat([two[0]["losses"][:HALFWAY], rest["losses"]])
    assert_agrees({**rest, "first": one["first"]}, one)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["simclr", "moco_v3", "barlow_twins", "swav", "dino"])
def test_a_gradient_cache_sees_all_ranks_and_micro_batches(name: str, on_two_ranks: Call) -> None:
    method = build(name, "test_vit")
    for module in method.modules():
        for key, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d):
                setattr(module, key, nn.Identity())
    preset = small_preset(name)
    batch = uneven(make_batch(preset.augmentation, 16))
    one = cached_gradients(method, preset, batch, 1, World())
    for seen in on_two_ranks(cached_gradients, method, preset, batch, 2):
        assert relative_error(seen, one) < TOLERANCE


def changes_of(name: str) -> dict[str, Any]:
    """Stochastic depth where a method has it: its coins too are the global batch's. Groups of 8
    where there are groups: the statistics of 4 samples magnify rounding tenfold."""
    wanted = {"drop_path": 0.2, "batch_norm_group": 8}
    return {key: wanted[key] for key in wanted if hasattr(small_preset(name).objective, key)}


# ---- blocks


@pytest.mark.dist
def test_gathered_gradient_is_the_sum_over_ranks(on_two_ranks: Call) -> None:
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.arange(12.0).view(4, 3)
    # Rank 0 asks for weights, rank 1 for their squares, of everybody's rows.
    expected = (weights + weights**2).chunk(2)
    for rank, (everyone, gradient) in enumerate(on_two_ranks(gathered, values)):
        assert torch.equal(everyone, values)
        assert torch.equal(gradient, expected[rank])


@pytest.mark.dist
@pytest.mark.parametrize("first_rows", [4, 1, 7])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(5),
        nn.BatchNorm2d(5, momentum=0.4),
        nn.BatchNorm2d(5, affine=False),
        BatchNormAct2d(5),
    ],
    ids=["1d", "2d", "2d without affine", "with activation"],
)
def test_batch_norm_spans_ranks(norm: nn.Module, first_rows: int, on_two_ranks: Call) -> None:
    """Also where ranks hold unequally many rows."""
    generator = torch.Generator().manual_seed(0)
    shape = (8, 5) if isinstance(norm, nn.BatchNorm1d) else (8, 5, 4, 4)
    x = 1 + torch.randn(shape, generator=generator)
    cotangent = torch.randn(shape, generator=generator)
    norm = copy.deepcopy(norm).double()
    one = normalized(norm, x, cotangent, first_rows, World())
    two = on_two_ranks(normalized, norm, x, cotangent, first_rows)
    for key, expected in one.items():
        if key in ("output", "input gradient"):
            ours = torch.cat([each[key] for each in two])
        elif key.endswith("gradient"):
            ours = two[0][key] + two[1][key]
        else:
            assert torch.equal(two[0][key], two[1][key])
            ours = two[0][key]
        torch.testing.assert_close(ours, expected, rtol=TOLERANCE, atol=1e-12)
