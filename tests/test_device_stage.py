"""Normalisation: its formula, its memory format, its dtypes."""

import numpy as np
import pytest
import torch

from pipelines.batch import Batch
from pipelines.engines.device_stage import device_stage, normalize
from pipelines.recipe import IMAGENET_MEAN, IMAGENET_STD


def random_view(*shape: int) -> torch.Tensor:
    batch, height, width = shape
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def exact(view: torch.Tensor) -> np.ndarray:
    values = view.permute(0, 2, 3, 1).numpy().astype(np.float64) / 255
    return ((values - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
)
@pytest.mark.parametrize("shape", [(5, 32, 32), (1, 7, 3), (2, 16, 24)])
def test_normalize_is_its_formula(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    view = random_view(*shape)
    before = view.clone()
    found = normalize(view, IMAGENET_MEAN, IMAGENET_STD, dtype)
    assert found.dtype == dtype
    assert found.shape == view.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert np.abs(found.double().numpy() - exact(view)).max() <= tolerance
    assert torch.equal(view, before)


def test_lower_precision_is_the_rounded_float32() -> None:
    view = random_view(2, 8, 8)
    full = normalize(view, IMAGENET_MEAN, IMAGENET_STD)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(normalize(view, IMAGENET_MEAN, IMAGENET_STD, dtype), full.to(dtype))


def test_any_strides_give_the_same() -> None:
    view = random_view(3, 10, 12)
    expected = normalize(view, IMAGENET_MEAN, IMAGENET_STD)
    planar = view.contiguous(memory_format=torch.contiguous_format)
    assert torch.equal(normalize(planar, IMAGENET_MEAN, IMAGENET_STD), expected)
    assert torch.equal(normalize(view[1:], IMAGENET_MEAN, IMAGENET_STD), expected[1:])


def test_a_batch_keeps_everything_else() -> None:
    views = (random_view(2, 8, 8), random_view(2, 4, 4))
    mask = torch.tensor([[True, False], [False, True]])
    batch = Batch(
        views=views,
        labels=torch.tensor([3, -1]),
        ids=torch.tensor([7, 9]),
        masks=(mask, None),
        epoch=4,
        position=64,
        draws={"turn": torch.tensor([1, 2])},
    )
    found = device_stage(batch, IMAGENET_MEAN, IMAGENET_STD, device=torch.device("cpu"))
    for view, normalized in zip(views, found.views, strict=True):
        assert torch.equal(normalized, normalize(view, IMAGENET_MEAN, IMAGENET_STD))
    assert found.masks[0] is not None
    assert torch.equal(found.masks[0], mask)
    assert found.masks[1] is None
    assert (found.labels.tolist(), found.ids.tolist()) == ([3, -1], [7, 9])
    assert (found.epoch, found.position, found.draws["turn"].tolist()) == (4, 64, [1, 2])
