"""The reference engine: each op against its formula written out here, and the engine itself."""

import io
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as F

from headrace.pipelines import engines, recipes
from headrace.pipelines.draw import draw
from headrace.pipelines.engines import Engine, SampleError, Work, choice
from headrace.pipelines.engines.device_stage import device_stage
from headrace.pipelines.engines.reference import (
    BATCHES_IN_FLIGHT,
    apply_op,
    blur_kernel_size,
    gaussian_blur,
)
from headrace.pipelines.ops import (
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Interpolation,
    OneOf,
    Op,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Solarize,
    centered_offset,
    resized_shape,
)
from headrace.pipelines.recipe import Augmentation, Mix, RandomErasing, View
from headrace.shards.pixels import decode_rgb


def photo_like(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 [height, width, 3] with soft colours, an edge and a little grain."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth).astype(np.float64)
    pixels[height // 3 :, width // 2 :] *= 0.6
    pixels += random.normal(0, 3, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def encoded(pixels: NDArray[np.uint8], kind: str) -> NDArray[np.uint8]:
    """The picture as the bytes of a JPEG, PNG or binary PNM file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return np.frombuffer(file.getvalue(), np.uint8)


def run_op(pixels: NDArray[np.uint8], op: Op, **draws: object) -> NDArray[np.int64]:
    columns: Mapping[str, NDArray] = {name: np.array([value]) for name, value in draws.items()}
    return np.asarray(apply_op(Image.fromarray(pixels), op, columns)).astype(np.int64)


def luma(pixels: NDArray) -> NDArray[np.float64]:
    """ITU-R 601."""
    return pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def clipped(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(values, 0, 255)


def assert_near(found: NDArray, expected: NDArray, levels: float = 1.0) -> None:
    __tracebackhide__ = True
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= levels


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return photo_like(44, 61)


def cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(1 - np.abs(x), 0)


def resampled(
    pixels: NDArray, height: int, width: int, interpolation: Interpolation
) -> NDArray[np.float64]:
    """Antialiased by definition: the kernel is stretched by the factor of reduction."""
    kernel = cubic if interpolation == "bicubic" else triangle
    values = pixels.astype(np.float64)
    for axis, length in ((1, width), (0, height)):
        source = values.shape[axis]
        if source == length:
            continue
        factor = source / length
        centres = (np.arange(length) + 0.5) * factor
        distances = np.arange(source)[None, :] + 0.5 - centres[:, None]
        weights = kernel(distances / max(factor, 1.0))
        weights /= weights.sum(axis=1, keepdims=True)
        values = np.moveaxis(np.tensordot(weights, values, axes=(1, axis)), 0, axis)
        values = np.rint(clipped(values))
    return values


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("box", [(3, 5, 30, 41), (10, 20, 9, 12), (0, 0, 44, 61), (7, 7, 16, 16)])
def test_crop_is_cut_then_resampled_with_antialiasing(
    pixels: NDArray[np.uint8], interpolation: Interpolation, box: tuple[int, int, int, int]
) -> None:
    top, left, height, width = box
    op = RandomResizedCrop(16, interpolation=interpolation)
    expected = resampled(pixels[top : top + height, left : left + width], 16, 16, interpolation)
    assert_near(run_op(pixels, op, box=box), expected)


@pytest.mark.parametrize("shape", [(44, 61), (61, 44), (30, 30)])
@pytest.mark.parametrize("size", [16, 30, 70])
def test_resize_and_center_crop(shape: tuple[int, int], size: int) -> None:
    pixels = photo_like(*shape)
    height, width = resized_shape(*shape, shorter=size)
    resized = run_op(pixels, Resize(size))
    assert_near(resized, resampled(pixels, height, width, "bicubic"))
    assert min(height, width) == size
    crop = 2 * size // 3
    top, left = centered_offset(height, crop), centered_offset(width, crop)
    found = run_op(resized.astype(np.uint8), CenterCrop(crop))
    np.testing.assert_array_equal(found, resized[top : top + crop, left : left + crop])


def test_center_crop_pads_a_smaller_picture_with_black() -> None:
    pixels = photo_like(10, 21)
    found = run_op(pixels, CenterCrop(15))
    top, left = -centered_offset(10, 15), centered_offset(21, 15)
    expected = np.zeros((15, 15, 3))
    expected[top : top + 10] = pixels[:, left : left + 15]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(44, 61), (20, 61), (19, 17)])
@pytest.mark.parametrize(("size", "padding"), [(32, 0), (32, 4), (20, 0), (24, 9)])
def test_random_crop_is_torchvisions(
    shape: tuple[int, int], size: int, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever place its generator gives, first, last or between."""
    pixels = photo_like(*shape)
    theirs = transforms.RandomCrop(size, padding or None, pad_if_needed=True)
    borders = [padding + max(size - (side + 2 * padding), 0) for side in shape]
    lasts = [side + 2 * border - size for side, border in zip(shape, borders, strict=True)]
    for share in (0.0, 0.4, 1.0):
        top, left = round(share * lasts[0]), round((1 - share) * lasts[1])
        monkeypatch.setattr(
            theirs, "get_params", lambda *_, place=(top, left): (*place, size, size)
        )
        expected: Any = theirs(Image.fromarray(pixels))  # pyright: ignore[reportArgumentType]
        found = run_op(pixels, RandomCrop(size), start=(top - borders[0], left - borders[1]))
        np.testing.assert_array_equal(found, np.asarray(expected))


def test_flip_and_gates(pixels: NDArray[np.uint8]) -> None:
    np.testing.assert_array_equal(run_op(pixels, Flip(), apply=True), pixels[:, ::-1])
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1)
    for op in (Flip(), Grayscale(), Solarize()):
        np.testing.assert_array_equal(run_op(pixels, op, apply=False), pixels)
    left_out = run_op(pixels, jitter, apply=False, factors=(2, 2, 2, 0.1), order=(0, 1, 2, 3))
    np.testing.assert_array_equal(left_out, pixels)
    np.testing.assert_array_equal(run_op(pixels, GaussianBlur(), sigma=0.0), pixels)


@pytest.mark.parametrize("threshold", [0, 128, 200, 256])
def test_solarize_inverts_from_the_threshold_on(pixels: NDArray[np.uint8], threshold: int) -> None:
    found = run_op(pixels, Solarize(threshold=threshold), apply=True)
    np.testing.assert_array_equal(found, np.where(pixels >= threshold, 255 - pixels, pixels))


def test_grayscale_is_luma_on_three_channels(pixels: NDArray[np.uint8]) -> None:
    found = run_op(pixels, Grayscale(), apply=True)
    assert_near(found, np.repeat(np.rint(luma(pixels))[..., None], 3, axis=2))
    assert (found == found[..., :1]).all()


def jittered(
    pixels: NDArray[np.uint8], factors: tuple[float, float, float, float], *only: int
) -> NDArray[np.int64]:
    """By the factors in the order of `only`; an op that is not in it has strength 0."""
    strengths = [0.4 if index in only else 0.0 for index in range(4)]
    op = ColorJitter(strengths[0], strengths[1], strengths[2], strengths[3])
    order = (*only, *(index for index in range(4) if index not in only))
    return run_op(pixels, op, apply=True, factors=np.array(factors, np.float32), order=order)


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.0, 1.4, 2.5])
def test_brightness_contrast_saturation_are_blends(
    pixels: NDArray[np.uint8], factor: float
) -> None:
    factors = (factor, factor, factor, 0.0)
    values = pixels.astype(np.float64)
    mean = math.floor(luma(pixels).round().mean() + 0.5)
    gray = luma(pixels).round()[..., None]
    assert_near(jittered(pixels, factors, 0), clipped(factor * values))
    assert_near(jittered(pixels, factors, 1), clipped(factor * values + (1 - factor) * mean))
    assert_near(jittered(pixels, factors, 2), clipped(factor * values + (1 - factor) * gray))


