"""DeepCluster-v2: every view predicts the cluster that its picture fell into before the epoch.

Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
appendix (arXiv 2006.09882); code: facebookresearch/swav, `main_deepclusterv2.py`. DeepCluster's
alternation, made comparable to SwAV: spherical k-means over what the last epoch embedded gives both
the targets and the prototypes, several times over, so that no classifier starts anew and no pass
over the data is spent on clustering. Costs: one pass per view; two embeddings per image of the data
set (1.3 GB for ImageNet) on every rank and in the checkpoint.

As in the code: prototypes are the centroids and never trained (it freezes them for longer than its
longest run); head j is clustered on the memory of global view j mod 2; a cluster that loses all its
members stays where it is; LARC takes all parameters, biases too.
Deviations: the memory goes by sample and holds the global set, so that any number of ranks may
continue; what an epoch drops keeps its last embedding and remains a target, where the code forgets
it. Before the first epoch it is filled from one global crop in eval mode, around the mean embedding
(the code: both crops, in training mode). Batch norm spans all ranks (the code: groups of 8 GPUs);
the hidden layer of the head has no bias; embeddings and logits are float32 under autocast.
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
from headrace.training.blocks.kmeans import kmeans, table_by_id
from headrace.training.blocks.memory import RowMemory
from headrace.training.blocks.views import GLOBAL_VIEWS, by_size, require_global_views
from headrace.training.collectives import (
    gather_rows,
    mean_over_ranks,
    rank,
    sum_over_ranks,
    world_size,
)
from headrace.training.method import Context, Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset

GLOBAL_NAME = "global_view"  # of the two in the augmentation


@dataclass(frozen=True)
class Objective:
    """DeepCluster-v2's hyper-parameters."""

    num_prototypes: int = 3000
    """Clusters of each head."""
    heads: int = 3
    """Clusterings, each from random starts of its own; the loss is their mean."""
    hidden_dim: int = 2048
    """Width of the projection's hidden layer."""
    projection_dim: int = 128
    """Width in which prototypes are compared."""
    temperature: float = 0.1
    kmeans_iterations: int = 10


def deepcluster_v2_loss(
    logits: Tensor, assignments: Tensor, temperature: float, assigned: Tensor | None = None
) -> Tensor:
    """Cross-entropy of every view with its sample's cluster; mean over heads, samples and views.

    logits: cosines [n, V, H, K] with the prototypes of H heads; assignments: int64 [n, H], -1 where
    a sample has none, which then counts for nothing in that head. assigned: [H], how many samples
    have one, by default those given here; over ranks, the mean of their numbers makes the mean of
    their losses the global one. Scalar in nats, float32; 0 where no sample has one. swav
    `main_deepclusterv2.py`, `train`.
    """
    views = logits.shape[1]
    if assigned is None:
        assigned = (assignments >= 0).sum(0)
    targets = assignments[:, None].expand(-1, views, -1)
    with torch.autocast(logits.device.type, enabled=False):
        losses = F.cross_entropy(
            (logits.float() / temperature).movedim(-1, 1),
            targets,
            ignore_index=-1,
            reduction="none",
        )
    return (losses.sum((0, 1)) / torch.where(assigned > 0, assigned * views, 1)).mean()


