"""What the pages tell a user to type, typed: from another directory, on real processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from headrace.tools.make_tables import PAGES
from headrace.training.catalogue import method_names

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {
    page.relative_to(ROOT).as_posix(): page.read_text()
    for page in (*PAGES, ROOT / "shards/README.md", ROOT / "tools/README.md")
}
README = TEXTS["README.md"]

SMALL = "--data.batch-size 8 --data.holdout 0 --run.steps 2 --run.log-every 1"
TINY = f"{SMALL} --preset cifar --backbone test_resnet"
STEP = "is at step 2 of 2"


class Skipped(str):
    """Why a command of a page is not run here."""

    __slots__ = ()


class Run(NamedTuple):
    """Options that make a command small, what it must print, and what its run must export."""

    options: str
    prints: str
    exports: frozenset[str] = frozenset()


ENCODER, CLASSIFIER = frozenset({"encoder"}), frozenset({"encoder", "classifier"})

RUNS: dict[str, Run | Skipped] = {
    # README, in its order: a user's own photographs
    'pip install -e ".[dali]"': Skipped("setup.sh does, before every test"),
    'pip install "headrace[dali] @ git+REPOSITORY"': Skipped("test_packaging does, with a wheel"),
    "bash tools/quickstart.sh": Skipped("minutes; its parts run here"),
    "bash tools/test.sh": Skipped("it runs this"),
    "python tools/make_shards.py photos/": Run("--workers 1", "32 images, 2 classes"),
    "python training/train.py --method simclr": Run(TINY, f"runs/simclr-photos {STEP}"),
    "python training/evaluate.py runs/simclr-photos": Run("--k 5", "kNN of 8 images among 32"),
    "python tools/show_batch.py --data data/photos --recipe dino --samples 2 --out views.png": Run(
        "--engine reference",
        "2 samples, 10 views each",
    ),
    "python tools/make_tables.py": Skipped("test_make_tables does, without writing"),
    # shards/README.md
    "python tools/make_shards.py photos/ --out data/photos": Run("--workers 1", "complete already"),
    "python tools/verify_shards.py data/photos": Run("", "32 samples"),
    "python tools/make_masks.py data/cifar10": Run(
        "--split test --threads 1 --train-images 16 --steps 2", "saliency"
    ),
    # training/methods/README.md
    "python training/train.py --method simclr --preset v2_imagenet --run.out runs/simclr": Run(
        f"{TINY} --data.train data/cifar10",
        f"runs/simclr {STEP}",
        ENCODER,
    ),
    "python training/train.py --method supervised --init runs/simclr --data.subset 1percent.txt "
    "--run.out runs/tuned": Run(
        f"{TINY} --data.train data/cifar10", f"runs/tuned {STEP}", CLASSIFIER
    ),
    "python training/train.py --method distill --init runs/tuned": Run(
        f"{TINY} --data.train data/cifar10",
        f"runs/distill-cifar10 {STEP}",
        CLASSIFIER,
    ),
    "python training/train.py --method supervised --preset deit_s16_imagenet": Run(
        f"{SMALL} --backbone vit_tiny_patch16_224 --augmentation.group 4 --data.train data/cifar10",
        f"runs/supervised-cifar10 {STEP}",
        CLASSIFIER,
    ),
    "python training/train.py --method deit --objective.teacher runs/supervised": Run(
        f"{TINY} --data.train data/cifar10 --augmentation.group 4 --objective.teacher runs/tuned",
        f"runs/deit-cifar10 {STEP}",
        CLASSIFIER,
    ),
    "python training/train.py --method deit --objective.teacher tf_efficientnet_lite0 "
    "--objective.teacher-weights lite0.pth": Skipped(
        "weights of others; test_blocks_classifier_teacher.py has its own"
    ),
    "python training/train.py --method simclr --data.batch-size 32768 --run.accumulate 32 "
    "--run.gradient-cache --gpus 8": Run(
        f"{TINY} --data.train data/cifar10 --run.accumulate 2 --run.out runs/cached",
        "batch norm normalises each micro-batch",
    ),
    "python training/train.py --method dino --data.holdout 0.05 --run.keep-best holdout_knn_top1 "
    "--run.keep-every 10000": Skipped("test_validation does"),
    "python training/train.py --method supervised --init runs/mae-photos "
    "--augmentation.view.random-resized-crop.size 384": Skipped("test_initial does"),
    "python training/train.py --method dino --backbone vit_small_patch16_224 --init "
    "dino_deitsmall16_pretrain.pth": Skipped("weights of others; test_initial has its own"),
    "python tools/show_reconstruction.py RUN --out F.png": Skipped("test_show_reconstruction does"),
    "python tools/bench_methods.py --jobs 2 --threads 1": Skipped("test_bench_methods does"),
    # tools/benchmarks/README.md
    "python tools/sample_data.py photos --out samples/photos": Skipped("test_sample_data does"),
    "python tools/make_shards.py samples/photos --out data/photos": Skipped("as above"),
    "python tools/bench_pipeline.py --data data/photos --json speed.jsonl --plot speed.png": (
        Skipped("test_bench_pipeline does")
    ),
    "bash tools/quickstart.sh --seed S": Skipped("as above"),
}
"""Each command on the pages."""


def commands(text: str) -> list[str]:
    """Commands in indented lines and in `inline code`, without what a comment says of them."""
    inline = re.findall(r"`((?:python|torchrun|bash|pip install) [^`]+)`", text)
    lines = re.findall(r"^    ((?:python|torchrun|bash|pip install) .*)$", text, flags=re.MULTILINE)
    return [re.sub(r"\s+#.*|\s{2,}.*", "", line) for line in [*lines, *inline]]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run(directory: Path, *command: str) -> str:
    """Standard output of a command that must succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory with photos/{train,val}/{cat,dog}: 32 + 8 JPEGs of 40 x 48 pixels."""
    directory = tmp_path_factory.mktemp("user")
    random = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 8)):
        for number in range(count):
            folder = directory / "photos" / split / ("cat", "dog")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.jpg")
    (directory / "1percent.txt").write_text("".join(f"{sample}\n" for sample in range(0, 40, 2)))
    return directory


@pytest.fixture(scope="module")
def cifar10(place: Path) -> Path:
    """data/cifar10/{train,test} there, 320 + 40 pictures of ten colours in the noise."""
    source = place / "arrays"
    source.mkdir()
    random = np.random.default_rng(0)
    colours = random.integers(0, 256, (10, 1, 1, 3))
    for split, count in (("train", 320), ("test", 40)):
        labels = np.arange(count) % 10
        noise = random.integers(-40, 40, (count, 32, 32, 3))
        images = np.clip(colours[labels] + noise, 0, 255).astype(np.uint8)
        classes = np.array([f"colour {label}" for label in range(10)])
        np.savez(source / f"{split}.npz", images=images, labels=labels, classes=classes)
    tool = str(ROOT / "tools/make_shards.py")
    run(place, sys.executable, tool, "arrays", "--out", "data/cifar10", "--workers", "1")
    return place


def test_every_command_on_the_pages_is_known_here() -> None:
    """So that none is told that nobody runs, and none is run that nobody is told."""
    told = {command for text in TEXTS.values() for command in commands(text)}
    assert told == set(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [command for command, how in RUNS.items() if not isinstance(how, Skipped)]
)
def test_commands_of_the_pages(command: str, place: Path, request: pytest.FixtureRequest) -> None:
    """One after the other, as a reader does. The first ones take the only data set in ./data."""
    how = RUNS[command]
    assert isinstance(how, Run)
    options = how.options
    if "data/cifar10" in f"{command} {options}":
        request.getfixturevalue("cifar10")
    parts = [*command.split(), *options.split()]
    if "--gpus" in parts:
        parts[parts.index("8")] = "2"
        parts += ["--run.device", "cpu"]
    parts = [
        str(ROOT / part) if part.startswith(("tools/", "training/")) else part for part in parts
    ]
    if parts[0] == "python":
        parts[0] = sys.executable
    assert how.prints in run(place, *parts)
    if how.exports:
        out = how.prints.partition(" ")[0]
        assert {path.stem for path in (place / out).glob("*.safetensors")} == how.exports


@pytest.mark.slow
def test_the_commands_in_their_shortest_forms(cifar10: Path, tmp_path: Path) -> None:
    """The only data set under ./data, a run directory named after both, on two processes."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cifar10").symlink_to(cifar10 / "data/cifar10")
    train = str(ROOT / "training/train.py")
    short = ["--method", "dino", "--run.steps", "2", "--run.log-every", "1"]
    said = run(tmp_path, sys.executable, train, *short, "--gpus", "2", "--run.device", "cpu")
    assert f"finished: runs/dino-cifar10 {STEP}" in said
    lines = (tmp_path / "runs/dino-cifar10/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert {"step", "loss", "images_per_second", "wait_share"} <= json.loads(lines[-1]).keys()

    script = str(ROOT / "training/evaluate.py")
    judged = ["--protocol", "knn", "--data.train", "data/cifar10", "--data.val", "data/cifar10"]
    run(tmp_path, sys.executable, script, "runs/dino-cifar10", *judged, "--json", "knn.json")
    result = json.loads((tmp_path / "knn.json").read_text())
    assert 0 <= result["results"]["20"]["top1"] <= 100
    assert result["val"]["samples"] == 40

    for tool, *arguments in (
        ("verify_shards.py", "data/cifar10"),
        ("plot_run.py", "runs/dino-cifar10"),
        ("show_batch.py", "--data", "data/cifar10", "--method", "dino", "--out", "views.png"),
    ):
        run(tmp_path, sys.executable, str(ROOT / "tools" / tool), *arguments)
    assert (tmp_path / "views.png").stat().st_size > 1000
    assert (tmp_path / "runs/dino-cifar10/curves.png").stat().st_size > 1000


@pytest.mark.slow
def test_our_loader_in_a_users_loop(cifar10: Path) -> None:
    (loop,) = [block for block in python_blocks(README) if "open_loader" in block]
    check = "assert loader.state_dict()['epoch'] == 1 and torch.isfinite(loss)\nloader.close()\n"
    run(cifar10, sys.executable, "-c", loop + check)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "training/methods/README.md"])
