"""The fused engine: whole recipes in one compiled call per picture, on CPU cores."""

from headrace.pipelines.engines.fused.engine import Fused

__all__ = ["Fused"]
