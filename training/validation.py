"""What a method says of images that it does not train on, during training."""

from collections.abc import Mapping

import torch

from headrace.training.collectives import gather_objects
from headrace.training.features import FeaturePass, eval_mode
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
    with eval_mode(method):
        for name, feature_pass in passes.items():
            totals: dict[str, tuple[float, int]] = {}
            for of_rank in gather_objects(_totals(method, feature_pass)):
                for key, (total, count) in of_rank.items():
                    before = totals.get(key, (0.0, 0))
                    totals[key] = (before[0] + total, before[1] + count)
            results |= {f"{name}_{key}": total / count for key, (total, count) in totals.items()}
    return results


def _totals(method: Method, feature_pass: FeaturePass) -> dict[str, tuple[float, int]]:
    """This rank's sum and number of values under each name."""
    device, bf16 = feature_pass.world.device, feature_pass.precision == "bf16"
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    with feature_pass.loader() as loader:
        for batch in loader:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                values = method.evaluate(batch)
            for key, value in values.items():
                total = value.double().sum()
                sums[key] = sums[key] + total if key in sums else total
                counts[key] = counts.get(key, 0) + value.numel()
    return {key: (float(sums[key]), counts[key]) for key in sums if counts[key] > 0}
