"""SimCLR: its loss against a float64 transcription, and its heads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.training.backbones import EncoderFactory
from headrace.training.method import Facts
from headrace.training.methods import simclr
from headrace.training.methods.simclr import nt_xent
from headrace.training.preset import ConfigError
from tests.objective_checks import Array, assert_same, differs, log_softmax, value_and_gradient
from tests.tiny_methods import batch_of, build, module_of, progress_at, small_preset

# ---- eq. 1 and algorithm 1


def nt_xent_oracle(
    embeddings: Array, temperature: float, *, own: bool = False, other_view_only: bool = False
) -> float:
    """embeddings [B, 2, D]. Algorithm 1: the mean of l(i, j) over all 2B ordered positive pairs."""
    samples = len(embeddings)
    unit = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    everyone = [(sample, view) for sample in range(samples) for view in range(2)]
    losses = []
    for sample, view in everyone:
        others = [
            other
            for other in everyone
            if (own or other != (sample, view)) and not (other_view_only and other[1] == view)
        ]
        logits = np.array([unit[sample, view] @ unit[other] / temperature for other in others])
        losses.append(-log_softmax(logits)[others.index((sample, 1 - view))])
    return float(np.mean(losses))


@pytest.mark.parametrize(
    ("samples", "dim", "temperature"), [(2, 3, 0.1), (5, 4, 0.5), (3, 8, 1.0), (1, 4, 0.5)]
)
def test_nt_xent(samples: int, dim: int, temperature: float) -> None:
    random = np.random.default_rng(samples)
    at = random.normal(size=(samples, 2, dim)).astype(np.float32).astype(np.float64)

    def ours(x: Tensor) -> Tensor:
        return nt_xent(x, x, 0, temperature)[0]

    if samples == 1:
        # The partner is the only other view.
        assert float(ours(torch.tensor(at))) == 0
        return
    assert_same(ours, lambda x: nt_xent_oracle(x, temperature), at)
    value = nt_xent_oracle(at, temperature)
    assert differs(value, nt_xent_oracle(at, temperature, own=True))
    assert differs(value, nt_xent_oracle(at, temperature, other_view_only=True))
    assert differs(value, nt_xent_oracle(at, temperature * 1.5))


def test_nt_xent_moves_keys_and_queries() -> None:
    """A stop-gradient on the gathered keys changes the gradient and not the value."""
    x = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(0))
    at = x.double().numpy()
    value, gradient = value_and_gradient(lambda x: nt_xent(x, x, 0, 0.5)[0], at)
    stopped, one_sided = value_and_gradient(lambda x: nt_xent(x, x.detach(), 0, 0.5)[0], at)
    assert value == stopped
    assert np.linalg.norm(gradient - one_sided) > 0.1 * np.linalg.norm(gradient)


def test_nt_xent_of_parts_is_that_of_the_whole() -> None:
    x = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(1))
    whole, found = nt_xent(x, x, 0, 0.3)
    parts = [nt_xent(x[start : start + 2], x, start, 0.3) for start in (0, 2, 4)]
    torch.testing.assert_close(torch.stack([part[0] for part in parts]).mean(), whole)
    assert sum(int(part[1].sum()) for part in parts) == int(found.sum())


def test_nt_xent_recognises_partners() -> None:
    pairs = F.one_hot(torch.arange(4), 8).float()[:, None].expand(4, 2, 8)
    assert nt_xent(pairs, pairs, 0, 0.1)[1].all()
    # Views in a circle, each nearest to its neighbour's: nobody finds the partner.
    wrong = torch.stack([pairs[:, 0], pairs[:, 0].roll(1, dims=0)], dim=1)
    assert not nt_xent(wrong, wrong, 0, 0.1)[1].any()


# ---- the method


def test_simclr_moves_what_it_compares_with() -> None:
    """The method hands the loss its keys with their gradient."""
    method, batch = build("simclr", "test_vit"), batch_of("simclr")
    own = torch.randn(16, 2, 8, requires_grad=True)
    method.objective({"projection": own}, batch, progress_at(0))["loss"].backward()
    direct = own.detach().clone().requires_grad_()
    temperature = small_preset("simclr").objective.temperature
    module_of("simclr").nt_xent(direct, direct, 0, temperature)[0].backward()
    assert own.grad is not None
    assert direct.grad is not None
    torch.testing.assert_close(own.grad, direct.grad)


def test_simclr_wants_two_views() -> None:
    with pytest.raises(ConfigError, match="two views of one size"):
        module_of("simclr").build(
            small_preset("simclr").objective,
            EncoderFactory("test_resnet", {}),
            Facts(0, 64, (32, 32, 16), 16, 4, 20),
        )


def test_simclr_v2_head() -> None:
    """simclr model_util.py, `projection_head`: three layers, the last scaled and not shifted."""
    objective = replace(simclr.PRESETS["v2_imagenet"].objective, projection_dim=24)
    factory = EncoderFactory("test_resnet", {})
    method = simclr.build(objective, factory, Facts(0, 64, (32, 32), 16, 4, 20))
    linear = [layer for layer in method.projection if isinstance(layer, nn.Linear)]
    width = linear[0].in_features
    assert [(layer.in_features, layer.out_features) for layer in linear] == [
        (width, width),
        (width, width),
        (width, 24),
    ]
    norms = [layer for layer in method.projection if isinstance(layer, nn.BatchNorm1d)]
    assert [norm.bias.requires_grad for norm in norms] == [True, True, False]
    assert all(norm.weight.requires_grad for norm in norms)
    assert isinstance(method.projection[-1], nn.BatchNorm1d)
    output: Tensor = method(batch_of("simclr"), progress_at(0))[0]["loss"]
    assert output.isfinite()
