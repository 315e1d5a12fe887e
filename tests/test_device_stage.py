"""Finishing: normalisation, erasing and mixing against transcriptions and timm's own code."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from timm.data import mixup as timm_mixup
from timm.data import random_erasing as timm_erasing

from headrace.pipelines.batch import Batch, Erased, Mixed
from headrace.pipelines.draw import draw
from headrace.pipelines.engines import Work
from headrace.pipelines.engines import device_stage as stage
from headrace.pipelines.engines.device_noise import pixel_noise
from headrace.pipelines.engines.device_stage import device_stage, normalize
from headrace.pipelines.ops import CenterCrop
from headrace.pipelines.recipe import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    Mix,
    RandomErasing,
    View,
)
from headrace.training.blocks.targets import soft_targets

CPU = torch.device("cpu")
Fill = Literal["const", "rand", "pixel"]
FILLS: tuple[Fill, ...] = ("const", "rand", "pixel")


def random_view(*shape: int) -> torch.Tensor:
    batch, height, width = shape
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def exact(view: torch.Tensor) -> np.ndarray:
    values = view.permute(0, 2, 3, 1).numpy().astype(np.float64) / 255
    return ((values - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2)


def finish(batch: Batch, dtype: torch.dtype = torch.float32) -> Batch:
    return device_stage(batch, IMAGENET_MEAN, IMAGENET_STD, device=CPU, dtype=dtype)


def drawn_batch(
    *, erase: RandomErasing | None = None, mix: Mix | None = None, samples: int = 16, size: int = 24
) -> Batch:
    """As an engine hands it on: random pixels, with erasing and mixing that were drawn."""
    recipe = Augmentation(
        "drawn", (View("view", (CenterCrop(size),), erase=erase),), group=samples // 2, mix=mix
    )
    plan = draw(
        recipe,
        seed=7,
        epoch=1,
        position=0,
        ids=np.arange(samples),
        occurrences=np.zeros(samples, np.int32),
        sizes=np.full((samples, 2), size, np.int32),
    )
    work = Work(plan, [np.zeros(0, np.uint8)] * samples, np.arange(samples) % 10)
    return work.batch((random_view(samples, size, size),))


# ---- normalisation


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
)
@pytest.mark.parametrize("shape", [(5, 32, 32), (1, 7, 3), (2, 16, 24)])
def test_normalize_is_its_formula(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    view = random_view(*shape)
    before = view.clone()
    found = normalize(view, IMAGENET_MEAN, IMAGENET_STD, dtype)
    assert found.dtype == dtype
    assert found.shape == view.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert np.abs(found.double().numpy() - exact(view)).max() <= tolerance
    assert torch.equal(view, before)


def test_lower_precision_is_the_rounded_float32() -> None:
    """After erasing and mixing, not before."""
    batch = drawn_batch(erase=RandomErasing(0.5), mix=Mix())
    (full,) = finish(batch).views
    for dtype in (torch.float16, torch.bfloat16):
        (found,) = finish(batch, dtype).views
        assert torch.equal(found, full.to(dtype))
        view = batch.views[0]
        expected = normalize(view, IMAGENET_MEAN, IMAGENET_STD).to(dtype)
        assert torch.equal(normalize(view, IMAGENET_MEAN, IMAGENET_STD, dtype), expected)


def test_any_strides_give_the_same() -> None:
    view = random_view(3, 10, 12)
    expected = normalize(view, IMAGENET_MEAN, IMAGENET_STD)
    planar = view.contiguous(memory_format=torch.contiguous_format)
    assert torch.equal(normalize(planar, IMAGENET_MEAN, IMAGENET_STD), expected)
    assert torch.equal(normalize(view[1:], IMAGENET_MEAN, IMAGENET_STD), expected[1:])


def test_a_batch_keeps_everything_else() -> None:
    views = (random_view(2, 8, 8), random_view(2, 4, 4))
    mask = torch.tensor([[True, False], [False, True]])
    batch = Batch(
        views=views,
        labels=torch.tensor([3, -1]),
        ids=torch.tensor([7, 9]),
        masks=(mask, None),
        epoch=4,
        position=64,
        draws={"turn": torch.tensor([1, 2])},
        erased=(None, Erased(torch.tensor([[[0, 0, 0, 0]], [[1, 0, 2, 3]]], dtype=torch.int32))),
    )
    found = finish(batch)
    expected = [normalize(view, IMAGENET_MEAN, IMAGENET_STD) for view in views]
    expected[1][1, :, 1:3, 0:3] = 0
    for view, normalized in zip(expected, found.views, strict=True):
        assert torch.equal(normalized, view)
    assert found.masks[0] is not None
    assert torch.equal(found.masks[0], mask)
    assert found.masks[1] is None
    assert (found.labels.tolist(), found.ids.tolist()) == ([3, -1], [7, 9])
    assert (found.epoch, found.position, found.draws["turn"].tolist()) == (4, 64, [1, 2])


# ---- erasing and mixing: the definition, one sample after the other


def transcribed(batch: Batch) -> NDArray[np.float32]:
    """[B, 3, H, W]: erased, then mixed, in loops over samples and boxes."""
    pixels = normalize(batch.views[0], IMAGENET_MEAN, IMAGENET_STD).numpy().copy()
    height, width = pixels.shape[2:]
    erased = batch.erased[0] if batch.erased else None
    if erased is not None:
        for row, boxes in enumerate(erased.boxes.tolist()):
            for place, (top, left, box_height, box_width) in enumerate(boxes):
                fill = np.zeros((3, height, width), np.float32)
                if erased.colors is not None:
                    fill += erased.colors[row, place].numpy()[:, None, None]
                if erased.keys is not None:
                    noise = pixel_noise(erased.keys[row : row + 1], height * width * 3)
                    fill = noise.view(height, width, 3).permute(2, 0, 1).numpy()
                box = np.s_[:, top : top + box_height, left : left + box_width]
                pixels[row][box] = fill[box]
    if batch.mixed is None:
        return pixels
    result = pixels.copy()
    for row, (top, left, box_height, box_width) in enumerate(batch.mixed.boxes.tolist()):
        partner = pixels[batch.mixed.partners[row]]
        if box_height * box_width > 0:
            box = np.s_[:, top : top + box_height, left : left + box_width]
            result[row][box] = partner[box]
        else:
            own = batch.mixed.weights[row].numpy()
            result[row] = own * pixels[row] + (1 - own) * partner
    return result


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("mix", [None, Mix(), Mix(scope="pair"), Mix(scope="sample")])
@pytest.mark.parametrize("at_once", [None, 1, 5000])
def test_finishing_is_its_transcription(
    fill: Fill, mix: Mix | None, at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, however many samples are taken at a time; with boxes that overlap."""
    if at_once is not None:
        monkeypatch.setattr(stage, "_VALUES_AT_ONCE", {"cpu": at_once})
    batch = drawn_batch(
        erase=RandomErasing(0.6, area=(0.1, 0.6), fill=fill, count=(1, 4)), mix=mix, size=27
    )
    before = batch.map(torch.clone)
    found = finish(batch)
    np.testing.assert_array_equal(found.views[0].numpy(), transcribed(batch))
    assert found.views[0].is_contiguous(memory_format=torch.channels_last)
    for now, then in zip(batch.tensors(), before.tensors(), strict=True):
        assert torch.equal(now, then)
    told = zip(list(found.tensors())[1:], list(before.tensors())[1:], strict=True)
    assert all(torch.equal(now, then) for now, then in told)
    assert found.erased[0] is not None
    assert (found.mixed is None) == (mix is None)


