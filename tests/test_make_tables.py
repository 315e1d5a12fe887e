"""The tables on the pages: made of lines that are written here by hand."""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from headrace.pipelines import recipes
from headrace.tools import result_tables

ROOT = Path(__file__).resolve().parent.parent

tables: Any = import_module("headrace.tools.make_tables")

WHERE = {
    "date": "2026-11-22T09:00:00+00:00",
    "machine": {"processor": "AMD EPYC", "cores": 2, "memory_bytes": 8, "system": "Linux"},
    "versions": {"python": "3.11.7", "torch": "2.14.1", "nvidia-dali-cuda130": "2.4.0"},
    "samples": 44,
}


def agreement(name: str, engine: str, *levels: float, **other: Any) -> dict[str, Any]:
    mean, percentile, maximum = levels or (0.0, 0.0, 0.0)
    line = {
        "kind": "op",
        "name": name,
        "engine": engine,
        "against": "reference",
        "approximate": [],
        "supported": True,
        "reason": "",
        "mean_levels": mean,
        "percentile_99_levels": percentile,
        "maximum_levels": maximum,
        "limit_levels": 2.0,
        "holds": True,
    }
    return line | WHERE | other


def speed(recipe: str, engine: str, rate: float, **other: Any) -> dict[str, Any]:
    line = {
        "recipe": recipe,
        "engine": engine,
        "threads": 2,
        "output": "float32",
        "images_per_second": rate,
        "decode_images_per_second": 1400.0,
        "peak_memory_bytes": 10**8,
        "batch_size": 64,
    }
    return line | WHERE | other


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (0.0000312, "0.000031"), (0.18, "0.18"), (0.1999, "0.2"), (1, "1"),
        (4.25, "4.2"), (57.4, "57"), (255, "255"), (0.5, "0.5"), (120.4, "120"),
    ],
)  # fmt: skip
def test_numbers_have_two_digits_and_no_exponent(value: float, shown: str) -> None:
    assert result_tables.number(value) == shown


def test_agreement_is_a_table_of_ops_and_one_of_recipes() -> None:
    lines = [
        agreement("flip", "fused"),
        agreement("flip", "dali", 1.0, 1, 1),  # an earlier measurement
        agreement("flip", "dali", 0.25, 1, 3),
        agreement("flip", "dali", 0.5, 1, 4, against="fused"),
        agreement("Equalize", "fused", 0.00003, 0, 1),
        agreement("Equalize", "dali", 0.8, 3, 9, approximate=["equalize-opencv"]),
        agreement("Equalize", "dali", supported=False, reason="no way", against="fused"),
        agreement("dino", "fused", 0.2, 1, 7, kind="recipe"),
    ]
    assert result_tables.agreement_table(lines).splitlines() == [
        "| op | `fused` | `dali` | `dali` and `fused` |",
        "| --- | --- | --- | --- |",
        "| flip | 0 / 0 / 0 | 0.25 / 1 / 3 | 0.5 / 1 / 4 |",
        "| Equalize | <0.0001 / 0 / 1 | needs equalize-opencv: 0.8 / 3 / 9 | no: no way |",
        "",
        "| whole recipe | `fused` | `dali` | `dali` and `fused` |",
        "| --- | --- | --- | --- |",
        "| dino | 0.2 / 1 / 7 |  |  |",
    ]
    section = tables.agreement_section(lines)
    assert section.splitlines()[0] == "| op | `fused` | `dali` |"
    assert "Between `fused` and `dali` no mean is above 0.5 (flip). All limits hold." in section
    assert "44 photographs." in section
    assert "Measured 2026-11-22 on 2 cores of AMD EPYC; python 3.11.7" in section
    assert "DALI 2.4.0" in section
    broken = tables.agreement_section([*lines, agreement("hue", "fused", 3, 4, 5, holds=False)])
    assert "Beyond their limit: hue." in broken
    turned = agreement("Rotate", "dali", 3, 4, 5, approximate=["affine-bilinear"])
    said = tables.agreement_section([*lines, turned])
    assert "All limits hold but those of what is approximated: Rotate." in said


def test_speed_is_rates_and_what_the_best_of_ours_is_worth() -> None:
    lines = [
        speed("dino", "fused", 520.0, decode_share=0.38, times_peer={"torchvision": 8.66}),
        speed("dino", "dali", 80.0),
        speed("dino", "torchvision", 60.0),
        speed("dino", "fused", 300.0, threads=1),
        speed("dino", "fused", 900.0, output="uint8"),
        speed("mae", "dali", 600.0, cannot_express={"torchvision": "no reason"}),
        speed("mae", "fused", 1200.4),
        speed("mae", "dali_native", 500.0),
    ]
    assert tables.speed_section(lines).splitlines()[:9] == [
        "| images/s | decoding alone | `fused` | `dali` | `torchvision` | `dali_native` |",
        "| --- | --- | --- | --- | --- | --- |",
        "| dino | 1,400 | 520 | 80 | 60 |  |",
        "| mae | 1,400 | 1,200 | 600 | cannot | 500 |",
        "",
        "| recipe | best of ours | of decoding alone | vs `torchvision` | vs `dali_native` |",
        "| --- | --- | --- | --- | --- |",
        "| dino | `fused` | 0.38 | 8.7 x |  |",
        "| mae | `fused` | 0.86 |  | 2.4 x |",
    ]
    assert "2 threads, batches of 64." in tables.speed_section(lines)


