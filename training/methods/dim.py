"""DIM: a summary of a picture that tells much about each of its places, and nothing of others'.

Hjelm et al. 2019, "Learning deep representations by mutual information estimation and maximization"
(arXiv 1808.06670); code: rdevon/DIM `cortex_DIM/functions/{dim_losses,gan_losses}.py`,
`cortex_DIM/nn_modules/`. The mutual information between the summary and the vectors of a feature
map is bounded from below by telling pairs of one picture from pairs of two; an adversary pulls the
summary towards a uniform distribution. One view: cheap, and weaker than what compares views.

The local part sees the map at `local_stage`, the global part that map as one vector. Scores are
dot products of two embeddings ("encode-and-dot-product" of appendix A.2), which networks of one
kind make of places and summaries, as in the code. Deviations: pairs are those of the global batch;
with InfoNCE the other places of a picture take no part, where the code lets them in with a score of
-10; the global part scores by a dot product too (the paper's convolves a concatenation); the
prior's discriminator moves first, in a phase of its own, without the code's gradient penalty, and
the encoder takes the code's non-saturating loss against it (eq. 7; `gan_losses.py`,
`generator_loss`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log
from typing import Any, Literal, assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.adversary import deception_loss, discriminator_loss
from headrace.training.blocks.heads import feature_dim
from headrace.training.collectives import gather_with_gradient, rank, world_size
from headrace.training.method import MAIN_PHASE, Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset

JUDGED_BY = "linear"
Measure = Literal["jsd", "infonce", "dv"]
PRIOR_PHASE = "prior"


@dataclass(frozen=True)
class Objective:
    """DIM's hyper-parameters."""

    measure: Measure = "infonce"
    """Bound of the mutual information: Jensen-Shannon, InfoNCE or Donsker-Varadhan."""
    global_weight: float = 0.0
    """alpha: of the whole map and the summary; 1 in DIM(G)."""
    local_weight: float = 1.0
    """beta: of each place and the summary; 1 in DIM(L), 0 in DIM(G)."""
    prior_weight: float = 0.1
    """gamma: of the adversary; 1 in DIM(G), 0.1 in DIM(L)."""
    local_stage: int = -2
    """Which of the backbone's feature maps is local, counted from the end: -1 is the last."""
    hidden_dim: int = 2048
    """Width in which pairs are scored."""
    prior_hidden_dims: tuple[int, int] = (1000, 200)


def information_loss(places: Tensor, summaries: Tensor, first_row: int, measure: Measure) -> Tensor:
    """A negative lower bound of the mutual information, up to a constant, in nats.

    places: [B, L, D], L vectors of each of the batch's pictures; summaries: [n, D] of the pictures
    from `first_row` on. Scores are u = summary . place. Positive pairs: a summary with the L places
    of its picture; negative ones: with those of the other B - 1. Means over pairs.
    jsd: E-[softplus(u)] + E+[softplus(-u)] - 2 log 2 (eq. 4; `fenchel_dual_loss`).
    infonce: per positive pair, among it and the picture's negatives (eq. 5; `nce_loss`).
    dv: log E-[exp u] - E+[u] (eq. 2; `donsker_varadhan_loss`); E- is that of all ranks.
    """
    with torch.autocast(places.device.type, enabled=False):
        scores = torch.einsum("nd,bld->nbl", summaries.float(), places.float())
        rows = torch.arange(first_row, first_row + len(summaries), device=places.device)
        same_picture = rows[:, None] == torch.arange(len(places), device=places.device)
        positive = scores.gather(1, rows[:, None, None].expand(-1, 1, scores.shape[2]))[:, 0]
        negative = scores.masked_fill(same_picture[..., None], float("-inf")).flatten(1)
        negative_pairs = negative.numel() - positive.numel()
        match measure:
            case "jsd":
                negative_mean = F.softplus(negative).sum() / negative_pairs
                return negative_mean + F.softplus(-positive).mean() - 2 * log(2)
            case "infonce":
                log_negatives = negative.logsumexp(dim=1, keepdim=True)
                return (torch.logaddexp(positive, log_negatives) - positive).mean()
            case "dv":
                log_sums = gather_with_gradient(negative.flatten().logsumexp(0)[None])
                log_mean = log_sums.logsumexp(0) - log(world_size() * negative_pairs)
                return log_mean - positive.mean()
            case _:
                assert_never(measure)


