"""A ConvNet for small pictures on CPUs: three stages behind a whitening layer.

    pixels                         24 or 32 a side
    3 x 3 patches, stride 2        12    16    54 channels: whitened, both signs, ReLU
    stage 1, two convolutions      12    16    48 channels
    stage 2, halved, two more       6     8    96
    stage 3, halved, two more       3     4    192
    mean over the places            1     1    the features

With `whiten`, the first layer is not learnt: it turns each 3 x 3 patch into uncorrelated numbers of
equal variance (PCA whitening), as measured on images of the training set, and hands both signs of
each to a ReLU. In the first epochs, in which a network otherwise finds such filters, everything
behind it learns at once. Coates, Ng and Lee 2011, "An Analysis of Single-Layer Networks in
Unsupervised Feature Learning", say how much whitening alone is worth; as the frozen first layer of
a network it is from tysam-code/hlb-CIFAR10 and KellerJordan/cifar10-airbench.
"""

from typing import Any, Literal

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

PATCH_PIXELS = 3
STRIDE = 2
LEAST_VARIANCE = 1e-3
"""As a share of the largest one, added to each: patches hardly vary in their finest patterns, which
would be noise if they were made as large as the others."""


class Whitening(nn.Module):
    """[B, C, H, W] -> [B, 2 * 9 * C, H / 2, W / 2]: whitened patches x as ReLU of x and of -x.

    Buffers, so that nothing trains them and the state dict has them. Until `fit` has seen images
    they take the patches as they are.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        values = channels * PATCH_PIXELS**2
        patches = torch.eye(values).view(values, channels, PATCH_PIXELS, PATCH_PIXELS)
        self.register_buffer("weight", patches)
        self.register_buffer("bias", torch.zeros(values))

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """images: float [n, C, H, W], as the network gets them. The same ones give the same layer.

        Every patch counts, at stride 1 and without border.
        """
        patches = F.unfold(images.double(), PATCH_PIXELS).transpose(1, 2).flatten(0, 1)
        mean = patches.mean(dim=0)
        covariance = torch.cov(patches.T, correction=0)
        variances, directions = torch.linalg.eigh(covariance)
        scales = (variances + LEAST_VARIANCE * variances.max()).rsqrt()
        rows = (directions * scales).T.flip(0)
        # Eigenvectors have no sign of their own; a sum in which no pattern cancels gives them one.
        unequal = torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype) ** 2
        rows *= (rows @ unequal).sign()[:, None]
        self.weight.copy_(rows.view_as(self.weight))
        self.bias.copy_(-rows @ mean)

    def forward(self, pixels: Tensor) -> Tensor:
        whitened = F.conv2d(pixels, self.weight, self.bias, STRIDE, padding=PATCH_PIXELS // 2)
        return torch.cat([whitened, -whitened], dim=1).relu_()


class SmallConvNet(nn.Module):
    """[B, 3, H, W] -> [B, widths[-1]], or [B, num_classes].

    whiten: whether the first layer is a `Whitening`; it is learnt otherwise.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        widths: tuple[int, ...] = (48, 96, 192),
        whiten: bool = False,
    ) -> None:
        super().__init__()
        width = 2 * in_chans * PATCH_PIXELS**2
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[-1]
        self.stem = Whitening(in_chans) if whiten else nn.Sequential(*_layer(in_chans, width, 2))
        stages = []
        for number, stage_width in enumerate(widths):
            halved = [nn.MaxPool2d(2)] if number else []
            layers = [*_layer(width, stage_width), *_layer(stage_width, stage_width)]
            stages.append(nn.Sequential(*halved, *layers))
            width = stage_width
        self.stages = nn.Sequential(*stages)
        self.reset_classifier(num_classes)

    def fit_images(self, images: Tensor) -> None:
        """What `whiten` asks for before training; see `Whitening.fit`."""
        if isinstance(self.stem, Whitening):
            self.stem.fit(images)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["avg"] = "avg") -> None:  # noqa: ARG002
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, pixels: Tensor) -> Tensor:
        """The last stage's map [B, D, H / 8, W / 8]."""
        return self.stages(self.stem(pixels))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = features.mean(dim=(2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(pixels))


def _layer(width_in: int, width: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


default_cfgs = generate_default_cfgs(
    {
        "small_convnet": {
            "input_size": (3, 32, 32),
            "pool_size": (4, 4),
            "crop_pct": 1.0,
            "first_conv": "stem.0",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def small_convnet(pretrained: bool = False, **kwargs: Any) -> SmallConvNet:
    """Features of 192 numbers. There are no pre-trained weights."""
    return build_model_with_cfg(SmallConvNet, "small_convnet", pretrained, **kwargs)
