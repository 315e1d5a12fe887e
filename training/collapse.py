"""A collapse in words: what methods log shows it to those who know how to read the numbers."""

import math
from collections.abc import Mapping
from typing import Any

_NEAR = 1e-3  # of the entropy of all prototypes alike
_LEAST_SPREAD = 0.01


def collapse_in_words(values: Mapping[str, float], objective: Any) -> str:
    """A sentence where the logged means of a method show a collapse, else "".

    teacher_entropy: in nats, of distributions over `objective.out_dim` prototypes (DINO, iBOT): 0
    where one prototype stands for everything, the logarithm of their number where all are alike.
    spread: `blocks.cosine.spread`, 0 where all images have the same direction.
    """
    entropy, prototypes = values.get("teacher_entropy"), getattr(objective, "out_dim", 0)
    if entropy is not None and prototypes > 1:
        highest = math.log(prototypes)
        if entropy > (1 - _NEAR) * highest:
            return (
                f"collapse: teacher_entropy {entropy:.4g} is that of all {prototypes:,} prototypes "
                f"alike, whatever the image: sharpen the teacher (a smaller teacher temperature)"
            )
        if entropy < _NEAR * highest:
            return (
                f"collapse: teacher_entropy {entropy:.2g} is that of one prototype for every "
                f"image: spread the teacher (its centring, a larger teacher temperature)"
            )
    spread = values.get("spread")
    if spread is not None and spread < _LEAST_SPREAD:
        return (
            f"collapse: spread {spread:.2g} is that of one direction for every image: try a "
            f"smaller learning rate or a longer warm-up"
        )
    return ""
