"""Every method of the folder, small enough to run in a test; used by several test files."""

import importlib
import pkgutil
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import training.methods
from pipelines.batch import Batch
from pipelines.recipe import Augmentation, RandomMask
from training.backbones import EncoderFactory, resolve_options
from training.config import Recipe
from training.method import Facts, Method, Progress

NAMES = sorted(module.name for module in pkgutil.iter_modules(training.methods.__path__))
ENCODERS: dict[str, dict[str, object]] = {
    "test_resnet": {"zero_init_last": False},
    "test_vit": {"patch_size": 4, "global_pool": "avg", "depth": 3},
}
CLASSES = 16

# A hyper-parameter of one of these names is made small, whichever method has it.
SMALL: dict[str, object] = {
    "out_dim": 48,
    "hidden_dim": 64,
    "bottleneck_dim": 32,
    "projection_dim": 32,
    "decoder_dim": 64,
    "decoder_depth": 1,
    "decoder_heads": 4,
    "freeze_last_layer_epochs": 0,
}


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"training.methods.{name}")


def masks_tokens(name: str) -> bool:
    """Whether a method is for ViTs alone, as all its presets then show."""
    presets: dict[str, Recipe] = module_of(name).PRESETS
    return all(recipe.backbone.startswith("vit") for recipe in presets.values())


CASES = [
    (name, encoder)
    for name in NAMES
    for encoder in ENCODERS
    if encoder == "test_vit" or not masks_tokens(name)
]


def small_recipe(name: str, **changes: object) -> Recipe:
    """The method's CIFAR preset with a small head; `changes` go over its hyper-parameters."""
    recipe: Recipe = module_of(name).PRESETS["cifar"]
    known = {field.name for field in fields(recipe.objective)}
    unknown = changes.keys() - known
    assert not unknown, f"{name} has no hyper-parameter {unknown}"
    small = {key: value for key, value in {**SMALL, **changes}.items() if key in known}
    return replace(recipe, objective=replace(recipe.objective, **small))


def build(name: str, encoder: str, *, seed: int = 0, **changes: object) -> Method:
    """The method over a tiny encoder. Leaves torch's global generator as it was."""
    recipe = small_recipe(name, **changes)
    pixels = tuple(view.size for view in recipe.augmentation.flat_views)
    options: dict[str, Any] = resolve_options(
        encoder, ENCODERS[encoder], pixels, recipe.test.flat_views[0].size
    )
    facts = Facts(
        num_classes=CLASSES,
        train_samples=64,
        view_pixels=pixels,
        batch_size=16,
        steps_per_epoch=4,
        total_steps=20,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return module_of(name).build(recipe.objective, EncoderFactory(encoder, options), facts)


def progress_at(step: int) -> Progress:
    return Progress(step=step, total_steps=20, steps_per_epoch=4, seed=5)


def make_batch(augmentation: Augmentation, samples: int = 16, seed: int = 0) -> Batch:
    """Smooth pictures, one per class, of which each view is a noisy copy; masks as declared."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(samples, 3, 5, 5, generator=generator)
    views: list[Tensor] = []
    masks: list[Tensor | None] = []
    for view in augmentation.flat_views:
        smooth = F.interpolate(coarse, size=(view.size,) * 2, mode="bicubic")
        noise = torch.randn(smooth.shape, generator=generator)
        views.append((smooth + 0.03 * noise).contiguous(memory_format=torch.channels_last))
        mask = None
        if view.mask is not None:
            assert isinstance(view.mask, RandomMask)
            patches = (view.size // view.mask.patch_pixels) ** 2
            ranks = torch.rand(samples, patches, generator=generator).argsort(dim=1).argsort(dim=1)
            mask = ranks >= int(patches * (1 - view.mask.ratio))
        masks.append(mask)
    return Batch(
        views=tuple(views),
        labels=torch.arange(samples) % CLASSES,
        ids=torch.randperm(1000, generator=generator)[:samples],
        masks=tuple(masks),
        epoch=0,
        position=0,
    )


def batch_of(name: str, samples: int = 16, seed: int = 0) -> Batch:
    return make_batch(small_recipe(name).augmentation, samples, seed)


def train_step(
    method: Method, optimizer: torch.optim.Optimizer, parts: list[Batch], progress: Progress
) -> Tensor:
    """As in train.py; the mean loss over the micro-batches."""
    method.before_step(progress)
    optimizer.zero_grad()
    losses, embeddings = [], []
    for part in parts:
        outputs, embedded = method(part, progress)
        (outputs["loss"] / len(parts)).backward()
        losses.append(outputs["loss"].detach())
        embeddings.append({name: value.detach() for name, value in embedded.items()})
    method.after_backward(progress)
    optimizer.step()
    method.after_step(embeddings, parts, progress)
    return torch.stack(losses).mean()


def sgd(method: Method, rate: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=rate)
