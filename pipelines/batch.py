"""What an engine hands to training: the whole contract between the two, with shapes.

B = samples of this rank's (micro-)batch, V = views. Views have one shape before and after
`device_stage`: [B, 3, H, W] with channels-last strides, uint8 from an engine (so HWC bytes in
memory), normalised floating point afterwards. No tensor aliases a buffer that an engine uses again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from headrace.pipelines.faults import Fault

_Move = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Mixed:
    """Who was mixed with whom: the pixels are done, the target is the method's to build.

    partners: int64 [B], the partner's row in the batch. labels: int64 [B], the partner's label, -1
    where there is none. weights: float32 [B], lambda, the sample's own share after clipping.
    boxes: int32 [B, 4] = top, left, height, width that CutMix took from the partner, else 0.
    """

    partners: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    boxes: torch.Tensor

    def map(self, move: _Move) -> "Mixed":
        """The same with `move` of every tensor."""
        held = (self.partners, self.labels, self.weights, self.boxes)
        return Mixed(*(move(tensor) for tensor in held))


@dataclass(frozen=True)
class Erased:
    """What was overwritten in a view, by `RandomErasing`'s columns.

    boxes: int32 [B, most boxes, 4]. colors: float32 [B, most boxes, 3], or None. keys: int64 [B],
    the bits of the 64-bit keys, or None.
    """

    boxes: torch.Tensor
    colors: torch.Tensor | None = None
    keys: torch.Tensor | None = None

    def map(self, move: _Move) -> "Erased":
        """The same with `move` of every tensor."""
        held = (self.boxes, self.colors, self.keys)
        boxes, colors, keys = (None if tensor is None else move(tensor) for tensor in held)
        assert boxes is not None
        return Erased(boxes, colors, keys)


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    views: V tensors [B, 3, H_v, W_v], in the order of `Augmentation.flat_views`.
    labels: int64 [B], -1 where there is none.
    ids: int64 [B], the sample's place in the data set, the same in every format of it.
    masks: V entries, bool [B, N] (True = removed; MultiBlockMask: [B, 1 + targets, N]) or None
    where the view has no mask.
    draws: what the method declared for itself, by name, first axis B.
    components: by name V entries, uint8 [B, 1, H_v, W_v] in 0..255, cropped and mirrored as the
    view is, or None for a view that does not ask for it.
    erased: V entries, None where nothing is erased in the view. mixed: None without Mix. Both are
    done to views that are finished, and to be done to views that are still uint8.
    epoch, position: the epoch, and the place in it of the first sample of the *global* batch.
    faults: of samples that could not be used, where the loader goes on.
    """

    views: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    ids: torch.Tensor
    masks: tuple[torch.Tensor | None, ...]
    epoch: int
    position: int
    draws: Mapping[str, torch.Tensor] = field(default_factory=dict)
    erased: tuple[Erased | None, ...] = ()
    mixed: Mixed | None = None
    components: Mapping[str, tuple[torch.Tensor | None, ...]] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def map(self, move: _Move) -> "Batch":
        """The same batch with `move` of every tensor."""
        return replace(
            self,
            views=tuple(move(view) for view in self.views),
            labels=move(self.labels),
            ids=move(self.ids),
            masks=tuple(None if mask is None else move(mask) for mask in self.masks),
            draws={name: move(draw) for name, draw in self.draws.items()},
            erased=tuple(None if erased is None else erased.map(move) for erased in self.erased),
            mixed=None if self.mixed is None else self.mixed.map(move),
            components={
                name: tuple(None if part is None else move(part) for part in parts)
                for name, parts in self.components.items()
            },
        )

    def sound(self) -> "Batch":
        """The same batch without the rows that are black for want of a picture; without mixing."""
        bad = [fault.sample_id for fault in self.faults if fault.replacement is None]
        if not bad:
            return self
        kept = ~torch.isin(self.ids.cpu(), torch.tensor(bad))
        return replace(self.map(lambda tensor: tensor[kept.to(tensor.device)]), faults=())

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that it holds."""
        held: list[torch.Tensor] = []
        self.map(lambda tensor: (held.append(tensor), tensor)[1])
        return iter(held)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; copies from pinned memory do not block."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Micro-batches as the one batch that they are parts of, in their order."""
    if len(batches) == 1:
        return batches[0]
    columns = zip(*(batch.tensors() for batch in batches), strict=True)
    merged = iter([torch.cat(column) for column in columns])
    faults = tuple(fault for batch in batches for fault in batch.faults)
    whole = replace(batches[0].map(lambda _: next(merged)), faults=faults)
    if whole.mixed is None:
        return whole
    # Partners are numbered from the first row of their own micro-batch.
    lengths = torch.tensor([0, *(len(batch) for batch in batches[:-1])])
    starts = lengths.cumsum(0).repeat_interleave(torch.tensor([len(b) for b in batches]))
    partners = whole.mixed.partners + starts.to(whole.mixed.partners.device)
    return replace(whole, mixed=replace(whole.mixed, partners=partners))