@pytest.mark.parametrize("shift", [-0.8, -0.1236, 0.0, 0.1234, 0.1236, 0.8])
def test_additive_brightness_is_a_clamped_sum(pixels: NDArray[np.uint8], shift: float) -> None:
    """Against the sum of [0, 1] pixels, and before a contrast as after it."""
    factors = np.array([shift, 1.4, 1, 0], np.float32)

    def shifted(pixels: NDArray[Any], contrast: float, *order: int) -> NDArray[np.int64]:
        op = ColorJitter(0.8, contrast, 0, 0, additive_brightness=True)
        return run_op(pixels.astype(np.uint8), op, apply=True, factors=factors, order=order)

    alone = shifted(pixels, 0, 0, 1, 2, 3)
    assert_near(alone, 255 * np.clip(pixels / 255 + float(factors[0]), 0, 1), 0.5)
    contrasted = jittered(alone.astype(np.uint8), (1, 1.4, 1, 0), 1)
    np.testing.assert_array_equal(shifted(pixels, 0.4, 0, 1, 2, 3), contrasted)
    contrasted = jittered(pixels, (1, 1.4, 1, 0), 1)
    np.testing.assert_array_equal(
        shifted(pixels, 0.4, 1, 0, 2, 3), shifted(contrasted, 0, 0, 1, 2, 3)
    )