class Scored(nn.Module):
    """[n, in] -> [n, hidden]: a network beside a shortcut, which begins as a noisy copy where that
    is possible, and a layer norm over both (`mi_networks.py`, `MI1x1ConvNet`)."""

    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.deep = nn.Sequential(
            nn.Linear(in_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
        )
        self.shortcut = nn.Linear(in_dim, hidden_dim, bias=False)
        self.norm = nn.LayerNorm(hidden_dim)
        if hidden_dim >= in_dim:
            nn.init.uniform_(self.shortcut.weight, -0.01, 0.01)
            self.shortcut.weight.data.fill_diagonal_(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.deep(x) + self.shortcut(x))


class Dim(Method):
    """The encoder, the networks that score pairs, and the prior's discriminator."""

    depends_on_length = False
    least_samples = 2

    def __init__(self, options: Objective, make_encoder: MakeEncoder, pixels: int) -> None:
        super().__init__()
        self.options = options
        self.encoder = make_encoder()
        width, hidden = feature_dim(self.encoder), options.hidden_dim
        with torch.no_grad():
            blank = torch.zeros(1, 3, pixels, pixels)
            channels, map_height, map_width = self.eval().look(blank)[0].shape[1:]
        self.train()
        if options.local_weight > 0:
            self.score_places = Scored(channels, hidden)
            self.score_summary = Scored(width, hidden)
        if options.global_weight > 0:
            self.score_map = Scored(channels * map_height * map_width, hidden)
            self.score_whole = Scored(width, hidden)
        if options.prior_weight > 0:
            first, second = options.prior_hidden_dims
            self.discriminator = nn.Sequential(
                nn.Linear(width, first),
                nn.ReLU(),
                nn.Linear(first, second),
                nn.ReLU(),
                nn.Linear(second, 1),
            )

    def look(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> the local map [B, C, h, w] and the summary [B, width]."""
        encoder: Any = self.encoder
        last, maps = encoder.forward_intermediates(pictures)
        return maps[self.options.local_stage], encoder.forward_head(last)

    @override
    def phases(self) -> dict[str, list[nn.Parameter]]:
        """The discriminator moves first."""
        if self.options.prior_weight <= 0:
            return super().phases()
        discriminator = list(self.discriminator.parameters())
        excluded = set(discriminator)
        others = [p for p in self.parameters() if p.requires_grad and p not in excluded]
        return {PRIOR_PHASE: discriminator, MAIN_PHASE: others}

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Embeddings: "summary" [B, width]; in the main phase also what pairs are scored by.

        local: "places" [B, h * w, hidden] and "by_place" [B, hidden]; global: "map" [B, 1, hidden]
        and "by_map" [B, hidden].
        """
        if progress.phase == PRIOR_PHASE:
            with torch.no_grad():
                return {"summary": self.look(batch.views[0])[1]}
        local_map, summary = self.look(batch.views[0])
        embeddings = {"summary": summary}
        if self.options.local_weight > 0:
            places = local_map.flatten(2).transpose(1, 2)
            scored_places = self.score_places(places.flatten(0, 1))
            embeddings["places"] = scored_places.unflatten(0, places.shape[:2])
            embeddings["by_place"] = self.score_summary(summary)
        if self.options.global_weight > 0:
            embeddings["map"] = self.score_map(local_map.flatten(1))[:, None]
            embeddings["by_map"] = self.score_whole(summary)
        return embeddings

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        options, summary = self.options, embeddings["summary"]
        first_row = rank() * len(batch)

        # ---- the discriminator's phase: samples of the prior against summaries
        if progress.phase == PRIOR_PHASE:
            # Of the global batch's uniform samples those of this rank's rows.
            shape = (world_size() * len(batch), summary.shape[1])
            generator = progress.generator("prior", summary.device)
            prior = torch.rand(shape, generator=generator, device=summary.device)
            prior = prior[first_row:][: len(batch)].to(summary.dtype)
            real = self.discriminator(prior)
            return {"loss": discriminator_loss(real, self.discriminator(summary.sigmoid()))}

        # ---- information between the summary and the map, by places and as a whole
        terms: dict[str, Tensor] = {}
        loss = summary.new_zeros((), dtype=torch.float32)
        for name, weight, places, summaries in (
            ("local", options.local_weight, "places", "by_place"),
            ("global", options.global_weight, "map", "by_map"),
        ):
            if weight > 0:
                all_places = gather_with_gradient(embeddings[places])
                terms[name] = information_loss(
                    all_places, embeddings[summaries], first_row, options.measure
                )
                loss = loss + weight * terms[name]

        # ---- summaries that pass for samples of the prior
        if options.prior_weight > 0:
            terms["deception"] = deception_loss(self.discriminator(summary.sigmoid()))
            loss = loss + options.prior_weight * terms["deception"]
        return {"loss": loss, **terms}


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Dim:
    """Raises ConfigError for several views, a backbone without maps, or nothing to learn."""
    if len(facts.view_pixels) != 1:
        raise ConfigError(f"dim needs one view, not the {len(facts.view_pixels)} given")
    if facts.batch_size < 2:
        raise ConfigError("dim compares pictures of a batch: --data.batch-size 1 holds no pair")
    if max(objective.local_weight, objective.global_weight) <= 0:
        raise ConfigError("dim needs --objective.local-weight or --objective.global-weight above 0")
    try:
        return Dim(objective, make_encoder, facts.view_pixels[0])
    except (AttributeError, IndexError) as error:
        raise ConfigError(
            f"dim needs a backbone with feature maps, --objective.local-stage among them: {error}"
        ) from error


_LOCAL = Preset(
    backbone="resnet50",
    augmentation=recipes.supervised(),
    test=recipes.center(interpolation="bilinear"),
    optim=Optim(
        name="adamw",
        learning_rate=1e-4,
        scale_with_batch=False,
        warmup_epochs=0,
        schedule="constant",
        weight_decay=0.0,
    ),
    batch_size=64,
    epochs=100,
    objective=Objective(),
    notes="DIM(L) with InfoNCE, as the paper trains on Tiny ImageNet and STL-10 (Adam at 1e-4, "
    "batches of 64); it has no ImageNet result, and crops and flips are not the paper's.",
)
_GLOBAL = Objective("jsd", global_weight=1.0, local_weight=0.0, prior_weight=1.0)

PRESETS = {
    "imagenet": _LOCAL,
    "global_imagenet": replace(
        _LOCAL, objective=_GLOBAL, notes="DIM(G) with the Jensen-Shannon bound; as imagenet."
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.supervised(32, scale=(0.3, 1.0)),
        test=recipes.center(32, 32),
        optim=Optim(name="adamw", learning_rate=3e-3, warmup_epochs=0.5, weight_decay=1e-4),
        batch_size=128,
        epochs=10,
        objective=Objective(
            global_weight=1.0, local_stage=-4, hidden_dim=256, prior_hidden_dims=(200, 100)
        ),
        notes="Not from the paper: both parts, local ones of 8 x 8 places; for two CPU cores.",
    ),
}
