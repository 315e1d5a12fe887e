"""Encoded samples on disk: written once, opened as a `Store`. Knows neither torch nor training."""

from headrace.shards.index import ShardError
from headrace.shards.store import Store, open_store

__all__ = ["ShardError", "Store", "open_store"]
