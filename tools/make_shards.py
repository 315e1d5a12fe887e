"""Write shards from images. See `python tools/make_shards.py --help`."""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import NoReturn, get_args

from headrace.shards.convert import REPORT_FILE, Conversion, ConvertOptions, convert
from headrace.shards.cores import usable_cores
from headrace.shards.encode import EncodeOptions
from headrace.shards.errors import UserError
from headrace.shards.local import local
from headrace.shards.manifest import Format
from headrace.shards.sources import (
    SourceSplit,
    estimate_bytes,
    recognise,
    require_split,
)
from headrace.shards.sources.layout import Choices, Layout
from headrace.shards.sources.vocabulary import SPLITS
from headrace.shards.terminal import print_any_name
from headrace.shards.workers import open_executor
from headrace.tools.arguments import positive
from headrace.training.invocation import as_typed

DESCRIPTION = """\
Pack images into shards for training, checked, shuffled and indexed.

SRC is recognised by looking; every image that is not used is counted in a line of the census:
  class folders            SRC/train/<class>/x.jpg, SRC/<class>/x.jpg, splits at any depth
  a folder of images       label -1, or the labels of a list beside it (metadata.csv, labels.csv,
                           trainLabels.csv, val_annotations.txt, meta/val.txt, dataset.json)
  ImageNet's tars          ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12
  ImageNet from Kaggle     ILSVRC/Data/CLS-LOC/..., LOC_val_solution.csv
  WebDataset tars          a folder of them, 'x-*.tar' or 'x-{000..012}.tar'; splits in the names
  Parquet                  as Hugging Face writes it: a column of image bytes, a column of labels
  arrays                   train.npz, val.npz, test.npz with images, labels, classes; CIFAR's
                           pickles and downsampled ImageNet as they are downloaded
"""
EXAMPLES = """\
JPEG bytes stay as they are unless --max-side or --quality asks for something else or the file is
odd; whatever is repaired or left out is listed in DIR/report.jsonl. The command can be stopped at
any time, also by kill -9; the same command goes on and gives the same bytes. Until it ends it needs
about twice the size of the result on disk.

examples:
  python tools/make_shards.py imagenet/                        -> data/imagenet/train, .../val
  python tools/make_shards.py photos/ --out data/photos --max-side 512 --quality 90
  python tools/make_shards.py cifar10/ --out data/cifar10 --format beton
"""


def main(arguments: list[str] | None = None) -> int:
    """Convert what the command line names; returns the exit code."""
    print_any_name()
    options = _parse(arguments)
    source: Path = options.src
    named = source if source.exists() else source.parent  # of a pattern of tars
    out: Path = options.out or Path("data") / (named.resolve().stem or "images")
    try:
        convert_options = ConvertOptions(
            options.format,
            options.seed,
            EncodeOptions(options.max_side, options.quality),
            options.shard_megabytes,
        )
        _refuse_inside(source, out)
        print(f"looking at {source}", flush=True)
        choices = Choices(options.layout, options.images, options.labels, options.classes)
        wanted = None if options.split is None else (options.split,)
        recognised = recognise(source, wanted, choices)
        require_split(recognised, options.split)
        print(*(f"  {line}" for line in recognised.census()), sep="\n", flush=True)
        workers = options.workers or usable_cores()
        with open_executor(workers) as executor:
            for split in recognised.splits:
                directory = out / split.name
                _announce(split, directory)
                started = time.monotonic()
                result = convert(
                    split,
                    directory,
                    convert_options,
                    workers=workers,
                    executor=executor,
                    strict=options.strict,
                    progress=True,
                )
                _report(result, time.monotonic() - started)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        as_typed("tools/make_shards.py"),
        description=DESCRIPTION,
        epilog=as_typed(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "src",
        metavar="SRC",
        type=local,
        help="a directory, a .npz, .parquet or .tar, or a pattern of tars",
    )
    add(
        "--out",
        metavar="DIR",
        type=local,
        help="default: data/<name of SRC>; splits go below it",
    )
    add("--format", choices=get_args(Format), default="webdataset", help="default: %(default)s")
    add("--max-side", metavar="N", type=int, help="shrink so that the longest side has N pixels")
    add("--quality", metavar="Q", type=int, help="write every image as JPEG of this quality")
    add("--workers", metavar="N", type=positive, help="processes; default: one per core")
    add("--seed", metavar="S", type=int, default=0, help="of the shuffle; default: %(default)s")
    add("--split", metavar="NAME", choices=SPLITS, help="convert only this one")
    add(
        "--layout",
        choices=get_args(Layout),
        default="auto",
        help="where folders can be read in several ways: those called like splits are splits, "
        "every folder is a class, the innermost folders are, or all images are without classes",
    )
    add("--images", metavar="DIR", help="the folder of photographs, below SRC or below each split")
    add(
        "--labels",
        metavar="FILE",
        type=local,
        help="names and labels: csv, tsv, txt, json, jsonl",
    )
    add(
        "--classes",
        metavar="FILE",
        type=local,
        help="class names in the order of their labels",
    )
    add("--strict", action="store_true", help="refuse to finish if an image had to be left out")
    add(
        "--shard-megabytes",
        metavar="N",
        type=positive,
        default=256,
        help="about how large a tar becomes; default: %(default)s",
    )
    return parser.parse_args(arguments)


def _refuse_inside(source: Path, out: Path) -> None:
    """Shards inside their source would be looked at as a part of it from then on."""
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"--out {out} lies inside {source}, which would then hold its own shards: name a "
            "directory outside"
        )


def _announce(split: SourceSplit, directory: Path) -> None:
    classes = f", {len(split.classes)} classes" if split.classes else ""
    what = f"{split.name}: " if split.name else ""
    print(f"{what}{len(split.samples):,} images{classes} ({split.kind}) -> {directory}", flush=True)
    for note in split.notes:
        print(f"  note: {note}")
    source_bytes = estimate_bytes(split.samples)
    free_bytes = shutil.disk_usage(_existing(directory)).free
    if 2 * source_bytes > free_bytes:
        print(
            f"  note: the source has about {source_bytes / 1e9:.1f} GB; unless images are shrunk "
            f"this needs twice that, and {free_bytes / 1e9:.1f} GB are free"
        )


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _report(result: Conversion, seconds: float) -> None:
    manifest = result.manifest
    size_bytes = sum(shard.bytes for shard in manifest.shards)
    done = "was complete already" if result.was_complete else f"written in {_duration(seconds)}"
    print(
        f"  {manifest.samples:,} samples in {len(manifest.shards)} shard(s), "
        f"{size_bytes / 1e6:,.1f} MB, {done}"
    )
    for action, counts in (("repaired", manifest.repairs), ("left out", manifest.omissions)):
        if counts:
            reasons = "; ".join(f"{n:,} x {reason}" for reason, n in sorted(counts.items()))
            print(f"  {sum(counts.values()):,} {action}: {reasons}")
    if manifest.repairs or manifest.omissions:
        print(f"  listed by name in {result.directory / REPORT_FILE}")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def command() -> NoReturn:
    sys.exit(main())


if __name__ == "__main__":
    command()
