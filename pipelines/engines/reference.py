"""The reference engine: Pillow and torchvision say what every op of a recipe means.

Each op is torchvision's own function on a Pillow picture (the blur alone is written out), or
Pillow's as timm calls it (`reference_augment`), rounded to 8 bits after each step, with the Plan's
numbers instead of a generator. Other engines are held to this one. It is meant to be obviously
right and only then quick: a small pool of threads, each taking a few samples at a time, because
Pillow releases the GIL in the larger pictures' loops.
"""

import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode, functional
from typing_extensions import override

from headrace.pipelines.approximation import Approximation
from headrace.pipelines.batch import Batch
from headrace.pipelines.engines.contract import EngineKind, SampleError, Work
from headrace.pipelines.engines.reference_augment import rand_augment
from headrace.pipelines.ops import (
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Interpolation,
    Op,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Solarize,
    height_and_width,
    resized_shape,
)
from headrace.pipelines.recipe import Augmentation
from headrace.shards.pixels import decode_rgb, in_words

F: Any = functional  # it takes Pillow pictures and gives them back; its annotations say Tensor

BATCHES_IN_FLIGHT = 2
CHUNKS_PER_THREAD = 4  # pieces of a batch: enough that no thread idles long at the batch's end

_INTERPOLATION: dict[Interpolation, InterpolationMode] = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}


def blur_kernel_size(op: GaussianBlur, sigma: float, size: int) -> int:
    """Side of the kernel in pixels, odd: the op's own, or three sigmas to each side.

    At most 2 * size - 1, what a reflected border of a picture with sides of `size` allows.
    """
    wanted = op.kernel_size if op.kernel_size is not None else 2 * math.ceil(3 * sigma) + 1
    return min(wanted, 2 * size - 1)


def gaussian_blur(picture: Image.Image, sigma: float, side: int) -> Image.Image:
    """torchvision's `gaussian_blur`: reflected border, normalised kernel of `side` x `side` taps.

    One axis after the other in float32, rounded once at the end: the two-dimensional kernel is the
    product of two. Written with numpy because torch's convolution takes several times as long and
    starts threads of its own in each of the pool's.
    """
    radius = side // 2
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    pixels = np.asarray(picture, dtype=np.float32)
    for axis in (0, 1):
        length = pixels.shape[axis]
        reflected = np.abs(np.arange(-radius, length + radius))
        reflected = np.where(reflected < length, reflected, 2 * (length - 1) - reflected)
        padded = pixels.take(reflected, axis=axis)
        shifted = [
            padded[tap : tap + length] if axis == 0 else padded[:, tap : tap + length]
            for tap in range(side)
        ]
        pixels = shifted[radius] * weights[radius]
        for tap in range(radius):
            pair = shifted[tap] + shifted[side - 1 - tap]
            pair *= weights[tap]
            pixels += pair
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def shift_brightness(picture: Image.Image, shift: float) -> Image.Image:
    """`shift`, a part of the full range, added to every channel: clamp(pixel + round(255 * shift)).

    Rounded half to even.
    """
    levels = round(255 * shift)
    return picture.point([min(max(level + levels, 0), 255) for level in range(256)] * 3)


def _jitter(
    picture: Image.Image, op: ColorJitter, factors: NDArray[np.float32], order: NDArray[np.int8]
) -> Image.Image:
    brightness, contrast, saturation, hue = (float(factor) for factor in factors)
    for index in order:
        if index == 0 and op.brightness > 0:
            change = shift_brightness if op.additive_brightness else F.adjust_brightness
            picture = change(picture, brightness)
        elif index == 1 and op.contrast > 0:
            picture = F.adjust_contrast(picture, contrast)
        elif index == 2 and op.saturation > 0:
            picture = F.adjust_saturation(picture, saturation)
        elif index == 3 and op.hue > 0:
            picture = F.adjust_hue(picture, hue)
    return picture


def apply_op(
    picture: Image.Image, op: Op, draws: Mapping[str, NDArray], row: int = 0
) -> Image.Image:
    """What `op` makes of an RGB picture, with row `row` of its columns in the Plan.

    This is the meaning of every op: the other engines' results are compared with it.
    """
    match op:
        case RandomResizedCrop():
            top, left, height, width = (int(value) for value in draws["box"][row])
            mode = _INTERPOLATION[op.interpolation]
            size = list(height_and_width(op.size))
            return F.resized_crop(picture, top, left, height, width, size, mode)
        case Resize():
            shape = resized_shape(picture.height, picture.width, op.size)
            return F.resize(picture, list(shape), _INTERPOLATION[op.interpolation])
        case CenterCrop():
            return F.center_crop(picture, list(height_and_width(op.size)))
        case RandomCrop():
            top, left = (int(value) for value in draws["start"][row])
            # Black outside of the picture.
            return F.crop(picture, top, left, *height_and_width(op.size))
        case Flip():
            return F.hflip(picture) if draws["apply"][row] else picture
        case ColorJitter():
            if not draws["apply"][row]:
                return picture
            return _jitter(picture, op, draws["factors"][row], draws["order"][row])
        case Grayscale():
            return F.rgb_to_grayscale(picture, 3) if draws["apply"][row] else picture
        case GaussianBlur():
            sigma = float(draws["sigma"][row])
            if sigma == 0:
                return picture
            side = blur_kernel_size(op, sigma, min(picture.size))
            return gaussian_blur(picture, sigma, side)
        case Solarize():
            return F.solarize(picture, op.threshold) if draws["apply"][row] else picture
        case RandAugment():
            return rand_augment(picture, op, draws, row)
        case _:
            assert_never(op)


