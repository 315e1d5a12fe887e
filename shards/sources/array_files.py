"""Files of pixel arrays: .npz, and the pickles of CIFAR and of downsampled ImageNet.

A pickle can run any program when it is read. Here it may make numbers, text, lists, dictionaries
and arrays of numbers, and nothing else: whatever asks for more is refused before it is made.
"""

import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

IMAGE_KEYS = ("images", "data")
LABEL_KEYS = ("labels", "label", "fine_labels")
ARRAY_ERRORS = (
    KeyError, ValueError, TypeError, AttributeError, IndexError, EOFError, zipfile.BadZipFile,
    pickle.UnpicklingError,
)  # fmt: skip
"""What reading a file of arrays that is none of these, or damaged, can raise."""


def open_images(path: str) -> NDArray[np.uint8]:
    """Pixels uint8 [n, height, width, 3] of a file; mapped into memory where they lie in an .npz
    uncompressed.

    Rows of 3 x side x side numbers, as CIFAR has them, and grey pictures [n, height, width] are
    views of that shape. Raises one of `ARRAY_ERRORS` for anything else.
    """
    if not path.endswith(".npz"):
        return _pixels(_entry(read_pickle(Path(path)), IMAGE_KEYS))
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        name = next((f"{key}.npy" for key in IMAGE_KEYS if f"{key}.npy" in names), "images.npy")
        entry = archive.getinfo(name)
        if entry.compress_type != zipfile.ZIP_STORED:
            with np.load(path, allow_pickle=False) as arrays:
                return _pixels(arrays[name.removesuffix(".npy")])
    return _pixels(_mapped(path, entry.header_offset))


def _mapped(path: str, header_offset: int) -> NDArray[Any]:
    """An array that is stored uncompressed in a zip."""
    with open(path, "rb") as file:
        # The local header repeats the name and has an extra field of its own length.
        file.seek(header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
        file.seek(header_offset + 30 + int(lengths.sum()))
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran_order, dtype = read_header(file)
        order = "F" if fortran_order else "C"
        return np.memmap(path, dtype, "r", offset=file.tell(), shape=shape, order=order)


def _pixels(images: NDArray[Any]) -> NDArray[np.uint8]:
    if images.dtype == np.uint8:
        if (
            images.ndim == 2
            and (side := math.isqrt(images.shape[1] // 3)) ** 2 * 3 == images.shape[1]
        ):
            return images.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim == 4 and images.shape[3] == 1:
            return np.broadcast_to(images, (*images.shape[:3], 3))
        if images.ndim == 4 and images.shape[3] == 3:
            return images
    raise ValueError(f"images are {images.dtype} {images.shape}")


def read_labels_and_classes(path: Path) -> tuple[NDArray[Any] | None, tuple[str, ...]]:
    """(labels [n] or None, the names of classes or ()) of a file of arrays."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            key = next((key for key in LABEL_KEYS if key in arrays.files), None)
            labels = None if key is None else arrays[key]
            classes = arrays["classes"] if "classes" in arrays.files else ()
            return labels, tuple(str(name) for name in classes)
    values = read_pickle(path)
    labels = _entry(values, LABEL_KEYS, None)
    return None if labels is None else np.asarray(labels), ()


def read_class_names(path: Path) -> tuple[str, ...]:
    """Names in CIFAR's batches.meta (CIFAR-10) or meta (CIFAR-100)."""
    names = _entry(read_pickle(path), ("label_names", "fine_label_names"), ())
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)


_REQUIRED = object()


def _entry(values: Mapping[Any, Any], keys: tuple[str, ...], default: Any = _REQUIRED) -> Any:
    """The first of some keys, which may be bytes as Python 2 wrote them."""
    for key in keys:
        for spelling in (key, key.encode()):
            if spelling in values:
                return values[spelling]
    if default is _REQUIRED:
        raise KeyError(" or ".join(keys))
    return default


def read_pickle(path: Path) -> Mapping[Any, Any]:
    """A pickled dictionary of numbers, text and arrays; nothing in it is executed.

    Raises one of `ARRAY_ERRORS`.
    """
    with path.open("rb") as file:
        values = _Unpickler(file, encoding="bytes").load()
    if not isinstance(values, dict):
        raise ValueError(f"holds a {type(values).__name__}, no dictionary")
    return values


def _encode(text: str, encoding: str) -> bytes:
    """What Python 3 writes for bytes in old protocols; other codecs could be made to unpack."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str, /) -> Any:
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _encode,
        }
        for package in ("numpy.core.multiarray", "numpy._core.multiarray"):
            reconstruct, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
            assert callable(reconstruct)
            assert callable(scalar)
            allowed[package, "_reconstruct"] = reconstruct
            allowed[package, "scalar"] = scalar
        for package in ("numpy.core.numeric", "numpy._core.numeric"):
            allowed[package, "_frombuffer"] = _frombuffer
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(
                f"it would run {module}.{name}, and only numbers, text and arrays are read"
            )
        return allowed[module, name]


def _frombuffer(buffer: bytes, dtype: Any, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    """What NumPy writes for arrays from protocol 5 on."""
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)
