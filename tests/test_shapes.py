"""Views that are not square: every engine makes them as `reference` does, and what cannot be is
refused."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from headrace.pipelines.declaration import augmentation_from
from headrace.pipelines.engines import Work
from headrace.pipelines.engines.device_stage import device_stage
from headrace.pipelines.masks import BlockMask, MultiBlockMask, RandomMask
from headrace.pipelines.ops import (
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    RecipeError,
    Resize,
)
from headrace.pipelines.recipe import Augmentation, Mix, RandomErasing, View
from tests.fused_cases import encoded, one_view, pieces, run, whole_photograph, work_for

SHAPES = [(24, 40), (40, 24), (1, 17), (70, 33)]


def works(augmentation: Augmentation, *sources: tuple[int, int]) -> list[Work]:
    photograph = whole_photograph()
    made = []
    for epoch, source in enumerate(sources):
        files = [encoded(picture) for picture in pieces(photograph, *source, 6)[:6]]
        made.append(work_for(augmentation, files, epoch))
    return made


def levels_apart(name: str, augmentation: Augmentation, work: list[Work]) -> NDArray[np.float64]:
    """Mean difference to `reference` of every view of every sample."""
    means = []
    for ours, expected in zip(
        run(name, augmentation, *work), run("reference", augmentation, *work), strict=True
    ):
        for view, reference in zip(ours.views, expected.views, strict=True):
            assert view.shape == reference.shape
            assert view.stride() == reference.stride()
            means.append((view.int() - reference.int()).abs().double().mean((1, 2, 3)).numpy())
    return np.concatenate(means)


GEOMETRY: dict[str, Any] = {
    "resized": lambda shape: (RandomResizedCrop(shape, (0.05, 1.0)), Flip(0.5)),
    "centre": lambda shape: (Resize(60), CenterCrop(shape)),
    "centre-padded": lambda shape: (Resize(20, "bilinear"), CenterCrop(shape)),
    "random": lambda shape: (Resize(50), RandomCrop(shape, 4), Flip(0.5)),
    "chain": lambda shape: (
        RandomResizedCrop(shape, (0.2, 1.0), interpolation="bilinear"),
        ColorJitter(0.4, 0.4, 0.2, 0.1),
        GaussianBlur(0.8, (0.1, 2.0)),
        Flip(0.5),
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize(("engine", "levels"), [("fused", 0.3), ("dali", 1.0)])
def test_engines_agree(engine: str, levels: float, name: str, shape: tuple[int, int]) -> None:
    if engine == "dali":
        pytest.importorskip("nvidia.dali")
        if min(shape) == 1:
            pytest.skip("filters over a hundred pixels for one row differ by more, as in squares")
    augmentation = one_view(*GEOMETRY[name](shape))
    work = works(augmentation, (90, 130), (130, 90), (15, 60))
    assert levels_apart(engine, augmentation, work).max() <= levels
    for batch, item in zip(run(engine, augmentation, *work), work, strict=True):
        assert batch.views[0].shape == (len(item.labels), 3, *shape)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("mix", [None, Mix(0.8, 0), Mix(0, 1.0)])
def test_finished_views_are_the_device_stages(shape: tuple[int, int], mix: Mix | None) -> None:
    erase = RandomErasing(1.0, area=(0.1, 0.4), count=(1, 2), fill="pixel")
    view = View("view", (RandomResizedCrop(shape), Flip(0.5)), erase=erase)
    augmentation = Augmentation("test", (view,), group=1 if mix is None else 2, mix=mix)
    work = works(augmentation, (90, 130), (130, 90))
    finished = run("fused", augmentation, *work, finished=torch.float32)
    for batch, raw in zip(finished, run("fused", augmentation, *work), strict=True):
        expected = device_stage(
            raw, augmentation.mean, augmentation.std, device=torch.device("cpu")
        )
        assert torch.equal(batch.views[0], expected.views[0])


def test_boxes_of_erasing_and_mixing_fill_the_whole_shape() -> None:
    """They are drawn within both sides, and reach beyond what a square of the shorter one has."""
    erase = RandomErasing(1.0, area=(0.02, 0.3), ratio=(0.3, 3.3))
    view = View("view", (RandomResizedCrop((20, 60)),), erase=erase)
    augmentation = Augmentation("test", (view,), group=2, mix=Mix(0, 1.0, scope="pair"))
    files = [encoded(picture) for picture in pieces(whole_photograph(), 90, 130, 200)]
    plan = work_for(augmentation, files[:200]).plan
    for boxes in (plan.views[0].erase["box"][:, 0], plan.mix["box"]):
        ends = boxes[:, :2] + boxes[:, 2:]
        assert (boxes >= 0).all()
        assert (ends <= (20, 60)).all()
        assert ends[:, 1].max() > 55
    shares = plan.mix["box"][:, 2:].prod(axis=1) / (20 * 60)
    np.testing.assert_allclose(plan.mix["weight"], 1 - shares, rtol=1e-6)


def test_a_random_mask_covers_rows_by_columns() -> None:
    view = View("view", (RandomResizedCrop((32, 64)),), mask=RandomMask(16, 0.75))
    augmentation = Augmentation("test", (view,))
    (work,) = works(augmentation, (90, 130))
    masks = work.plan.views[0].mask
    assert masks is not None
    assert masks.shape == (6, 8)
    assert (masks.sum(axis=1) == 6).all()


def test_a_shape_is_read_back_from_its_declaration() -> None:
    augmentation = one_view(RandomResizedCrop((24, 40)), Flip(0.5))
    assert augmentation_from(augmentation.declaration()) == augmentation


@pytest.mark.parametrize(
    ("view", "reason"),
    [
        (
            lambda: View("v", (RandomResizedCrop((32, 64)), RandAugment())),
            "RandAugment is for",
        ),
        (lambda: View("v", (CenterCrop((32, 64)),), mask=BlockMask()), "BlockMask is for squares"),
        (
            lambda: View("v", (CenterCrop((32, 64)),), mask=MultiBlockMask()),
            "MultiBlockMask is for squares",
        ),
        (
            lambda: View("v", (CenterCrop((32, 60)),), mask=RandomMask(16, 0.5)),
            "no multiple of the mask's patch_pixels 16",
        ),
        (lambda: CenterCrop((32, 0)), "must be positive"),
    ],
)
def test_what_no_engine_could_do_is_refused(view: Any, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        view()
