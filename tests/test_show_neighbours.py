"""The sheet of nearest neighbours: which pictures, which neighbours, which frames."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from headrace.shards.store import open_store
from headrace.training.build import trained_encoder
from headrace.training.run.record import read_record

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool() -> Any:
    return import_module("headrace.tools.show_neighbours")


def count_of(sheet: Path, colour: tuple[int, int, int]) -> int:
    with Image.open(sheet) as picture:
        return int((np.asarray(picture) == colour).all(axis=-1).sum())


def test_a_run_becomes_a_sheet(tool: Any, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "neighbours.png"
    command = [sys.executable, "tools/show_neighbours.py", str(run), "--out", str(out)]
    result = subprocess.run([*command, "--samples", "6"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "6 pictures, the 8 nearest of each: " in result.stdout
    assert "of the same class untrained" in result.stdout
    frames = count_of(out, tool.SAME_CLASS) + count_of(out, tool.OTHER_CLASS)
    frame = tool.PICTURE_PIXELS**2 - (tool.PICTURE_PIXELS - 2 * tool.FRAME_PIXELS) ** 2
    captions = tool.PICTURE_PIXELS * 16  # a class's name lies on a frame's lower edge
    assert 6 * 2 * 8 * (frame - captions) < frames <= 6 * 2 * 8 * frame
    again = tmp_path / "again.png"
    assert tool.main([str(run), "--out", str(again), "--samples", "6"]) == 0
    assert again.read_bytes() == out.read_bytes()
    other = tmp_path / "other.png"
    assert tool.main([str(run), "--out", str(other), "--samples", "6", "--seed", "9"]) == 0
    assert other.read_bytes() != out.read_bytes()


def test_neighbours_are_those_of_plain_arithmetic(tool: Any, run: Path) -> None:
    """From test images to training images, by the cosine of the trained encoder's features."""
    record = read_record(run)
    options = tool._parse([str(run), "--out", "x", "--samples", "5", "--neighbours", "7"])
    compared = tool._what_to_compare(record, options)
    assert not compared.same
    assert compared.queries.uri.endswith("test")
    encoder = trained_encoder(record, compared.train)
    found = tool.neighbours_of(compared, encoder, record, options)

    mean, std = (
        torch.tensor(numbers)[:, None, None] for numbers in (record.test.mean, record.test.std)
    )

    def features(store: Any, ids: Any) -> torch.Tensor:
        levels = [np.asarray(tool.decode_rgb(encoded)) for encoded in store.read(ids)]
        pixels = torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            return torch.nn.functional.normalize(encoder.eval()((pixels - mean) / std), dim=1)

    similarities = (
        features(compared.queries, compared.ids)
        @ features(compared.train, np.arange(len(compared.train))).T
    )
    expected = similarities.topk(7).values
    torch.testing.assert_close(found.similarities.float(), expected, rtol=0, atol=1e-4)
    taken = similarities.gather(1, found.ids)
    torch.testing.assert_close(taken, expected, rtol=0, atol=1e-4)


def test_a_training_image_is_not_its_own_neighbour(tool: Any, run: Path, tmp_path: Path) -> None:
    """A set without a val or test split: pictures and neighbours are of the same images."""
    record = read_record(run)
    alone = tmp_path / "alone"
    assert record.train is not None
    alone.symlink_to(record.train / "train", target_is_directory=True)
    options = tool._parse([str(run), "--out", "x", "--data.train", str(alone), "--samples", "4"])
    compared = tool._what_to_compare(record, options)
    assert compared.same
    found = tool.neighbours_of(compared, trained_encoder(record, compared.train), record, options)
    assert found.ids.shape == (4, 8)
    assert not (found.ids == torch.from_numpy(compared.ids)[:, None]).any()
    assert (found.similarities.diff(dim=1) <= 0).all()


def test_neighbours_among_some_by_chance(tool: Any, run: Path) -> None:
    """The same ones for both networks; another seed, others."""
    record = read_record(run)

    def among(*options: str) -> Any:
        given = [str(run), "--out", "x", "--samples", "4", "--among", "20", *options]
        return tool._what_to_compare(record, tool._parse(given)), tool._parse(given)

    compared, options = among()
    assert len(set(compared.among.tolist())) == 20
    assert compared.among.tolist() == among()[0].among.tolist()
    assert compared.among.tolist() != among("--seed", "9")[0].among.tolist()
    encoder = trained_encoder(record, compared.train)
    found = tool.neighbours_of(compared, encoder, record, options)
    assert set(found.ids.flatten().tolist()) <= set(compared.among.tolist())


def test_as_many_classes_as_there_are(tool: Any, data: Path) -> None:
    labels = open_store(data, "test").labels(np.arange(21))
    ids = tool.chosen(labels, 7, 3)
    assert sorted(np.bincount(labels[ids]).tolist()) == [2, 2, 3]
    assert len(set(ids.tolist())) == 7
    assert ids.tolist() == tool.chosen(labels, 7, 3).tolist()
    assert ids.tolist() != tool.chosen(labels, 7, 4).tolist()
    assert len(set(tool.chosen(np.full(9, -1), 9, 0).tolist())) == 9


def test_frames(tool: Any) -> None:
    assert tool.frame_colour(1, 1) == tool.SAME_CLASS
    assert tool.frame_colour(1, 2) == tool.OTHER_CLASS
    assert tool.frame_colour(1, -1) == tool.frame_colour(-1, -1) == tool.NO_CLASS
    picture = tool.framed(Image.new("RGB", (10, 20), (1, 2, 3)), (9, 9, 9))
    pixels = np.asarray(picture)
    assert pixels.shape == (tool.PICTURE_PIXELS, tool.PICTURE_PIXELS, 3)
    inside = (pixels == (1, 2, 3)).all(axis=-1)
    room = tool.PICTURE_PIXELS - 2 * tool.FRAME_PIXELS
    assert inside.sum() == room * room // 2
    assert (pixels[~inside] == 9).all()


def test_refused(tool: Any, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "n.png")
    for arguments, sentence in (
        ([str(tmp_path), "--out", out], "is no run"),
        ([str(run), "--out", out, "--samples", "22"], "--samples asks for 22 images"),
        ([str(run), "--out", out, "--neighbours", "61"], "--neighbours asks for 61 images"),
        ([str(run), "--out", out, "--among", "7"], "--among 7 is less than --neighbours 8"),
    ):
        assert tool.main(arguments) == 2
        assert sentence in capsys.readouterr().err
    assert not Path(out).exists()
