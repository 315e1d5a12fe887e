"""MAE's and SparK's losses on whole pictures against float64 transcriptions, pixel by pixel.

`test_objectives.py` has MAE's on patches that are cut already; here the network gives a picture, as
SparK's does, and the oracle cuts nothing: it visits each hidden cell where it stands.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.training.blocks.patches import (
    if_even,
    mask_over,
    normalize_patches,
    patch_moments,
    patchify,
    random_mask,
    reconstruction_loss,
    unpatchify,
)
from headrace.training.method import Facts
from headrace.training.preset import ConfigError
from tests.objective_checks import Array, assert_same, differs
from tests.tiny_methods import batch_of, build, progress_at


def spark_oracle(
    painted: Array,
    pictures: Array,
    mask: NDArray[np.bool_],
    cell: int,
    *,
    ddof: int = 1,
    by_channel: bool = False,
    normalized: bool = True,
    everywhere: bool = False,
) -> float:
    """SparK pretrain/spark.py, SparK.forward, step 4; painted, pictures [B, 3, H, W]."""
    side = pictures.shape[2] // cell
    total, count = 0.0, 0
    for sample in range(len(pictures)):
        for row in range(side):
            for column in range(side):
                if not (mask[sample, row * side + column] or everywhere):
                    continue
                place = np.s_[
                    sample,
                    :,
                    row * cell : (row + 1) * cell,
                    column * cell : (column + 1) * cell,
                ]
                truth = pictures[place]
                if normalized:
                    axes = (1, 2) if by_channel else None
                    mean = truth.mean(axis=axes, keepdims=True)
                    variance = truth.var(axis=axes, ddof=ddof, keepdims=True)
                    truth = (truth - mean) / (variance + 1e-6) ** 0.5
                total += ((painted[place] - truth) ** 2).mean()
                count += 1
    return total / count


@pytest.mark.parametrize(("batch", "side", "cell"), [(2, 2, 2), (1, 3, 4), (3, 4, 2)])
def test_spark_loss(batch: int, side: int, cell: int) -> None:
    random = np.random.default_rng(side)
    shape = batch, 3, side * cell, side * cell
    pictures = random.normal(size=shape).astype(np.float32).astype(np.float64)
    at = random.normal(size=shape).astype(np.float32).astype(np.float64)
    cells = side**2
    mask = random.permuted(np.tile(np.arange(cells) < round(0.6 * cells), (batch, 1)), axis=1)
    target = normalize_patches(patchify(torch.tensor(pictures), cell))

    def ours(x: Tensor) -> Tensor:
        return reconstruction_loss(patchify(x, cell), target, torch.tensor(mask))

    assert_same(ours, lambda x: spark_oracle(x, pictures, mask, cell), at)
    value = spark_oracle(at, pictures, mask, cell)
    assert differs(value, spark_oracle(at, pictures, mask, cell, ddof=0))
    assert differs(value, spark_oracle(at, pictures, mask, cell, by_channel=True))
    assert differs(value, spark_oracle(at, pictures, mask, cell, normalized=False))
    assert differs(value, spark_oracle(at, pictures, mask, cell, everywhere=True))
    assert differs(value, spark_oracle(at, pictures, ~mask, cell))


@pytest.mark.parametrize(
    ("name", "encoder", "normalize"),
    [("mae", "test_vit", True), ("mae", "test_vit", False), ("spark", "test_resnet", True)],
)
def test_the_methods_ask_for_hidden_pixels(name: str, encoder: str, normalize: bool) -> None:
    """What they log is the oracle's number for what they painted, and visible targets are free."""
    changes = {"normalize_pixels": normalize} if name == "mae" else {}
    method: Any = build(name, encoder, **changes)
    batch = batch_of(name, samples=4)
    view, mask = batch.views[0], batch.masks[0]
    assert mask is not None
    rows = round(mask.shape[1] ** 0.5)
    cell = view.shape[2] // rows
    with torch.no_grad():
        outputs, embeddings = method(batch, progress_at(0))
        painted = unpatchify(embeddings["prediction"], rows)
        arrays = painted.double().numpy(), view.double().numpy(), mask.numpy(), cell
        value = spark_oracle(*arrays, normalized=normalize)
        assert float(outputs["loss"]) == pytest.approx(value, rel=1e-5)
        assert differs(value, spark_oracle(*arrays, normalized=not normalize))
        hidden = mask.view(4, 1, rows, rows).repeat_interleave(cell, 2).repeat_interleave(cell, 3)
        other = replace(batch, views=(torch.where(hidden, view, view + torch.randn_like(view)),))
        loss = method.objective(embeddings, other, progress_at(0))["loss"]
    torch.testing.assert_close(loss, outputs["loss"])


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


@pytest.mark.parametrize(("name", "encoder"), [("mae", "test_vit"), ("spark", "test_resnet")])
def test_a_perfect_prediction_is_shown_as_the_picture(
    name: str, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method: Any = build(name, encoder)
    batch = batch_of(name, samples=2)
    view, mask = batch.views[0], batch.masks[0]
    assert mask is not None
    cell = view.shape[2] // round(mask.shape[1] ** 0.5)
    truth = normalize_patches(patchify(view, cell))
    monkeypatch.setattr(method, "predict", lambda _: truth)
    shown, note = method.reconstruct(batch)
    torch.testing.assert_close(shown, view, rtol=1e-4, atol=1e-4)
    assert "true mean and deviation" in note
    assert method(batch, progress_at(0))[0]["loss"] < 1e-6


def test_mae_shows_plain_pixels_as_they_are() -> None:
    method: Any = build("mae", "test_vit", normalize_pixels=False)
    batch = batch_of("mae", samples=2)
    shown, note = method.reconstruct(batch)
    torch.testing.assert_close(patchify(shown, 4), method.predict(batch))
    assert "true" not in note


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
