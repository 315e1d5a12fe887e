"""Recipes of methods that compare several views of a picture; see `recipes`."""

from headrace.pipelines.masks import Mask
from headrace.pipelines.ops import (
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    RandomResizedCrop,
    Solarize,
    ViewOp,
)
from headrace.pipelines.recipe import IMAGENET_MEAN, Augmentation, View

# Measured on 44 photographs of 224 x 224 pixels; a test holds it.
PILLOW_BLUR = (
    "blur is a true Gaussian; the code's Pillow approximates one by three box blurs, which are 0.3 "
    "levels away on average over the sigmas, and 0.7 at the worst of them (0.7)"
)
NO_BLUR = "no blur"

_TENSORFLOW_COLOURS = (
    "contrast turns around the mean of the grey picture; the code's around each channel's",
    "saturation moves from or to the grey picture; the code scales the S of HSV",
    "colour ops round to 8 bits; the code stays in floating point",
)


def _blur_kernel(pixels: int) -> int:
    """The `height // 10` of SimCLR's and BYOL's code: pixels on both sides of the centre."""
    return pixels // 10 // 2 * 2 + 1


def simclr(
    pixels: int = 224,
    *,
    strength: float = 1.0,
    crop_min: float = 0.08,
    blur: bool = True,
    blur_group: int = 1,
    additive_brightness: bool = False,
) -> Augmentation:
    """SimCLR's two views, drawn alike and not normalised.

    Chen et al. 2020, appendix A; simclr `data_util.py`, `preprocess_for_train` and
    `batch_random_blur`. `strength` scales the colour jitter, `crop_min` is the least area of a
    crop. The paper's CIFAR-10 recipe (appendix B.9) is `simclr(32, strength=0.5, blur=False)`.
    `additive_brightness` is the code's "simclrv1". A `blur_group` above 1 is the number of samples
    that share a sigma.
    """
    shared = blur_group > 1
    blur_op = GaussianBlur(
        0.5, (0.1, 2.0), _blur_kernel(pixels), scope="group" if shared else "sample"
    )
    ops: tuple[ViewOp, ...] = (
        RandomResizedCrop(pixels, (crop_min, 1.0), interpolation="bicubic"),
        Flip(0.5),
        ColorJitter(
            0.8 * strength,
            0.8 * strength,
            0.8 * strength,
            0.2 * strength,
            probability=0.8,
            additive_brightness=additive_brightness,
        ),
        Grayscale(0.2),
        *((blur_op,) if blur else ()),
    )
    drawn = f"group of {blur_group} samples" if shared else "sample"
    blur_deviations = (
        f"blur draws a sigma per {drawn} and view; the code draws one per view for the whole batch",
        "blur reflects the border; the code pads it with black",
    )
    return Augmentation(
        "simclr",
        (View("view", ops, count=2),),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        group=blur_group,
        deviations=(
            "crop draws as torchvision, log-uniform in aspect ratio and with 10 attempts before "
            "the central box; the code uses TensorFlow's sample_distorted_bounding_box, with 100 "
            "attempts before the whole picture and a least area of 0.1",
            "crop resizes with antialiasing; the code's resize_bicubic has none",
            *_TENSORFLOW_COLOURS,
            *(blur_deviations if blur else (NO_BLUR,)),
        ),
    )


def moco_v1(pixels: int = 224) -> Augmentation:
    """MoCo v1's two views: colours always jittered, no blur; also those of InstDisc (NPID).

    He et al. 2020, section 3.3; moco `main_moco.py` without `--aug-plus`.
    """
    ops = (
        RandomResizedCrop(pixels, (0.2, 1.0), interpolation="bilinear"),
        Grayscale(0.2),
        ColorJitter(0.4, 0.4, 0.4, 0.4),
        Flip(0.5),
    )
    return Augmentation("moco_v1", (View("view", ops, count=2),))


def moco_v2(pixels: int = 224, *, blur: bool = True) -> Augmentation:
    """MoCo v2's two views, which SimSiam and PCL v2 take over.

    Chen et al. 2020, section 3; moco `main_moco.py` with `--aug-plus`.
    """
    ops = (
        RandomResizedCrop(pixels, (0.2, 1.0), interpolation="bilinear"),
        ColorJitter(0.4, 0.4, 0.4, 0.1, probability=0.8),
        Grayscale(0.2),
        *((GaussianBlur(0.5, (0.1, 2.0)),) if blur else ()),
        Flip(0.5),
    )
    deviations = (PILLOW_BLUR if blur else NO_BLUR,)
    return Augmentation("moco_v2", (View("view", ops, count=2),), deviations=deviations)


def moco_v3(pixels: int = 224, *, crop_min: float = 0.08, blur: bool = True) -> Augmentation:
    """MoCo v3's two views, unlike in blur and solarization: BYOL's by torchvision.

    Chen et al. 2021, appendix A; moco-v3 `main_moco.py`. `crop_min` is the least area of a crop:
    0.08 for vision transformers, 0.2 in the code's ResNet-50 runs.
    """

    def ops(blur_probability: float, *last: ViewOp) -> tuple[ViewOp, ...]:
        return (
            RandomResizedCrop(pixels, (crop_min, 1.0), interpolation="bilinear"),
            ColorJitter(0.4, 0.4, 0.2, 0.1, probability=0.8),
            Grayscale(0.2),
            *((GaussianBlur(blur_probability, (0.1, 2.0)),) if blur else ()),
            *last,
            Flip(0.5),
        )

    views = (View("view_1", ops(1.0)), View("view_2", ops(0.1, Solarize(0.2, 128))))
    return Augmentation("moco_v3", views, deviations=(PILLOW_BLUR if blur else NO_BLUR,))


