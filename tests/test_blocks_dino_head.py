"""DINO's head: cosines, or learnt lengths as weight norm has them."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from headrace.training.blocks.dino_head import DinoHead


def test_dino_head_gives_cosines_in_float32() -> None:
    head = DinoHead(6, 8, 4, 10)
    x = torch.randn(3, 6)
    output = head(x)
    unit = F.normalize(head.mlp(x), dim=1)
    weight = head.prototypes.weight / head.prototypes.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(output, unit @ weight.T)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == torch.float32
    # The length of a prototype says nothing.
    with torch.no_grad():
        head.prototypes.weight.mul_(7)
    torch.testing.assert_close(head(x), output)


def test_learnt_lengths_are_weight_norm_s() -> None:
    """dino `vision_transformer.py`, `DINOHead`, with norm_last_layer=False."""
    head = DinoHead(6, 8, 4, 10, learn_lengths=True)
    theirs = weight_norm(nn.Linear(4, 10, bias=False))
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert head.prototypes.lengths is not None
        head.prototypes.lengths.uniform_(0.5, 2)
        parametrized: Any = theirs.parametrizations
        parametrized.weight.original0.copy_(head.prototypes.lengths)
        parametrized.weight.original1.copy_(head.prototypes.weight)
    torch.testing.assert_close(head(x), theirs(head.directions(x)))
    assert {name for name, _ in head.prototypes.named_parameters()} == {"weight", "lengths"}
    assert len(list(DinoHead(6, 8, 4, 10).prototypes.parameters())) == 1
