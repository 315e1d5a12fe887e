"""RELICv2: RELIC over many views, few negatives, and pictures whose background is taken away.

Tomasev et al. 2022, "Pushing the limits of self-supervised ResNets" (arXiv 2201.05119); code:
google-deepmind/relicv2, for evaluation alone. Every view is contrasted with each large one against
ten other samples only, and all that a large view says of them is to agree with what the others say;
now and then a large view is seen without its background, so that nothing can lean on it. Costs:
with 4 large and 2 small views 4.4 passes forward and back and 4 forward per picture, and masks.

From the paper: listing 1: the pairs, the one of a large view with itself among them, their mean,
small views in the online network alone; the number of views and of negatives. Its appendix was not
at hand: the losses' weights, the temperature and the share of masked views are not confirmed; LARS,
schedule, batch and heads are RELIC's, the crops SwAV's.
Deviations: the negatives of a step are the samples at `negatives` drawn distances in the (shuffled)
batch, the same for all pairs; a view's partner in the divergence is that of the large view that it
is contrasted with, and for a small view, which has no target, a neighbour's. A background is
replaced after cropping, blur and colours, by a grey drawn per view; the masks are ours
(tools/make_masks.py), not DeepUSPS's. Logits are float32 under autocast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.pipelines.recipe import Augmentation, Draw, Uniform
from headrace.training.blocks.cosine import spread
from headrace.training.blocks.heads import Mlp, feature_dim
from headrace.training.blocks.teacher import follow
from headrace.training.blocks.views import by_size
from headrace.training.collectives import gather_rows, rank
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.methods.relic import divergence
from headrace.training.preset import ConfigError, Optim, Preset
from headrace.training.schedules import cosine

SALIENCY = "saliency"  # the component of a data set, and the draw of who is masked
BACKGROUND = "background"  # the draw of a grey, in standard deviations from the mean colour


@dataclass(frozen=True)
class Objective:
    """RELICv2's hyper-parameters."""

    temperature: float = 0.4
    contrast_weight: float = 0.3
    invariance_weight: float = 5.0
    """Weight of the divergence between two views' distributions."""
    negatives: int = 10
    """Other samples that each sample is contrasted with; all others where a batch has fewer."""
    saliency_probability: float = 0.0
    """Share of large views that lose their background; needs masks and a preset that asks for them
    (imagenet, cifar_masks)."""
    hidden_dim: int = 4096
    """Width of the hidden layer, of the projection and of the prediction."""
    projection_dim: int = 256
    """Width in which predictions are compared with targets."""
    teacher_momentum: float = 0.996
    """At the start; reaches 1 on a cosine. Smaller for short runs."""


def relic_v2_loss(
    predictions: Tensor,
    targets: Tensor,
    rows: Tensor,
    *,
    temperature: float,
    contrast_weight: float,
    invariance_weight: float,
) -> dict[str, Tensor]:
    """{"loss", "contrast", "invariance", "partner_found"}: float32 scalars, losses in nats.

    predictions: [n, V, D] of all views of this rank's samples, the L large ones first; targets:
    [B, L, D] of the whole batch, taken as constant; rows: int64 [n, 1 + K], each sample's own row
    in it and those of its K negatives. Rows need not be normalised. Views v and t give a
    distribution p_vt over these 1 + K by v's cosines with their targets of view t.
    contrast: -log p_vt(own). invariance: KL(p_vt || p_tv), the latter constant; of a small v
    KL(p_vt || p_tu) with u = t + 1 mod L; 0 for v = t. Both are means over n samples and V * L
    pairs: listing 1. loss = contrast_weight * contrast + invariance_weight * invariance.
    """
    views, large = predictions.shape[1], targets.shape[1]
    with torch.autocast(predictions.device.type, enabled=False):
        queries = F.normalize(predictions.float(), dim=-1)
        keys = F.normalize(targets.detach().float(), dim=-1)[rows]
        log_p = (torch.einsum("nvd,nktd->nvtk", queries, keys) / temperature).log_softmax(dim=-1)
        others = log_p[:, :large].transpose(1, 2)  # at [v, t] stands p_tv
        neighbours = torch.stack([log_p[:, t, (t + 1) % large] for t in range(large)], dim=1)
        small = neighbours[:, None].expand(-1, views - large, -1, -1)
        contrast = -log_p[..., 0].mean()
        invariance = divergence(log_p, torch.cat([others, small], dim=1)).mean()
    return {
        "loss": contrast_weight * contrast + invariance_weight * invariance,
        "contrast": contrast.detach(),
        "invariance": invariance.detach(),
        "partner_found": (log_p.argmax(dim=-1) == 0).float().mean(),
    }


