"""MoCo: a query finds its own key, of another view, in a long queue of earlier batches' keys.

He et al. 2019, "Momentum Contrast for Unsupervised Visual Representation Learning" (arXiv
1911.05722) and Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning" (v2, arXiv
2003.04297); code: facebookresearch/moco. The queue makes the number of negatives independent of the
batch, and an encoder that follows slowly keeps its keys comparable. Small batches are enough; costs
one more forward pass per image and K x 128 numbers.

`dictionary` also gives the two forms that the paper compares with (figures 2 and 3): "batch", keys
of the current batch alone with a gradient on both sides (end-to-end); "bank", keys out of a memory
of one row per image, which takes no second encoder (as Wu et al. 2018, with MoCo's loss).

As in the code: the key encoder moves before its forward pass, parameters alone; it sees one view,
the query the other, in that direction only; the new keys enter the queue after the loss.
Deviations: the code shuffles the keys' pictures over GPUs, each of which has batch norm of its own;
here groups of `batch_norm_group` samples, equal for every world size, interleaved for the keys
(blocks/norm_groups.py), and running statistics of all groups, not of the first GPU's. "batch" and
"bank" have the project's global batch norm: there all keys of a batch share their statistics, here
the keys are old ones. Negatives of "bank" are drawn once for the batch and may hold an image's own
row.
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
from headrace.training.blocks.info_nce import batch_info_nce, queue_info_nce
from headrace.training.blocks.memory import Queue, RowMemory
from headrace.training.blocks.norm_groups import group_norms, require_groups
from headrace.training.blocks.teacher import follow, start_equal
from headrace.training.collectives import gather_rows, gather_with_gradient, rank
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset


@dataclass(frozen=True)
class Objective:
    """MoCo's hyper-parameters."""

    dictionary: Literal["queue", "batch", "bank"] = "queue"
    """Where keys come from: MoCo's queue, the batch alone, or a memory of every image."""
    temperature: float = 0.2
    """v1: 0.07."""
    projection_dim: int = 128
    projection_layers: int = 2
    """1: linear, as in v1; 2: with a hidden layer of the encoder's width, as in v2."""
    queue_size: int = 65536
    """queue: keys, a multiple of the batch."""
    teacher_momentum: float = 0.999
    """queue: of the key encoder. Smaller for short runs."""
    batch_norm_group: int = 32
    """queue: consecutive samples that share batch norm's statistics; 0: all of the batch, by which
    a query may know its key."""
    negatives: int = 65536
    """bank: rows that a batch is compared with."""
    bank_momentum: float = 0.5
    """bank: of a row."""


