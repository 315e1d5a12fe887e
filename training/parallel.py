"""How a method's gradients become those of the global batch: by DDP, or averaged by the step."""

import inspect
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from headrace.training.method import Method
from headrace.training.world import World


def distributed(module: nn.Module, world: World) -> nn.Module:
    """The module with its gradients averaged over the ranks; itself for one process.

    Buffers are left alone in every step: they are equal on all ranks by construction.
    """
    if world.size == 1:
        return module
    # torch 2.14 renamed the option, and warns of the name that torch 2.9 knows.
    names = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    return DistributedDataParallel(module, **options)


def model_for(method: Method, world: World, *, cached: bool) -> nn.Module:
    """What a step calls: DDP averages gradients during the one backward pass that it knows of; with
    several, of phases or of a gradient cache (`cached`), the method by itself, whose gradients
    `step.optimiser_step` averages afterwards."""
    return method if cached or len(method.phases()) > 1 else distributed(method, world)
