"""Recipes of masked image modelling and of self-distillation with masks; see `recipes`."""

from headrace.pipelines.masks import BlockMask, MultiBlockMask, RandomMask
from headrace.pipelines.ops import Flip, RandomResizedCrop
from headrace.pipelines.recipe import Augmentation, View
from headrace.pipelines.recipes.contrastive import NO_BLUR, PILLOW_BLUR, dino_views


def mae(pixels: int = 224, *, patch_pixels: int = 16, ratio: float = 0.75) -> Augmentation:
    """MAE's one view, hardly augmented, and its random mask.

    He et al. 2021, appendix A.1; mae `main_pretrain.py` and `models_mae.py`, `random_masking`.
    """
    ops = (RandomResizedCrop(pixels, (0.2, 1.0), interpolation="bicubic"), Flip(0.5))
    return Augmentation("mae", (View("view", ops, mask=RandomMask(patch_pixels, ratio)),))


def spark(pixels: int = 224, *, patch_pixels: int = 32, ratio: float = 0.6) -> Augmentation:
    """SparK's one view and its random mask, one cell per pixel of the last feature map.

    Tian et al. 2023, section 4; SparK `pretrain/utils/imagenet.py` and `spark.py`, `mask`. Of N
    cells round(N * (1 - ratio)) are kept, 20 of 49: the mask's own ratio is the one that gives
    this number when rounded down.
    """
    ops = (RandomResizedCrop(pixels, (0.67, 1.0), interpolation="bicubic"), Flip(0.5))
    cells = (pixels // patch_pixels) ** 2
    kept = round(cells * (1 - ratio))
    mask = RandomMask(patch_pixels, 1 - (kept + 1e-6) / cells)
    return Augmentation("spark", (View("view", ops, mask=mask),))


def ibot(
    global_pixels: int = 224,
    local_pixels: int = 96,
    local_count: int = 10,
    *,
    global_scale: tuple[float, float] = (0.25, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.25),
    patch_pixels: int = 16,
    blur: bool = True,
) -> Augmentation:
    """iBOT's multi-crop: DINO's, with block-wise masks on half of the global views.

    Zhou et al. 2022, section 4.1 and appendix; ibot `main_ibot.py`, `loader.py` and the README's
    ViT-S/16 and ViT-B/16 runs, `--pred_ratio 0 0.3 --pred_ratio_var 0 0.2`.
    """
    side = global_pixels // patch_pixels
    mask = BlockMask(patch_pixels, (0.1, 0.5), min_patches=max(1, side // 3) ** 2, probability=0.5)
    views = dino_views(
        global_pixels,
        local_pixels,
        local_count,
        global_scale,
        local_scale,
        blur=(1.0, 0.1, 0.5) if blur else (0.0, 0.0, 0.0),
        mask=mask,
    )
    return Augmentation("ibot", views, deviations=(PILLOW_BLUR if blur else NO_BLUR,))


def dinov2(
    global_pixels: int = 224,
    local_pixels: int = 96,
    local_count: int = 8,
    *,
    global_scale: tuple[float, float] = (0.32, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.32),
    patch_pixels: int = 16,
    blur: bool = True,
) -> Augmentation:
    """DINOv2's multi-crop: DINO's with other scales, less blur and iBOT's masks.

    Oquab et al. 2023, appendix B; dinov2 `data/augmentations.py`, `data/masking.py` and
    `configs/ssl_default_config.yaml`. Blur has the probabilities 0, 0.9 and 0.5 of the first
    global, the second global and the local views: the code says 1.0, 0.1 and 0.5, but its
    `GaussianBlur` applies with 1 - p. With patches of 14 pixels local views have 98.
    """
    mask = BlockMask(patch_pixels, (0.1, 0.5), min_patches=4, probability=0.5)
    views = dino_views(
        global_pixels,
        local_pixels,
        local_count,
        global_scale,
        local_scale,
        blur=(0.0, 0.9, 0.5) if blur else (0.0, 0.0, 0.0),
        kernel_size=9,
        mask=mask,
    )
    return Augmentation(
        "dinov2",
        views,
        deviations=(
            "blur has the probabilities that the code applies, not those that it writes"
            if blur
            else NO_BLUR,
            "each view is masked with probability 0.5 and has a ratio of its own; the code masks "
            "exactly half of a batch's views and spreads their ratios evenly",
        ),
    )


def ijepa(pixels: int = 224, *, patch_pixels: int = 14, group: int = 64) -> Augmentation:
    """I-JEPA's one view, only cropped, with a context block and four target blocks.

    Assran et al. 2023, section 3 and appendix A; ijepa `configs/in1k_vith14_ep300.yaml`,
    `transforms.py` and `masks/multiblock.py`. The samples of a group share their blocks' sizes.
    """
    ops = (RandomResizedCrop(pixels, (0.3, 1.0), interpolation="bilinear"),)
    return Augmentation(
        "ijepa",
        (View("view", ops, mask=MultiBlockMask(patch_pixels)),),
        group=group,
        deviations=(
            f"block sizes are shared by {group} samples; in the code by a GPU's batch, 128 of them",
        ),
    )
