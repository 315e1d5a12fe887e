"""Components: something else for every sample of a data set, in a data set of its own beside it.

A component NAME of DIR, which make_shards wrote, lies in DIR/component-NAME: a picture per sample,
of the sample's size and under the sample's id, in the project's own format. Its manifest names the
fingerprint of the data set that it was made for, and with another one it is refused: pictures and
components never drift apart. component_writer.py writes them.
"""

from pathlib import Path

import numpy as np

from headrace.shards.index import ShardError
from headrace.shards.manifest import MANIFEST_FILE, read_manifest
from headrace.shards.store import Store, open_store


def component_directory(store: Store, name: str) -> Path:
    """Where the store's component `name` lies, or would lie.

    Raises `ShardError` where the store is no directory that make_shards wrote.
    """
    if not (Path(store.uri) / MANIFEST_FILE).is_file():
        raise ShardError(
            f"{store.uri} is no directory that make_shards wrote, and only such ones have "
            f"components: convert it first"
        )
    return Path(store.uri) / f"component-{name}"


def open_component(store: Store, name: str) -> Store:
    """The store's component `name`: a store with the same ids and sizes.

    Raises `ShardError`: it is missing or unfinished, or was made for another data set.
    """
    directory = component_directory(store, name)
    if not directory.is_dir():
        raise ShardError(
            f"{store.uri} has no component {name!r}, which this recipe's views ask for: make it "
            f"(saliency masks: tools/make_masks.py), or take a recipe that does without"
        )
    made_for = read_manifest(directory).options.get("component_of")
    if made_for != store.fingerprint:
        raise ShardError(
            f"{directory} was made for the data set {str(made_for)[:12]}, and {store.uri} is "
            f"{store.fingerprint[:12]}: delete it and make it again"
        )
    component = open_store(directory)
    ids = np.arange(len(store), dtype=np.int64)
    if len(component) != len(store) or (component.sizes(ids) != store.sizes(ids)).any():
        raise ShardError(
            f"{directory} has other samples or sizes than {store.uri}: delete it and make it again"
        )
    return component
