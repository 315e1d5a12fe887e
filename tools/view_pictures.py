"""Views of a batch as pictures for people: their pixels, and what masks remove from them."""

from itertools import cycle

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from headrace.pipelines.masks import Mask
from headrace.pipelines.recipe import Augmentation

LEAST_CELL_PIXELS = 144
MASK_GREY = 150
TARGET_COLOURS = ((228, 26, 28), (55, 126, 184), (77, 175, 74), (255, 127, 0), (152, 78, 163))

Levels = NDArray[np.float32]
Pixels = NDArray[np.uint8]


def levels(view: torch.Tensor, augmentation: Augmentation) -> Levels:
    """Views [B, 3, H, W] as 8-bit levels [B, H, W, 3], finished ones without normalisation."""
    pixels = view.permute(0, 2, 3, 1).float()
    if view.dtype != torch.uint8:
        pixels = (pixels * torch.tensor(augmentation.std) + torch.tensor(augmentation.mean)) * 255
    return pixels.numpy()


def picture_of(pixels: Levels) -> Image.Image:
    """Levels [H, W, 3], rounded and clipped."""
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))


def over_pixels(
    patches: NDArray[np.bool_], shape: tuple[int, int], kind: Mask
) -> NDArray[np.bool_]:
    """bool [..., N] over patches as bool [..., H, W, 1] over the pixels of `shape`."""
    grid = [length // kind.patch_pixels for length in shape]
    rows = patches.reshape(*patches.shape[:-1], *grid).repeat(kind.patch_pixels, -2)
    return rows.repeat(kind.patch_pixels, -1)[..., None]


def greyed(picture: Pixels, mask: NDArray[np.bool_], kind: Mask) -> Pixels:
    """A copy of the picture uint8 [H, W, 3] whose removed patches (mask bool [N]) are faint."""
    faint = (picture * 0.15 + MASK_GREY * 0.85).astype(np.uint8)
    return np.where(over_pixels(mask, (picture.shape[0], picture.shape[1]), kind), faint, picture)


def coloured(picture: Pixels, targets: NDArray[np.bool_], kind: Mask) -> Pixels:
    """A copy that is faint but for the target blocks (bool [targets, N]), each in its colour."""
    result = greyed(picture, np.ones_like(targets[0]), kind)
    for target, colour in zip(targets, cycle(TARGET_COLOURS), strict=False):
        tinted = (picture * 0.6 + np.array(colour) * 0.4).astype(np.uint8)
        result = np.where(
            over_pixels(target, (picture.shape[0], picture.shape[1]), kind), tinted, result
        )
    return result


def class_name(label: int, classes: tuple[str, ...]) -> str:
    """What stands below a picture of this label; -1 is none."""
    if label < 0:
        return "no label"
    return classes[label] if label < len(classes) else f"class {label}"


def enlargement(view_pixels: int) -> int:
    """The whole number by which a view is enlarged to be seen on a sheet."""
    return max(1, round(LEAST_CELL_PIXELS / view_pixels))


def last_parts(uri: str) -> str:
    """The last two parts of a path: what people call the data set."""
    return "/".join(uri.rstrip("/").split("/")[-2:])
