"""What tests of masked modelling share: masks, oracles, and checks that several methods pass."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.pipelines.batch import Batch
from headrace.training.blocks.patches import (
    normalize_patches,
    patchify,
    unpatchify,
)
from tests.objective_checks import Array, as_float32, differs, log_softmax
from tests.tiny_methods import (
    batch_of,
    build,
    progress_at,
)

Mask = NDArray[np.bool_]


def distributions(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    drawn = np.exp(3 * random.normal(size=shape))
    return as_float32(drawn / drawn.sum(-1, keepdims=True))


def masks(random: np.random.Generator, samples: int, places: int) -> Mask:
    """Of every size: all, none, and what is drawn."""
    drawn = random.random((samples, 2, places)) < 0.5
    drawn[0, 0], drawn[-1, 1] = True, False
    return drawn


def patch_oracle(
    student: Array,
    targets: Array,
    masked: Mask,
    temperature: float,
    *,
    batch_wide: bool = False,
    skip_unmasked: bool = False,
) -> float:
    """iBOT: eq. 2; ibot main_ibot.py, iBOTLoss.forward, the terms with v == q.

    student, targets [B, 2, n, K]; masked [B, 2, n].
    """
    samples, views, places, _ = student.shape
    total, terms = 0.0, 0
    for view in range(views):
        per_sample = []
        for sample in range(samples):
            entropy, count = 0.0, 0
            for place in range(places):
                if masked[sample, view, place]:
                    logs = log_softmax(student[sample, view, place] / temperature)
                    entropy -= (targets[sample, view, place] * logs).sum()
                    count += 1
            per_sample.append(entropy if batch_wide else entropy / max(count, 1))
            if skip_unmasked and count == 0:
                per_sample.pop()
        total += np.sum(per_sample) / masked[:, view].sum() if batch_wide else np.mean(per_sample)
        terms += 1
    return float(total / terms)


def painted(batch: Batch, view: int, places: Tensor) -> Batch:
    """The batch with pixels of this view's patches (bool [B, 64], 4 pixels each) replaced."""
    hidden = places.view(-1, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    views = list(batch.views)
    views[view] = torch.where(hidden[:, None], 9.0, views[view])
    return replace(batch, views=tuple(views))


def mask_of(batch: Batch, view: int = 0) -> Tensor:
    mask = batch.masks[view]
    assert mask is not None
    return mask


def hidden_pixels_oracle(
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
    """SparK pretrain/spark.py, SparK.forward, step 4; painted, pictures [B, 3, H, W].

    It cuts nothing: it visits each hidden cell where it stands.
    """
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


def assert_asks_for_hidden_pixels(name: str, encoder: str, *, normalize: bool) -> None:
    """What it logs is the oracle's number for what it painted, and visible targets are free."""
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
        value = hidden_pixels_oracle(*arrays, normalized=normalize)
        assert float(outputs["loss"]) == pytest.approx(value, rel=1e-5)
        assert differs(value, hidden_pixels_oracle(*arrays, normalized=not normalize))
        hidden = mask.view(4, 1, rows, rows).repeat_interleave(cell, 2).repeat_interleave(cell, 3)
        other = replace(batch, views=(torch.where(hidden, view, view + torch.randn_like(view)),))
        loss = method.objective(embeddings, other, progress_at(0))["loss"]
    torch.testing.assert_close(loss, outputs["loss"])


def assert_shows_a_perfect_prediction(
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
