"""Words that mean a split, in the names of folders and files."""

import re
from collections.abc import Iterable

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
    "unlabeled": "unlabeled",
    "unlabelled": "unlabeled",
}
"""Folder and file names that mean a split."""
_WORDS = re.compile(r"[-_. ]+")


def splits_in(name: str) -> frozenset[str]:
    """The splits that the words of a name mean: {"val"} for imagenet1k-validation-03."""
    return frozenset(splits_of_words(_WORDS.split(name.lower())))


def splits_of_words(words: Iterable[str]) -> set[str]:
    """The splits that words in lower case mean, a year behind them or none (train2017)."""
    bare = (re.sub(r"(\D)\d{4}$", r"\1", word) for word in words)
    return {SPLIT_NAMES[word] for word in bare if word in SPLIT_NAMES}
