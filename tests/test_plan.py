"""Plans as things: golden, saved and read, compared, cut, and read by people."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from headrace.pipelines import draw as draw_module
from headrace.pipelines import plan as plan_module
from headrace.pipelines.counters import PlanError
from headrace.pipelines.draw import draw
from headrace.pipelines.masks import RandomMask
from headrace.pipelines.ops import (
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    RandomResizedCrop,
    Resize,
    Solarize,
)
from headrace.pipelines.plan import Plan
from headrace.pipelines.recipe import Augmentation, View
from tests.draws import EVERY_MIX, EVERY_VIEW, GROUP

GOLDEN = Path(__file__).parent / "golden"

FIRST_OPS = Augmentation(
    "the ops of the first version",
    (
        View(
            "all",
            (
                RandomResizedCrop(32, (0.2, 1.0)),
                Flip(),
                ColorJitter(0.4, 0.4, 0.2, 0.1, probability=0.8),
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
# By the file in tests/golden; the first was written by a version without erasing, mixing and draws.
RECIPES = {"plan": FIRST_OPS, "plan_views": EVERY_VIEW, "plan_mix": EVERY_MIX[1]}


def plan_of(name: str) -> Plan:
    rng = np.random.default_rng(0)
    return draw(
        RECIPES[name],
        seed=0x0123456789ABCDEF,
        epoch=5,
        position=96,
        ids=rng.integers(0, 2**40, 24),
        occurrences=rng.integers(0, 3, 24).astype(np.int32),
        sizes=rng.integers(20, 700, (24, 2)).astype(np.int32),
    )


@pytest.fixture(params=RECIPES)
def plan(request: pytest.FixtureRequest) -> Plan:
    return plan_of(request.param)


@pytest.mark.parametrize("name", RECIPES)
def test_plan_is_the_golden_one(name: str) -> None:
    """A change here is a change of every run: it moves PLAN_VERSION."""
    assert draw_module.PLAN_VERSION == 1
    stored, now = Plan.load(GOLDEN / f"{name}.npz"), plan_of(name)
    old, new = stored.arrays(), now.arrays()
    assert list(old) == list(new)
    for column, array in old.items():
        assert array.dtype == new[column].dtype
        if column.endswith(".box"):
            # Another CPU may round the aspect ratio's exp differently,
            assert np.abs(array - new[column]).max() <= 1
        elif column == "mix.weight":
            # or a Beta variable.
            assert np.allclose(array, new[column], rtol=1e-6, atol=1 / 32**2)
        else:
            assert np.array_equal(array, new[column]), column


def test_plan_survives_a_file(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "step-3.plan"
    plan.save(path)
    plan.rows(slice(0, 0)).save(path)
    plan.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["step-3.plan"]
    loaded = Plan.load(path)
    assert loaded.equal(plan)
    assert plan.equal(loaded)
    for mine, theirs in zip(plan.views, loaded.views, strict=True):
        assert [list(op) for op in mine.ops] == [list(op) for op in theirs.ops]
        assert (mine.mask is None) == (theirs.mask is None)
        assert list(mine.erase) == list(theirs.erase)
    assert (list(plan.mix), list(plan.draws)) == (list(loaded.mix), list(loaded.draws))
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        plan_of("plan").save(tmp_path / "taken")
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def test_other_files_are_no_plans(tmp_path: Path) -> None:
    path = tmp_path / "file"
    plan_of("plan_mix").save(path)
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
    plan_of("plan").save(tmp_path / "plan")
    monkeypatch.undo()
    with pytest.raises(PlanError, match="plan format 2; this version reads 1"):
        Plan.load(tmp_path / "plan")


def test_equal_sees_every_difference(plan: Plan) -> None:
    def copy() -> Plan:
        return replace(
            plan.rows(slice(None)),
            ids=plan.ids.copy(),
            occurrences=plan.occurrences.copy(),
            sizes=plan.sizes.copy(),
            views=tuple(
                replace(
                    view,
                    ops=tuple(
                        {name: column.copy() for name, column in op.items()} for op in view.ops
                    ),
                    mask=None if view.mask is None else view.mask.copy(),
                    erase={name: column.copy() for name, column in view.erase.items()},
                )
                for view in plan.views
            ),
            mix={name: column.copy() for name, column in plan.mix.items()},
            draws={name: column.copy() for name, column in plan.draws.items()},
        )

    assert plan.equal(copy())
    without = {
        "ids": replace(plan, ids=plan.ids + 1),
        "type": replace(plan, ids=plan.ids.astype(np.int32)),
        "seed": replace(plan, seed=2),
        "epoch": replace(plan, epoch=6),
        "position": replace(plan, position=0),
        "views": replace(plan, views=plan.views[:-1]),
        "ops": replace(plan, views=(*plan.views[:-1], replace(plan.views[-1], ops=({},)))),
        "rows": plan.rows(slice(GROUP, None)),
        "one more": replace(plan, draws={**plan.draws, "more": plan.ids}),
        "mixed": replace(plan, mix={**plan.mix, "more": plan.ids}),
        "erased": replace(
            plan, views=(*plan.views[:-1], replace(plan.views[-1], erase={"more": plan.ids}))
        ),
    }
    for changed in without.values():
        assert not plan.equal(changed)
        assert not changed.equal(plan)
    for name in plan.arrays():
        other = copy()
        target = other.arrays()[name]
        target.flat[-1] = (
            not target.flat[-1] if target.dtype == bool else target.flat[-1] + target.dtype.type(1)
        )
        assert not plan.equal(other), name


def test_rows_of_a_plan_share_its_memory(plan: Plan) -> None:
    part = plan.rows(slice(GROUP, 3 * GROUP))
    assert (len(part), part.position) == (2 * GROUP, plan.position)
    for name, array in part.arrays().items():
        assert np.array_equal(array, plan.arrays()[name][GROUP : 3 * GROUP]), name
        assert np.shares_memory(array, plan.arrays()[name]) or array.size == 0, name
    assert [len(view.ops) for view in part.views] == [len(view.ops) for view in plan.views]
    assert plan.rows(slice(0, GROUP)).rows(slice(0)).arrays().keys() == plan.arrays().keys()


def test_plan_can_be_read_by_people(plan: Plan) -> None:
    """One line per array: the first three samples', however many numbers they have."""
    text = str(plan)
    assert "plan of 24 samples" in text
    assert "epoch 5, position 96; the first 3:" in text
    lines = text.splitlines()
    assert len(lines) == 1 + len(plan.arrays())
    assert [line.split()[0] for line in lines[1:]] == list(plan.arrays())
    assert max(map(len, lines)) < 420
    assert "plan of 0 samples" in str(plan.rows(slice(0, 0)))
    assert len(plan) == 24