def test_the_cases_above_have_everything_in_them() -> None:
    batch = drawn_batch(erase=RandomErasing(0.6, count=(1, 4)), mix=Mix(scope="sample"))
    (erased,), mixed = batch.erased, batch.mixed
    assert erased is not None
    assert mixed is not None
    boxes = (erased.boxes[..., 2] > 0).sum(dim=1)
    assert set(boxes.tolist()) >= {0, 1, 2, 3}
    cut = mixed.boxes[:, 2] > 0
    assert cut.any()
    assert (mixed.weights < 1)[~cut].any()


def test_what_is_neither_erased_nor_mixed_is_normalised_alone() -> None:
    batch = drawn_batch(erase=RandomErasing(0.0), mix=Mix(probability=0.0))
    (found,) = finish(batch).views
    assert torch.equal(found, normalize(batch.views[0], IMAGENET_MEAN, IMAGENET_STD))


def test_a_partner_is_erased_but_not_mixed() -> None:
    batch = drawn_batch(samples=4, size=8)
    whole = torch.tensor([0, 0, 8, 8], dtype=torch.int32)
    nothing = torch.zeros(4, dtype=torch.int32)
    batch = replace(
        batch,
        erased=(Erased(torch.stack([whole, nothing, nothing, nothing])[:, None]),),
        mixed=Mixed(
            partners=torch.tensor([3, 2, 1, 0]),
            labels=batch.labels.flip(0),
            weights=torch.tensor([0.25, 1.0, 0.0, 0.5]),
            boxes=torch.stack([nothing, nothing, whole, nothing]),
        ),
    )
    plain = normalize(batch.views[0], IMAGENET_MEAN, IMAGENET_STD)
    (found,) = finish(batch).views
    expected = torch.stack([0.75 * plain[3], plain[1], plain[1], 0.5 * plain[3]])
    assert torch.equal(found, expected)


