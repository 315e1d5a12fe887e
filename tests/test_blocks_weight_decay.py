"""Which parameters of an encoder see no weight decay."""

from typing import Any

import pytest
from torch import Tensor

from tests.tiny_methods import (
    build,
)


@pytest.mark.parametrize("name", ["supervised", "deit"])
def test_tokens_and_positions_see_no_decay(name: str) -> None:
    method = build(name, "test_vit")
    with_decay, without = method.param_groups()
    assert [with_decay["decay"], without["decay"]] == [True, False]
    encoder: Any = method.encoder

    def holds(group: dict[str, Any], parameter: Tensor) -> bool:
        return any(each is parameter for each in group["params"])

    for free in (encoder.pos_embed, encoder.cls_token, encoder.blocks[0].norm1.weight):
        assert holds(without, free)
    assert holds(with_decay, encoder.blocks[0].attn.qkv.weight)
