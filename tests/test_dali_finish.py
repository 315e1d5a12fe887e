"""Finished batches from DALI's graph are what `device_stage` makes of the unfinished ones."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from headrace.pipelines import engines, recipes
from headrace.pipelines.batch import Batch
from headrace.pipelines.engines import Unsupported, Work
from headrace.pipelines.engines.dali.columns import finish_columns
from headrace.pipelines.engines.dali.engine import DaliEngine
from headrace.pipelines.engines.device_stage import device_stage
from headrace.pipelines.masks import BlockMask, MultiBlockMask, RandomMask
from headrace.pipelines.ops import CenterCrop, Flip, RandomResizedCrop
from headrace.pipelines.recipe import Augmentation, Mix, RandomErasing, View
from tests.dali_cases import CPU, make_work, photo_and_smooth_pictures, run_dali

pytestmark = pytest.mark.dali

CUDA = torch.device("cuda")
SAME = 1e-3


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [*photo_and_smooth_pictures(), *photo_and_smooth_pictures()[:2]]


def by_device_stage(
    augmentation: Augmentation, work: Sequence[Work], dtype: torch.dtype = torch.float32
) -> list[Batch]:
    mean, std = augmentation.mean, augmentation.std
    return [
        device_stage(batch, mean, std, device=CPU, dtype=dtype)
        for batch in run_dali(augmentation, work)
    ]


def assert_same(made: Sequence[Batch], expected: Sequence[Batch]) -> None:
    assert len(made) == len(expected)
    for mine, theirs in zip(made, expected, strict=True):
        for a, b in zip(mine.tensors(), theirs.tensors(), strict=True):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            if a.is_floating_point():
                assert float((a - b).abs().max()) <= SAME
            else:
                assert torch.equal(a, b)


def mixing(mix: Mix, group: int = 4, erase: RandomErasing | None = None) -> Augmentation:
    ops = (RandomResizedCrop(48), Flip())
    return Augmentation("mixing", (View("view", ops, erase=erase),), group=group, mix=mix)


ERASING = {
    "const": RandomErasing(0.8, fill="const"),
    "const-several": RandomErasing(0.8, fill="const", count=(1, 3)),
    "rand": RandomErasing(0.8, fill="rand"),
    "rand-several": RandomErasing(0.8, fill="rand", count=(2, 4)),
}
MIXING = {
    "mixup": Mix(0.8, 0),
    "cutmix": Mix(0, 1.0),
    "switched": Mix(0.8, 1.0, scope="sample"),
    "sometimes": Mix(0.8, 1.0, probability=0.5, scope="pair"),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("erase", ERASING)
def test_erased_views_are_the_device_stages(
    pictures: list[Image.Image], erase: str, count: int
) -> None:
    view = View("view", (RandomResizedCrop(48),), count, erase=ERASING[erase])
    plain = View("plain", (CenterCrop(40),))
    augmentation = Augmentation("erasing", (view, plain))
    work = [make_work(augmentation, pictures, seed=seed) for seed in range(2)]
    expected = by_device_stage(augmentation, work)
    assert_same(run_dali(augmentation, work, finished=torch.float32), expected)
    without = replace(augmentation, views=(replace(view, erase=None), plain))
    untouched = by_device_stage(without, [make_work(without, pictures)])
    assert not torch.equal(expected[0].views[0], untouched[0].views[0])


@pytest.mark.parametrize("mix", MIXING)
def test_mixed_views_are_the_device_stages(pictures: list[Image.Image], mix: str) -> None:
    augmentation = mixing(MIXING[mix])
    work = [make_work(augmentation, pictures, seed=seed) for seed in range(3)]
    expected = by_device_stage(augmentation, work)
    assert_same(run_dali(augmentation, work, finished=torch.float32), expected)
    assert expected[0].mixed is not None
    assert bool((torch.cat([b.mixed.weights for b in expected if b.mixed]) < 1).any())


@pytest.mark.parametrize("erase", ["const", "rand-several"])
def test_partners_are_erased_before_they_are_mixed_in(
    pictures: list[Image.Image], erase: str
) -> None:
    augmentation = mixing(Mix(0.8, 1.0, scope="pair"), erase=ERASING[erase])
    work = [make_work(augmentation, pictures, seed=seed) for seed in range(3)]
    made = run_dali(augmentation, work, finished=torch.float32)
    assert_same(made, by_device_stage(augmentation, work))


def test_partners_are_rows_of_the_same_batch(pictures: list[Image.Image]) -> None:
    """A pipeline is built for its longest batch; shorter ones have partners among their own."""
    augmentation = mixing(Mix(1.0, 1.0), group=2)
    whole = make_work(augmentation, pictures)
    parts = [
        Work(whole.plan.rows(rows), whole.encoded[rows], whole.labels[rows])
        for rows in (slice(0, 4), slice(4, 6), slice(6, 8), slice(0, 8), slice(2, 4))
    ]
    made = run_dali(augmentation, parts, finished=torch.float32)
    assert_same(made, by_device_stage(augmentation, parts))
    assert torch.equal(torch.cat([batch.views[0] for batch in made[:3]]), made[3].views[0])


FINISHED_RECIPES = [
    name
    for name, recipe in recipes.NAMED.items()
    if engines.finishes("dali", recipe(), CPU, torch.float32)
]


def test_most_recipes_are_finished_in_the_graph() -> None:
    assert set(recipes.NAMED) - set(FINISHED_RECIPES) == {"deit"}  # its erasing is noise


@pytest.mark.parametrize("name", ["simclr", "mae", "ijepa", "deit3"])
def test_finished_recipes_are_the_device_stages(pictures: list[Image.Image], name: str) -> None:
    recipe = recipes.NAMED[name]()
    augmentation = replace(recipe, group=min(recipe.group, 2))
    work = [make_work(augmentation, pictures[:4], "JPEG")]
    made = run_dali(augmentation, work, finished=torch.float32)
    assert_same(made, by_device_stage(augmentation, work))
    assert all(view.dtype == torch.float32 for view in made[0].views)


@pytest.mark.parametrize("erase", [None, ERASING["rand"]])
def test_half_precision_is_the_rounded_single(
    pictures: list[Image.Image], erase: RandomErasing | None
) -> None:
    """Only a GPU is asked for it, whose graph is the same."""
    for augmentation in (
        mixing(Mix(1.0, 1.0), erase=erase),
        replace(mixing(Mix(), erase=erase), mix=None),
    ):
        work = [make_work(augmentation, pictures)]
        half = DaliEngine(augmentation, CPU, 1, torch.float16, ())
        (made,) = half.run(iter(work))
        (expected,) = by_device_stage(augmentation, work, torch.float16)
        assert made.views[0].dtype == torch.float16
        assert float((made.views[0].float() - expected.views[0].float()).abs().max()) <= 3e-3


MASKS = {
    "random": RandomMask(16, 0.75),
    "block": BlockMask(16, (0.1, 0.5), probability=0.7),
    "multi-block": MultiBlockMask(16, min_keep=1),
}


@pytest.mark.parametrize("finished", [None, torch.float32])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_go_through_the_graph(
    pictures: list[Image.Image], mask: str, finished: torch.dtype | None
) -> None:
    masked = View("masked", (RandomResizedCrop(128),), 2, mask=MASKS[mask])
    plain = View("plain", (RandomResizedCrop(32),))
    augmentation = Augmentation("masks", (plain, masked), group=4)
    work = [make_work(augmentation, pictures, seed=seed) for seed in range(2)]
    for made, item in zip(run_dali(augmentation, work, finished=finished), work, strict=True):
        assert made.masks[0] is None
        for found, view in zip(made.masks[1:], item.plan.views[1:], strict=True):
            assert found is not None
            assert found.dtype == torch.bool
            assert view.mask is not None
            assert np.array_equal(found.numpy(), view.mask)
            assert found.any()


def test_what_is_finished_where() -> None:
    plain = mixing(Mix(), erase=ERASING["rand"])
    noisy = mixing(Mix(), erase=RandomErasing(fill="pixel"))
    for device, dtype, expected in (
        (CPU, torch.float32, True),
        (CPU, torch.float16, False),
        (CPU, torch.bfloat16, False),
        (CUDA, torch.float32, True),
        (CUDA, torch.float16, True),
        (CUDA, torch.bfloat16, False),
    ):
        assert engines.finishes("dali", plain, device, dtype) is expected
        assert not engines.finishes("dali", noisy, device, dtype)
    with pytest.raises(Unsupported, match="finishing"):
        engines.open_engine("dali", noisy, finished=torch.float32)


def test_what_is_not_drawn_is_not_erased_or_mixed(pictures: list[Image.Image]) -> None:
    never = mixing(Mix(probability=0), erase=RandomErasing(0, fill="rand", count=(1, 2)))
    plain = replace(mixing(Mix()), mix=None)
    made = run_dali(never, [make_work(never, pictures)], finished=torch.float32)
    expected = run_dali(plain, [make_work(plain, pictures)], finished=torch.float32)
    assert float((made[0].views[0] - expected[0].views[0]).abs().max()) <= 1e-6


def test_columns_say_which_pictures_box_and_partner() -> None:
    view = View("view", (CenterCrop(32),), 2, erase=RandomErasing(1.0, fill="rand", count=(2, 2)))
    augmentation = Augmentation("erasing", (view,))
    work = make_work(augmentation, photo_and_smooth_pictures()[:3])
    columns = finish_columns(augmentation, work.plan)
    for region in range(4):
        prefix = f"view.0.erase.{region}."
        start, shape, color = (columns[prefix + name] for name in ("start", "shape", "color"))
        assert start[:, 0].tolist() == [region // 2] * 3
        erased = work.plan.views[region // 2].erase
        box = erased["box"][:, region % 2]
        assert np.array_equal(np.concatenate([start[:, 1:], shape[:, 1:]], axis=1), box)
        assert np.array_equal(shape[:, 0], box[:, 2] > 0)
        assert np.array_equal(color, erased["color"][:, region % 2])
    assert len(columns) == 12

    const = replace(view, erase=RandomErasing(1.0, fill="const", count=(2, 2)))
    augmentation = Augmentation("erasing", (const,))
    columns = finish_columns(
        augmentation, make_work(augmentation, photo_and_smooth_pictures()).plan
    )
    assert columns["view.0.erase.start"].shape == columns["view.0.erase.shape"].shape == (6, 4, 3)
    assert len(columns) == 2

    mixed = mixing(Mix(0.8, 1.0, scope="pair"))
    columns = finish_columns(mixed, make_work(mixed, photo_and_smooth_pictures()[:4]).plan)
    assert columns["mix.partner"].tolist() == [3, 2, 1, 0]
    cut = (columns["mix.shape"] > 0).all(axis=1)
    assert (columns["mix.share"].ravel()[cut] == 1).all()
    only_mixup = mixing(Mix(0.8, 0))
    plan = make_work(only_mixup, photo_and_smooth_pictures()[:4]).plan
    assert set(finish_columns(only_mixup, plan)) == {"mix.partner", "mix.share"}
