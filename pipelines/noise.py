"""Normal numbers out of random words, the same on every device.

A 16-bit number picks one of 2^16 equally likely quantiles of N(0, 1): a sign and one of 32,768
magnitudes in a table. No logarithm, cosine or rejection, so a GPU, torch and a compiled kernel give
equal bits; the price is a resolution of 2^-16 in probability and a bound of 4.33 deviations, which
noise that replaces pixels or shakes a magnitude does not notice.

Dense noise is a 64-bit key in the Plan. Value v of it (v = (row * width + column) * 3 + channel of
the view) is made of 16 bits of Philox 4x32-10 of the key and the counter (v // 8, 0, 0, 0): of word
v % 8 // 2, the low half where v is even.
"""

from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

MAGNITUDES = 1 << 15


@cache
def half_normal_quantiles() -> NDArray[np.float32]:
    """float32 [MAGNITUDES], ascending, read-only: |N(0, 1)| at the middles of equal shares."""
    inverse = NormalDist().inv_cdf
    table = np.array(
        [inverse(0.5 + (index + 0.5) / (2 * MAGNITUDES)) for index in range(MAGNITUDES)], np.float32
    )
    table.flags.writeable = False
    return table


def normals(random_bits: NDArray[np.integer]) -> NDArray[np.float32]:
    """N(0, 1) of any shape from numbers in [0, 2^16): bit 15 is the sign."""
    magnitude = half_normal_quantiles()[random_bits & (MAGNITUDES - 1)]
    return np.where(random_bits & MAGNITUDES, -magnitude, magnitude)
