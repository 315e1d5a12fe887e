"""Features, the evaluation of a run, and the pictures drawn of it, on a run made by hand."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from headrace.pipelines.declaration import augmentation_from
from headrace.pipelines.recipes import center, deit, dino
from headrace.shards.errors import UserError
from headrace.shards.store import Store, open_store
from headrace.training.backbones import resolve_options
from headrace.training.build import trained_encoder, untrained_encoder
from headrace.training.catalogue import find_method, method_names
from headrace.training.features import FeaturePass, extract
from headrace.training.preset import ConfigError
from headrace.training.protocols.knn import knn_predict
from headrace.training.run.export import export, read_initial
from headrace.training.run.record import read_metrics, read_record
from headrace.training.world import World
from tests.handmade_runs import make_run

ROOT = Path(__file__).resolve().parent.parent
TEST_VIEW = center(32, 32)


def script(path: str, *arguments: object, directory: Path) -> "subprocess.CompletedProcess[str]":
    """An entry point as people start it, from a directory that is not the project's."""
    command = [sys.executable, str(ROOT / path), *map(str, arguments)]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


# --------------------------------------------------------------------------------------- features


class MeanColour(nn.Module):
    """[B, 3, H, W] -> [B, 3]; counts its images and notes its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm2d(3).eval()
        self.modes: set[tuple[bool, bool]] = set()
        self.shapes: set[torch.Size] = set()

    def forward(self, pixels: Tensor) -> Tensor:
        self.modes.add((self.training, torch.is_grad_enabled()))
        self.shapes.add(pixels.shape)
        return pixels.mean(dim=(2, 3))


def pass_over(store: Store, batch_size: int, world: World) -> FeaturePass:
    return FeaturePass(store, {"test": TEST_VIEW}, batch_size, "reference", world, threads=1)


def mean_colours(store: Store) -> Tensor:
    """float32 [n, 3], normalised, read with Pillow alone."""
    pictures = [
        np.asarray(Image.open(Path(store.uri) / n)) for n in store.names(np.arange(len(store)))
    ]
    colours = torch.tensor(np.stack(pictures)).double().mean(dim=(1, 2)) / 255
    return ((colours - torch.tensor(TEST_VIEW.mean)) / torch.tensor(TEST_VIEW.std)).float()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_every_sample_is_seen_once(data: Path, ranks: int, batch_size: int) -> None:
    """Also by ranks that have nothing in the last batch, or nothing at all (3 x 64 > 21)."""
    store = open_store(data / "test")
    encoder = MeanColour()
    shares = [
        extract(encoder, pass_over(store, batch_size, World(rank=rank, size=ranks)))
        for rank in range(ranks)
    ]
    ids = torch.cat([share.ids for share in shares])
    order = ids.argsort()
    assert ids[order].tolist() == list(range(len(store)))
    features = torch.cat([share.features for share in shares])[order]
    torch.testing.assert_close(features, mean_colours(store), atol=1e-5, rtol=0)
    labels = torch.cat([share.labels for share in shares])[order]
    assert labels.tolist() == store.labels(np.arange(len(store))).tolist()
    assert encoder.modes == {(False, False)}
    assert encoder.training
    assert not encoder.frozen.training  # each part has its own mode back


def test_features_do_not_depend_on_the_company(data: Path) -> None:
    """A short last batch is computed in the shape of the others: the same kernels."""
    store = open_store(data / "test")
    encoder = MeanColour()
    extract(encoder, pass_over(store, 8, World()))
    assert encoder.shapes == {torch.Size([8, 3, 32, 32])}


def test_a_share_without_samples_has_the_right_width(data: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(data / "test" / "red" / "000.png", tmp_path / "one")
    shares = [
        extract(MeanColour(), pass_over(open_store(tmp_path), 4, World(rank=rank, size=2)))
        for rank in range(2)
    ]
    assert sorted(tuple(share.features.shape) for share in shares) == [(0, 3), (1, 3)]


def test_a_method_gets_batches_and_its_own_mode_between_them(data: Path) -> None:
    encoder = MeanColour()
    feature_pass = FeaturePass(
        open_store(data / "train"),
        {"test": TEST_VIEW, "dino": dino(32, 16, 2), "deit": deit(32, group=8)},
        batch_size=16,
        engine="reference",
        world=World(),
        threads=1,
        precision="bf16",
        holdout=0.5,
    )
    seen: list[int] = []
    for ids, features in feature_pass.features(encoder):
        assert encoder.training
        assert torch.is_grad_enabled()
        assert features.dtype == torch.float32
        seen += ids.tolist()
    held_out = [
        int(i) for ids, _ in replace(feature_pass, part="holdout").features(encoder) for i in ids
    ]
    assert len(seen) == len(held_out) == 30
    assert sorted(seen + held_out) == list(range(60))
    alone = [int(i) for ids, _ in feature_pass.features(encoder, "deit") for i in ids]
    assert sorted(alone) == sorted(seen), "30 are no whole groups of 8, and nothing is mixed"
    with pytest.raises(ValueError, match="one view per image; 'dino' has 4"):
        next(feature_pass.features(encoder, "dino"))


# ----------------------------------------------------------------------------------------- record


@pytest.mark.parametrize("method", method_names())
def test_presets_are_read_back(method: str) -> None:
    for preset in find_method(method).presets.values():
        for augmentation in (preset.augmentation, preset.test):
            declared = json.loads(json.dumps(augmentation.declaration()))
            assert augmentation_from(declared).declaration() == augmentation.declaration()


def test_the_record_of_a_run(run: Path, data: Path) -> None:
    record = read_record(run)
    assert (record.method, record.backbone, record.seed) == ("dino", "test_resnet", 5)
    assert (record.train, record.val, record.engine) == (data, None, "reference")
    assert (record.step, record.total_steps, record.train_samples) == (30, 30, 60)
    assert record.test == TEST_VIEW


def test_the_untrained_encoder_is_that_of_the_seed(run: Path, data: Path) -> None:
    record, store = read_record(run), open_store(data, "train")
    first, again = (untrained_encoder(record, store).state_dict() for _ in range(2))
    other = untrained_encoder(replace(record, seed=6), store).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


COMPOSITE = ("cmc", "deepcluster")  # whose encoders are no plain timm models


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in COMPOSITE else pytest.mark.slow)
        for name in method_names()
    ],
)
def test_what_a_method_exports_is_what_is_judged(method: str, data: Path, tmp_path: Path) -> None:
    declared, store = find_method(method), open_store(data, "train")
    preset = declared.presets["cifar"]
    options = {**declared.backbone_options, **preset.backbone_options}
    views = tuple(view.shape[0] for view in preset.augmentation.flat_views)
    options = resolve_options(preset.backbone, options, views, preset.test.flat_views[0].shape[0])
    # The run had more images than it is judged with.
    make_run(tmp_path / "run", data, method, preset.backbone, options, samples=50_000)
    record = read_record(tmp_path / "run")
    other = untrained_encoder(replace(record, seed=99), store)
    for value in other.buffers():  # as if training had moved running statistics
        if value.is_floating_point():
            value.mul_(1.5)
    export(other.state_dict(), tmp_path / "run" / "encoder.safetensors")

    judged = trained_encoder(record, store)
    noise = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    saved = other.state_dict()
    assert saved.keys() == judged.state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in judged.state_dict().items())
    with torch.no_grad():
        features = judged.eval()(noise)
        begun = untrained_encoder(record, store).eval()(noise)
    assert features.shape == begun.shape == (2, features.shape[1])
    assert features.isfinite().all()
    assert not torch.allclose(features, begun)


def test_weights_of_another_encoder_are_refused(run: Path, data: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "cmc", data, "cmc", "test_resnet", {})
    record = read_record(tmp_path / "cmc")
    shutil.copy(run / "encoder.safetensors", tmp_path / "cmc")
    with pytest.raises(ConfigError, match=r"not hold the weights of the encoder that cmc builds"):
        trained_encoder(record, open_store(data, "train"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda run: (run / "config.json").unlink(), "is no run: it holds no config.json"),
        (lambda run: (run / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda run: (run / "config.json").write_text("{}"), "not as this version writes it"),
        (
            lambda run: (run / "config.json").write_text(
                (run / "config.json").read_text().replace('"Flip"', '"Flop"')
            ),
            "KeyError: 'Flop'",
        ),
        (shutil.rmtree, "there is no run"),
    ],
)
def test_what_is_no_run_ends_in_a_sentence(
    run: Path, tmp_path: Path, change: Callable[[Path], object], sentence: str
) -> None:
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    change(broken)
    with pytest.raises(ConfigError, match=sentence):
        read_record(broken)


# --------------------------------------------------------------------------------------- evaluate


@pytest.mark.slow
def test_evaluate_from_another_directory(run: Path, data: Path, tmp_path: Path) -> None:
    result = script(
        "training/evaluate.py", run, "--protocol", "knn", "--data.train", data, "--data.val", data,
        "--json", "knn.json", "--batch-size", 16, directory=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for words in (
        "dino, test_resnet, after 30 steps; judged at 32 pixels; reference engine, 1 x cpu",
        "kNN of 21 images among 60 in 3 classes",
        "k = 100 is left out: there are only 60 training images",
        "wrote knn.json",
    ):
        assert words in result.stdout
    written = json.loads((tmp_path / "knn.json").read_text())
    assert (written["protocols"], written["step"], written["untrained"]) == (["knn"], 30, False)
    assert "linear" not in written
    assert list(written["results"]) == ["10", "20"]
    assert written["skipped_k"] == [100, 200]
    assert written["results"]["20"]["top1"] > 80
    assert written["results"]["20"]["top5"] == 100
    assert written["train"]["fingerprint"] == open_store(data, "train").fingerprint
    assert written["val"]["samples"] == 21
    assert written["versions"]["torch"] == metadata.version("torch")

    untrained = script(
        "training/evaluate.py", run, "--untrained", "--json", "untrained.json", "--k", 7, 5,
        directory=tmp_path,
    )  # fmt: skip
    assert untrained.returncode == 0, untrained.stderr
    assert "test_resnet, untrained;" in untrained.stdout
    written = json.loads((tmp_path / "untrained.json").read_text())
    assert (written["step"], list(written["results"])) == (0, ["5", "7"])
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.slow
def test_a_real_run_is_read_judged_and_drawn(
    evaluate: Callable[..., int],
    show_batch: dict[str, Any],
    plot_run: dict[str, Any],
    data: Path,
    tmp_path: Path,
) -> None:
    """What train.py writes, at a learning rate of 0: `--untrained` has the weights it began with.

    Only what batch norm saw of the images differs.
    """
    run = tmp_path / "run"
    done = script(
        "training/train.py", "--method", "dino", "--backbone", "test_resnet", "--data.train", data,
        "--data.batch-size", 16, "--run.out", run, "--run.steps", 2, "--run.seed", 9,
        "--optim.learning-rate", 0, "--optim.final-learning-rate", 0, directory=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = read_record(run)
    assert (record.step, record.total_steps, record.seed) == (2, 2, 9)
    untrained = untrained_encoder(record, open_store(data, "train"))
    trained = read_initial(run)
    assert untrained.state_dict().keys() == trained.keys()
    for name, parameter in untrained.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    assert evaluate([str(run), "--k", "5", "--json", str(run / "knn.json")]) == 0
    assert json.loads((run / "knn.json").read_text())["step"] == 2
    assert show_batch["main"](["--run", str(run), "--out", str(run / "views.png")]) == 0
    assert plot_run["main"]([str(run)]) == 0


@pytest.fixture(scope="module")
def evaluate() -> Callable[..., int]:
    return runpy.run_path(str(ROOT / "training/evaluate.py"))["main"]


@pytest.mark.slow
@pytest.mark.dist
def test_evaluate_with_two_processes_gives_the_same(
    evaluate: Callable[..., int], run: Path, tmp_path: Path
) -> None:
    arguments = [str(run), "--batch-size", "8", "--protocol", "knn", "linear"]
    arguments += ["--linear.epochs", "10", "--linear.batch-size", "20", "--json"]
    assert evaluate([*arguments, str(tmp_path / "1.json")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "training/evaluate.py"), *arguments, str(tmp_path / "2.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    alone, together = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert alone["results"] == together["results"]
    assert (alone["world_size"], together["world_size"]) == (1, 2)
    for one, other in zip(alone["linear"]["tried"], together["linear"]["tried"], strict=True):
        assert one["held_out_cross_entropy"] == pytest.approx(
            other["held_out_cross_entropy"], rel=1e-3
        )
    assert alone["linear"]["accuracy"] == together["linear"]["accuracy"]


def test_both_protocols_share_the_features(
    evaluate: Callable[..., int], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run), "--linear.learning-rates", "0.1", "1", "--linear.epochs", "20"]
    arguments += ["--linear.batch-size", "20", "--json", str(tmp_path / "both.json")]
    assert evaluate([*arguments, "--k", "5", "--protocol", "linear", "knn"]) == 0
    said = capsys.readouterr().out
    assert "kNN of 21 images among 60 in 3 classes" in said
    assert "linear probe of 21 images, trained on 60 in 3 classes" in said
    assert said.count("chosen") == 1
    written = json.loads((tmp_path / "both.json").read_text())
    assert written["protocols"] == ["knn", "linear"]
    assert list(written["seconds"]) == ["train_features", "val_features", "knn", "linear"]
    linear = written["linear"]
    assert [one["learning_rate"] for one in linear["tried"]] == [0.1, 1.0]
    assert (linear["sweep"]["epochs"], linear["sweep"]["batch_size"]) == (20, 20)
    assert (linear["held_out_samples"], linear["train_samples"]) == (6, 60)
    assert linear["accuracy"]["top1"] > 80
    assert evaluate([*arguments, "--protocol", "linear"]) == 0
    alone = json.loads((tmp_path / "both.json").read_text())
    assert alone["linear"] == linear
    assert "results" not in alone


def test_pixels_are_judged_without_a_network(
    evaluate: Callable[..., int], run: Path, data: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "run"
    shutil.copytree(run, empty, ignore=lambda *_: ["encoder.safetensors", "checkpoint.pt"])
    arguments = [str(empty), "--pixels", "--k", "3", "--json", str(tmp_path / "pixels.json")]
    assert evaluate([*arguments, "--protocol", "knn", "linear", "--linear.epochs", "5"]) == 0
    written = json.loads((tmp_path / "pixels.json").read_text())
    assert (written["pixels"], written["step"]) == (True, 0)
    assert written["linear"]["width"] == 3 * 32 * 32

    def pixels(split: str) -> tuple[Tensor, Tensor]:
        store = open_store(data, split)
        ids = np.arange(len(store))
        pictures = [np.asarray(Image.open(Path(store.uri) / name)) for name in store.names(ids)]
        whole = torch.tensor(np.stack(pictures)) / 255
        normalised = (whole - torch.tensor(TEST_VIEW.mean)) / torch.tensor(TEST_VIEW.std)
        return normalised.flatten(1), torch.tensor(store.labels(ids))

    train, test = pixels("train"), pixels("test")
    predicted = knn_predict(*train, test[0], k=3, classes=3)[:, 0]
    assert written["results"]["3"]["top1"] == 100 * float((predicted == test[1]).double().mean())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pixels", "--untrained"], ["--linear.learning-rates", "0"], ["--protocol", "svm"],
        ["--linear.weight-decays", "-1"], ["--linear.learning-rates", "fast"], ["--k", "0"],
        ["--linear.epochs", "0"], ["--linear.epoch", "3"], ["--k"], ["--protocol", "none.such"],
    ],
)  # fmt: skip
def test_evaluate_refuses_what_means_nothing(
    evaluate: Callable[..., int], run: Path, arguments: list[str]
) -> None:
    """In one sentence that names the option."""
    with pytest.raises(UserError) as caught:
        evaluate([str(run), *arguments])
    assert arguments[0].lstrip("-").partition(".")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_protocol_is_answered_with_the_nearest(
    evaluate: Callable[..., int], run: Path
) -> None:
    with pytest.raises(ConfigError, match=r"lineer is unknown: did you mean linear\?"):
        evaluate([str(run), "--protocol", "knn", "lineer"])


def test_help_lists_the_options_of_every_protocol(
    evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        evaluate(["--help"])
    told = capsys.readouterr().out
    for option in (
        "--knn.k NUMBER [NUMBER ...]", "--linear.learning-rates", "--linear.weight-decays",
        "--linear.epochs NUMBER", "--linear.batch-size NUMBER", "default: 10 20 100 200",
    ):  # fmt: skip
        assert option in told


def test_nothing_is_computed_for_options_that_do_not_fit(
    evaluate: Callable[..., int], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large the data: no encoder is built and no feature taken before they are refused."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setitem(evaluate.__globals__, "trained_encoder", never)  # pyright: ignore
    with pytest.raises(UserError, match=r"1000000 training samples; there are 60 \(train: "):
        evaluate([str(run), "--k", "1000000"])
    with pytest.raises(AssertionError, match="something was computed"):
        evaluate([str(run), "--k", "60"])


OUTSIDE = '''
"""How far apart classes lie: the mean distance of their centres.

