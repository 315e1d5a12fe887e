"""Losses against float64 transcriptions of their equations, in value and in gradient.

Each oracle is numpy alone and written from the paper or its code, entry by entry rather than as the
implementation has it; its gradient is taken by central differences. Beside each loss stand the
mistakes that are easily made, to show that the comparison would notice them.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from headrace.training.methods.simclr import nt_xent
from tests.objective_checks import Array, assert_same, differs, log_softmax, value_and_gradient

# ---- DINO: eq. 1 to 3 and algorithm 1; dino main_dino.py, DINOLoss.forward


# ---- SimCLR: eq. 1 and algorithm 1


def nt_xent_oracle(
    embeddings: Array, temperature: float, *, own: bool = False, other_view_only: bool = False
) -> float:
    """embeddings [B, 2, D]. Algorithm 1: the mean of l(i, j) over all 2B ordered positive pairs."""
    samples = len(embeddings)
    unit = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    everyone = [(sample, view) for sample in range(samples) for view in range(2)]
    losses = []
    for sample, view in everyone:
        others = [
            other
            for other in everyone
            if (own or other != (sample, view)) and not (other_view_only and other[1] == view)
        ]
        logits = np.array([unit[sample, view] @ unit[other] / temperature for other in others])
        losses.append(-log_softmax(logits)[others.index((sample, 1 - view))])
    return float(np.mean(losses))


@pytest.mark.parametrize(
    ("samples", "dim", "temperature"), [(2, 3, 0.1), (5, 4, 0.5), (3, 8, 1.0), (1, 4, 0.5)]
)
def test_nt_xent(samples: int, dim: int, temperature: float) -> None:
    random = np.random.default_rng(samples)
    at = random.normal(size=(samples, 2, dim)).astype(np.float32).astype(np.float64)

    def ours(x: Tensor) -> Tensor:
        return nt_xent(x, x, 0, temperature)[0]

    if samples == 1:
        # The partner is the only other view.
        assert float(ours(torch.tensor(at))) == 0
        return
    assert_same(ours, lambda x: nt_xent_oracle(x, temperature), at)
    value = nt_xent_oracle(at, temperature)
    assert differs(value, nt_xent_oracle(at, temperature, own=True))
    assert differs(value, nt_xent_oracle(at, temperature, other_view_only=True))
    assert differs(value, nt_xent_oracle(at, temperature * 1.5))


def test_nt_xent_moves_keys_and_queries() -> None:
    """A stop-gradient on the gathered keys changes the gradient and not the value."""
    x = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(0))
    at = x.double().numpy()
    value, gradient = value_and_gradient(lambda x: nt_xent(x, x, 0, 0.5)[0], at)
    stopped, one_sided = value_and_gradient(lambda x: nt_xent(x, x.detach(), 0, 0.5)[0], at)
    assert value == stopped
    assert np.linalg.norm(gradient - one_sided) > 0.1 * np.linalg.norm(gradient)


def test_nt_xent_of_parts_is_that_of_the_whole() -> None:
    x = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(1))
    whole, found = nt_xent(x, x, 0, 0.3)
    parts = [nt_xent(x[start : start + 2], x, start, 0.3) for start in (0, 2, 4)]
    torch.testing.assert_close(torch.stack([part[0] for part in parts]).mean(), whole)
    assert sum(int(part[1].sum()) for part in parts) == int(found.sum())


def test_nt_xent_recognises_partners() -> None:
    pairs = F.one_hot(torch.arange(4), 8).float()[:, None].expand(4, 2, 8)
    assert nt_xent(pairs, pairs, 0, 0.1)[1].all()
    # Views in a circle, each nearest to its neighbour's: nobody finds the partner.
    wrong = torch.stack([pairs[:, 0], pairs[:, 0].roll(1, dims=0)], dim=1)
    assert not nt_xent(wrong, wrong, 0, 0.1)[1].any()


# ---- MAE: section 3, "Reconstruction target"; mae models_mae.py, patchify and forward_loss


# ---- supervised: cross-entropy with smoothed targets (Szegedy et al. 2015, section 7)
