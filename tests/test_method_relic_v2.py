"""RELICv2 against a float64 transcription, its negatives and its masks.

The oracle is numpy alone and goes entry by entry through the pairs and the mean of Tomasev et al.
2022, listing 1. Beside it stand the mistakes that are easily made, to show that the comparison
would notice them.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.pipelines.batch import Batch
from headrace.pipelines.recipe import Augmentation
from headrace.training.method import Facts
from headrace.training.methods.relic import relic_loss
from headrace.training.methods.relic_v2 import RelicV2, relic_v2_loss, without_background
from headrace.training.preset import ConfigError
from tests.objective_checks import (
    Array,
    assert_same,
    differs,
    float32_normal,
    kl,
    log_softmax,
    unit_rows,
)
from tests.tiny_methods import build, make_batch, module_of, progress_at, small_preset

# ---- listing 1


def relic_v2_oracle(
    predictions: Array,
    targets: Array,
    rows: list[list[int]],
    temperature: float,
    contrast_weight: float,
    invariance_weight: float,
    *,
    constant: Array | None = None,
    skip_own_view: bool = False,
    unscaled: bool = False,
    whole_batch: bool = False,
) -> float:
    views, large = predictions.shape[1], targets.shape[1]

    def p(given: Array, i: int, view: int, target: int) -> Array:
        chosen = range(len(targets)) if whole_batch else rows[i]
        return log_softmax(
            np.array(
                [
                    unit_rows(given[i, view]) @ unit_rows(targets[row, target]) / temperature
                    for row in chosen
                ]
            )
        )

    fixed = predictions if constant is None else constant
    total, terms = 0.0, 0
    for i in range(len(predictions)):
        own = rows[i][0] if whole_batch else 0
        for view in range(views):
            for target in range(large):
                if skip_own_view and view == target:
                    continue
                ours = p(predictions, i, view, target)
                other = view if view < large else (target + 1) % large
                theirs = p(fixed, i, target, other)
                total += -contrast_weight * ours[own] + invariance_weight * kl(ours, theirs)
                terms += 1
    return total / (len(predictions) if unscaled else terms)


@pytest.mark.parametrize(
    ("views", "large", "samples", "batch", "negatives", "temperature"),
    [(6, 4, 2, 6, 3, 0.4), (2, 2, 3, 5, 4, 0.1), (4, 2, 2, 4, 1, 1.0), (3, 3, 1, 8, 5, 0.2)],
)
def test_relic_v2_loss(
    views: int, large: int, samples: int, batch: int, negatives: int, temperature: float
) -> None:
    random = np.random.default_rng(views)
    predictions, targets = (
        float32_normal(random, samples, views, 5),
        float32_normal(random, batch, large, 5),
    )
    rows = [
        [i, *random.permutation([row for row in range(batch) if row != i])[:negatives].tolist()]
        for i in range(samples)
    ]
    weights = 0.3, 5.0

    def ours(x: Tensor) -> Tensor:
        return relic_v2_loss(
            x,
            torch.tensor(targets, dtype=torch.float32),
            torch.tensor(rows),
            temperature=temperature,
            contrast_weight=weights[0],
            invariance_weight=weights[1],
        )["loss"]

    def oracle(x: Array, **mistake: object) -> float:
        given = (x, targets, rows, temperature, *weights)
        return relic_v2_oracle(*given, **{"constant": predictions, **mistake})  # pyright: ignore[reportArgumentType]

    assert_same(ours, oracle, predictions)
    value = oracle(predictions)
    assert differs(value, oracle(predictions, skip_own_view=True))
    assert differs(value, oracle(predictions, unscaled=True))
    if negatives + 1 < batch:
        assert differs(value, oracle(predictions, whole_batch=True))
    with pytest.raises(AssertionError):  # a gradient through both distributions is another one
        assert_same(ours, lambda x: oracle(x, constant=None), predictions)


def test_two_large_views_and_the_whole_batch_are_relic_but_for_the_pairs_with_themselves() -> None:
    """With every other sample a negative, the pairs of two views are eq. 3's."""
    random = np.random.default_rng(5)
    predictions, targets = float32_normal(random, 4, 2, 6), float32_normal(random, 4, 2, 6)
    ours, theirs = (torch.tensor(x, dtype=torch.float32) for x in (predictions, targets))
    first = relic_loss(ours, theirs, 0, temperature=0.3, invariance_weight=2.0)
    rows = (torch.arange(4)[:, None] + torch.arange(4)) % 4
    options = {"temperature": 0.3, "contrast_weight": 1.0, "invariance_weight": 2.0}
    second = relic_v2_loss(ours, theirs, rows, **options)
    own = [
        -log_softmax(
            np.array([unit_rows(predictions[i, v]) @ unit_rows(targets[j, v]) for j in range(4)])
            / 0.3
        )[i]
        for i in range(4)
        for v in range(2)
    ]
    expected = float(first["loss"]) / 4 + float(np.sum(own)) / 16
    assert float(second["loss"]) == pytest.approx(expected, rel=1e-5)


# ---- negatives and masks


