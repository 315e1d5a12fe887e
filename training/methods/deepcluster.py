"""DeepCluster: k-means on the features names the classes that the next epoch is trained on.

Caron et al. 2018, "Deep Clustering for Unsupervised Learning of Visual Features" (arXiv
1807.05520); code: facebookresearch/deepcluster, and open-mmlab/mmselfsup for ResNet-50. Before each
epoch all images are clustered (features whitened to 256 dimensions); a classifier that starts anew
learns to name their clusters, of which each gets an equal share of the epoch. Costs: one pass per
image, and one more without gradient for the clustering.

As in the code: edges for input (blocks/sobel.py); the top layer has a bias and no momentum, the
rest decays as a whole; features of the test view in eval mode; an epoch's images are drawn as
`UnifLabelSampler` does, those of small clusters with repetition (`order_table`).
Deviations: features are clustered as the encoder gives them, in the code's VGG and AlexNet before
their last ReLU; timm's VGG drops out its last features too; batch norm spans the global batch (the
code: DataParallel, each GPU's share); k-means runs on all ranks, in other random numbers than
faiss. Under AdamW the top layer's moments outlive its new start. An image that an epoch shows more
than 1024 times is then augmented as before (pipelines/table.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.pipelines.ops import ColorJitter, Flip, Grayscale, RandomResizedCrop
from headrace.pipelines.recipe import Augmentation, View
from headrace.training.blocks.heads import feature_dim
from headrace.training.blocks.kmeans import kmeans, table_by_id, whiten, whole_share
from headrace.training.blocks.memory import RowMemory
from headrace.training.blocks.sobel import SobelEncoder
from headrace.training.method import Context, Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset


@dataclass(frozen=True)
class Objective:
    """DeepCluster's hyper-parameters."""

    clusters: int = 10000
    """Ten times the classes of ImageNet (section 4.1)."""
    pca_dim: int = 256
    """Whitened dimensions in which k-means runs; the encoder's width, if that is less."""
    kmeans_iterations: int = 20
    sobel: bool = True
    """Edges in place of colours."""


def uniform_over_clusters(assignments: Tensor, generator: torch.Generator) -> Tensor:
    """Ids int64 [n], shuffled, in which each cluster that has members is equally frequent.

    assignments: int64 [N] by id, -1 for ids that take no part; n of them do. Of C clusters with
    members each gives n // C + 1 ids, distinct if it has more than that and drawn independently
    otherwise; all are shuffled, and the first n of them kept. deepcluster `util.py`,
    `UnifLabelSampler`. On the CPU.
    """
    ids = (assignments >= 0).nonzero()[:, 0]
    clusters = assignments[ids]
    shuffled = torch.randperm(len(ids), generator=generator)
    by_cluster = shuffled[clusters[shuffled].argsort(stable=True)]
    members = ids[by_cluster]  # one cluster after the other, each in a random order
    counts = clusters.bincount()
    counts = counts[counts > 0]
    first_members = counts.cumsum(0) - counts
    share = len(ids) // len(counts) + 1
    numbers = torch.rand(len(counts), share, dtype=torch.float64, generator=generator)
    with_repetition = (numbers * counts[:, None]).long()
    without = torch.arange(share)
    places = torch.where(counts[:, None] > share, without, with_repetition)
    drawn = members[first_members[:, None] + places].flatten()
    return drawn[torch.randperm(len(drawn), generator=generator)[: len(ids)]]


def normalized_mutual_information(first: Tensor, second: Tensor) -> Tensor:
    """I(A; B) / sqrt(H(A) H(B)) of two clusterings int64 [n] of the same images, in 0..1, float32.

    Section 4.1 of the paper. 0 where one of them has a single cluster or there are no images.
    """
    _, pairs = torch.stack([first, second]).unique(dim=1, return_counts=True)
    first_entropy, second_entropy, joint_entropy = (
        torch.special.entr(counts.double() / len(first)).sum()
        for counts in (first.bincount(), second.bincount(), pairs)
    )
    information = first_entropy + second_entropy - joint_entropy
    scale = (first_entropy * second_entropy).sqrt()
    return torch.where(scale > 0, information / scale, 0).clamp(min=0).float()


