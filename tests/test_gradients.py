"""How a step's gradients come about: phases, the gradient cache over ranks, and their undoing."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from headrace.pipelines.batch import Batch, Mixed, concatenate
from headrace.pipelines.ops import CenterCrop
from headrace.pipelines.recipe import Augmentation, View
from headrace.training.blocks.memory import Queue, RowMemory
from headrace.training.gradients import backward, gradient_of
from headrace.training.guard import Guard, Signals
from headrace.training.meters import Meters
from headrace.training.method import MAIN_PHASE, Method, Progress
from headrace.training.optim import Schedule, build_optimizer
from headrace.training.parallel import model_for
from headrace.training.preset import Optim
from headrace.training.step import early_parameters, optimiser_step
from headrace.training.world import World
from tests.tiny_methods import batch_of, build, finished, progress_at, share

ONE = World()


class Adversarial(Method):
    """A generator of numbers and a critic, whose steps alternate."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Identity()
        self.critic = nn.Linear(1, 1, bias=False)
        self.generator = nn.Linear(1, 1, bias=False)
        for layer in (self.critic, self.generator):
            nn.init.ones_(layer.weight)
        self.seen: list[tuple[str, float, float]] = []

    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"made": self.generator(batch.views[0])}

    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        score = self.critic(embeddings["made"]).mean()
        weights = self.critic.weight.detach(), self.generator.weight.detach()
        self.seen.append((progress.phase, float(weights[0]), float(weights[1])))
        return {"loss": score if progress.phase == "critic" else 3 * score}

    def phases(self) -> dict[str, list[nn.Parameter]]:
        return {
            "critic": list(self.critic.parameters()),
            MAIN_PHASE: list(self.generator.parameters()),
        }


def one_step(
    method: Adversarial, batch: Batch, optim: Optim
) -> tuple[torch.optim.Optimizer, Guard, dict[str, float]]:
    """The optimiser and the guard behind a step, and what is logged of it."""
    schedule = Schedule(optim, 256, 1.0)
    optimizer = build_optimizer(method.param_groups(), schedule)
    guard = Guard(method, optimizer, ONE, Signals(), early_parameters(method))
    meters = Meters(ONE, len(batch), None)
    model, progress = model_for(method, ONE, cached=False), Progress(0, 10, 10, 0)
    guard.begin()
    report = optimiser_step(
        method, model, optimizer, iter([batch]), progress, world=ONE, guard=guard
    )
    guard.end(1, report.batches)
    meters.step(report.scalars)
    return optimizer, guard, meters.take()


def numbers(values: list[float]) -> Batch:
    column = torch.tensor(values)[:, None]
    return Batch((column,), torch.zeros(len(values)), torch.arange(len(values)), (None,), 0, 0)


PLAIN = Optim(name="sgd", learning_rate=0.1, momentum=0.0, weight_decay=0.0, warmup_epochs=0)


def test_an_adversary_steps_first_and_by_its_own_loss() -> None:
    method = Adversarial()
    _, _, logged = one_step(method, numbers([1.0, 3.0]), PLAIN)
    # The critic minimises its score of 2 x, at 1: 1 - 0.1 * 2. The generator meets the moved one.
    assert method.seen == [("critic", 1.0, 1.0), (MAIN_PHASE, pytest.approx(0.8), 1.0)]
    assert float(method.generator.weight.detach()) == pytest.approx(1 - 0.1 * 3 * 2 * 0.8)
    assert float(method.critic.weight.detach()) == pytest.approx(0.8)
    assert logged["critic_loss"] == pytest.approx(2.0)
    assert logged["loss"] == pytest.approx(3 * 2 * 0.8)
    assert {"gradient_norm", "critic_gradient_norm"} <= logged.keys()


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_a_failing_last_phase_undoes_the_first_one(name: Literal["sgd", "adamw", "lars"]) -> None:
    class Failing(Adversarial):
        def objective(
            self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
        ) -> dict[str, Tensor]:
            loss = super().objective(embeddings, batch, progress)["loss"]
            return {"loss": loss * (float("nan") if progress.phase == MAIN_PHASE else 1.0)}

    method = Failing()
    optimizer, guard, _ = one_step(
        method, numbers([1.0, 3.0]), replace(PLAIN, name=name, momentum=0.9)
    )
    assert float(method.critic.weight.detach()) == 1.0
    assert float(method.generator.weight.detach()) == 1.0
    kept = optimizer.state[method.critic.weight]
    assert kept
    assert not any(value.any() for value in kept.values())
    assert guard.read().failed_step == 1


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_phases_that_succeed_stay(name: Literal["sgd", "adamw", "lars"]) -> None:
    method = Adversarial()
    optimizer, guard, _ = one_step(
        method, numbers([1.0, 3.0]), replace(PLAIN, name=name, momentum=0.9)
    )
    assert guard.read().failed_step is None
    assert float(method.critic.weight.detach()) != 1.0
    assert all(value.any() for value in optimizer.state[method.critic.weight].values())


