"""What bounds a training run: the same run with real and with synthetic data, in turns.

    python tools/bench_training.py --method dino --data.train DIR [options of training/train.py]

Starts `training/train.py` itself, several times in a temporary directory, with the run's engine and
with `synthetic`, reads its metrics.jsonl and ends it after some steps. The model alone is the
synthetic run. The parts of the input are then measured alone (bench/training/parts.py), and a rule
(bench/training/verdict.py) makes one sentence of all these rates.

It is about one process. For one rank of several, give it its share of the cores (--data.threads).
"""

import argparse
import json
import math
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median_low
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.shards.atomic import atomic_file
from headrace.shards.cores import usable_cores
from headrace.shards.errors import UserError
from headrace.shards.local import local
from headrace.shards.store import open_store
from headrace.tools.arguments import decimal, positive
from headrace.tools.bench.machine import machine, memory_bytes
from headrace.tools.bench.steps import Steps
from headrace.tools.bench.training.parts import (
    DECODING,
    data_files,
    first_samples,
    forget,
    loader_alone,
    read_alone,
    transfer_alone,
)
from headrace.tools.bench.training.segment import (
    BenchError,
    Segment,
    device_of,
    run_segment,
    settling_steps,
)
from headrace.tools.bench.training.verdict import Measured, Setting, decide, sentence
from headrace.training.command_line import parse_command_line
from headrace.training.config import Config, total_steps
from headrace.training.data_sets import largest_side_pixels, open_train
from headrace.training.inputs import (
    open_training_loader,
    with_paths,
)
from headrace.training.run.directory import versions
from headrace.training.subset import read_subset
from headrace.training.world import World

