"""Sinkhorn codes and the losses of methods that cluster, against float64 loops over entries.

Beside each stand the mistakes that are easily made, to show that the comparison would notice them.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from headrace.training.blocks import sinkhorn as sinkhorn_module
from headrace.training.blocks.sinkhorn import sinkhorn
from headrace.training.methods.deepcluster_v2 import deepcluster_v2_loss
from headrace.training.methods.swav import swav_loss
from tests.objective_checks import Array, assert_same, differs, log_softmax

# ---- Sinkhorn: swav main_swav.py, distributed_sinkhorn


def sinkhorn_oracle(
    logits: Array, epsilon: float, iterations: int, *, samples_first: bool = False
) -> Array:
    """The code's steps on Q, prototypes x samples, one row and one column at a time."""
    q = np.exp(logits / epsilon).T
    prototypes, samples = q.shape
    q /= q.sum()

    def balance_prototypes() -> None:
        for k in range(prototypes):
            q[k] = q[k] / q[k].sum() / prototypes

    def balance_samples() -> None:
        for b in range(samples):
            q[:, b] = q[:, b] / q[:, b].sum() / samples

    steps = [balance_prototypes, balance_samples]
    for _ in range(iterations):
        for step in reversed(steps) if samples_first else steps:
            step()
    return (q * samples).T


def cosines(*shape: int, seed: int = 0) -> Array:
    """In [-1, 1], and such as float32 holds."""
    random = np.random.default_rng(seed)
    return random.uniform(-1, 1, shape).astype(np.float32).astype(np.float64)


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


# ---- SwAV: eq. 2 and 6; swav main_swav.py, train


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


# ---- DeepCluster-v2: swav main_deepclusterv2.py, train


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
