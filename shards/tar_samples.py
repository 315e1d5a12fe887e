"""The samples of anybody's WebDataset tars: which member is the image, which one says the label.

Nothing that looks like an image or a label is passed over unsaid: what is not used is counted, with
a reason and an example, for whoever opens or converts the tars.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from headrace.shards.index import ShardError

BLOCK_BYTES = 512
_PADDING_BYTES = 1 << 16  # tar fills its last record, of 10 kB or what -b says, with zeros
IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "png", "webp", "ppm", "bmp",
    "jpe", "pgm", "pnm", "tif", "tiff", "gif", "jp2", "avif", "mpo",
)  # fmt: skip
"""Extensions that mark the image of a sample, the preferred one first."""
LABEL_EXTENSIONS = ("cls", "label", "json")
"""Extensions that may hold a sample's label, asked in this order."""
JSON_LABEL_KEYS = ("label", "cls", "class_id")
"""Keys of a .json that may hold the label, asked in this order."""
_LABEL_BYTES_AT_MOST = 1 << 20  # a .json may be long; a label member beyond this is something else
_LOOKED_INTO = 16  # samples without a label whose other members are looked at, per tar
_WHOLE_NUMBER = re.compile(rb"[+-]?[0-9]+")
_FIELD = re.compile(r"[a-z_]+")  # "seg" of 0.seg.png; a name with dots has other characters too

NO_IMAGE_OF_KEY = "key(s) have no image and are passed over"
SECOND_IMAGE = "member(s) end like an image and are not used: a sample has one"
DOTTED = "name(s) hold dots, and the last one ends the key"
UNUSED_LABEL = "sample(s) have a label that is no class number and is not used"
OTHER_NUMBERS = (
    "sample(s) have no label, and a whole number in a member that is not read as one: name it .cls"
)
HIDDEN = "hidden member(s) end like an image and are not used"


class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class TarImage:
    """The image of one sample of a tar: member name, place of its bytes, label (-1 = none)."""

    key: str
    extension: str
    offset: int
    length: int
    label: int

    @property
    def name(self) -> str:
        """The member's name as it stands in the tar, extension in lower case."""
        return f"{self.key}.{self.extension}"


@dataclass(frozen=True)
class TarScan:
    """What one tar holds.

    images: in the order in which their keys begin. remarks: sentence -> (how often, an example).
    only_images: no member of a sample is anything else.
    """

    images: list[TarImage]
    remarks: Mapping[str, tuple[int, str]]
    only_images: bool


class _Remarks:
    def __init__(self) -> None:
        self.counted: dict[str, tuple[int, str]] = {}

    def add(self, remark: str, example: str) -> None:
        count, first = self.counted.get(remark, (0, example))
        self.counted[remark] = (count + 1, first)