def test_peers_are_times_of_the_best_of_ours() -> None:
    lines = [
        speed("dino", "fused", 520.0, decode_share=0.38, times_peer={"torchvision": 8.66}),
        speed("dino", "torchvision", 60.0, cannot_express=["ffcv"]),
        speed("mae", "fused", 1200.4, decode_share=0.8),
        speed("mae", "torchvision", 600.2),
        speed("mae", "ffcv", 1000.0),
    ]
    assert tables.peers_section(lines).splitlines()[:4] == [
        "| recipe | headrace | vs torchvision's DataLoader | vs FFCV | of decoding alone |",
        "| --- | --- | --- | --- | --- |",
        "| dino | 520 images/s | 8.7 x | cannot | 38% |",
        "| mae | 1,200 images/s | 2.0 x | 1.2 x | 80% |",
    ]
    said = tables.claim_section(lines)
    assert said.startswith("**2.0 to 9 times the images per second** of torchvision's transforms")
    assert "on the same 2 CPU cores, and 38% to 80% of decoding" in said
    with pytest.raises(tables.TableError, match="no row of torchvision"):
        tables.claim_section(lines[2:3])


def test_costs_are_of_the_fused_engine_alone() -> None:
    costs = {
        "images_per_second_least": 500.0,
        "images_per_second_most": 530.0,
        "decode_share": 0.38,
        "plan_share": 0.0064,
        "interpreter_share": 0.031,
        "first_batch_seconds": 0.444,
        "times_one_thread": 1.9,
        "anonymous_bytes_by_epoch": [10**8 * n for n in range(1, 51)],
    }
    lines = [
        speed("dino", "fused", 520.0, **costs),
        speed("dino", "fused", 900.0, **costs | {"output": "uint8"}),
        speed("dino", "decode", 1400.0),
    ]
    rows = tables.costs_section(lines).splitlines()
    assert rows[2] == (
        "| dino | 2 | 520 | 500 - 530 | 1.90 | 0.38 | 0.6% | 3.1% | 100 "
        "| 100, 1,000, 5,000 | 0.44 |"
    )
    assert rows[3] == ""
    assert "batches of 64." in rows[4]


def method(name: str, seed: int | None, **other: Any) -> dict[str, Any]:
    line = {
        "name": name,
        "seed": seed,
        "samples": 100_000,
        "status": "done",
        "judged_by": "knn",
        "setting": "a",
        "untrained": {"knn": 33.0, "linear": 40.0},
        "trained": {"knn": 39.0 + (seed or 0) / 10, "linear": 45.0},
        "images_per_second": 1234.5,
        "peak_memory_bytes": 10**9,
        "subset_samples": 10_000,
        "jobs": 2,
        "threads": 1,
    }
    return WHERE | line | other


def test_methods_are_judged_beside_their_baselines() -> None:
    little = {"knn": 1, "linear": 40.5}
    lines = [
        method("byol", 0, trained={"knn": 20.0, "linear": 45.0}),  # an earlier measurement
        *(method("byol", seed, images_per_second=1234.5 - 100 * seed) for seed in range(3)),
        *(method("mae", seed, judged_by="linear", trained=little) for seed in range(2)),
        method("raw pixels, 32 px", None, samples=0),
        {"name": "deit", "seed": 0, "samples": 100_000, "status": "failed", "error": "no teacher"},
    ]  # fmt: skip
    section = tables.methods_section(lines).splitlines()
    assert section[0].startswith("| method | judged by | seeds | untrained | trained | gain |")
    assert [row.split(" | ")[0] for row in section[2:6]] == [
        "| raw pixels, 32 px", "| byol", "| mae", "| deit, seed 0",
    ]  # fmt: skip
    assert "| 33.0 ± 0.0 | 39.1 ± 0.1 | +6.1 | 0.07 | learns | 39.1 | 45.0 | 1,234 |" in section[3]
    assert "| linear | 2 | 40.0 ± 0.0 | 40.5 ± 0.0 | +0.5 | 0.00 | does not learn |" in section[4]
    assert "failed: no teacher" in section[5]
    assert section[6] == ""
    assert section[7].startswith("1 of 2 methods learn: ")
    assert "100,000 samples seen of 10,000 images" in section[7]
    assert "one process with 1 thread (2 runs side by side)" in section[7]
    assert "Measured 2026-11-22 on 2 cores of AMD EPYC" in section[7]
    with pytest.raises(tables.TableError, match="no row of a method"):
        tables.methods_section(lines[-2:])


