"""Masks: as the published algorithms draw them, within their limits, for views of any size."""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.pipelines import source as source_module
from headrace.pipelines.counters import Kind, Scope, counters, owners
from headrace.pipelines.masks import BlockMask, Mask, MultiBlockMask, RandomMask
from headrace.pipelines.ops import RandomCrop, RecipeError
from headrace.pipelines.philox import words
from headrace.pipelines.recipe import Augmentation, View
from tests.draws import Sample, assert_same_distribution, drawn


def mask_of(
    samples: int, mask: Mask, size: int, *, group: int = 1, seed: int = 1
) -> NDArray[np.bool_]:
    view = View("v", (RandomCrop(size),), mask=mask)
    removed = drawn(Augmentation("a", (view,), group=group), samples, seed=seed).views[0].mask
    assert removed is not None
    assert removed.dtype == np.bool_
    return removed


# RandomMask


@pytest.mark.parametrize(
    ("size", "patch", "ratio", "kept"),
    [(224, 16, 0.75, 49), (32, 4, 0.6, 25), (32, 16, 0.9, 0), (48, 16, 0.5, 4), (24, 8, 0.1, 8)],
)
def test_mask_keeps_the_patches_of_least_noise(
    size: int, patch: int, ratio: float, kept: int
) -> None:
    removed = mask_of(50, RandomMask(patch, ratio), size)
    patches = (size // patch) ** 2
    assert removed.shape == (50, patches)
    assert ((~removed).sum(axis=1) == kept).all()
    whose = owners(Scope.SAMPLE, np.arange(50))
    noise = words(1, counters(whose, Kind.MASK, blocks=-(-patches // 4)))
    noise = noise.reshape(50, -1)[:, :patches]
    ranks = np.argsort(np.argsort(noise, axis=1, kind="stable"), axis=1, kind="stable")
    assert np.array_equal(removed, ranks >= kept)


def test_mask_is_uniform_over_patches_and_pairs() -> None:
    kept = ~mask_of(4000, RandomMask(8, 0.75), 32)
    assert np.abs(kept.mean(axis=0) - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 4000)
    together = (kept.T.astype(int) @ kept)[~np.eye(16, dtype=bool)] / 4000
    pair = 4 / 16 * 3 / 15
    assert np.abs(together - pair).max() < 5 * math.sqrt(pair / 4000)


def test_mask_ties_are_broken_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def sevens(_: int, rows: NDArray[np.uint32]) -> NDArray[np.uint32]:
        return np.full(rows.shape, 7, np.uint32)

    monkeypatch.setattr(source_module, "words", sevens)
    removed = mask_of(3, RandomMask(8, 0.75), 32)
    assert np.array_equal(removed, np.tile(np.arange(16) >= 4, (3, 1)))


# BlockMask


Attempts = Iterator[list[float]]  # four numbers in [0, 1) for every block that is tried


def randomly(seed: int) -> Attempts:
    generator = random.Random(seed)
    while True:
        yield [generator.random() for _ in range(4)]


def replayed(sample: int, scope: Scope = Scope.SAMPLE) -> Attempts:
    """The numbers that a sample's own counters hold."""
    whose = owners(scope, np.array([sample]))
    for block in itertools.count():
        yield (words(1, counters(whose, Kind.MASK, blocks=block + 1))[-1] / 2**32).tolist()


def beits_mask(side: int, wanted: int, mask: BlockMask, attempts: Attempts) -> NDArray[np.bool_]:
    """Algorithm 1 of "BEiT: BERT Pre-Training of Image Transformers" (Bao et al. 2021), as their
    masking_generator.py fills in what the paper leaves open: bool [side, side].

    Until so many patches are masked: a block of an area between the least and what is still
    missing, of an aspect ratio that is log-uniform, at a place where it fits with a patch to spare
    in each direction; taken if it masks something and not too much. Ten in a row that are not
    taken end it.
    """
    masked, failures = np.zeros((side, side), np.bool_), 0
    low, high = (math.log(aspect) for aspect in mask.aspect)
    while (missing := wanted - int(masked.sum())) > 0 and failures < 10:
        failures += 1
        numbers = next(attempts)
        area = mask.min_patches + numbers[0] * (missing - mask.min_patches)
        aspect = math.exp(low + numbers[1] * (high - low))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= side or width >= side:
            continue
        top, left = int(numbers[2] * (side - height + 1)), int(numbers[3] * (side - width + 1))
        after = masked.copy()
        after[top : top + height, left : left + width] = True
        if 0 < after.sum() - masked.sum() <= missing:
            masked, failures = after, 0
    return masked


def shapes(masks: NDArray[np.bool_]) -> Sample:
    """What is compared of masks bool [n, side, side]: how much, where, and how ragged."""
    side = masks.shape[1]
    amount = np.maximum(masks.sum(axis=(1, 2)), 1)
    rows, columns = np.mgrid[:side, :side]
    edges = (masks[:, 1:] != masks[:, :-1]).sum(axis=(1, 2))
    edges += (masks[:, :, 1:] != masks[:, :, :-1]).sum(axis=(1, 2))
    return {
        "patches": masks.sum(axis=(1, 2)),
        "row": (masks * rows).sum(axis=(1, 2)) / amount,
        "column": (masks * columns).sum(axis=(1, 2)) / amount,
        "edges": edges,
        "rows touched": masks.any(axis=2).sum(axis=1),
        "longest row": masks.sum(axis=2).max(axis=1),
        "corners": masks[:, [0, 0, -1, -1], [0, -1, 0, -1]].sum(axis=1),
    }


@pytest.mark.parametrize(
    ("size", "mask"),
    [
        (224, BlockMask(16, (75 / 196, 75 / 196))),  # BEiT
        (96, BlockMask(16, (0.1, 0.5), min_patches=4)),  # iBOT's local views
        (224, BlockMask(16, (0.1, 0.5), probability=0.5)),  # iBOT's global views
    ],
)
def test_blocks_are_distributed_as_published(size: int, mask: BlockMask) -> None:
    attempts, side = randomly(0), size // 16
    theirs = np.zeros((3000, side, side), np.bool_)
    for row in theirs:
        gate, level, *_ = next(attempts)
        if gate < mask.probability:
            ratio = mask.ratio[0] + level * (mask.ratio[1] - mask.ratio[0])
            row[:] = beits_mask(side, int(ratio * side * side), mask, attempts)

    def ours(declared: BlockMask) -> Sample:
        return shapes(mask_of(6000, declared, size).reshape(-1, side, side))

    wrong = [
        replace(mask, ratio=(mask.ratio[0] - 0.05, mask.ratio[1] - 0.05)),
        replace(mask, min_patches=mask.min_patches // 2),
        replace(mask, aspect=(0.5, 2.0)),
        replace(mask, probability=mask.probability - 0.06),
    ]
    assert_same_distribution(shapes(theirs), ours, mask, wrong)
    # Every patch is as often masked.
    often = mask_of(6000, mask, size).mean(axis=0)
    there = theirs.reshape(3000, -1).mean(axis=0)
    assert np.abs(often - there).max() < 5 * math.sqrt(0.25 / 3000 + 0.25 / 6000)


BLOCK_MASKS = st.builds(
    lambda ratio, min_patches, aspect, probability: BlockMask(
        1, (min(ratio), max(ratio)), min_patches, (min(aspect), max(aspect)), probability
    ),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.integers(1, 40),
    st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
    st.sampled_from([0.0, 0.5, 1.0]),
)


@settings(max_examples=60)
@given(mask=BLOCK_MASKS, side=st.integers(2, 20))
def test_blocks_are_those_of_the_published_algorithm(mask: BlockMask, side: int) -> None:
    """On the same numbers, for views of any size and declarations of any kind; never too many."""
    removed = mask_of(4, mask, side)
    assert removed.shape == (4, side * side)
    for sample, mine in enumerate(removed):
        attempts = replayed(sample)
        gate, level, *_ = next(attempts)
        ratio = mask.ratio[0] + level * (mask.ratio[1] - mask.ratio[0])
        wanted = int(ratio * (side * side)) if gate < mask.probability else 0
        first_attempts = itertools.islice(attempts, 128)
        try:
            theirs = beits_mask(side, wanted, mask, first_attempts)
        except StopIteration:
            continue  # ours ends after so many
        assert np.array_equal(mine.reshape(side, side), theirs)
        assert mine.sum() <= wanted


@pytest.mark.parametrize("ratio", [0.1, 0.4, 75 / 196, 0.9, 1.0])
def test_blocks_never_remove_more_than_their_ratio(ratio: float) -> None:
    for size, least in ((14, 16), (14, 1), (6, 4), (2, 1), (3, 100)):
        removed = mask_of(500, BlockMask(1, (ratio, ratio), least), size)
        assert removed.sum(axis=1).max() <= int(ratio * size * size)
    often = np.median(mask_of(500, BlockMask(1, (ratio, ratio), 1), 14).sum(axis=1))
    assert often > 0.9 * int(ratio * 196)


def test_a_mask_of_blocks_is_a_union_of_rectangles() -> None:
    """Of which the smallest has `min_patches` as long as so many are missing: the first one."""
    mask = BlockMask(1, (0.3, 0.3), min_patches=16, aspect=(1.0, 1.0))
    for picture in mask_of(200, mask, 14).reshape(-1, 14, 14):
        inside = np.zeros_like(picture)
        for top, left in itertools.product(range(11), range(11)):
            square = (slice(top, top + 4), slice(left, left + 4))
            if picture[square].all():
                inside[square] = True
        assert inside.sum() >= 16


def test_a_view_of_one_patch_has_no_room_for_a_block() -> None:
    with pytest.raises(RecipeError, match="view 'v': 1 x 1 patches have no room for BlockMask"):
        mask_of(1, BlockMask(16), 16)


# MultiBlockMask


def ijepas_masks(
    side: int, mask: MultiBlockMask, sizes: list[float], attempts: Attempts, samples: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The masks of a batch by "Self-Supervised Learning from Images with a Joint-Embedding
    Predictive Architecture" (Assran et al. 2023, section 3 and appendix A.1), where it leaves
    things open as their masks/multiblock.py does: contexts bool [samples, side, side] before they
    are cut to one length, and targets bool [samples, targets, side, side].

    A batch has one size of target and one of context, each by one number in [0, 1). Places are
    uniform but never reach the last row and column. Targets are cut out of the context; if no more
    than the least number of patches are left of it, it moves, and after 20 moves it may keep what
    is in the last of the targets, after 40 in the last two.
    """

    def size(scale: tuple[float, float], aspect: tuple[float, float], number: float) -> Any:
        area = int(side * side * (scale[0] + number * (scale[1] - scale[0])))
        ratio = aspect[0] + number * (aspect[1] - aspect[0])
        return (
            min(round(math.sqrt(area * ratio)), side - 1),
            min(round(math.sqrt(area / ratio)), side - 1),
        )

    def placed(height: int, width: int) -> NDArray[np.bool_]:
        numbers = next(attempts)
        top, left = int(numbers[0] * (side - height)), int(numbers[1] * (side - width))
        block = np.zeros((side, side), np.bool_)
        block[top : top + height, left : left + width] = True
        return block

    target_size = size(mask.target_scale, mask.target_aspect, sizes[0])
    context_size = size(mask.context_scale, (1, 1), sizes[1])
    contexts, targets = [], []
    for _ in range(samples):
        own = [placed(*target_size) for _ in range(mask.targets)]
        context, moves = np.zeros((side, side), np.bool_), 0
        while context.sum() <= mask.min_keep:
            context = placed(*context_size)
            for target in own[: max(mask.targets - moves // 20, 0)]:
                context &= ~target
            moves += 1
        contexts.append(context)
        targets.append(own)
    return np.array(contexts), np.array(targets)


def cut_alike(contexts: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[samples, N]: each context's first patches, as many as the smallest has."""
    flat = contexts.reshape(len(contexts), -1)
    return flat & (flat.cumsum(axis=1) <= flat.sum(axis=1).min())


def of_blocks(masks: NDArray[np.bool_]) -> Sample:
    """What is compared of one sample's masks of every group, bool [n, 1 + targets, N]."""
    side = math.isqrt(masks.shape[-1])
    pictures = masks.reshape(*masks.shape[:2], side, side)
    first = pictures[:, 1]
    return {
        **{f"context's {name}": value for name, value in shapes(~pictures[:, 0]).items()},
        "target's height": first.any(axis=2).sum(axis=1),
        "target's width": first.any(axis=1).sum(axis=1),
        "target's top": first.any(axis=2).argmax(axis=1),
        "target's left": first.any(axis=1).argmax(axis=1),
        "patches in targets": pictures[:, 1:].any(axis=1).sum(axis=(1, 2)),
    }


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(
    ("side", "mask"),
    [
        (14, MultiBlockMask(1)),  # I-JEPA's ViT-B and L
        (16, MultiBlockMask(1, targets=2)),  # its ViT-H
        (8, MultiBlockMask(1, min_keep=4, target_aspect=(1, 1.5), context_scale=(0.5, 0.8))),
    ],
)
def test_multi_block_masks_are_distributed_as_published(
    side: int, mask: MultiBlockMask, group: int
) -> None:
    attempts, theirs = randomly(0), []
    for _ in range(1500):
        contexts, targets = ijepas_masks(side, mask, next(attempts)[:2], attempts, group)
        own = targets[-1].reshape(-1, side * side)
        theirs.append([~cut_alike(contexts)[-1], *own])

    def ours(declared: MultiBlockMask) -> Sample:
        return of_blocks(mask_of(3000 * group, declared, side, group=group)[group - 1 :: group])

    (low, high), (least, most) = mask.context_scale, mask.target_scale
    wrong = [
        replace(mask, context_scale=(low - 0.2, high)),
        replace(mask, context_scale=(low - 0.2, low)),
        replace(mask, target_scale=(least - 0.02, most - 0.02)),
        replace(mask, target_aspect=(0.6, 1.5)),
        replace(mask, target_aspect=(0.75, 1.2)),
    ]
    assert_same_distribution(of_blocks(np.array(theirs)), ours, mask, wrong)


MULTI_BLOCK_MASKS = st.builds(
    lambda context, target, aspect, targets, min_keep: MultiBlockMask(
        1,
        (min(context), max(context)),
        (min(target), max(target)),
        (min(aspect), max(aspect)),
        targets,
        min_keep,
    ),
    st.tuples(st.floats(0.2, 1), st.floats(0.2, 1)),
    st.tuples(st.floats(0.05, 0.9), st.floats(0.05, 0.9)),
    st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)),
    st.integers(1, 5),
    st.integers(1, 12),
)


@settings(max_examples=60)
@given(mask=MULTI_BLOCK_MASKS, side=st.integers(1, 16), group=st.sampled_from([1, 2, 4]))
def test_multi_block_masks_are_those_of_the_published_algorithm(
    mask: MultiBlockMask, side: int, group: int
) -> None:
    try:
        masks = mask_of(2 * group, mask, side, group=group)
    except RecipeError:
        assume(False)
        raise
    assert masks.shape == (2 * group, 1 + mask.targets, side * side)
    for number in range(2):
        sizes = next(replayed(number, Scope.GROUP))[:2]
        contexts, targets = [], []
        for sample in range(number * group, (number + 1) * group):
            context, own = ijepas_masks(side, mask, sizes, replayed(sample), 1)
            contexts.append(context[0])
            targets.append(own[0])
        rows = masks[number * group : (number + 1) * group]
        assert np.array_equal(rows[:, 1:].reshape(group, -1, side, side), np.array(targets))
        assert np.array_equal(~rows[:, 0], cut_alike(np.array(contexts)))


@settings(max_examples=40)
@given(
    side=st.integers(5, 20),
    targets=st.integers(1, 6),
    min_keep=st.integers(1, 5),
    group=st.sampled_from([1, 2, 8]),
    seed=st.integers(0, 2**64 - 1),
)
def test_what_a_method_may_rely_on(
    side: int, targets: int, min_keep: int, group: int, seed: int
) -> None:
    mask = MultiBlockMask(1, (0.6, 1.0), (0.2, 0.3), (0.75, 1.5), targets, min_keep)
    masks = mask_of(3 * group, mask, side, group=group, seed=seed)
    for rows in np.split(masks, 3):
        contexts, blocks = ~rows[:, 0], rows[:, 1:].reshape(-1, side, side)
        # All targets of a group are blocks of one size, and all contexts as long.
        sizes = {(int(b.any(axis=1).sum()), int(b.any(axis=0).sum())) for b in blocks}
        assert len(sizes) == 1
        ((height, width),) = sizes
        assert set(blocks.sum(axis=(1, 2)).tolist()) == {height * width}
        assert len({int(context.sum()) for context in contexts}) == 1
        assert contexts[0].sum() > min_keep
        everything = np.concatenate([contexts.reshape(-1, side, side), blocks])
        assert not everything[:, -1].any(), "the published code never reaches the last row"
        assert not everything[:, :, -1].any()
        # A context holds nothing of the first target unless it had to be drawn 20 times per target.
        overlap = [
            bool((context & row[1]).any()) for context, row in zip(contexts, rows, strict=True)
        ]
        small = (side - 1) ** 2 - targets * height * width <= min_keep
        assert small or not any(overlap)


def test_targets_and_context_are_apart_where_there_is_room() -> None:
    masks = mask_of(4000, MultiBlockMask(16), 224, group=8)
    contexts, targets = ~masks[:, 0], masks[:, 1:].any(axis=1)
    assert not (contexts & targets).any()
    assert contexts.sum(axis=1).min() > 10


@pytest.mark.parametrize(
    ("mask", "size", "message"),
    [
        (MultiBlockMask(16), 16, "'v': MultiBlockMask has contexts of 1 of 1 x 1 patches; .* 10$"),
        (MultiBlockMask(16, min_keep=1), 32, "contexts of 1 of 2 x 2 patches"),
        (MultiBlockMask(4, min_keep=12), 32, "targets at most of 12 of 8 x 8 patches"),
        (MultiBlockMask(4, (0.1, 1.0), min_keep=8), 32, "contexts of 4 of 8 x 8 patches"),
    ],
)
def test_multi_block_masks_that_cannot_be_are_refused(
    mask: MultiBlockMask, size: int, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        mask_of(1, mask, size)
    assert mask_of(1, mask, 16 * mask.patch_pixels).any()
