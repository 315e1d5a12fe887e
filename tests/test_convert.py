"""Conversion: the same bytes however it runs and whatever interrupts it, and words for the rest."""

import io
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from headrace.shards import open_store
from headrace.shards.assemble import tar_starts
from headrace.shards.convert import Conversion, ConvertOptions, convert, permutation
from headrace.shards.encode import NO_BYTES, EncodeOptions
from headrace.shards.index import ShardError, read_index
from headrace.shards.manifest import Format, read_manifest
from headrace.shards.sources import list_source
from headrace.shards.sources.samples import FileReference, Sample, SourceSplit
from headrace.shards.verify import verify

ROOT = Path(__file__).resolve().parent.parent
FORMATS: tuple[Format, ...] = ("webdataset", "beton")
CLASSES = ("ant", "bee", "cow")
IMAGES = 60


def image_bytes(number: int, kind: str, **options: object) -> bytes:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (rng.integers(8, 40), rng.integers(8, 40), 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images in three classes, JPEG and PNG, and five odd files with odd names."""
    root = tmp_path_factory.mktemp("source")
    for number in range(IMAGES):
        path = root / CLASSES[number % 3] / f"{number:03d}.JPEG"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image_bytes(number, "PNG" if number % 10 == 7 else "JPEG"))
    jpeg = image_bytes(99, "JPEG")
    odd = {
        "ant/two words.jpg": jpeg[:-2],
        "bee/naïve.name.with.dots.gif": image_bytes(98, "GIF"),
        "bee/" + "long" * 50 + ".jpg": jpeg,
        "cow/half.jpg": jpeg[: len(jpeg) // 2],
        "cow/nothing.jpg": b"",
    }
    for name, data in odd.items():
        (root / name).write_bytes(data)
    return root


def split_of(source: Path) -> SourceSplit:
    (split,) = list_source(source)
    return split


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Format, Path]:
    """Both formats, each converted by one thread without interruption."""
    root = tmp_path_factory.mktemp("converted")
    for name in FORMATS:
        convert(split_of(source), root / name, options_of(name), workers=1)
    return {name: root / name for name in FORMATS}


def options_of(name: Format) -> ConvertOptions:
    return ConvertOptions(format=name, seed=5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 500), st.integers(0, 2**64 - 1))
def test_permutation(samples: int, seed: int) -> None:
    order = permutation(samples, seed)
    assert sorted(order.tolist()) == list(range(samples))
    np.testing.assert_array_equal(order, permutation(samples, seed))


def test_permutation_is_the_one_of_earlier_versions() -> None:
    assert permutation(10, 0).tolist() == GOLDEN_PERMUTATION
    assert permutation(10, 1).tolist() != GOLDEN_PERMUTATION


GOLDEN_PERMUTATION = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=300), st.integers(1, 200_000))
def test_tar_shards_are_even(lengths: list[int], shard_bytes: int) -> None:
    starts = tar_starts(np.array(lengths, np.uint64), shard_bytes)
    counts = np.diff(starts)
    assert (starts[0], starts[-1]) == (0, len(lengths))
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 1


def test_many_small_samples_make_several_shards() -> None:
    assert len(tar_starts(np.full(50_000, 2500, np.uint64), 256_000_000)) == 6


def test_ids_follow_the_seed_and_omissions_close_up(
    source: Path, converted: dict[Format, Path]
) -> None:
    split = split_of(source)
    gone = {"cow/half.jpg", "cow/nothing.jpg"}
    order = [split.samples[position] for position in permutation(len(split.samples), 5)]
    expected = [sample for sample in order if sample.name not in gone]
    for directory in converted.values():
        store = open_store(directory)
        ids = np.arange(len(store))
        assert store.names(ids) == [sample.name for sample in expected]
        assert store.labels(ids).tolist() == [sample.label for sample in expected]


def test_both_formats_hold_the_same_samples(source: Path, converted: dict[Format, Path]) -> None:
    tar, beton = (open_store(converted[name]) for name in FORMATS)
    ids = np.arange(len(tar))
    assert tar.names(ids) == beton.names(ids)
    assert tar.classes == beton.classes == CLASSES
    np.testing.assert_array_equal(tar.labels(ids), beton.labels(ids))
    np.testing.assert_array_equal(tar.sizes(ids), beton.sizes(ids))
    kept = 0
    for name, a, b in zip(tar.names(ids), tar.read(ids), beton.read(ids), strict=True):
        original = (source / name).read_bytes()
        if original.startswith(b"\xff\xd8"):
            assert bytes(a) == bytes(b)
            kept += bytes(a) == original
        images = [Image.open(io.BytesIO(bytes(data))).convert("RGB") for data in (a, b)]
        assert images[0] == images[1]
    assert kept == 55  # all JPEGs but the one that lacked its end marker


@pytest.mark.parametrize("name", FORMATS)
def test_report_and_manifest_agree(converted: dict[Format, Path], name: Format) -> None:
    directory = converted[name]
    manifest = read_manifest(directory)
    lines = [json.loads(line) for line in (directory / "report.jsonl").read_text().splitlines()]
    assert [(line["name"], line["action"]) for line in lines] == [
        ("ant/two words.jpg", "repaired"),
        ("bee/naïve.name.with.dots.gif", "repaired"),
        ("cow/half.jpg", "left out"),
        ("cow/nothing.jpg", "left out"),
    ]
    assert lines[3]["reason"] == NO_BYTES
    assert sum(manifest.repairs.values()) == sum(manifest.omissions.values()) == 2
    assert manifest.samples == IMAGES + 3
    assert str(directory) not in manifest.to_json()
    assert set(files_of(directory)) == {
        "manifest.json", "index.npy", "names.bin", "report.jsonl", manifest.shards[0].file
    }  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize("name", FORMATS)
def test_workers_and_executors_do_not_enter_the_result(
    source: Path, converted: dict[Format, Path], tmp_path: Path, name: Format
) -> None:
    convert(split_of(source), tmp_path / "processes", options_of(name), workers=2)
    assert files_of(tmp_path / "processes") == files_of(converted[name])
    with ThreadPoolExecutor(3) as executor:
        convert(split_of(source), tmp_path / "own", options_of(name), executor=executor, workers=3)
    assert files_of(tmp_path / "own") == files_of(converted[name])


def run_tool(
    *arguments: object, tool: str = "make_shards", **options: Any
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, **options
    )


@pytest.mark.parametrize("name", FORMATS)
def test_kill_anywhere_and_go_on(
    source: Path, converted: dict[Format, Path], tmp_path: Path, name: Format
) -> None:
    """Killed before a file gets its name, again and again, in what is one conversion after all."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_CONVERSION, str(source), str(out), name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 8
    assert files_of(out) == files_of(converted[name])


# The kill comes exactly before a chosen rename: what was written is then there, under a temporary
# name. A process forks the ones that are killed, so that the libraries are loaded once.
KILLED_CONVERSION = """
import os, signal, sys
from pathlib import Path
from headrace.shards.convert import ConvertOptions, convert
from headrace.shards.sources import list_source

source, out, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
(split,) = list_source(source)
replace = os.replace
kills = 0
while True:
    renames = 1 + kills % 3 + kills // 6
    child = os.fork()
    if child == 0:
        left = renames
        def killing_replace(*paths):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)
        os.replace = killing_replace
        convert(split, out, ConvertOptions(format=name, seed=5), workers=1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        break
    assert status == -signal.SIGKILL, status
    assert not (out / "manifest.json").exists()
    kills += 1
print(kills)
"""


@pytest.mark.slow
@pytest.mark.dist
def test_kill_at_random_and_go_on(
    source: Path, converted: dict[Format, Path], tmp_path: Path
) -> None:
    """The command itself with two processes, killed by the clock."""
    tool = [sys.executable, str(ROOT / "tools" / "make_shards.py"), str(source)]
    arguments = ["--out", str(tmp_path / "out"), "--seed", "5", "--workers", "2"]
    clock = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen(
            [*tool, *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        time.sleep(clock.uniform(0.5, 2.0))
        process.kill()
        # Workers hold the other end of stderr: it closes when the last of them has ended.
        process.communicate(timeout=30)
    result = run_tool(source, *arguments)
    assert result.returncode == 0, result.stderr
    assert files_of(tmp_path / "out") == files_of(converted["webdataset"])


def test_finished_conversions_are_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = convert(split_of(source), out, options_of("webdataset"), workers=1)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = convert(split_of(source), out, options_of("webdataset"), workers=1)
    assert (first.was_complete, again.was_complete) == (False, True)
    assert again.manifest == first.manifest
    (out / ".parts").mkdir()  # as after a kill between the manifest and the clean-up
    convert(split_of(source), out, options_of("webdataset"), workers=1)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


OTHER_OPTIONS = {
    "seed is 5 there and 6 here": ConvertOptions(seed=6),
    "format is webdataset there and beton here": ConvertOptions(seed=5, format="beton"),
    "quality is None there and 80 here": ConvertOptions(seed=5, encode=EncodeOptions(quality=80)),
}


@pytest.mark.parametrize("words", OTHER_OPTIONS)
def test_other_options_are_refused(
    source: Path, converted: dict[Format, Path], tmp_path: Path, words: str
) -> None:
    finished = converted["webdataset"]
    before = files_of(finished)
    with pytest.raises(ShardError, match=f"holds a finished data set with other options .*{words}"):
        convert(split_of(source), finished, OTHER_OPTIONS[words], workers=1)
    assert files_of(finished) == before
    with pytest.raises(ShardError, match=r"\(strict\)"):
        convert(split_of(source), tmp_path, options_of("webdataset"), workers=1, strict=True)
    with pytest.raises(ShardError, match=f"an unfinished conversion with other options .*{words}"):
        convert(split_of(source), tmp_path, OTHER_OPTIONS[words], workers=1)


def test_another_version_does_not_go_on(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"\(strict\)"):
        convert(split_of(source), tmp_path, workers=1, strict=True)
    plan = tmp_path / ".parts" / "plan.json"
    plan.write_text(plan.read_text().replace("headrace ", "headrace 0.0.0-"))
    with pytest.raises(ShardError, match=r"tool is headrace 0.0.0-.* there"):
        convert(split_of(source), tmp_path, workers=1)


def test_no_samples(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="there is no sample"):
        convert(SourceSplit("", "images", (), []), tmp_path, workers=1)


def test_another_source_is_refused(source: Path, converted: dict[Format, Path]) -> None:
    split = split_of(source)
    fewer = SourceSplit("", split.kind, split.classes, split.samples[1:])
    with pytest.raises(ShardError, match="the source has other samples or labels"):
        convert(fewer, converted["webdataset"], options_of("webdataset"), workers=1)


def test_directories_of_others_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ShardError, match=r"is not empty \(it holds thesis.tex\)"):
        convert(split_of(source), tmp_path, workers=1)
    assert files_of(tmp_path) == {"thesis.tex": b"precious"}


def test_strict_refuses_and_a_later_call_goes_on(
    source: Path, converted: dict[Format, Path], tmp_path: Path
) -> None:
    options = options_of("webdataset")
    words = r"2 of 65 samples would be left out \(strict\): 'cow/half.jpg': truncated"
    with pytest.raises(ShardError, match=words):
        convert(split_of(source), tmp_path, options, workers=1, strict=True)
    convert(split_of(source), tmp_path, options, workers=1)
    assert files_of(tmp_path) == files_of(converted["webdataset"])
    with pytest.raises(ShardError, match=r"2 sample\(s\) were left out of it \(strict\)"):
        convert(split_of(source), tmp_path, options, workers=1, strict=True)


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"")
    samples = [Sample("x.jpg", -1, FileReference(str(tmp_path / "x.jpg")))]
    split = SourceSplit("", "images", (), samples)
    with pytest.raises(ShardError, match=r"none of the 1 samples can be used .*zero bytes"):
        convert(split, tmp_path / "out", workers=1)


def test_an_unreadable_file_ends_in_words_and_nothing_is_lost(
    source: Path, converted: dict[Format, Path], tmp_path: Path
) -> None:
    split = split_of(source)
    samples = list(split.samples)
    lost = next(n for n, sample in enumerate(samples) if sample.name == "cow/059.JPEG")
    link = tmp_path / "link.jpg"
    samples[lost] = Sample(samples[lost].name, samples[lost].label, FileReference(str(link)))
    broken = SourceSplit("", split.kind, split.classes, samples)
    with pytest.raises(ShardError, match=r"cannot read .*link.jpg: No such file"):
        convert(broken, tmp_path / "out", options_of("webdataset"), workers=1)
    finished = list((tmp_path / "out" / ".parts").glob("part-*.json"))
    assert len(finished) >= 3
    link.symlink_to(source / "cow" / "059.JPEG")
    convert(broken, tmp_path / "out", options_of("webdataset"), workers=1)
    assert files_of(tmp_path / "out") == files_of(converted["webdataset"])


def limit_file_bytes(at_most: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (at_most, at_most))


@pytest.mark.parametrize(
    ("at_most", "workers", "name"),
    [(6_000, 1, "webdataset"), (6_000, 2, "webdataset"), (60_000, 1, "beton")],
)
def test_a_full_disk_ends_in_words_and_nothing_is_lost(
    source: Path,
    converted: dict[Format, Path],
    tmp_path: Path,
    at_most: int,
    workers: int,
    name: Format,
) -> None:
    """A limit on the size of files stands in for a full disk: the write fails in the same way."""
    arguments = [source, "--out", tmp_path / "out", "--seed", 5, "--workers", workers]
    arguments += ["--format", name]
    result = run_tool(*arguments, preexec_fn=limit_file_bytes(at_most))
    assert result.returncode == 2
    assert "error: no room to write in" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list((tmp_path / "out").rglob(".*.partial"))
    convert(split_of(source), tmp_path / "out", options_of(name), workers=1)
    assert files_of(tmp_path / "out") == files_of(converted[name])


def test_two_conversions_into_one_directory(source: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / ".parts").mkdir()
    with (tmp_path / ".parts" / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ShardError, match="another process is writing"):
            convert(split_of(source), tmp_path, workers=1)
    convert(split_of(source), tmp_path, workers=1)


def test_arrays_become_the_same_pixels_in_both_formats(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 5, 7, 3), np.uint8)
    labels = np.arange(40) % 4
    np.savez(tmp_path / "train.npz", images=images, labels=labels, classes=np.array([*"abcd"]))
    (split,) = list_source(tmp_path)
    for name in FORMATS:
        convert(split, tmp_path / name, ConvertOptions(name), workers=1)
        store = open_store(tmp_path / name)
        order = permutation(40, 0)
        for position, data in zip(order, store.read(np.arange(40)), strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(bytes(data))))
            np.testing.assert_array_equal(pixels, images[position])
        assert store.labels(np.arange(40)).tolist() == labels[order].tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_verify_accepts_what_was_written(converted: dict[Format, Path], name: Format) -> None:
    for decode in (True, False):
        assert verify(converted[name], decode=decode, workers=1).problems == ()


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for name, data in files_of(source).items():
        (target / name).write_bytes(data)
    return target


