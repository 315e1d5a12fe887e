"""What a file is that no decoder takes: the kind is told from its first bytes, for a sentence."""

from headrace.shards.jpeg_frame import find_frame

_LOOKED_AT = 512

_STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer, whose data was not fetched"),
    (b"/annex/objects/", "a git-annex pointer, whose data was not fetched"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"8BPS", "a Photoshop document"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\x1f\x8b", "gzip data"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x00\x05\x16\x07", "macOS metadata (AppleDouble)"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"#?RADIANCE", "a Radiance HDR picture"),
    (b"\x76\x2f\x31\x01", "an OpenEXR picture"),
)
_BRANDS = {
    b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF",
    b"crx ": "a Canon raw picture", b"isom": "a video", b"mp42": "a video", b"qt  ": "a video",
}  # fmt: skip


def unreadable_kind(data: bytes | memoryview) -> str | None:
    """What these bytes are, in words; None if that cannot be told."""
    start = bytes(data[:_LOOKED_AT])
    if start.startswith(b"\xff\xd8"):
        return _jpeg_kind(data)
    for beginning, kind in _STARTS:
        if start.startswith(beginning):
            return kind
    if start[4:8] == b"ftyp" and (kind := _BRANDS.get(start[8:12])):
        return kind
    if start[128:132] == b"DICM":
        return "a DICOM file"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return "an SVG drawing"
    return None


def _jpeg_kind(data: bytes | memoryview) -> str | None:
    if bytes(data[2:4]) == b"\xff\xd8":
        return "JPEG with two start markers"
    frame = find_frame(data)
    if frame is None:
        return None
    if frame.precision_bits != 8:
        return f"{frame.precision_bits}-bit JPEG"
    return "JPEG whose height is not in its header" if frame.height == 0 else None
