"""ffcv as a row of `bench_pipeline.py`: its plain Loader over a .beton file with original JPEGs.

ffcv 1.0.2 has one view per image and neither jitter of hue, blur, solarization nor RandAugment, so
that of the recipes here it can express MAE's. It decodes with libjpeg-turbo's fast, less accurate
DCT and resizes with OpenCV's area interpolation. Its kernels are compiled anew in every process.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder  # noqa: TID253  as in peer_dali
from ffcv.loader import Loader, OrderOption  # noqa: TID253
from ffcv.transforms import (  # noqa: TID253
    NormalizeImage,
    RandomHorizontalFlip,
    ToTensor,
    ToTorchImage,
)

from headrace.tools.bench.pipeline.task import CannotExpress, Contender, Task, Views

BATCHES_AHEAD = 3
LONG_EPOCH = 1 << 17  # a new epoch starts a new thread with cold memory, hence few of them
MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))

MISSING = {
    "dino": "ffcv makes one view per image, and has neither hue, blur nor solarization",
    "simclr": "ffcv makes one view per image, and has neither hue nor blur",
    "deit": "ffcv has neither RandAugment nor CutMix",
}


def open_contender(task: Task) -> Contender:
    """The row `ffcv`."""
    if task.recipe in MISSING:
        raise CannotExpress(MISSING[task.recipe])
    image: list[Any] = [
        RandomResizedCropRGBImageDecoder((224, 224), scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)),
        RandomHorizontalFlip(),
    ]
    if task.output == "float32":
        image.append(NormalizeImage(255 * MEAN, 255 * STD, np.dtype(np.float32)))
    image += [ToTensor(), ToTorchImage()]
    repeats = -(-LONG_EPOCH // task.samples)
    loader = Loader(
        task.beton,
        batch_size=task.batch_size,
        num_workers=task.threads,
        order=OrderOption.RANDOM,
        indices=np.tile(np.arange(task.samples), repeats).tolist(),
        os_cache=True,
        drop_last=True,
        batches_ahead=BATCHES_AHEAD,
        pipelines={"image": image},
    )

    def batches() -> Iterator[Views]:
        while True:
            for pictures, _ in loader:
                yield (pictures,)

    return Contender(
        batches=batches(),
        ready_ahead=BATCHES_AHEAD + 2,
        close=lambda: None,  # its thread ends with this process
        notes=("fast DCT, area interpolation",),
    )
