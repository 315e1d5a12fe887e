"""What a run says, while it trains, of images that it does not train on.

Of every held-out set ("holdout", a part of the training set, and "val"), under its name:

    holdout_loss        the method's loss on the training views, without mixing: a mean over whole
                        batches, the same ones in the same views each time. Dropout is off, and
                        batch norm takes its running statistics
    holdout_knn_top1    the share of images whose class their 20 nearest training images vote for,
                        as evaluate.py has it, of the encoder as it is, in the test view; where all
                        have labels and the method has no classifier of its own
    holdout_*           what `Method.evaluate` gives

Nothing of this has a gradient or changes any state of the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from headrace.training.class_numbers import unlabelled
from headrace.training.collectives import gather_objects, mean_over_ranks
from headrace.training.config import Config
from headrace.training.features import FeaturePass, eval_mode, extract
from headrace.training.inputs import held_out_passes
from headrace.training.method import Method, Progress
from headrace.training.preset import ConfigError, require
from headrace.training.protocols.knn import knn_accuracy

NEIGHBOURS = 20


@dataclass(frozen=True)
class HeldOut:
    """One set of images, and what is said of them. loss_batch: images per batch over all ranks, 0
    for no loss. neighbours: of kNN, 0 for none. evaluated: whether `Method.evaluate` is asked."""

    images: FeaturePass
    samples: int
    loss_batch: int
    neighbours: int
    evaluated: bool


@dataclass(frozen=True)
class Validation:
    """sets: by the name that their numbers begin with. sentences: what will be said of each."""

    config: Config
    training_images: FeaturePass
    sets: Mapping[str, HeldOut]
    sentences: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Of the numbers that `measure` gives, but for what is a method's own beside top1."""
        names: list[str] = []
        for name, held_out in self.sets.items():
            names += [f"{name}_loss"] if held_out.loss_batch else []
            names += [f"{name}_knn_top1"] if held_out.neighbours else []
            names += [f"{name}_top1"] if held_out.evaluated else []
        return names

    @torch.no_grad()
    def measure(self, method: Method, progress: Progress) -> dict[str, float]:
        """{"holdout_loss": ..., ...}. Every rank calls it and gets the same."""
        values: dict[str, float] = {}
        neighbours = max((held_out.neighbours for held_out in self.sets.values()), default=0)
        bank = extract(method.encoder, self.training_images) if neighbours else None
        world = self.training_images.world
        with eval_mode(method):
            for name, held_out in self.sets.items():
                if held_out.loss_batch:
                    values[f"{name}_loss"] = self._loss(method, held_out, progress)
                if held_out.evaluated:
                    values |= {
                        f"{name}_{key}": value
                        for key, value in _evaluated(method, held_out.images).items()
                    }
                if held_out.neighbours and bank is not None:
                    features = extract(method.encoder, held_out.images)
                    result = knn_accuracy(bank, features, world, ks=(held_out.neighbours,))
                    accuracy = result.accuracies[held_out.neighbours]
                    values[f"{name}_knn_top1"] = accuracy.top1 / 100
        return values

    def _loss(self, method: Method, held_out: HeldOut, progress: Progress) -> float:
        images = held_out.images
        device, bf16 = images.world.device, images.precision == "bf16"
        losses: list[torch.Tensor] = []
        with images.whole_batches(self.config.augmentation, held_out.loss_batch) as loader:
            for batch in loader:
                images.note(batch)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    outputs, _ = method(batch, progress)
                losses.append(outputs["loss"].double())
        return float(mean_over_ranks(torch.stack(losses).mean()))


def prepare_validation(config: Config, method: Method, training_images: FeaturePass) -> Validation:
    """What --data.holdout and --data.val make a run say.

    Raises ConfigError for sets that the method has nothing to say of, and whatever opening them
    raises: before the first step.
    """
    sets: dict[str, HeldOut] = {}
    sentences: list[str] = []
    for name, images in held_out_passes(config, training_images).items():
        held_out, missing = _held_out(config, method, training_images, name, images)
        shown = ", ".join(_numbers(name, held_out))
        require(
            shown != "",
            f"--data.{name}: {config.method} has nothing to say of these images "
            f"({'; '.join(missing)}): leave the option out",
        )
        sets[name] = held_out
        notes = "".join(f"; {note}" for note in missing)
        sentences.append(f"{name}: {held_out.samples:,} images for {shown}{notes}")
    return Validation(config, training_images, sets, tuple(sentences))


