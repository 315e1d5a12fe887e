"""Stochastic depth (Huang et al. 2016) whose coins do not depend on who holds the sample.

timm's DropPath takes its coins from torch's global generator, so they change with the split of a
batch over ranks and micro-batches. Here the coin is a hash of (seed, step, layer, view, sample id):
each rank computes its own, and together they are the global batch's.
"""

from collections.abc import Sequence

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from headrace.training.method import Progress


class KeyedDropPath(nn.Module):
    """timm's DropPath with `keys`, int64 [B], set by `set_keys` before each forward pass."""

    def __init__(self, probability: float, layer: int) -> None:
        super().__init__()
        self.probability = probability
        self.layer = layer
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        if self.keys is None or len(self.keys) != len(x):
            raise RuntimeError("drop path has no keys for this batch: call set_keys before forward")
        kept = _uniform(self.keys, self.layer) >= self.probability
        scale = kept.to(x.dtype) / (1 - self.probability)
        return x * scale.view(-1, *(1 for _ in x.shape[1:]))


def key_drop_paths(encoder: nn.Module) -> nn.Module:
    """Replaces every timm DropPath in the encoder, which is returned; the state dict stays."""
    drop_paths = [
        (parent, name, child)
        for parent in encoder.modules()
        for name, child in parent.named_children()
        if isinstance(child, DropPath)
    ]
    for layer, (parent, name, child) in enumerate(drop_paths):
        setattr(parent, name, KeyedDropPath(child.drop_prob or 0.0, layer))
    return encoder


def set_drop_paths(blocks: nn.Module, probability: float) -> None:
    """The same probability in all blocks (dinov2's drop_path_uniform); timm's rise from 0."""
    for number, block in enumerate(blocks.children()):
        for branch in range(2):
            layer = KeyedDropPath(probability, 2 * number + branch)
            setattr(block, f"drop_path{branch + 1}", layer)


def set_keys(encoder: nn.Module, ids: Tensor, views: Sequence[int], progress: Progress) -> None:
    """For a forward pass over `views` of samples `ids` (int64 [B]), one view after the other."""
    layers = [module for module in encoder.modules() if isinstance(module, KeyedDropPath)]
    if not layers:
        return
    seed = progress.generator("drop path").initial_seed()
    keys = torch.cat([_mix(_mix(ids + seed) + view) for view in views])
    for module in layers:
        module.keys = keys


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, which wraps around; the masks make the shifts logical."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def _uniform(keys: Tensor, layer: int) -> Tensor:
    """float32 in [0, 1), 24 bits."""
    return ((_mix(keys + layer) >> 40) & (2**24 - 1)).float() / 2**24
