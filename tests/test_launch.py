"""The front: help and mistakes are answered without torch, once, with one exit code; --gpus."""

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headrace.training.catalogue import find_declaration, find_method, method_names
from headrace.training.declared import read_declared
from headrace.training.launch import split_gpus
from headrace.training.near_options import near_option
from headrace.training.preset import ConfigError
from headrace.training.protocol import find_protocol, find_protocol_declaration, protocol_names

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "torchvision", "timm", "numba", "webdataset"}
RUN_AND_TELL = """
import runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
code = 0
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    code = end.code
print("loaded:", sorted({name.partition(".")[0] for name in sys.modules}))
raise SystemExit(code)
"""


def script(*command: str | Path, directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("training/train.py --help", 0, "Pre-train an image encoder"),
        ("training/train.py", 2, "error: --method is missing"),
        ("training/train.py --methd dino", 2, "error: there is no option --methd"),
        ("training/train.py --method dinno", 2, "did you mean dino?"),
        ("training/train.py --method dino --help", 0, "imagenet_300"),
        ("training/train.py --method dino --optim.lr 1", 2, "did you mean --optim.learning-rate?"),
        ("training/train.py --method dino --data.train /nowhere", 2, "/nowhere does not exist"),
        (
            "training/train.py --method dino --data.train s3://bucket/images",
            2,
            "s3://bucket/images is an address, and only files on this machine can be opened",
        ),
        (
            "training/train.py --method dino --data.train PHOTOS --data.val /none",
            2,
            "/none does not",
        ),
        (
            "training/train.py --method dino --data.train PHOTOS --data.subset /none",
            2,
            "--data.subset /none cannot be read",
        ),
        ("training/train.py --method dino --gpus many", 2, "error: --gpus many: give the number"),
        ("training/evaluate.py --help", 0, "--linear.epochs"),
        ("training/evaluate.py", 2, "error: the following arguments are required: RUN"),
        ("training/evaluate.py runs/none", 2, "error: there is no run runs/none"),
        ("training/evaluate.py runs/none --knn.k 0", 2, "each must be at least 1"),
        ("training/evaluate.py runs/none --batch_size 1", 2, "did you mean --batch-size?"),
        ("tools/make_shards.py --help", 0, "SRC is recognised by looking"),
        ("tools/make_shards.py /nowhere", 2, "error: "),
        ("tools/verify_shards.py /nowhere", 2, "error: "),
        ("tools/show_batch.py --help", 0, "--recipe NAME"),
        ("tools/show_batch.py --recipe dino --out views.jpg", 2, "a PNG is what is written"),
        ("tools/show_neighbours.py --help", 0, "--among"),
        ("tools/show_reconstruction.py --help", 0, "RUN"),
        ("tools/compare_engines.py --samples 1", 2, "'1' is not a whole number of at least 4"),
        ("tools/bench_methods.py --help", 0, "--methods"),
        ("tools/bench_pipeline.py --help", 0, "--json"),
        ("tools/make_tables.py --chek x", 2, "unrecognized arguments"),
        ("training/evaluate.py runs/x --json gs://bucket/y", 2, "gs://bucket/y is an address"),
    ],
)
def test_help_and_mistakes_do_not_wait_for_torch(
    command: str, code: int, said: str, photos: Path
) -> None:
    ended = script("-c", RUN_AND_TELL, *command.replace("PHOTOS", str(photos)).split())
    assert ended.returncode == code
    assert said in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    if code and not command.startswith(
        "tools/"
    ):  # which show how they are called, as argparse has it
        assert len(ended.stderr.splitlines()) == 1
    loaded = set(ast.literal_eval(ended.stdout.rpartition("loaded:")[2].strip()))
    assert "headrace" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("tool", ["make_shards", "sample_data", "plot_run"])
def test_no_tool_takes_an_address_for_a_folder(tool: str, tmp_path: Path) -> None:
    """Written to, `gs:` would be a folder here, and nothing would have reached the bucket."""
    first = "photos" if tool == "sample_data" else "."
    line = [ROOT / f"tools/{tool}.py", first, "--out", "gs://bucket/y"]
    ended = script(*line, directory=tmp_path)
    assert ended.returncode == 2
    assert "gs://bucket/y is an address" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_make_shards_never_loads_torch(photos: Path, tmp_path: Path) -> None:
    convert = ["tools/make_shards.py", photos, "--out", tmp_path / "shards", "--workers", "1"]
    ended = script("-c", RUN_AND_TELL, *convert)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "shards" / "manifest.json").is_file()
    assert not set(ast.literal_eval(ended.stdout.rpartition("loaded:")[2].strip())) & HEAVY


@pytest.mark.parametrize("name", method_names())
def test_what_is_declared_is_what_the_file_offers(name: str) -> None:
    declared, whole = find_declaration(name), find_method(name)
    assert list(declared.presets) == list(whole.presets)
    for part in ("name", "description", "backbone_options", "judged_by", "init_is_teacher"):
        assert getattr(declared, part) == getattr(whole, part), part
    for preset in whole.presets:
        assert repr(declared.presets[preset]) == repr(whole.presets[preset])
    assert declared.objective_class.__doc__ == whole.objective_class.__doc__


@pytest.mark.parametrize("name", protocol_names())
def test_a_protocols_options_are_those_of_its_file(name: str) -> None:
    declared, whole = find_protocol_declaration(name), find_protocol(name)
    assert declared.description == whole.description
    assert repr(declared.options_class()) == repr(whole.options_class())


