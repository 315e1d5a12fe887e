"""SwAV: every view predicts which prototypes the other views of its picture are assigned to.

Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments"
(arXiv 2006.09882); code: facebookresearch/swav. The two global views are assigned to prototypes
online, under the constraint that a batch uses all prototypes equally often, which keeps the
trivial solution away; small crops only predict. Costs: one pass per view and no teacher; needs a
batch, or a queue of recent embeddings, of the order of the number of prototypes.

As in the code: Sinkhorn runs for each assigned view by itself, over all ranks; prototypes are
brought to length 1 before each step and stay for the first ones; the queue fills from its epoch
on and counts once it is full; LARC takes all parameters, biases too.
Deviations: batch norm spans all ranks (the code: groups of 8 GPUs, the whole batch of 256); the
hidden layer of the head has no bias, which its batch norm would take away; embeddings, logits and
codes are float32 under autocast; with accumulation, codes are those of a micro-batch. The
warm-up reaches its peak a step later than the code's (`np.linspace`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.heads import Mlp, feature_dim
from headrace.training.blocks.memory import Queue
from headrace.training.blocks.self_distillation import cross_view_entropy
from headrace.training.blocks.sinkhorn import sinkhorn
from headrace.training.blocks.views import GLOBAL_VIEWS, by_size, require_global_views
from headrace.training.collectives import gather_rows, rank, world_size
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset


@dataclass(frozen=True)
class Objective:
    """SwAV's hyper-parameters."""

    num_prototypes: int = 3000
    hidden_dim: int = 2048
    """Width of the projection's hidden layer."""
    projection_dim: int = 128
    """Width in which prototypes are compared."""
    temperature: float = 0.1
    epsilon: float = 0.05
    """Of Sinkhorn; smaller makes sharper assignments. 0.03 helps where the loss does not fall."""
    sinkhorn_iterations: int = 3
    freeze_prototypes_steps: int = 313
    """Steps in which the prototypes stay as they are."""
    queue_size: int = 0
    """Embeddings of each assigned view that are kept for small batches, over all ranks: a multiple
    of the batch; 0: none."""
    queue_start_epochs: int = 15
    """Epochs before the queue begins to fill."""


