"""Pair: are these two pictures views of the same image?

The oldest of the contrastive tasks. Margin loss: Hadsell et al. 2006, "Dimensionality Reduction by
Learning an Invariant Mapping", eq. 4; logistic loss: Koch et al. 2015, "Siamese Neural Networks for
One-shot Image Recognition", there on a learned distance. Two views of an image belong together;
view one of an image and view two of another do not. Pairs are judged one by one, without the
comparison among candidates that a softmax makes, which is why its successors learn more.

Choices (there is no published recipe or code for ImageNet): distances are between unit vectors, so
that margins lie in [0, 2]; both kinds of pairs weigh one half, however many there are; the logistic
loss is on the cosine over a temperature plus a learned bias. Other images are those of the global
batch (with accumulation of a micro-batch). With repeated augmentation an image may so meet itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.heads import Mlp, feature_dim
from headrace.training.collectives import gather_with_gradient, rank, world_size
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset


@dataclass(frozen=True)
class Objective:
    """Hyper-parameters of the pair task."""

    loss: Literal["margin", "logistic"] = "margin"
    partners: Literal["all", "one"] = "all"
    """Other images that an image is paired with: all of the batch, or one drawn at each step."""
    margin: float = 1.4
    """margin: the distance beyond which different images are far enough; vectors at right angles
    are 1.41 apart."""
    temperature: float = 0.1
    """logistic: the cosine is divided by it."""
    projection_dim: int = 128


def pair_cosines(local: Tensor, everyone: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines between first and second views: of the same image [n], of different ones [n, k].

    local: embeddings [n, 2, D] of n samples; everyone: [B, 2, D] of the whole batch; others: int64
    [n, k], the rows of the batch that each sample is paired with. Rows need not be normalised.
    Float32.
    """
    with torch.autocast(local.device.type, enabled=False):
        first, second = F.normalize(local.float(), dim=-1).unbind(dim=1)
        candidates = F.normalize(everyone[:, 1].float(), dim=-1)
        return (first * second).sum(dim=1), (first @ candidates.T).gather(1, others)


def margin_loss(same: Tensor, different: Tensor, margin: float) -> Tensor:
    """Half the mean over `same` of d^2 / 2, half the mean over `different` of max(0, m - d)^2 / 2.

    Both are cosines of unit vectors, any shape, whose distance d is sqrt(2 - 2 cos). Eq. 4 of
    Hadsell et al.; without the halves that even out the kinds, each pair has the paper's loss.
    """
    near = (1 - same).mean()  # d^2 / 2
    # Where two vectors are equal the distance has no gradient; here it is 0 instead of none.
    distance = (2 - 2 * different).clamp(min=1e-8).sqrt()
    far = 0.5 * (margin - distance).clamp(min=0).square().mean()
    return 0.5 * (near + far)


def logistic_loss(same: Tensor, different: Tensor, temperature: float, bias: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoid(cos / t + bias), in nats, half of it from each kind of pair.

    same, different: cosines of any shape; bias: scalar.
    """
    near = F.softplus(-(same / temperature + bias)).mean()
    far = F.softplus(different / temperature + bias).mean()
    return 0.5 * (near + far)


class Pair(Method):
    """The encoder, a projection head and, for the logistic loss, a bias; no state across steps."""

    depends_on_length = False
    least_samples = 2

    def __init__(self, options: Objective, make_encoder: MakeEncoder) -> None:
        super().__init__()
        self.options = options
        self.encoder = make_encoder()
        width = feature_dim(self.encoder)
        self.projection = Mlp(width, width, options.projection_dim)
        self.bias = nn.Parameter(torch.zeros(())) if options.loss == "logistic" else None

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Embeddings: "projection" [B, 2, D], not normalised."""
        projections = self.projection(self.encoder(torch.cat(batch.views)))
        return {"projection": torch.stack(projections.chunk(2), dim=1)}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        local = embeddings["projection"]
        others = self._others(len(batch), progress, local.device)
        same, different = pair_cosines(local, gather_with_gradient(local), others)
        if self.bias is None:
            loss = margin_loss(same, different, self.options.margin)
        else:
            loss = logistic_loss(same, different, self.options.temperature, self.bias)
        # A collapse shows as two cosines of 1.
        return {"loss": loss, "cosine_same": same.mean(), "cosine_different": different.mean()}

    def _others(self, count: int, progress: Progress, device: torch.device) -> Tensor:
        """int64 [count, k]: rows of the global batch, never a sample's own."""
        size = count * world_size()
        own_rows = torch.arange(rank() * count, (rank() + 1) * count, device=device)
        match self.options.partners:
            case "all":
                return (own_rows[:, None] + torch.arange(1, size, device=device)) % size
            case "one":
                # A ring in random order: everybody's partner is the next one.
                generator = progress.generator("partners", device)
                ring = torch.randperm(size, generator=generator, device=device)
                partners = torch.empty_like(ring).scatter_(0, ring, ring.roll(-1))
                return partners[own_rows, None]
            case _:
                assert_never(self.options.partners)


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Pair:
    """Raises ConfigError where the augmentation has not two views of one size, or for a batch of
    one, or a margin beyond any distance."""
    if len(facts.view_pixels) != 2 or len(set(facts.view_pixels)) != 1:
        raise ConfigError(
            f"pair needs two views of one size, and the augmentation's views have "
            f"{list(facts.view_pixels)} pixels"
        )
    if facts.batch_size < 2:
        raise ConfigError("pair needs other images in the batch, and --data.batch-size is 1")
    if not 0 < objective.margin <= 2:
        raise ConfigError(
            f"--objective.margin is {objective.margin}; distances of unit vectors are in (0, 2]"
        )
    return Pair(objective, make_encoder)


PRESETS = {
    "imagenet": Preset(
        backbone="resnet50",
        augmentation=recipes.moco_v2(),
        test=recipes.center(interpolation="bilinear"),
        optim=Optim(name="sgd", learning_rate=0.03, warmup_epochs=0, weight_decay=1e-4),
        batch_size=256,
        epochs=200,
        objective=Objective(),
        notes="Not from a paper, and without a published number: MoCo v2's augmentation, optimiser "
        "and length.",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.moco_v2(32, blur=False),
        test=recipes.center(32, 32),
        optim=Optim(name="adamw", learning_rate=2e-3, warmup_epochs=1, weight_decay=1e-4),
        batch_size=128,
        epochs=10,
        objective=Objective(projection_dim=64),
        notes="Not from a paper: for two CPU cores; timm's smallest ResNet.",
    ),
}
