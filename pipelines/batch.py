"""What an engine hands to training: the whole contract between the two, with shapes.

B = samples of this rank's (micro-)batch, V = views. Views have one shape before and after
`device_stage`: [B, 3, H, W] with channels-last strides, uint8 from an engine (so HWC bytes in
memory), normalised floating point afterwards. No tensor aliases a buffer that an engine uses again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    views: V tensors [B, 3, H_v, W_v], in the order of `Augmentation.flat_views`.
    labels: int64 [B], -1 where there is none.
    ids: int64 [B], the sample's place in the data set, the same in every format of it.
    masks: V entries, bool [B, N] (True = removed) or None where the view has no mask.
    draws: what the method declared for itself, by name, first axis B.
    epoch, position: the epoch, and the place in it of the first sample of the *global* batch.
    """

    views: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    ids: torch.Tensor
    masks: tuple[torch.Tensor | None, ...]
    epoch: int
    position: int
    draws: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; copies from pinned memory do not block."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            views=tuple(move(view) for view in self.views),
            labels=move(self.labels),
            ids=move(self.ids),
            masks=tuple(None if mask is None else move(mask) for mask in self.masks),
            draws={name: move(draw) for name, draw in self.draws.items()},
        )