def hue_turned(pixels: NDArray[np.uint8], shift: float) -> NDArray[np.float64]:
    """In float: hexcone HSV, the hue turned by `shift` of the circle."""
    rgb = pixels.astype(np.float64)
    value, low = rgb.max(axis=-1), rgb.min(axis=-1)
    chroma = value - low
    safe = np.where(chroma == 0, 1, chroma)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    sector = np.select(
        [chroma == 0, value == red, value == green],
        [0 * red, (green - blue) / safe, 2 + (blue - red) / safe],
        4 + (red - green) / safe,
    )
    sector = (sector + 6 * shift) % 6
    offsets = (np.array([5.0, 3.0, 1.0]) + sector[..., None]) % 6
    ramp = np.clip(np.minimum(offsets, 4 - offsets), 0, 1)
    return value[..., None] - chroma[..., None] * ramp


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.05, 0.4])
def test_hue_turns_the_colour_circle(pixels: NDArray[np.uint8], shift: float) -> None:
    found = jittered(pixels, (1, 1, 1, shift), 3)
    difference = np.abs(found - hue_turned(pixels, shift))
    assert difference.mean() < 1.5  # Pillow's HSV has 8 bits, and the shift is one of 255 steps
    assert np.abs(pixels - hue_turned(pixels, shift)).mean() > 3 * difference.mean()


def test_jitter_follows_the_planned_order(pixels: NDArray[np.uint8]) -> None:
    factors = (1.4, 0.7, 1.3, 0.1)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        expected = pixels
        for index in order:
            expected = jittered(expected, factors, index).astype(np.uint8)
        np.testing.assert_array_equal(jittered(pixels, factors, *order), expected)
    forwards, backwards = jittered(pixels, factors, 0, 1), jittered(pixels, factors, 1, 0)
    assert (forwards != backwards).any()


def convolved(pixels: NDArray[np.uint8], sigma: float, side: int) -> NDArray[np.float64]:
    """The two-dimensional sum, in float64, tap by tap."""
    radius = side // 2
    padded = np.pad(
        pixels.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)), "reflect"
    )
    total, weight_sum = np.zeros(pixels.shape), 0.0
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            weight = math.exp(-(dy * dy + dx * dx) / (2 * sigma * sigma))
            rows = slice(radius + dy, radius + dy + pixels.shape[0])
            columns = slice(radius + dx, radius + dx + pixels.shape[1])
            total += weight * padded[rows, columns]
            weight_sum += weight
    return total / weight_sum


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.3, 2.0])
@pytest.mark.parametrize("kernel_size", [None, 3, 9])
def test_blur_is_the_normalised_gaussian_with_reflected_border(
    sigma: float, kernel_size: int | None
) -> None:
    pixels = photo_like(32, 32)
    op = GaussianBlur(kernel_size=kernel_size)
    side = kernel_size or 2 * math.ceil(3 * np.float32(sigma)) + 1
    found = run_op(pixels, op, sigma=np.float32(sigma))
    exact = convolved(pixels, sigma, side)
    assert np.abs(found - exact).max() < 0.5 + 1e-3
    torchvision = np.asarray(
        F.gaussian_blur(torch.from_numpy(pixels).permute(2, 0, 1), [side, side], [sigma])
    )
    assert_near(found, torchvision.transpose(1, 2, 0).astype(np.int64))


