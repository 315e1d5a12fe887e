"""Every method of the folder, small enough to run in a test; used by several test files.

The data set is 64 smooth pictures; a view is a noisy copy of its sample's. What else a batch holds
(masks, erasing, mixing, draws) comes from a Plan of the method's own recipe.
"""

import atexit
import importlib
import json
import pkgutil
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.pipelines.draw import draw
from headrace.pipelines.engines import Work
from headrace.pipelines.engines.device_stage import device_stage
from headrace.pipelines.recipe import Augmentation
from headrace.training import methods
from headrace.training.backbones import EncoderFactory, resolve_options
from headrace.training.catalogue import find_method
from headrace.training.method import Facts, Method, Progress
from headrace.training.optim import Schedule, build_optimizer
from headrace.training.preset import ConfigError, Preset
from headrace.training.run.export import export
from headrace.training.step import optimiser_step
from headrace.training.world import World

NAMES = sorted(module.name for module in pkgutil.iter_modules(methods.__path__))
ENCODERS: dict[str, dict[str, object]] = {
    "test_resnet": {"zero_init_last": False},
    "test_vit": {"patch_size": 4, "global_pool": "avg", "depth": 3},
}
ONE = World()
CLASSES = 16
SAMPLES = 64  # of the tiny data set
BATCH = 16
EPOCH_STEPS = SAMPLES // BATCH

# A hyper-parameter of one of these names is made small, whichever method has it.
SMALL: dict[str, object] = {
    "out_dim": 48,
    "hidden_dim": 64,
    "bottleneck_dim": 32,
    "projection_dim": 32,
    "prediction_dim": 32,
    "decoder_dim": 64,
    "decoder_depth": 1,
    "decoder_heads": 4,
    "freeze_last_layer_epochs": 0,
    "queue_size": 32,
    "num_prototypes": 12,
    "clusters": 8,
    "negatives": 24,
}
# What a single method needs beside that.
SMALL_OF: dict[str, dict[str, object]] = {
    # A bank of 64 rows, of which the same few move at every step, asks for soft comparisons.
    "cmc": {"temperature": 0.3},
    # Whitened in as many dimensions as there are pictures, all are equally far from each other.
    "deepcluster": {"pca_dim": 8},
    "cpc": {"patch_pixels": 16, "stride_pixels": 8, "steps": 2},
    # Scores are sums over the width, and steep ones magnify rounding. Maps of any size.
    "dim": {"hidden_dim": 8, "local_stage": -3, "global_weight": 0.0},
    "npid": {"temperature": 0.3},
    # At 2 the margin has no kink within reach.
    "pair": {"margin": 2.0},
    "moco": {"batch_norm_group": 4},
    "pcl": {"batch_norm_group": 4, "clusters": (6, 10), "warmup_epochs": 0},
    "swav": {"queue_start_epochs": 0, "freeze_prototypes_steps": 1},
    # A tenth of each, or ten steps of one rate lead so far that they magnify rounding.
    "vicreg": {"invariance_weight": 2.5, "variance_weight": 2.5, "covariance_weight": 0.1},
}


@cache
def tiny_teacher() -> Path:
    """The directory of a run that trained a classifier, as far as a student looks into it."""
    run = Path(tempfile.mkdtemp(prefix="headrace-teacher-"))
    atexit.register(shutil.rmtree, run, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = timm.create_model("test_resnet", num_classes=0).eval()
    view, ids = recipes.center(32, 32), torch.arange(SAMPLES)
    with torch.no_grad():
        features = network(finished(view, ids).views[0])
    # Ridge regression onto the labels: it knows its pictures.
    mean, known = features.mean(0), F.one_hot(ids % CLASSES, CLASSES).float()
    centred = features - mean
    kernel = centred @ centred.T
    weight = known.T @ torch.linalg.inv(kernel + 1e-3 * kernel.trace() * torch.eye(SAMPLES) / 64)
    weight = 10 * weight @ centred
    state = {**network.state_dict(), "fc.weight": weight, "fc.bias": -weight @ mean}
    export(state, run / "classifier.safetensors")
    test = view.declaration()
    config = {"backbone": "test_resnet", "backbone_options": {}, "test": test}
    (run / "config.json").write_text(json.dumps({"config": config}))
    return run


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"headrace.training.methods.{name}")