def line_of(plan: Plan, name: str) -> str:
    (line,) = (line for line in str(plan).splitlines() if line.split()[0] == name)
    return line.removeprefix(f"  {name}").strip()


def test_masks_are_shown_by_their_counts() -> None:
    assert line_of(plan_of("plan"), "view.2.mask") == "  ".join(["12 of 16 removed"] * 3)
    plan = plan_of("plan_views")
    blocks, several = (view.mask for view in plan.views[2:4])
    assert blocks is not None
    assert several is not None
    shown = [f"{row.sum()} of 64 removed" for row in blocks[:3]]
    assert line_of(plan, "view.2.mask") == "  ".join(shown)
    shown = [
        f"{row[0].sum()} of 256 removed, targets of "
        + " + ".join(str(int(t.sum())) for t in row[1:])
        for row in several[:3]
    ]
    assert line_of(plan, "view.3.mask") == "  ".join(shown)
    # A draw that is called as a mask is one of numbers.
    assert line_of(plan, "draw.mask").startswith("[[0.")


def test_what_is_long_is_shown_in_part() -> None:
    plan = replace(plan_of("plan"), draws={"long": np.arange(24 * 500).reshape(24, 5, 100)})
    line = line_of(plan, "draw.long")
    assert line.startswith("[[ 0 1 2 ... 97 98 99]")
    assert "[11997" not in line


def test_plan_and_order_need_no_torch() -> None:
    code = (
        "import sys; from headrace.pipelines import plan, draw, order, recipes; "
        "sys.exit(bool({'torch', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_recipe_is_declared_with_the_standard_library_alone() -> None:
    code = (
        "import sys; from headrace.pipelines import recipe, recipes; "
        "sys.exit(bool({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_golden_plans_hold_every_column() -> None:
    """What the second files are for: everything that the first one's version did not have."""
    names: set[str] = set()
    for name in RECIPES:
        arrays: dict[str, NDArray[Any]] = plan_of(name).arrays()
        names |= {column.rpartition(".")[2] for column in arrays}
    assert names >= {
        "box", "apply", "factors", "order", "sigma", "start", "operation", "argument", "bicubic",
        "mask", "color", "key", "partner", "weight",
    }  # fmt: skip


if __name__ == "__main__":  # python -m tests.test_plan writes the files that are missing
    for missing in (name for name in RECIPES if not (GOLDEN / f"{name}.npz").exists()):
        plan_of(missing).save(GOLDEN / f"{missing}.npz")
