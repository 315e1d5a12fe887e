"""The named recipes against tables of the published values, written down independently."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageFilter

from headrace.pipelines import recipes
from headrace.pipelines.declaration import WORDS, augmentation_from
from headrace.pipelines.engines.reference import gaussian_blur
from headrace.pipelines.masks import BlockMask, MultiBlockMask, RandomMask
from headrace.pipelines.ops import (
    RAND_AUGMENT_OPERATIONS,
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    OneOf,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    RecipeError,
    Resize,
    Solarize,
    ViewOp,
)
from headrace.pipelines.recipe import Augmentation, Draw, Integers, Mix, RandomErasing

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SWAV = ((0.485, 0.456, 0.406), (0.228, 0.224, 0.225))
RAW = ((0, 0, 0), (1, 1, 1))
SIGNED = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

Line = tuple[object, ...]
Table = dict[str, tuple[int, list[Line]]]


def line(op: ViewOp) -> Line:
    """An op as a table has it. What it leaves out it asserts to be the usual."""
    match op:
        case RandomResizedCrop(size, scale, ratio, interpolation):
            usual = ratio == (3 / 4, 4 / 3)
            return ("crop", size, scale, interpolation, *(() if usual else (ratio,)))
        case Resize(size, interpolation):
            return ("resize", size, interpolation)
        case CenterCrop(size):
            return ("center", size)
        case RandomCrop(size, padding):
            return ("cut", size, padding)
        case Flip(probability):
            return ("flip", probability)
        case ColorJitter(b, c, s, h, probability, additive):
            strengths = tuple(round(x, 6) for x in (b, c, s, h))
            return ("jitter", strengths, probability, *(("additive",) if additive else ()))
        case Grayscale(probability):
            return ("gray", probability)
        case GaussianBlur(probability, sigma, kernel, scope):
            assert sigma == (0.1, 2.0)
            return ("blur", probability, kernel, *(("group",) if scope == "group" else ()))
        case Solarize(probability, threshold):
            assert threshold == 128
            return ("solarize", probability)
        case RandAugment(magnitude, deviation, count, probability, interpolation):
            assert op.operations == RAND_AUGMENT_OPERATIONS
            assert (op.fill, op.translate_fraction) == ((124, 116, 104), 0.45)
            return ("randaugment", magnitude, deviation, count, probability, interpolation)
        case OneOf(ops):
            return ("one of", *(line(inner) for inner in ops))


def table(augmentation: Augmentation) -> Table:
    return {view.name: (view.count, [line(op) for op in view.ops]) for view in augmentation.views}


FLIP: Line = ("flip", 0.5)
GRAY: Line = ("gray", 0.2)


def blur(probability: float, kernel: int | None = None) -> Line:
    return ("blur", probability, kernel)


def jitter(*strengths: float, probability: float = 0.8) -> Line:
    return ("jitter", strengths, probability)


def dino_column(size: int, scale: tuple[float, float], *last: Line) -> list[Line]:
    return [("crop", size, scale, "bicubic"), FLIP, jitter(0.4, 0.4, 0.2, 0.1), GRAY, *last]


def dino_table(
    global_scale: tuple[float, float], local_scale: tuple[float, float], local_count: int
) -> Table:
    return {
        "global_1": (1, dino_column(224, global_scale, blur(1.0))),
        "global_2": (1, dino_column(224, global_scale, blur(0.1), ("solarize", 0.2))),
        "local": (local_count, dino_column(96, local_scale, blur(0.5))),
    }


def moco_v3_column(least: float, *last: Line) -> list[Line]:
    colours = [jitter(0.4, 0.4, 0.2, 0.1), GRAY]
    return [("crop", 224, (least, 1.0), "bilinear"), *colours, *last, FLIP]


def byol_column(*last: Line) -> list[Line]:
    colours = [("jitter", (0.4, 0.4, 0.2, 0.1), 0.8, "additive"), GRAY]
    return [("crop", 224, (0.08, 1.0), "bicubic"), FLIP, *colours, *last]


def swav_column(size: int, scale: tuple[float, float]) -> list[Line]:
    return [
        ("crop", size, scale, "bilinear"), FLIP, jitter(0.8, 0.8, 0.8, 0.2), GRAY, blur(0.5),
    ]  # fmt: skip


THREE = ("one of", ("gray", 1.0), ("solarize", 1.0), blur(1.0))

TABLES: dict[str, tuple[Table, tuple[object, object]]] = {
    "simclr": (
        {
            "view": (
                2,
                [
                    ("crop", 224, (0.08, 1.0), "bicubic"),
                    FLIP,
                    jitter(0.8, 0.8, 0.8, 0.2),
                    GRAY,
                    blur(0.5, 23),
                ],
            )
        },
        RAW,
    ),
    "moco_v1": (
        {
            "view": (
                2,
                [
                    ("crop", 224, (0.2, 1.0), "bilinear"),
                    GRAY,
                    jitter(0.4, 0.4, 0.4, 0.4, probability=1.0),
                    FLIP,
                ],
            )
        },
        IMAGENET,
    ),
    "moco_v2": (
        {
            "view": (
                2,
                [
                    ("crop", 224, (0.2, 1.0), "bilinear"),
                    jitter(0.4, 0.4, 0.4, 0.1),
                    GRAY,
                    blur(0.5),
                    FLIP,
                ],
            )
        },
        IMAGENET,
    ),
    "moco_v3": (
        {
            "view_1": (1, moco_v3_column(0.08, blur(1.0))),
            "view_2": (1, moco_v3_column(0.08, blur(0.1), ("solarize", 0.2))),
        },
        IMAGENET,
    ),
    "byol": (
        {
            "view_1": (1, byol_column(blur(1.0, 23))),
            "view_2": (1, byol_column(blur(0.1, 23), ("solarize", 0.2))),
        },
        IMAGENET,
    ),
    "swav": (
        {
            "global_view": (2, swav_column(224, (0.14, 1.0))),
            "local": (6, swav_column(96, (0.05, 0.14))),
        },
        SWAV,
    ),
    "dino": (dino_table((0.4, 1.0), (0.05, 0.4), 8), IMAGENET),
    "dino_resnet": (dino_table((0.14, 1.0), (0.05, 0.14), 8), IMAGENET),
    "mae": ({"view": (1, [("crop", 224, (0.2, 1.0), "bicubic"), FLIP])}, IMAGENET),
    "spark": ({"view": (1, [("crop", 224, (0.67, 1.0), "bicubic"), FLIP])}, IMAGENET),
    "ibot": (dino_table((0.25, 1.0), (0.05, 0.25), 10), IMAGENET),
    "dinov2": (
        {
            "global_1": (1, dino_column(224, (0.32, 1.0))),
            "global_2": (1, dino_column(224, (0.32, 1.0), blur(0.9, 9), ("solarize", 0.2))),
            "local": (8, dino_column(96, (0.05, 0.32), blur(0.5, 9))),
        },
        IMAGENET,
    ),
    "ijepa": ({"view": (1, [("crop", 224, (0.3, 1.0), "bilinear")])}, IMAGENET),
    "supervised": ({"view": (1, [("crop", 224, (0.08, 1.0), "bilinear"), FLIP])}, IMAGENET),
    "deit": (
        {
            "view": (
                1,
                [
                    ("crop", 224, (0.08, 1.0), "bicubic"),
                    FLIP,
                    ("randaugment", 9, 0.5, 2, 0.5, "bicubic"),
                ],
            )
        },
        IMAGENET,
    ),
    "deit3": (
        {
            "view": (
                1,
                [
                    ("crop", 224, (0.08, 1.0), "bicubic"),
                    FLIP,
                    THREE,
                    jitter(0.3, 0.3, 0.3, 0, probability=1.0),
                ],
            )
        },
        IMAGENET,
    ),
    "center": ({"view": (1, [("resize", 256, "bicubic"), ("center", 224)])}, IMAGENET),
    "rotation": ({"view": (1, [("crop", 224, (0.08, 1.0), "bilinear"), FLIP])}, IMAGENET),
    "jigsaw": (
        {"view": (1, [("resize", 256, "bilinear"), ("cut", 255, 0), FLIP, ("gray", 0.66)])},
        IMAGENET,
    ),
    "relative": (
        {"view": (1, [("resize", 292, "bilinear"), ("cut", 255, 0), ("gray", 0.66)])},
        IMAGENET,
    ),
    "colorization": ({"view": (1, [("resize", 256, "bilinear"), ("cut", 176, 0), FLIP])}, RAW),
    "context_encoder": (
        {"view": (1, [("resize", 350, "bilinear"), ("cut", 128, 0), FLIP])},
        SIGNED,
    ),
    "cpc": (
        {
            "view": (
                1,
                [
                    ("crop", 128, (0.3, 1.0), "bicubic", (0.7, 1.4)),
                    FLIP,
                    jitter(0.4, 0.4, 0.4, 0.1),
                    ("gray", 0.25),
                ],
            )
        },
        IMAGENET,
    ),
}

# What their own code does otherwise, by a word that the list of deviations must have.
DEVIATIONS = {
    "simclr": ("attempts", "antialiasing", "each channel", "HSV", "8 bits", "sigma", "border"),
    "moco_v1": (),
    "moco_v2": ("Pillow",),
    "moco_v3": ("Pillow",),
    "byol": ("code draws once", "antialiasing", "each channel", "HSV", "8 bits", "border"),
    "swav": ("Pillow",),
    "dino": ("Pillow",),
    "dino_resnet": ("Pillow",),
    "mae": (),
    "spark": (),
    "ibot": ("Pillow",),
    "dinov2": ("probabilities that the code applies", "exactly half"),
    "ijepa": ("64 samples",),
    "supervised": (),
    "deit": ("64 consecutive", "4.33", "repeated augmentation"),
    "deit3": ("Pillow", "64 consecutive", "repeated augmentation"),
    "center": (),
    "rotation": ("all four", "log-uniformly"),
    "jigsaw": ("225 pixels", "1000"),
    "relative": ("gaps of 48", "all eight"),
    "colorization": ("resized when its database was made",),
    "context_encoder": ("antialiasing", "8 bits"),
    "cpc": ("64 pixels",),
}


def test_the_tables_are_complete() -> None:
    assert list(recipes.NAMED) == list(TABLES)
    assert recipes.NAMED.keys() == DEVIATIONS.keys()
    for name in recipes.NAMED:
        assert getattr(recipes, name)() == recipes.named(name)


@pytest.mark.parametrize("name", TABLES)
def test_every_recipe_is_the_published_table(name: str) -> None:
    augmentation = recipes.named(name)
    expected, normalisation = TABLES[name]
    assert augmentation.name == name
    assert table(augmentation) == expected
    assert (augmentation.mean, augmentation.std) == normalisation


@pytest.mark.parametrize("name", DEVIATIONS)
def test_every_recipe_lists_its_deviations(name: str) -> None:
    deviations = recipes.named(name).deviations
    for words in DEVIATIONS[name]:
        assert any(words in deviation for deviation in deviations), words
    # None that the table above does not know.
    for deviation in deviations:
        assert any(words in deviation for words in DEVIATIONS[name]), deviation


def test_masks_erasing_mixing_and_draws_are_the_published_ones() -> None:
    """All of them: what is not named here has none."""
    block = {"ibot": 16, "dinov2": 4}
    draws = {
        "rotation": (Draw("rotation", Integers(4)),),
        "jigsaw": (Draw("permutation", Integers(1000)), Draw("offset", Integers(21), (9, 2))),
        "relative": (Draw("position", Integers(8)), Draw("offset", Integers(22), (9, 2))),
    }
    for name in recipes.NAMED:
        augmentation = recipes.named(name)
        masks = [view.mask for view in augmentation.views]
        match name:
            case "mae":
                assert masks == [RandomMask(16, 0.75)]
            case "spark":
                (mask,) = masks
                assert isinstance(mask, RandomMask)
                assert (mask.patch_pixels, round(mask.ratio, 2)) == (32, 0.59)
            case "ibot" | "dinov2":
                wanted = BlockMask(16, (0.1, 0.5), block[name], (0.3, 1 / 0.3), 0.5)
                assert masks == [wanted, wanted, None]
            case "ijepa":
                assert masks == [MultiBlockMask(14, (0.85, 1.0), (0.15, 0.2), (0.75, 1.5), 4, 10)]
            case _:
                assert set(masks) == {None}
        erased = RandomErasing(0.25, (0.02, 1 / 3), (0.3, 1 / 0.3), "pixel", (1, 1))
        assert [view.erase for view in augmentation.views if view.erase] == (
            [erased] if name == "deit" else []
        )
        mixed = name in ("deit", "deit3")
        assert augmentation.mix == (Mix(0.8, 1.0, 1.0, 0.5, "group") if mixed else None)
        assert augmentation.group == (64 if mixed or name == "ijepa" else 1)
        assert augmentation.draws == draws.get(name, ())


@pytest.mark.parametrize(
    ("pixels", "patch", "ratio", "kept"),
    [(224, 32, 0.6, 20), (192, 32, 0.6, 14), (32, 4, 0.75, 16), (64, 8, 0.5, 32)],
)
def test_spark_keeps_what_its_code_keeps(pixels: int, patch: int, ratio: float, kept: int) -> None:
    """round(N * (1 - ratio)), where the mask itself rounds down."""
    mask = recipes.spark(pixels, patch_pixels=patch, ratio=ratio).views[0].mask
    assert isinstance(mask, RandomMask)
    assert int((pixels // patch) ** 2 * (1 - mask.ratio)) == kept


def test_dino_scales_down_to_cifar() -> None:
    augmentation = recipes.dino(32, 16, 4, local_scale=(0.1, 0.4), blur=False)
    assert [view.size for view in augmentation.flat_views] == [32, 32, 16, 16, 16, 16]
    assert augmentation.views[2].ops[0] == RandomResizedCrop(16, (0.1, 0.4))
    assert not any(isinstance(op, GaussianBlur) for view in augmentation.views for op in view.ops)
    assert augmentation.deviations == ("no blur",)
    assert [view.name for view in recipes.dino(local_count=0).views] == ["global_1", "global_2"]
    assert [view.name for view in recipes.swav(local_count=0).views] == ["global_view"]


def test_simclr_for_cifar() -> None:
    augmentation = recipes.simclr(32, strength=0.5, blur=False)
    assert table(augmentation)["view"][1] == [
        ("crop", 32, (0.08, 1.0), "bicubic"),
        ("flip", 0.5),
        ("jitter", (0.4, 0.4, 0.4, 0.1), 0.8),
        ("gray", 0.2),
    ]
    assert not any("sigma" in deviation for deviation in augmentation.deviations)


def test_simclr_as_its_first_version_and_with_a_shared_sigma() -> None:
    augmentation = recipes.simclr(blur_group=32, additive_brightness=True)
    lines = table(augmentation)["view"][1]
    assert lines[2] == ("jitter", (0.8, 0.8, 0.8, 0.2), 0.8, "additive")
    assert lines[4] == ("blur", 0.5, 23, "group")
    assert augmentation.group == 32
    assert any("group of 32 samples" in deviation for deviation in augmentation.deviations)


@pytest.mark.parametrize("recipe", [recipes.simclr, recipes.byol])
@pytest.mark.parametrize("pixels", range(20, 260, 12))
def test_kernel_is_odd_and_a_tenth_of_the_height(
    recipe: Callable[[int], Augmentation], pixels: int
) -> None:
    (blur_op,) = (op for op in recipe(pixels).views[0].ops if isinstance(op, GaussianBlur))
    # SimCLR's radius is int(height // 10 / 2), BYOL's int(height / 10 / 2).
    assert blur_op.kernel_size == 2 * int(pixels // 10 / 2) + 1
    assert blur_op.kernel_size == 2 * math.floor(pixels / 10 / 2) + 1


def test_smaller_and_other_numbers_can_be_passed() -> None:
    assert recipes.mae(32, patch_pixels=4, ratio=0.5).views[0].mask == RandomMask(4, 0.5)
    with pytest.raises(RecipeError, match="patch_pixels 16"):
        recipes.mae(100)
    other = recipes.supervised(32, scale=(0.5, 1.0), interpolation="bicubic")
    assert other.views[0].ops[0] == RandomResizedCrop(32, (0.5, 1.0), interpolation="bicubic")
    padded = table(recipes.supervised(32, padding_pixels=4))["view"][1]
    assert padded == [("cut", 32, 4), FLIP]
    assert table(recipes.moco_v3(crop_min=0.2))["view_1"][1] == moco_v3_column(0.2, blur(1.0))
    plain = recipes.center(32, 32, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    assert table(plain) == {"view": (1, [("resize", 32, "bilinear"), ("center", 32)])}
    assert plain.std == (1, 1, 1)
    with pytest.raises(RecipeError, match="resize_pixels is 32"):
        recipes.center(64, 32)
    mask = recipes.dinov2(local_pixels=98, patch_pixels=14).views[0].mask
    assert isinstance(mask, BlockMask)
    assert mask.patch_pixels == 14
    assert recipes.ijepa(32, patch_pixels=4, group=4).group == 4


def test_deit_and_deit3_in_parts() -> None:
    plain = recipes.deit(32, randaugment=None, erasing_probability=0, mix=None)
    assert table(plain)["view"][1] == [("crop", 32, (0.08, 1.0), "bicubic"), FLIP]
    assert (plain.views[0].erase, plain.mix, plain.group) == (None, None, 1)
    assert not any("Mixup" in deviation for deviation in plain.deviations)
    simple = recipes.deit3(simple_crop=True, group=8)
    assert table(simple)["view"][1][:2] == [("resize", 224, "bicubic"), ("cut", 224, 4)]
    assert any("reflects" in deviation for deviation in simple.deviations)
    assert any("8 consecutive" in deviation for deviation in simple.deviations)
    with pytest.raises(RecipeError, match="group is 7"):
        recipes.deit(group=7)


def test_a_recipe_by_its_name() -> None:
    assert recipes.named("moco_v3") == recipes.moco_v3()
    with pytest.raises(RecipeError, match="did you mean dino_resnet"):
        recipes.named("dino-resnet")
    with pytest.raises(RecipeError, match="there are simclr, moco_v1"):
        recipes.named("zzz")


def test_pillows_blur_is_as_far_away_as_the_deviation_says() -> None:
    """Another photograph than the numbers were measured on: about as far, and worst about there."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(path) as photograph:
        picture = photograph.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)

    def levels(sigma: float) -> float:
        true = gaussian_blur(picture, sigma, 2 * math.ceil(3 * sigma) + 1)
        boxes = picture.filter(ImageFilter.GaussianBlur(sigma))
        return float(np.abs(np.asarray(true, np.int16) - np.asarray(boxes, np.int16)).mean())

    by_sigma = {sigma / 10: levels(sigma / 10) for sigma in range(1, 21)}
    assert "0.3 levels away on average" in recipes.moco_v2().deviations[0]
    assert 0.2 < np.mean(list(by_sigma.values())) < 0.5
    assert "0.7 at the worst of them (0.7)" in recipes.moco_v2().deviations[0]
    assert 0.4 < max(by_sigma.values()) < 1
    assert 0.3 <= max(by_sigma, key=by_sigma.__getitem__) <= 1


