"""What bounds a run: the rule over constructed rates, and the tool on a real but tiny run."""

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

TOOLS = Path(__file__).resolve().parent.parent / "tools"
RULE = runpy.run_path(str(TOOLS / "bench/training/verdict.py"))
FAST_INPUT: dict[str, Any] = {
    "real": 990.0,
    "synthetic": 1000.0,
    "wait_share": 0.004,
    "synthetic_wait_share": 0.0,
    "storage": 90_000.0,
    "cached": 90_000.0,
    "decode": 9000.0,
    "loader": 5000.0,
    "transfer": None,
    "shares_cores": False,
}
SETTING: dict[str, Any] = {
    "engine": "fused",
    "device": "cpu",
    "threads": 8,
    "cores": 8,
    "packed": True,
    "shares_cores": False,
}


def judged(setting: dict[str, Any] | None = None, **rates: Any) -> tuple[Any, str]:
    """(the verdict, the sentence) where the rates differ from those of a fast input."""
    measured = RULE["Measured"](**FAST_INPUT | rates)
    shares_cores = {"shares_cores": measured.shares_cores}
    verdict = RULE["decide"](measured)
    return verdict, RULE["sentence"](
        measured, verdict, RULE["Setting"](**SETTING | shares_cores | (setting or {}))
    )


WAITING = {"real": 400.0, "wait_share": 0.6}
CUDA = {"device": "cuda", "engine": "dali"}


@pytest.mark.parametrize(
    ("bound", "rates", "setting", "said"),
    [
        ("model", {}, {}, "only a faster step helps"),
        (
            "model",
            {"real": 1100.0},
            {},
            "here they are no ceiling, unless the machine had other work",
        ),
        ("storage", {**WAITING, "storage": 420.0}, {}, "on a faster or local disk"),
        ("storage", {**WAITING, "storage": 420.0}, {"packed": False}, "pack the images into"),
        ("decode", {**WAITING, "decode": 500.0, "loader": 420.0}, {}, "store smaller pictures"),
        ("decode", {**WAITING, "decode": 500.0, "loader": 420.0}, {"threads": 2}, "from 2 to 8"),
        ("augmentation", {**WAITING, "loader": 420.0}, {}, "fewer or smaller views"),
        ("augmentation", {**WAITING, "loader": 420.0}, {"engine": "reference"}, "engine fused"),
        ("augmentation", {**WAITING, "loader": 420.0}, {"device": "cuda"}, "engine dali"),
        ("transfer", {**WAITING, "transfer": 450.0}, {**CUDA, "engine": "fused"}, "engine dali"),
        ("transfer", {**WAITING, "transfer": 450.0}, CUDA, "how the device is connected"),
    ],
)
def test_what_bounds_a_run_with_cores_to_itself(
    bound: str, rates: dict[str, Any], setting: dict[str, Any], said: str
) -> None:
    verdict, sentence = judged(setting, **rates)
    assert verdict.bound == bound
    assert f"bound by {RULE['NAMES'][bound]}: it waits for data" in sentence
    assert said in sentence


def test_a_synthetic_run_that_waits_too_shows_the_transfer() -> None:
    waiting = {"real": 990.0, "wait_share": 0.3, "transfer": 20_000.0}
    assert judged(CUDA, **waiting, synthetic_wait_share=0.3)[0].bound == "transfer"
    assert judged(CUDA, **waiting, synthetic_wait_share=0.0)[0].bound == "decode"


def test_cores_that_are_shared_are_divided_by_time_and_not_by_waiting() -> None:
    """The wait share says little there: the largest part of an image's time decides."""
    shared: dict[str, Any] = {"shares_cores": True, "wait_share": 0.3}
    verdict, sentence = judged(**shared, real=700.0, loader=2300.0, decode=4000.0)
    assert verdict.bound == "model"
    assert verdict.lost == pytest.approx(0.3)
    assert "On 8 cores that the input and the model share" in sentence
    assert "the model takes 70%" in sentence
    assert "work on these cores rather than time spent waiting (30.0%)" in sentence
    assert "it waits" not in sentence
    assert "for the input's part store smaller pictures" in sentence

    slow: dict[str, Any] = {"real": 300.0, "decode": 500.0, "loader": 450.0}
    verdict, sentence = judged(**shared, **slow)
    assert verdict.bound == "decode"
    assert verdict.contention == pytest.approx(0.7 - 300 / 450)
    assert "decoding 60%" in sentence
    assert "the model takes 30%" in sentence
    # More threads find no more cores.
    more = judged({"threads": 2}, **shared, **slow)[1]
    assert "--data.threads" not in more
    assert "more or faster cores" in more


def test_what_the_input_does_not_explain_is_not_blamed_on_it() -> None:
    verdict, sentence = judged(shares_cores=True, real=200.0, loader=5000.0)
    assert verdict.bound == "model"
    assert verdict.contention == pytest.approx(0.8 - 0.04)
    assert "76% is neither's" in sentence
    assert "measure again without other work" in sentence


