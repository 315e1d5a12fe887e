"""Global views through a student that sees part of them masked, and through its teacher.

iBOT and DINOv2: class tokens of every view, patch tokens of the two global ones.
"""

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from headrace.pipelines.batch import Batch
from headrace.pipelines.masks import Mask
from headrace.training.blocks.drop_path import set_keys
from headrace.training.blocks.tokens import (
    embed_patches,
    encode_tokens,
    masked_patches,
    most_masked,
    require_patches,
)
from headrace.training.blocks.views import GLOBAL_VIEWS, by_size
from headrace.training.method import Progress
from headrace.training.preset import ConfigError


def masked_places(method: str, masks: Sequence[Mask | None], encoder: VisionTransformer) -> int:
    """The most patches that may be masked in a global view. masks: as declared, one per view.

    Raises ConfigError without a class token, and where a global view has no mask, or one over
    other patches.
    """
    if encoder.cls_token is None:
        raise ConfigError(
            f"{method} compares class tokens, and the backbone has none with these options: leave "
            f"out --backbone-options class_token=False"
        )
    global_masks = [mask for mask in masks[:GLOBAL_VIEWS] if mask is not None]
    if len(global_masks) < GLOBAL_VIEWS:
        raise ConfigError(f"{method} needs masks on the augmentation's two global views")
    for mask in global_masks:
        require_patches(method, mask, encoder)
    return max(most_masked(mask, encoder.patch_embed.num_patches) for mask in global_masks)


def teacher_tokens(teacher: VisionTransformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Class tokens [2 * B, D] and patch tokens [2 * B, N, D] of the whole global views."""
    pictures = torch.cat(batch.views[:GLOBAL_VIEWS])
    tokens = encode_tokens(teacher, embed_patches(teacher, pictures))
    return tokens[:, 0], tokens[:, teacher.num_prefix_tokens :]


def student_tokens(
    student: VisionTransformer, mask_token: Tensor, batch: Batch, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Class tokens [V * B, D] of all views and patch tokens [2 * B, N, D] of the global ones.

    In a global view `mask_token` stands for what its mask removes; local views are whole.
    """
    set_keys(student, batch.ids, range(GLOBAL_VIEWS), progress)
    pictures, mask = torch.cat(batch.views[:GLOBAL_VIEWS]), _masks(batch)
    tokens = encode_tokens(student, embed_patches(student, pictures, mask, mask_token))
    classes = [tokens[:, 0]]
    for views, pictures in by_size(batch.views[GLOBAL_VIEWS:]):
        set_keys(student, batch.ids, [GLOBAL_VIEWS + view for view in views], progress)
        classes.append(encode_tokens(student, embed_patches(student, pictures))[:, 0])
    return torch.cat(classes), tokens[:, student.num_prefix_tokens :]


def places(batch: Batch, count: int) -> tuple[Tensor, Tensor]:
    """`masked_patches` of the global views: int64 and bool [2 * B, count]."""
    return masked_patches(_masks(batch), count)


def counted(batch: Batch, count: int) -> Tensor:
    """bool [B, 2, count]: which of these places are masked."""
    return by_sample(places(batch, count)[1], batch)


def by_sample(tensor: Tensor, batch: Batch) -> Tensor:
    """[V * B, ...], view by view -> [B, V, ...]."""
    return tensor.unflatten(0, (-1, len(batch))).transpose(0, 1)


def _masks(batch: Batch) -> Tensor:
    """bool [2 * B, N]"""
    return torch.cat([mask for mask in batch.masks[:GLOBAL_VIEWS] if mask is not None])
