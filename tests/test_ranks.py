"""Two processes are one process: the mean over ranks of loss and gradient is the global batch's.

One pair of gloo processes serves all tests. It is this file, run as a script; it receives a method
and the global batches, and sends back what its rank saw.
"""

import copy
import hashlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d
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
from tests.tiny_methods import (
    CASES,
    TinyContext,
    build,
    make_batch,
    progress_at,
    share,
    small_preset,
    train_step,
)

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
STEPS, HALFWAY = 6, 3  # of four in an epoch
TOLERANCE = 1e-9


@pytest.fixture(autouse=True, scope="module")
def float64() -> Iterator[None]:
    with in_float64():
        yield


def gradients(method: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in method.named_parameters()
        if parameter.grad is not None
    }


def train(
    method: Method, recipe: Preset, batches: list[Batch], first: int, rate: float, world: World
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
    context = TinyContext(recipe, world)
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
    found = {"output": output.detach(), "input gradient": local.grad}
    found |= {f"{name} gradient": grad for name, grad in gradients(converted).items()}
    return found | {name: value.clone() for name, value in converted.named_buffers()}


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


Call = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    """on_two_ranks(function, *arguments): its result on each rank; the function is of this file."""
    rendezvous = f"file://{tmp_path_factory.mktemp('ranks') / 'rendezvous'}"
    connections: list[Connection] = []
    workers: list[subprocess.Popen[bytes]] = []
    for rank in range(RANKS):
        ours, theirs = Pipe()
        file = theirs.fileno()
        command = [sys.executable, "-m", "tests.test_ranks", str(file), str(rank), rendezvous]
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


# ---- methods


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


@pytest.mark.dist
@pytest.mark.parametrize(("name", "encoder"), CASES)
def test_two_ranks_are_one(name: str, encoder: str, on_two_ranks: Call) -> None:
    """Six steps over two epochs; and what two ranks began, one continues as if nothing were."""
    method = smooth(build(name, encoder, **changes_of(name)))
    recipe = small_preset(name)
    # Losses of normalised features or scaled scores are flat: the steps have to move something.
    rate = 1e-2 if name in ("ijepa", "cpc") else 1e-3
    batches = [uneven(make_batch(recipe.augmentation, 16, seed)) for seed in range(STEPS)]
    one = train(method, recipe, batches, 0, rate, World())
    two = on_two_ranks(train, method, recipe, batches, 0, rate)
    assert two[0]["digest"] == two[1]["digest"]
    moved = relative_error(method.state_dict(), one["state"])
    assert moved > 1e-4, "steps that change nothing would agree with anything"
    for seen in two:
        assert_agrees(seen, one)
    other = copy.deepcopy(method)
    other.load_state_dict(two[0]["halfway"])
    rest = train(other, recipe, batches[HALFWAY:], HALFWAY, rate, World())
    rest["losses"] = torch.cat([two[0]["losses"][:HALFWAY], rest["losses"]])
    assert_agrees({**rest, "first": one["first"]}, one)


def cached_gradients(
    method: Method, recipe: Preset, batch: Batch, parts: int, world: World
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


@pytest.mark.dist
@pytest.mark.parametrize("name", ["simclr", "moco_v3", "barlow_twins", "swav", "dino"])
def test_a_gradient_cache_sees_all_ranks_and_micro_batches(name: str, on_two_ranks: Call) -> None:
    method = build(name, "test_vit")
    for module in method.modules():
        for key, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d):
                setattr(module, key, nn.Identity())
    recipe = small_preset(name)
    batch = uneven(make_batch(recipe.augmentation, 16))
    one = cached_gradients(method, recipe, batch, 1, World())
    for seen in on_two_ranks(cached_gradients, method, recipe, batch, 2):
        assert relative_error(seen, one) < TOLERANCE


def assert_agrees(seen: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(seen["losses"], expected["losses"], rtol=TOLERANCE, atol=1e-12)
    assert relative_error(seen["first"], expected["first"]) < TOLERANCE
    assert relative_error(seen["last"], expected["last"]) < TOLERANCE
    for group in {group_of(key) for key in expected["state"]}:
        keys = [key for key in expected["state"] if group_of(key) == group]
        ours, theirs = ({key: each["state"][key] for key in keys} for each in (seen, expected))
        assert relative_error(ours, theirs) < TOLERANCE, group


def changes_of(name: str) -> dict[str, Any]:
    """Stochastic depth where a method has it: its coins too are the global batch's. Groups of 8
    where there are groups: the statistics of 4 samples magnify rounding tenfold."""
    wanted = {"drop_path": 0.2, "batch_norm_group": 8}
    return {key: wanted[key] for key in wanted if hasattr(small_preset(name).objective, key)}


# ---- blocks


@pytest.mark.dist
def test_gathered_gradient_is_the_sum_over_ranks(on_two_ranks: Call) -> None:
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.arange(12.0).view(4, 3)
    # Rank 0 asks for weights, rank 1 for their squares, of everybody's rows.
    expected = (weights + weights**2).chunk(2)
    for rank, (everyone, gradient) in enumerate(on_two_ranks(gathered, values)):
        assert torch.equal(everyone, values)
        assert torch.equal(gradient, expected[rank])


@pytest.mark.dist
@pytest.mark.parametrize("first_rows", [4, 1, 7])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(5),
        nn.BatchNorm2d(5, momentum=0.4),
        nn.BatchNorm2d(5, affine=False),
        BatchNormAct2d(5),
    ],
    ids=["1d", "2d", "2d without affine", "with activation"],
)
def test_batch_norm_spans_ranks(norm: nn.Module, first_rows: int, on_two_ranks: Call) -> None:
    """Also where ranks hold unequally many rows."""
    generator = torch.Generator().manual_seed(0)
    shape = (8, 5) if isinstance(norm, nn.BatchNorm1d) else (8, 5, 4, 4)
    x = 1 + torch.randn(shape, generator=generator)
    cotangent = torch.randn(shape, generator=generator)
    norm = copy.deepcopy(norm).double()
    one = normalized(norm, x, cotangent, first_rows, World())
    two = on_two_ranks(normalized, norm, x, cotangent, first_rows)
    for key, expected in one.items():
        if key in ("output", "input gradient"):
            ours = torch.cat([each[key] for each in two])
        elif key.endswith("gradient"):
            ours = two[0][key] + two[1][key]
        else:
            assert torch.equal(two[0][key], two[1][key])
            ours = two[0][key]
        torch.testing.assert_close(ours, expected, rtol=TOLERANCE, atol=1e-12)


if __name__ == "__main__":
    work(Connection(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
