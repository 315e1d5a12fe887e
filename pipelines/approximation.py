"""Known differences from `reference` by name: asked for, in the fingerprint, never silent."""

from typing import Literal, get_args

# Known differences from `reference` that an engine makes only when asked for by name.
#   affine-bilinear   dali: Rotate, Shear and Translate sample bilinearly where bicubic was drawn
#   equalize-opencv   dali: Equalize by OpenCV's formula, not Pillow's
Approximation = Literal["affine-bilinear", "equalize-opencv"]
APPROXIMATIONS: tuple[Approximation, ...] = get_args(Approximation)
