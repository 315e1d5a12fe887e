"""Draws: reproducible, keyed by what they say, independent of batches and of their neighbours."""

import itertools
import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.pipelines import draw as draw_module
from headrace.pipelines import draw_masks, draw_mix, permutation, philox, source
from headrace.pipelines.counters import (
    EPOCH_LIMIT,
    ID_LIMIT,
    OCCURRENCE_LIMIT,
    Kind,
    PlanError,
    Scope,
    counters,
    owners,
)
from headrace.pipelines.draw import draw
from headrace.pipelines.masks import BlockMask, MultiBlockMask, RandomMask
from headrace.pipelines.ops import (
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Op,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    Solarize,
    ViewOp,
)
from headrace.pipelines.order import Order, rank_slice
from headrace.pipelines.philox import words
from headrace.pipelines.plan import Plan
from headrace.pipelines.recipe import Augmentation, Mix, RandomErasing, View
from tests.draws import EVERY_MIX, EVERY_VIEW, EVERYTHING, GROUP, columns, drawn, one

# Counters


FIELDS = st.fixed_dictionaries(
    {
        "scope": st.sampled_from(Scope),
        "kind": st.sampled_from(Kind),
        "index": st.integers(0, ID_LIMIT - 1),
        "epoch": st.integers(0, EPOCH_LIMIT - 1),
        "occurrence": st.integers(0, OCCURRENCE_LIMIT - 1),
        "view": st.integers(0, 2**10 - 1),
        "ordinal": st.integers(0, 2**6 - 1),
        "blocks": st.integers(1, 3),
    }
)


@given(fields=FIELDS)
def test_a_counter_can_be_read_back(fields: dict[str, Any]) -> None:
    """Every field has bits of its own, so different draws have different counters."""
    whose = {name: fields[name] for name in ("scope", "epoch", "occurrence", "view")}
    array = counters(
        owners(index=np.array([fields["index"]]), **whose),
        fields["kind"],
        ordinal=fields["ordinal"],
        blocks=fields["blocks"],
    )
    assert array.dtype == np.uint32
    assert len(array) == fields["blocks"]
    for block, row in enumerate(array.tolist()):
        number = sum(word << 32 * place for place, word in enumerate(row))

        def bits(first: int, length: int, number: int = number) -> int:
            return number >> first & (1 << length) - 1

        assert bits(0, 32) | bits(64, 8) << 32 == fields["index"]
        assert bits(32, 32) == fields["epoch"]
        assert bits(72, 10) == fields["occurrence"]
        assert bits(82, 10) == fields["view"]
        assert bits(92, 2) == fields["scope"]
        assert bits(94, 2) == 0
        assert bits(96, 20) == block
        assert bits(116, 6) == fields["ordinal"]
        assert bits(122, 6) == fields["kind"]


def test_kinds_are_told_apart() -> None:
    assert len({kind.value for kind in Kind}) == len(Kind.__members__)
    assert max(Kind) < 2**6


def test_the_last_block_of_a_draw_fits() -> None:
    whose = owners(Scope.SAMPLE, np.array([0]))
    largest = counters(whose, Kind.MASK, blocks=2**20)
    assert len(np.unique(largest[:, 3])) == 2**20
    assert set((largest[:, 3] >> 26).tolist()) == {Kind.MASK}
    with pytest.raises(PlanError, match="block of random words is 1048576"):
        counters(whose, Kind.MASK, blocks=2**20 + 1)
    with pytest.raises(PlanError, match="view is 1024"):
        owners(Scope.SAMPLE, np.array([0]), view=1024)
    with pytest.raises(PlanError, match="ops of its kind is 64"):
        counters(whose, Kind.FLIP, ordinal=64)


