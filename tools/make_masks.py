"""Saliency masks for a data set, learnt from its own images. See `make_masks.py --help`.

RELICv2 (Tomasev et al. 2022) removes backgrounds with DeepUSPS (Nguyen et al. 2019): four
hand-crafted saliency methods, each refined by a deep network and a random field over its own
predictions for some rounds, then fused; its backbone had been trained on labelled street scenes.
Here is the same idea at a size that a CPU bears, and without any label: five classical measures
vote (masks/measures.py), a small network learns from scratch what their majorities have in common
(masks/network.py), once, and says for every image what is salient. Its masks are coarser, and
follow colour contrast more than objects; the contact sheet shows how they are before anything
depends on them.

Masks have the size of their images, so that a crop of the one is a crop of the other to the pixel.
That is cheap, for they are smooth: 9 kB for a photograph of 500 x 375 pixels (itself 106 kB), and
0.4 kB at 32 x 32 (2.3 kB).
"""

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image

from headrace.shards.atomic import atomic_file
from headrace.shards.component import component_directory
from headrace.shards.component_writer import ComponentWriter, begin_component
from headrace.shards.cores import usable_cores
from headrace.shards.errors import UserError
from headrace.shards.index import ShardError, read_index
from headrace.shards.local import local
from headrace.shards.manifest import Manifest
from headrace.shards.parts import Note
from headrace.shards.pixels import eight_bit
from headrace.shards.progress import progress_bar
from headrace.shards.store import Store, open_store
from headrace.shards.terminal import print_any_name
from headrace.tools.arguments import decimal, png, positive, whole
from headrace.tools.contact_sheet import Cell, Group, contact_sheet
from headrace.tools.masks.measures import MEASURES, consensus, measured
from headrace.tools.masks.network import MULTIPLE, SaliencyNetwork, new_network, predict, train
from headrace.tools.view_pictures import enlargement, last_parts

DESCRIPTION = """\
Make saliency masks for DATA, which make_shards wrote: the component that `--method relic_v2` takes
backgrounds away with. No label and no other data is used. Five classical measures vote on some
images, a small network learns from their votes, and makes a mask for every image:
grey JPEGs of the images' own sizes, in DATA/train/component-saliency.
"""
EXAMPLES = """\
examples:
  python tools/make_masks.py data/cifar10
  python tools/make_masks.py data/imagenet --preview        the network and a contact sheet, to look
  python tools/make_masks.py data/imagenet                  then the masks: goes on from there
  python tools/make_masks.py data/photos --side 128 --steps 1000 --sheet masks.png

The command can be stopped at any time; the same command goes on.
"""
SHEET_FILE = "sheet.png"
NETWORK_FILE = "network.safetensors"
LEAST_IMAGES = 16
WHOLE = "nothing was found salient: the whole image counts as it"
_AT_ONCE = 128  # images that pass through the network together
_SMALL_PIXELS = 48  # up to this size images are looked at as they are, else at 96 pixels
_SIDES = 32, 96
_MOST_EMPTY = 0.5

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Job:
    """Whose masks are made, and how. side: of the square at which pictures are looked at."""

    store: Store
    side: int
    options: argparse.Namespace
    device: torch.device
    pool: ThreadPoolExecutor


