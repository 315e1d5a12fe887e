"""The contact sheets: that they hold the pictures as they are, and say what was done to them."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch, Erased, Mixed
from headrace.pipelines.engines.device_stage import device_stage, normalize
from headrace.pipelines.masks import BlockMask, MultiBlockMask, RandomMask
from headrace.tools import view_pictures
from headrace.training.catalogue import method_names

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"blue": (40, 60, 180), "green": (40, 160, 60), "red": (190, 50, 40)}


@pytest.fixture(scope="module")
def show_batch() -> Any:
    return import_module("headrace.tools.show_batch")


@pytest.fixture(scope="module")
def contact_sheet(show_batch: Any) -> Any:
    return import_module("headrace.tools.contact_sheet")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with 66 pictures of noise around a colour per class."""
    root = tmp_path_factory.mktemp("show") / "colours"
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / "train" / name).mkdir(parents=True)
        for number in range(22):
            pixels = generator.normal(colour, 40, size=(32, 40, 3)).clip(0, 255)
            picture = Image.fromarray(pixels.astype(np.uint8))
            picture.save(root / "train" / name / f"{number:03d}.png")
    return root


def colours_of(path: Path) -> tuple[tuple[int, int], int]:
    """((width, height), number of different colours) of a PNG."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        return picture.size, len(np.unique(pixels, axis=0))


@pytest.mark.parametrize("method", method_names())
def test_every_method(show_batch: Any, data: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "sheet.png"
    arguments = ["--method", method, "--data", str(data), "--out", str(out), "--samples", "2"]
    assert show_batch.main(arguments) == 0
    assert colours_of(out)[1] > 1000


@pytest.mark.parametrize("recipe", ["jigsaw", "spark", "ibot", "ijepa", "deit"])
def test_recipes_with_masks_mixing_and_draws(
    show_batch: Any, data: Path, tmp_path: Path, recipe: str
) -> None:
    out = tmp_path / "sheet.png"
    arguments = ["--recipe", recipe, "--data", str(data), "--out", str(out), "--samples", "2"]
    assert show_batch.main([*arguments, "--engine", "reference"]) == 0
    assert colours_of(out)[1] > 500


@pytest.mark.parametrize("recipe", ["cpc", "deit"])
def test_the_difference_of_two_engines(
    show_batch: Any,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
) -> None:
    """An engine does not differ from itself: the third picture is black and says so."""
    out = tmp_path / "sheet.png"
    arguments = ["--recipe", recipe, "--data", str(data), "--out", str(out), "--samples", "2"]
    assert show_batch.main([*arguments, "--diff", "reference,reference"]) == 0
    assert "reference and reference engines, differences x 255" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert (np.asarray(picture) == 0).all(axis=-1).sum() > 128 * 128
    assert show_batch.main([*arguments, "--diff", "reference,synthetic"]) == 0
    assert "differences x 1" in capsys.readouterr().out


def test_sheet_holds_the_pictures_as_they_are(show_batch: Any, contact_sheet: Any) -> None:
    """Every pixel of a view is found again, enlarged; blocks do not overlap."""
    recipe = recipes.dino(32, 16, 4)
    groups = show_batch._groups(recipe)
    generator = np.random.default_rng(0)
    views = [
        Image.fromarray(generator.integers(256, size=(*v.shape, 3), dtype=np.uint8))
        for v in recipe.flat_views
    ]
    original = Image.new("RGB", (48, 30), (10, 200, 30))
    cell = contact_sheet.Cell(original, "a name", ("7: a/file.png",), tuple(views))
    sheet = np.asarray(contact_sheet.contact_sheet([cell, cell], groups, "title"))
    scale = groups[0].side // 32
    assert scale == 4
    for view in views:
        enlarged = np.asarray(view).repeat(scale, 0).repeat(scale, 1)
        side = len(enlarged)
        corners = np.argwhere(
            (sheet[: 1 - side, : 1 - side] == enlarged[0, 0]).all(-1)
            & (sheet[side - 1 :, side - 1 :] == enlarged[-1, -1]).all(-1)
        )
        matches = [1 for y, x in corners if (sheet[y : y + side, x : x + side] == enlarged).all()]
        assert len(matches) == 2  # once in each row


@pytest.mark.parametrize("name", recipes.NAMED)
def test_every_recipe_has_a_block_per_view(show_batch: Any, name: str) -> None:
    recipe = recipes.named(name)
    pictures = {RandomMask: 2, BlockMask: 2, MultiBlockMask: 3}
    expected = [view.count * pictures.get(type(view.mask), 1) for view in recipe.views]
    assert [group.count for group in show_batch._groups(recipe)] == expected


def test_two_engines_stand_side_by_side(show_batch: Any) -> None:
    """Three pictures to a view, never torn apart by the end of a line."""
    groups = show_batch._groups(recipes.dino(), ("reference", "fused"))
    assert [(group.count, group.columns % 3) for group in groups] == [(3, 0), (3, 0), (24, 0)]
    assert all(group.height <= 224 + show_batch.CAPTION_HEIGHT for group in groups)


def test_masks_are_greyed() -> None:
    mask = np.array([True, False, False, True])
    picture = np.full((8, 8, 3), 255, np.uint8)
    greyed = view_pictures.greyed(picture, mask, RandomMask(4, 0.5))
    assert (greyed[:4, 4:] == 255).all()
    assert (greyed[4:, :4] == 255).all()
    assert (greyed[:4, :4] == greyed[0, 0]).all()
    assert 128 < greyed[0, 0, 0] < 192
    assert (greyed[4:, 4:] == greyed[0, 0]).all()


def test_target_blocks_have_colours_of_their_own() -> None:
    kind = MultiBlockMask(2, targets=2)
    targets = np.zeros((2, 16), np.bool_)
    targets[0, :4] = targets[1, 12:] = True
    picture = np.full((8, 8, 3), 100, np.uint8)
    shown = view_pictures.coloured(picture, targets, kind)
    first, second, between = shown[0, 0], shown[7, 7], shown[4, 4]
    assert (shown[:2] == first).all()
    assert (shown[6:] == second).all()
    assert (shown[2:6] == between).all()
    assert len({tuple(first), tuple(second), tuple(between)}) == 3


def a_batch(views: tuple[torch.Tensor, ...], **held: Any) -> Batch:
    count = len(views[0])
    return Batch(
        views=views,
        labels=torch.zeros(count, dtype=torch.int64),
        ids=torch.arange(count) + 10,
        masks=(None,) * len(views),
        epoch=0,
        position=0,
        **held,
    )


def test_finished_views_are_shown_as_the_pixels_they_were() -> None:
    recipe = recipes.swav()
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    finished = normalize(pixels.contiguous(), recipe.mean, recipe.std)
    shown_levels = view_pictures.levels(finished, recipe)
    np.testing.assert_allclose(shown_levels, pixels.permute(0, 2, 3, 1).numpy(), atol=1e-3)
    np.testing.assert_array_equal(view_pictures.levels(pixels, recipe), shown_levels.round())


def test_boxes_are_outlined_and_the_partner_is_named(show_batch: Any) -> None:
    recipe = recipes.deit(32, group=2)
    views = (torch.full((2, 3, 32, 32), 90, dtype=torch.uint8),)
    mixed = Mixed(
        partners=torch.tensor([1, 0]),
        labels=torch.zeros(2, dtype=torch.int64),
        weights=torch.tensor([0.75, 0.4]),
        boxes=torch.tensor([[0, 16, 16, 16], [0, 0, 0, 0]], dtype=torch.int32),
    )
    boxes = torch.zeros((2, 1, 4), dtype=torch.int32)
    boxes[0, 0] = torch.tensor([20, 2, 6, 9])
    batch = a_batch(views, erased=(Erased(boxes, keys=torch.zeros(2, dtype=torch.int64)),))
    batch = Batch(**{**vars(batch), "mixed": mixed})
    finished = device_stage(batch, recipe.mean, recipe.std, device=torch.device("cpu"))
    request = show_batch.Request(None, recipe, "deit", ("reference",), 0, 2, ())
    pixels = view_pictures.levels(finished.views[0], recipe)
    first, second = (
        np.asarray(next(show_batch._view_pictures(finished, row, 0, pixels[row], request)))
        for row in (0, 1)
    )
    pasted, erased = show_batch.PASTED_OUTLINE, show_batch.ERASED_OUTLINE
    assert (first[0, 16:] == pasted).all()
    assert (first[15, 16:] == pasted).all()
    assert (first[20, 2:11] == erased).all()
    assert (first[20:26, 10] == erased).all()
    assert len(np.unique(first[21:25, 3:10].reshape(-1, 3), axis=0)) > 20  # the noise
    assert (first[27:, :14] == 90).all()
    assert not (second == pasted).all(axis=-1).any()
    assert show_batch._mixing(finished, 0) == ("CutMix: 0.75, the rest is 11",)
    assert show_batch._mixing(finished, 1) == ("Mixup: 0.40, the rest is 10",)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (None, "32 × 32 pixels"),
        (RandomMask(4, 0.75), "32 × 32 pixels, 75% removed"),
        (BlockMask(4), "32 × 32 pixels, 40% removed"),
        (BlockMask(4, (0.1, 0.5), probability=0.5), "32 × 32 pixels, 10% to 50% removed from 50%"),
        (MultiBlockMask(4), "32 × 32 pixels, context, 4 targets"),
    ],
)
def test_masks_are_said_in_words(show_batch: Any, mask: Any, words: str) -> None:
    view = recipes.mae(32, patch_pixels=4).views[0]
    assert show_batch._small_print(type(view)(view.name, view.ops, mask=mask)) == words


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "dinos"], "did you mean dino?"),
        (["--method", "dino", "--preset", "none"], "--preset none is unknown"),
        (["--recipe", "dinos"], "no recipe is called 'dinos'; did you mean dino?"),
        (["--recipe", "dino", "--engine", "none"], "the none engine cannot run this"),
        (["--recipe", "dino", "--diff", "reference,none"], "the none engine cannot run this"),
        (["--recipe", "dino", "--samples", "67"], "--samples is 67"),
        (["--recipe", "deit", "--samples", "65"], "groups of 64 samples, and"),
        (["--run", "none"], "there is no run"),
    ],
)
def test_what_is_wrong_is_said(
    show_batch: Any,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    out = tmp_path / "sheet.png"
    assert show_batch.main([*arguments, "--data", str(data), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--recipe", "dino", "--method", "dino"],
        ["--recipe", "dino", "--engine", "fused", "--diff", "fused,dali"],
        ["--recipe", "dino", "--diff", "fused"],
        ["--recipe", "dino", "--approximate", "anything"],
        ["--recipe", "dino", "--out", "sheet.jpg"],
        [],
    ],
)
def test_contradictions_are_refused(
    show_batch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        show_batch.main(["--out", str(tmp_path / "sheet.png"), *arguments])
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_names_that_no_font_can_draw_are_escaped(contact_sheet: Any) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    cell = contact_sheet.Cell(picture, "two\nlines", ("caf\udce9.jpg", "\t"), (picture,), ("a\n",))
    group = contact_sheet.Group("view", "", 1, 64, 1)
    assert contact_sheet.contact_sheet([cell], [group], "run\n\udce9").width > 64
