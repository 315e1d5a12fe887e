"""CPC: its loss against a float64 transcription, what a context sees, and how a grid is cut."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from headrace.training.methods.cpc import ContextBlock, GridEncoder, directed, prediction_loss
from tests.objective_checks import Array, assert_same, differs
from tests.tiny_methods import build, finished, progress_at, small_preset

# ---- eq. 4 of arXiv 1807.03748; Lightning Bolts' CPCTask, compute_loss_h


def prediction_oracle(
    predictions: Array,
    targets: Array,
    numbers: list[int],
    negatives: Array,
    negative_numbers: list[int],
    scale: float,
    *,
    doubled: bool = False,
) -> float:
    """doubled: the mistake of a target that is its own negative as well."""
    losses = []
    for n, prediction in enumerate(predictions):
        own = scale * float(prediction @ targets[n])
        others = [
            scale * float(prediction @ negative)
            for m, negative in enumerate(negatives)
            if doubled or negative_numbers[m] != numbers[n]
        ]
        losses.append(np.logaddexp.reduce([own, *others]) - own)
    return float(np.mean(losses))


@pytest.mark.parametrize(("rows", "drawn", "width", "scale"), [(4, 3, 5, 0.1), (2, 6, 3, 1.0)])
def test_prediction(rows: int, drawn: int, width: int, scale: float) -> None:
    random = np.random.default_rng(rows)
    shapes = (rows, width), (rows, width), (drawn, width)
    whole = random.uniform(-2, 2, sum(a * b for a, b in shapes))
    ends = np.cumsum([a * b for a, b in shapes])
    numbers, negative_numbers = list(range(rows)), [1, *range(10, 9 + drawn)]

    def ours(x: Tensor) -> Tensor:
        parts = x.tensor_split(ends[:2].tolist())
        predictions, targets, negatives = (
            part.view(shape) for part, shape in zip(parts, shapes, strict=True)
        )
        return prediction_loss(
            predictions, targets, torch.tensor(numbers), negatives,
            torch.tensor(negative_numbers), scale,
        )[0]  # fmt: skip

    def oracle(x: Array, **mistake: bool) -> float:
        predictions, targets, negatives = (
            part.reshape(shape) for part, shape in zip(np.split(x, ends[:2]), shapes, strict=True)
        )
        return prediction_oracle(
            predictions, targets, numbers, negatives, negative_numbers, scale, **mistake
        )

    assert_same(ours, oracle, whole)
    assert differs(oracle(whole), oracle(whole, doubled=True))


# ---- the networks


def test_a_context_sees_nothing_of_what_it_predicts() -> None:
    """In each direction: what lies ahead of a place has no part in its context."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(ContextBlock(4, 6), ContextBlock(4, 6))
    for direction in range(4):
        grid = torch.randn(1, 4, 5, 5, requires_grad=True)
        context = network(directed(grid, direction))
        context[..., 2, :].sum().backward()
        assert grid.grad is not None
        seen = directed(grid.grad.abs().sum(1), direction)[0]
        assert not seen[3:].any()
        assert seen[:3].any(dim=1).all()


def test_directions_are_the_four() -> None:
    grid = torch.arange(9).view(3, 3)
    turned = [directed(grid, direction) for direction in range(4)]
    assert [int(each[1, 1] - each[0, 1]) for each in turned] == [3, -3, 1, -1]


def test_a_grid_is_cut_row_by_row() -> None:
    class Corner(torch.nn.Module):
        num_features = 2

        def forward(self, x: Tensor) -> Tensor:
            return x[:, 1, :2, 0]

    encoder = GridEncoder(Corner(), 4, 3)
    picture = torch.arange(300.0).view(1, 3, 10, 10)
    grid = encoder.grid(picture)
    assert grid.shape == (1, 2, 3, 3)
    assert grid[0, 0].tolist() == picture[0, 1, ::3, ::3][:3, :3].tolist()
    torch.testing.assert_close(encoder(picture), grid.mean((2, 3)))


# ---- the method


def test_cpc_learns_from_patches_of_the_same_picture_only() -> None:
    """Its loss is a chance level where predictions say nothing."""
    method = build("cpc", "test_resnet")
    batch = finished(small_preset("cpc").augmentation, torch.arange(16))
    embeddings = method.embed(batch, progress_at(0))
    silent = {**embeddings, "predictions": torch.zeros_like(embeddings["predictions"])}
    outputs = method.objective(silent, batch, progress_at(0))
    # 24 negatives, fewer by one where the target is among them.
    assert F.softplus(torch.tensor(23.0).log()) - 1e-4 <= outputs["loss"]
    assert outputs["loss"] <= F.softplus(torch.tensor(24.0).log()) + 1e-4
