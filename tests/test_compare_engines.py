"""Every op and every recipe through every engine, held to its limit; and the tool that says so."""

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from headrace.pipelines import engines, recipes
from headrace.pipelines.approximation import APPROXIMATIONS
from headrace.pipelines.batch import Batch, Erased, Mixed
from headrace.pipelines.engines.device_stage import normalize
from headrace.pipelines.ops import RAND_AUGMENT_OPERATIONS, RandAugment
from headrace.shards.pixels import decode_rgb
from headrace.shards.store import Store, open_store

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = 6


cases: Any = import_module("headrace.tools.compare_cases")
tool: Any = import_module("headrace.tools.compare_engines")
CASES = {case.name: case for case in cases.op_cases()} | {
    case.name: case for case in cases.recipe_cases(list(recipes.NAMED), SAMPLES)
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight overlapping parts of a real photograph as JPEGs, wide and high ones."""
    root = tmp_path_factory.mktemp("compare") / "photos"
    (root / "train" / "parts").mkdir(parents=True)
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(path) as photograph:
        for number in range(8):
            width, height = (500, 375) if number % 2 == 0 else (330, 460)
            left, top = 12 * (number % 2), 140 * number // 8
            part = photograph.crop((left, top, left + width, top + height))
            part.save(root / "train" / "parts" / f"{number}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def store(data: Path) -> Store:
    return open_store(data, "train")


def held(case: Any, store: Store, engine: engines.EngineName) -> None:
    work = tool.work_for(case, store, SAMPLES, seed=3)
    outcomes = {name: tool.execute(name, case, work, 2) for name in ("reference", engine)}
    line = tool.compared(case, "reference", engine, outcomes)
    assert line["holds"], tool._sentence(line)
    if not line["supported"]:
        pytest.skip(line["reason"])


@pytest.mark.parametrize("name", CASES)
def test_fused_holds_its_limits(name: str, store: Store) -> None:
    held(CASES[name], store, "fused")


@pytest.mark.dali
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_dali_holds_its_limits(name: str, store: Store) -> None:
    held(CASES[name], store, "dali")


def test_all_ops_and_operations_are_compared() -> None:
    """What no case has cannot be held to anything: a new op needs a case."""
    from typing import get_args

    from headrace.pipelines.ops import Op

    op_cases = [case for case in CASES.values() if case.kind == "op"]
    executed = [op for case in op_cases for op in case.augmentation.flat_views[0].executed]
    assert {type(op) for op in executed} == set(get_args(Op))
    alone = {op.operations for op in executed if isinstance(op, RandAugment)}
    assert alone == {(operation,) for operation in RAND_AUGMENT_OPERATIONS}
    fills = {view.erase.fill for case in op_cases for view in case.augmentation.views if view.erase}
    assert fills == {"const", "rand", "pixel"}
    assert [name for name, case in CASES.items() if case.kind == "recipe"] == list(recipes.NAMED)
    assert len(CASES) == len(op_cases) + len(recipes.NAMED)  # no two are called the same


def test_an_op_happens_to_most_pictures(store: Store) -> None:
    """Nothing agrees because nothing was done."""
    for name, case in CASES.items():
        if case.source in ("square", "faded") and not case.finished and "blur" not in name:
            work = tool.work_for(case, store, 4, 0)
            made = tool.execute("reference", case, work, 1).batch.views[0]
            untouched = np.stack([np.asarray(decode_rgb(data)) for data in work.encoded])
            changed = (made.permute(0, 2, 3, 1).numpy() != untouched).any(axis=(1, 2, 3))
            assert changed.mean() >= 0.5, name


def batch_of(*views: torch.Tensor, **held: Any) -> Batch:
    count = len(views[0])
    return Batch(
        views=views,
        labels=torch.arange(count),
        ids=torch.arange(count),
        masks=held.pop("masks", (None,) * len(views)),
        epoch=0,
        position=0,
        **held,
    )


def test_distance_is_in_levels_over_all_values() -> None:
    recipe = recipes.moco_v1(8)
    one = torch.full((5, 3, 8, 8), 100, dtype=torch.uint8)
    other = one.clone()
    other[0, :, 0, 0] = torch.tensor([103, 90, 100])  # both signs, and no wrap at 0
    found = tool.distance(batch_of(one, one), batch_of(one, other), recipe)
    assert found.mean == pytest.approx(13 / (2 * one.numel()))
    assert (found.percentile_99, found.maximum) == (0, 10)
    finished = [normalize(view, recipe.mean, recipe.std) for view in (one, other)]
    scaled = tool.distance(batch_of(finished[0]), batch_of(finished[1]), recipe)
    assert scaled.mean == pytest.approx(13 / one.numel(), rel=1e-4)
    assert scaled.maximum == pytest.approx(10, rel=1e-4)
    far = torch.zeros_like(one)
    assert tool.distance(batch_of(far), batch_of(far + 255), recipe).maximum == 255


def test_a_percentile_is_one(store: Store) -> None:
    del store
    ramp = torch.arange(200, dtype=torch.uint8).repeat(3).reshape(1, 3, 10, 20)
    found = tool.distance(batch_of(ramp), batch_of(torch.zeros_like(ramp)), recipes.simclr(8))
    assert found.percentile_99 == pytest.approx(np.percentile(np.arange(200), 99), abs=1)


def test_facts_are_compared_exactly() -> None:
    view = torch.zeros((2, 3, 4, 4), dtype=torch.uint8)
    mask = torch.tensor([[True, False], [False, True]])
    mixed = Mixed(
        torch.tensor([1, 0]), torch.tensor([1, 0]), torch.ones(2), torch.zeros(2, 4).int()
    )
    erased = Erased(torch.zeros(2, 1, 4).int(), keys=torch.tensor([1, 2]))

    def made(**other: Any) -> Batch:
        whole: dict[str, Any] = {
            "masks": (mask,), "mixed": mixed, "erased": (erased,), "draws": {"r": torch.ones(2)},
        }  # fmt: skip
        return batch_of(view, **(whole | other))

    assert tool.facts_equal(made(), made())
    for other in (
        {"masks": (~mask,)},
        {"masks": (None,)},
        {"mixed": None},
        {"mixed": replace(mixed, weights=torch.tensor([1.0, 0.5]))},
        {"erased": (replace(erased, keys=torch.tensor([1, 3])),)},
        {"erased": (replace(erased, keys=None, colors=torch.zeros(2, 1, 3)),)},
        {"draws": {"r": torch.zeros(2)}},
        {"draws": {}},
    ):
        assert not tool.facts_equal(made(), made(**other))


def test_limits_depend_on_op_and_engine_and_approximations_are_named() -> None:
    """An approximation is not held to a single op's limit, but what it costs a recipe is."""
    black = torch.zeros((2, 3, 224, 224), dtype=torch.uint8)
    reference = tool.Outcome(batch_of(black))
    for name, engine, levels, holds in (
        ("flip", "fused", 1, True), ("flip", "fused", 2, False), ("flip", "dali", 2, False),
        ("hue", "fused", 2, False), ("hue", "dali", 2, True), ("hue", "dali", 3, False),
        ("mae", "fused", 2, True), ("mae", "fused", 3, False), ("mae", "dali", 4, True),
        ("mae", "dali", 5, False),
    ):  # fmt: skip
        other = tool.Outcome(batch_of(black + levels))
        found = tool.compared(
            CASES[name], "reference", engine, {"reference": reference, engine: other}
        )
        assert (found["holds"], found["mean_levels"]) == (holds, levels)
        asked = replace(other, approximate=("equalize-opencv",))
        found = tool.compared(
            CASES[name], "reference", engine, {"reference": reference, engine: asked}
        )
        assert found["holds"] == (holds or name != "mae")
        assert found["approximate"] == ["equalize-opencv"]
    # Between two engines the wider limit holds.
    other = {"fused": reference, "dali": tool.Outcome(batch_of(black + 2))}
    assert tool.compared(CASES["hue"], "fused", "dali", other)["limit_levels"] == 2
    # What differs in a fact is broken however alike the pixels are.
    masked = tool.Outcome(batch_of(black, masks=(torch.ones(2, 4, dtype=torch.bool),)))
    found = tool.compared(
        CASES["flip"], "reference", "fused", {"reference": reference, "fused": masked}
    )
    assert (found["mean_levels"], found["holds"]) == (0, False)


def test_the_fewest_approximations_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: set[str] = set()

    def refuses(
        _name: str, _recipe: object, _device: object, allowed: tuple[str, ...]
    ) -> list[str]:
        return [f"needs {name}" for name in wanted - set(allowed)]

    monkeypatch.setattr(engines, "unsupported", refuses)
    recipe = recipes.deit()
    assert tool.needed("dali", recipe) == ()
    for name in APPROXIMATIONS:
        wanted.clear()
        wanted.add(name)
        assert tool.needed("dali", recipe) == (name,)
    wanted.update(APPROXIMATIONS)
    assert tool.needed("dali", recipe) == APPROXIMATIONS
    wanted.add("a way that there is not")
    assert tool.needed("dali", recipe) is None
    outcome = tool.execute("dali", CASES["deit"], None, 1)
    assert outcome.batch is None
    assert outcome.reason == "needs a way that there is not"
    line = tool.compared(
        CASES["deit"], "reference", "dali", {"reference": outcome, "dali": outcome}
    )
    assert (line["supported"], line["holds"]) == (False, True)


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen() -> Iterator[Any]:
        yield from (CASES["flip"], CASES["Gaussian blur"])

    monkeypatch.setattr(tool, "op_cases", chosen)


@pytest.mark.usefixtures("few_cases")
def test_the_tool_measures_prints_and_writes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "lines.jsonl"
    arguments = ["--data", str(data), "--engine", "fused", "--samples", "4", "--json", str(out)]
    assert tool.main([*arguments, "--recipe", "mae", "--markdown"]) == 0
    said = capsys.readouterr().out
    assert "| whole recipe | `fused` |" in said
    assert "3 comparisons, 0 beyond their limit" in said
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["flip", "Gaussian blur", "mae"]
    assert lines[0]["mean_levels"] == 0
    for line in lines:
        assert (line["against"], line["engine"]) == ("reference", "fused")
        assert line["facts_equal"]
        assert {"machine", "versions", "date", "samples", "limit_levels"} <= line.keys()
        assert {"python", "torch", "torchvision", "pillow", "numba"} <= line["versions"].keys()
    assert tool.main([*arguments, "--recipe", "none"]) == 0
    assert len(out.read_text().splitlines()) == 5  # appended


@pytest.mark.usefixtures("few_cases")
def test_the_tool_ends_with_1_and_names_the_op(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cases.LIMITS, "exact", {"fused": -1.0})
    arguments = ["--data", str(data), "--engine", "fused", "--recipe", "none", "--samples", "4"]
    assert tool.main(arguments) == 1
    said = capsys.readouterr()
    assert "broken: op 'flip', reference and fused: 0.000 levels on average, limit -1" in said.err
    assert "1 beyond their limit" in said.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--samples", "9"], "--samples is 9"),
        (["--recipe", "dinos"], "did you mean dino?"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_the_tool_says_what_is_wrong(
    data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert tool.main(["--data", str(data), "--no-ops", "--samples", "4", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said


def test_groups_fit_the_samples() -> None:
    """A recipe that mixes groups of 64 can be compared on 44 photographs, and on an odd number."""
    for samples, group in ((44, 44), (7, 6), (128, 64)):
        (case,) = cases.recipe_cases(["deit"], samples)
        assert case.augmentation.group == group
        assert case.finished
    (case,) = cases.recipe_cases(["dino"], 7)
    assert (case.augmentation, case.finished) == (recipes.dino(), False)