def byol(pixels: int = 224, *, blur: bool = True) -> Augmentation:
    """BYOL's two views, unlike in blur and solarization, with additive brightness.

    Grill et al. 2020, appendix B; deepmind-research `byol/utils/augmentations.py` and `dataset.py`.
    """

    def ops(blur_probability: float, *last: ViewOp) -> tuple[ViewOp, ...]:
        blur_op = GaussianBlur(blur_probability, (0.1, 2.0), _blur_kernel(pixels))
        return (
            RandomResizedCrop(pixels, (0.08, 1.0), interpolation="bicubic"),
            Flip(0.5),
            ColorJitter(0.4, 0.4, 0.2, 0.1, probability=0.8, additive_brightness=True),
            Grayscale(0.2),
            *((blur_op,) if blur else ()),
            *last,
        )

    views = (View("view_1", ops(1.0)), View("view_2", ops(0.1, Solarize(0.2, 128))))
    return Augmentation(
        "byol",
        views,
        deviations=(
            "crop draws again, ten times at most, where its box is larger than the picture; the "
            "code draws once and cuts the box down to the picture, whatever becomes of its aspect",
            "crop resizes with antialiasing; the code's tf.image.resize has none",
            *_TENSORFLOW_COLOURS,
            "blur reflects the border; the code pads it with black" if blur else NO_BLUR,
        ),
    )


def swav(
    global_pixels: int = 224,
    local_pixels: int = 96,
    local_count: int = 6,
    *,
    global_scale: tuple[float, float] = (0.14, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.14),
    blur: bool = True,
) -> Augmentation:
    """SwAV's multi-crop, which DeepCluster-v2 takes over; its colours are SimCLR's.

    Caron et al. 2020, section 3.2 and appendix A; swav `src/multicropdataset.py` and
    `scripts/swav_800ep_pretrain.sh`. The first std is 0.228, as in the code.
    """

    def ops(pixels: int, scale: tuple[float, float]) -> tuple[ViewOp, ...]:
        return (
            RandomResizedCrop(pixels, scale, interpolation="bilinear"),
            Flip(0.5),
            ColorJitter(0.8, 0.8, 0.8, 0.2, probability=0.8),
            Grayscale(0.2),
            *((GaussianBlur(0.5, (0.1, 2.0)),) if blur else ()),
        )

    views = [View("global_view", ops(global_pixels, global_scale), 2)]
    if local_count != 0:
        views.append(View("local", ops(local_pixels, local_scale), local_count))
    return Augmentation(
        "swav",
        tuple(views),
        IMAGENET_MEAN,
        (0.228, 0.224, 0.225),
        deviations=(PILLOW_BLUR if blur else NO_BLUR,),
    )


def dino_views(
    global_pixels: int,
    local_pixels: int,
    local_count: int,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    *,
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
    kernel_size: int | None = None,
    mask: Mask | None = None,
) -> tuple[View, ...]:
    """DINO's views, which iBOT and DINOv2 take over: two unlike global ones, then local ones.

    blur: its probability in the first global, the second global and the local views; 0 leaves it
    out. mask: of the global views.
    """

    def ops(
        pixels: int, scale: tuple[float, float], blur_probability: float, *last: ViewOp
    ) -> tuple[ViewOp, ...]:
        blur_op = GaussianBlur(blur_probability, (0.1, 2.0), kernel_size)
        return (
            RandomResizedCrop(pixels, scale, interpolation="bicubic"),
            Flip(0.5),
            ColorJitter(0.4, 0.4, 0.2, 0.1, probability=0.8),
            Grayscale(0.2),
            *((blur_op,) if blur_probability > 0 else ()),
            *last,
        )

    second = ops(global_pixels, global_scale, blur[1], Solarize(0.2, 128))
    views = [
        View("global_1", ops(global_pixels, global_scale, blur[0]), mask=mask),
        View("global_2", second, mask=mask),
    ]
    if local_count != 0:
        views.append(View("local", ops(local_pixels, local_scale, blur[2]), local_count))
    return tuple(views)


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
    views = dino_views(
        global_pixels,
        local_pixels,
        local_count,
        global_scale,
        local_scale,
        blur=(1.0, 0.1, 0.5) if blur else (0.0, 0.0, 0.0),
    )
    return Augmentation("dino", views, deviations=(PILLOW_BLUR if blur else NO_BLUR,))


def dino_resnet(
    global_pixels: int = 224, local_pixels: int = 96, local_count: int = 8
) -> Augmentation:
    """DINO's multi-crop for a ResNet-50: SwAV's scales.

    dino `README.md`, "ResNet-50 and other convnets trainings".
    """
    views = dino_views(global_pixels, local_pixels, local_count, (0.14, 1.0), (0.05, 0.14))
    return Augmentation("dino_resnet", views, deviations=(PILLOW_BLUR,))