def main(arguments: Sequence[str] | None = None) -> int:
    print_any_name()
    options = _parse(arguments)
    try:
        with ThreadPoolExecutor(options.threads) as pool:
            return _run(options, pool)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or options.data}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, pool: ThreadPoolExecutor) -> int:
    torch.set_num_threads(options.threads)
    store = open_store(options.data, options.split)
    directory = component_directory(store, options.name)
    if len(store) < LEAST_IMAGES:
        raise ShardError(
            f"{store.uri} has {len(store)} images; the network needs {LEAST_IMAGES} to learn from"
        )
    job = Job(store, options.side or _side_for(store), options, _device(options.device), pool)
    made_with = {
        "kind": "saliency",
        "measures": list(MEASURES),
        "side": job.side,
        "train_images": min(options.train_images, len(store)),
        "steps": options.steps,
        "seed": options.seed,
        "quality": options.quality,
        "least_share": options.least_share,
    }
    writer = begin_component(store, options.name, made_with)
    if writer is None:
        print(f"{directory}: was complete already")
        return 0
    network = _network(job, writer.parts_directory / NETWORK_FILE)
    sheet: Path = options.sheet or directory / SHEET_FILE
    sheet.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(sheet) as file:
        _sheet(job, network).save(file, format="PNG")
    print(f"{sheet}: {options.samples} images, the measures, their vote, the network, the views")
    if options.preview:
        print("no masks yet: the same command without --preview makes them")
        return 0
    _write(job, network, writer)
    _report(store, directory, writer.finish())
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "make_masks.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data", metavar="DATA", type=local, help="a data set, or its root with splits")
    add("--split", default="train", help="of a root with splits; default: %(default)s")
    add("--name", type=_name, default="saliency", help="of the component; default: %(default)s")
    add("--preview", action="store_true", help="stop after the contact sheet, before the masks")
    add("--sheet", metavar="FILE", type=png, help="the PNG; default: in the component's directory")
    add("--samples", metavar="N", type=positive, default=8, help="images on the sheet")
    small, large = _SIDES
    by_size = f"{small} for images of up to {_SMALL_PIXELS} pixels, else {large}"
    add(
        "--side",
        metavar="N",
        type=whole(16, 512, MULTIPLE),
        help=f"pixels to look at; default: {by_size}",
    )
    voted = "images that the measures vote on; default: %(default)s"
    add("--train-images", metavar="N", type=positive, default=2000, help=voted)
    steps = "of the network, 32 images each; default: %(default)s"
    add("--steps", metavar="N", type=positive, default=400, help=steps)
    add(
        "--seed",
        metavar="S",
        type=whole(0, 2**63 - 1),
        default=0,
        help="of images and network; default: 0",
    )
    add("--quality", metavar="Q", type=whole(1, 100), default=75, help="of the JPEGs; default: 75")
    kept = "images that are salient to a smaller part are kept whole; default: %(default)s"
    share = decimal("in [0, 1)", lambda share: 0 <= share < 1)
    add("--least-share", metavar="X", type=share, default=0.02, help=kept)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the network")
    add("--threads", metavar="N", type=positive, default=usable_cores(), help="default: all cores")
    return parser.parse_args(arguments)


def _name(text: str) -> str:
    if not text.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not an identifier")
    return text


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ShardError("--device cuda: torch finds no CUDA device")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _side_for(store: Store) -> int:
    sizes = store.sizes(np.arange(len(store)))
    return _SIDES[0] if np.median(sizes.max(axis=1)) <= _SMALL_PIXELS else _SIDES[1]


# ------------------------------------------------------------------------------- images and votes


def _squares(job: Job, ids: Sequence[int]) -> list[Pixels]:
    """uint8 [S, S, 3] of these samples, each squeezed into the square."""

    def squeezed(sample_id: int, encoded: Pixels) -> Pixels:
        try:
            with Image.open(io.BytesIO(encoded.data)) as file:
                file.draft("RGB", (job.side, job.side))  # a large JPEG is decoded smaller
                picture = eight_bit(file).convert("RGB")
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
            name = job.store.names([sample_id])[0]
            raise ShardError(
                f"sample {sample_id} ({name!r}) of {job.store.uri} cannot be decoded ({error}): "
                f"tools/verify_shards.py finds what else is damaged"
            ) from error
        return np.asarray(picture.resize((job.side, job.side), Image.Resampling.BILINEAR))

    return list(job.pool.map(squeezed, ids, job.store.read(list(ids))))


