"""Views of several sizes: which come first, and how they go through a network."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from headrace.training.preset import ConfigError

GLOBAL_VIEWS = 2  # they come first in a batch; what other views predict is taken from these


def by_size(views: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, [n * B, 3, H, W]) for each run of views of one size: one forward pass each."""
    for _, run in groupby(enumerate(views), key=lambda entry: entry[1].shape):
        indices, same = zip(*run, strict=True)
        yield list(indices), torch.cat(same)


def require_global_views(method: str, view_pixels: Sequence[int]) -> None:
    """Raises ConfigError where the augmentation has not the two global views first."""
    sizes = view_pixels
    if len(sizes) < GLOBAL_VIEWS or sizes[0] != sizes[1] or max(sizes) != sizes[0]:
        raise ConfigError(
            f"{method} needs two global views of one size before any smaller ones, and the "
            f"augmentation's views have {list(sizes)} pixels"
        )
