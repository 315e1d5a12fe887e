"""Images that a run met and could not use: RUN/skipped.jsonl, and how the run goes on.

With `--data.on-error skip` another image fills the place and a line says so. With `raise` the step
is not taken: its state before is saved, so that the same command goes on once the file is repaired.
A repaired file has another size, and with it the data set another fingerprint; a run that knows the
file goes on all the same, where that file is all that has changed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.pipelines.faults import Fault
from headrace.shards.errors import UserError
from headrace.shards.index import printable
from headrace.shards.store import IndexedStore, Store
from headrace.training.collectives import gather_objects
from headrace.training.run.directory import SKIPPED_FILE
from headrace.training.world import World

_NAMED = 5


class UnusableImage(UserError):
    """A run that stopped at an image: which, why, and how it goes on."""


class Faults:
    """What a run has met so far. known: as a checkpoint kept it, by sample id."""

    def __init__(self, store: Store, known: Mapping[int, Mapping[str, int]] | None = None) -> None:
        self._store = store
        self.known = {int(sample): dict(row) for sample, row in (known or {}).items()}

    def met(
        self, faults: Mapping[int, Sequence[Fault]], out: Path, world: World, *, skipped: bool
    ) -> Iterator[str]:
        """Take note of faults, by step from 1, the same on every rank; a sentence for people.

        skipped: others took their places, which stands in RUN/skipped.jsonl from now on.
        """
        if skipped and faults and world.is_main:
            yield self._append(out / SKIPPED_FILE, faults)
        for fault in (fault for of_step in faults.values() for fault in of_step):
            if fault.sample_id not in self.known:
                store, row = self._store, {}
                if isinstance(store, IndexedStore):
                    row = store.file_row(fault.sample_id)
                self.known[fault.sample_id] = row

    def _append(self, path: Path, faults: Mapping[int, Sequence[Fault]]) -> str:
        skipped: list[str] = []
        with path.open("a", encoding="ascii") as file:
            for step, of_step in faults.items():
                for fault in of_step:
                    name = self._name(fault.sample_id)
                    line = {
                        "step": step,
                        "epoch": fault.epoch,
                        "position": fault.position,
                        "id": fault.sample_id,
                        "name": name,
                        "reason": fault.reason,
                        "replaced_by": fault.replacement,
                    }
                    file.write(json.dumps(line) + "\n")
                    again = ", again" if fault.sample_id in self.known else f" ({fault.reason})"
                    skipped.append(f"{name!r}{again}")
        return f"skipped, and listed in {path}: {_some(skipped)}"

    def stopped(self, step: int, faults: Sequence[Fault], directory: Path) -> UnusableImage:
        """The sentence with which a run stops that was saved before `step`."""
        listed = _some([f"{self._name(f.sample_id)!r} ({f.reason})" for f in faults])
        return UnusableImage(
            f"step {step} has {len(faults)} image(s) of {self._store.uri} that cannot be used: "
            f"{listed}. {how_to_go_on(directory, step - 1)}"
        )

    def in_passes(self, unusable: list[str]) -> str:
        """What passes without training could not use, over all ranks, in words; "" for nothing.
        Every rank calls it. Empties the list."""
        named = sorted({name for of_rank in gather_objects(list(unusable)) for name in of_rank})
        unusable.clear()
        return f"{len(named)} image(s) cannot be used: {_some(named)}" if named else ""

    def accept_repairs(self, before: Mapping[str, Any]) -> None:
        """Let a checkpoint be of the data set as it is now, where nothing changed but images that
        the run could not use."""
        store, stream = self._store, before["fingerprint"]["stream"]
        if not self.known or not isinstance(store, IndexedStore):
            return
        if max(self.known) < len(store) and stream["store"] == store.fingerprint_with(self.known):
            stream["store"] = before["loader"]["fingerprint"]["store"] = store.fingerprint

    def _name(self, sample: int) -> str:
        return printable(self._store.names([sample])[0])


def how_to_go_on(directory: Path, step: int) -> str:
    """The second half of the sentence with which a run stops."""
    return (
        f"{directory} is saved at step {step}: repair or restore the file and give the same "
        "command again, or add --data.on-error skip"
    )


def _some(sentences: Sequence[str]) -> str:
    more = len(sentences) - _NAMED
    return "; ".join(sentences[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
