"""Recipes of classifiers, and the view that every encoder is judged by; see `recipes`."""

from headrace.pipelines.ops import (
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Interpolation,
    OneOf,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    RecipeError,
    Resize,
    Solarize,
    ViewOp,
)
from headrace.pipelines.recipe import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    Mix,
    RandomErasing,
    View,
)
from headrace.pipelines.recipes.contrastive import PILLOW_BLUR

_REPEATED = "repeated augmentation, 3 times in the code, is the order's affair"


def _mixed_by(group: int) -> str:
    return (
        f"Mixup and CutMix draw one weight and box for {group} consecutive samples; timm for a "
        f"GPU's batch, 64 by default in DeiT's code"
    )


def supervised(
    pixels: int = 224,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    interpolation: Interpolation = "bilinear",
    padding_pixels: int | None = None,
) -> Augmentation:
    """One random crop and a flip: Inception's crop as ImageNet classifiers have it since.

    Szegedy et al. 2014, section 6; PyTorch's examples `imagenet/main.py`. With `padding_pixels` the
    crop is not resized but cut from the padded picture: `supervised(32, padding_pixels=4)` is
    CIFAR's (He et al. 2015, section 4.2).
    """
    crop = (
        RandomResizedCrop(pixels, scale, interpolation=interpolation)
        if padding_pixels is None
        else RandomCrop(pixels, padding_pixels)
    )
    return Augmentation("supervised", (View("view", (crop, Flip(0.5))),))


def deit(
    pixels: int = 224,
    *,
    randaugment: RandAugment | None = RandAugment(9.0, 0.5),  # noqa: B008  frozen
    erasing_probability: float = 0.25,
    mix: Mix | None = Mix(0.8, 1.0),  # noqa: B008  frozen
    group: int = 64,
) -> Augmentation:
    """DeiT's strong augmentation: RandAugment, random erasing, Mixup and CutMix.

    Touvron et al. 2021, table 9; deit `main.py` and `datasets.py`: timm's `rand-m9-mstd0.5-inc1`
    with bicubic interpolation, `--reprob 0.25 --remode pixel`, `--mixup 0.8 --cutmix 1.0`. MAE's
    fine-tuning has the same. The method smooths the labels (0.1) and makes the soft targets.
    """
    ops: tuple[ViewOp, ...] = (
        RandomResizedCrop(pixels, (0.08, 1.0), interpolation="bicubic"),
        Flip(0.5),
        *(() if randaugment is None else (randaugment,)),
    )
    erase = RandomErasing(erasing_probability, fill="pixel") if erasing_probability > 0 else None
    return Augmentation(
        "deit",
        (View("view", ops, erase=erase),),
        group=1 if mix is None else group,
        mix=mix,
        deviations=(
            *(() if mix is None else (_mixed_by(group),)),
            "erasing's noise and the magnitudes' are cut at 4.33 standard deviations",
            _REPEATED,
        ),
    )


def deit3(
    pixels: int = 224,
    *,
    simple_crop: bool = False,
    color_jitter: float = 0.3,
    mix: Mix | None = Mix(0.8, 1.0),  # noqa: B008  frozen
    group: int = 64,
) -> Augmentation:
    """DeiT III's 3-Augment: grey, solarized or blurred, each as likely, then colours jittered.

    Touvron et al. 2022, section 3.2; deit `augment.py` and `README_revenge.md`. `simple_crop` is
    the paper's for large data sets (ImageNet-21k), `--src` of the code.
    """
    crop = (
        (Resize(pixels, "bicubic"), RandomCrop(pixels, 4))
        if simple_crop
        else (RandomResizedCrop(pixels, (0.08, 1.0), interpolation="bicubic"),)
    )
    ops: tuple[ViewOp, ...] = (
        *crop,
        Flip(0.5),
        OneOf((Grayscale(1.0), Solarize(1.0, 128), GaussianBlur(1.0, (0.1, 2.0)))),
        ColorJitter(color_jitter, color_jitter, color_jitter, 0.0),
    )
    return Augmentation(
        "deit3",
        (View("view", ops),),
        group=1 if mix is None else group,
        mix=mix,
        deviations=(
            *(("the simple crop's border is black; the code reflects it",) if simple_crop else ()),
            PILLOW_BLUR,
            *(() if mix is None else (_mixed_by(group),)),
            _REPEATED,
        ),
    )


def center(
    pixels: int = 224,
    resize_pixels: int = 256,
    *,
    interpolation: Interpolation = "bicubic",
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Augmentation:
    """The test view: the shorter side to `resize_pixels`, then the central square.

    dino `eval_knn.py` (bicubic). `mean` and `std` are those of the recipe that trained.
    `center(32, 32)` leaves a picture of 32 x 32 pixels as it is.
    Raises RecipeError for a square that is larger than the resized picture.
    """
    if resize_pixels < pixels:
        raise RecipeError(
            f"resize_pixels is {resize_pixels}; it must not be less than pixels, {pixels}"
        )
    ops = (Resize(resize_pixels, interpolation), CenterCrop(pixels))
    return Augmentation("center", (View("view", ops),), mean=mean, std=std)
