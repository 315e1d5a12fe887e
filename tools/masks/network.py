"""A small fully convolutional network that learns what is salient from pictures and noisy labels.

What single measures get wrong differs from picture to picture, while what an object looks like does
not: a network too small to remember the noise of thousands of labels is left with what they have in
common. A U-Net of four levels and 0.12 M weights, made to be trained on a CPU.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_WIDTHS = (16, 24, 32, 48)
MULTIPLE = 2 ** (len(_WIDTHS) - 1)  # sides of the pictures must be multiples of this
_LEARNING_RATE = 3e-3
_BATCH = 32


class SaliencyNetwork(nn.Module):
    """uint8 [B, 3, S, S] -> logits float32 [B, 1, S, S]."""

    def __init__(self) -> None:
        super().__init__()
        before = (3, *_WIDTHS[:-1])
        self.down = nn.ModuleList(map(_block, before, _WIDTHS))
        self.up = nn.ModuleList(_block(fine + coarse, fine) for fine, coarse in pairwise(_WIDTHS))
        self.last = nn.Conv2d(_WIDTHS[0], 1, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures.float() / 127.5 - 1
        levels: list[Tensor] = []
        for number, block in enumerate(self.down):
            x = block(x if number == 0 else F.max_pool2d(x, 2))
            levels.append(x)
        for number in reversed(range(len(self.up))):
            coarse = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = self.up[number](torch.cat([levels[number], coarse], dim=1))
        return self.last(x)


def _block(in_channels: int, out_channels: int) -> nn.Module:
    parts: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        parts += [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)]
        parts += [nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


def new_network(seed: int) -> SaliencyNetwork:
    """With the seed's weights; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SaliencyNetwork().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def train(
    network: SaliencyNetwork,
    pictures: Tensor,
    shares: Tensor,
    *,
    steps: int,
    seed: int,
    report: Callable[[float], object],
) -> None:
    """Fit the network, in place, to the majority of votes. Leaves it in eval mode.

    pictures: uint8 [N, 3, S, S]; shares: float32 [N, 1, S, S], which part of the voters calls a
    pixel salient. A pixel counts as much as its majority is large. report: gets each step's loss.
    """
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=1e-4)
    network.train()
    order = torch.zeros(0, dtype=torch.int64)
    for step in range(steps):
        rate = _LEARNING_RATE * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        if len(order) < min(_BATCH, len(pictures)):
            order = torch.randperm(len(pictures), generator=generator)
        rows, order = order[:_BATCH], order[_BATCH:]
        x, share = pictures[rows].to(device), shares[rows].to(device)
        x, share = _varied(x, share, generator)
        loss = vote_loss(network(x), share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(float(loss.detach()))
    network.eval()


def vote_loss(logits: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy with the majority, weighted by its size |2 share - 1|, and 1 - soft Dice.

    logits, shares: [B, 1, H, W]. A scalar: the weighted mean over all pixels, plus the mean over
    the pictures of 1 - 2 sum(w p y) / (sum(w p) + sum(w y)).
    """
    label = (shares > 0.5).to(logits.dtype)
    weight = (2 * shares - 1).abs()
    entropy = F.binary_cross_entropy_with_logits(logits, label, weight, reduction="sum")
    predicted = torch.sigmoid(logits) * weight
    both = (predicted * label).sum(dim=(1, 2, 3))
    either = predicted.sum(dim=(1, 2, 3)) + (label * weight).sum(dim=(1, 2, 3))
    dice = 1 - (2 * both + 1) / (either + 1)  # 1: a picture without anything salient is no division
    return entropy / weight.sum().clamp(min=1) + dice.mean()


def _varied(x: Tensor, share: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirrored or not, with other gains per picture and channel."""
    flipped = torch.rand(len(x), generator=generator) < 0.5
    gains = 0.7 + 0.6 * torch.rand(len(x), 3, 1, 1, generator=generator)
    mirror = flipped.to(x.device)[:, None, None, None]
    x = torch.where(mirror, x.flip(3), x).float() * gains.to(x.device)
    return x.clamp(max=255), torch.where(mirror, share.flip(3), share)


@torch.inference_mode()
def predict(network: SaliencyNetwork, pictures: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> float32 [B, S, S] in 0..1, on the CPU; the network is in eval mode."""
    device = next(network.parameters()).device
    logits = network(pictures.to(device).contiguous(memory_format=torch.channels_last))
    return torch.sigmoid(logits).squeeze(1).float().cpu()
