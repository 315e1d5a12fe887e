"""Colour spaces against their standards."""

import numpy as np

from headrace.training.blocks.color import rgb_to_lab, rgb_to_ycbcr
from tests.color_checks import corners, lab_oracle
from tests.objective_checks import differs


def test_lab() -> None:
    pictures = corners()
    ours = rgb_to_lab(pictures)
    expected = [lab_oracle(*color) for color in pictures[0].flatten(1).T.tolist()]
    np.testing.assert_allclose(ours[0].flatten(1).T.numpy(), expected, atol=0.02)
    assert differs(expected[1][2], float(rgb_to_lab(pictures**1.2)[0, 2, 0, 3]))


def test_ycbcr() -> None:
    """ITU-R BT.601: Kr 0.299, Kb 0.114, 219 steps of luma and 224 of chroma."""
    pictures = corners()
    for color, ours in zip(
        pictures[0].flatten(1).T.tolist(), rgb_to_ycbcr(pictures)[0].flatten(1).T, strict=True
    ):
        red, _, blue = color
        luma = 0.299 * red + 0.587 * color[1] + 0.114 * blue
        chroma = (blue - luma) / 1.772, (red - luma) / 1.402
        expected = [16 + 219 * luma, 128 + 224 * chroma[0], 128 + 224 * chroma[1]]
        np.testing.assert_allclose(ours.numpy(), expected, atol=0.02)