def test_what_is_wanted_comes_with_all_that_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        '"""Mine."""\n'
        "import no_such_module\n"
        "from math import pi as TURN\n"
        "def half(x): return x / SCALE\n"
        "SCALE = 2\n"
        "VALUES = {'a': half(TURN)}\n"
        "VALUES['b'] = 1\n"
        "VALUES.update(c=2)\n"
        "if SCALE:\n    VALUES['d'] = 3\n"
        "for key in 'ef':\n    VALUES[key] = 4\n"
        "UNUSED = no_such_module.value\n"
        "if __name__ == '__main__':\n    print(VALUES, UNUSED)\n"
    )
    module = read_declared(path, "mine:declared", ("VALUES", "NOT_THERE"))
    assert module.__doc__ == "Mine."
    assert {"a": np.pi / 2, "b": 1, "c": 2, "d": 3, "e": 4, "f": 4} == module.VALUES
    assert not hasattr(module, "UNUSED")


def test_what_cannot_be_read_in_parts_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package_of_mine"
    package.mkdir()
    (package / "parts.py").write_text("from headrace.training.methods.simclr import *\n")
    (package / "method.py").write_text(
        '"""Mine."""\nfrom headrace.training.methods.simclr import *\n'
        "from headrace.training.methods import simclr\nbuild = simclr.build\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_declaration("package_of_mine.method").presets.keys() == {
        *find_method("simclr").presets
    }


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--lr", "--optim.learning-rate"),
        ("--optim.lr", "--optim.learning-rate"),
        ("--wd", "--optim.weight-decay"),
        ("--bs", "--data.batch-size"),
        ("--batch_size", "--data.batch-size"),
        ("--workers", "--data.threads"),
        ("--data.num-workers", "--data.threads"),
        ("--epochs", "--run.epochs"),
        ("--epoch", "--run.epochs"),
        ("--nproc_per_node", "--gpus"),
        ("-m", "--method"),
        ("--arch", "--backbone"),
        ("--output_dir", "--run.out"),
        ("--optim.learnin-rate", "--optim.learning-rate"),
        ("--zzz", ""),
    ],
)
def test_the_fields_own_words_lead_to_ours(given: str, meant: str) -> None:
    options = [
        *("--method", "--backbone", "--gpus", "--run.epochs", "--run.out", "--data.threads"),
        *("--data.batch-size", "--optim.learning-rate", "--optim.weight-decay"),
        *("--optim.clip-norm", "--optim.warmup-epochs"),
    ]
    assert near_option(given, options) == (f": did you mean {meant}?" if meant else "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--method dino", (1, ["--method", "dino"])),
        ("--gpus 8 --method dino", (8, ["--method", "dino"])),
        ("--method dino --gpus=2", (2, ["--method", "dino"])),
    ],
)
def test_gpus_are_taken_out_of_the_command_line(
    arguments: str, expected: tuple[int, list[str]]
) -> None:
    assert split_gpus(arguments.split()) == expected


@pytest.mark.parametrize("text", ["--gpus", "--gpus 0", "--gpus -1", "--gpus=x"])
def test_a_wrong_number_of_gpus_is_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match="give the number of GPUs of this machine"):
        split_gpus(text.split())


def test_gpus_within_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="leave it out where torchrun does"):
        split_gpus(["--gpus", "2"])


# ------------------------------------------------------------------------------- several processes


def on_two(photos: Path, out: Path, *more: str) -> list[str]:
    line = f"--method simclr --preset cifar --backbone test_resnet --data.train {photos} --gpus 2"
    line += f" --data.engine reference --data.batch-size 8 --run.device cpu --run.out {out}"
    return ["training/train.py", *line.split(), *more]


@pytest.mark.dist
def test_two_processes_train_by_our_launcher(photos: Path, tmp_path: Path) -> None:
    ended = script(*on_two(photos, tmp_path / "run", "--run.steps", "2"))
    assert ended.returncode == 0, ended.stderr
    assert "on 2 x cpu" in ended.stdout
    assert ended.stdout.count("finished") == 1
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--data.batch-size 9", "take a multiple of 2, as 8"),  # before any rank starts
        ("--backbone nonsense", "has no model 'nonsense'"),  # by the ranks
        ("--run.device auto --gpus 99", "--gpus 99: this machine has"),
    ],
)
def test_with_several_processes_a_mistake_is_one_sentence(
    more: str, said: str, photos: Path, tmp_path: Path
) -> None:
    ended = script(*on_two(photos, tmp_path / "run", *more.split()))
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.fixture
def running(photos: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    options = ("--run.steps", "100000", "--run.log-every", "1")
    with subprocess.Popen(
        [sys.executable, *on_two(photos, tmp_path / "run", *options)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def children_of(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(text) for text in path.read_text().split()]


@pytest.mark.dist
@pytest.mark.parametrize("how", ["a rank is killed", "the launcher is told to end"])
def test_an_end_from_outside_is_said_and_leaves_nobody(
    how: str, running: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert running.stdout is not None
    while not running.stdout.readline().startswith("step 2/"):
        assert running.poll() is None
    ranks = children_of(running.pid)
    assert len(ranks) >= 2
    if how == "a rank is killed":
        os.kill(ranks[-1], signal.SIGKILL)
        _, errors = running.communicate(timeout=120)
        assert running.returncode == 2, errors
        assert "was ended by SIGKILL" in errors
    else:
        running.terminate()
        _, errors = running.communicate(timeout=120)
        assert running.returncode == 128 + signal.SIGTERM
        assert (tmp_path / "run" / "checkpoint.pt").is_file()
    assert "Traceback" not in errors
    deadline = time.monotonic() + 60
    while any((Path("/proc") / str(rank)).exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
