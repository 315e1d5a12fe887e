"""`noise`'s dense noise as torch code, bit for bit, on any device.

Philox multiplies 32 by 32 bits, and torch computes with no unsigned numbers on every device, so
words live in the low halves of int64. A compiled kernel is several times faster; this one runs
wherever a batch is.
"""

from functools import cache

import torch

from headrace.pipelines.noise import half_normal_quantiles

_LOW = 0xFFFFFFFF
_MULTIPLY_0 = 0xD2511F53
_MULTIPLY_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(keys: torch.Tensor, counters: Words) -> Words:
    """Philox 4x32-10, as `headrace.pipelines.philox.words`, of keys and counters that broadcast.

    keys: int64, the bits of the 64-bit keys. counters and result: four words, int64 in [0, 2^32).
    """
    key_0, key_1 = keys & _LOW, keys >> 32 & _LOW
    word_0, word_1, word_2, word_3 = counters
    for _ in range(_ROUNDS):
        # A product wraps around at 2^64; the sign that its upper half drags in is masked off.
        product_0, product_1 = word_0 * _MULTIPLY_0, word_2 * _MULTIPLY_1
        word_0 = (product_1 >> 32 ^ word_1 ^ key_0) & _LOW
        word_2 = (product_0 >> 32 ^ word_3 ^ key_1) & _LOW
        word_1, word_3 = product_1 & _LOW, product_0 & _LOW
        key_0, key_1 = (key_0 + _WEYL_0) & _LOW, (key_1 + _WEYL_1) & _LOW
    return word_0, word_1, word_2, word_3


@cache
def _signed_quantiles(device: torch.device) -> torch.Tensor:
    """float32 [2^16]: `noise.normals` of every 16-bit number."""
    magnitudes = torch.tensor(half_normal_quantiles())
    return torch.cat([magnitudes, -magnitudes]).to(device)


def pixel_noise(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Values 0 .. count - 1 of the dense noise of each key: int64 [n] to float32 [n, count].

    Takes some 16 bytes of memory per value, the result included.
    """
    blocks = torch.arange(-(-count // 8), device=keys.device)
    zero = torch.zeros_like(blocks)
    words = torch.stack(philox(keys[:, None], (blocks, zero, zero, zero)), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    return _signed_quantiles(keys.device)[halves.flatten(1)[:, :count]]