def test_nothing_asks_the_device() -> None:
    """On the meta device whatever depends on values that are there raises."""
    for fill in FILLS:
        batch = drawn_batch(erase=RandomErasing(0.5, fill=fill, count=(1, 2)), mix=Mix())
        found = device_stage(
            batch, IMAGENET_MEAN, IMAGENET_STD, device=torch.device("meta"), dtype=torch.bfloat16
        )
        assert all(tensor.is_meta for tensor in found.tensors())
        assert found.views[0].shape == batch.views[0].shape
        assert found.views[0].dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fill", FILLS)
def test_a_gpu_finishes_alike_and_without_waiting(fill: Fill) -> None:
    batch = drawn_batch(erase=RandomErasing(0.5, fill=fill, count=(1, 2)), mix=Mix(scope="sample"))
    pinned = batch.map(torch.Tensor.pin_memory)

    def finish_there() -> torch.Tensor:
        return device_stage(pinned, IMAGENET_MEAN, IMAGENET_STD, device=torch.device("cuda")).views[
            0
        ]

    finish_there()  # puts the table of quantiles there
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = finish_there()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), finish(batch).views[0], rtol=0, atol=1e-5)


# ---- against timm


class ScriptedErasing:
    """In the place of the module `random`: what makes timm's RandomErasing take these boxes."""

    def __init__(self, boxes: list[tuple[int, ...]], area: int) -> None:
        self._numbers = self._script(boxes, area)

    def _script(self, boxes: list[tuple[int, ...]], area: int) -> Iterator[tuple[str, float]]:
        yield "random", 0.0 if boxes else 1.0
        if not boxes:
            return
        yield "randint", len(boxes)
        for top, left, height, width in boxes:
            yield "uniform", height * width * len(boxes) / area
            yield "uniform", float(np.log(height / width))
            yield "randint", top
            yield "randint", left

    def _next(self, name: str) -> float:
        expected, number = next(self._numbers)
        assert name == expected
        return number

    def random(self) -> float:
        return self._next("random")

    def uniform(self, low: float, high: float) -> float:
        return self._next("uniform")

    def randint(self, low: int, high: int) -> int:
        number = int(self._next("randint"))
        assert low <= number <= high
        return number

    def is_used_up(self) -> bool:
        return next(self._numbers, None) is None


