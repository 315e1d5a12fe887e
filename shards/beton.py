"""FFCV's .beton files: write ours, read anybody's. Neither needs the ffcv package.

Layout (little-endian): header, field descriptors, one metadata row per sample, pages of data,
allocation table (sample, place and length of every item). No item crosses a page. Ours has the
fields `image` (RGBImageField) and `label` (IntField), is filled front to back in id order and
depends on its input alone; FFCV's own writer re-encodes every JPEG and orders pages by timing.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from headrace.shards.atomic import HashedFile, atomic_file
from headrace.shards.headers import PILLOW_ERRORS, HeaderError, read_header
from headrace.shards.index import ENCODED, INDEX_DTYPE, RAW, ShardError, content_hash
from headrace.shards.manifest import ShardFile
from headrace.shards.pixels import in_words

VERSION = 2
PAGE_BYTES_AT_LEAST = 1 << 21
PAGE_BYTES_AT_MOST = 1 << 31  # the header stores the page size as uint32
SIDE_PIXELS_AT_MOST = (1 << 16) - 1  # sides are stored as uint16

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_bytes", "<u4"),
        ("num_samples", "<u8"),
        ("allocation_table", "<u8"),  # its place in the file
    ]
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
ALLOCATION = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("length", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("offset", "<u8")])
JPEG_MODE, RAW_MODE = 0, 1

INT_TYPE, IMAGE_TYPE = 1, 2
_BYTES = np.dtype([("offset", "<u8"), ("length", "<u8")])
FIELD_TYPES = {
    0: np.dtype("<f8"),  # FloatField
    INT_TYPE: np.dtype("<i8"),
    IMAGE_TYPE: IMAGE,
    3: _BYTES,  # BytesField
    4: np.dtype("<u8"),  # NDArrayField
    5: _BYTES,  # JSONField
    6: np.dtype("<u8"),  # TorchTensorField
}
"""Type number -> metadata of one sample. 255 marks a field of the user's own making."""
LABEL_NAMES = ("label", "labels", "target", "class", "cls")
"""Which int field is the label, where there are several."""


class Item(NamedTuple):
    """What a .beton file stores of one image: `data` and its `encoding` (ENCODED or RAW)."""

    data: bytes
    encoding: int
    height: int
    width: int


def beton_item(image: bytes) -> Item:
    """The stored form of an image file.

    Grey and YCbCr JPEGs keep their bytes (ENCODED); every other image is decoded once, here, and
    stored as RGB pixels (RAW): alpha dropped, EXIF rotation ignored. Meant for the parallel part of
    a conversion. Raises `ShardError` for what cannot be decoded, for more than 8 bits per channel
    and for sides above 65,535 pixels.
    """
    try:
        header = read_header(image)
    except HeaderError as error:
        raise ShardError(str(error)) from error
    if max(header.height, header.width) > SIDE_PIXELS_AT_MOST:
        raise ShardError(
            f"an image of {header.width} x {header.height} pixels: .beton files hold sides up to "
            f"{SIDE_PIXELS_AT_MOST}; shrink it or write webdataset"
        )
    if header.plain_jpeg:
        return Item(image, ENCODED, header.height, header.width)
    try:
        with Image.open(io.BytesIO(image)) as opened:
            mode = opened.mode
            pixels = opened.convert("RGB")
    except PILLOW_ERRORS as error:
        raise ShardError(f"an image that cannot be decoded ({in_words(error)})") from error
    if mode.startswith(("I", "F")):
        raise ShardError(
            f"an image of mode {mode}: .beton files hold 8 bits per channel; convert it first"
        )
    return Item(pixels.tobytes(), RAW, pixels.height, pixels.width)


def page_bytes_for(largest_item_bytes: int) -> int:
    """The page size: the smallest power of two >= 2 MiB that holds the largest item."""
    if largest_item_bytes > PAGE_BYTES_AT_MOST:
        raise ShardError(
            f"an image of {largest_item_bytes} bytes: .beton files hold items up to "
            f"{PAGE_BYTES_AT_MOST}; shrink it or write webdataset"
        )
    return max(PAGE_BYTES_AT_LEAST, 1 << (largest_item_bytes - 1).bit_length())


