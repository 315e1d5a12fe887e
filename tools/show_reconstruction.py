"""What a masked method makes of the part that it sees: pictures, what is hidden, what it paints.

    python tools/show_reconstruction.py RUN --out FILE.png

For runs of methods that reconstruct pixels (mae, spark). A method of your own takes part where its
Method has a function `reconstruct(batch)`, which gives pictures [B, 3, H, W] in the units of its
one view, everything as predicted, and in a few words what was added to the prediction. Where
patches are predicted without their mean and deviation, these are the true ones: the colour and the
contrast of a hidden patch are then not the network's merit.
"""

if __name__ == "__main__":
    from headrace.tools import front

    front.answer(__file__)  # help and mistakes need none of what follows


import argparse
import sys
from collections.abc import Sequence
from textwrap import shorten
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from headrace.pipelines.batch import Batch
from headrace.pipelines.loader import open_loader
from headrace.pipelines.masks import BlockMask, RandomMask
from headrace.shards.atomic import atomic_file
from headrace.shards.errors import UserError
from headrace.shards.local import local
from headrace.shards.store import Store
from headrace.shards.terminal import print_any_name
from headrace.tools.arguments import png, positive
from headrace.tools.contact_sheet import Cell, Group, contact_sheet
from headrace.tools.view_pictures import (
    MASK_GREY,
    Levels,
    class_name,
    enlargement,
    last_parts,
    levels,
    over_pixels,
    picture_of,
)
from headrace.training.build import built_method
from headrace.training.data_sets import open_train, open_val
from headrace.training.preset import ConfigError
from headrace.training.run import checkpoint
from headrace.training.run.record import Record, read_record


@runtime_checkable
class Reconstructs(Protocol):
    """What a Method may offer beyond its contract."""

    def reconstruct(self, batch: Batch) -> tuple[Tensor, str]: ...


def main(arguments: Sequence[str] | None = None) -> int:
    print_any_name()
    options = _parse(arguments)
    try:
        record = read_record(options.run)
        store = open_train(record.train) if options.data is None else open_val(options.data)
        method, step = trained_method(record, open_train(record.train))
        batch = first_batch(record, store, options)
        with torch.no_grad():
            painted, note = method.reconstruct(batch)
        sheet = _sheet(record, store, batch, painted, note, step)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.out) as file:
            sheet.save(file, format="PNG")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.out} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{options.out}: {len(batch)} pictures, {note}, after {step:,} steps")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw pictures, what a masked method sees of them, and what it paints.",
        epilog="""examples:
  python tools/show_reconstruction.py runs/mae --out pictures.png
  python tools/show_reconstruction.py runs/spark --data data/cifar10 --seed 3 --out unseen.png""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=local, metavar="RUN", help="the run's directory")
    parser.add_argument("--out", type=png, required=True, help="the PNG file to write")
    parser.add_argument(
        "--data",
        type=local,
        metavar="DIR",
        help="other pictures; of a root with splits val, else test. Default: the training set",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pictures and masks")
    parser.add_argument("--samples", type=positive, default=8, help="number of pictures")
    parser.add_argument("--engine", help="auto, or an engine by name; default: the run's")
    return parser.parse_args(arguments)


def trained_method(record: Record, train: Store) -> tuple[Reconstructs, int]:
    """The whole method as the run's last checkpoint left it, in evaluation mode, and its step.

    Raises ConfigError for a method that reconstructs nothing and a run without checkpoint.
    """
    method = built_method(record, train, trained=True)
    if not isinstance(method, Reconstructs):
        raise ConfigError(
            f"{record.directory} is a run of {record.method}, which reconstructs no pictures; mae "
            f"and spark do"
        )
    saved = checkpoint.load(record.directory, torch.device("cpu"))
    if saved is None:
        raise ConfigError(f"{record.directory} holds no {checkpoint.CHECKPOINT_FILE} yet")
    try:
        method.load_state_dict(saved["method"])
    except RuntimeError as error:
        raise ConfigError(
            f"the checkpoint of {record.directory} is not one of {record.method} as this version "
            f"builds it: {shorten(str(error).partition(chr(10))[2], 200, placeholder=' ...')}"
        ) from error
    return method.eval(), int(saved["step"])


def first_batch(record: Record, store: Store, options: argparse.Namespace) -> Batch:
    """The first pictures of the seed's order, in the run's training view and with its masks."""
    group = record.augmentation.group
    if options.samples % group:
        raise ConfigError(
            f"--samples is {options.samples}, and the masks are drawn for groups of {group}"
        )
    if options.samples > len(store):
        raise ConfigError(
            f"--samples is {options.samples}, and {store.uri} has {len(store)} images"
        )
    with open_loader(
        store,
        record.augmentation,
        batch_size=options.samples,
        seed=options.seed,
        engine=options.engine or record.engine,
        threads=1,
        prefetch=1,
        passes=1,
        approximate=record.approximate,
    ) as loader:
        return next(iter(loader))


def hidden(record: Record, batch: Batch) -> NDArray[np.bool_]:
    """bool [B, H, W, 1]: the pixels of the first view that its mask removes."""
    view, mask = record.augmentation.flat_views[0], batch.masks[0]
    if mask is None or not isinstance(view.mask, RandomMask | BlockMask):
        raise ConfigError(f"{record.directory}: the first view of {record.method} hides nothing")
    return over_pixels(mask.numpy(), view.shape, view.mask)


def columns(seen: Levels, painted: Levels, removed: NDArray[np.bool_]) -> list[Levels]:
    """What is shown beside the original, 8-bit levels [B, H, W, 3] each: the visible part, the
    reconstruction, and the reconstruction with the visible part put back."""
    return [np.where(removed, MASK_GREY, seen), painted, np.where(removed, painted, seen)]


def _sheet(
    record: Record, store: Store, batch: Batch, painted: Tensor, note: str, step: int
) -> Image.Image:
    view = record.augmentation.flat_views[0]
    seen = levels(batch.views[0], record.augmentation)
    levels_shown = columns(seen, levels(painted, record.augmentation), hidden(record, batch))
    side = max(view.shape) * enlargement(max(view.shape))
    assert isinstance(view.mask, RandomMask | BlockMask)
    cells = [
        Cell(
            picture_of(seen[row]),
            class_name(int(batch.labels[row]), store.classes),
            (f"{int(batch.ids[row])}: {name}",),
            tuple(picture_of(column[row]) for column in levels_shown),
        )
        for row, name in enumerate(store.names(batch.ids.numpy()))
    ]
    share = float(batch.masks[0].float().mean()) if batch.masks[0] is not None else 0.0
    texts = {
        "masked": f"{share:.0%} of {view.mask.patch_pixels}-pixel patches removed",
        "reconstruction": note,
        "with the visible patches": "of the original",
    }
    groups = [Group(heading, small, 1, side, 1) for heading, small in texts.items()]
    title = f"{record.method} as in {record.directory.name}, step {step:,}"
    return contact_sheet(cells, groups, f"{title}   views of {last_parts(store.uri)}")


if __name__ == "__main__":
    sys.exit(main())
