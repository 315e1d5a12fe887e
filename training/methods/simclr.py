"""SimCLR: two views of an image find each other among all other views of the batch.

Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations"
(arXiv 2002.05709) and "Big Self-Supervised Models are Strong Semi-Supervised Learners" (v2, arXiv
2006.10029); code: google-research/simclr. Nothing but a loss, a head and strong colour changes,
which makes it the plainest baseline; it wants large batches, for they are its negatives: with
`--run.accumulate` alone those of a micro-batch, with `--run.gradient-cache` those of the batch.

v2 is this with a head of three layers, then two more runs: fine-tuning on the few labels there are,
`--method supervised --init RUN --data.subset FILE`, and distilling what came of it on all images,
`--method distill --init RUN`.

Deviations: the loss is the paper's mean over 2B views; the code adds two means over B, twice that
(under LARS this only matters to biases and norms, which LARS does not rescale). The code's LARS
keeps the learning rate inside the momentum, ours outside. Convolutions start as timm's do (normal
by fan-out), the code's as truncated normal by fan-in. v2 fine-tunes from the head's first
layer, which helps where labels are few; a run leaves the encoder without its head. v2's memory of
earlier batches is left out, as in the code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.pipelines.recipe import IMAGENET_MEAN, IMAGENET_STD
from headrace.training.blocks.heads import Mlp, feature_dim
from headrace.training.collectives import gather_with_gradient, rank
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset


@dataclass(frozen=True)
class Objective:
    """SimCLR's hyper-parameters."""

    temperature: float = 0.1
    """0.1 is best for long runs on ImageNet, 0.5 on CIFAR (appendix B.9)."""
    projection_dim: int = 128
    projection_layers: int = 2
    """2 as in the paper; 3 in v2."""


def nt_xent(
    local: Tensor, everyone: Tensor, first_row: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Normalised temperature-scaled cross-entropy: eq. 1, mean over the views (algorithm 1).

    local: embeddings [n, 2, D] of n samples; everyone: [B, 2, D] of the whole batch, in which
    `local` begins at `first_row`. Rows need not be normalised. Each view is compared with the
    2B - 1 others. Returns the scalar mean over the 2n local views, in nats, and bool [2n]: whether
    the partner was the nearest.
    """
    samples = len(local)
    with torch.autocast(local.device.type, enabled=False):
        # View-major rows: view v of sample i is row v * B + i.
        queries = F.normalize(local.float(), dim=-1).transpose(0, 1).flatten(0, 1)
        keys = F.normalize(everyone.float(), dim=-1).transpose(0, 1).flatten(0, 1)
        logits = queries @ keys.T / temperature
    sample_rows = torch.arange(first_row, first_row + samples, device=local.device)
    own_rows = torch.cat([sample_rows, sample_rows + len(everyone)])
    partner_rows = own_rows.roll(samples)
    logits = logits.scatter(1, own_rows[:, None], float("-inf"))
    return F.cross_entropy(logits, partner_rows), logits.argmax(dim=1) == partner_rows


class SimClr(Method):
    """The encoder and a projection head; no state besides batch norm's."""

    depends_on_length = False
    least_samples = 2

    def __init__(self, options: Objective, make_encoder: MakeEncoder) -> None:
        super().__init__()
        self.options = options
        self.encoder = make_encoder()
        width = feature_dim(self.encoder)
        self.projection = Mlp(
            width,
            width,
            options.projection_dim,
            options.projection_layers,
            last_norm="no_shift",
        )

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
        everyone = gather_with_gradient(local)
        loss, partner_found = nt_xent(
            local, everyone, rank() * len(batch), self.options.temperature
        )
        return {"loss": loss, "partner_found": partner_found.float().mean()}


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> SimClr:
    """Raises ConfigError where the augmentation has not two views of one size."""
    if len(facts.view_pixels) != 2 or len(set(facts.view_pixels)) != 1:
        raise ConfigError(
            f"simclr needs two views of one size, and the augmentation's views have "
            f"{list(facts.view_pixels)} pixels"
        )
    return SimClr(objective, make_encoder)


_RAW = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
"""Mean and std of pixels that stay in [0, 1], as the code leaves them."""

PRESETS = {
    "imagenet": Preset(
        backbone="resnet50",
        augmentation=recipes.simclr(additive_brightness=True),
        test=recipes.center(mean=_RAW[0], std=_RAW[1]),
        optim=Optim(name="lars", learning_rate=0.3, warmup_epochs=10, weight_decay=1e-6),
        batch_size=4096,
        epochs=1000,
        objective=Objective(),
        notes="Linear 69.1 (the code's README); 64.5 after 100 epochs, with weight decay 1e-4.",
    ),
    "v2_imagenet": Preset(
        backbone="resnet50",
        augmentation=recipes.simclr(),
        test=recipes.center(mean=_RAW[0], std=_RAW[1]),
        # 0.1 x sqrt(batch) = 6.4 at this batch size; a warm-up of 5 %.
        optim=Optim(name="lars", learning_rate=0.4, warmup_epochs=40, weight_decay=1e-4),
        batch_size=4096,
        epochs=800,
        objective=Objective(projection_layers=3),
        notes="Linear 71.7; fine-tuned on 1 % of labels 57.9, on 10 % 68.4 (the code's README).",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.simclr(32, strength=0.5, blur=False),
        test=recipes.center(32, 32, mean=_RAW[0], std=_RAW[1]),
        optim=Optim(learning_rate=4e-3, warmup_epochs=0.5, weight_decay=1e-4),
        batch_size=128,
        epochs=10,
        objective=Objective(temperature=0.2),
        notes="The paper's augmentation for CIFAR-10 (appendix B.9), with v2's brightness; the "
        "rest is the demo's, sized for two CPU cores.",
    ),
    "demo": Preset(
        backbone="small_convnet",
        backbone_options={"whiten": True},
        augmentation=replace(
            recipes.simclr(24, strength=0.5, crop_min=0.2, blur=False),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        ),
        test=recipes.center(32, 32),
        optim=Optim(learning_rate=4e-3, warmup_epochs=1, weight_decay=1e-4),
        batch_size=128,
        epochs=5.5,
        objective=Objective(temperature=0.2),
        notes="What convinces in minutes on two CPU cores (tools/quickstart.sh): a small network "
        "behind a whitening layer, views of 24 pixels, judged on whole pictures of 32. kNN on "
        "CIFAR-10 63.0 after 500 CPU seconds; untrained 40.5, raw pixels 45.5.",
    ),
}