def write_beton(
    path: Path, rows: NDArray[np.void], items: Iterable[bytes | memoryview]
) -> tuple[NDArray[np.void], ShardFile]:
    """Write a .beton file front to back, atomically; equal input gives equal bytes.

    rows: [n] of `INDEX_DTYPE` in final order with `length`, `height`, `width`, `label` and
    `encoding` filled in; knowing them before the first byte is what allows a single sequential
    pass, as the metadata stand in front of the data. A `content_hash` other than 0 is compared.
    items: the stored bytes (`beton_item`), in the order of rows; taken one at a time.
    Returns the rows with `offset` and `content_hash` set (`shard` 0; the name columns are filled by
    `write_index`) and the manifest's entry with the file's sha256.
    Raises `ShardError` if items and rows do not match or an item cannot be stored, OSError from the
    disk. Nothing is left behind then.
    """
    rows = np.array(rows, INDEX_DTYPE)
    _check_rows(path, rows)
    page_bytes = page_bytes_for(int(rows["length"].max()))
    metadata_type = _metadata_type([IMAGE_TYPE, INT_TYPE])
    metadata_end = HEADER.itemsize + 2 * FIELD.itemsize + len(rows) * metadata_type.itemsize
    data_start = _round_up(metadata_end, page_bytes)
    rows["shard"] = 0
    rows["offset"] = _place(rows["length"], data_start, page_bytes)
    data_end = _round_up(int(rows["offset"][-1] + rows["length"][-1]), page_bytes)

    header = np.zeros((), HEADER)
    header["version"], header["num_fields"] = VERSION, 2
    header["page_bytes"], header["num_samples"] = page_bytes, len(rows)
    header["allocation_table"] = data_end
    descriptors = np.zeros(2, FIELD)
    descriptors["type"] = IMAGE_TYPE, INT_TYPE
    descriptors["name"] = b"image", b"label"
    metadata = np.zeros(len(rows), metadata_type)
    image = metadata["f0"]
    image["mode"] = np.where(rows["encoding"] == RAW, RAW_MODE, JPEG_MODE)
    for column in ("width", "height", "offset"):
        image[column] = rows[column]
    metadata["f1"] = rows["label"]
    allocations = np.zeros(len(rows), ALLOCATION)
    allocations["sample"] = np.arange(len(rows))
    allocations["offset"], allocations["length"] = rows["offset"], rows["length"]

    with atomic_file(path) as file:
        hashed = HashedFile(file)
        for part in (header, descriptors, metadata):
            hashed.write(part.tobytes())
        _write_items(path, hashed, rows, items)
        _pad(hashed, data_end)
        hashed.write(allocations.tobytes())
    return rows, ShardFile(path.name, len(rows), hashed.bytes_written, hashed.sha256)


def _write_items(
    path: Path, hashed: HashedFile, rows: NDArray[np.void], items: Iterable[bytes | memoryview]
) -> None:
    supply = iter(items)
    for sample_id, row in enumerate(rows):
        data = next(supply, None)
        if data is None:
            raise ShardError(f"{path}: {len(rows)} samples are declared, {sample_id} came")
        digest = content_hash(data)
        if len(data) != row["length"] or row["content_hash"] not in (0, digest):
            raise ShardError(f"{path}: the bytes of sample {sample_id} are not the declared ones")
        rows["content_hash"][sample_id] = digest
        _pad(hashed, int(row["offset"]))
        hashed.write(data)
    if next(supply, None) is not None:
        raise ShardError(f"{path}: more samples came than the {len(rows)} declared")


def _check_rows(path: Path, rows: NDArray[np.void]) -> None:
    if len(rows) == 0:
        raise ShardError(f"{path}: a .beton file needs at least one sample")
    sides = np.stack((rows["height"], rows["width"]), axis=1).astype(np.int64)
    raw_lengths = 3 * sides[:, 0] * sides[:, 1]
    wrong = (
        (sides.min(axis=1) < 1)
        | (sides.max(axis=1) > SIDE_PIXELS_AT_MOST)
        | (rows["length"] < 1)
        | (rows["encoding"] > RAW)
        | ((rows["encoding"] == RAW) & (rows["length"] != raw_lengths.astype(np.uint64)))
    )
    if wrong.any():
        sample_id = int(np.flatnonzero(wrong)[0])
        row = rows[sample_id]
        raise ShardError(
            f"{path}: sample {sample_id} cannot be stored: {row['width']} x {row['height']} pixels "
            f"in {row['length']} bytes, encoding {row['encoding']} (sides from 1 to "
            f"{SIDE_PIXELS_AT_MOST}; raw pixels take 3 bytes each)"
        )


def _place(lengths: NDArray[np.uint64], start: int, page_bytes: int) -> list[int]:
    """Offsets of items put one after the other, from a page's start, none across a page's end."""
    offsets = []
    position = start
    for length in lengths.tolist():
        if position % page_bytes + length > page_bytes:
            position = _round_up(position, page_bytes)
        offsets.append(position)
        position += length
    return offsets