class DeepClusterV2(Method):
    """The encoder and a projection head; clusters and what they are made of, by sample."""

    depends_on_length = False
    prototypes: Tensor

    def __init__(self, options: Objective, make_encoder: MakeEncoder, samples: int) -> None:
        super().__init__()
        self.options = options
        self.encoder = make_encoder()
        width, dim, heads = feature_dim(self.encoder), options.projection_dim, options.heads
        self.projection = Mlp(width, options.hidden_dim, dim, last_bias=True)
        self.register_buffer("prototypes", torch.zeros(heads, options.num_prototypes, dim))
        # Embeddings of length 1; zeros for samples that were never seen.
        self.memory = RowMemory(torch.zeros(samples, GLOBAL_VIEWS, dim))
        self.assignments = RowMemory(torch.full((samples, heads), -1))

    @override
    @torch.no_grad()
    def before_epoch(self, context: Context, progress: Progress) -> None:
        """New clusters of what was last embedded, which before the first epoch is done here."""
        if progress.step == 0:
            self._fill(context)
        seen = self.memory.rows.any(-1).any(-1).nonzero()[:, 0]
        if len(seen) < self.options.num_prototypes:
            raise ConfigError(
                f"--objective.num-prototypes is {self.options.num_prototypes}; there are no more "
                f"than the {len(seen)} training images to put into so many clusters"
            )
        ids = seen.tensor_split(world_size())[rank()]
        for head in range(self.options.heads):
            centroids, clusters = kmeans(
                self.memory(ids)[:, head % GLOBAL_VIEWS],
                self.options.num_prototypes,
                iterations=self.options.kmeans_iterations,
                generator=progress.generator(f"k-means of head {head}"),
                spherical=True,
                empty="keep",
                ids=ids,
            )
            self.prototypes[head] = centroids
            self.assignments.rows[:, head] = table_by_id(ids, clusters, len(self.memory))

    def _fill(self, context: Context) -> None:
        """The memory of an encoder that has seen nothing.

        Without the statistics of a batch the embeddings of all pictures are nearly the same, and so
        would be the prototypes; around their mean they are not.
        """
        rows = torch.zeros_like(self.memory.rows[:, 0])
        count = rows.new_zeros(())
        network = nn.Sequential(self.encoder, self.projection)
        for ids, projected in context.features(network, GLOBAL_NAME):
            rows[ids] = F.normalize(projected, dim=-1)
            count += len(ids)
        mean = sum_over_ranks(rows.sum(0)) / sum_over_ranks(count)
        rows = sum_over_ranks(rows)
        centred = F.normalize(rows - mean, dim=-1)
        seen = rows.any(-1, keepdim=True)
        self.memory.rows.copy_(torch.where(seen, centred, 0)[:, None].expand_as(self.memory.rows))

    @property
    @override
    def knows_training_images_only(self) -> bool:
        return True

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Float32 "embedding" [B, V, D] of length 1."""
        features = torch.cat([self.encoder(pictures) for _, pictures in by_size(batch.views)])
        z = F.normalize(self.projection(features).float(), dim=-1)
        return {"embedding": z.unflatten(0, (-1, len(batch))).transpose(0, 1)}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        z = embeddings["embedding"]
        with torch.autocast(z.device.type, enabled=False):
            logits = F.linear(z, self.prototypes.flatten(0, 1))
        logits = logits.unflatten(-1, (self.options.heads, -1))
        assignments = self.assignments(batch.ids)
        assigned = mean_over_ranks((assignments >= 0).sum(0).float())
        hits = logits.argmax(-1) == assignments[:, None]
        return {
            "loss": deepcluster_v2_loss(logits, assignments, self.options.temperature, assigned),
            "cluster_found": hits.float().mean(),
        }

    @override
    def after_step(
        self, embeddings: list[dict[str, Tensor]], batches: list[Batch], progress: Progress
    ) -> None:
        """The memory takes in the global views of all ranks and micro-batches."""
        global_views = torch.cat([entry["embedding"][:, :GLOBAL_VIEWS] for entry in embeddings])
        ids = torch.cat([batch.ids for batch in batches])
        self.memory.write(gather_rows(ids), gather_rows(global_views))

    @override
    def param_groups(self) -> list[dict[str, object]]:
        """The code's: weight decay and the rescaling of LARC reach every parameter."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "decay": True}]


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> DeepClusterV2:
    """Raises ConfigError where the augmentation has not the two global views first, or there are
    more clusters than images."""
    require_global_views("deepcluster_v2", facts.view_pixels)
    if objective.num_prototypes > facts.train_samples:
        raise ConfigError(
            f"--objective.num-prototypes is {objective.num_prototypes}; there are no more than "
            f"{facts.train_samples} images to put into so many clusters"
        )
    return DeepClusterV2(objective, make_encoder, facts.train_samples)


_STD = recipes.swav().std

PRESETS = {
    "imagenet": Preset(
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
        notes="scripts/deepclusterv2_800ep_pretrain.sh: linear 75.2. After 400 epochs 74.3 with "
        "2 x 160 + 4 x 96 pixels and 70.2 with 2 x 224.",
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
        objective=Objective(num_prototypes=256, hidden_dim=256, projection_dim=64),
        notes="Not from the paper: for two CPU cores; timm's smallest ResNet.",
    ),
}
