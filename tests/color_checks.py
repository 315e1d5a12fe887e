"""What tests of colours stand on: an oracle of CIE Lab, and colours to try."""

import torch
from torch import Tensor


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