@pytest.mark.dali
def test_the_quickstart_is_a_row_per_run() -> None:
    """Short runs first; the CPU seconds of an interrupted one are not known."""
    line = WHERE | {
        "method": "simclr",
        "preset": "demo",
        "backbone": "small_convnet",
        "seed": 1,
        "samples": 274560,
        "knn": {"pixels": 45.48, "untrained": 40.59, "trained": 63.16},
        "train_cpu_seconds": 500.4,
        "images_per_second": 520.2,
    }
    long, first = (
        line | {"seed": 0, "samples": 549120, "train_cpu_seconds": None},
        line | {"seed": 0},
    )
    section = tables.quickstart_section([long, line, first])
    rows = [row for row in section.splitlines() if row.startswith(("| 2", "| 5"))]
    assert rows == [
        "| 274,560 | 0 | 45.5 % | 40.6 % | 63.2 % | 500 | 520 |",
        "| 274,560 | 1 | 45.5 % | 40.6 % | 63.2 % | 500 | 520 |",
        "| 549,120 | 0 | 45.5 % | 40.6 % | 63.2 % |  | 520 |",
    ]
    assert "kNN with k = 20. Measured 2026-11-22 on 2 cores of AMD EPYC" in section


def test_all_recipes_are_listed() -> None:
    rows = tables.recipes_section().splitlines()
    assert len(rows) == 2 + len(recipes.NAMED)
    dino = next(row for row in rows if row.startswith("| `dino` |"))
    assert "| 2 x 224 + 8 x 96 | 1 |" in dino
    assert dino.endswith(" on the GPU |")
    assert all(re.fullmatch(r"\|( [^|]+ \|){5}", row) for row in rows[2:])


def test_only_what_is_between_the_markers_is_replaced() -> None:
    text = "a\n<!-- speed -->\nold\n\nolder\n<!-- /speed -->\nb <!-- agreement -->"
    assert tables.replaced(text, "speed", "new") == (
        "a\n<!-- speed -->\nnew\n<!-- /speed -->\nb <!-- agreement -->"
    )
    assert tables.replaced("no markers", "speed", "new") == "no markers"
    once = tables.replaced(text, "speed", "new")
    assert tables.replaced(once, "speed", "new") == once
    start, end = "<!-- speed -->", "<!-- /speed -->"
    for wrong in (start, end, end + start, start + start + end, start + end + end):
        with pytest.raises(tables.TableError, match="must both be there once"):
            tables.replaced(wrong, "speed", "new")


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text("# Title\n<!-- agreement -->\n<!-- /agreement -->\nend\n")
    (tmp_path / "lines.jsonl").write_text(json.dumps(agreement("flip", "fused")) + "\n")
    return path


def test_the_readme_is_rewritten_whole_or_not_at_all(
    readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, old = readme.with_name("lines.jsonl"), readme.read_text()
    arguments = ["--page", str(readme), "--agreement", str(lines)]
    assert tables.main([*arguments, "--check"]) == 1
    assert readme.read_text() == old
    assert "differs" in capsys.readouterr().err
    assert tables.main(arguments) == 0
    written = readme.read_text()
    assert "| flip | 0 / 0 / 0 |" in written
    assert written.startswith("# Title\n<!-- agreement -->\n|")
    assert written.endswith("\n<!-- /agreement -->\nend\n")
    assert tables.main([*arguments, "--check"]) == 0
    assert [path.name for path in readme.parent.iterdir() if "partial" in path.name] == []


def test_methods_are_checked_where_the_readme_has_them(readme: Path) -> None:
    lines = readme.with_name("methods.jsonl")
    lines.write_text(json.dumps(method("byol", 0)) + "\n")
    arguments = ["--page", str(readme), "--methods", str(lines)]
    arguments += ["--agreement", str(readme.with_name("lines.jsonl"))]
    assert tables.main(arguments) == 0  # without markers for it
    readme.write_text(readme.read_text() + "<!-- methods -->\n<!-- /methods -->\n")
    assert tables.main([*arguments, "--check"]) == 1
    assert tables.main(arguments) == 0
    assert "| byol | kNN | 1 |" in readme.read_text()
    assert tables.main([*arguments, "--check"]) == 0
    lines.write_text(lines.read_text() + json.dumps(method("moco", 0)) + "\n")
    assert tables.main([*arguments, "--check"]) == 1


@pytest.mark.dali
def test_the_pages_say_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise: python tools/make_tables.py."""
    assert tables.main(["--check"]) == 0, capsys.readouterr().err


def test_a_page_that_shows_what_was_not_measured_is_refused(
    readme: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tables, "BENCHMARKS", tmp_path / "none")
    assert tables.main(["--page", str(readme)]) == 2
    assert "a page shows agreement, and there is no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("", "has no JSON lines"), ("[1]\n", "has no JSON lines"), ("{", "has no JSON lines"),
     ('{"kind": "op"}', "a line has no 'date'")],
)  # fmt: skip
def test_other_files_are_refused(
    readme: Path, capsys: pytest.CaptureFixture[str], content: str, sentence: str
) -> None:
    lines, old = readme.with_name("lines.jsonl"), readme.read_text()
    lines.write_text(content)
    assert tables.main(["--page", str(readme), "--agreement", str(lines)]) == 2
    assert sentence in capsys.readouterr().err
    assert readme.read_text() == old
