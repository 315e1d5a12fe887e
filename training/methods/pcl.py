"""PCL: a query finds its own key in MoCo's queue, and the clusters that its picture belongs to.

Li et al. 2020, "Prototypical Contrastive Learning of Unsupervised Representations" (arXiv
2005.04966); code: salesforce/PCL. Expectation: before each epoch the momentum encoder's features of
all images are clustered, several times from coarse to fine. Maximisation: InfoNCE among keys and
among centroids, colder for tight clusters. Costs: MoCo's, one more pass per image, and k-means.

As in the code: test view and eval mode for what is clustered; Euclidean k-means, normalised
afterwards; concentrations of distances, not squares; one set of negative prototypes per batch.
Deviations: MoCo's (methods/moco.py); the *global* batch's prototypes are compared, each once, where
the code has a GPU's, and one that samples share is its own negative; fewer than `negatives` are all
compared, where the code fails; a concentration is at least a hundredth of the temperature; k-means
draws other numbers than faiss, anew each epoch.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.heads import feature_dim
from headrace.training.blocks.info_nce import queue_info_nce
from headrace.training.blocks.kmeans import cluster_sums, kmeans, table_by_id, whole_share
from headrace.training.blocks.memory import Queue, RowMemory
from headrace.training.blocks.norm_groups import group_norms, require_groups
from headrace.training.blocks.teacher import follow, start_equal
from headrace.training.collectives import gather_rows
from headrace.training.method import Context, Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset


@dataclass(frozen=True)
class Objective:
    """PCL's hyper-parameters."""

    clusters: tuple[int, ...] = (25000, 50000, 100000)
    """Of each clustering."""
    temperature: float = 0.2
    """Of InfoNCE, and the mean of the prototypes'."""
    negatives: int = 16384
    """Prototypes of each clustering that a batch is compared with, beside its own."""
    queue_size: int = 16384
    """Keys, a multiple of the batch."""
    teacher_momentum: float = 0.999
    """Of the key encoder. Smaller for short runs."""
    projection_dim: int = 128
    projection_layers: Literal[1, 2] = 2
    """1: linear, as in v1; 2: with a hidden layer of the encoder's width, as in v2."""
    warmup_epochs: int = 20
    """Epochs without prototypes."""
    kmeans_iterations: int = 20
    kmeans_restarts: int = 5
    batch_norm_group: int = 32
    """Consecutive samples that share batch norm's statistics, as in moco; 0: all of the batch."""


