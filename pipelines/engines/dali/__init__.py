"""The dali engine: a Plan executed by an NVIDIA DALI graph, on a GPU or on CPU cores."""

from headrace.pipelines.engines.dali.engine import Dali

__all__ = ["Dali"]
