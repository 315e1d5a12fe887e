"""Sinkhorn codes against float64 loops over entries, over ranks, and with padding."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.training.blocks import sinkhorn as sinkhorn_module
from headrace.training.blocks.sinkhorn import sinkhorn
from tests.cluster_checks import cosines, sinkhorn_oracle
from tests.objective_checks import Array, as_float32


@pytest.mark.parametrize(
    ("samples", "prototypes", "epsilon", "iterations"),
    [(6, 4, 0.05, 3), (3, 7, 0.05, 3), (16, 5, 0.5, 1), (1, 3, 0.1, 3), (5, 3, 0.1, 5)],
)
def test_sinkhorn(samples: int, prototypes: int, epsilon: float, iterations: int) -> None:
    logits = cosines(samples, prototypes, seed=samples)
    ours = sinkhorn(torch.tensor(logits), epsilon=epsilon, iterations=iterations)
    expected = sinkhorn_oracle(logits, epsilon, iterations)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, rtol=2e-5, atol=1e-7)
    if samples > 1:
        for mistake in (
            sinkhorn_oracle(logits, 1.1 * epsilon, iterations),
            sinkhorn_oracle(logits, epsilon, iterations + 1),
            sinkhorn_oracle(logits, epsilon, iterations, samples_first=True),
            np.exp(logits / epsilon) / np.exp(logits / epsilon).sum(1, keepdims=True),
        ):
            assert np.abs(mistake - ours.numpy()).max() > 1e-4


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.floats(0, 1e6), st.integers(0, 2**31))
def test_codes_of_any_logits_sum_to_one(
    samples: int, prototypes: int, size: float, seed: int
) -> None:
    logits = size * torch.randn(samples, prototypes, generator=torch.Generator().manual_seed(seed))
    codes = sinkhorn(logits, epsilon=0.05, iterations=3)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(samples))


def test_a_prototype_that_is_far_from_all_samples_is_used_nevertheless() -> None:
    """exp(-1e4 / epsilon) is zero in any floating point, and 0 / 0 no code."""
    logits = torch.tensor([[1.0, 0.9, -1e4], [0.8, 1.0, -1e4], [0.0, 0.5, -1e4]])
    codes = sinkhorn(logits, epsilon=0.05, iterations=300)
    torch.testing.assert_close(codes.sum(0), torch.ones(3), rtol=1e-2, atol=0)


def test_codes_take_no_gradient_and_are_float32_under_autocast() -> None:
    logits = torch.tensor(cosines(6, 4), dtype=torch.float32, requires_grad=True)
    exact = sinkhorn(logits, epsilon=0.05, iterations=3)
    with torch.autocast("cpu", torch.bfloat16):
        codes = sinkhorn(logits, epsilon=0.05, iterations=3)
    assert not codes.requires_grad
    assert codes.dtype == torch.float32
    assert torch.equal(codes, exact)


def on_ranks(function: Callable[[Tensor], Tensor], parts: list[Tensor]) -> list[Tensor]:
    """A thread for each rank, which meet where the block asks for the others' rows."""
    barrier, places, own = threading.Barrier(len(parts)), [Tensor()] * len(parts), threading.local()

    def gather(tensor: Tensor) -> Tensor:
        places[own.rank] = tensor
        barrier.wait(timeout=30)
        everyone = torch.cat(places)
        barrier.wait(timeout=30)
        return everyone

    def work(rank: int) -> Tensor:
        own.rank = rank
        return function(parts[rank])

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(parts)) as pool:
        patch.setattr(sinkhorn_module, "gather_rows", gather)
        return list(pool.map(work, range(len(parts))))


@pytest.mark.parametrize("lengths", [(4, 4), (7, 1), (8, 0), (2, 3, 3)])
def test_codes_are_joint_over_ranks(lengths: tuple[int, ...]) -> None:
    """For unequal shares too, one of which may be empty."""
    logits = torch.tensor(cosines(8, 5), dtype=torch.float32)
    whole = sinkhorn(logits, epsilon=0.05, iterations=3)

    def codes(part: Tensor) -> Tensor:
        return sinkhorn(part, epsilon=0.05, iterations=3)

    parts = list(logits.split(lengths))
    torch.testing.assert_close(torch.cat(on_ranks(codes, parts)), whole, rtol=1e-6, atol=1e-7)
    alone = torch.cat([codes(part) for part in parts])
    if 0 not in lengths:
        assert not torch.allclose(alone, whole, rtol=0.1)


def dinov2_oracle(logits: Array, temperature: float, iterations: int) -> Array:
    """dinov2 ibot_patch_loss.py, sinkhorn_knopp_teacher."""
    codes = np.exp(logits / temperature).T
    prototypes, rows = codes.shape
    codes /= codes.sum()
    for _ in range(iterations):
        codes /= codes.sum(axis=1, keepdims=True)
        codes /= prototypes
        codes /= codes.sum(axis=0, keepdims=True)
        codes /= rows
    return (codes * rows).T


@pytest.mark.parametrize("temperature", [0.04, 0.07, 0.5])
def test_sinkhorn_leaves_out_padding(temperature: float) -> None:
    random = np.random.default_rng(0)
    logits = as_float32(random.uniform(-1, 1, (9, 5)))
    counted = np.array([1, 0, 1, 1, 0, 0, 1, 1, 1], np.bool_)
    given = torch.tensor(logits).float(), torch.tensor(counted)
    ours = sinkhorn(given[0], epsilon=temperature, iterations=3, counted=given[1]).numpy()
    expected = dinov2_oracle(logits[counted], temperature, 3)
    np.testing.assert_allclose(ours[counted], expected, rtol=1e-4, atol=1e-6)
    whole = dinov2_oracle(logits, temperature, 3)[counted]
    assert np.abs(whole - expected).max() > 1e-2, "padding that counts would be noticed"


def test_sinkhorn_of_padding_alone_is_finite() -> None:
    nothing = torch.zeros(3, dtype=torch.bool)
    assert sinkhorn(torch.randn(3, 4), epsilon=0.1, iterations=3, counted=nothing).isfinite().all()