@given(size=st.integers(1, 9), sigma=st.floats(0.1, 5))
@settings(max_examples=40)
def test_blur_of_tiny_views_takes_what_the_border_allows(size: int, sigma: float) -> None:
    side = blur_kernel_size(GaussianBlur(sigma=(0.1, 5)), sigma, size)
    radius = (side - 1) // 2
    assert side == 2 * radius + 1
    assert radius == min(math.ceil(3 * sigma), size - 1)
    pixels = photo_like(size, size)
    found = np.asarray(gaussian_blur(Image.fromarray(pixels), sigma, side))
    assert np.abs(found - convolved(pixels, sigma, side)).max() < 0.5 + 1e-3


def test_decode_takes_pixels_as_stored(pixels: NDArray[np.uint8]) -> None:
    for kind in ("PNG", "PPM"):
        np.testing.assert_array_equal(np.asarray(decode_rgb(encoded(pixels, kind))), pixels)
    rgba = np.dstack([pixels, np.full(pixels.shape[:2], 7, np.uint8)])
    np.testing.assert_array_equal(np.asarray(decode_rgb(encoded(rgba, "PNG"))), pixels)
    gray = pixels[..., 0]
    np.testing.assert_array_equal(np.asarray(decode_rgb(encoded(gray, "PNG")))[..., 2], gray)
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(turned, "JPEG", exif=exif)
    assert decode_rgb(np.frombuffer(turned.getvalue(), np.uint8)).size == (61, 44)


SHAPES = [(40, 52), (33, 33), (60, 41), (24, 90), (48, 48), (50, 37), (41, 41)]


@pytest.fixture(scope="module")
def files() -> list[NDArray[np.uint8]]:
    kinds = ["JPEG", "PNG", "PPM"]
    return [
        encoded(photo_like(*shape, seed=index), kinds[index % 3])
        for index, shape in enumerate(SHAPES)
    ]


def work_for(
    recipe: Augmentation, files: list[NDArray[np.uint8]], epoch: int = 0, samples: int | None = None
) -> Work:
    files = files[:samples]
    ids = np.arange(len(files), dtype=np.int64)
    plan = draw(
        recipe,
        seed=11,
        epoch=epoch,
        position=0,
        ids=ids,
        occurrences=np.zeros(len(ids), np.int32),
        sizes=np.array(SHAPES[: len(ids)], np.int32),
    )
    return Work(plan, files, ids * 10)


MIXED = Augmentation(
    "mixed",
    (
        View("large", recipes.dino(24, 12, 1).views[0].ops),
        View("small", recipes.dino(24, 12, 1).views[2].ops, count=2),
        View("test", (Resize(26), CenterCrop(24))),
    ),
)

AUGMENTED = Augmentation(
    "augmented",
    (
        View(
            "view",
            (
                Resize(26),
                RandomCrop(24, padding_pixels=4),
                Flip(),
                RandAugment(probability=1.0, interpolation="random"),
                OneOf((Grayscale(1.0), Solarize(1.0), GaussianBlur(1.0))),
                ColorJitter(0.8, 0.4, 0.4, 0.1, additive_brightness=True),
            ),
            erase=RandomErasing(0.5, fill="rand", count=(1, 3)),
        ),
    ),
    group=2,
    mix=Mix(),
)


@pytest.fixture
def opened() -> Iterator[Callable[..., Engine]]:
    """open_engine, closed at the end of the test."""
    with ExitStack() as stack:

        def open_one(
            name: str, recipe: Augmentation, threads: int = 2, finished: torch.dtype | None = None
        ) -> Engine:
            engine = engines.open_engine(name, recipe, threads=threads, finished=finished)
            stack.callback(engine.close)
            return engine

        yield open_one