@pytest.mark.parametrize("name", FORMATS)
def test_verify_finds_a_flipped_byte(
    converted: dict[Format, Path], tmp_path: Path, name: Format
) -> None:
    directory = copy(converted[name], tmp_path / "set")
    shard = directory / read_manifest(directory).shards[0].file
    index = read_index(directory)
    row = index.rows[17]
    data = bytearray(shard.read_bytes())
    data[int(row["offset"]) + int(row["length"]) // 2] ^= 1
    shard.write_bytes(data)
    problems = verify(directory, workers=1).problems
    assert len(problems) == 2
    assert f"sample 17 ({index.name(17)!r}): its bytes have changed" in problems[0] + problems[1]
    quick = verify(directory, decode=False, workers=1).problems
    assert quick == (f"{shard} has changed: its sha256 is not the manifest's",)
    result = run_tool(tmp_path, "--workers", 1, tool="verify_shards")
    assert result.returncode == 1
    assert "sample 17" in result.stdout


def test_verify_finds_wrong_rows(converted: dict[Format, Path], tmp_path: Path) -> None:
    directory = copy(converted["webdataset"], tmp_path / "set")
    rows = np.load(directory / "index.npy")
    rows["label"][3] = 7
    rows["height"][4] += 1
    rows["offset"][5] = 1 << 40
    np.save(directory / "index.npy", rows)
    found = "\n".join(verify(directory, workers=1).problems)
    assert "sample 3" in found
    assert "label 7, but there are 3 classes" in found
    assert "sample 4" in found
    assert "where the index says" in found
    assert "sample 5" in found
    assert "lies beyond the end of its shard" in found


def test_the_tools_from_another_directory(source: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "some images" / split).parent.mkdir(exist_ok=True)
        (tmp_path / "some images" / split).symlink_to(source)
    made = run_tool("some images/", "--workers", 1, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "63 samples in 1 shard(s)" in made.stdout
    assert "2 left out: 1 x truncated" in made.stdout
    assert "listed by name in data/some images/val/report.jsonl" in made.stdout
    again = run_tool("some images/", "--workers", 1, cwd=tmp_path)
    assert (again.returncode, again.stdout.count("was complete already")) == (0, 2)
    checked = run_tool("data/some images", "--workers", 1, tool="verify_shards", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count("OK, 63 samples in 1 shard(s), 3 classes, all decoded") == 2
    assert open_store(tmp_path / "data" / "some images", "train").classes == CLASSES


def test_neither_tool_loads_torch(source: Path, tmp_path: Path) -> None:
    """It takes seconds to import, which whoever packs images should not wait for."""
    program = (
        "import sys; from headrace.tools import make_shards, verify_shards; "
        "assert make_shards.main(sys.argv[1:]) == 0; "
        "assert verify_shards.main(['out', '--workers', '1']) == 0; "
        "print(sorted({'torch', 'webdataset', 'headrace.pipelines'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(source), "--out", "out", "--workers", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]"


def test_mistakes_on_the_command_line_end_in_words(tmp_path: Path) -> None:
    for arguments, code, words in [
        (["nowhere"], 2, "nowhere does not exist; expected one of"),
        ([".", "--quality", "101"], 2, "quality is 101; it must be from 1 to 100"),
        ([".", "--workers", "0"], 2, "'0' is not a whole number of at least 1"),
        ([".", "--format", "zip"], 2, "invalid choice: 'zip'"),
    ]:
        result = run_tool(*arguments, cwd=tmp_path)
        assert (result.returncode, "Traceback" in result.stderr) == (code, False)
        assert words in result.stderr
    result = run_tool(tmp_path, tool="verify_shards")
    assert result.returncode == 2
    assert "holds no finished data set" in result.stderr


def test_a_conversion_says_what_it_is(converted: dict[Format, Path], source: Path) -> None:
    result = convert(split_of(source), converted["beton"], options_of("beton"), workers=1)
    assert isinstance(result, Conversion)
    assert result.manifest.options["seed"] == 5
    assert result.manifest.tool.startswith("headrace ")
    assert "libjpeg-turbo" in result.manifest.tool