class DeepCluster(Method):
    """The encoder, a classifier over clusters, and the clusters by sample."""

    depends_on_length = False
    nmi: Tensor

    def __init__(self, options: Objective, make_encoder: MakeEncoder, samples: int) -> None:
        super().__init__()
        self.options = options
        network = make_encoder(in_chans=2) if options.sobel else make_encoder()
        self.encoder = SobelEncoder(network) if options.sobel else network
        self.top_layer = nn.Linear(feature_dim(network), options.clusters)
        self.assignments = RowMemory(torch.full((samples,), -1))
        self.register_buffer("nmi", torch.zeros(()))

    @override
    @torch.no_grad()
    def before_epoch(self, context: Context, progress: Progress) -> None:
        """New clusters of all images, and a classifier that knows none of them."""
        ids, features = whole_share(context.features(self.encoder))
        _, clusters = kmeans(
            whiten(features, self.options.pca_dim),
            self.options.clusters,
            iterations=self.options.kmeans_iterations,
            generator=progress.generator("k-means"),
            ids=ids,
        )
        before = self.assignments.rows
        now = table_by_id(ids, clusters, len(self.assignments))
        in_both = (before >= 0) & (now >= 0)
        self.nmi.copy_(normalized_mutual_information(before[in_both], now[in_both]))
        before.copy_(now)
        weight = self.top_layer.weight
        weight.copy_(0.01 * torch.randn(weight.shape, generator=progress.generator("top layer")))
        self.top_layer.bias.zero_()

    @override
    def order_table(self, progress: Progress) -> Tensor:
        """Each cluster as often as any other."""
        generator = progress.epoch_start.generator("uniform over clusters")
        return uniform_over_clusters(self.assignments.rows.cpu(), generator)

    @property
    @override
    def knows_training_images_only(self) -> bool:
        return True

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Scores "logits" [B, clusters]."""
        return {"logits": self.top_layer(self.encoder(batch.views[0]))}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        """Eq. 2. "nmi": with the clusters of the epoch before, 0 in the first one."""
        logits = embeddings["logits"].float()
        clusters = self.assignments(batch.ids)
        hits = logits.argmax(dim=1) == clusters
        return {
            "loss": F.cross_entropy(logits, clusters),
            "cluster_found": hits.float().mean(),
            "nmi": self.nmi.clone(),
        }

    @override
    def param_groups(self) -> list[dict[str, object]]:
        return [
            {"params": list(self.encoder.parameters()), "decay": True},
            {"params": list(self.top_layer.parameters()), "decay": True, "momentum": 0.0},
        ]


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> DeepCluster:
    """Raises ConfigError for several views, or more clusters than images."""
    if len(facts.view_pixels) != 1:
        raise ConfigError(f"deepcluster takes one view, not the {len(facts.view_pixels)} given")
    if objective.clusters > facts.train_samples:
        raise ConfigError(
            f"--objective.clusters is {objective.clusters}; there are no more than "
            f"{facts.train_samples} images to put into so many clusters"
        )
    return DeepCluster(objective, make_encoder, facts.train_samples)


def _mmselfsup() -> Augmentation:
    """configs/selfsup/_base_/datasets/imagenet_deepcluster.py."""
    ops = (
        RandomResizedCrop(224, (0.08, 1.0), interpolation="bilinear"),
        Flip(0.5),
        ColorJitter(0.4, 0.4, 1.0, 0.5),
        Grayscale(0.2),
    )
    return Augmentation(
        "deepcluster_mmselfsup",
        (View("view", ops),),
        deviations=("no rotation by up to 2 degrees, which mmselfsup puts after the flip",),
    )


_OPTIM = Optim(
    name="sgd", learning_rate=0.05, warmup_epochs=0, schedule="constant", weight_decay=1e-5
)

PRESETS = {
    "imagenet": Preset(
        backbone="vgg16_bn",
        backbone_options={"drop_rate": 0.5},
        augmentation=recipes.supervised(),
        test=recipes.center(interpolation="bilinear"),
        optim=_OPTIM,
        batch_size=256,
        epochs=200,
        objective=Objective(),
        notes="The code's options. The paper's AlexNet took 12 days on a P100 for 500 epochs, a "
        "third of them for k-means; VISSL's reaches 37.9 with a linear classifier.",
    ),
    "resnet50_imagenet": Preset(
        backbone="resnet50",
        backbone_options={"zero_init_last": False},
        augmentation=_mmselfsup(),
        test=recipes.center(interpolation="bilinear"),
        optim=_OPTIM,  # 0.1 at this batch size
        batch_size=512,
        epochs=200,
        objective=Objective(),
        notes="mmselfsup, deepcluster-sobel_resnet50_8xb64-steplr-200e: linear 46.92.",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.supervised(32, scale=(0.2, 1.0)),
        test=recipes.center(32, 32),
        optim=Optim(name="sgd", learning_rate=0.4, warmup_epochs=0, weight_decay=1e-5),
        batch_size=128,
        epochs=10,
        objective=Objective(clusters=100, pca_dim=64),
        notes="Not from the paper: for two CPU cores; timm's smallest ResNet.",
    ),
}