START_SECONDS = 15.0  # of a run until it is measured; a guess, corrected as time passes
FROM_STORAGE = 0.9  # share of the bytes from which a reading counts as one from storage
UNSTEADY = 0.1  # difference between rounds that is worth a word


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        for option in ("--run.out", "--run.resume"):
            if any(text.partition("=")[0] == option for text in rest):
                raise BenchError(f"{option} has no place here: runs are temporary")
        config = parse_command_line(rest, lambda path: largest_side_pixels(open_train(path)))
        config, _ = with_paths(config)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
        result = measure(options, rest, config)
        print(shown(result))
        if options.json is not None:
            with atomic_file(options.json) as file:
                file.write((json.dumps(result) + "\n").encode())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --method METHOD [options] [options of training/train.py]",
        description="Say what bounds a training run: storage, decoding, augmentation, the transfer "
        "to the device, or the model.",
        epilog="""Every other option is one of training/train.py and is given to it.

examples:
  python tools/bench_training.py --method dino --data.train data/imagenet
  python tools/bench_training.py --method mae --backbone vit_small_patch16_224 --data.batch-size 64
  python tools/bench_training.py --method simclr --cache cold --rounds 3 --json simclr.json""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seconds",
        type=decimal("a number of seconds above 0", lambda seconds: 0 < seconds < math.inf),
        default=20.0,
        help="of every start of the run; default: 20",
    )
    parser.add_argument(
        "--rounds", type=positive, default=2, help="starts with each kind of data; default: 2"
    )
    parser.add_argument(
        "--cache",
        choices=("auto", "cold", "warm"),
        default="auto",
        help="cold: drop the data from the page cache before each start; auto: if the data exceed "
        "half of the memory",
    )
    parser.add_argument("--json", type=local, help="store everything here, as one line of JSON")
    return parser


@dataclass(frozen=True)
class Setup:
    """What will be measured, and no open store: the kernel drops nothing that is mapped.

    subset: ids, None for all. packed: many samples to a file. order: of the engines that the starts
    of the run take in turn.
    """

    subset: NDArray[np.int64] | None
    engine: str
    files: tuple[Path, ...]
    packed: bool
    cold: bool
    order: tuple[str, ...]


class Reading(NamedTuple):
    """Of the samples without anything else. first_rate, cached_rate: images per second.

    was_asked: whether the system could be asked to drop the files from its cache before the first
    reading. fetched_share: of its bytes, from storage; None if nobody counts.
    """

    ids: NDArray[np.int64]
    bytes_per_image: float
    first_rate: float
    cached_rate: float
    was_asked: bool
    fetched_share: float | None

    @property
    def was_cold(self) -> bool:
        return self.was_asked and (self.fetched_share is None or self.fetched_share >= FROM_STORAGE)


def measure(
    options: argparse.Namespace, arguments: Sequence[str], config: Config
) -> dict[str, Any]:
    """Everything, one after the other; JSON-ready."""
    setup = _set_up(options, config)
    engine, seconds_alone = setup.engine, options.seconds / 2
    steps = Steps(
        {
            "reading": (1, 3.0),
            "training": (len(setup.order), options.seconds + START_SECONDS),
            "alone": (2, seconds_alone + 3),
        }
    )
    threads = config.data.threads or usable_cores()
    with steps.step("reading", "reading alone"):
        reading = _read(setup, config, threads)

    # ---- the run, with real and with synthetic data in turn
    segments: dict[str, list[Segment]] = {name: [] for name in setup.order}
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as directory:
        for place, name in enumerate(setup.order):
            with steps.step("training", f"training with the {name} engine"):
                if setup.cold:
                    forget(setup.files)
                out = Path(directory) / f"{place}-{name}"
                segments[name].append(run_segment(arguments, config, name, out, options.seconds))

    # ---- its parts alone
    store = open_store(str(config.data.train), "train")
    decoding = replace(config, augmentation=DECODING)
    with steps.step("alone", "decoding alone"):
        decode_rate = loader_alone(decoding, store, reading.ids, engine, seconds_alone)
    with steps.step("alone", "the whole loader alone"):
        loader_rate = loader_alone(config, store, reading.ids, engine, seconds_alone)

    transfer_rate = transfer_alone(config, engine, reading.bytes_per_image)
    rates = decode_rate, loader_rate, transfer_rate
    return _result(config, setup, threads, reading, segments, rates)


def _result(
    config: Config,
    setup: Setup,
    threads: int,
    reading: Reading,
    segments: dict[str, list[Segment]],
    rates_alone: tuple[float, float, float | None],
) -> dict[str, Any]:
    """rates_alone: of decoding, the whole loader and the transfer."""
    device = device_of(config)
    rounds = zip(segments[setup.engine], segments["synthetic"], strict=True)
    real, synthetic = _middle(list(rounds))
    from_storage = _from_storage(real, reading.bytes_per_image)
    run_was_cold = setup.cold if from_storage is None else from_storage > 0.5
    shares_cores = device.type == "cpu" and real.is_busy
    decode_rate, loader_rate, transfer_rate = rates_alone
    measured = Measured(
        real=real.rate,
        synthetic=synthetic.rate,
        wait_share=real.input_share,
        synthetic_wait_share=synthetic.input_share,
        storage=reading.first_rate if reading.was_cold and run_was_cold else reading.cached_rate,
        cached=reading.cached_rate,
        decode=decode_rate,
        loader=loader_rate,
        transfer=transfer_rate,
        shares_cores=shares_cores,
    )
    cores = usable_cores()
    setting = Setting(setup.engine, device.type, threads, cores, setup.packed, shares_cores)
    return _facts(config, setting, measured, reading) | {
        "wait_share": real.wait_share,
        "device_idle_share": real.idle_share,
        "busy_share": real.busy_share,
        "real": [segment.record() for segment in segments[setup.engine]],
        "synthetic": [segment.record() for segment in segments["synthetic"]],
        "from_storage_share": from_storage,
    }


def _set_up(options: argparse.Namespace, config: Config) -> Setup:
    """Raises BenchError for a run that cannot be measured."""
    store = open_store(str(config.data.train), "train")
    subset = read_subset(config.data.subset, store)
    world = World(device=device_of(config))
    with open_training_loader(config, store, subset, world, config.data.engine) as loader:
        engine, steps = loader.engine_name, total_steps(config.run, loader.steps_per_epoch)
    if engine == "synthetic":
        raise BenchError("--data.engine synthetic is what a run is compared with: leave it out")
    needed = 3 * settling_steps(config)
    if steps < needed:
        raise BenchError(f"the run has {steps} steps, too few to measure: give it {needed} or more")
    files = data_files(store)
    exceeds_memory = sum(path.stat().st_size for path in files) > memory_bytes() / 2
    turns = [("synthetic", engine), (engine, "synthetic")] * options.rounds
    return Setup(
        subset,
        engine,
        tuple(files),
        packed=len(files) < len(store),
        cold=options.cache == "cold" or (options.cache == "auto" and exceeds_memory),
        order=tuple(name for turn in turns[: options.rounds] for name in turn),
    )


def _read(setup: Setup, config: Config, threads: int) -> Reading:
    """First from storage, as far as the system lets go of what it has in its cache; then again."""
    store = open_store(str(config.data.train), "train")
    ids = first_samples(config, store, setup.subset)
    bytes_per_image = fmean(encoded.size for encoded in store.read(ids))
    was_asked = forget(setup.files)
    if setup.cold and not was_asked:
        raise BenchError("--cache cold: this system cannot be asked to drop files from its cache")
    first_rate, fetched_share = read_alone(store, ids, threads)
    cached_rate = max(read_alone(store, ids, threads)[0] for _ in range(3))
    return Reading(ids, bytes_per_image, first_rate, cached_rate, was_asked, fetched_share)


def _facts(
    config: Config, setting: Setting, measured: Measured, reading: Reading
) -> dict[str, Any]:
    verdict = decide(measured)
    return {
        "method": config.method,
        "preset": config.preset,
        "backbone": config.backbone,
        "batch_size": config.data.batch_size,
        "train": str(config.data.train),
        **asdict(setting),
        "verdict": verdict.bound,
        "sentence": sentence(measured, verdict, setting),
        "lost_share": verdict.lost,
        "shares": verdict.shares,
        "contention_share": verdict.contention,
        "rates": {
            "real": measured.real,
            "synthetic": measured.synthetic,
            "storage_cold": reading.first_rate if reading.was_cold else None,
            "storage_cached": reading.cached_rate,
            "decode": measured.decode,
            "loader": measured.loader,
            "transfer": measured.transfer,
        },
        "cold_reading_from_storage_share": reading.fetched_share if reading.was_asked else None,
        "samples_alone": len(reading.ids),
        "bytes_per_image": reading.bytes_per_image,
        "versions": versions(setting.engine),
        "machine": machine() | {"gpu": _gpu(config)},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _gpu(config: Config) -> str | None:
    device = device_of(config)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _middle(rounds: Sequence[tuple[Segment, Segment]]) -> tuple[Segment, Segment]:
    """The round whose ratio of (real, synthetic) rates is the median: machines drift."""
    ratios = [real.rate / synthetic.rate for real, synthetic in rounds]
    return rounds[ratios.index(median_low(ratios))]


def _from_storage(segment: Segment, bytes_per_image: float) -> float | None:
    """Share of the bytes that a run took which were not in the page cache."""
    if segment.fetched_bytes is None:
        return None
    return min(1.0, segment.fetched_bytes / (segment.images * bytes_per_image))


def shown(result: dict[str, Any]) -> str:
    """For people: the rates and the sentence."""
    rates = result["rates"]
    megabytes = result["bytes_per_image"] / 1e6

    def run(name: str) -> str:
        rounds = [segment["images_per_second"] for segment in result[name]]
        waits = [segment["wait_share"] for segment in result[name]]
        return (
            f"{rates[name]:12,.1f} images/s  ({min(rounds):,.1f} to {max(rounds):,.1f} in "
            f"{len(rounds)} starts), wait share {min(waits):.1%} to {max(waits):.1%}"
        )

    def part(name: str) -> str:
        return f"{rates[name]:12,.1f} images/s"

    def disk() -> str:
        share = result["cold_reading_from_storage_share"]
        if rates["storage_cold"] is not None:
            return f"{part('storage_cold')}  ({rates['storage_cold'] * megabytes:,.0f} MB/s)"
        if share is None:
            return "not measured: this system cannot be asked to drop files from its page cache"
        return (
            f"not measured: {share:.0%} of the bytes came from there, the rest stayed in the page "
            f"cache because other processes use it"
        )

    lines = [
        f"{result['method']}, preset {result['preset']}, {result['backbone']}, batches of "
        f"{result['batch_size']}, {result['engine']} engine with {result['threads']} threads, "
        f"{result['device']}",
        f"real data         {run('real')}",
        f"synthetic data    {run('synthetic')}",
        f"1 - real/synthetic    {result['lost_share']:.1%}, wait share {result['wait_share']:.1%}",
    ]
    if result["device_idle_share"] is not None:
        lines[-1] += f", device idle {result['device_idle_share']:.1%}"
    cached = rates["storage_cached"]
    lines += [
        f"alone, on {result['samples_alone']:,} of the run's samples and with its threads:",
        f"  read from disk  {disk()}",
        f"  read from cache {part('storage_cached')}  ({cached * megabytes:,.0f} MB/s)",
        f"  decode          {part('decode')}",
        f"  whole loader    {part('loader')}",
    ]
    if rates["transfer"] is not None:
        lines.append(f"  copy to device  {part('transfer')}")
    share = result["from_storage_share"]
    if share is not None:
        lines.append(f"The run itself got {share:.0%} of its bytes from storage.")
    for name in ("real", "synthetic"):
        rounds = [segment["images_per_second"] for segment in result[name]]
        if max(rounds) > (1 + UNSTEADY) * min(rounds):
            lines.append(
                f"The rates with {name} data differ by {max(rounds) / min(rounds) - 1:.0%} between "
                f"starts, and what is smaller than that means nothing: use a machine without other "
                f"work, longer --seconds or more --rounds."
            )
    return "\n".join([*lines, "", result["sentence"]])


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # and remove what is there
    sys.exit(main())