@pytest.mark.parametrize("name", recipes.NAMED)
def test_every_recipe_has_a_stable_json_declaration(name: str) -> None:
    augmentation = recipes.named(name)
    declared = json.dumps(augmentation.declaration(), sort_keys=True)
    assert json.dumps(json.loads(declared), sort_keys=True) == declared
    assert declared == json.dumps(recipes.named(name).declaration(), sort_keys=True)
    assert json.loads(declared)["name"] == name
    assert "deviations" not in json.loads(declared)


@pytest.mark.parametrize("name", recipes.NAMED)
def test_every_recipe_is_read_back_from_its_declaration(name: str) -> None:
    recipe = recipes.named(name)
    declared = json.loads(json.dumps(recipe.declaration()))
    assert augmentation_from(declared) == replace(recipe, deviations=())


def test_all_recipes_differ_in_more_than_their_names() -> None:
    declared = {name: recipes.named(name).declaration() | {"name": ""} for name in recipes.NAMED}
    assert len({json.dumps(value, sort_keys=True) for value in declared.values()}) == len(declared)
    assert len({recipes.named(name) for name in recipes.NAMED}) == len(recipes.NAMED)


@pytest.mark.parametrize("name", recipes.NAMED)
def test_every_recipe_can_be_printed(name: str) -> None:
    """A Python expression that gives the recipe back: what a person reads and can type again."""
    augmentation = recipes.named(name)
    assert eval(repr(augmentation), dict(WORDS)) == augmentation


@pytest.mark.parametrize("name", recipes.NAMED)
def test_every_recipe_says_where_it_comes_from(name: str) -> None:
    """A first sentence that a table can show, then a source."""
    documentation = recipes.NAMED[name].__doc__ or ""
    first, _, rest = documentation.partition("\n\n")
    assert first.endswith(".")
    assert len(first) <= 100
    assert rest.strip()


def test_every_view_names_one_picture_size() -> None:
    sizes: dict[str, list[int]] = {
        name: [view.shape[0] for view in recipes.named(name).flat_views] for name in recipes.NAMED
    }
    assert sizes["dino"] == [224] * 2 + [96] * 8
    assert sizes["swav"] == [224] * 2 + [96] * 6
    assert sizes["ibot"] == [224] * 2 + [96] * 10
    assert [name for name, found in sizes.items() if len(found) == 2] == [
        "simclr", "moco_v1", "moco_v2", "moco_v3", "byol",
    ]  # fmt: skip
