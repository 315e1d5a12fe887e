"""From shards to batches on the device: order, plan, engine, loader.

    from headrace.pipelines import open_loader

A recipe (`recipe`, `recipes`) says what may happen to a picture, `order` which samples a batch
holds, `plan` draws every random number of it, an engine (`engines`) makes the pixels, and `loader`
runs the four ahead of training. No method and no model is known here.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.pipelines.loader import Loader, LoaderError, open_loader

__all__ = ["Loader", "LoaderError", "open_loader"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `headrace.pipelines.recipe` is to be imported without torch.
    if name in __all__:
        from headrace.pipelines import loader

        return getattr(loader, name)
    raise AttributeError(f"module 'headrace.pipelines' has no attribute {name!r}")
