"""torchvision and WebDataset as rows of `bench_pipeline.py`: processes that run Pillow.

Every recipe as its authors publish it for PyTorch, with their own parameters; SimCLR's as MoCo
writes it (Pillow's blur). Both rows run the same transforms in the same DataLoader and differ in
where the bytes come from. Epochs have no end here, so that no worker waits at one.
"""

import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import timm.data.auto_augment
from PIL import Image, ImageFilter, ImageOps
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from webdataset.compat import WebDataset, WebLoader

from headrace.tools.bench.pipeline.task import Contender, Task, Views

PREFETCHED_PER_WORKER = 2
ENDLESS = sys.maxsize // 2
CLASSES = 1000  # of the soft targets
SHUFFLE_BUFFER = 1000
IMAGE_EXTENSIONS = "jpg;png"

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC = transforms.InterpolationMode.BICUBIC

Transform = Callable[[Image.Image], Any]


def open_contender(task: Task) -> Contender:
    """A row of `torchvision` (ImageFolder) or `webdataset` (WebLoader)."""
    transform, notes = transform_of(task)
    if task.engine == "torchvision":
        dataset = ImageFolder(task.folder, transform)
        loader: Any = DataLoader(
            dataset,
            task.batch_size,
            sampler=RandomSampler(dataset, num_samples=ENDLESS),
            num_workers=task.threads,
            prefetch_factor=PREFETCHED_PER_WORKER,
            drop_last=True,
        )
    else:
        loader = _web_loader(task, transform)
    iterator = iter(loader)
    batches = ((views if isinstance(views, list) else [views], y) for views, y in iterator)
    mixes = task.recipe == "deit" and task.output == "float32"
    return Contender(
        batches=mixed(batches) if mixes else (views for views, _ in batches),
        ready_ahead=PREFETCHED_PER_WORKER * task.threads,
        together=task.threads,
        close=lambda: None,  # the workers end with this process
        notes=tuple(notes),
    )


def _web_loader(task: Task, transform: Transform) -> Any:
    dataset: Any = WebDataset(list(task.tars), shardshuffle=len(task.tars))
    dataset = dataset.shuffle(SHUFFLE_BUFFER).decode("pil").to_tuple(IMAGE_EXTENSIONS, "cls")
    return WebLoader(
        dataset.map_tuple(transform, int).repeat(),
        batch_size=task.batch_size,
        num_workers=task.threads,
        prefetch_factor=PREFETCHED_PER_WORKER,
    )


def mixed(batches: Iterator[tuple[list[Tensor], Tensor]]) -> Iterator[Views]:
    """DeiT's Mixup or CutMix, on whole batches where the training loop does it (timm's)."""
    mixup = Mixup(
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        prob=1.0,
        switch_prob=0.5,
        mode="batch",
        label_smoothing=0.1,
        num_classes=CLASSES,
    )
    for (pictures,), labels in batches:
        yield [mixup(pictures, labels.remainder(CLASSES))[0]]


def transform_of(task: Task) -> tuple[Transform, list[str]]:
    """What makes a sample's views of its picture, and where that is not the whole recipe."""
    finish: list[Any] = [transforms.PILToTensor()]
    if task.output == "float32":
        finish = [transforms.ToTensor()]
        if task.recipe != "simclr":  # which is not normalised
            finish.append(transforms.Normalize(MEAN, STD))
    match task.recipe:
        case "dino":
            return dino(finish), []
        case "simclr":
            return simclr(finish), ["SimCLR as MoCo v2 writes it: Pillow's blur"]
        case "mae":
            crop = transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=BICUBIC)
            chain = [crop, transforms.RandomHorizontalFlip(), *finish]
            return transforms.Compose(chain), []
        case "deit":
            return deit(task)


class Views10:
    """DINO's multi-crop: the picture's two global views, unlike each other, and eight local."""

    def __init__(self, first: Transform, second: Transform, local: Transform) -> None:
        self._transforms = (first, second, *(local,) * 8)

    def __call__(self, picture: Image.Image) -> list[Tensor]:
        return [transform(picture) for transform in self._transforms]


class Twice:
    """SimCLR's two views, drawn alike."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    def __call__(self, picture: Image.Image) -> list[Tensor]:
        return [self._transform(picture), self._transform(picture)]


class PillowBlur:
    """DINO's and MoCo's blur: Pillow's three boxes, a radius from 0.1 to 2, sometimes."""

    def __init__(self, probability: float) -> None:
        self._probability = probability

    def __call__(self, picture: Image.Image) -> Image.Image:
        if random.random() >= self._probability:
            return picture
        return picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class PillowSolarize:
    """DINO's: from 128 on, sometimes."""

    def __init__(self, probability: float) -> None:
        self._probability = probability

    def __call__(self, picture: Image.Image) -> Image.Image:
        return ImageOps.solarize(picture) if random.random() < self._probability else picture


def dino(finish: list[Any]) -> Transform:
    """Caron et al. 2021; `DataAugmentationDINO` with the defaults of `main_dino.py`."""

    def view(size: int, scale: tuple[float, float], blur: float, *last: Transform) -> Transform:
        jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=scale, interpolation=BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([jitter], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                PillowBlur(blur),
                *last,
                *finish,
            ]
        )

    return Views10(
        view(224, (0.4, 1.0), 1.0),
        view(224, (0.4, 1.0), 0.1, PillowSolarize(0.2)),
        view(96, (0.05, 0.4), 0.5),
    )


def simclr(finish: list[Any]) -> Transform:
    """Chen et al. 2020, appendix A, at full strength."""
    jitter = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)
    chain = [
        transforms.RandomResizedCrop(224, scale=(0.08, 1.0), interpolation=BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([jitter], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        PillowBlur(0.5),
        *finish,
    ]
    return Twice(transforms.Compose(chain))


def deit(task: Task) -> tuple[Transform, list[str]]:
    """Touvron et al. 2021, table 9, by timm; without prefetcher, as DeiT's `build_transform`."""
    notes = ["posterize keeps at least 1 bit: timm asks Pillow for 0, which Pillow 13 refuses"]
    _keep_a_bit()
    if task.output == "uint8":
        notes.append("uint8 is before erasing and mixing")
    transform = create_transform(
        224,
        is_training=True,
        color_jitter=0.3,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25 if task.output == "float32" else 0.0,
        re_mode="pixel",
        re_count=1,
        mean=MEAN,
        std=STD,
        normalize=task.output == "float32",
    )
    if not isinstance(transform, transforms.Compose):
        raise TypeError(f"timm made {transform!r}, not a chain of transforms")
    return transform, notes


def _keep_a_bit() -> None:
    names = timm.data.auto_augment.NAME_TO_OP
    original = timm.data.auto_augment.posterize

    def posterize(picture: Image.Image, bits: int, **options: Any) -> Image.Image:
        return original(picture, max(1, bits), **options)

    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        names[name] = posterize
