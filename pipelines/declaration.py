"""A recipe read back: from its declaration in a run's config.json, or from what it prints as."""

from collections.abc import Mapping
from typing import Any, get_args

from headrace.pipelines.masks import Mask
from headrace.pipelines.ops import ViewOp
from headrace.pipelines.recipe import Augmentation, Distribution, Draw, Mix, RandomErasing, View

_KINDS: dict[str, type] = {
    kind.__name__: kind for union in (ViewOp, Mask, Distribution) for kind in get_args(union)
}

WORDS: dict[str, type] = _KINDS | {
    kind.__name__: kind for kind in (Augmentation, Draw, Mix, RandomErasing, View)
}
"""All that a recipe is made of, by name: `eval(repr(recipe), dict(WORDS)) == recipe`."""


def augmentation_from(declaration: Mapping[str, Any]) -> Augmentation:
    """The inverse of `Augmentation.declaration`, but for the deviations' prose.

    Raises KeyError, TypeError or RecipeError for what no declaration of this version says.
    """
    fields = _restored(declaration)
    mix = fields.get("mix")
    return Augmentation(
        **{
            **fields,
            "views": tuple(_view(view) for view in fields["views"]),
            "mix": None if mix is None else Mix(**mix),
            "draws": tuple(Draw(**draw) for draw in fields.get("draws", ())),
        }
    )


def _view(fields: Mapping[str, Any]) -> View:
    erase = fields.get("erase")
    return View(**{**fields, "erase": None if erase is None else RandomErasing(**erase)})


def _restored(value: Any) -> Any:
    """JSON's lists as the tuples that they were, and what names its `op` as that."""
    match value:
        case {"op": kind, **fields}:
            return _KINDS[kind](**_restored(fields))
        case dict():
            return {key: _restored(item) for key, item in value.items()}
        case list() | tuple():
            return tuple(_restored(item) for item in value)
        case _:
            return value
