"""SparK: a convolutional network that sees part of a picture, and a decoder that paints the rest.

Tian et al. 2023, "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked
Modeling" (arXiv 2301.03580); code: keyu-tian/SparK `pretrain/{spark,encoder,decoder}.py`. The
encoder runs sparsely, so that the holes stay holes (`blocks/sparse.py`); mask tokens fill its maps
of four resolutions, and a small U-Net paints from all of them. Masking in place of views, at the
cost of one dense forward and backward pass. The features want fine-tuning, as those of MAE do; the
encoder's batch norm has the statistics of pictures with holes, which whole pictures move.

As in the code: hidden pixels are 0 after normalisation; patches are normalised as MAE's; the last
map is projected by a 1 x 1 convolution, or not at all where its width fits, the others by 3 x 3;
drop path 0.05 for ResNet-50. The encoder is a plain timm ResNet. Deviations: batch norm is global
over ranks, as the code's is where it has several GPUs; float32 loss under autocast; step t of T is
at t / T of the schedules, in the code at t / (T - 1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.drop_path import key_drop_paths, set_keys
from headrace.training.blocks.patches import (
    as_pictures,
    if_even,
    mask_over,
    normalize_patches,
    patchify,
    random_mask,
    reconstruction_loss,
)
from headrace.training.blocks.sparse import VisibleCells, residual_network, sparse
from headrace.training.blocks.tokens import kept_patches, most_masked
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset

JUDGED_BY = "linear"
SCALES = 4  # maps that the decoder takes, the last one and those of twice its resolution, ...


@dataclass(frozen=True)
class Objective:
    """SparK's hyper-parameters; the share of hidden cells belongs to the augmentation."""

    decoder_dim: int = 768
    """Channels of the decoder at the last map's resolution; half of them at twice that, ..."""
    drop_path: float = 0.05


class Densify(nn.Module):
    """A sparse map -> a dense one of the decoder's width, with a token where nothing is seen."""

    def __init__(self, channels: int, width: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.token = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(channels), 0, 0.02, -0.02, 0.02)
        )
        # Made in any case: the random numbers of what is made after it do not depend on widths.
        convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2)
        fits = kernel == 1 and channels == width
        self.projection = nn.Identity() if fits else convolution

    def forward(self, x: Tensor, cells: VisibleCells) -> Tensor:
        with sparse(self.norm, cells):
            x = self.norm(x)
        token = self.token.to(x.dtype)[:, None, None]
        return self.projection(torch.where(cells.map(x.shape[2], x.shape[3]), x, token))


