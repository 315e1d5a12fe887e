"""The random words of a batch, by scope, kind and place: what the functions that draw are given."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from headrace.pipelines.counters import Kind, Scope, counters, owners
from headrace.pipelines.ops import DrawScope
from headrace.pipelines.philox import uniforms, words


@dataclass(frozen=True)
class Source:
    """The random words of one view of B samples.

    ids: int64 [B]. occurrences: int32 [B]. groups: int64 [B], ascending without gaps, the number in
    the epoch of each sample's group of `group` positions.
    """

    seed: int
    epoch: int
    view: int
    ids: NDArray[np.int64]
    occurrences: NDArray[np.int32]
    groups: NDArray[np.int64]
    group: int

    @cached_property
    def group_rows(self) -> NDArray[np.int64]:
        """int64 [B]: which of the batch's groups each sample is in, from 0 on."""
        return self.groups - self.groups[:1]

    @cached_property
    def own_groups(self) -> NDArray[np.int64]:
        """The numbers of the batch's groups, each once."""
        if len(self.groups) == 0:
            return self.groups
        return np.arange(self.groups[0], self.groups[-1] + 1)

    @cached_property
    def _samples(self) -> NDArray[np.uint32]:
        return owners(
            Scope.SAMPLE,
            self.ids,
            epoch=self.epoch,
            occurrence=self.occurrences,
            view=self.view,
        )

    @cached_property
    def _groups(self) -> NDArray[np.uint32]:
        return owners(Scope.GROUP, self.own_groups, epoch=self.epoch, view=self.view)

    def words(
        self, kind: Kind, ordinal: int, blocks: int, scope: DrawScope = "sample"
    ) -> NDArray[np.uint32]:
        """uint32 [B, 4 * blocks]; equal within a group for scope "group"."""
        if scope == "group":
            return self.group_words(kind, ordinal, blocks)[self.group_rows]
        chosen = counters(self._samples, kind, ordinal=ordinal, blocks=blocks)
        return words(self.seed, chosen).reshape(len(self.ids), 4 * blocks)

    def group_words(self, kind: Kind, ordinal: int, blocks: int) -> NDArray[np.uint32]:
        """uint32 [groups of the batch, 4 * blocks]."""
        chosen = counters(self._groups, kind, ordinal=ordinal, blocks=blocks)
        return words(self.seed, chosen).reshape(len(self.own_groups), 4 * blocks)

    def gate(self, kind: Kind, ordinal: int, probability: float) -> NDArray[np.bool_]:
        """bool [B]; never where the probability is 0, always where it is 1."""
        return uniforms(self.words(kind, ordinal, blocks=1)[:, 0]) < probability


def below(random_words: NDArray[np.uint32], limit: int | NDArray[np.integer]) -> NDArray[np.int64]:
    """Words of any shape as integers in 0 .. limit - 1, limit at most 2^31."""
    return (random_words.astype(np.int64) * limit) >> 32


def between(
    low: float | NDArray[np.float64],
    high: float | NDArray[np.float64],
    uniform: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Numbers in [0, 1) as float32 in [low, high]."""
    return (low + uniform * (np.subtract(high, low))).astype(np.float32)