def head(width: int, objective: Objective) -> nn.Sequential:
    """[B, width] -> [B, projection_dim], without batch norm, as torchvision's `fc` is replaced."""
    layers: list[nn.Module] = []
    for _ in range(objective.projection_layers - 1):
        layers += [nn.Linear(width, width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(width, objective.projection_dim))


def random_directions(rows: int, dim: int) -> Tensor:
    """[rows, dim] of length 1, out of torch's global generator."""
    return F.normalize(torch.randn(rows, dim), dim=1)


class Moco(Method):
    """`encoder` and `projection` are trained and judged; what else there is, the dictionary asks.

    queue: `key_encoder` and `key_projection` follow, `memory` is the queue. bank: `memory` is the
    bank. batch: nothing.
    """

    depends_on_length = False
    memory: RowMemory | None

    def __init__(self, options: Objective, make_encoder: MakeEncoder, train_samples: int) -> None:
        super().__init__()
        self.options = options
        self.encoder = make_encoder()
        width = feature_dim(self.encoder)
        self.projection = head(width, options)
        match options.dictionary:
            case "queue":
                self.key_encoder, self.key_projection = make_encoder(), head(width, options)
                start_equal(self.key_encoder, self.encoder)
                start_equal(self.key_projection, self.projection)
                self.memory = Queue(random_directions(options.queue_size, options.projection_dim))
            case "bank":
                self.memory = RowMemory(random_directions(train_samples, options.projection_dim))
            case "batch":
                self.memory = None

    @override
    def param_groups(self) -> list[dict[str, object]]:
        """Everything decays, biases and norms too."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "decay": True}]

    @override
    def before_step(self, progress: Progress) -> None:
        """Eq. 2, before this step's keys are made."""
        if self.options.dictionary == "queue":
            momentum = self.options.teacher_momentum
            follow(self.key_encoder.parameters(), self.encoder.parameters(), momentum)
            follow(self.key_projection.parameters(), self.projection.parameters(), momentum)

    @property
    @override
    def knows_training_images_only(self) -> bool:
        return self.options.dictionary == "bank"

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Embeddings: "query" [B, D] of the first view and, unless the dictionary is a bank, "key"
        [B, D] of the second."""
        query = {"query": self.projection(self.encoder(batch.views[0]))}
        match self.options.dictionary:
            case "queue":
                with torch.no_grad():
                    return query | {"key": self.key_projection(self.key_encoder(batch.views[1]))}
            case "batch":
                return query | {"key": self.projection(self.encoder(batch.views[1]))}
            case "bank":
                return query

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        query, temperature = embeddings["query"], self.options.temperature
        if self.memory is None:
            keys = gather_with_gradient(embeddings["key"])
            loss, key_found = batch_info_nce(query, keys, rank() * len(batch), temperature)
        elif isinstance(self.memory, Queue):
            key = embeddings["key"].detach()
            loss, key_found = queue_info_nce(query, key, self.memory.rows, temperature)
        else:
            device = query.device
            generator = progress.generator("negatives", device)
            size = (self.options.negatives,)
            drawn = torch.randint(len(self.memory), size, generator=generator, device=device)
            own_rows, negatives = self.memory(batch.ids), self.memory(drawn)
            loss, key_found = queue_info_nce(query, own_rows, negatives, temperature)
        return {"loss": loss, "key_found": key_found.float().mean()}

    @override
    @torch.no_grad()
    def after_step(
        self, embeddings: list[dict[str, Tensor]], batches: list[Batch], progress: Progress
    ) -> None:
        """The queue takes the batch's keys; a bank's rows move towards the queries."""
        if self.memory is None:
            return
        name = "key" if isinstance(self.memory, Queue) else "query"
        values = gather_rows(torch.cat([entry[name] for entry in embeddings]))
        values = F.normalize(values.float(), dim=1)
        if isinstance(self.memory, Queue):
            self.memory.push(values)
        else:
            ids = gather_rows(torch.cat([batch.ids for batch in batches]))
            rows = self.memory(ids).lerp(values, 1 - self.options.bank_momentum)
            self.memory.write(ids, F.normalize(rows, dim=1))


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Moco:
    """Raises ConfigError for views, a queue or a group that do not fit."""
    view_count = 1 if objective.dictionary == "bank" else 2
    sizes, batch, group = facts.view_pixels, facts.batch_size, objective.batch_norm_group
    if len(sizes) != view_count or len(set(sizes)) != 1:
        raise ConfigError(
            f"moco with a {objective.dictionary} needs {view_count} view(s) of one size, and the "
            f"augmentation's views have {list(sizes)} pixels"
        )
    if objective.projection_layers < 1:
        raise ConfigError("moco's head has one layer or more (--objective.projection-layers)")
    if objective.dictionary != "queue":
        return Moco(objective, make_encoder, facts.train_samples)
    if objective.queue_size < batch or objective.queue_size % batch:
        raise ConfigError(
            f"moco's queue of {objective.queue_size} keys is no multiple of the batch of {batch}, "
            f"which replaces its oldest keys as a whole"
        )
    method = Moco(objective, make_encoder, facts.train_samples)
    norms = group_norms(method.encoder, group, interleaved=False) if group else 0
    if norms:
        require_groups("moco", batch, group)
        group_norms(method.key_encoder, group, interleaved=True)
    return method


_V1 = Objective(temperature=0.07, projection_layers=1)
_SGD = Optim(name="sgd", learning_rate=0.03, warmup_epochs=0, per_epoch=True, weight_decay=1e-4)
_V1_PRESET = Preset(
    backbone="resnet50",
    backbone_options={"zero_init_last": False},
    augmentation=recipes.moco_v1(),
    test=recipes.center(interpolation="bilinear"),
    optim=replace(_SGD, schedule="steps", milestones=(0.6, 0.8)),  # epochs 120 and 160
    batch_size=256,
    epochs=200,
    objective=_V1,
    notes="v1. Linear 60.6 in the paper, 60.8 +- 0.2 in the code's README; 53 hours on 8 V100. Its "
    "linear classifier wants a learning rate of 30.",
)
_ONE_VIEW = replace(recipes.moco_v1().views[0], count=1)

PRESETS = {
    "imagenet": replace(
        _V1_PRESET,
        augmentation=recipes.moco_v2(),
        optim=_SGD,
        objective=Objective(),
        notes="v2. Linear 67.5 +- 0.1 after 200 epochs (the code's README), 71.1 after 800.",
    ),
    "v1_imagenet": _V1_PRESET,
    "end_to_end": replace(
        _V1_PRESET,
        batch_size=1024,
        objective=replace(_V1, dictionary="batch"),
        notes="Figure 2a: v1 but for the dictionary, with the largest batch that the paper could "
        "hold, and the learning rate scaled with it, as it found necessary.",
    ),
    "memory_bank": replace(
        _V1_PRESET,
        augmentation=replace(recipes.moco_v1(), name="memory_bank", views=(_ONE_VIEW,)),
        objective=replace(_V1, dictionary="bank"),
        notes="Figure 2b: v1 but for the dictionary. Linear 58.0. The paper does not give the "
        "bank's momentum; 0.5 is Wu et al.'s.",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.moco_v2(32, blur=False),
        test=recipes.center(32, 32),
        optim=Optim(name="sgd", learning_rate=0.12, warmup_epochs=0.5, weight_decay=1e-4),
        batch_size=128,
        epochs=10,
        objective=Objective(queue_size=2048, teacher_momentum=0.99),
        notes="Not from the paper: for two CPU cores; timm's smallest ResNet.",
    ),
}
