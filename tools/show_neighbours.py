"""What an encoder finds alike: the nearest training images of ten pictures.

    python tools/show_neighbours.py RUN --out FILE.png

A picture per row; beside it, above, what is nearest by the features that the encoder began with,
and below, by those of its last checkpoint. Features and nearness are those of the kNN protocol
(`training/evaluate.py`): the recipe's test view, cosine similarity. Where there are labels, a frame
is green around the picture's own class and red around others.
"""

if __name__ == "__main__":
    from headrace.tools import front

    front.answer(__file__)  # help and mistakes need none of what follows


import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from headrace.pipelines.engines import choose
from headrace.shards.atomic import atomic_file
from headrace.shards.errors import UserError
from headrace.shards.local import local
from headrace.shards.pixels import decode_rgb
from headrace.shards.store import Store
from headrace.shards.terminal import print_any_name
from headrace.tools.arguments import positive
from headrace.tools.contact_sheet import Cell, Group, contact_sheet
from headrace.tools.view_pictures import class_name
from headrace.training.build import trained_encoder, untrained_encoder
from headrace.training.data_sets import open_train, open_val, root_with_val
from headrace.training.features import FeaturePass, Features
from headrace.training.preset import ConfigError
from headrace.training.protocols.knn import Neighbours, nearest, normalise
from headrace.training.run.record import Record, read_record
from headrace.training.world import World

PICTURE_PIXELS = 96
FRAME_PIXELS = 5
SAME_CLASS, OTHER_CLASS, NO_CLASS = (44, 160, 44), (214, 39, 40), (150, 150, 150)
BATCH_SIZE = 256


@dataclass(frozen=True)
class Compared:
    """The images on the sheet: `ids` [n] of `queries`, and the set that holds their neighbours.

    among: sorted ids of those that may be neighbours, None for all. same: whether queries come from
    that set, where each image would be its own nearest.
    """

    train: Store
    among: NDArray[np.int64] | None
    queries: Store
    ids: NDArray[np.int64]
    same: bool


def main(arguments: Sequence[str] | None = None) -> int:
    print_any_name()
    options = _parse(arguments)
    try:
        record = read_record(options.run)
        compared = _what_to_compare(record, options)
        train = compared.train
        before = neighbours_of(compared, untrained_encoder(record, train), record, options)
        after = neighbours_of(compared, trained_encoder(record, train), record, options)
        sheet = _sheet(record, compared, before, after)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.out) as file:
            sheet.save(file, format="PNG")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.out} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{options.out}: {_summary(compared, before, after)}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw the nearest training images of some pictures, by the features of a run's "
        "encoder before and after training.",
        epilog="""examples:
  python tools/show_neighbours.py runs/simclr --out neighbours.png
  python tools/show_neighbours.py runs/dino --data.val data/imagenet --samples 5 --out n.png""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=local, metavar="RUN", help="the run's directory")
    parser.add_argument("--out", type=local, required=True, help="the PNG file to write")
    parser.add_argument(
        "--data.train",
        dest="train",
        type=local,
        metavar="DIR",
        help="where neighbours are looked for; of a root with splits, train. Default: the run's",
    )
    parser.add_argument(
        "--data.val",
        dest="val",
        type=local,
        metavar="DIR",
        help="where the pictures are from; of a root with splits, val, else test. Default: the "
        "run's, else the split beside its training set, else that set itself",
    )
    parser.add_argument("--samples", type=positive, default=10, help="number of pictures")
    parser.add_argument("--neighbours", type=positive, default=8, help="of each picture")
    parser.add_argument(
        "--among",
        type=positive,
        metavar="N",
        help="look for neighbours among N training images, by the seed's chance; default: all",
    )
    parser.add_argument("--seed", type=int, help="of the choice of pictures; default: the run's")
    parser.add_argument("--engine", help="auto, or an engine by name; default: the run's")
    parser.add_argument("--threads", type=positive, help="of the engine")
    return parser.parse_args(arguments)


def _what_to_compare(record: Record, options: argparse.Namespace) -> Compared:
    """Raises ConfigError where there are fewer images than asked for."""
    train = open_train(options.train or record.train)
    val = options.val or record.val or _beside(options.train or record.train)
    queries = train if val is None else open_val(val)
    for option, count, store in (
        ("--samples", options.samples, queries),
        ("--neighbours", options.neighbours + (val is None), train),
    ):
        if count > len(store):
            raise ConfigError(f"{option} asks for {count} images, and {store.uri} has {len(store)}")
    if options.among is not None and options.among < options.neighbours + (val is None):
        raise ConfigError(f"--among {options.among} is less than --neighbours {options.neighbours}")
    seed = record.seed if options.seed is None else options.seed
    ids = chosen(queries.labels(np.arange(len(queries))), options.samples, seed)
    among = None
    if options.among is not None and options.among < len(train):
        among = np.sort(np.random.default_rng(seed).permutation(len(train))[: options.among])
    return Compared(train, among, queries, ids, val is None)


def _beside(train: Path | None) -> Path | None:
    """The root with a val or test split that a training set belongs to, where there is one."""
    return None if train is None else root_with_val(train)


def chosen(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Ids int64 [count], sorted by class: by the seed's chance, of as many classes as there are.

    labels: int64 [n] of all images, -1 for none.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    seen: Counter[int] = Counter()
    turns = []
    for label in labels[order].tolist():
        turns.append(seen[label])
        seen[label] += 1
    ids = order[np.argsort(turns, kind="stable")][:count]
    return ids[np.argsort(labels[ids], kind="stable")]


def neighbours_of(
    compared: Compared, encoder: nn.Module, record: Record, options: argparse.Namespace
) -> Neighbours:
    """Of each picture, in the order of `compared.ids`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = encoder.to(device)
    passes = FeaturePass(
        compared.train,
        {"test": record.test},
        BATCH_SIZE,
        choose(options.engine or record.engine, record.test, device, record.approximate),
        World(device=device),
        options.threads,
        approximate=record.approximate,
    )
    queries = _features(
        replace(passes, store=compared.queries, subset=np.sort(compared.ids)), encoder
    )
    train = _features(replace(passes, subset=compared.among), encoder)
    # A picture of the training set is its own nearest, wherever equal ones stand.
    ids = torch.from_numpy(compared.ids).to(device)
    rows = queries.features[torch.searchsorted(queries.ids, ids)]
    found = nearest(train, rows, options.neighbours + compared.same)
    if not compared.same:
        return found
    others = (found.ids != ids[:, None]).long()
    columns = others.argsort(dim=1, descending=True, stable=True)[:, : options.neighbours]
    return Neighbours(*(values.gather(1, columns) for values in vars(found).values()))


