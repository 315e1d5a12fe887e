"""DIM: its bounds of the information against float64 transcriptions, and its two phases."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.training.backbones import EncoderFactory
from headrace.training.method import Facts
from headrace.training.methods.dim import Scored, information_loss
from headrace.training.preset import ConfigError
from tests.objective_checks import Array, assert_same, differs, value_and_gradient
from tests.tiny_methods import batch_of, build, module_of, progress_at, small_preset

# ---- eq. 2, 4 and 5; DIM `dim_losses.py` (fenchel_dual_loss, nce_loss, donsker_varadhan_loss) and
# ---- `gan_losses.py` (get_positive_expectation, get_negative_expectation)


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


# ---- the method


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