@dataclass(frozen=True)
class _InFlight:
    work: Work
    views: tuple[NDArray[np.uint8], ...]  # [B, H, W, 3] each
    chunks: list[Future[None]]


class ReferenceEngine:
    """Executes Plans by `apply_op` on a pool of `threads` threads; output on the CPU."""

    name = "reference"
    approximations: tuple[str, ...] = ()

    def __init__(self, augmentation: Augmentation, threads: int) -> None:
        self._views = augmentation.flat_views
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="headrace-reference")

    def run(self, work: Iterator[Work]) -> Iterator[Batch]:
        pending: deque[_InFlight] = deque()
        try:
            for item in work:
                pending.append(self._start(item))
                if len(pending) == BATCHES_IN_FLIGHT:
                    yield self._finish(pending.popleft())
            while pending:
                yield self._finish(pending.popleft())
        finally:
            for left in pending:
                for chunk in left.chunks:
                    chunk.cancel()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, work: Work) -> _InFlight:
        samples = len(work.encoded)
        views = self._allocate(samples)
        step = max(1, math.ceil(samples / (CHUNKS_PER_THREAD * self._threads)))
        chunks = [
            self._pool.submit(
                self._render_rows, work, views, range(first, min(first + step, samples))
            )
            for first in range(0, samples, step)
        ]
        return _InFlight(work, views, chunks)

    def _allocate(self, samples: int) -> tuple[NDArray[np.uint8], ...]:
        """Fresh memory for every batch: the caller keeps what it was given, for ever if it wants.

        Views of one size lie in one block [V, B, H, W, 3]: two allocations for DINO, not ten.
        """
        blocks: dict[tuple[int, int], Iterator[NDArray[np.uint8]]] = {}
        shapes = [view.shape for view in self._views]
        for shape in set(shapes):
            block = np.empty((shapes.count(shape), samples, *shape, 3), dtype=np.uint8)
            blocks[shape] = iter(block)
        return tuple(next(blocks[shape]) for shape in shapes)

    def _render_rows(self, work: Work, views: tuple[NDArray[np.uint8], ...], rows: range) -> None:
        for row in rows:
            source = self._decode(work, row)
            for view, planned, target in zip(self._views, work.plan.views, views, strict=True):
                picture = source
                for op, draws in zip(view.executed, planned.ops, strict=True):
                    picture = apply_op(picture, op, draws, row)
                target[row] = np.asarray(picture)

    @staticmethod
    def _decode(work: Work, row: int) -> Image.Image:
        sample_id = int(work.plan.ids[row])
        try:
            picture = decode_rgb(work.encoded[row])
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
            raise SampleError(sample_id, in_words(error)) from error
        height, width = (int(side) for side in work.plan.sizes[row])
        if (picture.height, picture.width) != (height, width):
            raise SampleError(
                sample_id,
                f"it is {picture.width} x {picture.height} pixels (width x height), but the "
                f"index says {width} x {height}",
            )
        return picture

    @staticmethod
    def _finish(done: _InFlight) -> Batch:
        for chunk in done.chunks:
            chunk.result()
        return done.work.batch(
            tuple(torch.from_numpy(view).permute(0, 3, 1, 2) for view in done.views)
        )


class Reference(EngineKind):
    """The reference engine before it is opened. The loader moves its batches to any device."""

    @override
    def unsupported(
        self,
        augmentation: Augmentation,
        device: torch.device,
        approximate: Collection[Approximation],
    ) -> list[str]:
        """Nothing: this engine defines the ops."""
        return []

    @override
    def finishes(
        self, augmentation: Augmentation, device: torch.device, dtype: torch.dtype
    ) -> bool:
        """No: `device_stage` defines what finished is."""
        return False

    @override
    def open(
        self,
        augmentation: Augmentation,
        *,
        device: torch.device,
        threads: int,
        finished: torch.dtype | None = None,
        approximate: Collection[Approximation] = (),
    ) -> ReferenceEngine:
        return ReferenceEngine(augmentation, threads)