def test_a_users_own_method(page: str, cifar10: Path) -> None:
    (method,) = [block for block in python_blocks(TEXTS[page]) if "class Align" in block]
    (cifar10 / "my_package").mkdir(exist_ok=True)
    (cifar10 / "my_package/align.py").write_text(method)
    train = [str(ROOT / "training/train.py"), "--method", "my_package.align", "--preset", "cifar"]
    options = "--data.train data/cifar10 --data.batch-size 32 --run.steps 3 --run.log-every 3"
    runs = f"runs/align-{page.split('/')[0]}"
    losses = []
    for processes in ("1", "2"):
        launch = ["torchrun", "--standalone", "--nproc-per-node", processes]
        out = f"--run.out {runs}-{processes}"
        said = run(cifar10, *launch, *train, *options.split(), *out.split())
        losses += re.findall(r"loss (\S+)", said)
    assert len(losses) == 2
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=2e-3)


@pytest.mark.slow
def test_a_store_is_read_as_the_page_says(cifar10: Path) -> None:
    (reading,) = python_blocks(TEXTS["shards/README.md"])
    check = "assert len(store) == 320 and heights_and_widths.shape == (3, 2) and len(first)\n"
    run(cifar10, sys.executable, "-c", reading + check)


@pytest.mark.slow
def test_the_encoder_is_a_timm_model(place: Path) -> None:
    """In small: the run above is of another backbone than the page's."""
    (loading,) = [block for block in python_blocks(README) if "local-dir" in block]
    if not (
        place / "runs/simclr-photos/encoder"
    ).is_dir():  # run alone, without the page's commands
        train = f"--method simclr {TINY} --data.train photos --run.out runs/simclr-photos"
        run(place, sys.executable, str(ROOT / "training/train.py"), *train.split())
    check = "from PIL import Image\nseen = transform(Image.open('photos/val/cat/0.jpg'))[None]\n"
    check += "assert encoder(seen).shape[0] == 1\n"
    run(place, sys.executable, "-c", loading + check)


