"""Two gloo processes, to which a test hands a function of this file, a method and global batches.

Each process is this file, run as a module; it computes in float64 and sends back what its rank saw.
conftest.py starts one pair of them for each test file that asks, which has to be `in_float64` too.
"""

import copy
import hashlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headrace.pipelines.batch import Batch
from headrace.training.blocks.norm import convert
from headrace.training.collectives import gather_with_gradient
from headrace.training.gradients import average, backward
from headrace.training.method import Method
from headrace.training.parallel import distributed
from headrace.training.preset import Preset
from headrace.training.world import World
from tests.precision import in_float64
from tests.tiny_methods import TinyContext, progress_at, share, train_step

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
HALFWAY = 3  # steps, after which `train` gives the state
TOLERANCE = 1e-9
Call = Callable[..., list[Any]]


# ---- what a rank does


def gradients(method: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in method.named_parameters()
        if parameter.grad is not None
    }


def train(
    method: Method, preset: Preset, batches: list[Batch], first: int, rate: float, world: World
) -> dict[str, Any]:
    """Steps `first` and following, with plain SGD and one epoch per four steps.

    Gives "losses" per step (mean over ranks); the gradients of the "first" and the "last" step as
    the optimiser takes them; the "state" after HALFWAY steps as "halfway", and at the end with its
    "digest".
    """
    method = copy.deepcopy(method)
    convert(method, world)
    model = None if len(method.phases()) > 1 else distributed(method, world)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=rate)
    context = TinyContext(preset, world)
    losses: list[Tensor] = []
    seen: list[dict[str, Tensor]] = []
    halfway: dict[str, Tensor] = {}
    for step, batch in enumerate(batches, first):
        if step == HALFWAY:
            halfway = {name: value.clone() for name, value in method.state_dict().items()}
        size = len(batch) // world.size
        own = share(batch, slice(world.rank * size, (world.rank + 1) * size))
        parts = {"world": world, "context": context, "model": model}
        losses.append(train_step(method, optimizer, [own], progress_at(step), **parts))
        seen.append(gradients(method))
    loss = torch.stack(losses)
    if world.size > 1:
        dist.all_reduce(loss)
    state = {name: value.clone() for name, value in method.state_dict().items()}
    digest = hashlib.sha256()
    for value in state.values():
        digest.update(value.numpy().tobytes())
    return {
        "losses": loss / world.size,
        "first": seen[0],
        "last": seen[-1],
        "halfway": halfway,
        "state": state,
        "digest": digest.hexdigest(),
    }


def cached_gradients(
    method: Method, preset: Preset, batch: Batch, parts: int, world: World
) -> dict[str, Tensor]:
    """Of a share of the batch, in `parts` micro-batches, with a gradient cache or (1) without."""
    method, size = copy.deepcopy(method), len(batch) // world.size
    convert(method, world)
    own = share(batch, slice(world.rank * size, (world.rank + 1) * size))
    method.before_step(progress_at(0))
    step = size // parts
    micro = [share(own, slice(first, first + step)) for first in range(0, size, step)]
    trained = [p for p in method.parameters() if p.requires_grad]
    backward(method, micro, parts, progress_at(0), cached=parts > 1)
    average(trained, world)
    return gradients(method)


