"""Pictures as patches: cut, put together, normalised, and refused."""

from dataclasses import replace

import pytest
import torch

from headrace.training.blocks.patches import (
    if_even,
    mask_over,
    normalize_patches,
    patch_moments,
    patchify,
    random_mask,
    unpatchify,
)
from headrace.training.method import Facts
from headrace.training.preset import ConfigError


def test_normalize_patches_stands_flat_patches() -> None:
    flat = torch.full((1, 2, 12), 0.7)
    torch.testing.assert_close(normalize_patches(flat), torch.zeros(1, 2, 12), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("rows", "columns", "patch"), [(2, 3, 4), (4, 1, 2), (1, 1, 3)])
def test_patches_are_put_together_again(rows: int, columns: int, patch: int) -> None:
    pictures = torch.randn(2, 3, rows * patch, columns * patch)
    patches = patchify(pictures, patch)
    assert patches.shape == (2, rows * columns, patch**2 * 3)
    assert torch.equal(unpatchify(patches, rows), pictures)
    assert torch.equal(patches[0, -1, -3:], pictures[0, :, -1, -1])  # a pixel's RGB


def test_moments_are_those_that_were_taken_out() -> None:
    patches = torch.randn(2, 3, 12) * 4 + 1
    mean, deviation = patch_moments(patches)
    torch.testing.assert_close(normalize_patches(patches) * deviation + mean, patches)
    torch.testing.assert_close(deviation[..., 0].square(), patches.var(dim=-1) + 1e-6)


def test_a_mask_of_another_size_ends_the_run() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    loss = torch.tensor(2.0, requires_grad=True)
    assert if_even(loss, mask, 2) == 2
    assert if_even(loss, mask, 1).isnan()
    mask[0, 0] = False
    assert if_even(loss, mask, 2).isnan()


def test_batches_and_views_without_a_fitting_mask_are_refused() -> None:
    mask = torch.zeros(2, 9, dtype=torch.bool)
    assert mask_over("spark", mask, 9) is mask
    for wrong, text in [(None, "no mask"), (mask[:, :4], "a mask over 4"), (mask[0], "over 9")]:
        with pytest.raises(ConfigError, match=text):
            mask_over("spark", wrong, 16 if wrong is not None else 9)
    facts = Facts(0, 64, (32,), 16, 4, 20)
    with pytest.raises(ConfigError, match=r"mae needs one view with a RandomMask.*\[\]"):
        random_mask("mae", facts)
    with pytest.raises(ConfigError, match=r"\[None\]"):
        random_mask("mae", replace(facts, masks=(None,)))
