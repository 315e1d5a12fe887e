"""CMC: what a picture's lightness says and what its colours say find each other.

Tian et al. 2019, "Contrastive Multiview Coding" (arXiv 1906.05849); code: HobbitLong/CMC. One
network sees L, another ab; each one's features are told from noise in a bank of the other's. No
colour jitter is needed, for the two views are parts of one picture. Two networks and two banks;
the judged encoder is both networks together, [B, 3, H, W] in [0, 1] -> features side by side.

As in the code: the loss is the sum of the two directions, which share their noise; one Z per
direction from the first batch; noise may hold the image itself; weight decay on everything.
Deviations: probabilities are logarithms in float32; Z is the mean over the *global* first batch
(with accumulation each micro-batch of the first step uses its own); batch norm spans all ranks.
Colours are converted here, on the device, so pictures must come as [0, 1], not normalised.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.pipelines.recipe import Augmentation
from headrace.training.blocks.color import rgb_to_lab, rgb_to_ycbcr
from headrace.training.blocks.heads import feature_dim
from headrace.training.blocks.nce import FeatureBank, own_and_noise, unit
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset

ColorSpace = Literal["lab", "ycbcr"]


@dataclass(frozen=True)
class Objective:
    """CMC's hyper-parameters."""

    loss: Literal["nce", "softmax"] = "nce"
    """softmax: over the own row and the noise's."""
    color_space: ColorSpace = "lab"
    """The code's README finds ycbcr half a point to a point better."""
    negatives: int = 16384
    """Noise rows per image."""
    temperature: float = 0.07
    projection_dim: int = 128
    bank_momentum: float = 0.5
    """Share that a row of a bank keeps of itself."""


_LAB_RANGES = ((0.0, 100.0), (-86.183, 98.233), (-107.857, 94.478))  # of all sRGB colours
_MEAN_AND_STD = {
    "lab": tuple(((low + high) / 2, (high - low) / 2) for low, high in _LAB_RANGES),
    "ycbcr": ((116.151, 109.500), (121.080, 111.855), (132.342, 111.964)),
}


def split_colors(pictures: Tensor, color_space: ColorSpace) -> tuple[Tensor, Tensor]:
    """RGB in [0, 1], [B, 3, H, W] -> float32 lightness [B, 1, H, W] and colours [B, 2, H, W].

    Shifted and scaled as in CMC `train_CMC.py`, `get_train_loader`: Lab's channels to [-1, 1].
    """
    convert = {"lab": rgb_to_lab, "ycbcr": rgb_to_ycbcr}[color_space]
    with torch.autocast(pictures.device.type, enabled=False):
        channels = zip(convert(pictures).unbind(dim=1), _MEAN_AND_STD[color_space], strict=True)
        light, *colors = [(channel - mean) / std for channel, (mean, std) in channels]
    return light[:, None], torch.stack(colors, dim=1)


