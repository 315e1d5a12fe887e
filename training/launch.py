"""The commands of training: understood without torch, then run here or on several GPUs.

    python training/train.py --method dino --gpus 8

Help and mistakes are answered in a moment, and once, before anything is loaded or started.
`--gpus N` hands over to torch's own launcher, with N processes on this machine.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from headrace.training.catalogue import find_declaration
from headrace.training.command_line import parse_command_line
from headrace.training.config import Config
from headrace.training.data_sets import largest_side_pixels, open_train, open_val
from headrace.training.ending import run_and_exit
from headrace.training.environment import adopt_slurm, is_launched
from headrace.training.evaluate_options import parse_evaluate
from headrace.training.preset import ConfigError, require
from headrace.training.protocol import find_protocol_declaration
from headrace.training.run.record import read_network
from headrace.training.subset import read_subset

GPUS_OPTION = "--gpus"


def train() -> NoReturn:
    """The command headrace-train, and what training/train.py does as a script."""
    run_and_exit(_train)


def evaluate() -> NoReturn:
    """The command headrace-evaluate, and what training/evaluate.py does as a script."""
    run_and_exit(_evaluate)


def _train(arguments: Sequence[str]) -> int:
    adopt_slurm()
    gpus, arguments = split_gpus(arguments)
    config = parse_command_line(
        arguments, lambda path: largest_side_pixels(open_train(path)), find_declaration
    )
    read_subset(config.data.subset, open_train(config.data.train))
    if config.data.val is not None:
        open_val(config.data.val)
    if gpus > 1:
        _check_devices(gpus, config.run.device)
        _check_ranks(config, gpus)
        return _launch(gpus, arguments)
    from headrace.training.train import main

    return main(arguments)


def _evaluate(arguments: Sequence[str]) -> int:
    adopt_slurm()
    gpus, arguments = split_gpus(arguments)
    _, options = parse_evaluate(arguments, find_protocol_declaration)
    read_network(options.run)
    if options.train is not None:
        open_train(options.train)
    if options.val is not None:
        open_val(options.val)
    if gpus > 1:
        _check_devices(gpus, options.device)
        return _launch(gpus, arguments)
    from headrace.training.evaluate import main

    return main(arguments)


def _check_devices(ranks: int, device: str) -> None:
    import torch

    there = torch.cuda.device_count()
    require(
        device == "cpu" or ranks <= there,
        f"{GPUS_OPTION} {ranks}: this machine has {there} CUDA devices; with --run.device cpu so "
        f"many processes share its cores",
    )


def _check_ranks(config: Config, ranks: int) -> None:
    """Raises a UserError for what so many ranks would refuse: it is said once, not by each, and at
    once. What belongs to a method's own networks they say."""
    from headrace.training.build import with_backbone
    from headrace.training.inputs import fitted_batch, open_training_loader, with_paths
    from headrace.training.world import World

    config, _ = with_paths(with_backbone(config))
    store = open_train(config.data.train)
    world = World(size=ranks, local_size=ranks)
    subset = read_subset(config.data.subset, store)
    config, _ = fitted_batch(config, store, subset, ranks)
    open_training_loader(config, store, subset, world, "synthetic").close()


def split_gpus(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """(processes to start, everything else); 1 where nothing is said.

    Raises ConfigError for what is no number, and where a launcher started this process already.
    """
    rest, texts = [], []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name == GPUS_OPTION:
            texts.append(value if equals else next(remaining, ""))
        else:
            rest.append(argument)
    if not texts:
        return 1, rest
    text = texts[-1]
    require(
        text.isdecimal() and int(text) > 0,
        f"{GPUS_OPTION} {text}: give the number of GPUs of this machine to use, as {GPUS_OPTION} 8",
    )
    require(
        not is_launched(),
        f"{GPUS_OPTION} starts the processes itself: leave it out where torchrun does",
    )
    return int(text), rest


def _launch(processes: int, arguments: Sequence[str]) -> int:
    """Run this command in so many processes, by torch's launcher; the exit code of the first that
    failed, else 0. What went wrong it has said itself."""
    import logging

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # As torchrun has it, which would warn: the engines have threads of their own.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.disable(logging.ERROR)  # it would repeat each rank's sentence as a report of 40 lines
    script = ["--standalone", "--nproc-per-node", str(processes), *_this_command(), *arguments]
    try:
        run.run(run.parse_args(script))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        raise ConfigError(
            f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}, "
            f"perhaps for lack of memory; the same command goes on at the last checkpoint"
        ) from error
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _this_command() -> list[str]:
    """What torch's launcher starts: the script that the user typed, or the module that it names."""
    typed = Path(sys.argv[0])
    if typed.suffix in ("", ".py") and typed.is_file():
        return [str(typed)]
    return ["--module", f"headrace.training.{typed.stem.removeprefix('headrace-')}"]
