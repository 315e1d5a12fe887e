"""The same images for every row of `bench_pipeline.py`, in the form that each engine reads.

Peers need class folders, tars or a .beton file. They are made from the store's own bytes in a
temporary directory, whatever the store is, so that all rows decode the same files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headrace.shards.dataset import BETON_FILE, tar_file, write_dataset
from headrace.shards.errors import UserError
from headrace.shards.index import Record
from headrace.shards.store import Store
from headrace.tools.bench.pipeline.task import DALI_READER

CHUNK = 64
_MAGIC = {b"\xff\xd8": "jpg", b"\x89P": "png"}
TARS_PER_WORKER = 4

NEEDS_FOLDER = {"torchvision", "dali_native"}
NEEDS_TARS = {"webdataset", DALI_READER}
NEEDS_BETON = {"ffcv"}


class DataError(UserError):
    """These images cannot be benchmarked: what is wrong with them."""


@dataclass(frozen=True)
class Forms:
    """Where the images are: see `task.Task`."""

    folder: str = ""
    tars: tuple[str, ...] = ()
    beton: str = ""


def whole_batches(store: Store, at_most: int, batch_size: int) -> int:
    """How many samples are used: a whole number of batches, of at most so many samples."""
    samples = min(len(store), at_most) // batch_size * batch_size
    if samples == 0:
        raise DataError(
            f"{store.uri} has {len(store)} images, of which --samples takes {at_most} at most: "
            f"not enough for one batch of {batch_size} (--batch-size)"
        )
    return samples


def describe(store: Store, samples: int) -> dict[str, Any]:
    """What is in the images that are used; also checks that all are JPEG or PNG."""
    lengths = [len(record.image) for record in _records(store, samples)]
    sizes = store.sizes(np.arange(samples))
    return {
        "name": "/".join(Path(store.uri).parts[-2:]),
        "fingerprint": store.fingerprint,
        "samples": samples,
        "samples_in_store": len(store),
        "mean_bytes": round(float(np.mean(lengths))),
        "mean_height": round(float(sizes[:, 0].mean()), 1),
        "mean_width": round(float(sizes[:, 1].mean()), 1),
    }


def make_forms(
    store: Store,
    samples: int,
    directory: Path,
    engines: set[str],
    threads: int,
    say: Callable[[str], None],
) -> Forms:
    """Write what the engines among `engines` need below `directory`."""
    folder = directory / "folder"
    if engines & NEEDS_FOLDER:
        say(f"writing {samples:,} files for {_named(engines & NEEDS_FOLDER)}")
        for record in _records(store, samples):
            place = folder / f"{record.label:06d}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{record.id:09d}.{record.extension}").write_bytes(record.image)
    tars: tuple[str, ...] = ()
    if engines & NEEDS_TARS:
        say(f"writing tars for {_named(engines & NEEDS_TARS)}")
        per_tar = max(1, samples // (TARS_PER_WORKER * threads))
        where = directory / "tars"
        manifest = write_dataset(
            where, "webdataset", list(_records(store, samples)), samples_per_shard=per_tar
        )
        tars = tuple(str(where / tar_file(shard)) for shard in range(len(manifest.shards)))
    beton = directory / "beton"
    if engines & NEEDS_BETON:
        say(f"writing a .beton file for {_named(engines & NEEDS_BETON)}")
        write_dataset(beton, "beton", list(_records(store, samples)))
    return Forms(
        str(folder) if folder.exists() else "",
        tars,
        str(beton / BETON_FILE) if beton.exists() else "",
    )


def _records(store: Store, samples: int) -> Iterator[Record]:
    """The first samples with their original bytes; those without a class are all in class 0."""
    for start in range(0, samples, CHUNK):
        ids = np.arange(start, min(start + CHUNK, samples))
        rows = zip(
            ids.tolist(),
            store.names(ids),
            store.labels(ids).tolist(),
            store.read(ids),
            store.sizes(ids).tolist(),
            strict=True,
        )
        for sample_id, name, label, encoded, (height, width) in rows:
            image = encoded.tobytes()
            extension = _MAGIC.get(image[:2])
            if extension is None:
                raise DataError(
                    f"sample {sample_id} ({name!r}) of {store.uri} is neither JPEG nor PNG: "
                    "decoding is part of what is measured, so take shards with image files"
                )
            yield Record(sample_id, name, max(0, label), None, image, extension, height, width)


def _named(engines: set[str]) -> str:
    return " and ".join(sorted(engines))
