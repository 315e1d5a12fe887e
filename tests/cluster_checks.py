"""What tests of methods that cluster share: similarities, and Sinkhorn's steps entry by entry."""

import numpy as np

from tests.objective_checks import Array


def sinkhorn_oracle(
    logits: Array, epsilon: float, iterations: int, *, samples_first: bool = False
) -> Array:
    """swav main_swav.py, distributed_sinkhorn: its steps on Q, prototypes x samples, one row and
    one column at a time."""
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