def iterate_members(path: Path, start: int = 0) -> Iterator[Member]:
    """The files of the uncompressed tar at byte `start` of a file, in order.

    A hard link is the member that it links to, under its own name.
    Raises `ShardError` if that is no tar, is compressed or ends too early, if a file is stored
    sparse, or if a link leads nowhere in the tar: its bytes are not there.
    """
    places: dict[str, tuple[int, int]] = {}
    try:
        with path.open("rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    # Otherwise tarfile keeps every header in memory.
                    archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
                    if member.issym() or (member.islnk() and member.linkname not in places):
                        _refuse_link(path, member)
                        continue
                    if not member.isreg() and not member.islnk():
                        continue
                    if member.issparse():
                        raise ShardError(f"{path}: {member.name} is stored sparse; pack it plainly")
                    place = (member.offset_data, member.size)
                    if member.islnk():
                        place = places[member.linkname]
                    places[member.name] = place
                    yield Member(member.name, *place)
                end = archive.offset
    except tarfile.TarError as error:
        raise ShardError(
            f"{path} is not a whole, uncompressed tar ({error}): unpack it from its compression, "
            "or fetch it again"
        ) from error
    # tarfile takes a damaged header for the end; the true end is a block of zeros.
    with path.open("rb") as file:
        file.seek(end)
        if file.read(BLOCK_BYTES) != bytes(BLOCK_BYTES):
            raise ShardError(f"{path} is damaged or cut off at byte {end}: fetch or write it again")
        if not start and any(file.read(_PADDING_BYTES)):
            raise ShardError(
                f"{path} goes on behind its end at byte {end}: tars joined by `cat` are read to "
                "the end of the first; keep them apart, or join them with `tar --concatenate`"
            )


def _refuse_link(path: Path, member: tarfile.TarInfo) -> None:
    """A link whose name says that it is needed is an error, another one is of no interest."""
    ending = member.name.rpartition(".")[2].lower()
    if ending in IMAGE_EXTENSIONS or ending in LABEL_EXTENSIONS:
        raise ShardError(
            f"{path}: {member.name} is a link to {member.linkname}, whose bytes are not in the tar "
            "under that name: pack the files themselves (tar --dereference)"
        )


def scan_tar(path: Path) -> TarScan:
    """The samples of anybody's WebDataset tar.

    Members belong together by path up to the first dot of the file name, the rest is the
    extension, upper case or not; where that gives no image, up to the last dot. Members of a sample
    need not be neighbours. The label comes from `.cls` (ASCII), else `.label` (ASCII or
    little-endian int32/int64), else a whole number under "label", "cls" or "class_id" in `.json`;
    -1 if there is none.
    Raises `ShardError` if there is no image at all, if a sample has one member twice or several
    images of which none is named after it, or if `.cls` or `.label` is not an integer.
    """
    remarks = _Remarks()
    samples = _samples(path, remarks)
    images: list[TarImage] = []
    only_images = True
    looked_into = 0
    with path.open("rb") as file:
        for key, members in samples.items():
            extension = next((name for name in IMAGE_EXTENSIONS if name in members), None)
            if extension is None:
                remarks.add(NO_IMAGE_OF_KEY, key)
                continue
            for other in members:
                if other == extension:
                    continue
                only_images = False
                if other.rpartition(".")[2] in IMAGE_EXTENSIONS:
                    remarks.add(SECOND_IMAGE, f"{key}.{other}")
            label = _label(path, key, members, file, remarks)
            if label < 0 and looked_into < _LOOKED_INTO:
                looked_into += 1
                _look_for_numbers(key, members, file, remarks)
            image = members[extension]
            images.append(TarImage(key, extension, image.offset, image.length, label))
    if not images:
        seen = sorted({extension for members in samples.values() for extension in members})[:10]
        if seen == ["tar"]:
            raise ShardError(f"{path} holds tars: convert it with make_shards, or unpack it")
        raise ShardError(
            f"{path} holds no image: members with the extensions {', '.join(IMAGE_EXTENSIONS)} "
            f"are images, found: {', '.join(seen) or 'no member'}"
        )
    return TarScan(images, remarks.counted, only_images)


_Samples = dict[str, dict[str, Member]]


def _samples(path: Path, remarks: _Remarks) -> _Samples:
    """Key -> extension -> member."""
    by_first_dot: _Samples = {}
    file_bytes = path.stat().st_size
    for member in iterate_members(path):
        if member.offset + member.length > file_bytes:
            raise ShardError(f"{path} ends inside {member.name}: fetch or write it again")
        directory, _, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot:
            # Metadata of the tar itself, and hidden files; ._x.jpg is what macOS adds to x.jpg.
            ending = extension.rpartition(".")[2].lower()
            if ending in IMAGE_EXTENSIONS and not base.startswith("._"):
                remarks.add(HIDDEN, member.name)
            continue
        _put(path, by_first_dot, f"{directory}/{stem}" if directory else stem, extension, member)
    samples: _Samples = {}
    for key, members in by_first_dot.items():
        has_image = any(extension in IMAGE_EXTENSIONS for extension in members)
        dotted = [e for e in members if e.rpartition(".")[2] in IMAGE_EXTENSIONS]
        if has_image or not dotted:
            samples[key] = members
            continue
        for inner_key, inner in _by_last_dot(path, key, members).items():
            samples[inner_key] = inner
        for extension in dotted:
            remarks.add(DOTTED, f"{key}.{extension}")
    return samples


def _by_last_dot(path: Path, key: str, members: dict[str, Member]) -> _Samples:
    """The samples of names with dots: img.v2.jpg and img.v2.cls are one, called img.v2.

    Raises `ShardError` where the dots separate not names but the parts of one sample.
    """
    samples: _Samples = {}
    for extension, member in members.items():
        middle, dot, last = extension.rpartition(".")
        _put(path, samples, f"{key}.{middle}" if dot else key, last, member)
    pictures = [k for k, found in samples.items() if not found.keys().isdisjoint(IMAGE_EXTENSIONS)]
    fields = [k for k in pictures if _FIELD.fullmatch(k[len(key) + 1 :])]
    labels = [
        k
        for k, found in samples.items()
        if k not in pictures and not found.keys().isdisjoint(LABEL_EXTENSIONS)
    ]
    if len(fields) > 1 or (labels and len(pictures) < len(samples) and fields):
        raise ShardError(
            f"{path} holds no image of {key}: which of its members is the image is not said, "
            f"found: {', '.join(sorted(members))}; name it {key}.jpg"
        )
    return samples


def _put(path: Path, samples: _Samples, key: str, extension: str, member: Member) -> None:
    members = samples.setdefault(key, {})
    extension = extension.lower()
    if extension in members:
        raise ShardError(
            f"{path} holds {key}.{extension} twice: keys must be unique within a tar, and a "
            "key ends at the first dot of the file name"
        )
    members[extension] = member


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.length)


