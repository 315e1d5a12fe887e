"""What single methods promise beyond the contract that test_methods.py holds all of them to."""

import pytest
import torch

from headrace.training.backbones import EncoderFactory
from headrace.training.method import Facts
from headrace.training.preset import ConfigError
from tests.tiny_methods import (
    batch_of,
    build,
    module_of,
    progress_at,
    small_preset,
)


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
