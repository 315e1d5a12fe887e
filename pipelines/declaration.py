"""A recipe from its declaration: what a run's config.json says becomes frozen dataclasses again."""

from collections.abc import Mapping
from typing import Any, get_args

from headrace.pipelines.recipe import (
    Augmentation,
    Distribution,
    Draw,
    Mask,
    Mix,
    RandomErasing,
    View,
    ViewOp,
)

_KINDS = {kind.__name__: kind for union in (ViewOp, Mask, Distribution) for kind in get_args(union)}


def augmentation_from(declaration: Mapping[str, Any]) -> Augmentation:
    """The inverse of `Augmentation.declaration`, but for the deviations' prose.

    Raises KeyError, TypeError or RecipeError for what no declaration of this version says.
    """
    fields = _made(declaration)
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


def _made(value: Any) -> Any:
    """JSON's lists as the tuples that they were, and what names its `op` as that."""
    match value:
        case {"op": kind, **fields}:
            return _KINDS[kind](**_made(fields))
        case dict():
            return {key: _made(item) for key, item in value.items()}
        case list() | tuple():
            return tuple(_made(item) for item in value)
        case _:
            return value
