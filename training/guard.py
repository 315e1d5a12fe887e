"""What may end a run early: a loss that stops being finite, an image that is missing, and a signal.

All are flags on the device. Every step reduces them over the ranks, so that all ranks end at the
same step, and the step itself asks the device for nothing: the optimiser skips its update where
`blocked` is 1, whatever else changed in the step is selected back, and the host reads the flags of
an earlier step, which the device has long finished. Costs a copy of the state that no optimiser
updates (teacher, running statistics, queues) and one all-reduce of three numbers.
"""

import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import Tensor, nn

from headrace.pipelines.batch import Batch
from headrace.pipelines.faults import Fault
from headrace.training.blocks.memory import RowMemory
from headrace.training.collectives import gather_objects, largest_over_ranks_
from headrace.training.world import World

_HOST_IS_AHEAD_STEPS = 2
"""On CUDA the host reads flags of this many steps ago: deep enough for the device to be busy."""


@dataclass
class Signals:
    """Set once SIGTERM (Slurm's pre-emption, torchrun's end) or SIGINT (Ctrl-C) has arrived."""

    received: signal.Signals | None = None


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """Inside, the two signals are only noted: the run ends between two steps."""
    signals = Signals()

    def note(number: int, _frame: FrameType | None) -> None:
        signals.received = signal.Signals(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Verdict:
    """failed_step: the first step (from 1) whose loss or gradient was not finite, or that an image
    was missing from; ids: the samples of that step and of those after it that were already under
    way, by step, over all ranks. faults: of samples that could not be used, by step, over all
    ranks. stop: a signal has arrived at some rank."""

    failed_step: int | None = None
    ids: dict[int, list[int]] = field(default_factory=dict)
    faults: dict[int, list[Fault]] = field(default_factory=dict)
    stop: bool = False

    @property
    def missing(self) -> tuple[int, list[Fault]] | None:
        """The step that failed and the samples that it lacked, if that is why it failed."""
        if self.failed_step is None:
            return None
        faults = self.faults.get(self.failed_step, [])
        missing = [fault for fault in faults if fault.replacement is None]
        return (self.failed_step, missing) if missing else None


class Guard:
    """Call begin, check (before the optimiser), end, read; once per step each, on every rank."""

    def __init__(
        self,
        method: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        signals: Signals,
        early: Sequence[Tensor] = (),
    ) -> None:
        """early: what phases before the last one train, and so may have moved when that fails."""
        self._method, self._world, self._signals = method, world, signals
        self._optimizer, self._early = optimizer, early
        trained = {p for group in optimizer.param_groups for p in group["params"]}
        self._frozen = [p for p in method.parameters() if p not in trained]
        self._saved: list[Tensor] = []
        self._saved_moments: dict[tuple[int, str], Tensor] = {}
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self._ids: deque[tuple[int, list[Tensor]]] = deque(maxlen=_HOST_IS_AHEAD_STEPS + 1)
        self._faults: dict[int, list[Fault]] = {}
        self.blocked = torch.zeros((), device=world.device)
        """float32: 1 from the first failed step on."""
        self._flags = torch.zeros(3, device=world.device)
        optimizer.found_inf = self.blocked  # pyright: ignore[reportAttributeAccessIssue]

    def _state(self) -> list[Tensor]:
        # Asked for anew each time: a method may put another tensor in a buffer's place.
        rows = {memory.rows for memory in self._memories()}
        return [
            *self._early,
            *self._frozen,
            *(b for b in self._method.buffers() if b not in rows),
        ]

    def _moments(self) -> dict[tuple[int, str], Tensor]:
        """What the optimiser keeps of the early phases; some make it in their first step."""
        return {
            (place, name): value
            for place, parameter in enumerate(self._early)
            for name, value in self._optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }

    def _memories(self) -> list[RowMemory]:
        """Too large to copy at every step; they undo their ids_here."""
        return [module for module in self._method.modules() if isinstance(module, RowMemory)]

    @torch.no_grad()
    def begin(self) -> None:
        """Before anything of the step changes: copy what no optimiser updates."""
        for memory in self._memories():
            memory.begin_step()
        self._saved_moments = {key: value.clone() for key, value in self._moments().items()}
        state = self._state()
        if [t.shape for t in state] != [t.shape for t in self._saved]:
            self._saved = [torch.empty_like(tensor) for tensor in state]
        if state:
            torch._foreach_copy_(self._saved, state)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what changed since `begin`, before any optimiser has stepped."""
        for tensor, saved in zip(self._state(), self._saved, strict=True):
            tensor.copy_(saved)
        for memory in self._memories():
            memory.undo(torch.ones_like(self.blocked, dtype=torch.bool))

    @torch.no_grad()
    def check(self, values: Sequence[Tensor], batches: Sequence[Batch] = ()) -> None:
        """Block this update, on all ranks, if one of the scalars is not finite on one of them, or
        if a sample could not be used and nothing has taken its place."""
        faults = [fault for batch in batches for fault in batch.faults]
        self._flags[0] = 1.0 - torch.stack([value.isfinite() for value in values]).all().float()
        if any(fault.replacement is None for fault in faults):
            self._flags[0] = 1.0
        self._flags[1] = float(self._signals.received is not None)
        self._flags[2] = float(bool(faults))
        largest_over_ranks_(self._flags)
        torch.maximum(self.blocked, self._flags[0], out=self.blocked)

    @torch.no_grad()
    def end(self, step: int, batches: Sequence[Batch]) -> None:
        """After everything of step `step` (from 1) changed: undo it where the step is blocked."""
        blocked = self.blocked > 0
        for tensor, saved in zip(self._state(), self._saved, strict=True):
            tensor.copy_(torch.where(blocked, saved, tensor))
        for key, value in self._moments().items():
            # What was not there before the step began as zeros.
            before = self._saved_moments.get(key)
            value.copy_(torch.where(blocked, 0 if before is None else before, value))
        for memory in self._memories():
            memory.undo(blocked)
        self._ids.append((step, [batch.ids for batch in batches]))
        self._faults[step] = [fault for batch in batches for fault in batch.faults]
        flags = torch.cat([self.blocked[None], self._flags[1:]])
        if flags.device.type == "cuda":
            host = torch.empty(3, pin_memory=True)
            host.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((step, host, event))
        else:
            self._pending.append((step, flags, None))

    def read(self, *, drain: bool = False) -> Verdict:
        """What the flags said; of all steps so far with `drain`, which waits for the device.

        Every rank reads the same steps' flags at the same step, and so comes to the same verdict.
        """
        stop, faults = False, dict[int, list[Fault]]()
        ahead = _HOST_IS_AHEAD_STEPS if self._world.device.type == "cuda" else 0
        while len(self._pending) > (0 if drain or stop else ahead):
            step, flags, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            failed, stopped, faulty = flags.tolist()
            faults_here = self._faults.pop(step)
            if faulty:
                faults[step] = [f for of_rank in gather_objects(faults_here) for f in of_rank]
            if failed:
                return Verdict(failed_step=step, ids=self._gather_ids(step), faults=faults)
            stop = stop or bool(stopped)
        return Verdict(faults=faults, stop=stop)

    @property
    def signal_name(self) -> str:
        """Of the signal that arrived here, for people."""
        return "a signal" if self._signals.received is None else self._signals.received.name

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended; any rank may have received it."""
        return 128 + (self._signals.received or signal.SIGTERM)

    def _gather_ids(self, first: int) -> dict[int, list[int]]:
        ids_here = {
            step: [sample for part in ids for sample in part.tolist()]
            for step, ids in self._ids
            if step >= first
        }
        ranks = gather_objects(ids_here)
        return {step: [sample for rank in ranks for sample in rank[step]] for step in ids_here}