def test_negatives_are_other_samples_each_once_and_new_in_each_step() -> None:
    method = build("relic_v2", "test_resnet", negatives=10)
    assert isinstance(method, RelicV2)
    targets = torch.zeros(64, 8)
    rows = method._compared(64, targets, progress_at(3))
    assert rows.shape == (64, 11)
    assert torch.equal(rows[:, 0], torch.arange(64))
    assert all(len(set(row)) == 11 for row in rows.tolist())
    assert torch.equal(rows, method._compared(64, targets, progress_at(3)))
    assert not torch.equal(rows, method._compared(64, targets, progress_at(4)))
    assert method._compared(4, targets[:4], progress_at(0)).shape == (
        4,
        4,
    )  # no more than there are


def with_masks(name: str = "cifar_masks") -> tuple[Augmentation, Batch]:
    augmentation = module_of("relic_v2").PRESETS[name].augmentation
    batch = make_batch(augmentation, 16)
    generator = torch.Generator().manual_seed(1)
    masks = tuple(
        torch.randint(0, 256, (16, 1, view.size, view.size), generator=generator).to(torch.uint8)
        if view.components
        else None
        for view in augmentation.flat_views
    )
    return augmentation, replace(batch, components={"saliency": masks})


def test_the_mask_presets_ask_for_masks_of_the_large_views_alone() -> None:
    for name, large, small in (("imagenet", 4, 2), ("cifar_masks", 2, 2)):
        augmentation, batch = with_masks(name)
        declared = [view.components for view in augmentation.flat_views]
        assert declared == [("saliency",)] * large + [()] * small
        assert batch.draws["saliency"].shape == batch.draws["background"].shape == (16, large)
    for name in ("imagenet_no_masks", "cifar"):
        plain = module_of("relic_v2").PRESETS[name]
        assert plain.augmentation.components == plain.augmentation.draws == ()
        assert plain.objective.saliency_probability == 0


def test_a_background_becomes_grey_where_it_is_chosen() -> None:
    _, batch = with_masks()
    view, mask = batch.views[0], batch.components["saliency"][0]
    assert mask is not None
    chosen = torch.arange(16) % 2 == 0
    grey = torch.linspace(-2, 2, 16)
    seen = without_background(view, mask, chosen, grey)
    assert torch.equal(seen[1::2], view[1::2])
    for i, y, x in ((0, 3, 4), (2, 31, 0), (14, 16, 16)):
        share = float(mask[i, 0, y, x]) / 255
        for channel in range(3):
            expected = share * float(view[i, channel, y, x]) + (1 - share) * float(grey[i])
            assert float(seen[i, channel, y, x]) == pytest.approx(expected, abs=1e-5)
    nothing, everything = torch.zeros_like(mask), torch.full_like(mask, 255)
    torch.testing.assert_close(without_background(view, everything, ~chosen, grey), view)
    removed = without_background(view, nothing, chosen, grey)[::2]
    assert torch.equal(removed, grey[::2, None, None, None].expand_as(removed))


def test_both_networks_see_the_masked_views() -> None:
    _, batch = with_masks()
    plain = build("relic_v2", "test_resnet", saliency_probability=0.0)
    always = build("relic_v2", "test_resnet", saliency_probability=1.0)
    some = build("relic_v2", "test_resnet", saliency_probability=0.3)
    masked = [
        without_background(view, mask, torch.ones(16, dtype=torch.bool), grey)
        for view, mask, grey in zip(
            batch.views, batch.components["saliency"], batch.draws["background"].T, strict=False
        )
        if mask is not None
    ]
    expected = plain.embed(replace(batch, views=(*masked, *batch.views[2:])), progress_at(0))
    for name, tensor in always.embed(batch, progress_at(0)).items():
        torch.testing.assert_close(tensor, expected[name])
    assert isinstance(some, RelicV2)
    changed = [
        (ours != view).any(dim=(1, 2, 3))
        for ours, view in zip(some._large_views(batch), batch.views, strict=False)
    ]
    assert torch.equal(torch.stack(changed, 1), batch.draws["saliency"] < 0.3)
    assert 0 < int(torch.stack(changed).sum()) < 32


def test_masks_that_are_asked_for_and_missing_are_named() -> None:
    method = build("relic_v2", "test_resnet", saliency_probability=0.1)
    batch = make_batch(small_preset("relic_v2").augmentation)
    with pytest.raises(ConfigError, match=r"saliency-probability is 0\.1.*cifar_masks"):
        method.embed(batch, progress_at(0))


# ---- what build refuses


def facts(pixels: tuple[int, ...]) -> Facts:
    return Facts(10, 100, pixels, 16, 4, 20)


@pytest.mark.parametrize("pixels", [(32,), (16, 32, 32), (32, 16, 32)])
def test_views_that_do_not_fit_are_refused(pixels: tuple[int, ...]) -> None:
    objective = small_preset("relic_v2").objective
    with pytest.raises(ConfigError, match="two or more large views"):
        module_of("relic_v2").build(objective, lambda: torch.nn.Identity(), facts(pixels))


def test_negatives_must_be_some() -> None:
    objective = replace(small_preset("relic_v2").objective, negatives=0)
    with pytest.raises(ConfigError, match="negatives is 0"):
        module_of("relic_v2").build(objective, lambda: torch.nn.Identity(), facts((32, 32)))