def small_preset(name: str, **changes: object) -> Preset:
    """The method's CIFAR preset with a small head; `changes` go over its hyper-parameters."""
    preset: Preset = module_of(name).PRESETS["cifar"]
    known = {field.name for field in fields(preset.objective)}
    unknown = {*changes, *SMALL_OF.get(name, {})} - known
    assert not unknown, f"{name} has no hyper-parameter {unknown}"
    wanted = {**SMALL, **SMALL_OF.get(name, {}), **changes}
    small = {key: value for key, value in wanted.items() if key in known}
    if "teacher" in known:
        small["teacher"] = str(tiny_teacher())
    # Ranks and micro-batches of these tests hold whole groups of 4.
    augmentation = replace(preset.augmentation, group=min(preset.augmentation.group, 4))
    return replace(preset, objective=replace(preset.objective, **small), augmentation=augmentation)


def build(name: str, encoder: str, *, seed: int = 0, **changes: object) -> Method:
    """The method over a tiny encoder, at the beginning of its first epoch.

    Leaves torch's global generator as it was.
    """
    preset = small_preset(name, **changes)
    pixels = tuple(view.shape[0] for view in preset.augmentation.flat_views)
    own = dict(ENCODERS[encoder])
    if encoder == "test_resnet" and "norm_layer" in preset.backbone_options:
        own["norm_layer"] = preset.backbone_options["norm_layer"]
    options: dict[str, Any] = resolve_options(
        encoder, own, pixels, preset.test.flat_views[0].shape[0]
    )
    facts = Facts(
        num_classes=CLASSES,
        train_samples=SAMPLES,
        view_pixels=pixels,
        batch_size=BATCH,
        steps_per_epoch=EPOCH_STEPS,
        total_steps=20,
        init=tiny_teacher() if find_method(name).init_is_teacher else None,
        mean=preset.augmentation.mean,
        std=preset.augmentation.std,
        masks=tuple(view.mask for view in preset.augmentation.flat_views),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        method = module_of(name).build(preset.objective, EncoderFactory(encoder, options), facts)
    method.before_epoch(TinyContext(preset), progress_at(0))
    return method


@cache
def refusal(name: str, encoder: str) -> str | None:
    """Why a method does not take an encoder; None where it does.

    Any error is one, so that a broken method fails its own tests (a refusal has to read well) and
    not everybody's.
    """
    try:
        build(name, encoder)
    except ConfigError as error:
        return str(error)
    except Exception as error:
        return f"{error!r}"
    return None


def progress_at(step: int) -> Progress:
    return Progress(step=step, total_steps=20, steps_per_epoch=EPOCH_STEPS, seed=5)


def pictures(ids: Tensor, pixels: int, noise: float, generator: torch.Generator) -> Tensor:
    """uint8 [n, 3, pixels, pixels], channels last: smooth and different for every sample."""
    fixed = torch.Generator().manual_seed(99)
    every = torch.randn(SAMPLES, 3, 5, 5, generator=fixed)
    every += 1.5 * torch.randn(SAMPLES, 3, 1, 1, generator=fixed)  # dark, light, red, green ones
    smooth = F.interpolate(every[ids], size=(pixels, pixels), mode="bicubic")
    smooth += noise * torch.randn(smooth.shape, generator=generator)
    seen = (255 * torch.sigmoid(3 * smooth)).round().to(torch.uint8)
    return seen.contiguous(memory_format=torch.channels_last)


def finished(augmentation: Augmentation, ids: Tensor, epoch: int = 0, seed: int = 0) -> Batch:
    """These samples as a loader delivers them, in torch's default dtype."""
    generator = torch.Generator().manual_seed(seed)
    plan = draw(
        augmentation,
        seed=seed,
        epoch=epoch,
        position=0,
        ids=ids.numpy(),
        occurrences=np.zeros(len(ids), np.int32),
        sizes=np.full((len(ids), 2), 40, np.int32),
    )
    views = tuple(pictures(ids, view.shape[0], 0.05, generator) for view in augmentation.flat_views)
    batch = Work(plan, [], (ids % CLASSES).numpy()).batch(views)
    staged = device_stage(batch, augmentation.mean, augmentation.std, device=torch.device("cpu"))
    return in_default_dtype(staged)


def in_default_dtype(batch: Batch) -> Batch:
    """A loader's float32 in the dtype of the networks, which is float64 where a test wants that."""
    dtype, mixed = torch.get_default_dtype(), batch.mixed
    if mixed is not None:
        mixed = replace(mixed, weights=mixed.weights.to(dtype))
    return replace(batch, views=tuple(view.to(dtype) for view in batch.views), mixed=mixed)


def make_batch(augmentation: Augmentation, samples: int = BATCH, seed: int = 0) -> Batch:
    """Distinct samples of the tiny data set."""
    generator = torch.Generator().manual_seed(seed)
    return finished(augmentation, torch.randperm(SAMPLES, generator=generator)[:samples], seed=seed)


def batch_of(name: str, samples: int = BATCH, seed: int = 0) -> Batch:
    return make_batch(small_preset(name).augmentation, samples, seed)


@dataclass(frozen=True)
class TinyContext:
    """The `Context` of `before_epoch`: the whole tiny data set, a rank's contiguous share of it."""

    preset: Preset
    world: World = ONE

    def features(
        self, module: Callable[[Tensor], Tensor], view: str = "test"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        views = {known.name: known for known in self.preset.augmentation.views}
        whole = self.preset.test if view == "test" else self.preset.augmentation
        chosen = self.preset.test.views[0] if view == "test" else views[view]
        alone = replace(whole, views=(replace(chosen, count=1),), mix=None, group=1, draws=())
        modes = {}
        if isinstance(module, nn.Module):
            modes = {part: part.training for part in module.modules()}
            module.eval()
        for ids in torch.arange(SAMPLES).chunk(self.world.size)[self.world.rank].split(8):
            with torch.no_grad():
                yield ids, module(finished(alone, ids).views[0]).float()
        for part, training_mode in modes.items():
            part.training = training_mode


def share(batch: Batch, rows: slice) -> Batch:
    """Some of a batch's samples, as a rank or a micro-batch has them; whole groups."""
    part = batch.map(lambda tensor: tensor[rows])
    if part.mixed is None:
        return part
    return replace(part, mixed=replace(part.mixed, partners=part.mixed.partners - rows.start))


def train_step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    parts: list[Batch],
    progress: Progress,
    *,
    world: World | None = None,
    context: TinyContext | None = None,
    model: nn.Module | None = None,
    cached: bool = False,
) -> Tensor:
    """A step of train.py with the method's epochs; the mean loss of the main phase over the
    micro-batches. The gradients stay in place."""
    if progress.step % progress.steps_per_epoch == 0 and context is not None:
        method.before_epoch(context, progress)
    report = optimiser_step(
        method,
        method if model is None else model,
        optimizer,
        iter(parts),
        progress,
        world=world or ONE,
        micro_batches=len(parts),
        cached=cached,
    )
    return torch.stack(report.losses).mean()


def sgd(method: Method, rate: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=rate)


def rates(method: Method, preset: Preset, progress: float) -> list[tuple[set[int], float, float]]:
    """(ids of parameters, learning rate, weight decay) per group, as the optimiser takes them."""
    schedule = Schedule(preset.optim, preset.batch_size, preset.epochs)
    optimizer = build_optimizer(method.param_groups(), schedule)
    schedule.apply(optimizer, progress)
    return [
        ({id(p) for p in group["params"]}, group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]


CASES = [(name, encoder) for name in NAMES for encoder in ENCODERS if not refusal(name, encoder)]