@pytest.mark.parametrize("augmentation", EVERYTHING, ids=lambda recipe: recipe.name)
def test_no_two_draws_of_a_run_share_a_counter(
    augmentation: Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[bytes] = []

    def recording(seed: int, array: NDArray[np.uint32]) -> NDArray[np.uint32]:
        recorded.extend(row.tobytes() for row in array)
        return words(seed, array)

    monkeypatch.setattr(source, "words", recording)
    ids = np.array([0, 1, 2**32, 2**32 + 1, 2**40 - 1, 7, 8, 9])
    for epoch in range(2):
        for occurrence in range(2):
            copies = np.full(len(ids), occurrence, np.int32)
            position = len(ids) * occurrence
            drawn(augmentation, ids, epoch=epoch, position=position, occurrences=copies)
    used = {row[-1] >> 2 for row in recorded}
    assert used >= {Kind.CROP, Kind.MASK, Kind.ERASE, Kind.RAND_AUGMENT, Kind.DECLARED}
    monkeypatch.setattr(permutation, "words", recording)
    starts = np.arange(0, 101, 20)
    for epoch in range(3):
        Order(100, 50, seed=1, holdout=0.1).at(epoch, np.array([0]))
        order = Order(
            100, 50, seed=1, shuffle="window", window_shards=2, shard_starts=starts, drop_last=False
        )
        order.at(epoch, np.arange(100))
    holdout = counters(owners(Scope.ORDER, np.array([0])), Kind.HOLDOUT, blocks=5)
    unique = set(recorded)
    # The hold-out's permutation is the one that is asked for again in every epoch.
    repeated = {row.tobytes() for row in holdout}
    assert len(recorded) - len(unique) == 2 * len(repeated)
    assert repeated <= unique


# Independence of the batch


def joined(plans: list[Plan]) -> dict[str, NDArray[Any]]:
    """The arrays of plans as if they were of one batch."""
    arrays = [plan.arrays() for plan in plans]
    return {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}


def assert_equal(first: dict[str, NDArray[Any]], second: dict[str, NDArray[Any]]) -> None:
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype, name
        assert np.array_equal(array, second[name]), name


@settings(max_examples=25)
@given(
    augmentation=st.sampled_from(EVERYTHING),
    groups=st.integers(0, 4),
    cuts=st.lists(st.integers(0, 4), max_size=3),
    step=st.integers(0, 10**9),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    random=st.randoms(use_true_random=False),
)
def test_a_plan_is_the_plans_of_its_groups(
    augmentation: Augmentation,
    groups: int,
    cuts: list[int],
    step: int,
    seed: int,
    epoch: int,
    random: Any,
) -> None:
    """Cut anywhere between groups: by ranks, by micro-batches, or into other batches."""
    count = groups * GROUP
    batch = np.array([random.randrange(2**40) for _ in range(count)], np.int64)
    occurrences = (batch % 3).astype(np.int32)
    sizes = np.stack([batch % 500 + 1, batch % 300 + 1], axis=1).astype(np.int32)
    position = step * 4 * GROUP

    def draw_rows(rows: slice, *, position: int = position, first: int = 0) -> Plan:
        return draw(
            augmentation,
            seed=seed,
            epoch=epoch,
            position=position,
            first=first,
            ids=batch[rows],
            occurrences=occurrences[rows],
            sizes=sizes[rows],
        )

    whole = draw_rows(slice(count))
    assert whole.equal(draw_rows(slice(count)))
    edges = [0, *(min(cut, groups) * GROUP for cut in sorted(cuts)), count]
    slices = [slice(start, end) for start, end in itertools.pairwise(edges)]
    for rows in slices:
        assert whole.rows(rows).equal(draw_rows(rows, first=rows.start))
    parts = [draw_rows(rows, position=position + rows.start) for rows in slices]
    assert_equal(joined(parts), whole.arrays())


@settings(max_examples=25)
@given(
    ids=st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=12, unique=True),
    cut=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    position=st.integers(0, 10**9),
)
def test_without_a_group_any_slice_is_drawn_alone(
    ids: list[int], cut: tuple[int, int], position: int
) -> None:
    """In scope "sample" not even the place in the order matters."""
    recipe = Augmentation(
        "a", tuple(replace(view, count=1) for view in EVERY_VIEW.views if view.name != "pad")
    )
    recipe = replace(
        recipe,
        views=tuple(
            replace(view, ops=tuple(op for op in view.ops if getattr(op, "scope", "") != "group"))
            for view in recipe.views
        ),
    )
    whole = drawn(recipe, np.array(ids))
    rows = slice(*cut)
    assert whole.rows(rows).equal(drawn(recipe, np.array(ids)[rows]))
    elsewhere = drawn(recipe, np.array(ids)[::-1], position=position).arrays()
    assert_equal(elsewhere, whole.rows(slice(None, None, -1)).arrays())


