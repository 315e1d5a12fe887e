"""Where a test promises equality: in float64, so that it holds on every processor."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor


@contextmanager
def in_float64() -> Iterator[None]:
    """Networks, losses and state in float64, whose rounding is the same small error on every
    processor: in float32, sums in another order differ by 1e-7, steps and normalisations magnify
    that, and how much is the processor's to say.

    Blocks call `.float()` to leave a half precision; here that must not end in float32.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
