"""Which row of a bank is the sample's own? Noise-contrastive estimation over all samples of a set.

Gutmann & Hyvärinen 2010, as Wu et al. 2018 (NPID, section 3.2) and Tian et al. 2019 (CMC, appendix)
use it: a bank keeps a feature of every sample, and a sample is compared with its own row and with m
rows that are drawn at random. The bank costs 4 * N * D bytes on every device, a step reads
B * (m + 1) of its rows.

Logits are cosines over a temperature, in float32 under autocast too. Probabilities stay logarithms
throughout: exp(1 / 0.07) is 1.6e6, and that of a smaller temperature leaves float32's range.
"""

import math
from typing import Literal, assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.training.blocks.memory import RowMemory
from headrace.training.collectives import gather_rows, rank, world_size
from headrace.training.method import Progress

EPSILON = 1e-7
"""What the code adds to both denominators (`NCECriterion.py`)."""


def nce_loss(logits: Tensor, log_normalizer: Tensor, samples: int) -> Tensor:
    """-log h(own) - sum over m noise rows of log(1 - h(noise)), mean over the batch, in nats.

    logits: [n, 1 + m], the own row's first; log_normalizer: scalar, log Z. With the probability
    P = exp(logit) / Z of a row, h = P / (P + m / N) tells own from noise; N is `samples`. Eq. 4 to
    8 of Wu et al. 2018; lemniscate and CMC `NCECriterion.py`, whose 1e-7 beside m / N is kept.
    """
    noise = logits.shape[1] - 1
    log_share = math.log(noise / samples + EPSILON)
    odds = logits.float() - log_normalizer - log_share
    # log(1 - h) has m / N alone in its numerator.
    excess = log_share - math.log(noise / samples)
    losses = F.softplus(-odds[:, 0]) + F.softplus(odds[:, 1:]).sum(dim=1) + noise * excess
    return losses.mean()


def softmax_loss(logits: Tensor) -> Tensor:
    """-log softmax(logits)[own], mean over the batch, in nats. logits: [n, 1 + m], own row first.

    CMC `NCECriterion.py`, `NCESoftmaxLoss`: the softmax is over the own row and the drawn ones.
    """
    first = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return F.cross_entropy(logits.float(), first)


def estimate_log_normalizer(logits: Tensor, samples: int) -> Tensor:
    """log(N * mean(exp(logits))), mean over all ranks' batches and the own rows too; no gradient.

    lemniscate `NCEAverage.py`: `params[2] = out.mean() * outputSize`.
    """
    log_mean = logits.detach().float().flatten().logsumexp(dim=0) - math.log(logits.numel())
    log_means = gather_rows(log_mean[None])
    return log_means.logsumexp(dim=0) - math.log(len(log_means)) + math.log(samples)


def own_and_noise(ids: Tensor, noise: int, samples: int, progress: Progress) -> Tensor:
    """int64 [n, 1 + noise]: each sample's own row number, then uniform ones, with replacement.

    As in the code, a sample's own row may be among the noise. The same for every split of the batch
    over ranks; micro-batches of one step see the same noise.
    """
    generator = progress.generator("noise", ids.device)
    size = world_size() * len(ids), noise
    everyone = torch.randint(samples, size, generator=generator, device=ids.device)
    return torch.cat([ids[:, None], everyone[rank() * len(ids) :][: len(ids)]], dim=1)


class FeatureBank(nn.Module):
    """A row per sample, equal on all ranks, and log Z of what is compared with them.

    Rows start uniform in a cube, of length 1 on average. Z is estimated from the first batch and
    constant afterwards: it is state, and in the checkpoint. Rows of samples that a run never shows
    (a hold-out, --data.subset) stay random and still serve as noise.
    """

    log_normalizer: Tensor

    def __init__(self, samples: int, dim: int) -> None:
        super().__init__()
        half = math.sqrt(3 / dim)
        self.memory = RowMemory(torch.empty(samples, dim).uniform_(-half, half))
        self.register_buffer("log_normalizer", torch.zeros(()))

    def compare(self, features: Tensor, numbers: Tensor, temperature: float) -> Tensor:
        """Unit features float32 [n, D], row numbers int64 [n, k] -> logits [n, k]."""
        with torch.autocast(features.device.type, enabled=False):
            return torch.einsum("nkd,nd->nk", self.memory(numbers), features) / temperature

    def loss(self, logits: Tensor, kind: Literal["nce", "softmax"], progress: Progress) -> Tensor:
        """logits: [n, 1 + m] of `own_and_noise`. In the first step by the batch's own Z."""
        match kind:
            case "nce":
                first = progress.step == 0
                samples = len(self.memory)
                log_z = estimate_log_normalizer(logits, samples) if first else self.log_normalizer
                return nce_loss(logits, log_z, samples)
            case "softmax":
                return softmax_loss(logits)
            case _:
                assert_never(kind)

    @torch.no_grad()
    def settle(self, logits: Tensor) -> None:
        """Keep the Z of the first batch; logits of this rank's samples."""
        self.log_normalizer.copy_(estimate_log_normalizer(logits, len(self.memory)))

    @torch.no_grad()
    def follow(self, ids: Tensor, features: Tensor, momentum: float) -> None:
        """row <- momentum * row + (1 - momentum) * feature, made a unit vector again.

        ids: int64 [n], features: unit vectors [n, D], of this rank's samples.
        """
        ids, features = gather_rows(ids), gather_rows(features)
        rows = torch.lerp(features, self.memory(ids), momentum)
        self.memory.write(ids, F.normalize(rows, dim=1))


def unit(features: Tensor) -> Tensor:
    """[n, D] -> float32 rows of length 1."""
    return F.normalize(features.float(), dim=1)
