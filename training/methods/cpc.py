"""CPC: what is seen of a picture predicts the patches still to come, among patches of others.

van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding" (arXiv
1807.03748), section 3.2; v2: Henaff et al. 2019 (arXiv 1905.09272). The picture is cut into a grid
of overlapping patches, each encoded by itself; a masked convolutional network summarises the rows
above a place, and linear maps of that context predict the embeddings 1 to `steps` rows below. v2
goes in four directions, with larger patches and without batch norm, whose statistics tell patches
of one picture from others'. Costs one small forward pass per patch.

The authors published no code for images; Lightning Bolts' `CPCTask` is the closest. As there:
targets are a linear map of the embeddings, both sides carry gradient, scores are scaled by 0.1.
Deviations: a linear map per distance as in the paper (Bolts has one for all); `negatives` patches
are drawn from the global batch for all predictions of a step (0: all of its patches); pictures are
augmented as a whole, not patch by patch as in v2; the loss is the mean over distances and
directions; a block of the context begins with a ReLU, of which v2 has one after the last block
instead.

The judged encoder gives the mean over a picture's patches; its weights are a timm model's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.heads import feature_dim
from headrace.training.collectives import gather_with_gradient, rank
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset

JUDGED_BY = "linear"


@dataclass(frozen=True)
class Objective:
    """CPC's hyper-parameters."""

    patch_pixels: int = 80
    stride_pixels: int = 36
    """Between the left borders of neighbouring patches."""
    directions: Literal[1, 4] = 4
    """1: from top to bottom (v1); 4: also up, right and left (v2)."""
    steps: int = 5
    """Rows ahead that are predicted: 1 to this many."""
    projection_dim: int = 256
    """Of targets and predictions."""
    hidden_dim: int = 256
    """Width inside the context network's blocks."""
    context_blocks: int = 5
    negatives: int = 2048
    """Patches of the global batch against which a prediction is held; 0: all."""
    scale: float = 0.1
    """Of the dot products."""


def prediction_loss(
    predictions: Tensor,
    targets: Tensor,
    numbers: Tensor,
    negatives: Tensor,
    negative_numbers: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """InfoNCE (eq. 4 of v1), a mean over predictions, in nats; and the share that hit its target.

    predictions, targets: [n, D], row by row a pair; negatives: [M, D]. numbers, negative_numbers:
    int64 [n], [M]: which patch of the batch a target is: the one that is asked for is no negative
    of itself. Scores are scale * prediction . target. Gives two scalars.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        predictions, targets = predictions.float(), targets.float()
        positive = scale * (predictions * targets).sum(1, keepdim=True)
        others = scale * predictions @ negatives.float().T
        others = others.masked_fill(numbers[:, None] == negative_numbers, float("-inf"))
        logits = torch.cat([positive, others], dim=1)
        first = numbers.new_zeros(len(logits))
        return F.cross_entropy(logits, first), (logits.argmax(1) == 0).float().mean()


def by_place(grid: Tensor) -> Tensor:
    """[B, D, h, w] -> [B * h * w, D]: sample by sample, row by row."""
    return grid.permute(0, 2, 3, 1).flatten(0, 2)


def directed(grid: Tensor, direction: int) -> Tensor:
    """[..., h, w] turned so that what lies ahead lies below: down, up, right, left for 0 to 3."""
    turned = grid if direction < 2 else grid.transpose(-1, -2)
    return turned.flip(-2) if direction % 2 else turned


class GridEncoder(nn.Module):
    """A network over the patches of a picture: [B, 3, H, W] -> their mean feature [B, width]."""

    def __init__(self, network: nn.Module, patch_pixels: int, stride_pixels: int) -> None:
        super().__init__()
        self.network = network
        self.num_features = feature_dim(network)
        self.patch_pixels, self.stride_pixels = patch_pixels, stride_pixels

    def forward(self, pictures: Tensor) -> Tensor:
        return self.grid(pictures).mean((2, 3))

    def grid(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, width, h, w]."""
        patch, stride = self.patch_pixels, self.stride_pixels
        cut = pictures.unfold(2, patch, stride).unfold(3, patch, stride)
        batch, _, height, width = cut.shape[:4]
        patches = cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, patch, patch)
        features = self.network(patches.contiguous(memory_format=torch.channels_last))
        return features.view(batch, height, width, -1).permute(0, 3, 1, 2)


class ContextBlock(nn.Module):
    """Residual: a place learns of its row and the one above, three columns wide (v2, fig. 4)."""

    def __init__(self, width: int, hidden_dim: int) -> None:
        super().__init__()
        self.deep = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, hidden_dim, 1),
            nn.ReLU(),
            nn.ZeroPad2d((1, 1, 1, 0)),
            nn.Conv2d(hidden_dim, hidden_dim, (2, 3)),
            nn.ReLU(),
            nn.Conv2d(hidden_dim, width, 1),
        )

    def forward(self, grid: Tensor) -> Tensor:
        return grid + self.deep(grid)