def without_background(view: Tensor, saliency: Tensor, chosen: Tensor, grey: Tensor) -> Tensor:
    """The view [B, 3, H, W], normalised; of the chosen samples (bool [B]) only what is salient.

    saliency: uint8 [B, 1, H, W], 255 where a pixel is the object's wholly. grey: float32 [B], what
    takes the place of the rest on all channels, in units of the normalised view.
    """
    share, grey = saliency.to(view.dtype) / 255, grey.to(view.dtype)[:, None, None, None]
    return torch.where(chosen[:, None, None, None], grey + share * (view - grey), view)


class RelicV2(Method):
    """`teacher` and `teacher_projection` follow `encoder` and `projection`, which are trained."""

    least_samples = 2

    def __init__(self, options: Objective, make_encoder: MakeEncoder, large: int) -> None:
        """large: how many of the views, the first ones, are large."""
        super().__init__()
        self.options = options
        self.large = large
        hidden, out = options.hidden_dim, options.projection_dim
        self.encoder = make_encoder()
        width = feature_dim(self.encoder)
        self.projection = Mlp(width, hidden, out, hidden_bias=True)
        self.prediction = Mlp(out, hidden, out, hidden_bias=True)
        self.teacher = make_encoder().requires_grad_(False)
        self.teacher_projection = Mlp(width, hidden, out, hidden_bias=True).requires_grad_(False)

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Embeddings: "prediction" [B, V, D] of all views and "target" [B, L, D] of the large ones,
        not normalised.

        Raises ConfigError where masks are asked for and the batch has none.
        """
        large = [*self._large_views(batch)]
        features = [self.encoder(x) for _, x in by_size([*large, *batch.views[self.large :]])]
        predictions = self.prediction(self.projection(torch.cat(features)))
        with torch.no_grad():
            targets = self.teacher_projection(self.teacher(torch.cat(large)))
        return {
            "prediction": predictions.unflatten(0, (-1, len(batch))).transpose(0, 1),
            "target": targets.unflatten(0, (-1, len(batch))).transpose(0, 1),
        }

    def _large_views(self, batch: Batch) -> Sequence[Tensor]:
        """Some of them without their background."""
        views, probability = batch.views[: self.large], self.options.saliency_probability
        masks = [mask for mask in batch.components.get(SALIENCY, ()) if mask is not None]
        if probability > 0 and len(masks) < self.large:
            raise ConfigError(
                f"--objective.saliency-probability is {probability}, and this preset's views come "
                f"without masks: take preset imagenet or cifar_masks, or a probability of 0"
            )
        if probability == 0:
            return views
        chosen, greys = batch.draws[SALIENCY] < probability, batch.draws[BACKGROUND]
        columns = zip(views, masks, chosen.unbind(1), greys.unbind(1), strict=True)
        return [
            without_background(view, saliency, chosen_samples, grey)
            for view, saliency, chosen_samples, grey in columns
        ]

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        targets = gather_rows(embeddings["target"])
        outputs = relic_v2_loss(
            embeddings["prediction"],
            targets,
            self._compared(len(batch), targets, progress),
            temperature=self.options.temperature,
            contrast_weight=self.options.contrast_weight,
            invariance_weight=self.options.invariance_weight,
        )
        return {**outputs, "spread": spread(embeddings["target"])}

    def _compared(self, samples: int, targets: Tensor, progress: Progress) -> Tensor:
        """int64 [samples, 1 + K]: rows of `targets` of this rank's samples, and their negatives."""
        batch_size = len(targets)
        generator = progress.generator("negatives")
        distances = torch.randperm(batch_size - 1, generator=generator)
        distances = distances[: self.options.negatives] + 1
        offsets = torch.cat([distances.new_zeros(1), distances])
        offsets = offsets.to(targets.device, non_blocking=True)
        own_rows = rank() * samples + torch.arange(samples, device=targets.device)
        return (own_rows[:, None] + offsets) % batch_size

    @override
    def after_step(
        self, embeddings: list[dict[str, Tensor]], batches: list[Batch], progress: Progress
    ) -> None:
        """Listing 1, after the optimiser, with BYOL's schedule."""
        momentum = cosine(progress.fraction, self.options.teacher_momentum, 1.0)
        follow(self.teacher.parameters(), self.encoder.parameters(), momentum)
        follow(self.teacher_projection.parameters(), self.projection.parameters(), momentum)


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> RelicV2:
    """Raises ConfigError unless two or more large views of one size come before all small ones."""
    sizes = facts.view_pixels
    large = sizes.count(max(sizes))
    if large < 2 or min(sizes[:large]) != max(sizes):
        raise ConfigError(
            f"relic_v2 needs two or more large views of one size before any smaller ones, and the "
            f"augmentation's views have {list(sizes)} pixels"
        )
    if objective.negatives < 1:
        raise ConfigError(f"--objective.negatives is {objective.negatives}; it must be at least 1")
    return RelicV2(objective, make_encoder, large)


