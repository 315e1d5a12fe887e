"""The throughput benchmark: that it measures what it says, and says what it cannot. No speeds."""

import argparse
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pytest
from PIL import Image

TOOLS = Path(__file__).resolve().parent.parent / "tools"
IMAGES, BATCH = 8, 4


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two class folders of crops from a photograph that comes with matplotlib."""
    root = tmp_path_factory.mktemp("photos")
    portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(portrait) as file:
        picture = file.convert("RGB")
    for number in range(IMAGES):
        folder = root / ("left", "right")[number % 2]
        folder.mkdir(exist_ok=True)
        left, top = 20 + 20 * number, 10 + 30 * number
        crop = picture.crop((left, top, left + 260 + number, top + 240))
        crop.save(folder / f"{number}.jpg", quality=90)
    return root


@pytest.fixture
def part() -> Any:
    """Imports a part of the benchmark by its name."""
    return lambda name: import_module(f"headrace.tools.{name}")


def run(*arguments: object, tmp_path: Path) -> "subprocess.CompletedProcess[str]":
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, str(TOOLS / "bench_pipeline.py"), *map(str, arguments)]
    command += ["--scratch", str(scratch), "--rounds", "1", "--seconds", "0.1", "--threads", "1"]
    command += ["--batch-size", str(BATCH)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert not list(scratch.iterdir()), "copies of the images were left behind"
    return done


def lines_of(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return {(one["recipe"], one["engine"], one["output"]): one for one in lines}


def check(found: dict[str, Any]) -> None:
    for name in (
        "images_per_second", "decode_images_per_second", "peak_memory_bytes", "decode_share",
        "crops_per_second", "images_per_second_per_core", "import_seconds", "first_batch_seconds",
        "peak_mapped_bytes",
    ):  # fmt: skip
        assert math.isfinite(found[name]), name
        assert found[name] > 0, name
    assert found["cpu_share"] >= 0
    assert len(found["images_per_second_by_round"]) == found["rounds"] == 1
    assert found["threads"] == 1
    assert found["data"]["samples"] == IMAGES
    assert found["versions"]["torch"]


def check_plot(path: Path) -> None:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300


@pytest.mark.slow
def test_measures_our_engine_and_a_peer(photos: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "new" / "out.json", tmp_path / "out.png"
    done = run(
        *("--data", photos, "--recipe", "mae", "--engine", "fused,torchvision"),
        *("--json", out, "--plot", plot, "--epochs-memory", 2),
        tmp_path=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = lines_of(out)
    assert set(found) == {
        ("mae", engine, output)
        for engine in ("fused", "torchvision")
        for output in ("float32", "uint8")
    }
    for one in found.values():
        check(one)
    fused = found["mae", "fused", "float32"]
    assert fused["uint8_images_per_second"] == found["mae", "fused", "uint8"]["images_per_second"]
    assert fused["times_peer"]["torchvision"] > 0
    assert fused["plan_seconds_per_image"] > 0
    assert len(fused["anonymous_bytes_by_epoch"]) == 2
    assert "headrace-fused" in fused["cpu_share_by_part"] or fused["cpu_share"] < 0.2
    check_plot(plot)
    assert "mae: 1x224, 1 thread" in done.stdout
    assert "of decoding alone" in done.stdout


@pytest.mark.slow
@pytest.mark.dali
def test_dali_by_our_bytes_by_its_reader_and_natively(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    out = tmp_path / "out.json"
    done = run(
        *("--data", photos, "--recipe", "mae", "--engine", "dali,dali_native,webdataset"),
        *("--output", "float32", "--json", out),
        tmp_path=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = lines_of(out)
    assert {engine for _, engine, _ in found} == {
        "dali", "dali_reader", "dali_native", "webdataset",
    }  # fmt: skip
    for one in found.values():
        check(one)
    assert math.isfinite(found["mae", "dali", "float32"]["external_source_share"])


@pytest.mark.slow
@pytest.mark.dali
def test_peers_express_the_other_recipes(photos: Path, tmp_path: Path) -> None:
    """The row's process compares the shapes and types of what it gets with the recipe's."""
    pytest.importorskip("nvidia.dali")
    out = tmp_path / "out.json"
    done = run(
        *("--data", photos, "--recipe", "dino,simclr,deit", "--engine", "torchvision,dali_native"),
        *("--output", "float32", "--json", out),
        tmp_path=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = lines_of(out)
    assert len(found) == 6
    for one in found.values():
        check(one)
    assert "posterize" in " ".join(found["deit", "torchvision", "float32"]["notes"])


@pytest.mark.slow
@pytest.mark.ffcv
def test_ffcv_expresses_mae_and_says_what_it_cannot(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    out = tmp_path / "out.json"
    done = run(
        *("--data", photos, "--recipe", "mae,dino", "--engine", "ffcv", "--output", "float32"),
        *("--json", out, "--plot", tmp_path / "out.png"),
        tmp_path=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = lines_of(out)
    assert set(found) == {("mae", "ffcv", "float32")}
    check(found["mae", "ffcv", "float32"])
    assert "ffcv cannot express this: ffcv makes one view per image" in done.stdout
    check_plot(tmp_path / "out.png")


@pytest.mark.slow
def test_a_row_that_fails_is_named_and_the_others_are_measured(
    photos: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    (damaged / "class").mkdir(parents=True)
    for number, path in enumerate(sorted(photos.glob("*/*.jpg"))):
        data = path.read_bytes()
        (damaged / "class" / path.name).write_bytes(data if number else data[: len(data) // 3])
    done = run(
        *("--data", damaged, "--recipe", "mae", "--engine", "fused", "--output", "float32"),
        tmp_path=tmp_path,
    )
    assert done.returncode == 1
    assert "fused on mae, 1 thread, float32 failed: " in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def complain(part: Any, capsys: pytest.CaptureFixture[str], arguments: Sequence[object]) -> str:
    """What the command says to arguments that it refuses: a sentence, and exit code 2."""
    try:
        code = part("bench_pipeline").main([str(one) for one in arguments])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_bad_input_is_one_sentence(
    part: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_json = tmp_path / "notes.txt"
    no_json.write_text("not a result\n")
    webp = tmp_path / "webp"
    webp.mkdir()
    for name in ("a.webp", "b.webp"):
        Image.new("RGB", (40, 40)).save(webp / name)
    few = ["--batch-size", BATCH]
    for expected, arguments in (
        ("no 'turbo' here, only fused", ["--data", photos, "--engine", "fused,turbo"]),
        ("no 'vicreg' here, only dino", ["--data", photos, "--recipe", "vicreg"]),
        ("does not exist", ["--data", tmp_path / "nothing"]),
        ("not enough for one batch of 64", ["--data", photos]),
        ("is odd", ["--data", photos, "--batch-size", 3]),
        ("'0' is not a whole number", ["--data", photos, "--threads", "1,0"]),
        ("'never' is not a number", ["--data", photos, "--seconds", "never"]),
        ("it needs --json", ["--data", photos, "--append"]),
        ("line 1 is no JSON", ["--data", photos, "--json", no_json, "--append"]),
        ("is a directory", ["--data", photos, "--json", tmp_path]),
        ("is no directory", ["--data", photos, *few, "--scratch", no_json]),
        ("neither JPEG nor PNG", ["--data", webp, "--batch-size", 2]),
        ("required: --data", []),
    ):
        assert expected in complain(part, capsys, arguments)


def result_of(part: Any, engine: str, rates: list[float], output: str = "float32") -> Any:
    task = part("bench.pipeline.task").Task(engine, "mae", 2, output, 64, "store", 640)
    result = part("bench.pipeline.result").Result(task)
    for rate in rates:
        result.add_round(
            {
                "images": 10 * rate,
                "seconds": 10.0,
                "cpu_seconds": {"decode": 15.0, "processes": 4.0},
                "idle": (0.5, 10.0),
            }
        )
    result.peak = part("bench.proc").Memory(100, 20, 3)
    return result


def test_ratios_are_taken_round_by_round(part: Any) -> None:
    result = part("bench.pipeline.result")
    # The machine was twice as fast in the second round, for both.
    fast, slow = result_of(part, "fused", [50, 100, 51]), result_of(part, "ffcv", [10, 20, 10])
    assert result.ratio(fast, slow) == 5
    assert fast.rate == 51


def test_a_line_holds_what_follows_from_the_rounds(part: Any) -> None:
    result = part("bench.pipeline.result")
    fused = result_of(part, "fused", [80, 90])
    fused.plan_seconds_per_image = 1e-4
    group = [
        result_of(part, "decode", [100, 100], "uint8"),
        fused,
        result_of(part, "torchvision", [20, 30]),
        result_of(part, "fused", [95, 95], "uint8"),
    ]
    found = result.line(fused, group, result_of(part, "fused", [50, 50]), {"date": "today"})
    assert found["images_per_second"] == 85
    assert found["decode_images_per_second"] == 100
    assert found["decode_share"] == 0.85
    assert found["uint8_images_per_second"] == 95
    assert found["times_peer"] == {"torchvision": 3.5}
    assert found["times_one_thread"] == 1.7
    assert found["peak_memory_bytes"] == 100
    assert found["cpu_share"] == 0.95
    assert found["idle_cpu_share"] == 0.05
    # 19 of 20 core seconds per 800 and 900 images
    assert found["plan_share"] == pytest.approx(1e-4 / ((19 / 800 + 19 / 900) / 2), rel=1e-3)
    json.dumps(found)


def test_lines_are_appended_to_those_of_earlier_runs(part: Any, tmp_path: Path) -> None:
    bench, result = (
        part("bench_pipeline"),
        part("bench.pipeline.result"),
    )
    data = {"name": "x", "mean_bytes": 1, "mean_height": 1, "mean_width": 1}
    context = result.context_of(data, rounds=1, seconds=1.0)
    options = argparse.Namespace(json=tmp_path / "out.json", plot=None, append=True)
    for expected in (1, 2):
        group = [result_of(part, "decode", [100], "uint8"), result_of(part, "fused", [80])]
        bench.write(options, [group], context, bench.earlier_lines(options))
        assert len(options.json.read_text().splitlines()) == expected
    found = [json.loads(text) for text in options.json.read_text().splitlines()]
    assert {one["engine"] for one in found} == {"fused"}
    assert found[0]["machine"]["cores"] > 0


def test_the_report_says_which_targets_hold(part: Any) -> None:
    report = part("bench.pipeline.report")
    group = [
        result_of(part, "decode", [1000], "uint8"),
        result_of(part, "fused", [800]),
        result_of(part, "torchvision", [400]),
        result_of(part, "dali_native", [300]),
    ]
    refused = result_of(part, "ffcv", [])
    refused.cannot = "it has no such thing"
    printed = report.table([*group, refused])
    assert "fastest of our engines is fused" in printed
    assert "ffcv cannot express this: it has no such thing" in printed
    assert "NOT QUIET" not in printed
    said = list(report.verdicts([group]))
    assert "mae, 2 threads: fused is 2.00 x (MISSED: 2.2) as fast as torchvision" in said
    assert any("2.67 x (holds: 1.9, and 2 was tried for) as fast as dali" in one for one in said)
    assert any("0.80 (holds: 0.72, not yet 0.85) of decoding alone" in one for one in said)


def test_a_busy_machine_is_reported(part: Any) -> None:
    decode, fused = result_of(part, "decode", [10], "uint8"), result_of(part, "fused", [8])
    decode.cpu_shares = [{"decode": 0.4}]
    assert "NOT QUIET: decoding got 40%" in part("bench.pipeline.report").table([decode, fused])


def test_memory_and_time_of_a_family_are_seen(part: Any) -> None:
    proc: ModuleType = part("bench.proc")
    child = (
        "import os, sys\n"
        "kept = bytearray(40_000_000)\n"
        "pid = os.fork()\n"
        "if pid == 0: kept += bytearray(30_000_000)\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        process.stdout.readline()  # both have allocated
        assert len(proc.family(process.pid)) == 2
        seen = proc.memory(process.pid)
        assert seen.anonymous >= 110_000_000
        twice = proc.counted_twice(process.pid)
        process.stdin.close()
    assert 0 <= twice < seen.anonymous
    before = proc.cpu_seconds()
    math.factorial(60_000)
    after = proc.cpu_seconds()
    assert sum(after.values()) >= sum(before.values())
    assert proc.memory(os.getpid()).anonymous > 1 << 20


def test_all_forms_hold_the_same_bytes(part: Any, photos: Path, tmp_path: Path) -> None:
    from headrace.shards.store import open_store

    data, store = part("bench.pipeline.data"), open_store(photos)
    engines = {"torchvision", "webdataset", "ffcv"}
    forms = data.make_forms(store, IMAGES - 1, tmp_path, engines, 2, lambda _: None)
    expected = [bytes(one) for one in store.read(range(IMAGES - 1))]
    files = sorted(Path(forms.folder).glob("*/*.jpg"), key=lambda path: path.name)
    assert [path.read_bytes() for path in files] == expected
    assert {path.parent.name for path in files} == {"000000", "000001"}
    tars = open_store(tmp_path / "tars")
    assert [bytes(one) for one in tars.read(range(IMAGES - 1))] == expected
    assert len(forms.tars) >= 2
    beton = open_store(forms.beton)
    assert [bytes(one) for one in beton.read(range(IMAGES - 1))] == expected
    assert io.BytesIO(expected[0]).read(2) == b"\xff\xd8"