def gathered(values: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """`gather_with_gradient` of this rank's rows, and the gradient of rank-dependent weights."""
    local = values.chunk(world.size)[world.rank].clone().requires_grad_()
    everyone = gather_with_gradient(local)
    weights = torch.arange(everyone.numel()).view_as(everyone) ** (world.rank + 1)
    (everyone * weights).sum().backward()
    assert local.grad is not None
    return everyone.detach(), local.grad


def normalized(
    norm: nn.Module, x: Tensor, cotangent: Tensor, first_rows: int, world: World
) -> dict[str, Tensor]:
    """A converted norm on rows [0, first_rows) or the rest: its output, gradients and buffers."""
    rows = slice(0, first_rows) if world.rank == 0 else slice(first_rows, None)
    rows = rows if world.size > 1 else slice(None)
    local = x[rows].clone().requires_grad_()
    converted = convert(copy.deepcopy(norm), world)
    output = converted(local)
    output.backward(cotangent[rows])
    assert local.grad is not None
    outcome = {"output": output.detach(), "input gradient": local.grad}
    outcome |= {f"{name} gradient": grad for name, grad in gradients(converted).items()}
    return outcome | {name: value.clone() for name, value in converted.named_buffers()}


# ---- the two processes


def work(connection: Connection, rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    world = World(rank=rank, size=RANKS)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    with in_float64():
        while (job := pickle.loads(connection.recv_bytes())) is not None:
            name, arguments = job
            connection.send_bytes(pickle.dumps(globals()[name](*arguments, world)))
    dist.destroy_process_group()


@contextmanager
def two_ranks(directory: Path) -> Iterator[Call]:
    """Gives call(function, *arguments): its result on each rank; the function is of this file."""
    rendezvous = f"file://{directory / 'rendezvous'}"
    connections: list[Connection] = []
    workers: list[subprocess.Popen[bytes]] = []
    for rank in range(RANKS):
        ours, theirs = Pipe()
        file = theirs.fileno()
        command = [sys.executable, "-m", "tests.two_ranks", str(file), str(rank), rendezvous]
        workers.append(subprocess.Popen(command, cwd=ROOT, pass_fds=[file]))
        theirs.close()
        connections.append(ours)

    def call(function: Callable[..., object], *arguments: object) -> list[Any]:
        # Plain pickles: torch would share the tensors' memory through file descriptors.
        job = pickle.dumps((function.__name__, arguments))
        for connection in connections:
            connection.send_bytes(job)
        # A worker that failed has closed its end, which ends the wait with an EOFError.
        return [pickle.loads(connection.recv_bytes()) for connection in connections]

    yield call
    for connection in connections:
        connection.send_bytes(pickle.dumps(None))
    assert [worker.wait(timeout=30) for worker in workers] == [0] * RANKS


# ---- methods and batches that two ranks can agree on, and the comparison


def smooth(method: Method) -> Method:
    """The same method without its ReLUs and max pooling.

    At a kink a rounding error switches a gradient on or off, and then agreement is luck.
    """
    for module in method.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
            if isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    return method


def uneven(batch: Batch) -> Batch:
    """Contiguous pictures, and most of the first rank's labels missing."""
    labels = batch.labels.clone()
    labels[:5] = -1
    return replace(batch, views=tuple(v.contiguous() for v in batch.views), labels=labels)


def relative_error(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|ours - expected| / |expected|, all entries taken as one vector."""
    assert ours.keys() == expected.keys()
    difference, size = (
        sum(float(values[name].double().square().sum()) for name in expected)
        for values in ({name: ours[name] - expected[name] for name in expected}, expected)
    )
    return (difference / max(size, 1e-12)) ** 0.5


def group_of(name: str) -> str:
    """Kinds of state that differ in size, so that a wrong small one does not hide."""
    for kind in ("running_mean", "running_var", "num_batches_tracked"):
        if name.endswith(kind):
            return kind
    return name.split(".")[0]


def assert_agrees(seen: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(seen["losses"], expected["losses"], rtol=TOLERANCE, atol=1e-12)
    assert relative_error(seen["first"], expected["first"]) < TOLERANCE
    assert relative_error(seen["last"], expected["last"]) < TOLERANCE
    for group in {group_of(key) for key in expected["state"]}:
        keys = [key for key in expected["state"] if group_of(key) == group]
        ours, theirs = ({key: each["state"][key] for key in keys} for each in (seen, expected))
        assert relative_error(ours, theirs) < TOLERANCE, group


if __name__ == "__main__":
    work(Connection(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
