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
from headrace.training.initial import fit_weights
from headrace.training.preset import ConfigError, require


def resolve_options(
    name: str,
    options: Mapping[str, Any],
    view_pixels: tuple[int, ...],
    test_pixels: int,
    *,
    needed: Mapping[str, Any] | None = None,
    needed_by: str = "",
) -> dict[str, Any]:
    """The timm options of this run: the given ones and what the size of its views asks for.

    A model that is built for one size (a ViT) gets `img_size`, the largest training
    view, and `dynamic_img_size` where views (the test view too) differ from it. A
    convolutional network gets nothing. needed: options that the method `needed_by` cannot do
    without.
    Raises ConfigError for names and options that timm does not know, and for a model that does not
    make [B, D] of views of each size: an empty picture of each goes through it, without memory.
    """
    check_name(name)
    require(
        options.get("in_chans", 3) == 3,
        f"--backbone-options in_chans={options.get('in_chans')}: pictures have three channels, "
        f"grey ones too; leave the option out",
    )
    kind = type(_create_without_memory(name, {}))
    accepted = inspect.signature(kind.__init__).parameters
    if missing := [option for option in needed or {} if option not in accepted]:
        raise ConfigError(
            f"{needed_by} needs a plain ViT of timm (vit_* of class VisionTransformer), and "
            f"{name!r} is a {kind.__name__}, which has no option {missing[0]}"
        )
    resolved = dict(options)
    if "img_size" in accepted:
        resolved.setdefault("img_size", max(view_pixels))
    sizes = sorted({*view_pixels, test_pixels})
    several = sizes != [resolved.get("img_size", sizes[0])]
    if several and "img_size" in accepted and "dynamic_img_size" in accepted:
        resolved.setdefault("dynamic_img_size", True)
    encoder = _create_without_memory(name, resolved).eval()
    for pixels in sizes:
        _try_view(encoder, name, pixels, resolved.get("img_size"))
    return resolved


def _try_view(encoder: nn.Module, name: str, pixels: int, made_for: int | None) -> None:
    """Raises ConfigError unless an encoder without memory makes [B, D] of [B, 3, pixels, pixels]
    and looks at all of it."""
    made = "" if made_for in (None, pixels) else f", made for {made_for} pixels,"
    where = f"backbone {name!r}{made} cannot take views of {pixels} pixels"
    patch = _patch_pixels(encoder)
    require(
        patch is None or pixels % patch == 0,
        f"{where}, which are no multiple of its patches of {patch} pixels: the rest would never be "
        f"seen; take views of {pixels // (patch or 1) * (patch or 1) or patch}",
    )
    try:
        features = encoder(torch.empty(2, 3, pixels, pixels, device="meta"))
    except NotImplementedError:
        return  # something in it needs memory: there is nothing to be learnt here
    except Exception as error:  # whatever a model of timm's raises
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise ConfigError(
            f"{where} ({reason}): take another backbone, or views it takes"
        ) from error
    shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    require(
        isinstance(features, Tensor) and features.ndim == 2,
        f"backbone {name!r} with these options gives {shape} and not one vector per image: leave "
        f"out features_only and an empty global_pool",
    )


def _patch_pixels(encoder: nn.Module) -> int | None:
    """Side of the patches that a ViT cuts its views into; None for others and for padded views."""
    embed = getattr(encoder, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    if patch is None or getattr(embed, "dynamic_img_pad", False):
        return None
    return int(patch[0] if isinstance(patch, tuple) else patch)


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
    where no encoder wants them. None where other weights will replace these. say: is told once
    how `initial` was made to fit.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        initial: Mapping[str, Tensor] | None = None,
        compiled: bool = False,
        images: Callable[[], Tensor] | None = None,
        say: Callable[[list[str]], None] | None = None,
    ) -> None:
        self.name = name
        self.options = dict(options)
        self._initial = initial
        self._compiled = compiled
        self._say = say
        self._images = None if images is None else cache(images)

    def __call__(self, **timm_options: object) -> nn.Module:
        encoder = _create(self.name, {**self.options, **timm_options})
        if self._images is not None and isinstance(encoder, FitsImages):
            encoder.fit_images(self._images())
        if self._initial is not None:
            weights, said = fit_weights(encoder, self._initial, self.name)
            encoder.load_state_dict(weights)
            if self._say is not None:
                self._say(said)
            self._say = None
        if self._compiled:
            _compile(encoder)
        return encoder


def _compile(encoder: nn.Module) -> None:
    """The network as a whole, and its blocks and stages too, since some methods run these one by
    one; within a compiled whole they become part of it."""
    encoder.compile()
    for name in ("blocks", "stages"):
        for part in getattr(encoder, name, nn.Identity()).children():
            part.compile()
    for name, part in encoder.named_children():
        if name.startswith("layer") and name[5:].isdigit():
            part.compile()


def _create(name: str, options: Mapping[str, Any]) -> nn.Module:
    try:
        encoder = timm.create_model(name, num_classes=0, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
        raise ConfigError(f"timm cannot build {name!r} with {shown}: {error}") from error
    # nn.Module.to is typed without memory_format alone.
    encoder = encoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and _breaks_channels_last(module):
            module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
            module.register_forward_pre_hook(_contiguous_input)
    return encoder


def _breaks_channels_last(convolution: nn.Conv2d) -> bool:
    """Whether torch (2.14, oneDNN) writes beside its memory in the backward pass on a CPU: of 1 x 1
    convolutions with a stride, of less than 16 channels, channels last (FastViT's first layer)."""
    small = convolution.kernel_size == (1, 1) and convolution.in_channels < 16
    return small and convolution.groups == 1 and convolution.stride != (1, 1)


def _contiguous_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in inputs)
