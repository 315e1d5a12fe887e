"""What the tests of the fused engine share: pictures, work made of them, and running it."""

import io
import platform
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image

from headrace.pipelines import engines
from headrace.pipelines.batch import Batch
from headrace.pipelines.draw import draw
from headrace.pipelines.engines import Work
from headrace.pipelines.ops import ViewOp
from headrace.pipelines.recipe import Augmentation, RandomErasing, View

Pixels = NDArray[np.uint8]

# From Pillow 13 on it resamples rows first in some crops, and so do the kernels.
SAME_ORDER = int(PIL.__version__.partition(".")[0]) >= 13
RESAMPLED_LEVELS = 0.02 if SAME_ORDER else 0.3
# Elsewhere Pillow's own compiler may have fused its multiplications and additions.
SAME_ROUNDING = platform.machine() in {"x86_64", "AMD64"}


@cache
def whole_photograph() -> Pixels:
    """A real one: 600 rows of 512 pixels."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return np.asarray(Image.open(path).convert("RGB"))


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    """Every value, every colour, no smoothness: the worst case of every rounding."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pieces(photograph: Pixels, height: int, width: int, count: int = 5) -> list[Pixels]:
    """Parts of the photograph, a picture of noise, and one of a single colour."""
    random = np.random.default_rng(height * 1000 + width)
    tops = random.integers(0, photograph.shape[0] - height + 1, count)
    lefts = random.integers(0, photograph.shape[1] - width + 1, count)
    cut = [
        photograph[top : top + height, left : left + width]
        for top, left in zip(tops, lefts, strict=True)
    ]
    single = np.broadcast_to(np.array([200, 13, 90], np.uint8), (height, width, 3))
    return [*cut, noise(height, width), np.ascontiguousarray(single)]


def encoded(pixels: Pixels, kind: str = "PPM", mode: str = "RGB", **options: object) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


def work_for(
    augmentation: Augmentation, files: list[Pixels], epoch: int = 0, seed: int = 11
) -> Work:
    sizes = [Image.open(io.BytesIO(file.data)).size[::-1] for file in files]
    count = len(files)
    plan = draw(
        augmentation,
        seed=seed,
        epoch=epoch,
        position=0,
        ids=np.arange(count) * 7 + 3,
        occurrences=np.zeros(count, np.int32),
        sizes=np.array(sizes, np.int32),
    )
    return Work(plan, files, np.arange(count))


def run(
    name: str,
    augmentation: Augmentation,
    *works: Work,
    threads: int = 2,
    finished: torch.dtype | None = None,
) -> list[Batch]:
    engine = engines.open_engine(name, augmentation, threads=threads, finished=finished)
    try:
        return list(engine.run(iter(works)))
    finally:
        engine.close()


def one_view(*ops: ViewOp, erase: RandomErasing | None = None) -> Augmentation:
    return Augmentation("test", (View("view", ops, erase=erase),))


def differences(augmentation: Augmentation, work: Work) -> list[NDArray[np.int64]]:
    """Per view, |fused - reference| in levels."""
    (fused,), (reference,) = (run(name, augmentation, work) for name in ("fused", "reference"))
    return [
        np.abs(one.numpy().astype(np.int64) - other.numpy())
        for one, other in zip(fused.views, reference.views, strict=True)
    ]
