"""Trees of small pictures, each of the colour of its class, so that pixels check a label."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"a": (220, 30, 30), "b": (30, 200, 30), "c": (30, 30, 220), "d": (220, 220, 30)}
NO_CLASS = "d"


def picture(colour: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), COLOURS[colour]).save(buffer, kind)
    return buffer.getvalue()


def colour_of(data: np.ndarray) -> str:
    pixel = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))[2, 2].astype(int)
    return min(COLOURS, key=lambda name: int(np.abs(pixel - COLOURS[name]).sum()))


def plant(root: Path, images: Mapping[str, str], texts: Mapping[str, str]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, colour in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(colour))
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def classes(inside: str, names: Mapping[str, str], count: int = 2) -> dict[str, str]:
    """count images of each class: {"inside/<name>/0.png": colour}."""
    return {
        f"{inside}/{name}/{i}.png": colour for name, colour in names.items() for i in range(count)
    }


def flat(inside: str, colours: str, stem: str = "") -> dict[str, str]:
    return {f"{inside}/{stem}{i}.png": colour for i, colour in enumerate(colours)}


ABC = {"a": "a", "b": "b", "c": "c"}
WORDNET = {"n01443537": "a", "n01629819": "b", "n01641577": "c"}
