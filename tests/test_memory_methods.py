"""Banks, pairs and colours: what npid, cmc and pair do beyond their losses and every contract."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.training.blocks.color import rgb_to_lab, rgb_to_ycbcr
from headrace.training.blocks.heads import feature_dim
from headrace.training.blocks.nce import FeatureBank, own_and_noise, unit
from headrace.training.method import Method
from headrace.training.methods.cmc import Cmc, SplitEncoder, split_colors
from headrace.training.methods.npid import Npid
from headrace.training.methods.pair import Pair
from headrace.training.preset import ConfigError
from tests.objective_checks import differs
from tests.tiny_methods import SAMPLES, batch_of, build, progress_at, sgd, train_step

# ---- noise, banks and Z


def test_noise_is_uniform_and_of_the_step() -> None:
    ids = torch.arange(64)
    drawn = own_and_noise(ids, 500, 64, progress_at(3))
    assert torch.equal(drawn[:, 0], ids)
    counts = drawn[:, 1:].flatten().bincount(minlength=64)
    assert len(counts) == 64
    assert counts.min() > 400
    assert counts.max() < 600
    assert torch.equal(drawn, own_and_noise(ids, 500, 64, progress_at(3)))
    assert not torch.equal(drawn, own_and_noise(ids, 500, 64, progress_at(4)))


def test_bank_keeps_the_share_of_its_momentum() -> None:
    bank = FeatureBank(6, 3)
    assert not torch.allclose(bank.memory.rows.norm(dim=1), torch.ones(6))
    before, features = bank.memory.rows.clone(), unit(torch.randn(2, 3))
    bank.follow(torch.tensor([4, 1]), features, 0.8)
    for row, feature in ((4, features[0]), (1, features[1])):
        mixed = 0.8 * before[row] + 0.2 * feature
        torch.testing.assert_close(bank.memory.rows[row], mixed / mixed.norm())
    assert torch.equal(bank.memory.rows[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


def test_bank_starts_with_rows_of_length_1_on_average() -> None:
    rows = FeatureBank(2000, 32).memory.rows
    assert float(rows.square().sum(dim=1).mean()) == pytest.approx(1, abs=0.02)
    assert float(rows.abs().max()) <= math.sqrt(3 / 32)


def normalizers(method: Method) -> dict[str, Tensor]:
    state = method.state_dict()
    return {key: value.clone() for key, value in state.items() if key.endswith("log_normalizer")}


@pytest.mark.parametrize(("name", "count"), [("npid", 1), ("cmc", 2)])
def test_normalizer_is_that_of_the_first_batch_for_ever(name: str, count: int) -> None:
    method, batches = build(name, "test_resnet"), [batch_of(name, seed=seed) for seed in range(3)]
    first, _ = copy.deepcopy(method)(batches[0], progress_at(0))
    found = []
    for step in range(3):
        loss = train_step(method, sgd(method), [batches[step]], progress_at(step))
        if step == 0:
            assert torch.equal(loss, first["loss"])
        found.append(normalizers(method))
    assert len(found[0]) == count
    assert found[0] == found[1] == found[2]
    assert all(value > math.log(SAMPLES) for value in found[0].values())
    # The first step is the batch's own business; later ones go by what is remembered.
    changed = copy.deepcopy(method)
    for key, buffer in changed.named_buffers():
        if key.endswith("log_normalizer"):
            buffer += 1
    for step, same in ((0, True), (3, False)):
        losses = [
            copy.deepcopy(m)(batches[0], progress_at(step))[0]["loss"] for m in (method, changed)
        ]
        assert torch.equal(*losses) == same


def test_first_step_estimates_from_its_own_logits() -> None:
    method, batch = build("npid", "test_resnet"), batch_of("npid")
    assert isinstance(method, Npid)
    features = unit(method.embed(batch, progress_at(0))["projection"].detach())
    rows = method.bank.memory.rows.clone()
    numbers = own_and_noise(batch.ids, method.options.negatives, SAMPLES, progress_at(0))
    cosines = np.einsum("nkd,nd->nk", rows[numbers].double().numpy(), features.double().numpy())
    z = np.exp(cosines / method.options.temperature).mean() * SAMPLES
    train_step(method, sgd(method), [batch], progress_at(0))
    assert float(method.bank.log_normalizer) == pytest.approx(math.log(z), rel=1e-5)


def test_state_of_a_softmax_needs_no_normalizer() -> None:
    method = build("npid", "test_resnet", loss="softmax")
    train_step(method, sgd(method), [batch_of("npid")], progress_at(0))
    assert [float(value) for value in normalizers(method).values()] == [0.0]


def test_proximal_term_is_added_with_its_weight() -> None:
    batch, losses = batch_of("npid"), []
    for weight in (0.0, 1.0, 3.0):
        method = build("npid", "test_resnet", proximal_weight=weight)
        losses.append(float(method(batch, progress_at(1))[0]["loss"].detach()))
    assert losses[1] > losses[0]
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-4)


# ---- pairs


def test_pairs_are_with_all_others_or_with_one() -> None:
    every, one = (build("pair", "test_resnet", partners=partners) for partners in ("all", "one"))
    assert isinstance(every, Pair)
    assert isinstance(one, Pair)
    device = torch.device("cpu")
    assert [sorted(row) for row in every._others(5, progress_at(0), device).tolist()] == [
        [other for other in range(5) if other != own] for own in range(5)
    ]
    drawn = [one._others(5, progress_at(step), device).flatten().tolist() for step in range(20)]
    for partners in drawn:
        assert sorted(partners) == list(range(5))
        assert all(partner != own for own, partner in enumerate(partners))
    assert len({tuple(partners) for partners in drawn}) > 5


@pytest.mark.parametrize("partners", ["all", "one"])
def test_logistic_pairs_learn(partners: str) -> None:
    method = build("pair", "test_resnet", loss="logistic", partners=partners)
    batch = batch_of("pair", samples=8)
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    losses = [train_step(method, optimizer, [batch], progress_at(step)) for step in range(20)]
    assert losses[-1] < 0.5 * losses[0]


# ---- CMC and its colours


def lab_oracle(red: float, green: float, blue: float) -> list[float]:
    """CIE 15 and IEC 61966-2-1, by their fractions: D65 white, observer of 2 degrees."""

    def linear(value: float) -> float:
        return ((value + 0.055) / 1.055) ** 2.4 if value > 0.04045 else value / 12.92

    def f(t: float) -> float:
        return t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29

    r, g, b = linear(red), linear(green), linear(blue)
    x = f((0.4124564 * r + 0.3575761 * g + 0.1804375 * b) / 0.95047)
    y = f(0.2126729 * r + 0.7151522 * g + 0.0721750 * b)
    z = f((0.0193339 * r + 0.1191920 * g + 0.9503041 * b) / 1.08883)
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


def corners() -> Tensor:
    """The 8 corners of the RGB cube and 24 colours within, as one picture [1, 3, 4, 8]."""
    cube = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    inside = torch.rand(24, 3, generator=torch.Generator().manual_seed(0)) ** 3
    return torch.cat([cube, inside]).T.reshape(1, 3, 4, 8)


def test_lab() -> None:
    pictures = corners()
    ours = rgb_to_lab(pictures)
    expected = [lab_oracle(*color) for color in pictures[0].flatten(1).T.tolist()]
    np.testing.assert_allclose(ours[0].flatten(1).T.numpy(), expected, atol=0.02)
    assert differs(expected[1][2], float(rgb_to_lab(pictures**1.2)[0, 2, 0, 3]))


def test_ycbcr() -> None:
    """ITU-R BT.601: Kr 0.299, Kb 0.114, 219 steps of luma and 224 of chroma."""
    pictures = corners()
    for color, ours in zip(
        pictures[0].flatten(1).T.tolist(), rgb_to_ycbcr(pictures)[0].flatten(1).T, strict=True
    ):
        red, _, blue = color
        luma = 0.299 * red + 0.587 * color[1] + 0.114 * blue
        chroma = (blue - luma) / 1.772, (red - luma) / 1.402
        expected = [16 + 219 * luma, 128 + 224 * chroma[0], 128 + 224 * chroma[1]]
        np.testing.assert_allclose(ours.numpy(), expected, atol=0.02)


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


# ---- what cannot be run


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("npid", {"negatives": 0}, "npid's nce loss needs at least 1"),
        ("cmc", {"negatives": 0}, "cmc needs at least 1 noise row"),
        ("pair", {"margin": 2.5}, "distances of unit vectors"),
        ("invariant_spread", {"negative_weight": 0.0}, "must be above 0"),
    ],
)
def test_impossible_objectives_are_refused(
    name: str, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build(name, "test_resnet", **changes)
