"""What the operations of RandAugment mean: Pillow's functions, called as timm calls them.

timm 1.0.31 `data/auto_augment.py`. Posterize alone is written out: Pillow from 13 on refuses to
keep 0 bits, which timm asks for at the largest magnitude, and which is black in older versions.
"""

from collections.abc import Mapping
from typing import assert_never

from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from headrace.pipelines.ops import RAND_AUGMENT_OPERATIONS, RandAugment, RandAugmentOperation

_SOLARIZE_ADD_BELOW = 128


def rand_augment(
    picture: Image.Image, op: RandAugment, draws: Mapping[str, NDArray], row: int
) -> Image.Image:
    """The drawn operations one after the other, by row `row` of the columns that `op` names."""
    operations, arguments, bicubic = (
        draws[name][row].tolist() for name in ("operation", "argument", "bicubic")
    )
    for place, argument, is_bicubic in zip(operations, arguments, bicubic, strict=True):
        if place >= 0:
            resample = Image.Resampling.BICUBIC if is_bicubic else Image.Resampling.BILINEAR
            name = RAND_AUGMENT_OPERATIONS[place]
            picture = apply_operation(picture, name, argument, resample, op.fill)
    return picture


def apply_operation(
    picture: Image.Image,
    name: RandAugmentOperation,
    argument: float,
    resample: Image.Resampling,
    fill: tuple[int, int, int],
) -> Image.Image:
    """One operation on an RGB picture; `argument` as RandAugment's docstring has it.

    Rotate turns about the centre. Shear and Translate map output to input: x + argument * y,
    x + argument * width. They sample by `resample`, and what is outside of the picture is `fill`.
    """
    match name:
        case "AutoContrast":
            return ImageOps.autocontrast(picture)
        case "Equalize":
            return ImageOps.equalize(picture)
        case "Invert":
            return ImageOps.invert(picture)
        case "Rotate":
            return picture.rotate(argument, resample, fillcolor=fill)
        case "Posterize":
            dropped = (1 << (8 - int(argument))) - 1
            return picture.point([level & ~dropped for level in range(256)] * 3)
        case "Solarize":
            return ImageOps.solarize(picture, int(argument))
        case "SolarizeAdd":
            return picture.point([_solarize_add(level, int(argument)) for level in range(256)] * 3)
        case "Color":
            return ImageEnhance.Color(picture).enhance(argument)
        case "Contrast":
            return ImageEnhance.Contrast(picture).enhance(argument)
        case "Brightness":
            return ImageEnhance.Brightness(picture).enhance(argument)
        case "Sharpness":
            return ImageEnhance.Sharpness(picture).enhance(argument)
        case "ShearX":
            return _affine(picture, (1, argument, 0, 0, 1, 0), resample, fill)
        case "ShearY":
            return _affine(picture, (1, 0, 0, argument, 1, 0), resample, fill)
        case "TranslateX":
            return _affine(picture, (1, 0, argument * picture.width, 0, 1, 0), resample, fill)
        case "TranslateY":
            return _affine(picture, (1, 0, 0, 0, 1, argument * picture.height), resample, fill)
        case _:
            assert_never(name)


def _affine(
    picture: Image.Image,
    matrix: tuple[float, ...],
    resample: Image.Resampling,
    fill: tuple[int, int, int],
) -> Image.Image:
    """matrix: (a, b, c, d, e, f), output (x, y) from input (a x + b y + c, d x + e y + f)."""
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def _solarize_add(level: int, addend: int) -> int:
    return min(255, level + addend) if level < _SOLARIZE_ADD_BELOW else level