def _round_up(position: int, page_bytes: int) -> int:
    return -(-position // page_bytes) * page_bytes


def _pad(hashed: HashedFile, position: int) -> None:
    hashed.write(bytes(position - hashed.bytes_written))


def _metadata_type(types: Iterable[int]) -> np.dtype:
    """One sample's metadata: the fields `f0`, `f1`, ... aligned as C aligns a struct."""
    return np.dtype([("", FIELD_TYPES[number]) for number in types], align=True)


def read_beton_index(path: Path) -> NDArray[np.void]:
    """Index rows [n] (`INDEX_DTYPE`) of anybody's .beton file; reads metadata, no image.

    The image is the field of type RGBImageField (with several, the one named `image`). The label is
    the only field of type int, else the one of `LABEL_NAMES`; where that does not settle it, labels
    are -1. `content_hash` and the name columns are 0.
    Raises `ShardError` if the file is no .beton of version 2, has no RGB image field, has fields of
    unknown types, or is cut off.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header = _read(path, file, 0, HEADER, 1)[0]
        if header["version"] != VERSION or not _is_page_size(int(header["page_bytes"])):
            raise ShardError(f"{path} is not a .beton file of version {VERSION}")
        samples = int(header["num_samples"])
        if samples == 0:
            raise ShardError(f"{path} holds no sample")
        fields = _read(path, file, HEADER.itemsize, FIELD, int(header["num_fields"]))
        names = [name.decode("ascii", "replace") for name in fields["name"]]
        types = [int(number) for number in fields["type"]]
        for name, number in zip(names, types, strict=True):
            if number not in FIELD_TYPES:
                raise ShardError(
                    f"{path}: the field {name!r} has a type of its own, so the layout is unknown; "
                    "write the file with FFCV's own fields"
                )
        metadata_start = HEADER.itemsize + fields.nbytes
        metadata = _read(path, file, metadata_start, _metadata_type(types), samples)
        table = int(header["allocation_table"])
        allocation_count = max(file_bytes - table, 0) // ALLOCATION.itemsize
        allocations = _read(path, file, table, ALLOCATION, allocation_count)

    image = metadata[f"f{_image_field(path, names, types)}"]
    label_field = _label_field(names, types)
    rows = np.zeros(samples, INDEX_DTYPE)
    for column in ("offset", "height", "width"):
        rows[column] = image[column]
    if (image["mode"] > RAW_MODE).any():
        raise ShardError(f"{path} has images of an unknown mode: jpg and raw are readable")
    rows["encoding"] = np.where(image["mode"] == RAW_MODE, RAW, ENCODED)
    labels = np.full(samples, -1) if label_field is None else metadata[f"f{label_field}"]
    if labels.min() < -1 or labels.max() >= 1 << 31:
        raise ShardError(f"{path}: labels run from {labels.min()} to {labels.max()}; -1 or more")
    rows["label"] = labels
    rows["length"] = _lengths(path, rows, allocations)
    ends_early = rows["length"] > file_bytes - np.minimum(rows["offset"], file_bytes)
    if ends_early.any():
        raise ShardError(f"{path} is cut off: write or fetch it again")
    return rows


def _read(path: Path, file: BinaryIO, offset: int, kind: np.dtype, count: int) -> NDArray[np.void]:
    wanted = count * kind.itemsize
    if offset + wanted > path.stat().st_size:  # also keeps damaged numbers from seek and read
        raise ShardError(f"{path} is not a whole .beton file: write or fetch it again")
    file.seek(offset)
    return np.frombuffer(file.read(wanted), kind)


def _is_page_size(page_bytes: int) -> bool:
    return page_bytes >= PAGE_BYTES_AT_LEAST and page_bytes & (page_bytes - 1) == 0


def _image_field(path: Path, names: list[str], types: list[int]) -> int:
    candidates = [position for position, number in enumerate(types) if number == IMAGE_TYPE]
    named = [position for position in candidates if names[position] == "image"]
    match named or candidates:
        case [position]:
            return position
        case []:
            raise ShardError(
                f"{path} has no RGB image field; its fields are {', '.join(names) or 'none'}"
            )
        case several:
            listed = ", ".join(names[position] for position in several)
            raise ShardError(f"{path} has several image fields ({listed}), none named image")


def _label_field(names: list[str], types: list[int]) -> int | None:
    candidates = {names[i]: i for i, number in enumerate(types) if number == INT_TYPE}
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    return next((candidates[name] for name in LABEL_NAMES if name in candidates), None)


def _lengths(
    path: Path, rows: NDArray[np.void], allocations: NDArray[np.void]
) -> NDArray[np.uint64]:
    """Bytes of each item, which only the allocation table knows."""
    order = np.argsort(allocations["offset"], kind="stable")
    offsets = allocations["offset"][order]
    places = np.searchsorted(offsets, rows["offset"])
    if len(offsets) == 0 or (offsets[np.minimum(places, len(offsets) - 1)] != rows["offset"]).any():
        raise ShardError(f"{path} has no whole allocation table: its writing was not finished")
    lengths = allocations["length"][order][places]
    raw = rows["encoding"] == RAW
    pixels = rows["height"].astype(np.uint64) * rows["width"].astype(np.uint64)
    if (lengths[raw] != 3 * pixels[raw]).any():
        raise ShardError(f"{path}: raw images do not have 3 bytes per pixel: the file is damaged")
    return lengths
