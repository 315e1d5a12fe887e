"""KoLeo against a float64 transcription."""

import numpy as np
import pytest
import torch

from headrace.training.blocks.koleo import koleo_loss
from tests.objective_checks import Array, as_float32, assert_same, differs, value_and_gradient


def koleo_oracle(features: Array, *, normalized: bool = True, squared: bool = False) -> float:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True) if normalized else features
    losses = []
    for row in range(len(unit)):
        others = [other for other in range(len(unit)) if other != row]
        nearest = max(others, key=lambda other: unit[row] @ unit[other])
        distance = np.sqrt(((unit[row] - unit[nearest] + 1e-8) ** 2).sum())
        losses.append(-np.log(distance ** (2 if squared else 1) + 1e-8))
    return float(np.mean(losses))


@pytest.mark.parametrize(("samples", "dim"), [(2, 3), (5, 4), (7, 2)])
def test_koleo_loss(samples: int, dim: int) -> None:
    random = np.random.default_rng(samples)
    features = as_float32(random.normal(size=(samples, dim)))
    assert_same(lambda x: koleo_loss(x, x, 0), koleo_oracle, features)
    assert differs(koleo_oracle(features), koleo_oracle(features, normalized=False))
    assert differs(koleo_oracle(features), koleo_oracle(features, squared=True))
    # A neighbour without gradient is another loss, though of the same value.
    value, gradient = value_and_gradient(lambda x: koleo_loss(x, x, 0), features)
    same, halved = value_and_gradient(lambda x: koleo_loss(x, x.detach(), 0), features)
    assert value == same
    assert np.linalg.norm(gradient - halved) > 0.1 * np.linalg.norm(gradient)


def test_koleo_of_a_share_looks_at_everyone() -> None:
    features = torch.randn(6, 3)
    shares = [
        koleo_loss(features[rows], features, rows.start) for rows in (slice(0, 2), slice(2, 6))
    ]
    weighted = (2 * shares[0] + 4 * shares[1]) / 6
    torch.testing.assert_close(weighted, koleo_loss(features, features, 0))
