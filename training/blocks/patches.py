"""Pictures as patches, and what masked modelling asks of those that were removed: their pixels."""

import torch
from torch import Tensor

from headrace.pipelines.masks import RandomMask
from headrace.training.method import Facts
from headrace.training.preset import ConfigError


def patchify(pictures: Tensor, patch: int) -> Tensor:
    """[B, 3, H, W] -> [B, N, patch * patch * 3]: patches row by row, each as its pixels' RGB."""
    batch, channels, height, width = pictures.shape
    cut = pictures.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: Tensor, rows: int) -> Tensor:
    """[B, N, patch * patch * 3] -> [B, 3, H, W] of `rows` patches one above the other."""
    batch, count, values = patches.shape
    patch = round((values // 3) ** 0.5)
    cut = patches.reshape(batch, rows, count // rows, patch, patch, 3)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, rows * patch, -1)


def patch_moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """[..., P] -> mean and deviation [..., 1], from the unbiased variance with 1e-6 added."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def normalize_patches(patches: Tensor) -> Tensor:
    """[..., P]: each patch without its `patch_moments`."""
    mean, deviation = patch_moments(patches)
    return (patches - mean) / deviation


def reconstruction_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the masked patches (mae, section 3, `models_mae.py`, `forward_loss`;
    SparK, section 3.3, `spark.py`, `forward`).

    prediction, target: [B, N, P]; mask: bool [B, N], True = removed. The mean over P, then the sum
    over the masked patches of the batch divided by their number. Returns a float32 scalar.
    """
    errors = (prediction.float() - target.float()).square().mean(dim=-1)
    return (errors * mask).sum() / mask.sum()


def if_even(loss: Tensor, mask: Tensor, removed: int) -> Tensor:
    """The loss where each sample misses `removed` patches of mask [B, N], else NaN.

    A mask of another size would be mistaken for another one; not finite, its loss ends the run.
    Ranks then have equally many, so that the mean over them is the global batch's.
    """
    return torch.where((mask.sum(dim=1) == removed).all(), loss, torch.nan)


def as_pictures(
    prediction: Tensor, pictures: Tensor, rows: int, *, normalized: bool
) -> tuple[Tensor, str]:
    """[B, N, P] -> pictures [B, 3, H, W], and what was added to the prediction, in words.

    normalized: the prediction has no mean and deviation of its own, and gets those of the true
    patches, as SparK `spark.py`, `forward(vis=True)`, has it; MAE's own demonstration shows a model
    that predicts plain pixels.
    """
    if not normalized:
        return unpatchify(prediction.float(), rows), "as predicted"
    mean, deviation = patch_moments(patchify(pictures.float(), pictures.shape[2] // rows))
    painted = unpatchify(prediction.float() * deviation + mean, rows)
    return painted, "with each patch's true mean and deviation"


def mask_over(method: str, mask: Tensor | None, patches: int) -> Tensor:
    """The mask, bool [B, patches]. Raises ConfigError for a batch without one, or another one."""
    if mask is None or mask.ndim != 2 or mask.shape[1] != patches:
        given = "no mask" if mask is None else f"a mask over {mask.shape[-1]} patches"
        raise ConfigError(f"{method} needs masks over {patches} patches, and the batch has {given}")
    return mask


def random_mask(method: str, facts: Facts) -> RandomMask:
    """Of a run's one view. Raises ConfigError where it has another one, or more views."""
    mask = facts.masks[0] if len(facts.masks) == 1 else None
    if not isinstance(mask, RandomMask):
        names = [None if mask is None else type(mask).__name__ for mask in facts.masks]
        raise ConfigError(
            f"{method} needs one view with a RandomMask, and the masks of the augmentation's views "
            f"are {names}"
        )
    return mask
