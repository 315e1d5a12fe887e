"""This project's own backbones, a file each, registered with timm when this package is imported.

import headrace.training.encoders
timm.create_model("local-dir:RUN/encoder", pretrained=True)
"""

from headrace.training.encoders.small_convnet import small_convnet

__all__ = ["small_convnet"]
