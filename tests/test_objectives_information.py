"""CPC's and DIM's losses against float64 transcriptions, entry by entry."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from headrace.training.backbones import EncoderFactory
from headrace.training.blocks.adversary import deception_loss, discriminator_loss
from headrace.training.method import Facts
from headrace.training.methods.cpc import ContextBlock, GridEncoder, directed, prediction_loss
from headrace.training.methods.dim import Scored, information_loss
from headrace.training.preset import ConfigError
from tests.objective_checks import Array, assert_same, differs, value_and_gradient
from tests.tiny_methods import (
    batch_of,
    build,
    finished,
    module_of,
    progress_at,
    small_preset,
)

# ---- DIM: eq. 2, 4 and 5 of arXiv 1808.06670; DIM `dim_losses.py` (fenchel_dual_loss, nce_loss,
# donsker_varadhan_loss) and `gan_losses.py` (get_positive_expectation, get_negative_expectation)


def softplus(x: float) -> float:
    return float(np.logaddexp(0, x))


def information_oracle(
    places: Array, summaries: Array, measure: str, *, own: bool = False
) -> float:
    """own: the mistake of counting a picture's own places among its negatives."""
    pictures, length, _ = places.shape
    positive, negative, per_pair = [], [], []
    for n in range(pictures):
        others = [
            float(summaries[n] @ places[b, l])
            for b in range(pictures)
            for l in range(length)  # noqa: E741
            if own or b != n
        ]
        negative += others
        for l in range(length):  # noqa: E741
            u = float(summaries[n] @ places[n, l])
            positive.append(u)
            per_pair.append(np.logaddexp(u, np.logaddexp.reduce(others)) - u)
    match measure:
        case "jsd":
            # E- of softplus(-q) + q - log 2, minus E+ of log 2 - softplus(-p)
            lower = np.mean([softplus(-q) + q - np.log(2) for q in negative])
            upper = np.mean([np.log(2) - softplus(-p) for p in positive])
            return float(lower - upper)
        case "infonce":
            return float(np.mean(per_pair))
        case _:
            return float(np.log(np.mean(np.exp(negative))) - np.mean(positive))


@pytest.mark.parametrize("measure", ["jsd", "infonce", "dv"])
@pytest.mark.parametrize(("pictures", "length", "width"), [(3, 2, 4), (2, 5, 3), (5, 1, 2)])
def test_information(pictures: int, length: int, width: int, measure: Any) -> None:
    random = np.random.default_rng(width)
    places = random.uniform(-1, 1, (pictures, length, width))
    summaries = random.uniform(-1, 1, (pictures, width))
    both = np.concatenate([places.reshape(-1), summaries.reshape(-1)])
    cut = places.size

    def ours(x: Tensor) -> Tensor:
        return information_loss(
            x[:cut].view(places.shape), x[cut:].view(summaries.shape), 0, measure
        )

    def oracle(x: Array, **mistake: bool) -> float:
        return information_oracle(
            x[:cut].reshape(places.shape), x[cut:].reshape(summaries.shape), measure, **mistake
        )

    assert_same(ours, oracle, both)
    assert differs(oracle(both), oracle(both, own=True))
    # Places take a gradient too: a stop there would be seen.
    _, gradient = value_and_gradient(ours, both)
    assert np.linalg.norm(gradient[:cut]) > 0.1 * np.linalg.norm(gradient)


def test_information_of_parts_is_that_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    places, summaries = torch.randn(6, 3, 4, generator=generator), torch.randn(6, 4)
    for measure in ("jsd", "infonce"):
        parts = [information_loss(places, summaries[i : i + 2], i, measure) for i in (0, 2, 4)]
        whole = information_loss(places, summaries, 0, measure)
        torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_information_of_large_scores_is_finite() -> None:
    places = torch.randn(4, 3, 8) * 300
    for measure in ("jsd", "infonce", "dv"):
        summaries = (torch.randn(4, 8) * 300).requires_grad_()
        loss = information_loss(places, summaries, 0, measure)
        loss.backward()
        assert loss.isfinite()
        assert summaries.grad is not None
        assert summaries.grad.isfinite().all()


def test_the_adversary_s_losses_are_those_of_the_gan() -> None:
    """Eq. 7: max log D(prior) + log(1 - D(summary)); the encoder: max log D(summary)."""
    random = np.random.default_rng(0)
    prior, summary = random.normal(size=(2, 5, 1))

    def sigmoid(x: Array) -> Array:
        return 1 / (1 + np.exp(-x))

    as_tensors = torch.tensor(prior), torch.tensor(summary)
    told = -np.log(sigmoid(prior)).mean() - np.log(1 - sigmoid(summary)).mean()
    assert float(discriminator_loss(*as_tensors)) == pytest.approx(told, rel=1e-6)
    assert float(deception_loss(as_tensors[1])) == pytest.approx(-np.log(sigmoid(summary)).mean())


def test_dim_prior_does_not_move_the_encoder_in_its_own_phase() -> None:
    method = build("dim", "test_resnet")
    names = list(method.phases())
    assert names == ["prior", "main"]
    outputs, _ = method(batch_of("dim"), replace(progress_at(0), phase="prior"))
    outputs["loss"].backward()
    moved = {key.split(".")[0] for key, p in method.named_parameters() if p.grad is not None}
    assert moved == {"discriminator"}


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_dim_global_and_local_build_what_they_need(weights: tuple[float, float]) -> None:
    method = build("dim", "test_resnet", global_weight=weights[0], local_weight=weights[1])
    outputs, _ = method(batch_of("dim"), progress_at(0))
    assert {name for name in ("global", "local") if name in outputs} == {
        name for name, weight in zip(("global", "local"), weights, strict=True) if weight > 0
    }


def test_dim_refuses_what_holds_no_pair() -> None:
    module, objective = module_of("dim"), small_preset("dim").objective
    factory = EncoderFactory("test_resnet", {})
    with pytest.raises(ConfigError, match="batch-size 1 holds no pair"):
        module.build(objective, factory, Facts(0, 64, (32,), 1, 64, 320))
    nothing = replace(objective, local_weight=0.0, global_weight=0.0)
    with pytest.raises(ConfigError, match="global-weight above 0"):
        module.build(nothing, factory, Facts(0, 64, (32,), 16, 4, 20))


def test_dim_scores_begin_with_a_noisy_copy_where_there_is_room() -> None:
    for width, hidden in ((3, 8), (8, 8), (8, 3)):
        weight = Scored(width, hidden).shortcut.weight.detach()
        near = weight - torch.eye(hidden, width)
        assert (float(near.abs().max()) <= 0.01) == (hidden >= width)


# ---- CPC: eq. 4 of arXiv 1807.03748; Lightning Bolts' CPCTask, compute_loss_h


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
