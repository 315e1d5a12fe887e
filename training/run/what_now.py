"""What can be done with a run that is finished, said at its end."""

from pathlib import Path

from headrace.training.catalogue import Judgement
from headrace.training.invocation import as_typed
from headrace.training.run.export import TimmConfig


def what_now(directory: Path, network: TimmConfig, judged_by: Judgement) -> str:
    """The lines under "finished": how to judge the encoder, and how to use it elsewhere."""
    protocol = "" if judged_by == "knn" else f" --protocol {judged_by}"
    evaluate = as_typed(f"python training/evaluate.py {directory}{protocol}")
    return f"now: judge it with {evaluate}\n     {_elsewhere(directory, network)}"


def _elsewhere(directory: Path, network: TimmConfig) -> str:
    if network.content is None:
        return (
            f"timm alone cannot read its encoder ({network.refusal}): evaluate.py does, and "
            f"training/build.py's trained_encoder"
        )
    first = f"import {network.needs_import}; " if network.needs_import else ""
    name = f'"local-dir:{directory / "encoder"}"'
    return f"use its encoder with {first}timm.create_model({name}, pretrained=True)"