def test_engine_gives_what_the_ops_give_one_by_one(
    opened: Callable[..., Engine], files: list[NDArray[np.uint8]]
) -> None:
    work = work_for(MIXED, files)
    engine = opened("reference", MIXED)
    (batch,) = engine.run(iter([work]))
    engine.close()
    assert [tuple(view.shape) for view in batch.views] == [
        (7, 3, 24, 24), (7, 3, 12, 12), (7, 3, 12, 12), (7, 3, 24, 24),
    ]  # fmt: skip
    for view, found, planned in zip(MIXED.flat_views, batch.views, work.plan.views, strict=True):
        assert found.dtype == torch.uint8
        assert found.is_contiguous(memory_format=torch.channels_last)
        for row, file in enumerate(files):
            picture = decode_rgb(file)
            for op, draws in zip(view.executed, planned.ops, strict=True):
                picture = apply_op(picture, op, draws, row)
            np.testing.assert_array_equal(found[row].permute(1, 2, 0).numpy(), picture)
    assert batch.labels.tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert batch.ids.tolist() == list(range(7))
    assert batch.masks == (None,) * 4


def test_every_declared_op_is_executed_and_the_rest_handed_on(
    opened: Callable[..., Engine], files: list[NDArray[np.uint8]]
) -> None:
    """Erasing and mixing are `device_stage`'s; the views stay as the ops left them."""
    work = work_for(AUGMENTED, files, samples=6)
    (batch,) = opened("reference", AUGMENTED).run(iter([work]))
    (view,), (planned,) = AUGMENTED.flat_views, work.plan.views
    assert len(view.executed) == len(view.ops) + 2
    for row, file in enumerate(files[:6]):
        picture = decode_rgb(file)
        for op, draws in zip(view.executed, planned.ops, strict=True):
            picture = apply_op(picture, op, draws, row)
        np.testing.assert_array_equal(batch.views[0][row].permute(1, 2, 0).numpy(), picture)
    (erased,), mixed = batch.erased, batch.mixed
    assert erased is not None
    assert erased.colors is not None
    assert mixed is not None
    np.testing.assert_array_equal(erased.boxes.numpy(), planned.erase["box"])
    np.testing.assert_array_equal(erased.colors.numpy(), planned.erase["color"])
    assert mixed.partners.tolist() == [1, 0, 3, 2, 5, 4]
    assert mixed.labels.tolist() == [10, 0, 30, 20, 50, 40]
    np.testing.assert_array_equal(mixed.weights.numpy(), work.plan.mix["weight"])


def test_masks_come_from_the_plan(
    opened: Callable[..., Engine], files: list[NDArray[np.uint8]]
) -> None:
    recipe = recipes.mae(32, patch_pixels=8)
    work = work_for(recipe, files)
    (batch,) = opened("reference", recipe).run(iter([work]))
    (mask,), planned = batch.masks, work.plan.views[0].mask
    assert mask is not None
    assert planned is not None
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask.numpy(), planned)


def test_batches_keep_their_order_and_memory(
    opened: Callable[..., Engine], files: list[NDArray[np.uint8]]
) -> None:
    """Uneven batches, all held, equal for any number of threads, and taken ahead within bounds."""
    taken = 0

    def works() -> Iterator[Work]:
        nonlocal taken
        for epoch in range(6):
            taken += 1
            yield work_for(MIXED, files, epoch, samples=1 + epoch % 3 * 3)

    def run(threads: int) -> list[torch.Tensor]:
        nonlocal taken
        taken = 0
        engine = opened("reference", MIXED, threads=threads)
        held, copies = [], []
        for done, batch in enumerate(engine.run(works()), start=1):
            assert batch.epoch == done - 1
            assert taken - done < BATCHES_IN_FLIGHT
            held += batch.views
            copies += [view.clone() for view in batch.views]
        engine.close()
        assert len(held) == 24
        assert all(torch.equal(view, copy) for view, copy in zip(held, copies, strict=True))
        return held

    for one, two in zip(run(1), run(2), strict=True):
        assert torch.equal(one, two)