def _features(passes: FeaturePass, encoder: nn.Module) -> Features:
    """As kNN takes them."""
    ids, features, labels = (
        torch.cat(column) for column in zip(*passes.batches(encoder), strict=True)
    )
    return Features(ids, normalise(features), labels)


def _sheet(
    record: Record, compared: Compared, before: Neighbours, after: Neighbours
) -> Image.Image:
    classes = compared.queries.classes or compared.train.classes
    labels = compared.queries.labels(compared.ids)
    names = compared.queries.names(compared.ids)
    cells = []
    for row, (encoded, label) in enumerate(
        zip(compared.queries.read(compared.ids), labels.tolist(), strict=True)
    ):
        views, captions = [], []
        for neighbours in (before, after):
            ids = neighbours.ids[row].cpu().numpy()
            for neighbour, theirs in zip(
                compared.train.read(ids), neighbours.labels[row].tolist(), strict=True
            ):
                views.append(framed(decode_rgb(neighbour), frame_colour(label, theirs)))
                captions.append(class_name(theirs, classes) if theirs >= 0 else "")
        cells.append(
            Cell(
                decode_rgb(encoded),
                class_name(label, classes),
                (f"{compared.ids[row]}: {names[row]}",),
                tuple(views),
                tuple(captions),
            )
        )
    count = before.ids.shape[1]
    searched = len(compared.train if compared.among is None else compared.among)
    after_steps = "after training" if record.step is None else f"after {record.step:,} steps"
    group = Group(
        f"the {count} nearest of {searched:,} training images",
        f"above: untrained, below: {after_steps}",
        2 * count,
        PICTURE_PIXELS,
        count,
    )
    title = f"{record.method}, {record.backbone}: {record.directory.name}"
    return contact_sheet(cells, [group], title)


def frame_colour(query: int, neighbour: int) -> tuple[int, int, int]:
    """By the two classes, -1 for no label."""
    if query < 0 or neighbour < 0:
        return NO_CLASS
    return SAME_CLASS if query == neighbour else OTHER_CLASS


def framed(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The whole picture in a frame, PICTURE_PIXELS wide and high; small ones keep their pixels."""
    room = PICTURE_PIXELS - 2 * FRAME_PIXELS
    factor = room / max(picture.size)
    method = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    width, height = (max(1, round(length * factor)) for length in picture.size)
    canvas = Image.new("RGB", (PICTURE_PIXELS, PICTURE_PIXELS), colour)
    corner = (PICTURE_PIXELS - width) // 2, (PICTURE_PIXELS - height) // 2
    canvas.paste(picture.resize((width, height), method), corner)
    return canvas


def _summary(compared: Compared, before: Neighbours, after: Neighbours) -> str:
    """How many of the shown neighbours are of their picture's class, where there are classes."""
    shown = f"{len(compared.ids)} pictures, the {before.ids.shape[1]} nearest of each"
    labels = torch.from_numpy(compared.queries.labels(compared.ids)).to(before.labels.device)
    if (labels < 0).any():
        return shown
    shares = [(found.labels == labels[:, None]).float().mean().item() for found in (before, after)]
    return f"{shown}: {shares[0]:.0%} of the same class untrained, {shares[1]:.0%} after training"


if __name__ == "__main__":
    sys.exit(main())
