"""An encoder that sees edges instead of colours, as DeepCluster's does.

Without it the easiest way to tell clusters apart is by colour, which says little of what is seen.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Sobel(nn.Module):
    """[B, 3, H, W] -> [B, 2, H, W]: the differences along x and y of the channels' mean.

    Fixed; zeros beyond the border. deepcluster `models/alexnet.py`, `AlexNet.__init__`.
    """

    kernels: Tensor

    def __init__(self) -> None:
        super().__init__()
        along_x = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        kernels = torch.stack([along_x, along_x.T])[:, None]
        self.register_buffer("kernels", kernels, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # sums that cancel
            grey = x.float().mean(dim=1, keepdim=True)
            return F.conv2d(grey, self.kernels, padding=1)


class SobelEncoder(nn.Module):
    """[B, 3, H, W] -> `network` (a timm model with in_chans=2) of the edges."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.sobel = Sobel()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.sobel(x))