def _held_out(
    config: Config, method: Method, training_images: FeaturePass, name: str, images: FeaturePass
) -> tuple[HeldOut, list[str]]:
    """(the set, what is not said of it and why)."""
    ids, training_ids = images.ids(), training_images.ids()
    without_label = unlabelled(images.store, ids)
    in_training = unlabelled(training_images.store, training_ids)
    judges_itself = type(method).evaluate is not Method.evaluate
    missing: list[str] = []
    neighbours, evaluated = 0, judges_itself and without_label < len(ids)
    if judges_itself and not evaluated and in_training < len(training_ids):
        raise ConfigError(
            f"--data.{name}: none of the {len(ids):,} images of {images.store.uri} has a label, "
            f"and {config.method} is judged by the class of each"
        )
    if judges_itself and without_label:
        missing.append(f"{without_label:,} have no label and count for no hits")
    elif not judges_itself and without_label + in_training:
        missing.append(
            f"no kNN, as {without_label:,} of them and {in_training:,} training images have no "
            f"label"
        )
    elif not judges_itself:
        neighbours = min(NEIGHBOURS, len(training_ids))
    loss_batch = 0
    if method.knows_training_images_only:
        missing.append("no loss, as it looks images up among those that are trained on")
    elif evaluated and without_label:
        missing.append("no loss, which needs their labels")
    elif (loss_batch := _loss_batch(config, images, len(ids))) == 0:
        missing.append("no loss, as they are too few for a batch over all ranks")
    else:
        # What a set lacks (components of its images, say) is found now and not after an epoch.
        images.whole_batches(config.augmentation, loss_batch).close()
    return HeldOut(images, len(ids), loss_batch, neighbours, evaluated), missing


def _loss_batch(config: Config, images: FeaturePass, samples: int) -> int:
    """As many as training's micro-batches over all ranks, or fewer where there are fewer."""
    in_training = config.data.batch_size // config.run.accumulate
    unit = images.world.size * config.augmentation.group
    return min(in_training, samples // unit * unit)


def _numbers(name: str, held_out: HeldOut) -> list[str]:
    """What is said, in words."""
    shown = []
    if held_out.loss_batch:
        used = held_out.samples // held_out.loss_batch * held_out.loss_batch
        shown.append(f"{name}_loss (of {used:,} in batches of {held_out.loss_batch:,})")
    if held_out.neighbours:
        shown.append(f"{name}_knn_top1 (k = {held_out.neighbours})")
    if held_out.evaluated:
        shown.append(f"{name}_top1")
    return shown


def _evaluated(method: Method, images: FeaturePass) -> dict[str, float]:
    """Means of `method.evaluate` over every sample exactly once.

    Sums and counts are added up over the ranks, whose shares may differ in length.
    """
    totals: dict[str, tuple[float, int]] = {}
    for of_rank in gather_objects(_totals(method, images)):
        for key, (total, count) in of_rank.items():
            before = totals.get(key, (0.0, 0))
            totals[key] = (before[0] + total, before[1] + count)
    return {key: total / count for key, (total, count) in totals.items()}


def _totals(method: Method, images: FeaturePass) -> dict[str, tuple[float, int]]:
    """This rank's sum and number of values under each name."""
    device, bf16 = images.world.device, images.precision == "bf16"
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    with images.loader() as loader:
        for batch in loader:
            images.note(batch)
            sound = batch.sound()
            if len(sound) == 0:
                continue
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                values = method.evaluate(sound)
            for key, value in values.items():
                total = value.double().sum()
                sums[key] = sums[key] + total if key in sums else total
                counts[key] = counts.get(key, 0) + value.numel()
    return {key: (float(sums[key]), counts[key]) for key in sums if counts[key] > 0}
