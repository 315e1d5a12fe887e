"""The sign of a collapse."""

import pytest
import torch

from headrace.training.blocks.cosine import spread


def test_spread_is_0_for_a_constant_and_1_for_directions_everywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    constant = torch.randn(1, 2, 64, generator=generator)
    lengths = 1 + torch.rand(256, 1, 1, generator=generator)
    assert float(spread(constant * lengths)) == pytest.approx(0, abs=1e-4)
    everywhere = torch.randn(256, 2, 64, generator=generator)
    assert float(spread(everywhere)) == pytest.approx(1, abs=0.02)
    assert 0.05 < float(spread(constant + 0.1 * everywhere)) < 0.2