RATE = st.floats(0.1, 1e6)
SHARE = st.floats(0, 1)


@given(
    rates=st.fixed_dictionaries(
        dict.fromkeys(("real", "synthetic", "storage", "cached", "decode", "loader"), RATE)
        | {"wait_share": SHARE, "synthetic_wait_share": SHARE, "shares_cores": st.booleans()}
        | {"transfer": st.none() | RATE}
    )
)
def test_any_rates_give_one_verdict_and_one_sentence(rates: dict[str, Any]) -> None:
    """Also those that contradict each other, as noise makes them."""
    verdict, sentence = judged(**rates)
    assert verdict.bound in RULE["NAMES"]
    assert verdict.bound != "transfer" or rates["transfer"] is not None
    assert sum(verdict.shares.values()) == pytest.approx(1)
    assert min(verdict.shares.values()) >= 0
    assert sentence.endswith(".")
    assert not re.search(r"\. [A-Z]|\n|nan|inf", sentence)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 small pictures in two classes."""
    directory = tmp_path_factory.mktemp("pictures") / "train"
    random = np.random.default_rng(0)
    for sample in range(64):
        folder = directory / f"class_{sample % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{sample}.png")
    return directory.parent


@pytest.mark.slow
def test_a_whole_measurement(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = "--method supervised --backbone test_resnet --data.batch-size 16 --run.epochs 1000"
    done = subprocess.run(
        [
            *(sys.executable, str(TOOLS / "bench_training.py"), *options.split()),
            *("--data.train", str(data), "--data.engine=reference", "--data.threads", "1"),
            *("--seconds", "0.5", "--rounds", "1", "--json", "found/result.json"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "found/result.json").read_text().splitlines()
    result = json.loads(line)
    rates = result["rates"]
    assert result["method"] == "supervised"
    assert result["preset"] == "cifar"
    assert (result["engine"], result["threads"], result["device"]) == ("reference", 1, "cpu")
    assert result["packed"] is False
    assert result["lost_share"] == pytest.approx(1 - rates["real"] / rates["synthetic"])
    assert 0 <= result["wait_share"] <= 1
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert result["verdict"] in RULE["NAMES"]
    assert rates["transfer"] is None
    assert min(rates["decode"], rates["loader"], rates["storage_cached"]) > 0
    assert result["samples_alone"] == 48  # what is not held out, in whole batches
    for name in ("real", "synthetic"):
        (segment,) = result[name]
        assert segment["images_per_second"] == rates[name]
        assert segment["images"] >= 5 * 16
        assert segment["images"] % 16 == 0
    assert {"python", "torch"} <= result["versions"].keys()
    assert {"processor", "cores", "memory_bytes"} <= result["machine"].keys()
    assert result["date"].startswith("20")
    assert done.stdout.splitlines()[-1] == result["sentence"]
    assert f"1 - real/synthetic    {result['lost_share']:.1%}, wait share" in done.stdout
    assert re.search(
        r"\[3/5, about \d+ (s|min) left\] training with the reference engine", done.stderr
    )
    assert {path.name for path in tmp_path.iterdir()} == {"found", "temporary"}
    assert not [path for path in temporary.iterdir() if path.name.startswith("headrace")]


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    return runpy.run_path(str(TOOLS / "bench_training.py"))["main"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--method is missing"),
        ("--method nothing", "--method nothing is unknown"),
        ("--method supervised --second 3", "there is no option --second"),
        ("--method supervised --run.out runs/x", "--run.out has no place here"),
        ("--method supervised --run.resume=never", "--run.resume has no place here"),
        ("--method supervised --data.engine synthetic", "is what a run is compared with"),
        ("--method supervised --data.train nowhere", "nowhere does not exist"),
        ("--method supervised --run.steps 14", "14 steps, too few to measure: give it 15 or more"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    main: Callable[[list[str]], int],
    data: Path,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    arguments = options.split()
    if "--data.train" not in arguments:
        arguments += ["--data.train", str(data)]
    assert main([*arguments, "--data.batch-size", "16"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not said.out


@pytest.mark.parametrize("options", ["--seconds 0", "--seconds inf", "--rounds 1.5", "--cache hot"])
def test_its_own_options_are_checked(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], options: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--method", "supervised", *options.split()])
    assert ended.value.code == 2
    assert f"argument {options.split()[0]}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_is_quoted(
    main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for sample in range(40):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{sample:02d}.png")
    options = "--method supervised --backbone no_such_model --data.batch-size 16 --rounds 1"
    assert main([*options.split(), "--data.train", str(tmp_path), "--run.epochs", "50"]) == 2
    said = capsys.readouterr().err
    assert "error: the run with synthetic data ended before it was measured: " in said
    assert "no_such_model" in said.splitlines()[-1]


def test_help_has_examples(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("tools/bench_training.py --method") >= 3
