"""InfoNCE against float64 transcriptions of the papers' equations, entry by entry.

Beside each stand the mistakes that are easily made, to show that the comparison would notice them.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.training.blocks.info_nce import batch_info_nce, queue_info_nce
from tests.objective_checks import (
    Array,
    assert_same,
    batch_info_nce_oracle,
    cosine,
    differs,
    float32_normal,
    info_nce,
)

# ---- MoCo: He et al. 2019, eq. 1; moco builder.py, MoCo.forward


def queue_oracle(rows: Array, n: int, temperature: float, *, mistake: str = "") -> float:
    """rows: n queries, their n keys, then the queue."""
    queries, keys, queue = rows[:n], rows[n : 2 * n], rows[2 * n :]
    losses = []
    for i in range(n):
        others = list(queue)
        if mistake == "the batch's other keys count too":
            others += [keys[j] for j in range(n) if j != i]
        if mistake == "lengths count":
            logits = np.array([queries[i] @ key for key in [keys[i], *others]]) / temperature
            losses.append(np.log(np.exp(logits).sum()) - logits[0])
        elif mistake == "the key is not in the sum":
            total = sum(np.exp(cosine(queries[i], key) / temperature) for key in others)
            losses.append(np.log(total) - cosine(queries[i], keys[i]) / temperature)
        else:
            losses.append(info_nce(queries[i], keys[i], others, temperature))
    return float(np.mean(losses))


@pytest.mark.parametrize(
    ("n", "dim", "queue", "temperature"), [(3, 4, 6, 0.2), (1, 3, 5, 0.07), (4, 8, 1, 1.0)]
)
def test_queue_info_nce(n: int, dim: int, queue: int, temperature: float) -> None:
    rows = float32_normal(np.random.default_rng(n), 2 * n + queue, dim)

    def ours(x: Tensor) -> Tensor:
        return queue_info_nce(x[:n], x[n : 2 * n], x[2 * n :], temperature)[0]

    assert_same(ours, lambda x: queue_oracle(x, n, temperature), rows)
    value = queue_oracle(rows, n, temperature)
    mistakes = ["lengths count", "the key is not in the sum"]
    if n > 1:
        mistakes.append("the batch's other keys count too")
    for mistake in mistakes:
        assert differs(value, queue_oracle(rows, n, temperature, mistake=mistake)), mistake
    assert differs(value, queue_oracle(rows, n, 1.5 * temperature))


# ---- MoCo v3: Chen et al. 2021, eq. 1


@pytest.mark.parametrize(
    ("n", "batch", "first_row", "dim", "temperature"),
    [(4, 4, 0, 5, 0.2), (2, 6, 2, 3, 1.0), (3, 6, 3, 8, 0.07)],
)
def test_batch_info_nce(n: int, batch: int, first_row: int, dim: int, temperature: float) -> None:
    rows = float32_normal(np.random.default_rng(batch), n + batch, dim)

    def ours(x: Tensor) -> Tensor:
        return batch_info_nce(x[:n], x[n:], first_row, temperature)[0]

    def oracle(x: Array) -> float:
        return batch_info_nce_oracle(x[:n], x[n:], first_row, temperature)

    assert_same(ours, oracle, rows)
    value, shifted = oracle(rows), (first_row + 1) % (batch - n + 1)
    if shifted != first_row:
        assert differs(value, batch_info_nce_oracle(rows[:n], rows[n:], shifted, temperature))
    twice = batch_info_nce_oracle(rows[:n], rows[n:], first_row, temperature, own_twice=True)
    assert differs(value, twice)
    assert differs(value, 2 * temperature * value)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_found_is_whether_the_own_key_is_nearest(temperature: float) -> None:
    queries, keys, queue = (float32_normal(np.random.default_rng(seed), 16, 3) for seed in range(3))
    queries[:8] = keys[:8] + 0.1 * queries[:8]
    near = np.array([[cosine(query, key) for key in keys] for query in queries])
    far = np.array([[cosine(query, key) for key in queue] for query in queries])
    as_float = [torch.tensor(each).float() for each in (queries, keys, queue)]
    _, found = queue_info_nce(as_float[0], as_float[1], as_float[2], temperature)
    expected = near.diagonal() > far.max(axis=1)
    assert found.tolist() == expected.tolist()
    _, found = batch_info_nce(as_float[0], as_float[1], 0, temperature)
    assert found.tolist() == (near.argmax(axis=1) == np.arange(16)).tolist()
    assert 0 < sum(expected) < 16


def test_logits_stay_float32_under_autocast() -> None:
    rows = torch.tensor(float32_normal(np.random.default_rng(5), 12, 64)).float()

    def losses() -> list[Tensor]:
        return [
            queue_info_nce(rows[:3], rows[3:6], rows[6:], 0.07)[0],
            batch_info_nce(rows[:3], rows[6:], 1, 0.07)[0],
        ]

    exact = losses()
    with torch.autocast("cpu", torch.bfloat16):
        ours = losses()
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))
    half, _ = queue_info_nce(rows[:3].bfloat16(), rows[3:6].bfloat16(), rows[6:].bfloat16(), 0.07)
    assert half.dtype == torch.float32
