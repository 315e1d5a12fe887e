"""--run.compile compiles what runs: in every method, or it is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from headrace.training.backbones import EncoderFactory
from headrace.training.command_line import parse_command_line
from headrace.training.preset import ConfigError
from headrace.training.requirements import require_runnable
from tests import tiny_methods
from tests.tiny_methods import ENCODERS, NAMES, batch_of, build, progress_at, refusal


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_runs_is_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile stands in for itself, so that what it was given is counted when it runs."""
    runs: list[str] = []

    def compiled(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            runs.append(type(getattr(function, "__self__", None)).__name__)
            return function(*arguments, **named)

        return run

    def factory(encoder: str, options: dict[str, Any]) -> EncoderFactory:
        return EncoderFactory(encoder, options, compiled=True)

    encoder = next(encoder for encoder in ENCODERS if not refusal(name, encoder))
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(tiny_methods, "EncoderFactory", factory)
    method = build(name, encoder)
    line = f"--method {name} --preset cifar --run.compile --data.batch-size 16"
    config = replace(parse_command_line(line.split(), lambda path: 32), backbone_options={})
    if not method.compiles:
        with pytest.raises(ConfigError, match=f"nothing to compile in {name}"):
            require_runnable(config, method, 1)
        return
    require_runnable(config, method, 1)
    runs.clear()
    method.before_step(progress_at(1))
    method(batch_of(name), progress_at(1))
    assert runs
