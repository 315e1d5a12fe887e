"""Rows that outlive the step: memory banks (a row per sample of the data set) and queues.

Both are equal on every rank: what is written has been gathered before. They are large, and a step
touches few of their rows, so each remembers what its last step overwrote instead of being copied
as a whole: that is how the loop's guard undoes a step whose loss was not finite.
"""

import torch
from torch import Tensor, nn


class RowMemory(nn.Module):
    """A buffer "rows" [N, ...], read and written by row number (a bank: the sample's id)."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self._overwritten: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def forward(self, numbers: Tensor) -> Tensor:
        """int64 [...] -> a copy of these rows, [..., *row], without gradient."""
        return self.rows[numbers]

    @torch.no_grad()
    def write(self, numbers: Tensor, values: Tensor) -> None:
        """Row numbers int64 [n]; values [n, *row]. Once or more per step.

        Of a row that is there several times (repeated augmentation) the first value counts, so that
        what is written does not depend on the device's order of writing.
        """
        first = (numbers[:, None] == numbers).byte().argmax(dim=1)
        self._replace(numbers, values[first])

    def _replace(self, numbers: Tensor, values: Tensor) -> None:
        self._overwritten.append((numbers, self.rows[numbers]))
        self.rows[numbers] = values.to(self.rows.dtype)

    def begin_step(self) -> None:
        """Forget what earlier steps overwrote. Called by the training loop."""
        self._overwritten.clear()

    @torch.no_grad()
    def undo(self, blocked: Tensor) -> None:
        """Where `blocked` (bool scalar) is true, put back what this step overwrote."""
        for numbers, before in reversed(self._overwritten):
            self.rows[numbers] = torch.where(blocked, before, self.rows[numbers])
        self._overwritten.clear()


class Queue(RowMemory):
    """First in, first out: `rows` [K, ...] of which `cursor` (int64 scalar) is the oldest."""

    cursor: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__(rows)
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, values: Tensor) -> None:
        """Replaces the n oldest rows by `values` [n, *row]; n must divide the queue's length."""
        if len(self) % len(values):
            raise ValueError(f"{len(values)} rows do not divide a queue of {len(self)}")
        numbers = (self.cursor + torch.arange(len(values), device=values.device)) % len(self)
        self._replace(numbers, values)
        self.cursor.copy_((self.cursor + len(values)) % len(self))
