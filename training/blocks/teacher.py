"""A teacher that follows a student as an exponential moving average.

The average is over *parameters*. Buffers are the teacher's own: a batch norm in it runs in training
mode on the statistics of its own batch and moves its own running statistics (as in the code of
BYOL, MoCo v3 and DINO), which evaluation then uses.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim.swa_utils import get_ema_multi_avg_fn


def start_equal(teacher: nn.Module, student: nn.Module) -> None:
    """Copies parameters and buffers into the teacher, which from then on takes no gradient."""
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)


@torch.no_grad()
def follow(teacher: Iterable[Parameter], student: Iterable[Parameter], momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, both listed in the same order."""
    get_ema_multi_avg_fn(momentum)(list(teacher), list(student), 0)
