"""The learning benchmark: its rows and verdicts by hand, and the tool on a tiny data set."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools/bench_methods.py"

tool: Any = import_module("headrace.tools.bench_methods")
rows: Any = import_module("headrace.tools.bench.methods.rows")
process: Any = import_module("headrace.tools.bench.methods.process")
job: Any = import_module("headrace.tools.bench.methods.job")


def row(name: str, seed: int | None, before: float, after: float, **other: Any) -> dict[str, Any]:
    """kNN from `before` to `after`; linear is ten points higher."""
    told = {
        "name": name,
        "seed": seed,
        "samples": 1000,
        "status": "done",
        "judged_by": "knn",
        "setting": "a",
        "untrained": {"knn": before, "linear": before + 10},
        "trained": {"knn": after, "linear": after + 10},
        "images_per_second": 100.0,
        "peak_memory_bytes": 10**8 + (seed or 0),
        "date": f"2026-11-2{seed or 0}",
    }
    return told | other


# ---------------------------------------------------------------------------------- rows, verdicts


def test_a_method_learns_by_two_deviations_and_a_point() -> None:
    """Deviations 1 and 1 make a pooled one of 1: a gain of 2.1 is enough, 1.9 is not."""
    steady = [("steady", s, 30.0 + 0.01 * s, 30.9 + 0.01 * s) for s in range(3)]
    below = [("below", s, 30.0 + s, 31.9 + s) for s in range(3)]
    above = [("above", s, 30.0 + s, 32.1 + s) for s in range(3)]
    single = [("single", 0, 30.0, 40.0)]
    found = {
        one.name: one
        for one in rows.verdicts([row(*given) for given in (*steady, *below, *above, *single)])
    }
    assert found["steady"].learns is False  # 0.9 points, though many deviations
    assert (found["below"].learns, found["above"].learns) == (False, True)
    assert found["above"].pooled == pytest.approx(1.0)
    assert found["above"].gain == pytest.approx(2.1)
    assert found["single"].learns is None
    assert found["above"].peak_memory_bytes == 10**8 + 2


def test_the_metric_that_was_fixed_decides() -> None:
    told = [
        row("mae", s, 30, 30 - s, judged_by="linear", trained={"knn": 20.0, "linear": 45.0 + s})
        for s in range(2)
    ]
    (verdict,) = rows.verdicts(told)
    assert (verdict.gain, verdict.learns) == (5.5, True)


def test_seeds_of_another_setting_do_not_count() -> None:
    """A preset was changed after seed 0 and 1: their rows wait for being measured anew."""
    told = [row("dino", s, 30, 50) for s in range(2)] + [row("dino", 2, 30, 40, setting="b")]
    (verdict,) = rows.verdicts(told)
    assert (verdict.seeds, verdict.gain, verdict.learns) == ((2,), 10.0, None)
    again = [*told, *(row("dino", s, 30, 41, setting="b") for s in range(2))]
    (verdict,) = rows.verdicts(again)
    assert verdict.seeds == (0, 1, 2)


def test_the_table_has_baselines_methods_and_what_failed() -> None:
    told = [
        *(row("simclr", s, 33 + s / 10, 39 + s / 10) for s in range(3)),
        row("moco", 0, 33, 20),
        row("raw pixels, 32 px", None, 0, 35.5, samples=0),
        {"name": "deit", "seed": 1, "samples": 1000, "status": "failed", "setting": "a",
         "error": "no teacher", "date": "2026"},
    ]  # fmt: skip
    cells = rows.table(told)
    assert [line[0] for line in cells[1:]] == [
        "raw pixels, 32 px", "moco", "simclr", "deit, seed 1",
    ]  # fmt: skip
    named = dict(zip(cells[0], cells[3], strict=True))
    assert named == {
        "method": "simclr", "judged by": "kNN", "seeds": "3", "untrained": "33.1 ± 0.1",
        "trained": "39.1 ± 0.1", "gain": "+6.0", "pooled deviation": "0.10", "verdict": "learns",
        "kNN": "39.1", "linear": "49.1", "images/s": "100", "MB": "100",
    }  # fmt: skip
    shown = rows.plain(cells).splitlines()
    assert shown[1].split()[-2:] == ["35.5", "45.5"]
    assert "one seed cannot tell" in shown[2]
    assert shown[4] == "deit, seed 1: failed: no teacher"


def test_rows_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert rows.read_rows(path) == []
    rows.append_row(path, row("dino", 0, 30, 40))
    with path.open("a") as file:
        file.write('{"name": "dino", "se')  # killed while it wrote
    assert [one["seed"] for one in rows.read_rows(path)] == [0]
    rows.append_row(path, row("dino", 1, 30, 40))
    rows.append_row(path, row("dino", 0, 30, 41))
    assert [one["seed"] for one in rows.read_rows(path)] == [0, 1, 0]
    assert [one["trained"]["knn"] for one in rows.latest(rows.read_rows(path))] == [41, 40]
    path.write_text('{"recipe": "dino"}\n')
    with pytest.raises(rows.RowsError, match="line 1 is no row"):
        rows.read_rows(path)


# --------------------------------------------------------------------------------------- processes


def command(tmp_path: Path, name: str, text: str) -> Any:
    script = tmp_path / f"{name}.py"
    script.write_text(text)
    return process.Command(name, script, [], tmp_path / f"{name}.log", threads=1)


def test_jobs_are_told_what_came_of_their_commands(tmp_path: Path) -> None:
    """Peak memory, exit code, last words; a job that waits begins when the other is over."""
    grow = "import time\nx = bytearray(300_000_000)\ndel x\ntime.sleep(0.5)\nprint('grown')"
    fail = "import sys\nprint('one')\nsys.exit('error: no such thing')"
    order: list[str] = []

    def large() -> Any:
        order.append("large begins")
        ended = yield command(tmp_path, "grow", grow)
        return ended

    def failing() -> Any:
        order.append("failing begins")
        ended = yield command(tmp_path, "fail", fail)
        return ended

    found: dict[str, Any] = {}

    def finished(name: str, ended: Any) -> None:
        order.append(f"{name} ends")
        found[name] = ended

    jobs: dict[str, Callable[[], Any]] = {"failing": failing, "large": large}
    process.run_jobs(jobs, {"failing": ["large"]}, 2, lambda *_: None, finished)
    assert order == ["large begins", "large ends", "failing begins", "failing ends"]
    assert (found["large"].code, found["large"].said) == (0, "grown")
    assert 300e6 < found["large"].peak_memory_bytes < 450e6
    assert found["large"].seconds > 0.5
    assert (found["failing"].code, found["failing"].said) == (1, "no such thing")


def test_an_end_in_the_middle_asks_the_processes_to_end(tmp_path: Path) -> None:
    text = (
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n    pathlib.Path('saved').touch()\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path('ready').touch()\ntime.sleep(60)\n"
    ).replace("'saved'", repr(str(tmp_path / "saved")))
    text = text.replace("'ready'", repr(str(tmp_path / "ready")))

    def long() -> Any:
        yield command(tmp_path, "long", text)

    def short() -> Any:
        yield command(tmp_path, "short", f"import time, pathlib\nwhile not pathlib.Path("
                      f"{str(tmp_path / 'ready')!r}).exists(): time.sleep(0.1)")  # fmt: skip

    def finished(name: str, outcome: Any) -> None:
        raise KeyboardInterrupt

    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        process.run_jobs({"long": long, "short": short}, {}, 2, lambda *_: None, finished)
    assert (tmp_path / "saved").exists()
    assert time.perf_counter() - began < 30


def test_speed_is_that_after_the_first_line() -> None:
    lines = [
        {"step": 10, "images_per_second": 1.0, "wait_share": 0.9, "seconds": 80, "loss": 3.0},
        {"step": 20, "images_per_second": 80.0, "wait_share": 0.0, "seconds": 81, "loss": 2.0},
        {"step": 40, "images_per_second": 40.0, "wait_share": 0.5, "seconds": 85, "loss": 1.0},
    ]
    told = job._metrics(lines, batch_size=8)
    assert told["images_per_second"] == 48.0  # 30 steps of 8 in 1 + 4 seconds
    assert told["wait_share"] == 0.4
    assert (told["samples_seen"], told["train_seconds"], told["loss"]) == (320, 85, 1.0)


# ---------------------------------------------------------------------------------------- the tool


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 training and 40 test images of 32 pixels in four classes that overlap."""
    root = tmp_path_factory.mktemp("bench_methods") / "colours"
    generator = np.random.default_rng(0)
    for split, number in (("train", 50), ("test", 10)):
        for label in range(4):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for place in range(number):
                level = generator.normal(90 + 20 * label, 20)  # no network tells all apart
                pixels = generator.normal(level, 40, size=(32, 32, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{place:02d}.png")
    return root


@pytest.mark.slow
def test_rows_are_measured_skipped_and_failed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """simsiam trains; mae is given a backbone that it cannot use, and does not end the others."""
    path = tmp_path / "rows.jsonl"
    own = [
        "--methods", "mae,simsiam", "--seeds", 1, "--data", data, "--runs", tmp_path / "runs",
        "--samples", 200, "--subset", 100, "--json", path, "--threads", 1, "--jobs", 2,
    ]  # fmt: skip
    arguments = [*map(str, own), "--", "--backbone", "test_resnet", "--data.batch-size", "50"]
    arguments += ["--run.log-every", "1"]
    done = subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "3 rows to measure, 2 asked for" in done.stdout
    assert "one seed cannot tell" in done.stdout
    assert done.stdout.count("simsiam, seed 1: judging") == 2
    assert "mae, seed 1: failed: training ended with 2: mae needs a plain ViT" in done.stdout
    by_name = {one["name"]: one for one in rows.read_rows(path)}
    assert by_name.keys() == {"mae", "simsiam", "raw pixels, 32 px"}
    assert by_name["mae"]["status"] == "failed"
    simsiam = by_name["simsiam"]
    assert (simsiam["status"], simsiam["judged_by"], simsiam["seed"]) == ("done", "knn", 1)
    assert (simsiam["samples"], simsiam["samples_seen"], simsiam["steps"]) == (200, 200, 4)
    assert simsiam["peak_memory_bytes"] > 10**8
    assert simsiam["images_per_second"] > 0
    assert 0 <= simsiam["wait_share"] <= 1
    for metrics in (
        simsiam["untrained"],
        simsiam["trained"],
        by_name["raw pixels, 32 px"]["trained"],
    ):
        assert metrics.keys() == {"knn", "linear"}
        assert all(20 <= value < 100 for value in metrics.values())
    assert simsiam["untrained"] != simsiam["trained"]
    (run,) = (tmp_path / "runs").glob("simsiam-*")
    command = json.loads((run / "config.json").read_text())["config"]
    assert (command["run"]["seed"], command["data"]["holdout"]) == (1, 0)
    subset = Path(command["data"]["subset"]).read_text().split()
    assert [int(number) for number in subset] == list(range(0, 200, 2))

    # Again: finished rows are skipped, and the failed one is tried.
    again = [text.replace("mae,simsiam", "simsiam") for text in arguments]
    assert tool.main(again) == 0
    said = capsys.readouterr().out
    assert "0 rows to measure, 1 asked for" in said
    assert len(rows.read_rows(path)) == 3
    # With the row gone but its run there, nothing is trained or judged again.
    kept = [line for line in path.read_text().splitlines() if '"simsiam"' not in line]
    path.write_text("\n".join(kept) + "\n")
    before = {file: file.stat().st_mtime_ns for file in run.iterdir() if file.is_file()}
    assert tool.main(again) == 0
    assert {file: file.stat().st_mtime_ns for file in run.iterdir() if file.is_file()} == before
    repeated = rows.latest(rows.read_rows(path))[-1]
    assert {**repeated, "date": ""} == {**simsiam, "date": ""}
    capsys.readouterr()
    assert tool.main(["--table", "--json", str(path)]) == 0
    assert capsys.readouterr().out.count("simsiam") == 1


def test_a_pupil_waits_for_its_teacher(data: Path, tmp_path: Path) -> None:
    """And learns from the supervised run of its own seed, which it trains where there is none."""
    own = ["--methods", "distill", "--data", str(data), "--runs", str(tmp_path), "--subset", "100"]
    bench = tool._bench(tool._parse(own), ())
    run = job.make_run(bench, "distill", 3)
    story = job.measure(run)
    first = next(story)
    assert "--run.seed" in first.arguments
    assert first.arguments[first.arguments.index("--method") + 1] == "supervised"
    assert first.arguments[first.arguments.index("--run.seed") + 1] == "3"
    with pytest.raises(StopIteration) as ended:
        story.send(process.Ended(1, "no labels", 1.0, None))
    told = ended.value.value
    assert told["status"] == "failed"
    assert told["error"].startswith(
        "its teacher, supervised, seed 3: training ended with 1: no lab"
    )

    teacher = job.make_run(bench, "supervised", 3).directory
    teacher.mkdir()
    (teacher / job.TRAINED_FILE).write_text("{}")
    pupil = next(job.measure(run))
    assert pupil.arguments[pupil.arguments.index("--method") + 1] == "distill"
    assert pupil.arguments[-2:] == ["--init", str(teacher)]


def test_a_defect_in_a_methods_code_is_a_failed_row(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises, here when the untrained encoder is built: the other rows go on."""
    own = ["--methods", "simclr", "--data", str(data), "--runs", str(tmp_path), "--subset", "100"]
    run = job.make_run(tool._bench(tool._parse(own), ()), "simclr", 0)
    run.directory.mkdir()
    (run.directory / job.TRAINED_FILE).write_text('{"peak_memory_bytes": null}')
    results = {"20": {"top1": 1.0}}
    linear = {"accuracy": {"top1": 1.0, "top5": 1.0}, "chosen": {"learning_rate": 1.0},
              "at_edge": False}  # fmt: skip
    facts = {"results": results, "linear": linear, "seconds": {}, "versions": {}}
    (run.directory / "judged-trained.json").write_text(json.dumps(facts))
    described = {
        "config": run.config.declaration(),
        "derived": {"steps": 30},
        "fingerprint": {"stream": {"engine": {"name": "reference"}, "order": {"samples": 100}}},
    }
    (run.directory / "config.json").write_text(json.dumps(described, default=str))

    def broken(*_: Any) -> None:
        raise TypeError("a head of no width")

    monkeypatch.setattr("headrace.training.methods.simclr.build", broken)
    with pytest.raises(StopIteration) as ended:
        next(job.measure(run))
    assert ended.value.value["status"] == "failed"
    assert ended.value.value["error"] == "TypeError: a head of no width"


def test_a_setting_is_all_that_a_preset_says(data: Path, tmp_path: Path) -> None:
    own = ["--data", str(data), "--runs", str(tmp_path), "--subset", "100"]
    bench = tool._bench(tool._parse(own), ())
    same = job.make_run(bench, "simclr", 0)
    assert job.make_run(bench, "simclr", 1).setting == same.setting
    assert job.make_run(bench, "simclr", 1).directory != same.directory
    changed = tool._bench(tool._parse(own), ("--objective.temperature", "0.9"))
    assert job.make_run(changed, "simclr", 0).setting != same.setting
    fewer = tool._bench(tool._parse([*own, "--subset", "50"]), ())
    assert job.make_run(fewer, "simclr", 0).setting != same.setting


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "nowhere"], "no train and test split. CIFAR-10 comes with `bash tools/quick"),
        (["--subset", "201"], "--subset 201: .* has only 200 training images"),
        (["--methods", "simclear"], "--method simclear is unknown: did you mean simclr"),
        (["--methods", "simclr:tiny"], "--preset tiny is unknown"),
        (["--table"], "holds no rows yet"),
    ],
)
def test_what_cannot_be_measured_is_said(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    given = ["--data", str(data), "--runs", str(tmp_path), "--subset", "100"]
    given += ["--json", str(tmp_path / "rows.jsonl"), *arguments]
    assert tool.main(given) == 2
    assert re.search(sentence, capsys.readouterr().err)
