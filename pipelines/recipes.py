"""The published recipes, as plain functions that return an `Augmentation`.

The defaults are the papers' ImageNet numbers; a CIFAR-sized run passes smaller ones. What differs
from the paper or its code stands in the `deviations` of what is returned and nowhere else.
"""

from pipelines.recipe import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Interpolation,
    Op,
    RandomMask,
    RandomResizedCrop,
    RecipeError,
    Resize,
    Solarize,
    View,
)

_PILLOW_BLUR = "blur is a true Gaussian; the code's Pillow approximates one by three box blurs"
_NO_BLUR = "no blur"


def dino(
    global_pixels: int = 224,
    local_pixels: int = 96,
    local_count: int = 8,
    *,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.4),
    blur: bool = True,
) -> Augmentation:
    """DINO's multi-crop: two global views, unlike in blur and solarization, and local ones.

    Caron et al. 2021, section 3.2 and appendix; dino `main_dino.py`, `DataAugmentationDINO`.
    A `local_count` of 0 leaves the local views out. `blur=False` is for pictures of 32 pixels,
    where a sigma of 2 leaves little to see.
    """

    def ops(
        pixels: int, scale: tuple[float, float], blur_probability: float, *last: Op
    ) -> tuple[Op, ...]:
        return (
            RandomResizedCrop(pixels, scale, interpolation="bicubic"),
            Flip(0.5),
            ColorJitter(0.4, 0.4, 0.2, 0.1, probability=0.8),
            Grayscale(0.2),
            *((GaussianBlur(blur_probability, (0.1, 2.0)),) if blur else ()),
            *last,
        )

    views = [
        View("global_1", ops(global_pixels, global_scale, 1.0)),
        View("global_2", ops(global_pixels, global_scale, 0.1, Solarize(0.2, 128))),
    ]
    if local_count != 0:
        views.append(View("local", ops(local_pixels, local_scale, 0.5), local_count))
    return Augmentation("dino", tuple(views), deviations=(_PILLOW_BLUR if blur else _NO_BLUR,))


def simclr(pixels: int = 224, *, strength: float = 1.0, blur: bool = True) -> Augmentation:
    """SimCLR's two views, drawn alike and not normalised.

    Chen et al. 2020, appendix A; simclr `data_util.py`, `preprocess_for_train` and
    `batch_random_blur`. `strength` scales the colour jitter. The paper's CIFAR-10 recipe (appendix
    B.9) is `simclr(32, strength=0.5, blur=False)`.
    """
    # The code's height // 10 counts the pixels on both sides of the centre, rounded down to even.
    blur_ops = (GaussianBlur(0.5, (0.1, 2.0), kernel_size=pixels // 10 // 2 * 2 + 1),)
    ops: tuple[Op, ...] = (
        RandomResizedCrop(pixels, (0.08, 1.0), interpolation="bicubic"),
        Flip(0.5),
        ColorJitter(
            0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength, probability=0.8
        ),
        Grayscale(0.2),
        *(blur_ops if blur else ()),
    )
    blur_deviations = (
        "blur draws a sigma per sample and view; the code draws one per view for the whole batch",
        "blur reflects the border; the code pads it with black",
    )
    return Augmentation(
        "simclr",
        (View("view", ops, count=2),),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        deviations=(
            "crop draws as torchvision, log-uniform in aspect ratio and with 10 attempts before "
            "the central box; the code uses TensorFlow's sample_distorted_bounding_box, with 100 "
            "attempts before the whole picture and a least area of 0.1",
            "crop resizes with antialiasing; the code's resize_bicubic has none",
            "contrast turns around the mean of the grey picture; the code's around each channel's",
            "colour ops round to 8 bits; the code stays in floating point",
            *(blur_deviations if blur else (_NO_BLUR,)),
        ),
    )


def mae(pixels: int = 224, *, patch_pixels: int = 16, ratio: float = 0.75) -> Augmentation:
    """MAE's one view, hardly augmented, and its random mask.

    He et al. 2021, appendix A.1; mae `main_pretrain.py` and `models_mae.py`, `random_masking`.
    """
    ops = (RandomResizedCrop(pixels, (0.2, 1.0), interpolation="bicubic"), Flip(0.5))
    return Augmentation("mae", (View("view", ops, mask=RandomMask(patch_pixels, ratio)),))


def supervised(
    pixels: int = 224,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    interpolation: Interpolation = "bilinear",
) -> Augmentation:
    """One random crop and a flip: Inception's crop as ImageNet classifiers have it since.

    Szegedy et al. 2014, section 6; PyTorch's examples `imagenet/main.py`.
    """
    ops = (RandomResizedCrop(pixels, scale, interpolation=interpolation), Flip(0.5))
    return Augmentation("supervised", (View("view", ops),))


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
