"""The pictures of a masked method's run: what is hidden is grey, what is visible stays."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from headrace.training.backbones import EncoderFactory, resolve_options
from headrace.training.catalogue import find_method
from headrace.training.method import Facts
from headrace.training.run import checkpoint
from headrace.training.run.record import read_record
from tests.handmade_runs import make_run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool() -> Any:
    return import_module("headrace.tools.show_reconstruction")


def make_checkpoint(directory: Path, data: Path, method: str) -> None:
    """A run of the method's CIFAR preset that has taken three steps, which changed nothing."""
    preset = find_method(method).presets["cifar"]
    pixels = tuple(view.shape[0] for view in preset.augmentation.flat_views)
    options = resolve_options(preset.backbone, preset.backbone_options, pixels, pixels[0])
    make_run(directory, data, method, preset.backbone, options)
    masks = tuple(view.mask for view in preset.augmentation.flat_views)
    facts = Facts(3, 60, pixels, 16, 4, 30, masks=masks)
    factory = EncoderFactory(preset.backbone, options)
    torch.manual_seed(1)
    built = find_method(method).build(preset.objective, factory, facts)
    checkpoint.save(directory / "checkpoint.pt", {"step": 3, "method": built.state_dict()})


@pytest.fixture(scope="module", params=["mae", "spark"])
def run(request: pytest.FixtureRequest, data: Path) -> Path:
    directory = data.parent / request.param
    make_checkpoint(directory, data, request.param)
    return directory


def test_a_run_becomes_a_sheet(
    tool: Any,
    run: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "new" / "sheet.png"
    assert tool.main([str(run), "--out", str(out), "--samples", "4"]) == 0
    said = capsys.readouterr().out
    assert "4 pictures, with each patch's true mean and deviation, after 3 steps" in said
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet)
    assert (pixels == tool.MASK_GREY).all(axis=-1).sum() > 4 * 128 * 128 * 0.3
    again = tmp_path / "again.png"
    assert tool.main([str(run), "--out", str(again), "--samples", "4"]) == 0
    assert again.read_bytes() == out.read_bytes()
    for number, arguments in enumerate([["--data", str(data)], ["--seed", "1"]]):
        other = tmp_path / f"{number}.png"
        assert tool.main([str(run), "--out", str(other), "--samples", "4", *arguments]) == 0
        assert other.read_bytes() != out.read_bytes()


def test_the_checkpoints_weights_paint(tool: Any, run: Path) -> None:
    """All of them: encoder, decoder and statistics, in evaluation mode."""
    record = read_record(run)
    method, step = tool.trained_method(record, tool.open_train(record.train))
    assert step == 3
    assert not method.training
    saved = checkpoint.load(run, torch.device("cpu"))
    assert saved is not None
    for name, value in method.state_dict().items():
        assert torch.equal(value, saved["method"][name]), name


def test_columns_hide_and_put_back_pixel_by_pixel(tool: Any, run: Path) -> None:
    record = read_record(run)
    options = tool._parse([str(run), "--out", "x.png", "--samples", "3"])
    batch = tool.first_batch(record, tool.open_train(record.train), options)
    removed = tool.hidden(record, batch)
    cell = record.augmentation.flat_views[0].mask.patch_pixels  # pyright: ignore[reportOptionalMemberAccess]
    mask = batch.masks[0]
    side = removed.shape[1] // cell
    for sample, row, column in np.ndindex(3, removed.shape[1], removed.shape[2]):
        expected = bool(mask[sample, row // cell * side + column // cell])
        assert removed[sample, row, column, 0] == expected
    seen, painted = np.full((2, *removed.shape[:3], 3), [[[[[1.0]]]], [[[[2.0]]]]])
    masked, whole, pasted = tool.columns(seen, painted, removed)
    hidden = removed[..., 0]
    assert (masked[hidden] == tool.MASK_GREY).all()
    assert (masked[~hidden] == 1).all()
    assert (whole == 2).all()
    assert (pasted[hidden] == 2).all()
    assert (pasted[~hidden] == 1).all()


def test_a_method_from_elsewhere(
    tool: Any,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By its dotted name, and nothing but `reconstruct` is asked of it."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "painter.py").write_text(
        "from headrace.training.methods.mae import *\n"
        "from headrace.training.methods import mae\n"
        "class Painter(mae.Mae):\n"
        "    def reconstruct(self, batch):\n"
        "        return batch.views[0] * 0, 'grey everywhere'\n"
        "def build(*arguments):\n"
        "    method = mae.build(*arguments)\n"
        "    method.__class__ = Painter\n"
        "    return method\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # undone afterwards, whatever the tool appends
    make_checkpoint(tmp_path / "run", data, "own.painter")
    assert tool.main(["run", "--out", "sheet.png", "--samples", "2"]) == 0
    assert "grey everywhere" in capsys.readouterr().out


def test_what_cannot_be_shown_is_one_sentence(
    tool: Any,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(run: Path, *arguments: str) -> str:
        assert tool.main([str(run), "--out", str(tmp_path / "sheet.png"), *arguments]) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        assert not (tmp_path / "sheet.png").exists()
        return text

    make_checkpoint(tmp_path / "simclr", data, "simclr")
    text = said(tmp_path / "simclr")
    assert "is a run of simclr, which reconstructs no pictures; mae and spark do" in text
    assert "there is no run" in said(tmp_path / "nowhere")
    make_checkpoint(tmp_path / "mae", data, "mae")
    assert "none" in said(tmp_path / "mae", "--data", str(tmp_path / "none"))
    assert "has 60 images" in said(tmp_path / "mae", "--samples", "61")
    path = tmp_path / "mae" / "checkpoint.pt"
    state = torch.load(path)
    state["method"].pop("decoder.norm.weight")
    torch.save(state, path)
    assert "decoder.norm.weight" in said(tmp_path / "mae")
    path.unlink()
    assert "holds no checkpoint.pt yet" in said(tmp_path / "mae")
