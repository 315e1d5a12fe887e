"""Encoded samples on disk: written once, opened as a `Store`. Knows neither torch nor training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.shards.store import ShardError, Store, open_store

__all__ = ["ShardError", "Store", "open_store"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `headrace.shards.errors`, and with it a recipe, needs no numpy.
    if name in __all__:
        from headrace.shards import store

        return getattr(store, name)
    raise AttributeError(f"module 'headrace.shards' has no attribute {name!r}")
