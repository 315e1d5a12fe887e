"""Backbones: timm models by name, made as a run needs them."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol, runtime_checkable

import timm
import torch
from torch import Tensor, nn

from headrace.training import encoders  # noqa: F401  (registers them with timm)
from headrace.training.preset import ConfigError


def resolve_options(
    name: str, options: Mapping[str, Any], view_pixels: tuple[int, ...], test_pixels: int
) -> dict[str, Any]:
    """The timm options of this run: the given ones and what the size of its views asks for.

    A model that is built for one size (a ViT) gets `img_size`, the largest training
    view, and `dynamic_img_size` where views (the test view too) differ from it. A
    convolutional network gets nothing.
    Raises ConfigError for names and options that timm does not know, and for a model that cannot
    take views of several sizes.
    """
    check_name(name)
    accepted = inspect.signature(type(_create_without_memory(name, {})).__init__).parameters
    resolved = dict(options)
    if "img_size" not in accepted:
        _create_without_memory(name, resolved)
        return resolved
    resolved.setdefault("img_size", max(view_pixels))
    sizes = sorted({*view_pixels, test_pixels, resolved["img_size"]})
    if len(sizes) > 1 and "dynamic_img_size" in accepted:
        resolved.setdefault("dynamic_img_size", True)
    encoder = _create_without_memory(name, resolved).eval()
    for pixels in sizes if len(sizes) > 1 else []:
        try:
            encoder(torch.empty(1, 3, pixels, pixels, device="meta"))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"backbone {name!r}, made for {resolved['img_size']} pixels, cannot take views of "
                f"{pixels} ({error}): take another backbone, or views of one size"
            ) from error
    return resolved


def _create_without_memory(name: str, options: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return _create(name, options)


def check_name(name: str) -> None:
    """Raises ConfigError with the nearest names where timm has no such model."""
    if timm.is_model(name.split(".")[0]):
        return
    models = timm.list_models()
    near = difflib.get_close_matches(name, models, n=4, cutoff=0.4)
    raise ConfigError(
        f"timm {timm.__version__} has no model {name!r}; "
        + (f"near it are {', '.join(near)}" if near else "timm.list_models() lists what exists")
    )


@runtime_checkable
class FitsImages(Protocol):
    """What an encoder may have beyond timm: weights that are made from images before training."""

    def fit_images(self, images: Tensor) -> None:
        """images: float32 [n, 3, H, W], of the training set in the test view. Draws nothing."""
        ...


class EncoderFactory:
    """Makes the run's backbone anew at each call: [B, 3, H, W] -> pooled features [B, D].

    Options of a call go over those of the run. With `initial`, every encoder starts from those
    weights (a state dict), else from timm's initialisation out of torch's global generator.
    images: gives the images that a `FitsImages` encoder is fitted to; asked at most once, and not
    where no encoder wants them. None where other weights will replace these.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        initial: Mapping[str, Tensor] | None = None,
        compiled: bool = False,
        images: Callable[[], Tensor] | None = None,
    ) -> None:
        self.name = name
        self.options = dict(options)
        self._initial = initial
        self._compiled = compiled
        self._images = None if images is None else cache(images)

    def __call__(self, **timm_options: object) -> nn.Module:
        encoder = _create(self.name, {**self.options, **timm_options})
        if self._images is not None and isinstance(encoder, FitsImages):
            encoder.fit_images(self._images())
        if self._initial is not None:
            _load(encoder, self._initial, self.name)
        if self._compiled:
            encoder.compile()
        return encoder


def _create(name: str, options: Mapping[str, Any]) -> nn.Module:
    try:
        encoder = timm.create_model(name, num_classes=0, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
        raise ConfigError(f"timm cannot build {name!r} with {shown}: {error}") from error
    # nn.Module.to is typed without memory_format alone.
    return encoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _load(encoder: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    own = encoder.state_dict()
    missing = sorted(own.keys() - weights.keys())
    unknown = sorted(weights.keys() - own.keys())
    reshaped = [
        f"{key} is {tuple(weights[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if missing or unknown or reshaped:
        found = [
            *(f"{key} is missing" for key in missing[:2]),
            *(f"{key} is unknown" for key in unknown[:2]),
            *reshaped[:2],
        ]
        raise ConfigError(
            f"the weights of --init do not fit backbone {name!r} with these options: "
            f"{'; '.join(found)} ({len(missing) + len(unknown) + len(reshaped)} differences)"
        )
    encoder.load_state_dict(dict(weights))
