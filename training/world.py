"""The processes of a run: one by itself, or the ones that torchrun or Slurm's srun started.

Every function here means the same for one process, where it costs nothing. Only rank 0 writes;
what it finds out (a lock, a checkpoint) reaches the others through `collectives.from_main`.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from headrace.shards.errors import UserError
from headrace.shards.lifetime import end_with_parent
from headrace.training.environment import adopt_slurm


class WorldError(UserError):
    """Processes that cannot work together: what is missing, and where to look."""


@dataclass(frozen=True)
class World:
    """rank and size over all machines, local_* on this one, and this rank's device."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (a torch.device is immutable)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def join(device: Literal["auto", "cpu", "cuda", "mps"] = "auto") -> Iterator[World]:
    """This process's World: NCCL between GPUs, gloo between CPUs, nothing for one process.

    Raises WorldError where the device is missing, or the place where the processes meet.
    """
    adopt_slurm()
    if device == "cuda" and not torch.cuda.is_available():
        raise WorldError("--run.device is cuda, and this machine has no CUDA device")
    if device == "mps" and not torch.backends.mps.is_available():
        raise WorldError("--run.device is mps, and torch finds no GPU of Apple's here")
    kind = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    environment = os.environ
    rank, size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    local_size = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    index = local_rank
    if kind == "cuda":
        devices = torch.cuda.device_count()
        if devices == 1 and "SLURM_PROCID" in environment:
            index = 0  # srun --gpus-per-task shows each task its own one alone
        if index >= devices:
            raise WorldError(
                f"this machine has {devices} CUDA devices, too few for local rank {local_rank}: "
                f"start fewer processes, or take --run.device cpu"
            )
        torch.cuda.set_device(index)
    if kind == "mps" and size > 1:
        raise WorldError(f"--run.device is mps, which has one process, and there are {size}")
    at = torch.device("cuda", index) if kind == "cuda" else torch.device(kind)
    world = World(rank, size, local_rank, local_size, at)
    if "LOCAL_RANK" in environment:
        _end_with_launcher()
    if size == 1:
        yield world
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]:
        raise WorldError(
            f"this is rank {rank} of {size} by RANK and WORLD_SIZE, and {' and '.join(missing)} do "
            f"not say where the ranks meet: start them with torchrun or srun, or set both"
        )
    # gloo beside NCCL carries the few objects that live on the host.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, device_id=world.device if kind == "cuda" else None)
    yield world
    # Not reached after an error: the group's end would wait for ranks that may be gone.
    dist.destroy_process_group()


def takes_bf16(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> bool:
    """Whether forward passes are autocast to bf16: where it is asked for, and for "auto" on GPUs
    that compute in it themselves (older ones would be slower for it)."""
    if precision != "auto":
        return precision == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def seed_layers(seed: int, step: int, world: World) -> None:
    """Seed torch's global generator from (seed, step, rank), for layers that insist on it.

    Dropout takes its mask from there. Seeding at every step makes a resume exact; since ranks must
    differ, such layers, unlike everything else, depend on the world size.
    """
    key = hashlib.blake2b(f"{seed}/{step}/{world.rank}".encode(), digest_size=8)
    torch.manual_seed(int.from_bytes(key.digest(), "little") >> 1)


def _end_with_launcher() -> None:
    """The kernel kills this worker when torchrun ends in whatever way, kill -9 included.

    A worker without launcher would hold its GPU and the run's lock for ever. Checkpoints are
    atomic, so being killed costs the steps since the last one and nothing else. (A torchrun that
    ends before this line leaves a worker that cannot join its rendezvous, which ends it too.)
    """
    end_with_parent()