def _label(
    path: Path, key: str, members: dict[str, Member], file: BinaryIO, remarks: _Remarks
) -> int:
    for extension in LABEL_EXTENSIONS:
        member = members.get(extension)
        if member is None or member.length > _LABEL_BYTES_AT_MOST:
            continue
        data = _read(file, member)
        label = _parse_json(data) if extension == "json" else _parse_label(extension, data)
        if label is None:
            continue
        if isinstance(label, str):
            remarks.add(UNUSED_LABEL, f"{key}.{extension}: {label}")
            continue
        if not isinstance(label, int) or not -1 <= label < 1 << 31:
            raise ShardError(
                f"{path}: the label of {key} in .{extension} is {label!r}; a class number from 0, "
                "or -1 for none, is expected"
            )
        return label
    return -1


def _parse_label(extension: str, data: bytes) -> int | bytes:
    """An int, or the bytes that are not one."""
    if _WHOLE_NUMBER.fullmatch(data.strip()):
        return int(data)
    if extension == "label" and len(data) in (4, 8):
        return int.from_bytes(data, "little", signed=True)
    return data[:40]


def _parse_json(data: bytes) -> int | str | None:
    """An int, None if nothing is said of a label, or in words what is said and is not one."""
    try:
        values = json.loads(data)
    except ValueError:
        return "no JSON"
    where = ""
    if isinstance(values, dict):
        where = next((key for key in JSON_LABEL_KEYS if values.get(key) is not None), "")
        if not where:
            return None
        values = values[where]
    match values:
        case bool():
            pass
        case int():
            return values
        case float() if values.is_integer():
            return int(values)
        case str() if _WHOLE_NUMBER.fullmatch(values.strip().encode()):
            return int(values)
        case _:
            pass
    return f"{where} {json.dumps(values)[:40]}".strip()


def _look_for_numbers(
    key: str, members: dict[str, Member], file: BinaryIO, remarks: _Remarks
) -> None:
    for extension, member in members.items():
        if extension in LABEL_EXTENSIONS or member.length > 20:
            continue
        if _WHOLE_NUMBER.fullmatch(_read(file, member).strip()):
            remarks.add(OTHER_NUMBERS, f"{key}.{extension}")
