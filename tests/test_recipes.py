"""The named recipes against tables of the published values, written down independently."""

import json

import pytest

from pipelines import recipes
from pipelines.recipe import (
    Augmentation,
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    RandomMask,
    RandomResizedCrop,
    RecipeError,
    Resize,
    Solarize,
    View,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def row(view: View) -> list[tuple[object, ...]]:
    """A view as a table's column: one line per op, in the order of execution."""
    lines: list[tuple[object, ...]] = []
    for op in view.ops:
        match op:
            case RandomResizedCrop(size, scale, ratio, interpolation):
                assert ratio == (3 / 4, 4 / 3)
                lines.append(("crop", size, scale, interpolation))
            case Resize(size, interpolation):
                lines.append(("resize", size, interpolation))
            case CenterCrop(size):
                lines.append(("center", size))
            case Flip(probability):
                lines.append(("flip", probability))
            case ColorJitter(b, c, s, h, probability):
                lines.append(("jitter", tuple(round(x, 6) for x in (b, c, s, h)), probability))
            case Grayscale(probability):
                lines.append(("gray", probability))
            case GaussianBlur(probability, sigma, kernel):
                lines.append(("blur", probability, sigma, kernel))
            case Solarize(probability, threshold):
                lines.append(("solarize", probability, threshold))
    return lines


def table(augmentation: Augmentation) -> dict[str, tuple[int, list[tuple[object, ...]]]]:
    return {view.name: (view.count, row(view)) for view in augmentation.views}


def dino_column(size: int, scale: tuple[float, float], blur: float) -> list[tuple[object, ...]]:
    return [
        ("crop", size, scale, "bicubic"),
        ("flip", 0.5),
        ("jitter", (0.4, 0.4, 0.2, 0.1), 0.8),
        ("gray", 0.2),
        ("blur", blur, (0.1, 2.0), None),
    ]


def test_dino_is_the_published_table() -> None:
    augmentation = recipes.dino()
    assert table(augmentation) == {
        "global_1": (1, dino_column(224, (0.4, 1.0), 1.0)),
        "global_2": (1, [*dino_column(224, (0.4, 1.0), 0.1), ("solarize", 0.2, 128)]),
        "local": (8, dino_column(96, (0.05, 0.4), 0.5)),
    }
    assert (augmentation.mean, augmentation.std) == IMAGENET
    assert [view.size for view in augmentation.flat_views] == [224] * 2 + [96] * 8
    assert any("Gaussian" in deviation for deviation in augmentation.deviations)


def test_dino_scales_down_to_cifar() -> None:
    augmentation = recipes.dino(32, 16, 4, local_scale=(0.1, 0.4), blur=False)
    assert [view.size for view in augmentation.flat_views] == [32, 32, 16, 16, 16, 16]
    assert augmentation.views[2].ops[0] == RandomResizedCrop(16, (0.1, 0.4))
    assert not any(isinstance(op, GaussianBlur) for view in augmentation.views for op in view.ops)
    assert augmentation.deviations == ("no blur",)
    assert [view.name for view in recipes.dino(local_count=0).views] == ["global_1", "global_2"]


def test_simclr_is_the_published_table() -> None:
    augmentation = recipes.simclr()
    column = [
        ("crop", 224, (0.08, 1.0), "bicubic"),
        ("flip", 0.5),
        ("jitter", (0.8, 0.8, 0.8, 0.2), 0.8),
        ("gray", 0.2),
        ("blur", 0.5, (0.1, 2.0), 23),
    ]
    assert table(augmentation) == {"view": (2, column)}
    assert (augmentation.mean, augmentation.std) == ((0, 0, 0), (1, 1, 1))
    named = " ".join(augmentation.deviations)
    for word in ("sigma", "border", "contrast", "antialiasing", "attempts", "8 bits"):
        assert word in named


def test_simclr_for_cifar() -> None:
    augmentation = recipes.simclr(32, strength=0.5, blur=False)
    assert table(augmentation)["view"][1] == [
        ("crop", 32, (0.08, 1.0), "bicubic"),
        ("flip", 0.5),
        ("jitter", (0.4, 0.4, 0.4, 0.1), 0.8),
        ("gray", 0.2),
    ]
    assert not any("sigma" in deviation for deviation in augmentation.deviations)


@pytest.mark.parametrize(("pixels", "kernel"), [(224, 23), (32, 3), (96, 9), (160, 17), (20, 3)])
def test_simclr_kernel_is_odd_and_a_tenth_of_the_height(pixels: int, kernel: int) -> None:
    blur = recipes.simclr(pixels).views[0].ops[-1]
    assert isinstance(blur, GaussianBlur)
    assert blur.kernel_size == kernel


def test_mae_is_the_published_table() -> None:
    augmentation = recipes.mae()
    assert table(augmentation) == {
        "view": (1, [("crop", 224, (0.2, 1.0), "bicubic"), ("flip", 0.5)])
    }
    assert augmentation.views[0].mask == RandomMask(16, 0.75)
    assert (augmentation.mean, augmentation.std) == IMAGENET
    assert recipes.mae(32, patch_pixels=4, ratio=0.5).views[0].mask == RandomMask(4, 0.5)
    with pytest.raises(RecipeError, match="patch_pixels 16"):
        recipes.mae(100)


def test_supervised_is_the_published_table() -> None:
    augmentation = recipes.supervised()
    assert table(augmentation) == {
        "view": (1, [("crop", 224, (0.08, 1.0), "bilinear"), ("flip", 0.5)])
    }
    assert (augmentation.mean, augmentation.std) == IMAGENET
    other = recipes.supervised(32, scale=(0.5, 1.0), interpolation="bicubic")
    assert other.views[0].ops[0] == RandomResizedCrop(32, (0.5, 1.0), interpolation="bicubic")


def test_center_is_the_usual_test_view() -> None:
    augmentation = recipes.center()
    assert table(augmentation) == {"view": (1, [("resize", 256, "bicubic"), ("center", 224)])}
    assert (augmentation.mean, augmentation.std) == IMAGENET
    plain = recipes.center(32, 32, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    assert table(plain) == {"view": (1, [("resize", 32, "bilinear"), ("center", 32)])}
    assert plain.std == (1, 1, 1)
    with pytest.raises(RecipeError, match="resize_pixels is 32"):
        recipes.center(64, 32)


@pytest.mark.parametrize(
    "augmentation",
    [recipes.dino(), recipes.simclr(), recipes.mae(), recipes.supervised(), recipes.center()],
    ids=lambda augmentation: augmentation.name,
)
def test_every_recipe_has_a_json_declaration(augmentation: Augmentation) -> None:
    declared = augmentation.declaration()
    assert json.loads(json.dumps(declared))["name"] == augmentation.name