@pytest.mark.parametrize("augmentation", EVERYTHING, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_no_world_changes_a_draw(augmentation: Augmentation, world_size: int) -> None:
    order = Order(100, 6 * GROUP, seed=3, occurrences=2)
    ids, occurrences = order.global_batch(1, 2)
    whole = drawn(augmentation, ids, position=48, occurrences=occurrences)
    shares = [rank_slice(24, world_size, rank, GROUP) for rank in range(world_size)]
    plans = [
        drawn(
            augmentation,
            ids[share],
            position=48,
            first=share.start,
            occurrences=occurrences[share],
        )
        for share in shares
    ]
    assert_equal(joined(plans), whole.arrays())
    assert {plan.position for plan in plans} == {48}


@pytest.mark.parametrize("augmentation", EVERYTHING, ids=lambda recipe: recipe.name)
def test_what_a_group_shares_is_equal_within_it_and_nothing_else_is(
    augmentation: Augmentation,
) -> None:
    shared = {"draw.order", "draw.mask"}
    if augmentation.mix and augmentation.mix.scope == "group":
        shared |= {"mix.weight", "mix.box"}
    for name, array in drawn(augmentation, 32 * GROUP).arrays().items():
        if name not in ("ids", "occurrences", "sizes") and array.size:
            groups = array.reshape(32, GROUP, -1)
            equal = (groups == groups[:, :1]).all()
            assert equal == (name in shared), name
            assert (name == "mix.partner") == (groups == groups[:1]).all(), name


def test_a_shared_blur_is_applied_to_one_and_not_to_another() -> None:
    place = EVERY_VIEW.views[0].executed.index(GaussianBlur(scope="group"))
    sigma = drawn(EVERY_VIEW, 32 * GROUP).views[0].ops[place]["sigma"].reshape(32, GROUP)
    sigmas = [set(row[row > 0].tolist()) for row in sigma]
    assert {len(found) for found in sigmas} == {0, 1}
    assert len(set[float].union(*sigmas)) == sum(map(len, sigmas)) > 16
    assert any(0 < (row > 0).sum() < GROUP for row in sigma)


@pytest.mark.parametrize("augmentation", EVERYTHING, ids=lambda recipe: recipe.name)
def test_everything_that_keys_a_draw_moves_it(augmentation: Augmentation) -> None:
    group = {"draw.order", "draw.mask"}
    both = {f"view.{index}.mask" for index, view in enumerate(augmentation.flat_views)
            if isinstance(view.mask, MultiBlockMask)}  # fmt: skip
    if augmentation is EVERY_VIEW:
        place = EVERY_VIEW.views[0].executed.index(GaussianBlur(scope="group"))
        both |= {f"view.{view}.op.{place}.sigma" for view in range(2)}
    if augmentation.mix and augmentation.mix.scope != "sample":
        group |= {"mix.weight", "mix.box"}
    base = drawn(augmentation, 64)
    others: list[tuple[set[str], Plan]] = [
        ({"sample"}, drawn(augmentation, np.arange(64, 128))),
        ({"sample", "group"}, drawn(augmentation, 64, seed=2)),
        ({"sample", "group"}, drawn(augmentation, 64, epoch=1)),
        ({"sample"}, drawn(augmentation, 64, occurrences=np.ones(64, np.int32))),
        ({"group"}, drawn(augmentation, 64, position=64)),
    ]
    for moved, other in others:
        theirs = other.arrays()
        for name, mine in base.arrays().items():
            if name in ("ids", "occurrences", "sizes", "mix.partner"):
                continue
            scopes = (
                {"sample", "group"} if name in both else {"group" if name in group else "sample"}
            )
            assert np.array_equal(mine, theirs[name]) != bool(scopes & moved), name


def test_two_draws_of_a_kind_are_two() -> None:
    """In the two views of one declaration, and of two ops of one kind within a view."""
    views = drawn(EVERY_VIEW, 64).views[:2]
    for op, other in zip(views[0].ops, views[1].ops, strict=True):
        for name in op:
            assert not np.array_equal(op[name], other[name]), name
    for erased, other in zip(views[0].erase.values(), views[1].erase.values(), strict=True):
        assert not np.array_equal(erased, other)
    arrays = drawn(EVERY_VIEW, 64).arrays()
    assert not np.array_equal(arrays["view.0.mask"], arrays["view.1.mask"])
    halves = tuple(op(0.5) for op in (Flip, Flip, Grayscale, Grayscale, Solarize, Solarize))
    ops = drawn(Augmentation("a", (View("v", (RandomCrop(8), *halves)),)), 64).views[0].ops[1:]
    assert len(np.unique([op["apply"] for op in ops], axis=0)) == 6


def test_draws_of_ops_views_and_samples_are_uncorrelated() -> None:
    half = tuple(op(0.5) for op in (Flip, Grayscale, Solarize, Flip))
    view = View("v", (RandomResizedCrop(8), *half), count=3)
    plan = drawn(Augmentation("a", (view,)), 4000)
    gates = np.stack([op["apply"] for view in plan.views for op in view.ops[1:]]).astype(float)
    gates = np.concatenate([gates, np.roll(gates, 1, axis=1)])
    correlation = np.corrcoef(gates) - np.eye(len(gates))
    assert np.abs(correlation).max() < 5 / math.sqrt(4000)


# Stability


OPS: tuple[ViewOp, ...] = (
    Flip(0.4),
    ColorJitter(0.4, 0.4, 0.2, 0.1, probability=0.8),
    Grayscale(0.3),
    GaussianBlur(0.6),
    Solarize(0.2),
    RandAugment(probability=0.7),
)
OTHERS: tuple[ViewOp, ...] = (
    Flip(0.9),
    ColorJitter(0.8, 0, 1.2, 0.5, probability=0.1, additive_brightness=True),
    Grayscale(0.0),
    GaussianBlur(1.0, (1.0, 1.5), kernel_size=9, scope="group"),
    Solarize(1.0, 7),
    RandAugment(2.0, 3.0, 5, 0.1, "random", operations=("Invert",)),
)


@given(
    place=st.integers(0, len(OPS) - 1),
    neighbours=st.lists(st.integers(0, len(OPS) - 1), max_size=5),
    changed=st.booleans(),
    before=st.integers(0, 5),
)
def test_an_op_is_drawn_alike_among_any_ops_of_other_kinds(
    place: int, neighbours: list[int], changed: bool, before: int
) -> None:
    op = OPS[place]
    others = [(OTHERS if changed else OPS)[other] for other in neighbours if other != place]
    ops = [*others[:before], op, *others[before:]]
    # RandAugment must stand after the flip; the order of the two is of no interest here.
    ops.sort(key=lambda one: isinstance(one, RandAugment) - isinstance(one, Flip))
    view = View(
        "v",
        (RandomCrop(32), *ops),
        mask=BlockMask(4) if changed else None,
        erase=RandomErasing() if changed else None,
    )
    alone = drawn(one(op), 8).views[0].ops[-1]
    among = drawn(Augmentation("a", (view, View("w", (RandomResizedCrop(8),)))), 8).views[0]
    here = view.executed.index(op)  # pyright: ignore[reportArgumentType]
    for name, column in alone.items():
        assert np.array_equal(column, among.ops[here][name]), name
    # And what lies beside the ops does not depend on them.
    bare = drawn(Augmentation("a", (replace(view, ops=(RandomCrop(32),)),)), 8).arrays()
    beside = {name: array for name, array in bare.items() if ".op." not in name}
    everything = drawn(Augmentation("a", (view,)), 8).arrays()
    assert_equal(beside, {name: everything[name] for name in beside})


def test_what_is_stable_when_a_recipe_changes() -> None:
    crop, jitter = RandomResizedCrop(32), OPS[1]
    before = drawn(Augmentation("a", (View("v", (crop, Flip(), jitter, Grayscale())),)), 200)
    after = drawn(
        Augmentation(
            "a",
            (
                View("v", (crop, GaussianBlur(), jitter, Solarize(), Flip(), Flip(0.9))),
                View("w", (crop,), mask=RandomMask(8)),
            ),
        ),
        200,
    )
    box, flip, factors, _ = before.views[0].ops
    ops = after.views[0].ops
    for old, new in ((box, ops[0]), (factors, ops[2]), (flip, ops[4])):
        for name in old:
            assert np.array_equal(old[name], new[name])
    # A larger probability applies an op to more samples, never to others.
    often = columns(Flip(0.9), 200)["apply"]
    seldom = columns(Flip(0.2), 200)["apply"]
    assert (often | ~seldom).all()
    # The last of several choices, layers or boxes can go without a trace on the others.
    fewer, more = (columns(RandAugment(num_ops=count), 200) for count in (2, 4))
    assert all(np.array_equal(fewer[name], more[name][:, :2]) for name in fewer)


def test_views_and_draws_can_be_appended() -> None:
    fewer = replace(EVERY_VIEW, views=EVERY_VIEW.views[:2], draws=EVERY_VIEW.draws[:2])
    base, more = drawn(fewer, 3 * GROUP).arrays(), drawn(EVERY_VIEW, 3 * GROUP).arrays()
    assert_equal(base, {name: more[name] for name in base})
    # Erasing, mixing and a mask are beside the ops.
    bare = tuple(replace(view, erase=None, mask=None) for view in EVERY_MIX[0].views)
    base = drawn(replace(EVERY_MIX[0], views=bare, mix=None), 3 * GROUP).arrays()
    more = drawn(replace(EVERY_MIX[0], mix=Mix()), 3 * GROUP).arrays()
    assert_equal(base, {name: more[name] for name in base})


# The shape of a plan, and what cannot be drawn


def test_views_have_the_columns_of_what_engines_execute() -> None:
    for augmentation in EVERYTHING:
        plan = drawn(augmentation, GROUP)
        for view, planned in zip(augmentation.flat_views, plan.views, strict=True):
            assert len(view.executed) == len(planned.ops)
        assert all(len(array) == GROUP for array in plan.arrays().values())
        nothing = drawn(augmentation, 0)
        assert nothing.arrays().keys() == plan.arrays().keys()
        assert all(
            (len(array), array.dtype, array.shape[1:])
            == (0, plan.arrays()[name].dtype, plan.arrays()[name].shape[1:])
            for name, array in nothing.arrays().items()
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"epoch": 2**32}, "epoch is 4294967296"),
        ({"position": -4}, "position is -4"),
        ({"position": 2**40}, "position is"),
        ({"ids": np.array([0, 1, 2, -1])}, "ids holds -1"),
        ({"ids": np.array([0, 1, 2, 2**40])}, "ids holds 1099511627776"),
        ({"ids": np.array([0, 1, 2, 3], np.int32)}, "ids is int32"),
        ({"ids": np.array([0, 1, 2])}, r"occurrences is int32 \[4\]; it must be int32 \[3\]"),
        ({"occurrences": np.array([0, 0, 0, 1024], np.int32)}, "occurrences holds 1024"),
        ({"sizes": np.array([[1, 1], [1, 1], [1, 1], [0, 9]], np.int32)}, "sizes holds 0"),
        ({"sizes": np.full((4, 2), 9)}, "sizes is int64"),
        ({"first": 2}, r"4 samples from position 2 on are no whole groups of 4, .* 'every view'"),
        ({"position": 7}, "4 samples from position 7 on are no whole groups"),
        (
            {
                "ids": np.arange(3),
                "occurrences": np.zeros(3, np.int32),
                "sizes": np.full((3, 2), 9, np.int32),
            },
            "3 samples from position 0 on are no whole groups",
        ),
    ],
)
def test_draw_refuses_what_the_layout_cannot_hold(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "seed": 0,
        "epoch": 0,
        "position": 0,
        "ids": np.arange(4),
        "occurrences": np.zeros(4, np.int32),
        "sizes": np.full((4, 2), 9, np.int32),
    }
    with pytest.raises(PlanError, match=message):
        draw(EVERY_VIEW, **(arguments | changes))