def _stacked(pictures: Sequence[Pixels]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _network(job: Job, path: Path) -> SaliencyNetwork:
    """Trained, or read where an earlier call trained it."""
    network = new_network(job.options.seed).to(job.device)
    if path.exists():
        network.load_state_dict(safetensors.torch.load_file(path))
        return network.eval()
    wanted = min(job.options.train_images, len(job.store))
    ids = np.random.default_rng(job.options.seed).permutation(len(job.store))[:wanted]
    pictures: list[Pixels] = []
    shares = []
    with progress_bar("voting", wanted) as bar:
        for start in range(0, wanted, _AT_ONCE):
            squares = _squares(job, ids[start : start + _AT_ONCE].tolist())
            for share in job.pool.map(lambda square: consensus(measured(square)), squares):
                shares.append(share)
                bar.update()
            pictures += squares
    votes = np.stack(shares)[:, None]
    empty = int(((votes > 0.5).mean(axis=(1, 2, 3)) < job.options.least_share).sum())
    if empty > _MOST_EMPTY * wanted:
        raise ShardError(
            f"the measures agree on nothing salient in {empty} of {wanted} images of "
            f"{job.store.uri}: there is no background to remove"
        )
    with progress_bar("learning", job.options.steps, unit="steps") as bar:

        def report(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        train(
            network,
            _stacked(pictures),
            torch.from_numpy(votes),
            steps=job.options.steps,
            seed=job.options.seed,
            report=report,
        )
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    with atomic_file(path) as file:
        file.write(safetensors.torch.save(weights))
    return network


# ------------------------------------------------------------------------------------------- masks


def _masks(job: Job, network: SaliencyNetwork, ids: Sequence[int]) -> Iterator[tuple[Pixels, bool]]:
    """(mask uint8 [S, S], whether anything was found) of each sample."""
    for shares in predict(network, _stacked(_squares(job, ids))).numpy():
        if (shares > 0.5).mean() < job.options.least_share:
            yield np.full(shares.shape, 255, np.uint8), False
        else:
            yield np.rint(255 * shares).astype(np.uint8), True


def _write(job: Job, network: SaliencyNetwork, writer: ComponentWriter) -> None:
    """Every part that is missing."""

    def encoded(mask: Pixels, size: Sequence[int]) -> bytes:
        height, width = size
        picture = Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=job.options.quality, optimize=True)
        return buffer.getvalue()

    missing = writer.missing()
    left = sum(len(ids) for _, ids in missing)
    with progress_bar("writing masks", len(job.store), done=len(job.store) - left) as bar:
        for part, ids in missing:
            images: list[bytes] = []
            notes: list[Note] = []
            for start in range(ids.start, ids.stop, _AT_ONCE):
                some = range(start, min(start + _AT_ONCE, ids.stop))
                masks, salient = zip(*_masks(job, network, some), strict=True)
                sizes = job.store.sizes(list(some)).tolist()
                images += job.pool.map(encoded, masks, sizes)
                names = job.store.names(list(some))
                notes += [
                    Note(name, "repaired", WHOLE)
                    for name, is_salient in zip(names, salient, strict=True)
                    if not is_salient
                ]
                bar.update(len(some))
            writer.write(part, images, notes)


def _report(store: Store, directory: Path, manifest: Manifest) -> None:
    masks, images = (read_index(Path(place)).rows["length"] for place in (directory, store.uri))
    print(
        f"{directory}: {len(masks):,} masks of {masks.mean():,.0f} bytes on average, for images of "
        f"{images.mean():,.0f}"
    )
    for reason, count in manifest.repairs.items():
        print(f"  {count:,} x {reason}")


# ----------------------------------------------------------------------------------- contact sheet


def _sheet(job: Job, network: SaliencyNetwork) -> Image.Image:
    """A row per image: each measure, their vote, the network, and the image without background."""
    wanted = min(job.options.samples, len(job.store))
    ids = np.linspace(0, len(job.store) - 1, wanted).astype(np.int64).tolist()
    greys = np.random.default_rng(job.options.seed).integers(0, 256, wanted)
    columns = [*MEASURES, "their vote", "the network", "without background"]
    cells = []
    rows = zip(
        ids, _squares(job, ids), _masks(job, network, ids), greys, job.store.names(ids), strict=True
    )
    for sample_id, square, (mask, is_salient), grey, name in rows:
        height, width = job.store.sizes([sample_id])[0].tolist()
        maps = measured(square)
        shares = [*maps.values(), consensus(maps), mask / 255]
        share = (mask / 255)[..., None]
        masked = np.rint(grey + share * (square.astype(np.float64) - grey)).astype(np.uint8)
        pictures = [Image.fromarray(np.rint(255 * map_).astype(np.uint8)) for map_ in shares]
        views = tuple(
            _boxed(picture.convert("RGB"), height, width)
            for picture in (*pictures, Image.fromarray(masked))
        )
        caption = f"{(share > 0.5).mean():.0%} salient" if is_salient else "kept whole"
        original = Image.fromarray(square).resize((width, height))
        cells.append(Cell(original, caption, (f"{sample_id}: {name}",), views))
    side = enlargement(job.side) * job.side
    groups = [Group(column, "", 1, side, 1) for column in columns]
    return contact_sheet(
        cells, groups, f"saliency of {last_parts(job.store.uri)}, seed {job.options.seed}"
    )


def _boxed(picture: Image.Image, height: int, width: int) -> Image.Image:
    """A square picture in the proportions of its image, in the middle of a white square."""
    side = picture.width
    scale = side / max(height, width)
    shape = max(1, round(width * scale)), max(1, round(height * scale))
    box = Image.new("RGB", (side, side), (255, 255, 255))
    box.paste(picture.resize(shape), ((side - shape[0]) // 2, (side - shape[1]) // 2))
    return box


if __name__ == "__main__":
    sys.exit(main())