class Cpc(Method):
    """The encoder; per direction a context network and a linear map per distance."""

    depends_on_length = False
    least_samples = 2

    def __init__(self, options: Objective, network: nn.Module) -> None:
        super().__init__()
        self.options = options
        self.encoder = GridEncoder(network, options.patch_pixels, options.stride_pixels)
        width, out = self.encoder.num_features, options.projection_dim
        blocks = range(options.context_blocks)
        self.contexts = nn.ModuleList(
            nn.Sequential(
                *(ContextBlock(width, options.hidden_dim) for _ in blocks),
                nn.Conv2d(width, options.steps * out, 1),
            )
            for _ in range(options.directions)
        )
        self.target = nn.Conv2d(width, out, 1, bias=False)

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Embeddings: "targets" [B, D, h, w] and "predictions" [B, directions, steps, D, h, w],
        those of a direction on a grid that is turned as `directed` turns it."""
        assert isinstance(self.encoder, GridEncoder)
        grid = self.encoder.grid(batch.views[0])
        maps = [
            network(directed(grid, direction))
            for direction, network in enumerate(self.contexts.children())
        ]
        predictions = torch.stack(maps, dim=1).unflatten(2, (self.options.steps, -1))
        return {"targets": self.target(grid), "predictions": predictions}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        targets, predictions = embeddings["targets"], embeddings["predictions"]
        # Every patch of the global batch has a number: its row in `patches`.
        patches = by_place(gather_with_gradient(targets))
        numbers = torch.arange(len(patches), device=targets.device)
        number_grids = numbers.view(-1, 1, *targets.shape[2:])[rank() * len(batch) :][: len(batch)]

        negative_numbers = numbers
        if 0 < self.options.negatives < len(patches):
            generator = progress.generator("negatives", targets.device)
            shuffled = torch.randperm(len(patches), generator=generator, device=targets.device)
            negative_numbers = shuffled[: self.options.negatives]
        negatives = patches[negative_numbers]

        losses, hit_rates = [], []
        for direction in range(self.options.directions):
            target_grids = directed(targets, direction)
            target_numbers = directed(number_grids, direction)
            for step in range(1, self.options.steps + 1):
                # A row predicts the one that is `step` below it; the last rows have none there.
                loss, hit_rate = prediction_loss(
                    by_place(predictions[:, direction, step - 1, :, :-step]),
                    by_place(target_grids[:, :, step:]),
                    target_numbers[:, :, step:].flatten(),
                    negatives,
                    negative_numbers,
                    scale=self.options.scale,
                )
                losses.append(loss)
                hit_rates.append(hit_rate)
        return {"loss": torch.stack(losses).mean(), "target_found": torch.stack(hit_rates).mean()}


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Cpc:
    """Raises ConfigError for several views, too few patches, or a backbone for one size alone."""
    if len(facts.view_pixels) != 1:
        raise ConfigError(f"cpc needs one view, not the {len(facts.view_pixels)} given")
    patch, stride, pixels = objective.patch_pixels, objective.stride_pixels, facts.view_pixels[0]
    side = (pixels - patch) // stride + 1
    if patch > pixels or side <= objective.steps:
        raise ConfigError(
            f"cpc needs more than --objective.steps {objective.steps} rows of patches: a view of "
            f"{pixels} pixels has {max(side, 0)} of {patch} pixels at every {stride}th"
        )
    network = make_encoder()
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, patch, patch))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cpc needs a backbone that takes patches of {patch} pixels, as a ResNet does: {error}"
        ) from error
    return Cpc(objective, network.train())


_PATCHES = Optim(
    name="adamw",
    learning_rate=2e-4,
    scale_with_batch=False,
    warmup_epochs=0,
    schedule="constant",
    weight_decay=0.0,
)

PRESETS = {
    "imagenet": Preset(
        backbone="resnet50",
        backbone_options={"norm_layer": "groupnorm1"},
        augmentation=recipes.cpc(260),
        test=recipes.center(260, 292),
        optim=replace(_PATCHES, learning_rate=4e-4),
        batch_size=512,
        epochs=200,
        objective=Objective(),
        notes="v2: linear 63.8 with a ResNet-50 (paper); patches of 80 pixels at every 36th.",
    ),
    "v1_imagenet": Preset(
        backbone="resnet101",
        backbone_options={"norm_layer": "groupnorm1"},
        augmentation=recipes.cpc(256),
        test=recipes.center(256, 288),
        optim=_PATCHES,
        batch_size=512,
        epochs=100,
        objective=Objective(64, 32, directions=1, projection_dim=1024),
        notes="v1: linear 48.7 (paper), there with a pre-activation ResNet-101's three stages, and "
        "crops of 256 from 300 pixels, flipped and grey, their patches cropped to 60.",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        backbone_options={"norm_layer": "groupnorm1"},
        augmentation=recipes.cpc(32),
        test=recipes.center(32, 32),
        optim=Optim(name="adamw", learning_rate=2e-3, warmup_epochs=0.5, weight_decay=1e-4),
        batch_size=128,
        epochs=10,
        objective=Objective(
            12, 5, steps=3, projection_dim=64, hidden_dim=64, context_blocks=2, negatives=256
        ),
        notes="Not from the paper: for two CPU cores; 5 x 5 patches.",
    ),
}