def test_every_python_block_is_one_of_those_above() -> None:
    assert [len(python_blocks(text)) for text in TEXTS.values()] == [
        {"README.md": 3, "shards/README.md": 1, "training/methods/README.md": 1}.get(page, 0)
        for page in TEXTS
    ]


def test_links_and_files_named_on_the_pages_are_there() -> None:
    for page, text in TEXTS.items():
        folder = (ROOT / page).parent
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if not target.startswith("https://"):
                assert (folder / target).exists(), f"{page}: {target}"


def test_the_trees_name_folders_and_files_that_are_there() -> None:
    """A line of a tree: names at the start, two spaces, what they are. Deeper lines lie inside."""
    trees = {
        ("README.md", "## The tree"): "",
        ("shards/README.md", "## The files"): "shards",
        ("training/methods/README.md", "## Around a method"): "training",
    }
    for (page, heading), folder in trees.items():
        tree = TEXTS[page].partition(heading)[2].partition("\n## ")[0]
        lines = re.findall(r"^    ( *)((?:[a-z_]+(?:/|\.py) +)+)", tree, flags=re.MULTILINE)
        assert len(lines) >= 5
        parent = ""
        for indent, names in lines:
            for name in names.split():
                path = ROOT / folder / (parent if indent else "") / name
                assert path.exists(), f"{page}: {path.relative_to(ROOT)}"
            parent = parent if indent else names.split()[0]


