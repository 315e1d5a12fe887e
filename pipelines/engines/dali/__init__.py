"""The dali engine: a Plan executed by an NVIDIA DALI graph, on a GPU or on CPU cores."""

from headrace.pipelines.engines.dali.engine import finishes, open_engine, unsupported

__all__ = ["finishes", "open_engine", "unsupported"]