def compared(clusters: Tensor, negatives: int, random: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch's own prototypes, int64 [B] among K, and `negatives` of the others, or all of them.

    clusters: which ones its samples belong to. random: uniform [K]; the others with the largest
    numbers are taken. Returns the numbers of C prototypes int64 [C], whether each is there for the
    first time bool [C], and the place of each prototype among the batch's own int64 [K], B for
    those that are not.
    """
    places = torch.arange(len(clusters), device=clusters.device)
    absent = places.new_full((len(random),), len(clusters))
    place_of = absent.scatter_reduce(0, clusters, places, "amin")
    keys, others = random.index_fill(0, clusters, -1.0).topk(min(negatives, len(random)))
    first = torch.cat([place_of[clusters] == places, keys >= 0])
    return torch.cat([clusters, others]), first, place_of


def proto_nce(
    queries: Tensor, prototypes: Tensor, first: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """-log softmax of q c / phi at a query's own prototype, mean over the n queries, in nats.

    queries: [n, D], not normalised; prototypes: c / phi [C, D], centroids of length 1 over their
    concentrations; first: bool [C], which of these take part; target: int64 [n]. Returns a float32
    scalar and bool [n]: whether the own logit is the largest. Eq. 11, second term, of one
    clustering; pcl `builder.py`, `forward`.
    """
    with torch.autocast(queries.device.type, enabled=False):
        logits = F.normalize(queries.float(), dim=1) @ prototypes.T
        logits = logits.masked_fill(~first, float("-inf"))
    return F.cross_entropy(logits, target), logits.argmax(dim=1) == target


def concentrations(
    distances: Tensor, assignments: Tensor, clusters: int, temperature: float
) -> Tensor:
    """phi, float32 [K], of each sample's distance to its centroid [n] and its cluster int64 [n].

    Eq. 12 with alpha 10; the largest for clusters of one or none; clipped to the 10th and 90th
    percentile, scaled to a mean of `temperature`. Over all ranks; pcl `main_pcl.py`, `run_kmeans`.
    """
    sums, counts = cluster_sums(distances, assignments, clusters)
    phi = torch.where(counts > 1, sums / counts / (counts + 10.0).log(), 0)
    phi = torch.where(counts > 1, phi, phi.max())
    phi = phi.clamp(phi.quantile(0.1), phi.quantile(0.9))
    scaled = torch.where(phi.mean() > 0, phi / phi.mean(), 1)
    return (temperature * scaled.clamp(min=0.01)).float()


class Pcl(Method):
    """`encoder` and `projection` are trained and judged; `key_encoder`, `key_projection` follow.

    prototypes: c / phi [sum of K, D] of all clusterings; assignments: by id, a column for each.
    """

    depends_on_length = False

    def __init__(self, options: Objective, make_encoder: MakeEncoder, samples: int) -> None:
        super().__init__()
        self.options = options
        self.encoder, self.key_encoder = make_encoder(), make_encoder()
        start_equal(self.key_encoder, self.encoder)
        width, dim = feature_dim(self.encoder), options.projection_dim
        hidden = [nn.Linear(width, width), nn.ReLU()] if options.projection_layers == 2 else []
        self.projection = nn.Sequential(*hidden, nn.Linear(width, dim))
        self.key_projection = deepcopy(self.projection).requires_grad_(False)
        self.queue = Queue(F.normalize(torch.randn(options.queue_size, dim), dim=1))
        self.prototypes = RowMemory(torch.zeros(sum(options.clusters), dim))
        self.assignments = RowMemory(torch.full((samples, len(options.clusters)), -1))

    @override
    def param_groups(self) -> list[dict[str, object]]:
        return [{"params": [p for p in self.parameters() if p.requires_grad], "decay": True}]

    @override
    @torch.no_grad()
    def before_epoch(self, context: Context, progress: Progress) -> None:
        """The E-step."""
        options = self.options
        if progress.epoch < options.warmup_epochs:
            return
        network = nn.Sequential(self.key_encoder, self.key_projection)
        ids, features = whole_share(context.features(network))
        features = F.normalize(features, dim=1)
        for number, rows in enumerate(self.prototypes.rows.split(options.clusters)):
            centroids, clusters = kmeans(
                features,
                len(rows),
                iterations=options.kmeans_iterations,
                restarts=options.kmeans_restarts,
                generator=progress.generator(f"k-means {number}"),
                ids=ids,
            )
            distances = (features - centroids[clusters]).norm(dim=1)
            phi = concentrations(distances, clusters, len(rows), options.temperature)
            rows.copy_(F.normalize(centroids, dim=1) / phi[:, None])
            self.assignments.rows[:, number] = table_by_id(ids, clusters, len(self.assignments))

    @override
    def before_step(self, progress: Progress) -> None:
        """MoCo's eq. 2, before this step's keys are made."""
        momentum = self.options.teacher_momentum
        follow(self.key_encoder.parameters(), self.encoder.parameters(), momentum)
        follow(self.key_projection.parameters(), self.projection.parameters(), momentum)

    @property
    @override
    def knows_training_images_only(self) -> bool:
        return True

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Not normalised: "query" [B, D] of the first view, "key" [B, D] of the second."""
        with torch.no_grad():
            key = self.key_projection(self.key_encoder(batch.views[1]))
        return {"query": self.projection(self.encoder(batch.views[0])), "key": key}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        query, key, options = embeddings["query"], embeddings["key"].detach(), self.options
        loss, key_hits = queue_info_nce(query, key, self.queue.rows, options.temperature)
        outputs = {"loss": loss, "key_found": key_hits.float().mean()}
        if progress.epoch < options.warmup_epochs:
            return outputs
        clusters = self.assignments(batch.ids)
        clusters_of_everyone = gather_rows(clusters)
        outcomes = []
        for number, rows in enumerate(self.prototypes.rows.split(options.clusters)):
            generator = progress.generator(f"negatives {number}", query.device)
            random = torch.rand(len(rows), generator=generator, device=query.device)
            prototypes, first, place_of = compared(
                clusters_of_everyone[:, number], options.negatives, random
            )
            target = place_of[clusters[:, number]]
            term, hits = proto_nce(query, rows[prototypes], first, target)
            outcomes.append(torch.stack([term, hits.float().mean()]))
        prototype_loss, hit_rate = torch.stack(outcomes).mean(dim=0).unbind()
        return {
            **outputs,
            "loss": loss + prototype_loss,
            "proto_nce": prototype_loss,
            "prototype_found": hit_rate,
        }

    @override
    @torch.no_grad()
    def after_step(
        self, embeddings: list[dict[str, Tensor]], batches: list[Batch], progress: Progress
    ) -> None:
        """The queue takes the batch's keys."""
        keys = gather_rows(torch.cat([entry["key"] for entry in embeddings]))
        self.queue.push(F.normalize(keys.float(), dim=1))


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Pcl:
    """Raises ConfigError for views, clusters or a queue that do not fit."""

    def need(holds: bool, what: str) -> None:
        if not holds:
            raise ConfigError(f"pcl needs {what}")

    sizes, batch, samples = facts.view_pixels, facts.batch_size, facts.train_samples
    most_clusters, queue = max(objective.clusters, default=0), objective.queue_size
    need(len(sizes) == 2 and len(set(sizes)) == 1, f"two views of one size, not {list(sizes)}")
    need(
        0 < most_clusters <= samples,
        f"clusterings into 1 to {samples} clusters (--objective.clusters)",
    )
    need(queue >= batch and queue % batch == 0, f"a queue of {batch} keys or a multiple of that")
    method = Pcl(objective, make_encoder, samples)
    group = objective.batch_norm_group
    if group and group_norms(method.encoder, group, interleaved=False):
        require_groups("pcl", batch, group)
        group_norms(method.key_encoder, group, interleaved=True)
    return method


_V2 = Preset(
    backbone="resnet50",
    backbone_options={"zero_init_last": False},
    augmentation=recipes.moco_v2(),
    test=recipes.center(interpolation="bilinear"),
    optim=Optim(name="sgd", learning_rate=0.03, warmup_epochs=0, per_epoch=True, weight_decay=1e-4),
    batch_size=256,
    epochs=200,
    objective=Objective(),
    notes="v2. Linear 67.6 (the code's README).",
)

PRESETS = {
    "imagenet": _V2,
    "v1_imagenet": replace(
        _V2,
        augmentation=recipes.moco_v1(),
        optim=replace(_V2.optim, schedule="steps", milestones=(0.6, 0.8)),  # epochs 120 and 160
        objective=Objective(projection_layers=1),
        notes="v1. Linear 61.5 (the code's README).",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.moco_v2(32, blur=False),
        test=recipes.center(32, 32),
        optim=replace(_V2.optim, learning_rate=0.12, warmup_epochs=0.5, per_epoch=False),
        batch_size=128,
        epochs=10,
        objective=Objective(
            clusters=(50, 100, 200),
            queue_size=2048,
            teacher_momentum=0.99,
            warmup_epochs=1,
            kmeans_restarts=1,
        ),
        notes="Not from the paper: for two CPU cores; timm's smallest ResNet.",
    ),
}
