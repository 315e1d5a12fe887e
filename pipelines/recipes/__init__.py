"""The published recipes by name: plain functions that return an `Augmentation`.

The defaults are the papers' ImageNet numbers; a CIFAR-sized run passes smaller ones. What differs
from the paper or its code stands in the `deviations` of what is returned and nowhere else.
`NAMED` holds the functions that can be called without arguments, which is all of them.
"""

from collections.abc import Callable
from difflib import get_close_matches

from headrace.pipelines.ops import RecipeError
from headrace.pipelines.recipe import Augmentation
from headrace.pipelines.recipes.contrastive import (
    byol,
    dino,
    dino_resnet,
    moco_v1,
    moco_v2,
    moco_v3,
    simclr,
    swav,
)
from headrace.pipelines.recipes.masked import dinov2, ibot, ijepa, mae, spark
from headrace.pipelines.recipes.pretext import (
    colorization,
    context_encoder,
    cpc,
    jigsaw,
    relative,
    rotation,
)
from headrace.pipelines.recipes.supervised import center, deit, deit3, supervised

# In the order in which a list of them is best read.
NAMED: dict[str, Callable[[], Augmentation]] = {
    recipe.__name__: recipe
    for recipe in (
        simclr,
        moco_v1,
        moco_v2,
        moco_v3,
        byol,
        swav,
        dino,
        dino_resnet,
        mae,
        spark,
        ibot,
        dinov2,
        ijepa,
        supervised,
        deit,
        deit3,
        center,
        rotation,
        jigsaw,
        relative,
        colorization,
        context_encoder,
        cpc,
    )
}


def named(name: str) -> Augmentation:
    """The recipe `name` with its paper's numbers. Raises RecipeError for a name that is none."""
    if name in NAMED:
        return NAMED[name]()
    near = get_close_matches(name, NAMED, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMED)}"
    raise RecipeError(f"no recipe is called {name!r}; {hint}")
