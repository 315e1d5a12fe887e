"""Plans: reproducible, independent of batches, distributed as torchvision's samplers."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision import transforms

from pipelines import draw as draw_module
from pipelines import order as order_module
from pipelines import philox, recipes
from pipelines import plan as plan_module
from pipelines.counters import (
    EPOCH_LIMIT,
    ID_LIMIT,
    OCCURRENCE_LIMIT,
    Kind,
    PlanError,
    Scope,
    counters,
)
from pipelines.draw import draw
from pipelines.order import Order
from pipelines.philox import words
from pipelines.plan import Plan
from pipelines.recipe import (
    Augmentation,
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Op,
    RandomMask,
    RandomResizedCrop,
    Resize,
    Solarize,
    View,
)

GOLDEN = Path(__file__).parent / "golden" / "plan.npz"

JITTER = ColorJitter(0.4, 0.4, 0.2, 0.1, probability=0.8)
EVERY_OP = Augmentation(
    "every op",
    (
        View(
            "all",
            (
                RandomResizedCrop(32, (0.2, 1.0)),
                Flip(),
                JITTER,
                Grayscale(),
                GaussianBlur(),
                Solarize(),
                Flip(0.3),
            ),
            count=2,
        ),
        View("masked", (RandomResizedCrop(32),), mask=RandomMask(8, 0.75)),
        View("test", (Resize(40), CenterCrop(32))),
    ),
)


def drawn(
    augmentation: Augmentation,
    ids: NDArray[np.int64] | int,
    *,
    seed: int = 1,
    epoch: int = 0,
    height: int = 300,
    width: int = 400,
    occurrences: NDArray[np.int32] | None = None,
) -> Plan:
    ids = np.arange(ids) if isinstance(ids, int) else ids
    if occurrences is None:
        occurrences = np.zeros(len(ids), np.int32)
    sizes = np.tile(np.array([height, width], np.int32), (len(ids), 1))
    return draw(
        augmentation,
        seed=seed,
        epoch=epoch,
        position=0,
        ids=ids,
        occurrences=occurrences,
        sizes=sizes,
    )


def one(op: Op, *, size: int = 32) -> Augmentation:
    first = () if isinstance(op, RandomResizedCrop) else (RandomResizedCrop(size),)
    return Augmentation("one", (View("one", (*first, op)),))


def columns(
    op: Op, samples: int = 4000, *, height: int = 300, width: int = 400
) -> dict[str, NDArray]:
    return dict(drawn(one(op), samples, height=height, width=width).views[0].ops[-1])


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


@settings(deadline=None)
@given(fields=FIELDS)
def test_a_counter_can_be_read_back(fields: dict[str, int]) -> None:
    """Every field has bits of its own, so different draws have different counters."""
    chosen = dict(fields)
    index = np.array([chosen.pop("index")])
    array = counters(index=index, **chosen)  # pyright: ignore[reportArgumentType]
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


def test_the_last_block_of_a_draw_fits() -> None:
    index = np.array([0])
    largest = counters(Scope.SAMPLE, Kind.MASK, index, blocks=2**20)
    assert len(np.unique(largest[:, 3])) == 2**20
    assert set((largest[:, 3] >> 26).tolist()) == {Kind.MASK}
    with pytest.raises(PlanError, match="block of random words is 1048576"):
        counters(Scope.SAMPLE, Kind.MASK, index, blocks=2**20 + 1)
    with pytest.raises(PlanError, match="view is 1024"):
        counters(Scope.SAMPLE, Kind.FLIP, index, view=1024)
    with pytest.raises(PlanError, match="ops of its kind is 64"):
        counters(Scope.SAMPLE, Kind.FLIP, index, ordinal=64)


def test_no_two_draws_of_a_run_share_a_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[bytes] = []

    def recording(seed: int, array: NDArray[np.uint32]) -> NDArray[np.uint32]:
        recorded.extend(row.tobytes() for row in array)
        return words(seed, array)

    monkeypatch.setattr(draw_module, "words", recording)
    ids = np.array([0, 1, 2**32, 2**32 + 1, 2**40 - 1])
    for epoch in range(3):
        for occurrence in range(2):
            copies = np.full(len(ids), occurrence, np.int32)
            drawn(EVERY_OP, ids, epoch=epoch, occurrences=copies)
    monkeypatch.setattr(order_module, "words", recording)
    starts = np.arange(0, 101, 20)
    for epoch in range(3):
        Order(100, 50, seed=1, holdout=0.1).at(epoch, np.array([0]))
        order = Order(
            100, 50, seed=1, shuffle="window", window_shards=2, shard_starts=starts, drop_last=False
        )
        order.at(epoch, np.arange(100))
    holdout = counters(Scope.ORDER, Kind.HOLDOUT, np.array([0]), blocks=5)
    unique = set(recorded)
    # The hold-out's permutation is the one that is asked for again in every epoch.
    repeated = {row.tobytes() for row in holdout}
    assert len(recorded) - len(unique) == 2 * len(repeated)
    assert repeated <= unique


# Independence of the batch


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=12, unique=True),
    cut=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
)
def test_a_slice_of_a_plan_is_the_plan_of_the_slice(
    ids: list[int], cut: tuple[int, int], seed: int, epoch: int
) -> None:
    batch = np.array(ids)
    occurrences = (batch % 3).astype(np.int32)
    sizes = np.stack([batch % 500 + 1, batch % 300 + 1], axis=1).astype(np.int32)

    def draw_rows(rows: slice) -> Plan:
        return draw(
            EVERY_OP,
            seed=seed,
            epoch=epoch,
            position=64,
            ids=batch[rows],
            occurrences=occurrences[rows],
            sizes=sizes[rows],
        )

    whole = draw_rows(slice(None))
    rows = slice(*cut)
    assert whole.rows(rows).equal(draw_rows(rows))
    assert whole.rows(slice(None, None, -1)).equal(draw_rows(slice(None, None, -1)))


def test_everything_that_keys_a_draw_moves_it() -> None:
    base = drawn(EVERY_OP, 64)
    others = [
        drawn(EVERY_OP, np.arange(64, 128)),
        drawn(EVERY_OP, 64, seed=2),
        drawn(EVERY_OP, 64, epoch=1),
        drawn(EVERY_OP, 64, occurrences=np.ones(64, np.int32)),
    ]
    ops = base.views[0].ops
    pairs = [*((base.views[0], other.views[0]) for other in others), base.views[:2]]
    for mine, theirs in pairs:
        for op, other in zip(mine.ops, theirs.ops, strict=True):
            for name in op:
                assert not np.array_equal(op[name], other[name]), name
    # Two ops of one kind in a view are drawn apart, and no kind follows another.
    gates = np.stack([ops[place]["apply"] for place in (1, 2, 3, 5, 6)])
    assert len(np.unique(gates, axis=0)) == len(gates)


def test_draws_of_ops_views_and_samples_are_uncorrelated() -> None:
    half = tuple(op(0.5) for op in (Flip, Grayscale, Solarize, Flip))
    view = View("v", (RandomResizedCrop(8), *half), count=3)
    plan = drawn(Augmentation("a", (view,)), 4000)
    gates = np.stack([op["apply"] for view in plan.views for op in view.ops[1:]]).astype(float)
    gates = np.concatenate([gates, np.roll(gates, 1, axis=1)])
    correlation = np.corrcoef(gates) - np.eye(len(gates))
    assert np.abs(correlation).max() < 5 / math.sqrt(4000)


def test_what_is_stable_when_a_recipe_changes() -> None:
    crop = RandomResizedCrop(32)
    before = drawn(Augmentation("a", (View("v", (crop, Flip(), JITTER, Grayscale())),)), 200)
    after = drawn(
        Augmentation(
            "a",
            (
                View("v", (crop, GaussianBlur(), JITTER, Solarize(), Flip(), Flip(0.9))),
                View("w", (crop,), mask=RandomMask(8)),
            ),
        ),
        200,
    )
    box, flip, jitter, _ = before.views[0].ops
    ops = after.views[0].ops
    for old, new in ((box, ops[0]), (jitter, ops[2]), (flip, ops[4])):
        for name in old:
            assert np.array_equal(old[name], new[name])
    # A larger probability applies an op to more samples, never to others.
    often = columns(Flip(0.9), 200)["apply"]
    seldom = columns(Flip(0.2), 200)["apply"]
    assert (often | ~seldom).all()


# What each op draws


def plain_crop(seed: int, sample: int, op: RandomResizedCrop, height: int, width: int) -> list[int]:
    """torchvision's get_params in plain Python, on the words of the sample's counters."""
    rows = counters(Scope.SAMPLE, Kind.CROP, np.array([sample]), blocks=10)
    low, high = (math.log(ratio) for ratio in op.ratio)
    for row in words(seed, rows).tolist():
        area_uniform, ratio_uniform = row[0] / 2**32, row[1] / 2**32
        area = height * width * (op.scale[0] + area_uniform * (op.scale[1] - op.scale[0]))
        ratio = math.exp(low + ratio_uniform * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return [row[2] * (height - h + 1) // 2**32, row[3] * (width - w + 1) // 2**32, h, w]
    if width / height < min(op.ratio):
        w, h = width, round(width / min(op.ratio))
    elif width / height > max(op.ratio):
        w, h = round(height * max(op.ratio)), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize(
    ("op", "height", "width"),
    [
        (RandomResizedCrop(224), 375, 500),
        (RandomResizedCrop(224, (0.4, 1.0)), 500, 333),
        (RandomResizedCrop(96, (0.05, 0.4)), 60, 1000),
        (RandomResizedCrop(96, (0.9, 1.0)), 1000, 60),
        (RandomResizedCrop(16, (1.0, 1.0), (1.0, 1.0)), 33, 32),
        (RandomResizedCrop(16, (0.5, 0.5), (2.0, 2.0)), 7, 5),
        (RandomResizedCrop(16), 1, 1),
        (RandomResizedCrop(16), 1, 4000),
        (RandomResizedCrop(16), 60_000, 60_000),
    ],
)
def test_crop_is_torchvisions_algorithm(op: RandomResizedCrop, height: int, width: int) -> None:
    boxes = columns(op, 300, height=height, width=width)["box"]
    assert boxes.dtype == np.int32
    expected = [plain_crop(1, sample, op, height, width) for sample in range(300)]
    assert np.abs(boxes - np.array(expected)).max() <= 1
    assert (boxes >= [0, 0, 1, 1]).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= [height, width]).all()


def kolmogorov_smirnov(first: NDArray, second: NDArray) -> float:
    """The two-sample statistic in units in which 2.2 is exceeded once in 8,000 times."""
    places = np.sort(np.concatenate([first, second]))
    distance = np.abs(
        np.searchsorted(np.sort(first), places, side="right") / len(first)
        - np.searchsorted(np.sort(second), places, side="right") / len(second)
    ).max()
    return float(distance * math.sqrt(len(first) * len(second) / (len(first) + len(second))))


@pytest.mark.parametrize(
    ("scale", "height", "width"),
    [
        ((0.08, 1.0), 375, 500),
        ((0.4, 1.0), 500, 333),
        ((0.05, 0.4), 200, 900),
        ((0.2, 1.0), 32, 32),
    ],
)
def test_crop_is_distributed_as_torchvisions(
    scale: tuple[float, float], height: int, width: int
) -> None:
    picture = torch.empty(3, height, width, dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = np.array(
            [
                transforms.RandomResizedCrop.get_params(picture, list(scale), [3 / 4, 4 / 3])
                for _ in range(3000)
            ]
        )
    ours = columns(RandomResizedCrop(96, scale), 6000, height=height, width=width)["box"]
    quantities: list[Callable[[NDArray], NDArray]] = [
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 2],
        lambda box: box[:, 3],
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 2] / box[:, 3],
        lambda box: box[:, 0] - box[:, 1],
    ]
    for quantity in quantities:
        assert kolmogorov_smirnov(quantity(ours), quantity(theirs)) < 2.2
    wrong = columns(RandomResizedCrop(96, (scale[0] + 0.05, scale[1])), height=height, width=width)
    area = quantities[4]
    assert kolmogorov_smirnov(area(wrong["box"]), area(theirs)) > 2.2  # the test has power


@pytest.mark.parametrize("strengths", [(0.4, 0.4, 0.2, 0.1), (0.8, 1.5, 0.8, 0.5)])
def test_jitter_is_distributed_as_torchvisions(strengths: tuple[float, ...]) -> None:
    module = transforms.ColorJitter(*strengths)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sampled = [
            transforms.ColorJitter.get_params(
                module.brightness,  # pyright: ignore[reportArgumentType]
                module.contrast,  # pyright: ignore[reportArgumentType]
                module.saturation,  # pyright: ignore[reportArgumentType]
                module.hue,  # pyright: ignore[reportArgumentType]
            )
            for _ in range(3000)
        ]
    ours = columns(ColorJitter(*strengths, probability=0.8), 6000)
    assert (ours["factors"].dtype, ours["order"].dtype) == (np.float32, np.int8)
    for place in range(4):
        theirs = np.array([row[1 + place] for row in sampled], np.float64)
        assert kolmogorov_smirnov(ours["factors"][:, place], theirs) < 2.2
    assert np.array_equal(np.sort(ours["order"], axis=1), np.tile(np.arange(4), (6000, 1)))
    assert chi_square(ours["order"] @ [64, 16, 4, 1], 24) < 23 + 4 * math.sqrt(2 * 23)
    assert abs(ours["apply"].mean() - 0.8) < 5 * math.sqrt(0.8 * 0.2 / 6000)
    correlation = np.corrcoef(np.column_stack([ours["factors"], ours["apply"]]).T) - np.eye(5)
    assert np.abs(correlation).max() < 5 / math.sqrt(6000)


def chi_square(outcomes: NDArray, kinds: int) -> float:
    _, counts = np.unique(outcomes, return_counts=True)
    assert len(counts) == kinds
    expected = len(outcomes) / kinds
    return float(((counts - expected) ** 2 / expected).sum())


def test_jitter_of_no_strength_changes_nothing() -> None:
    factors = columns(ColorJitter(0, 0, 0, 0))["factors"]
    assert np.array_equal(factors, np.tile(np.array([1, 1, 1, 0], np.float32), (4000, 1)))


@pytest.mark.parametrize("op", [Flip, Grayscale, Solarize])
@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_gates_open_as_often_as_declared(op: type[Flip], probability: float) -> None:
    gate = columns(op(probability))["apply"]
    assert gate.dtype == np.bool_
    assert abs(gate.mean() - probability) <= 5 * math.sqrt(probability * (1 - probability) / 4000)


def test_blur_sigma_is_uniform_or_zero() -> None:
    sigma = columns(GaussianBlur(0.5, (0.1, 2.0)))["sigma"]
    assert sigma.dtype == np.float32
    applied = sigma[sigma > 0]
    assert abs(len(applied) / 4000 - 0.5) < 5 * math.sqrt(0.25 / 4000)
    assert kolmogorov_smirnov(applied, np.linspace(0.1, 2.0, 20_000)) < 2.2
    assert applied.min() >= np.float32(0.1)
    assert (columns(GaussianBlur(0.0))["sigma"] == 0).all()
    assert (columns(GaussianBlur(1.0))["sigma"] > 0).all()


def mask_of(samples: int, mask: RandomMask, size: int) -> NDArray[np.bool_]:
    view = View("v", (RandomResizedCrop(size),), mask=mask)
    removed = drawn(Augmentation("a", (view,)), samples).views[0].mask
    assert removed is not None
    return removed


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
    rows = counters(Scope.SAMPLE, Kind.MASK, np.arange(50), blocks=-(-patches // 4))
    noise = words(1, rows).reshape(50, -1)[:, :patches]
    ranks = np.argsort(np.argsort(noise, axis=1, kind="stable"), axis=1, kind="stable")
    assert np.array_equal(removed, ranks >= kept)


def test_mask_is_uniform_over_patches_and_pairs() -> None:
    kept = ~mask_of(4000, RandomMask(8, 0.75), 32)
    assert np.abs(kept.mean(axis=0) - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 4000)
    together = (kept.T.astype(int) @ kept)[~np.eye(16, dtype=bool)] / 4000
    pair = 4 / 16 * 3 / 15
    assert np.abs(together - pair).max() < 5 * math.sqrt(pair / 4000)


def test_mask_ties_are_broken_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_module, "words", lambda seed, rows: np.full(rows.shape, 7, np.uint32))
    removed = mask_of(3, RandomMask(8, 0.75), 32)
    assert np.array_equal(removed, np.tile(np.arange(16) >= 4, (3, 1)))


def test_ops_without_draws_have_empty_columns() -> None:
    plan = drawn(recipes.center(), 3)
    assert [dict(op) for op in plan.views[0].ops] == [{}, {}]
    assert plan.views[0].mask is None


# A plan as a thing


def golden_plan() -> Plan:
    rng = np.random.default_rng(0)
    return draw(
        EVERY_OP,
        seed=0x0123456789ABCDEF,
        epoch=5,
        position=96,
        ids=rng.integers(0, 2**40, 24),
        occurrences=rng.integers(0, 3, 24).astype(np.int32),
        sizes=rng.integers(20, 700, (24, 2)).astype(np.int32),
    )


def test_plan_is_the_golden_one() -> None:
    """A change here is a change of every run: it moves PLAN_VERSION."""
    assert draw_module.PLAN_VERSION == 1
    stored, now = Plan.load(GOLDEN).arrays(), golden_plan().arrays()
    assert stored.keys() == now.keys()
    for name, array in stored.items():
        assert array.dtype == now[name].dtype
        if name.endswith(".box"):
            # Another CPU's libm may round the aspect ratio's exp differently.
            assert np.abs(array - now[name]).max() <= 1
        else:
            assert np.array_equal(array, now[name]), name


def test_plan_survives_a_file(tmp_path: Path) -> None:
    plan = golden_plan()
    path = tmp_path / "step-3.plan"
    plan.save(path)
    plan.rows(slice(0, 0)).save(path)
    plan.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["step-3.plan"]
    loaded = Plan.load(path)
    assert loaded.equal(plan)
    assert plan.equal(loaded)
    assert loaded.views[3].ops == ({}, {})
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        golden_plan().save(tmp_path / "taken")
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def test_other_files_are_no_plans(tmp_path: Path) -> None:
    path = tmp_path / "file"
    golden_plan().save(path)
    whole = path.read_bytes()
    np.savez(tmp_path / "other.npz", ids=np.arange(3))
    np.save(tmp_path / "array.npy", np.arange(3))
    contents = [
        b"",
        b"no plan",
        whole[: len(whole) // 2],
        (tmp_path / "other.npz").read_bytes(),
        (tmp_path / "array.npy").read_bytes(),
    ]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(PlanError, match="file is not a saved plan"):
            Plan.load(path)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "missing")


def test_plans_of_another_format_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_FILE_FORMAT", 2)
    golden_plan().save(tmp_path / "plan")
    monkeypatch.undo()
    with pytest.raises(PlanError, match="plan format 2; this version reads 1"):
        Plan.load(tmp_path / "plan")


def test_equal_sees_every_difference() -> None:
    plan = golden_plan()
    assert plan.equal(golden_plan())
    for changed in (
        replace(plan, seed=2),
        replace(plan, epoch=6),
        replace(plan, position=0),
        replace(plan, ids=plan.ids + 1),
        replace(plan, ids=plan.ids.astype(np.int32)),
        replace(plan, views=plan.views[:-1]),
        replace(plan, views=(*plan.views[:-1], replace(plan.views[-1], ops=({},)))),
        plan.rows(slice(1, None)),
    ):
        assert not plan.equal(changed)
        assert not changed.equal(plan)
    for name, array in plan.arrays().items():
        other = golden_plan()
        target = other.arrays()[name]
        target.flat[-1] = not target.flat[-1] if array.dtype == bool else target.flat[-1] + 1
        assert not plan.equal(other), name


def test_plan_can_be_read_by_people() -> None:
    text = str(golden_plan())
    assert "plan of 24 samples" in text
    assert "epoch 5, position 96; the first 3:" in text
    assert "view.2.mask" in text
    assert "12 of 16 removed" in text
    assert len(text.splitlines()) == 1 + len(golden_plan().arrays())
    assert "plan of 0 samples" in str(golden_plan().rows(slice(0, 0)))
    assert len(golden_plan()) == 24


def test_plan_keeps_nothing_of_the_caller() -> None:
    sizes = np.full((2, 2), 50, np.int32)
    plan = draw(
        EVERY_OP,
        seed=0,
        epoch=0,
        position=0,
        ids=np.arange(2),
        occurrences=np.zeros(2, np.int32),
        sizes=sizes,
    )
    sizes[:] = 0
    assert (plan.sizes == 50).all()


def test_kernels_compile_once_whatever_the_memory() -> None:
    sizes = np.full((8, 2), 50, np.int32)
    read_only = sizes.copy()
    read_only.flags.writeable = False
    plans = [
        draw(
            EVERY_OP,
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
    assert len(draw_module._crop_boxes.signatures) == 1
    assert len(philox._philox.signatures) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"epoch": 2**32}, "epoch is 4294967296"),
        ({"ids": np.array([0, -1])}, "ids holds -1"),
        ({"ids": np.array([0, 2**40])}, "ids holds 1099511627776"),
        ({"ids": np.array([0, 1], np.int32)}, "ids is int32"),
        ({"ids": np.array([0, 1, 2])}, r"occurrences is int32 \[2\]; it must be int32 \[3\]"),
        ({"occurrences": np.array([0, 1024], np.int32)}, "occurrences holds 1024"),
        ({"sizes": np.array([[1, 1], [0, 9]], np.int32)}, "sizes holds 0"),
        ({"sizes": np.array([[1, 1], [9, 9]])}, "sizes is int64"),
    ],
)
def test_draw_refuses_what_the_layout_cannot_hold(changes: dict, message: str) -> None:
    arguments = {
        "seed": 0,
        "epoch": 0,
        "position": 0,
        "ids": np.arange(2),
        "occurrences": np.zeros(2, np.int32),
        "sizes": np.full((2, 2), 9, np.int32),
    }
    with pytest.raises(PlanError, match=message):
        draw(EVERY_OP, **(arguments | changes))


def test_plan_and_order_need_no_torch() -> None:
    code = (
        "import sys, pipelines.plan, pipelines.order, pipelines.recipes; "
        "sys.exit(bool({'torch', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


if __name__ == "__main__":
    golden_plan().save(GOLDEN)
