"""What the tests of the DALI engine share: pictures, work made of them, engines to run it."""

import io
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from headrace.pipelines import engines
from headrace.pipelines.approximation import APPROXIMATIONS, Approximation
from headrace.pipelines.batch import Batch
from headrace.pipelines.draw import draw
from headrace.pipelines.engines import Work
from headrace.pipelines.ops import ViewOp
from headrace.pipelines.recipe import Augmentation, View

CPU = torch.device("cpu")


@cache
def photo_and_smooth_pictures() -> tuple[Image.Image, ...]:
    """Four cut from a photograph, and two smooth ones with every colour in them."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    generator = np.random.default_rng(0)
    made: list[Image.Image] = []
    with Image.open(path) as file:
        photo = file.convert("RGB")
    for _ in range(4):
        width, height = (int(side) for side in generator.integers(160, 400, 2))
        left = int(generator.integers(0, photo.width - width))
        top = int(generator.integers(0, photo.height - height))
        made.append(photo.crop((left, top, left + width, top + height)))
    for cells, size in ((6, (300, 260)), (14, (240, 270))):
        noise = generator.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
        made.append(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))
    return tuple(made)


def file_bytes(picture: Image.Image, kind: str, **options: object) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)  # pyright: ignore[reportArgumentType]
    return np.frombuffer(buffer.getvalue(), np.uint8)


def one_view(*ops: ViewOp) -> Augmentation:
    return Augmentation("one", (View("view", ops),))


def in_small_groups(augmentation: Augmentation) -> Augmentation:
    """The recipe with groups of four samples, so that a batch need not be large."""
    return augmentation if augmentation.group == 1 else replace(augmentation, group=4)


def work_of(
    augmentation: Augmentation,
    encoded: list[NDArray[np.uint8]],
    sizes: Sequence[tuple[int, int]],
    *,
    seed: int = 0,
    first_id: int = 0,
) -> Work:
    samples = len(encoded)
    plan = draw(
        augmentation,
        seed=seed,
        epoch=2,
        position=first_id,
        ids=np.arange(first_id, first_id + samples),
        occurrences=np.zeros(samples, np.int32),
        sizes=np.array(sizes, np.int32).reshape(-1, 2),
    )
    return Work(plan, encoded, np.arange(samples) % 3)


def make_work(
    augmentation: Augmentation,
    pictures: Sequence[Image.Image],
    kind: str = "PPM",
    *,
    seed: int = 0,
    first_id: int = 0,
) -> Work:
    return work_of(
        augmentation,
        [file_bytes(picture, kind) for picture in pictures],
        [(picture.height, picture.width) for picture in pictures],
        seed=seed,
        first_id=first_id,
    )


def run_dali(
    augmentation: Augmentation,
    work: Sequence[Work],
    threads: int = 1,
    *,
    finished: torch.dtype | None = None,
    approximate: Collection[Approximation] = APPROXIMATIONS,
    device: torch.device = CPU,
) -> list[Batch]:
    engine = engines.open_engine(
        "dali",
        augmentation,
        device=device,
        threads=threads,
        finished=finished,
        approximate=approximate,
    )
    return list(engine.run(iter(work)))


def run_reference(augmentation: Augmentation, work: Sequence[Work]) -> list[Batch]:
    engine = engines.open_engine("reference", augmentation)
    try:
        return list(engine.run(iter(work)))
    finally:
        engine.close()


def levels_apart(one: Sequence[Batch], other: Sequence[Batch]) -> NDArray[np.float64]:
    """Mean difference of every single view of every sample, in 8-bit levels."""
    means: list[NDArray[np.float64]] = []
    for mine, theirs in zip(one, other, strict=True):
        for a, b in zip(mine.views, theirs.views, strict=True):
            assert a.dtype == b.dtype == torch.uint8
            assert a.shape == b.shape
            assert a.stride() == b.stride()
            means.append((a.int() - b.int()).abs().double().mean((1, 2, 3)).numpy())
    return np.concatenate(means)