class Upscale(nn.Module):
    """[B, channels, H, W] -> [B, out, 2 H, 2 W]."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=2, padding=1)
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU6(inplace=True),
            nn.Conv2d(channels, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.convolutions(self.up(x))


class Decoder(nn.Module):
    """Maps of several resolutions, added on the way up, -> pixels; a U-Net's one half.

    channels: of the encoder's maps by scale, of which scale s has 2^s times the resolution of the
    last one, 0. doublings: how often the resolution is doubled.
    """

    def __init__(self, channels: Mapping[int, int], width: int, doublings: int) -> None:
        super().__init__()
        widths = [width >> doubling for doubling in range(doublings + 1)]
        self.upscale = nn.ModuleList(map(Upscale, widths, widths[1:]))
        self.pixels = nn.Conv2d(widths[-1], 3, kernel_size=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.densify = nn.ModuleDict(
            {
                str(scale): Densify(count, widths[scale], kernel=3 if scale else 1)
                for scale, count in channels.items()
            }
        )

    def forward(self, maps: Mapping[int, Tensor], cells: VisibleCells) -> Tensor:
        """maps: [B, C, h, w] by scale -> [B, 3, H, W]."""
        x = self.densify["0"](maps[0], cells)
        for scale, upscale in enumerate(self.upscale):
            if scale > 0 and scale in maps:
                x = x + self.densify[str(scale)](maps[scale], cells)
            x = upscale(x)
        return self.pixels(x)


class Spark(Method):
    """The encoder and the decoder; no state across steps.

    side: cells of a row of the grid, and rows; removed: hidden cells of each sample.
    """

    depends_on_length = False
    compiles = False  # each convolution is run by itself, on what is visible

    def __init__(
        self, options: Objective, encoder: ResNet, side: int, cell_pixels: int, removed: int
    ) -> None:
        super().__init__()
        self.options = options
        self.encoder = encoder
        self.side = side
        self.removed = removed
        self.stages = stages(encoder, cell_pixels)
        channels = {
            scale: int(encoder.feature_info[index]["num_chs"])
            for scale, index in self.stages.items()
        }
        doublings = cell_pixels.bit_length() - 1
        decoder = Decoder(channels, options.decoder_dim, doublings)
        self.decoder = decoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Pixels "prediction" [B, N, cell * cell * 3] of every cell."""
        set_keys(self.encoder, batch.ids, [0], progress)
        return {"prediction": self.predict(batch)}

    def predict(self, batch: Batch) -> Tensor:
        """[B, N, cell * cell * 3]: what every cell's pixels are taken to be."""
        pictures, mask = batch.views[0], self._mask(batch)
        kept = kept_patches(mask, mask.shape[1] - self.removed)
        cells = VisibleCells(kept, (self.side, self.side))
        painted = self.decoder(self.encode(pictures, cells), cells)
        return patchify(painted, pictures.shape[2] // self.side)

    def encode(self, pictures: Tensor, cells: VisibleCells) -> dict[int, Tensor]:
        """[B, 3, H, W] -> the maps of the decoder's scales, 0 where nothing is seen."""
        encoder = self.encoder
        assert isinstance(encoder, ResNet)
        visible = pictures * cells.map(pictures.shape[2], pictures.shape[3], pictures.dtype)
        with sparse(encoder, cells):
            indices = sorted(self.stages.values())
            maps = encoder.forward_intermediates(visible, indices=indices, intermediates_only=True)
        scales = sorted(self.stages, reverse=True)
        return dict(zip(scales, cast("list[Tensor]", maps), strict=True))

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        mask, pictures = self._mask(batch), batch.views[0].float()
        target = normalize_patches(patchify(pictures, pictures.shape[2] // self.side))
        loss = reconstruction_loss(embeddings["prediction"], target, mask)
        return {"loss": if_even(loss, mask, self.removed)}

    def reconstruct(self, batch: Batch) -> tuple[Tensor, str]:
        """Every cell as predicted, [B, 3, H, W] in the view's units, and what was added."""
        return as_pictures(self.predict(batch), batch.views[0], self.side, normalized=True)

    def _mask(self, batch: Batch) -> Tensor:
        return mask_over("spark", batch.masks[0], self.side**2)


def stages(encoder: ResNet, cell_pixels: int) -> dict[int, int]:
    """Scale -> index of the encoder's map of that scale: the last one of its resolution."""
    reductions = [info["reduction"] for info in encoder.feature_info]
    last_index = {reduction: index for index, reduction in enumerate(reductions)}
    reduction_of = {scale: cell_pixels / 2**scale for scale in range(SCALES)}
    return {
        scale: last_index[reduction]
        for scale, reduction in reduction_of.items()
        if reduction in last_index
    }


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Spark:
    """Raises ConfigError for a backbone that is no plain ResNet, or cells that do not fit it."""
    drop_path = {"drop_path_rate": objective.drop_path} if objective.drop_path else {}
    encoder = residual_network("spark", make_encoder, **drop_path)
    key_drop_paths(encoder)
    mask = random_mask("spark", facts)
    cell, reduction = mask.patch_pixels, encoder.feature_info[-1]["reduction"]
    if cell != reduction:
        raise ConfigError(
            f"spark needs masks with one cell per position of the encoder's last map, of "
            f"{reduction} pixels, and the augmentation's masks have patch_pixels {cell}"
        )
    if objective.decoder_dim % cell:
        raise ConfigError(
            f"spark needs a decoder_dim that can be halved until pixels of a cell's {cell} are "
            f"reached, a multiple of {cell}, not {objective.decoder_dim}"
        )
    side = facts.view_pixels[0] // cell
    return Spark(objective, encoder, side, cell, most_masked(mask, side**2))


PRESETS = {
    "imagenet": Preset(
        backbone="resnet50",
        augmentation=recipes.spark(),
        test=recipes.center(),
        optim=Optim(
            name="lamb",
            learning_rate=2e-4,
            final_learning_rate=2e-7,
            warmup_from=1e-6,
            warmup_epochs=40,
            weight_decay=0.04,
            final_weight_decay=0.2,
            betas=(0.9, 0.95),
            epsilon=1e-6,
            clip_norm=5.0,
        ),
        batch_size=4096,
        epochs=1600,
        objective=Objective(),
        notes="1600 epochs: fine-tuned top-1 80.6 (the code's table).",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.spark(64, patch_pixels=32),
        test=recipes.center(64, 64),
        optim=Optim(learning_rate=4e-3, warmup_epochs=1, weight_decay=0.05, betas=(0.9, 0.95)),
        batch_size=128,
        epochs=10,
        objective=Objective(decoder_dim=64, drop_path=0.0),
        notes="Not from the paper: pictures enlarged to 64 pixels, so that there are 4 cells.",
    ),
}
