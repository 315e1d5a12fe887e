"""What a method says of images that it does not train on, during training."""

from collections.abc import Mapping

import torch

from headrace.pipelines.loader import open_loader
from headrace.training.collectives import gather_objects
from headrace.training.features import FeaturePass
from headrace.training.method import Method


def evaluates(method: Method) -> bool:
    """Whether the method has something to say of held-out images."""
    return type(method).evaluate is not Method.evaluate


@torch.no_grad()
def validate(method: Method, passes: Mapping[str, FeaturePass]) -> dict[str, float]:
    """{"holdout_top1": ..., ...}: means of `method.evaluate` over every sample exactly once.

    Sums and counts are added up over the ranks, whose shares may differ in length.
    """
    results: dict[str, float] = {}
    modes = {part: part.training for part in method.modules()}
    method.eval()
    for name, way in passes.items():
        totals: dict[str, tuple[float, int]] = {}
        for rank in gather_objects(_totals(method, way)):
            for key, (total, count) in rank.items():
                before = totals.get(key, (0.0, 0))
                totals[key] = (before[0] + total, before[1] + count)
        results |= {f"{name}_{key}": total / count for key, (total, count) in totals.items()}
    for part, training in modes.items():
        part.training = training
    return results


def _totals(method: Method, way: FeaturePass) -> dict[str, tuple[float, int]]:
    """This rank's sum and number of values under each name."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    with open_loader(
        way.store,
        way.views["test"],
        batch_size=way.batch_size * way.world.size,
        seed=way.seed,
        engine=way.engine,
        device=way.world.device,
        shuffle="none",
        drop_last=False,
        holdout=way.holdout,
        part=way.part,
        subset=way.subset,
        rank=way.world.rank,
        world_size=way.world.size,
        threads=way.threads,
        passes=1,
        approximate=way.approximate,
    ) as loader:
        for batch in loader:
            with torch.autocast(
                way.world.device.type, torch.bfloat16, enabled=way.precision == "bf16"
            ):
                values = method.evaluate(batch)
            for key, value in values.items():
                total = value.double().sum()
                sums[key] = sums[key] + total if key in sums else total
                counts[key] = counts.get(key, 0) + value.numel()
    return {key: (float(sums[key]), counts[key]) for key in sums if counts[key] > 0}
