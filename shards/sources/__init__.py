"""Sources of images, as people hold them: what a path is, and its samples with their labels.

`list_source` is the way in (recognise.py says what is recognised, and in which order); a
`SampleReader` reads what a `Sample` refers to.
"""

from headrace.shards.sources.recognise import list_source
from headrace.shards.sources.samples import Sample, SampleReader, SourceSplit, estimate_bytes

__all__ = ["Sample", "SampleReader", "SourceSplit", "estimate_bytes", "list_source"]