def test_the_methods_are_all_named_and_counted() -> None:
    page = TEXTS["training/methods/README.md"]
    for name in method_names():
        assert f"`{name}`" in page
    assert f"{len(method_names())} methods" in README


def test_the_first_screen_says_what_this_is() -> None:
    first = " ".join(README.split()[:400])
    for word in ("Self-supervised", "unlabelled", "pip install", "Install", "Apache-2.0"):
        assert word in first
    assert len(README.splitlines()) <= 190
    assert not re.findall(r"^[A-Z_]{4,}$", "".join(TEXTS.values()), flags=re.MULTILINE)


@pytest.mark.slow
def test_shell_scripts_explain_themselves_and_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    for name, known, unknown in (("quickstart", "--seed", "--sed"), ("test", "--fast", "--fst")):
        script = str(ROOT / f"tools/{name}.sh")
        assert known in run(tmp_path, "bash", script, "--help")
        wrong = subprocess.run(
            ["bash", script, unknown, "1"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert wrong.returncode == 2
        assert wrong.stderr.startswith(f"error: unknown option {unknown}")
        assert not wrong.stdout  # nothing was installed before that
    for script in ("quickstart.sh", "test.sh", "setup.sh"):
        run(tmp_path, "bash", "-n", str(ROOT / "tools" / script))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "python training/train.py --help",
        "python -m headrace.training.train --help",
        "torchrun --standalone --nproc-per-node 1 training/train.py --help",
        "torchrun --standalone --nproc-per-node 1 -m headrace.training.train --help",
        "python tools/make_shards.py --help",
    ],
)
def test_scripts_run_as_typed_in_the_clone_and_by_their_module(command: str) -> None:
    """`python training/train.py` puts training/ first on the path: nothing there hides another."""
    assert "example" in run(ROOT, *command.replace("python ", f"{sys.executable} ", 1).split())


SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("tools", "training")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


def test_every_script_is_on_the_page_of_tools() -> None:
    assert len(SCRIPTS) >= 14
    assert [script for script in SCRIPTS if script not in TEXTS["tools/README.md"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_examples(script: str, tmp_path: Path) -> None:
    said = run(tmp_path, sys.executable, str(ROOT / script), "--help")
    assert "example" in said
    assert said.count(Path(script).name) >= 2
