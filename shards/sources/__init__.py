"""Sources of images, as people hold them: what a path is, and its samples with their labels.

`recognise` is the one look at a path (recognise.py says what is recognised, and in which order),
for open_store as for make_shards; `list_source` gives its splits, and a `SampleReader` reads what a
`Sample` refers to.
"""

from headrace.shards.sources.recognise import list_source, recognise, require_split
from headrace.shards.sources.samples import Sample, SampleReader, SourceSplit, estimate_bytes

__all__ = [
    "Sample",
    "SampleReader",
    "SourceSplit",
    "estimate_bytes",
    "list_source",
    "recognise",
    "require_split",
]