def swav_loss(logits: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Swapped prediction: cross-entropy H(q_t, p_v), mean over samples and pairs of two views.

    logits: cosines [n, V, K] of all views with the prototypes; codes: [n, T, K] of the first T of
    these views, rows that sum to 1, taken as constant. Returns a scalar in nats, float32. Eq. 2 of
    the paper with all the terms of eq. 6, divided by their number T * (V - 1), as in swav
    `main_swav.py`, `train`.
    """
    return cross_view_entropy(logits, codes.detach().float(), temperature)


class SwAV(Method):
    """The encoder, a projection head, the prototypes, and a queue where one is asked for."""

    depends_on_length = False
    least_samples = 2

    def __init__(self, options: Objective, make_encoder: MakeEncoder, facts: Facts) -> None:
        super().__init__()
        self.options = options
        self.encoder = make_encoder()
        width, dim = feature_dim(self.encoder), options.projection_dim
        self.projection = Mlp(width, options.hidden_dim, dim, last_bias=True)
        self.prototypes = nn.Linear(dim, options.num_prototypes, bias=False)
        self.queue = None
        if options.queue_size > 0:
            self.queue = Queue(torch.zeros(options.queue_size, GLOBAL_VIEWS, dim))
        self._normalize_prototypes()
        self._queue_starts = options.queue_start_epochs * facts.steps_per_epoch
        self._queue_is_full = self._queue_starts + options.queue_size // facts.batch_size

    @torch.no_grad()
    def _normalize_prototypes(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    @override
    def before_step(self, progress: Progress) -> None:
        self._normalize_prototypes()

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Float32 "embedding" [B, V, D] of length 1 and "logits" [B, V, K]."""
        features = torch.cat([self.encoder(pictures) for _, pictures in by_size(batch.views)])
        projected = self.projection(features)
        with torch.autocast(projected.device.type, enabled=False):
            z = F.normalize(projected.float(), dim=-1)
            z = z.unflatten(0, (-1, len(batch))).transpose(0, 1)
            return {"embedding": z, "logits": self.prototypes(z)}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        logits = embeddings["logits"]
        codes = self.codes(logits[:, :GLOBAL_VIEWS].detach(), progress)
        return {
            "loss": swav_loss(logits, codes, self.options.temperature),
            # A collapse shows as log K: all samples alike belong to all prototypes.
            "code_entropy": torch.special.entr(codes).sum(-1).mean(),
        }

    @torch.no_grad()
    def codes(self, logits: Tensor, progress: Progress) -> Tensor:
        """Assignments of the global views [n, T, K], each view's balanced over the samples of all
        ranks and, once it is full, of the queue."""
        queued = logits[:0]
        if self.queue is not None and progress.step >= self._queue_is_full:
            # Each rank puts in its share of the queue, which all of them have.
            share = self.queue.rows.tensor_split(world_size())[rank()]
            with torch.autocast(logits.device.type, enabled=False):
                queued = self.prototypes(share)
        options = self.options
        codes = [
            sinkhorn(view, epsilon=options.epsilon, iterations=options.sinkhorn_iterations)
            for view in torch.cat([queued, logits]).unbind(1)
        ]
        return torch.stack(codes, dim=1)[len(queued) :]

    @override
    def after_backward(self, progress: Progress) -> None:
        if progress.step < self.options.freeze_prototypes_steps:
            self.prototypes.weight.grad = None

    @override
    def after_step(
        self, embeddings: list[dict[str, Tensor]], batches: list[Batch], progress: Progress
    ) -> None:
        """The queue takes in the global views of all ranks and micro-batches."""
        if self.queue is not None and progress.step >= self._queue_starts:
            global_views = [entry["embedding"][:, :GLOBAL_VIEWS] for entry in embeddings]
            self.queue.push(gather_rows(torch.cat(global_views)))

    @override
    def param_groups(self) -> list[dict[str, object]]:
        """The code's: weight decay and the rescaling of LARC reach every parameter."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "decay": True}]


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> SwAV:
    """Raises ConfigError where the augmentation has not the two global views first, or the queue
    does not hold whole batches."""
    require_global_views("swav", facts.view_pixels)
    if objective.queue_size % facts.batch_size:
        raise ConfigError(
            f"--objective.queue-size is {objective.queue_size}; it must be a multiple of the "
            f"batch of {facts.batch_size}"
        )
    return SwAV(objective, make_encoder, facts)


_STD = recipes.swav().std
_IMAGENET = Preset(
    backbone="resnet50",
    backbone_options={"zero_init_last": False},
    augmentation=recipes.swav(),
    test=recipes.center(interpolation="bilinear", std=_STD),
    optim=Optim(
        name="larc",
        learning_rate=0.3,  # 4.8 at this batch size
        final_learning_rate=3e-4,
        warmup_epochs=10,
        warmup_from=0.01875,  # 0.3
        weight_decay=1e-6,
    ),
    batch_size=4096,
    epochs=800,
    objective=Objective(),
    notes="scripts/swav_800ep_pretrain.sh: linear 75.3, about 49 hours on 64 V100; 72.1 after 100 "
    "epochs, 73.9 after 200, 74.6 after 400.",
)

PRESETS = {
    "imagenet": _IMAGENET,
    "small_batch_imagenet": Preset(
        backbone="resnet50",
        backbone_options=_IMAGENET.backbone_options,
        augmentation=recipes.swav(),
        test=_IMAGENET.test,
        optim=Optim(
            name="larc",
            learning_rate=0.6,
            final_learning_rate=6e-4,
            warmup_epochs=0,
            weight_decay=1e-6,
        ),
        batch_size=256,
        epochs=400,
        objective=Objective(queue_size=3840, freeze_prototypes_steps=5005),
        notes="scripts/swav_400ep_bs256_pretrain.sh: linear 74.3, 52 minutes per epoch on 4 V100; "
        "72.7 after 200 epochs.",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.swav(
            global_pixels=32, local_pixels=16, local_count=4, local_scale=(0.1, 0.4), blur=False
        ),
        test=recipes.center(32, 32, std=_STD),
        optim=Optim(learning_rate=2e-3, warmup_epochs=0.5, weight_decay=1e-4),
        batch_size=128,
        epochs=10,
        objective=Objective(
            num_prototypes=128,
            hidden_dim=256,
            projection_dim=64,
            epsilon=0.02,  # with 0.05 all samples become alike: the loss stays at log K
            freeze_prototypes_steps=39,
        ),
        notes="Not from the paper: for two CPU cores; timm's smallest ResNet.",
    ),
}