class SplitEncoder(nn.Module):
    """Two networks: [B, 3, H, W], RGB in [0, 1] -> [B, num_features], those of L, then of ab."""

    def __init__(self, make_encoder: MakeEncoder, color_space: ColorSpace) -> None:
        super().__init__()
        self.color_space: ColorSpace = color_space
        self.light = make_encoder(in_chans=1)
        self.color = make_encoder(in_chans=2)
        self.num_features = feature_dim(self.light) + feature_dim(self.color)

    def both(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Features of lightness [B, D] and of colours [B, D]."""
        light, color = split_colors(pictures, self.color_space)
        return self.light(light), self.color(color)

    def forward(self, pictures: Tensor) -> Tensor:
        return torch.cat(self.both(pictures), dim=1)


class Cmc(Method):
    """Two encoders, a linear layer on each, a bank for each."""

    depends_on_length = False

    def __init__(self, options: Objective, make_encoder: MakeEncoder, samples: int) -> None:
        super().__init__()
        self.options = options
        encoder = SplitEncoder(make_encoder, options.color_space)
        self.encoder = encoder
        dim = options.projection_dim
        self.light_projection = nn.Linear(feature_dim(encoder.light), dim)
        self.color_projection = nn.Linear(feature_dim(encoder.color), dim)
        self.light_bank = FeatureBank(samples, dim)
        self.color_bank = FeatureBank(samples, dim)

    @property
    @override
    def knows_training_images_only(self) -> bool:
        return True

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Embeddings: "light" and "color" [B, D], not normalised."""
        assert isinstance(self.encoder, SplitEncoder)
        light, color = self.encoder.both(batch.views[0])
        return {"light": self.light_projection(light), "color": self.color_projection(color)}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        options = self.options
        of_light, of_color = self._logits(embeddings, batch.ids, progress)
        light = self.color_bank.loss(of_light, options.loss, progress)
        color = self.light_bank.loss(of_color, options.loss, progress)
        own_found = torch.stack([of_light, of_color]).argmax(dim=2) == 0
        return {
            "loss": light + color,
            "light_loss": light,
            "color_loss": color,
            "own_found": own_found.float().mean(),
        }

    def _logits(
        self, embeddings: Mapping[str, Tensor], ids: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """[B, 1 + m] each: lightness among remembered colours, colours among lightness."""
        numbers = own_and_noise(ids, self.options.negatives, len(self.light_bank.memory), progress)
        temperature = self.options.temperature
        return (
            self.color_bank.compare(unit(embeddings["light"]), numbers, temperature),
            self.light_bank.compare(unit(embeddings["color"]), numbers, temperature),
        )

    @override
    @torch.no_grad()
    def after_step(
        self, embeddings: list[dict[str, Tensor]], batches: list[Batch], progress: Progress
    ) -> None:
        """Z of the first batch is kept; each bank follows its own network's features."""
        whole = {key: torch.cat([entry[key] for entry in embeddings]) for key in embeddings[0]}
        ids = torch.cat([batch.ids for batch in batches])
        if self.options.loss == "nce" and progress.step == 0:
            of_light, of_color = self._logits(whole, ids, progress)
            self.color_bank.settle(of_light)
            self.light_bank.settle(of_color)
        self.light_bank.follow(ids, unit(whole["light"]), self.options.bank_momentum)
        self.color_bank.follow(ids, unit(whole["color"]), self.options.bank_momentum)

    @override
    def param_groups(self) -> list[dict[str, object]]:
        return [{"params": list(self.parameters()), "decay": True}]


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Cmc:
    """Raises ConfigError for several views, no noise, or a backbone with three channels alone."""
    if len(facts.view_pixels) != 1:
        raise ConfigError(f"cmc takes one view, not the {len(facts.view_pixels)} given")
    if objective.negatives < 1:
        raise ConfigError(
            f"--objective.negatives is {objective.negatives}; cmc needs at least 1 noise row"
        )
    return Cmc(objective, make_encoder, facts.train_samples)


_RAW = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
"""Mean and std of pixels that stay in [0, 1], whose colours can be converted."""


def augmentation(pixels: int = 224, least_area: float = 0.08) -> Augmentation:
    """A random crop and a flip; CMC `train_CMC.py`, which takes 0.2 for AlexNet alone."""
    crop = recipes.supervised(pixels, scale=(least_area, 1.0))
    return replace(crop, name="cmc", mean=_RAW[0], std=_RAW[1])


PRESETS = {
    "imagenet": Preset(
        backbone="resnet50",
        backbone_options={"zero_init_last": False},
        augmentation=augmentation(),
        test=recipes.center(interpolation="bilinear", mean=_RAW[0], std=_RAW[1]),
        optim=Optim(
            name="sgd",
            learning_rate=0.03,
            scale_with_batch=False,
            warmup_epochs=0,
            schedule="steps",
            milestones=(120 / 240, 160 / 240, 200 / 240),
            weight_decay=1e-4,
        ),
        batch_size=128,
        epochs=240,
        objective=Objective(),
        notes="Two networks of the backbone's full width, resnet50v2 of the code (v1 are halves). "
        "Linear about 63 (the code's README); 66.2 in the paper, 70.6 with twice the width. The "
        "code's weights had 4096 negatives, bf16's forerunner O2 and, but for v1, FastAutoAugment "
        "(0.8 to 1 point); its README expects more of softmax, ycbcr, 65536 negatives and float32, "
        "and probes with learning rates of 30 to 50.",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=augmentation(32, 0.2),
        test=recipes.center(32, 32, mean=_RAW[0], std=_RAW[1]),
        optim=Optim(name="adamw", learning_rate=2e-3, warmup_epochs=1, weight_decay=1e-4),
        batch_size=128,
        epochs=10,
        objective=Objective(negatives=1024, temperature=0.1, projection_dim=64),
        notes="Not from the paper: for two CPU cores; timm's smallest ResNet, twice.",
    ),
}
