"""CMC: its loss against a float64 transcription, its two networks and their banks."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.pipelines.batch import Batch
from headrace.training.blocks.heads import feature_dim
from headrace.training.blocks.nce import own_and_noise, unit
from headrace.training.methods.cmc import Cmc, SplitEncoder, split_colors
from headrace.training.preset import ConfigError
from tests.bank_checks import assert_normalizer_is_that_of_the_first_batch, nce_oracle
from tests.color_checks import corners
from tests.objective_checks import (
    Array,
    as_float32,
    assert_same,
    differs,
    log_softmax,
    tensor,
    unit_rows,
)
from tests.tiny_methods import SAMPLES, batch_of, build, progress_at


@pytest.mark.parametrize("loss", ["nce", "softmax"])
def test_cmc_compares_each_side_with_the_other_sides_bank(loss: str) -> None:
    """CMC NCE/NCEAverage.py: memory_l against ab, memory_ab against l; train_CMC.py adds both."""
    method = build("cmc", "test_resnet", loss=loss)
    assert isinstance(method, Cmc)
    batch: Batch = batch_of("cmc", samples=4)
    banks = method.light_bank, method.color_bank
    for bank, log_z in zip(banks, (5.0, 4.0), strict=True):
        bank.log_normalizer.fill_(log_z)
    memory_l, memory_ab = (bank.memory.rows.double().numpy() for bank in banks)
    numbers = own_and_noise(batch.ids, method.options.negatives, SAMPLES, progress_at(2)).numpy()
    temperature, random = method.options.temperature, np.random.default_rng(0)
    light, color = (as_float32(random.normal(size=(4, memory_l.shape[1]))) for _ in range(2))

    def direction(x: Array, memory: Array, z: float) -> float:
        if loss == "nce":
            return nce_oracle(x, memory, numbers, temperature, z)
        logits = np.einsum("nkd,nd->nk", memory[numbers], unit_rows(x)) / temperature
        return float(-np.mean([log_softmax(row)[0] for row in logits]))

    def oracle(l: Array, ab: Array) -> float:  # noqa: E741
        return direction(l, memory_ab, math.exp(4.0)) + direction(ab, memory_l, math.exp(5.0))

    def ours(l: Tensor, ab: Tensor) -> Tensor:  # noqa: E741
        return method.objective({"light": l, "color": ab}, batch, progress_at(2))["loss"]

    assert_same(lambda x: ours(x, tensor(color)), lambda x: oracle(x, color), light)
    assert_same(lambda x: ours(tensor(light), x), lambda x: oracle(light, x), color)
    assert differs(oracle(light, color), oracle(color, light))
    assert differs(oracle(light, color), oracle(light, color) / 2)


def test_normalizer_is_that_of_the_first_batch_for_ever() -> None:
    assert_normalizer_is_that_of_the_first_batch("cmc", count=2)


def test_colors_are_scaled_as_in_the_code() -> None:
    """CMC train_CMC.py, get_train_loader: Lab's channels end at -1 and 1 over all sRGB colours."""
    light, color = split_colors(corners(), "lab")
    assert (light.shape, color.shape) == ((1, 1, 4, 8), (1, 2, 4, 8))
    for channel in (light[0, 0], *color[0]):
        assert float(channel.min()) == pytest.approx(-1, abs=2e-4)
        assert float(channel.max()) == pytest.approx(1, abs=2e-4)
    light, color = split_colors(torch.ones(1, 3, 2, 2), "ycbcr")
    assert float(light.mean()) == pytest.approx((235 - 116.151) / 109.5, abs=1e-4)
    assert float(color[0, 0].mean()) == pytest.approx((128 - 121.080) / 111.855, abs=1e-4)
    assert float(color[0, 1].mean()) == pytest.approx((128 - 132.342) / 111.964, abs=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(split_colors(corners(), "lab")[0], split_colors(corners(), "lab")[0])
        assert split_colors(corners(), "lab")[0].dtype == torch.float32


def cmc() -> Cmc:
    method = build("cmc", "test_resnet")
    assert isinstance(method, Cmc)
    return method


def test_each_network_sees_its_own_channels() -> None:
    method = cmc().eval()
    encoder = method.encoder
    assert isinstance(encoder, SplitEncoder)
    pictures = batch_of("cmc").views[0][:4]
    features = encoder(pictures)
    assert features.shape == (4, feature_dim(encoder))
    light, color = encoder.both(pictures)
    assert torch.equal(features, torch.cat([light, color], dim=1))
    # Of a grey picture Lab's a and b say nothing.
    gray = pictures.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    _, of_gray = encoder.both(gray)
    torch.testing.assert_close(of_gray, of_gray[:1].expand_as(of_gray), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(encoder.both(gray)[0][0], encoder.both(gray)[0][1], rtol=1e-3)
    assert not torch.allclose(color[0], color[1], rtol=1e-3)


def test_cmc_banks_follow_their_own_network() -> None:
    method, batch = cmc(), batch_of("cmc")
    before = [bank.memory.rows.clone() for bank in (method.light_bank, method.color_bank)]
    embeddings = {key: value.detach() for key, value in method.embed(batch, progress_at(1)).items()}
    method.after_step([embeddings], [batch], progress_at(1))
    banks = method.light_bank, method.color_bank
    for key, bank, rows in zip(("light", "color"), banks, before, strict=True):
        mixed = 0.5 * rows[batch.ids] + 0.5 * unit(embeddings[key])
        torch.testing.assert_close(bank.memory.rows[batch.ids], unit(mixed))


def test_an_impossible_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="cmc needs at least 1 noise row"):
        build("cmc", "test_resnet", negatives=0)