@pytest.mark.parametrize("fill", FILLS)
def test_erasing_is_timms(fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own code on the drawn boxes, with the drawn colours and noise for torch's."""
    batch = drawn_batch(erase=RandomErasing(0.6, fill=fill, count=(1, 3)))
    (erased,) = batch.erased
    assert erased is not None
    theirs: Any = timm_erasing.RandomErasing(
        probability=0.6, mode=fill, min_count=1, max_count=3, device="cpu"
    )
    expected = normalize(batch.views[0], IMAGENET_MEAN, IMAGENET_STD)
    get_pixels: Any = timm_erasing._get_pixels
    for row, picture in enumerate(expected):
        boxes = [tuple(box) for box in erased.boxes[row].tolist() if box[2] > 0]
        place = iter(range(len(boxes)))

        def drawn_pixels(
            per_pixel: bool, rand_color: bool, *rest: Any, row=row, place=place, **more: Any
        ) -> torch.Tensor:
            assert (per_pixel, rand_color) == (fill == "pixel", fill == "rand")
            top, left, height, width = erased.boxes[row, next(place)].tolist()
            if erased.colors is not None:
                index = erased.boxes[row].tolist().index([top, left, height, width])
                return erased.colors[row, index, :, None, None]
            if erased.keys is not None:
                noise = pixel_noise(erased.keys[row : row + 1], 24 * 24 * 3).view(24, 24, 3)
                return noise.permute(2, 0, 1)[:, top : top + height, left : left + width]
            return get_pixels(per_pixel, rand_color, *rest, **more)

        scripted = ScriptedErasing(boxes, 24 * 24)
        monkeypatch.setattr(timm_erasing, "random", scripted)
        monkeypatch.setattr(timm_erasing, "_get_pixels", drawn_pixels)
        theirs(picture)
        assert scripted.is_used_up()
    assert torch.equal(finish(batch).views[0], expected)


SCOPES = [("group", "batch"), ("pair", "pair"), ("sample", "elem")]


@pytest.mark.parametrize(("scope", "mode"), SCOPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixing_and_its_targets_are_timms(
    scope: Literal["group", "pair", "sample"],
    mode: str,
    smoothing: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each group through timm's Mixup, with the drawn weights and boxes for numpy's."""
    batch = drawn_batch(mix=Mix(probability=0.8, scope=scope), samples=24)
    mixed = batch.mixed
    assert mixed is not None
    ours = finish(batch).views[0]
    targets = soft_targets(batch.labels, mixed, 10, smoothing)
    plain = normalize(batch.views[0], IMAGENET_MEAN, IMAGENET_STD)
    theirs: Any = timm_mixup.Mixup(
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        mode=mode,
        label_smoothing=smoothing,
        num_classes=10,
    )
    for first, last in pairwise(range(0, 25, 12)):
        rows = slice(first, last)
        drawn = 1 if scope == "group" else 6 if scope == "pair" else 12
        weights = mixed.weights[rows][:drawn].numpy().copy()
        boxes = mixed.boxes[rows][:drawn]
        cut = (boxes[:, 2] * boxes[:, 3] > 0).numpy()
        edges = iter(
            [
                ((top, top + height, left, left + width), float(weight))
                for (top, left, height, width), weight, is_cut in zip(
                    boxes.tolist(), weights, cut, strict=True
                )
                if is_cut
            ]
        )
        monkeypatch.setattr(theirs, "_params_per_elem", lambda _, w=weights, c=cut: (w, c))
        monkeypatch.setattr(
            theirs, "_params_per_batch", lambda w=weights, c=cut: (float(w[0]), bool(c[0]))
        )
        monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", lambda *_, e=edges, **__: next(e))
        expected, expected_targets = theirs(plain[rows].clone(), batch.labels[rows])
        assert next(edges, None) is None
        torch.testing.assert_close(ours[rows], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(targets[rows], expected_targets, rtol=0, atol=1e-6)
    assert (ours != plain).any()