def augmentation(swav: Augmentation, large: int) -> Augmentation:
    """SwAV's views, but for the number of large ones."""
    large_views, small_views = swav.views
    large_views = replace(large_views, name="large", count=large)
    return replace(swav, name="relic_v2", views=(large_views, replace(small_views, name="small")))


def with_masks(unmasked: Augmentation) -> Augmentation:
    """The same with masks of the large views, and draws of who is masked and by which grey."""
    large_views, small_views = unmasked.views
    large_views = replace(large_views, components=(SALIENCY,))
    draws = (
        Draw(SALIENCY, Uniform(), (large_views.count,)),
        Draw(BACKGROUND, Uniform(-2.0, 2.0), (large_views.count,)),
    )
    return replace(unmasked, views=(large_views, small_views), draws=draws)


_STD = recipes.swav().std
_NEEDS_MASKS = "Needs the data set's component 'saliency': tools/make_masks.py."
_IMAGENET = Preset(
    backbone="resnet50",
    augmentation=augmentation(recipes.swav(local_count=2), large=4),
    test=recipes.center(std=_STD),
    optim=Optim(name="lars", learning_rate=0.2, warmup_epochs=10, weight_decay=1.5e-6),
    batch_size=4096,
    epochs=1000,
    objective=Objective(),
    notes="The same without masks.",
)
_CIFAR_OBJECTIVE = Objective(hidden_dim=512, projection_dim=128, teacher_momentum=0.99)
_CIFAR = Preset(
    backbone="test_resnet",
    augmentation=augmentation(
        recipes.swav(32, 16, 2, global_scale=(0.2, 1.0), local_scale=(0.1, 0.4), blur=False),
        large=2,
    ),
    test=recipes.center(32, 32, std=_STD),
    optim=Optim(learning_rate=4e-3, warmup_epochs=0.5, weight_decay=1e-4),
    batch_size=128,
    epochs=10,
    objective=_CIFAR_OBJECTIVE,
    notes="For two CPU cores; not from the paper.",
)

PRESETS = {
    "imagenet": replace(
        _IMAGENET,
        augmentation=with_masks(_IMAGENET.augmentation),
        objective=Objective(saliency_probability=0.1),
        notes=f"Linear 77.1 in the paper. {_NEEDS_MASKS}",
    ),
    "imagenet_no_masks": _IMAGENET,
    "cifar": _CIFAR,
    "cifar_masks": replace(
        _CIFAR,
        augmentation=with_masks(_CIFAR.augmentation),
        objective=replace(_CIFAR_OBJECTIVE, saliency_probability=0.1),
        notes=f"The same with masks. {_NEEDS_MASKS}",
    ),
}
