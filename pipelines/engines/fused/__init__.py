"""The fused engine: whole recipes in one compiled call per picture, on CPU cores."""

from headrace.pipelines.engines.fused.engine import finishes, open_engine, unsupported

__all__ = ["finishes", "open_engine", "unsupported"]