def test_other_phases_take_no_gradient() -> None:
    method = Adversarial()
    with gradient_of(method, list(method.critic.parameters())):
        backward(method, [numbers([1.0])], 1, Progress(0, 1, 1, 0))
    assert method.critic.weight.grad is not None
    assert method.generator.weight.grad is None
    assert method.generator.weight.requires_grad


@pytest.mark.parametrize("kind", [RowMemory, Queue])
def test_a_blocked_step_leaves_no_row_behind(kind: type[RowMemory]) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trained = nn.Parameter(torch.zeros(1))
            self.memory = kind(torch.arange(8.0).view(4, 2))

    holder = Holder()
    guard = Guard(holder, torch.optim.SGD([holder.trained], fused=True), ONE, Signals())

    def step(number: int, loss: float) -> None:
        guard.begin()
        guard.check([torch.tensor(loss)])
        if isinstance(holder.memory, Queue):
            holder.memory.push(torch.full((2, 2), loss))
        else:
            holder.memory.write(torch.tensor([3, 1]), torch.full((2, 2), loss))
            holder.memory.write(torch.tensor([1]), torch.full((1, 2), loss))
        guard.end(number, [numbers([0.0])])

    step(1, 0.5)
    before = {key: value.clone() for key, value in holder.state_dict().items()}
    assert (before["memory.rows"] == 0.5).sum() == 4
    step(2, float("nan"))
    for key, value in holder.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_of_a_row_that_is_written_twice_the_first_value_counts() -> None:
    memory = RowMemory(torch.zeros(3, 1))
    memory.write(torch.tensor([2, 0, 2, 2]), torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    assert memory.rows.flatten().tolist() == [2, 0, 1]
    memory.undo(torch.tensor(True))
    assert memory.rows.flatten().tolist() == [0, 0, 0]


def test_a_queue_forgets_the_oldest_first() -> None:
    queue = Queue(torch.zeros(6, 1))
    for number in range(1, 5):
        queue.push(torch.full((2, 1), float(number)))
    assert queue.rows.flatten().tolist() == [4, 4, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="4 rows do not divide a queue of 6"):
        queue.push(torch.zeros(4, 1))


def test_micro_batches_together_are_their_batch() -> None:
    view = View("view", (CenterCrop(32),))
    whole = finished(Augmentation("plain", (view,)), torch.arange(8))
    mixed = Mixed(
        torch.tensor([3, 2, 1, 0, 7, 6, 5, 4]), whole.labels, torch.rand(8), torch.zeros(8, 4)
    )
    whole = replace(whole, mixed=mixed)
    parts = [share(whole, slice(0, 4)), share(whole, slice(4, 8))]
    assert parts[1].mixed is not None
    assert parts[1].mixed.partners.tolist() == [3, 2, 1, 0]
    together = concatenate(parts)
    for one, other in zip(together.tensors(), whole.tensors(), strict=True):
        assert torch.equal(one, other)


def test_a_gradient_cache_counts_each_micro_batch_once_in_running_statistics() -> None:
    cached, plain = (build("simclr", "test_resnet") for _ in range(2))
    batch = batch_of("simclr")
    parts = [share(batch, slice(0, 8)), share(batch, slice(8, 16))]
    backward(cached, parts, 2, progress_at(0), cached=True)
    backward(plain, parts, 2, progress_at(0))
    for (key, one), other in zip(cached.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other), key