def test_a_damaged_file_is_named_after_the_batches_before_it(
    opened: Callable[..., Engine],
    files: list[NDArray[np.uint8]],
) -> None:
    cut_off = [*files[:4], files[4][: len(files[4]) // 2], *files[5:]]
    engine = opened("reference", MIXED)
    made = engine.run(iter([work_for(MIXED, files), work_for(MIXED, cut_off)]))
    next(made)
    with pytest.raises(SampleError, match="sample 4 cannot be decoded") as caught:
        next(made)
    assert caught.value.sample_id == 4
    engine.close()
    engine.close()


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\xff\xd8\xff"])
def test_what_is_no_picture_is_an_error_in_words(
    opened: Callable[..., Engine], files: list[NDArray[np.uint8]], content: bytes
) -> None:
    broken = [np.frombuffer(content, np.uint8), *files[1:]]
    engine = opened("reference", MIXED)
    with pytest.raises(SampleError, match="sample 0 cannot be decoded: "):
        next(engine.run(iter([work_for(MIXED, broken)])))


def test_a_picture_of_another_size_than_planned_is_refused(
    opened: Callable[..., Engine],
    files: list[NDArray[np.uint8]],
) -> None:
    engine = opened("reference", MIXED)
    swapped = [files[1], files[0], *files[2:]]
    with pytest.raises(SampleError, match=r"33 x 33 pixels .* index says 52 x 40"):
        next(engine.run(iter([work_for(MIXED, swapped)])))


def test_synthetic_batches_have_the_right_shapes_and_fresh_memory(
    opened: Callable[..., Engine],
    files: list[NDArray[np.uint8]],
) -> None:
    recipe = recipes.mae(32, patch_pixels=8)
    works = [work_for(recipe, files, epoch) for epoch in range(2)]
    first, second = opened("synthetic", recipe).run(iter(works))
    (view,) = first.views
    assert view.shape == (7, 3, 32, 32)
    assert view.dtype == torch.uint8
    assert view.is_contiguous(memory_format=torch.channels_last)
    view.zero_()
    assert second.views[0].min() > 0
    assert first.labels.tolist() == list(range(0, 70, 10))
    assert first.masks[0] is not None


def test_finished_synthetic_batches_are_as_device_stage_makes_them(
    opened: Callable[..., Engine], files: list[NDArray[np.uint8]]
) -> None:
    recipe = recipes.dino(32, 16, 2)
    work = work_for(recipe, files)
    (raw,) = opened("synthetic", recipe).run(iter([work]))
    (batch,) = opened("synthetic", recipe, finished=torch.float32).run(iter([work]))
    wanted = device_stage(raw, recipe.mean, recipe.std, device=torch.device("cpu"))
    for one, other in zip(batch.views, wanted.views, strict=True):
        assert one.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one, other)


def test_choice_of_an_engine() -> None:
    recipe = recipes.dino(32, 16, 2)
    assert engines.choose("auto", recipe, "cpu") == "fused"
    assert engines.choose("synthetic", recipe) == "synthetic"
    with pytest.raises(engines.Unsupported, match="there are auto, fused, dali, reference, synth"):
        engines.choose("fastest", recipe)
    assert engines.rejections(recipe)["reference"] == []


def test_auto_takes_the_first_that_can_and_reports_what_the_others_lack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipes.dino(32, 16, 2)
    lacking = {"dali": ["GaussianBlur: no"], "fused": ["Grayscale: no"], "reference": []}
    monkeypatch.setattr(choice, "unsupported", lambda name, *_: lacking[name])
    assert engines.choose("auto", recipe, "cuda") == "reference"
    with pytest.raises(engines.Unsupported, match=r"the dali engine cannot .* GaussianBlur: no"):
        engines.choose("dali", recipe, "cuda")
    lacking["reference"] = ["Flip: no"]
    with pytest.raises(engines.Unsupported, match="fused: Grayscale: no; reference: Flip: no"):
        engines.choose("auto", recipe, "cuda")
    lacking["dali"] = []
    assert engines.choose("auto", recipe, "cuda") == "dali"