def test_draw_keeps_nothing_of_the_caller() -> None:
    sizes = np.full((4, 2), 50, np.int32)
    plan = draw(
        EVERY_VIEW,
        seed=0,
        epoch=0,
        position=0,
        ids=np.arange(4),
        occurrences=np.zeros(4, np.int32),
        sizes=sizes,
    )
    sizes[:] = 0
    assert (plan.sizes == 50).all()


def test_kernels_compile_once_whatever_the_memory() -> None:
    sizes = np.full((8, 2), 50, np.int32)
    read_only = sizes.copy()
    read_only.flags.writeable = False
    for augmentation in EVERYTHING:
        plans = [
            draw(
                augmentation,
                seed=np.int64(1),  # pyright: ignore[reportArgumentType]
                epoch=0,
                position=0,
                ids=np.arange(16)[::2],
                occurrences=np.zeros(8, np.int32),
                sizes=same,
            )
            for same in (sizes, read_only, np.repeat(sizes, 2, axis=0)[::2])
        ]
        assert plans[0].equal(plans[1])
        assert plans[0].equal(plans[2])
    drawn(one(RandomResizedCrop(8, (1, 1), (1, 1))), 2)
    erase, mask = RandomErasing(1, (1, 1), (1, 1)), BlockMask(8, (1, 1), 1, (1, 1))
    drawn(Augmentation("a", (View("v", (RandomCrop(32),), mask=mask, erase=erase),)), 1)
    drawn(replace(EVERY_MIX[0], group=2), 2)
    kernels = (
        draw_module._crop_boxes,
        draw_masks._remove_blocks,
        draw_masks._place_blocks,
        draw_mix._erase_boxes,
        philox._philox,
    )
    assert [len(kernel.signatures) for kernel in kernels] == [1] * 5


def test_ops_are_of_every_kind() -> None:
    """So that the properties above hold for a new op too, or this test reminds of it."""
    kinds = {type(op) for recipe in EVERYTHING for view in recipe.views for op in view.executed}
    assert kinds == set(get_args(Op))
