"""Recipes of pretext tasks: the view that a task starts from, and the numbers that it asks for.

What such a method does to pixels is exact and its own (turning by 90 degrees, cutting tiles,
hiding a hole, dropping colours), so it stands in its recipe's docstring and happens in the method,
on the finished view; which turn, tile or place it takes is drawn here, as a `Draw`. See `recipes`.
"""

from headrace.pipelines.ops import (
    ColorJitter,
    Flip,
    Grayscale,
    RandomCrop,
    RandomResizedCrop,
    Resize,
)
from headrace.pipelines.recipe import Augmentation, Draw, Integers, View

# Places of the 3 x 3 tiles that jigsaw and relative patches cut, row by row.
_TILES = 9


def rotation(pixels: int = 224) -> Augmentation:
    """Which way up: a crop and a flip, then one of four turns.

    Gidaris et al. 2018, section 3; FeatureLearningRotNet `dataloader.py`. The method turns the view
    `draws["rotation"]` times by 90 degrees counter-clockwise, by transposing and mirroring, which
    changes no value, and predicts the number.
    """
    ops = (RandomResizedCrop(pixels, (0.08, 1.0), interpolation="bilinear"), Flip(0.5))
    return Augmentation(
        "rotation",
        (View("view", ops),),
        draws=(Draw("rotation", Integers(4)),),
        deviations=(
            "one turn per picture and step, as VISSL has it; in the code's batch each picture has "
            "all four (a method may make them and leave the draw)",
            "crop draws its aspect ratio log-uniformly; torchvision of that time uniformly",
        ),
    )


def jigsaw(
    pixels: int = 255,
    resize_pixels: int = 256,
    *,
    jitter_pixels: int = 21,
    permutations: int = 1000,
    grayscale_probability: float = 0.66,
) -> Augmentation:
    """Nine shuffled tiles: VISSL's version, which fits a ResNet-50.

    Noroozi and Favaro 2016; vissl `configs/config/pretrain/jigsaw/jigsaw_8gpu_resnet.yaml`,
    `img_patches_tensor.py` and `shuffle_img_patches.py`. The method cuts the view into 3 x 3 cells
    of pixels // 3 and from cell t, row by row, the tile of pixels // 3 - jitter_pixels whose top
    and left corner in the cell are `draws["offset"][:, t]`; it puts them in the order of the
    permutation `draws["permutation"]` of its fixed list, and predicts that number.
    """
    ops = (
        Resize(resize_pixels, "bilinear"),
        RandomCrop(pixels),
        Flip(0.5),
        Grayscale(grayscale_probability),
    )
    return Augmentation(
        "jigsaw",
        (View("view", ops),),
        draws=(
            Draw("permutation", Integers(permutations)),
            Draw("offset", Integers(jitter_pixels), (_TILES, 2)),
        ),
        deviations=(
            "view, tiles and grey are VISSL's; the paper crops 225 pixels, cuts 64 of 75 and shows "
            "fewer grey pictures",
            f"{permutations} permutations; VISSL's configuration has 2000 and the paper 1000",
        ),
    )


def relative(
    pixels: int = 255,
    resize_pixels: int = 292,
    *,
    jitter_pixels: int = 21,
    grayscale_probability: float = 0.66,
) -> Augmentation:
    """Where a tile lies beside the central one: MMSelfSup's version, which fits a ResNet-50.

    Doersch et al. 2015; mmselfsup `configs/selfsup/_base_/datasets/imagenet_relative-loc.py` and
    `RandomPatchWithLabels`. Tiles as `jigsaw`'s. The method pairs tile 4, the central one, with
    neighbour `draws["position"]` of the other eight, row by row, and predicts that number.
    """
    ops = (
        Resize(resize_pixels, "bilinear"),
        RandomCrop(pixels),
        Grayscale(grayscale_probability),
    )
    return Augmentation(
        "relative",
        (View("view", ops),),
        draws=(
            Draw("position", Integers(8)),
            Draw("offset", Integers(jitter_pixels + 1), (_TILES, 2)),
        ),
        deviations=(
            "view and tiles are MMSelfSup's; the paper's are patches of 96 pixels with gaps of 48 "
            "from pictures of 150,000 to 450,000 pixels, two of three colours replaced by noise",
            "one pair per picture and step; MMSelfSup takes all eight (a method may make them from "
            "the same offsets and leave the position)",
        ),
    )


def colorization(pixels: int = 176, resize_pixels: int = 256) -> Augmentation:
    """Colours from lightness: a crop and a flip, and pixels in [0, 1] that become Lab.

    Zhang et al. 2016; colorization `models/colorization_train_val_v2.prototxt`. The method converts
    sRGB to Lab (linear light first), gives the network L and takes ab at every fourth pixel.
    """
    ops = (Resize(resize_pixels, "bilinear"), RandomCrop(pixels), Flip(0.5))
    return Augmentation(
        "colorization",
        (View("view", ops),),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        deviations=(
            "the shorter side is resized to 256 pixels; the code reads pictures that were resized "
            "when its database was made, and does not say how",
        ),
    )


def context_encoder(pixels: int = 128, resize_pixels: int = 350) -> Augmentation:
    """What was in the hole: a small crop of a large picture, in [-1, 1].

    Pathak et al. 2016; context-encoder `train.lua` and `data/donkey_folder.lua`. The method fills
    the central square of half the side, but for a border of 4 pixels inside of it
    (`overlapPred=4`), with the colour (117, 104, 123) / 255, and predicts the whole square.
    """
    ops = (Resize(resize_pixels, "bilinear"), RandomCrop(pixels), Flip(0.5))
    return Augmentation(
        "context_encoder",
        (View("view", ops),),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        deviations=(
            "pictures are resized with antialiasing; the code's image.scale has none",
            "pixels are rounded to 8 bits after resizing; the code stays in floating point",
        ),
    )


def cpc(pixels: int = 128) -> Augmentation:
    """What is cut into overlapping patches: Lightning Bolts' version for ImageNet.

    van den Oord et al. 2018; lightning-bolts `cpc/transforms.py`, `CPCTrainTransformsImageNet128`.
    """
    ops = (
        RandomResizedCrop(pixels, (0.3, 1.0), (0.7, 1.4), "bicubic"),
        Flip(0.5),
        ColorJitter(0.4, 0.4, 0.4, 0.1, probability=0.8),
        Grayscale(0.25),
    )
    return Augmentation(
        "cpc",
        (View("view", ops),),
        deviations=(
            "crops of 128 pixels and their colours are Lightning Bolts'; the paper cuts patches of "
            "64 pixels from grey crops of 256, v2 alters each patch by itself, and no code of "
            "their authors is published",
        ),
    )
