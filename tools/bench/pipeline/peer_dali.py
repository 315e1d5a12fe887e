"""DALI as a row of `bench_pipeline.py`: its own reader, random operators and idioms, on the CPU.

Each recipe is written as DALI is meant to be used, and where there are several ways, in the one
that was measured to be the fastest: decoding only the crop where there is one view, jitter and
grayscale as one colour matrix, branches instead of work that is thrown away, interleaved output.
DALI's meaning of the operators is kept, its contrast, hue and fixed order of colours included.

Also here: `read_by_dali`, which gives the dali engine's graph DALI's reader instead of our bytes.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from nvidia.dali import fn, types  # noqa: TID253  only rows of DALI import this
from nvidia.dali.auto_aug import rand_augment  # noqa: TID253
from nvidia.dali.pipeline import pipeline_def  # noqa: TID253
from nvidia.dali.plugin.pytorch import DALIGenericIterator  # noqa: TID253

from headrace.tools.bench.pipeline.peer_torch import MEAN, STD, mixed
from headrace.tools.bench.pipeline.task import VIEW_SIDES, Contender, Task

QUEUE_DEPTH = 2
SHUFFLE_BUFFER = 1024
CUBIC = types.DALIInterpType.INTERP_CUBIC
GREY = 124  # where RandAugment moves pixels in; the mean of ImageNet

# What conditionals and arithmetic make of nodes is beyond DALI's type stubs.
Node = Any


def open_contender(task: Task) -> Contender:
    """The row `dali_native`."""
    # RandAugment calls operators by names that DALI itself calls deprecated.
    warnings.filterwarnings("ignore", message=".*now deprecated", category=DeprecationWarning)
    views = [f"view{number}" for number in range(len(VIEW_SIDES[task.recipe]))]
    pipeline = {"dino": dino, "simclr": simclr, "mae": mae, "deit": deit}[task.recipe](
        task,
        batch_size=task.batch_size,
        num_threads=task.threads,
        device_id=None,
        prefetch_queue_depth=QUEUE_DEPTH,
        seed=0,
    )
    batches = _batches(DALIGenericIterator([pipeline], [*views, "label"]), views)
    mixes = task.recipe == "deit" and task.output == "float32"
    notes = ["colours as DALI defines them"] if task.recipe in ("dino", "simclr") else []
    if task.recipe == "deit":
        notes.append(
            "DALI's RandAugment (n=2, m=9): no magnitude noise, no per-op probability, and its own "
            "colours; erasing fills with the mean, not with noise; timm mixes the batch"
        )
        if task.output == "uint8":
            notes.append("uint8 is before erasing and mixing")
    return Contender(
        batches=mixed(batches) if mixes else (pictures for pictures, _ in batches),
        ready_ahead=QUEUE_DEPTH + 1,
        close=lambda: None,  # its threads end with this process
        notes=tuple(notes),
    )


def _batches(iterator: Any, views: list[str]) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    for (outputs,) in iterator:
        pictures = [outputs[view].permute(0, 3, 1, 2) for view in views]
        yield pictures, outputs["label"].flatten().long()


@pipeline_def(enable_conditionals=True)
def dino(task: Task) -> tuple[Node, ...]:
    encoded, label = _read(task)
    decoded = fn.decoders.image(encoded, device="cpu")
    views = []
    for number, side in enumerate(VIEW_SIDES["dino"]):
        area = (0.4, 1.0) if side == 224 else (0.05, 0.4)
        view = fn.random_resized_crop(
            decoded, size=[side, side], random_area=area, interp_type=CUBIC
        )
        view = _colours(view, 0.4, 0.4, 0.2, 0.1)
        view = _blurred(view, {0: 1.0, 1: 0.1}.get(number, 0.5))
        if number == 1:
            view = _solarized(view, 0.2)
        views.append(_finished(view, task))
    return (*views, label)


@pipeline_def(enable_conditionals=True)
def simclr(task: Task) -> tuple[Node, ...]:
    encoded, label = _read(task)
    decoded = fn.decoders.image(encoded, device="cpu")
    views = []
    for side in VIEW_SIDES["simclr"]:
        view = fn.random_resized_crop(
            decoded, size=[side, side], random_area=(0.08, 1.0), interp_type=CUBIC
        )
        view = _blurred(_colours(view, 0.8, 0.8, 0.8, 0.2), 0.5)
        views.append(_finished(view, task))
    return (*views, label)


@pipeline_def(enable_conditionals=True)
def mae(task: Task) -> tuple[Node, ...]:
    encoded, label = _read(task)
    return _finished(_cropped(encoded, (0.2, 1.0)), task), label


@pipeline_def(enable_conditionals=True)
def deit(task: Task) -> tuple[Node, ...]:
    encoded, label = _read(task)
    view = _cropped(encoded, (0.08, 1.0))
    view = rand_augment.rand_augment(view, n=2, m=9, shape=(224, 224), fill_value=GREY)
    view = _finished(view, task)
    if task.output == "float32":
        view = _erased(view, 0.25)
    return view, label


def _read(task: Task) -> tuple[Node, Node]:
    encoded, label = fn.readers.file(
        file_root=task.folder, random_shuffle=True, initial_fill=SHUFFLE_BUFFER
    )
    return encoded, label


def _cropped(encoded: Node, area: tuple[float, float]) -> Node:
    """A random crop, the only part of the picture that is decoded whole, as 224 x 224."""
    cut = fn.decoders.image_random_crop(
        encoded, device="cpu", random_area=area, random_aspect_ratio=(3 / 4, 4 / 3), num_attempts=10
    )
    return fn.resize(cut, size=[224, 224], interp_type=CUBIC)


def _finished(view: Node, task: Task) -> Node:
    """Flipped, and as float32 normalised: interleaved, which is the faster layout here."""
    mirror = fn.random.coin_flip(probability=0.5)
    if task.output == "uint8":
        return fn.flip(view, horizontal=mirror)
    mean, std = (MEAN, STD) if task.recipe != "simclr" else ((0.0,) * 3, (1.0,) * 3)
    return fn.crop_mirror_normalize(
        view,
        dtype=types.DALIDataType.FLOAT,
        output_layout="HWC",
        mean=[255 * value for value in mean],
        std=[255 * value for value in std],
        mirror=mirror,
    )


def _coin(probability: float) -> Node:
    return fn.random.coin_flip(probability=probability, dtype=types.DALIDataType.BOOL)


def _colours(view: Node, brightness: float, contrast: float, saturation: float, hue: float) -> Node:
    """Jitter with probability 0.8 and grayscale with 0.2 as one matrix, where either applies."""
    jitter, gray = _coin(0.8), _coin(0.2)
    if jitter or gray:
        strength, colour = jitter * 1.0, 1.0 - gray * 1.0
        view = fn.color_twist(
            view,
            brightness=1.0 + strength * fn.random.uniform(range=(-brightness, brightness)),
            contrast=1.0 + strength * fn.random.uniform(range=(-contrast, contrast)),
            saturation=colour
            * (1.0 + strength * fn.random.uniform(range=(-saturation, saturation))),
            hue=strength * fn.random.uniform(range=(-360 * hue, 360 * hue)),
        )
    return view


def _blurred(view: Node, probability: float) -> Node:
    if _coin(probability):
        view = fn.gaussian_blur(view, sigma=fn.random.uniform(range=(0.1, 2.0)))
    return view


def _solarized(view: Node, probability: float) -> Node:
    if _coin(probability):
        view = view ^ ((view >= 128) * types.Constant(255, dtype=types.DALIDataType.UINT8))
    return view


def _erased(view: Node, probability: float) -> Node:
    """A box of 2 to 33 % of the view set to 0. The aspect ratio is drawn, as timm draws it."""
    if _coin(probability):
        root = fn.random.uniform(range=(0.02, 1 / 3)) ** 0.5
        stretch = 2.718281828 ** (0.5 * fn.random.uniform(range=(-1.2, 1.2)))
        shape = fn.stack(root * stretch, root / stretch)
        place = fn.random.uniform(range=(0.0, 1.0), shape=[2])
        view = fn.erase(
            view, anchor=place * (1.0 - shape), shape=shape, normalized=True, fill_value=0.0
        )
    return view


def read_by_dali(tars: tuple[str, ...]) -> None:
    """From now on the dali engine of this process decodes what DALI's reader finds in `tars`.

    The graph is the engine's own, and so are order, plans and everything behind it, which is why
    the tars must hold the loader's samples in its order; the engine compares the sizes. Our bytes
    are still looked up, and left where they are.
    """
    from headrace.pipelines.engines.dali import engine as dali

    build = dali.build_pipeline
    external_source = fn.external_source

    def read_and_fed(
        *, source: Callable[[], Sequence[Any]], num_outputs: int, dtype: list[Any], ndim: list[int]
    ) -> list[Node]:
        """The engine's one source of (files, columns...), with DALI's reader for the files."""
        files = fn.readers.webdataset(
            paths=list(tars), ext=["jpg;png"], missing_component_behavior="error"
        )
        columns = external_source(
            source=lambda: source()[1:],
            num_outputs=num_outputs - 1,
            dtype=dtype[1:],
            ndim=ndim[1:],
        )
        return [files, *columns]

    def build_with_reader(*arguments: Any, **options: Any) -> Any:
        fn.external_source = read_and_fed
        try:
            return build(*arguments, **options)
        finally:
            fn.external_source = external_source

    dali.build_pipeline = build_with_reader