A test's protocol.
"""
from dataclasses import dataclass
from typing import Literal

from headrace.training.protocol import ProtocolError
from headrace.training.protocol_options import option


@dataclass(frozen=True)
class Options:
    scale: float = option(1.0, "of all distances")
    least_images: int = 2
    norm: Literal["l1", "l2"] = "l2"
    squared: bool = False
    only: tuple[int, ...] | None = None

    def check(self, train, val):
        if len(val) < self.least_images:
            raise ProtocolError(f"there are fewer than {self.least_images} images")


@dataclass(frozen=True)
class Distances:
    mean: float
    images: int
    options: Options

    def shown(self):
        return f"class centres are {self.mean:.3f} apart"

    def stored(self):
        return {"distances": {"mean": self.mean, "images": self.images}}


def judge(subject, options):
    features = subject.features("val")
    with subject.images("val") as batches:
        images = sum(len(batch.labels) for batch in batches)
    centres = [features.features[features.labels == label].mean(0) for label in range(3)]
    gaps = [(a - b).norm().item() for a in centres for b in centres]
    return Distances(options.scale * sum(gaps) / 6, images, options)
'''


@pytest.mark.slow
def test_a_protocol_of_ones_own(run: Path, tmp_path: Path) -> None:
    """From a file beside the data, by its dotted name, with options of its own."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "distances.py").write_text(OUTSIDE)
    means = []
    for scale in (1, 3):
        judged = script(
            "training/evaluate.py", run, "--protocol", "mine.distances", "--distances.scale", scale,
            "--distances.only", 1, 2, "--json", "judged.json", directory=tmp_path,
        )  # fmt: skip
        assert judged.returncode == 0, judged.stderr
        written = json.loads((tmp_path / "judged.json").read_text())
        assert written["protocols"] == ["mine.distances"]
        assert written["distances"]["images"] == 21
        assert list(written["seconds"]) == ["val_features", "mine.distances"]
        means.append(written["distances"]["mean"])
        assert f"class centres are {means[-1]:.3f} apart" in judged.stdout
    assert means[1] == pytest.approx(3 * means[0])
    refused = script(
        "training/evaluate.py", run, "--protocol", "mine.distances", "--distances.least-images",
        22, directory=tmp_path,
    )  # fmt: skip
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: there are fewer than 22 images (train: ")
    (package / "half.py").write_text("class Options: ...")
    refused = script("training/evaluate.py", run, "--protocol", "mine.half", directory=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.rstrip().endswith("half.py has no judge")


def test_evaluate_says_what_is_missing(
    evaluate: Callable[..., int], run: Path, data: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(data / "test" / "red", flat)
    others = tmp_path / "others"
    shutil.copytree(data / "test", others)
    (others / "blue").rename(others / "violet")
    no_encoder = tmp_path / "no_encoder"
    shutil.copytree(run, no_encoder, ignore=lambda *_: ["encoder.safetensors"])
    for arguments, sentence in (
        ([tmp_path / "none"], "there is no run"),
        ([no_encoder], "holds no encoder.safetensors: the run writes it with its first"),
        ([run, "--data.val", flat], "7 of the 7 images of .*flat have no label"),
        ([run, "--data.train", flat], "--data.val is missing"),
        ([run, "--data.train", flat, "--data.val", data], "--data.train: 7 of the 7 images"),
        ([run, "--data.val", others], "different classes: 1 of the second, such as 'violet'"),
        ([run, "--k", "61"], "at least 61 training samples; there are 60"),
        ([run, "--json", tmp_path / "none" / "x.json"], "there is no directory"),
        ([run, "--run.device", "cuda"], "no CUDA device"),
    ):
        if "cuda" in arguments and torch.cuda.is_available():
            continue
        with pytest.raises(ValueError, match=sentence):
            evaluate([str(argument) for argument in arguments])


def test_a_training_split_finds_the_test_split_beside_it(
    evaluate: Callable[..., int], run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate([str(run), "--data.train", str(data / "train"), "--k", "3"]) == 0
    assert "kNN of 21 images among 60" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- pictures


def colours_of(path: Path) -> tuple[tuple[int, int], int]:
    """((width, height), number of different colours) of a PNG."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        return picture.size, len(np.unique(pixels, axis=0))


@pytest.fixture(scope="module")
def show_batch() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools/show_batch.py"))


@pytest.mark.slow
def test_show_batch_from_another_directory(run: Path, tmp_path: Path) -> None:
    result = script(
        "tools/show_batch.py", "--run", run, "--out", "new/sheet.png", "--samples", 3,
        directory=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "3 samples, 6 views each, reference engine" in result.stdout
    (width, height), colours = colours_of(tmp_path / "new" / "sheet.png")
    # Views of 32 pixels are shown with 128; three of these and two of 64 make a row.
    assert 3 * 128 + 2 * 64 < width < 1.5 * (3 * 128 + 2 * 64)
    assert 3 * 128 < height < 2 * 3 * 128
    assert colours > 1000


@pytest.mark.slow
def test_plot_run_from_another_directory(run: Path, tmp_path: Path) -> None:
    knn = tmp_path / "mine.json"
    knn.write_text(json.dumps({"step": 0, "results": {"10": {"top1": 31.0, "top5": 90.0}}}))
    result = script(
        "tools/plot_run.py", run, "--out", "new/curves.png", "--knn", knn, directory=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "6 logged steps, 1 kNN results" in result.stdout
    size, colours = colours_of(tmp_path / "new" / "curves.png")
    assert size == (1440, 900)
    assert colours > 100


@pytest.fixture(scope="module")
def plot_run() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools/plot_run.py"))


def test_plot_shows_what_was_measured(plot_run: dict[str, Any], run: Path, tmp_path: Path) -> None:
    """Values in the panels; not finite values are gaps; files of kNN are found by their name."""
    metrics = read_metrics(run)
    metrics[-1]["holdout_top1"] = 0.5
    judge = plot_run["Judgement"]
    judgements = [judge(0, {10: 30.0, 20: 31.0}), judge(30, {10: 40.0, 20: 42.0})]
    figure = plot_run["draw"](read_record(run), metrics, judgements)
    loss, accuracy, speed, waiting = figure.axes
    assert loss.lines[0].get_xdata().tolist() == [5, 10, 15, 20, 25, 30]
    expected = [7.5, 7.0, 6.5, np.nan, 5.5, 5.0]
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), expected)
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [[30, 40], [31, 42], [50]]
    assert accuracy.lines[1].get_label() == "kNN, k = 20: 31.0 to 42.0"
    assert speed.lines[0].get_ydata().tolist() == [105, 110, 115, 120, 125, 130]
    assert set(waiting.lines[0].get_ydata()) == {25}
    assert "dino · test_resnet" in figure.get_suptitle()


def test_plot_of_a_running_run(
    plot_run: dict[str, Any], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a last line, no kNN yet; then no metrics at all, and files that are something else."""
    running = tmp_path / "run"
    shutil.copytree(run, running, ignore=lambda *_: ["checkpoint.pt"])
    whole = (running / "metrics.jsonl").read_text()
    (running / "metrics.jsonl").write_text(whole[:-20])
    assert plot_run["main"]([str(running)]) == 0
    assert "5 logged steps, 0 kNN results" in capsys.readouterr().out
    assert colours_of(running / "curves.png")[1] > 100

    for content, sentence in (("", "no logged step yet"), ("x\n" + whole, "line 1 is no JSON")):
        (running / "metrics.jsonl").write_text(content)
        assert plot_run["main"]([str(running)]) == 2
        assert sentence in capsys.readouterr().err
    (running / "metrics.jsonl").write_text(whole)
    (running / "knn.json").write_text("[1]")
    assert plot_run["main"]([str(running)]) == 2
    assert "knn.json is no result of evaluate.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--linear.epochs", "3"], "--linear.epochs is an option of --protocol linear, which is"),
        (["--protocol", "linear", "--k", "5"], "--k is an option of --protocol knn, which is not"),
        (["--protocol", "linear", "--knn.k=5"], "--knn.k is an option of --protocol knn"),
    ],
)
def test_an_option_of_a_protocol_that_is_not_asked_for_is_refused(
    evaluate: Callable[..., int], run: Path, arguments: list[str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        evaluate([str(run), *arguments])
