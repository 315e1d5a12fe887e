"""The two losses of an adversary against their equations in probabilities."""

import numpy as np
import pytest
import torch

from headrace.training.blocks.adversary import deception_loss, discriminator_loss
from tests.objective_checks import Array


def test_the_adversary_s_losses_are_those_of_the_gan() -> None:
    """Max log D(real) + log(1 - D(generated)); the generator: max log D(generated)."""
    random = np.random.default_rng(0)
    real, generated = random.normal(size=(2, 5, 1))

    def sigmoid(x: Array) -> Array:
        return 1 / (1 + np.exp(-x))

    as_tensors = torch.tensor(real), torch.tensor(generated)
    expected = -np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(generated)).mean()
    assert float(discriminator_loss(*as_tensors)) == pytest.approx(expected, rel=1e-6)
    assert float(deception_loss(as_tensors[1])) == pytest.approx(-np.log(sigmoid(generated)).mean())
