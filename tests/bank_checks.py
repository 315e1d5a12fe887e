"""What tests of feature banks stand on: an oracle of NCE, banks with given rows, and their Z."""

import copy
import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.training.blocks.nce import FeatureBank
from headrace.training.method import Method
from tests.objective_checks import Array, tensor, unit_rows
from tests.tiny_methods import SAMPLES, batch_of, build, progress_at, sgd, train_step


def nce_oracle(
    features: Array,
    bank: Array,
    numbers: NDArray[Any],
    temperature: float,
    z: float,
    *,
    share_of_one: bool = False,
    averaged_noise: bool = False,
    own_is_noise: bool = False,
    with_epsilon: bool = True,
) -> float:
    """Wu et al. 2018, eq. 4 to 8; lemniscate lib/NCEAverage.py and lib/NCECriterion.py, which CMC
    NCE/NCECriterion.py repeats. Multiplies probabilities, where ours adds logarithms."""
    samples, noise = len(bank), numbers.shape[1] - 1
    epsilon = 1e-7 if with_epsilon else 0.0
    share = (1 if share_of_one else noise) / samples
    total = 0.0
    for feature, row_numbers in zip(unit_rows(features), numbers.astype(int), strict=True):
        p = [math.exp(bank[number] @ feature / temperature) / z for number in row_numbers]
        total += math.log(p[0] / (p[0] + share + epsilon))
        others = [
            math.log(share / (each + share + epsilon)) for each in p[0 if own_is_noise else 1 :]
        ]
        total += sum(others) / (noise if averaged_noise else 1)
    return -total / len(features)


def bank_of(rows: Array) -> FeatureBank:
    bank = FeatureBank(*rows.shape)
    bank.memory.rows.copy_(tensor(rows))
    return bank


def normalizers(method: Method) -> dict[str, Tensor]:
    state = method.state_dict()
    return {key: value.clone() for key, value in state.items() if key.endswith("log_normalizer")}


def assert_normalizer_is_that_of_the_first_batch(name: str, count: int) -> None:
    """count: how many the method has. It is estimated in the first step and stays for ever."""
    method, batches = build(name, "test_resnet"), [batch_of(name, seed=seed) for seed in range(3)]
    first, _ = copy.deepcopy(method)(batches[0], progress_at(0))
    remembered = []
    for step in range(3):
        loss = train_step(method, sgd(method), [batches[step]], progress_at(step))
        if step == 0:
            assert torch.equal(loss, first["loss"])
        remembered.append(normalizers(method))
    assert len(remembered[0]) == count
    assert remembered[0] == remembered[1] == remembered[2]
    assert all(value > math.log(SAMPLES) for value in remembered[0].values())
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
