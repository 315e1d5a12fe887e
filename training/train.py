"""Pre-train an image encoder: from a data set and a method's recipe to RUN/encoder.safetensors.

    python training/train.py --method dino
    torchrun --standalone --nproc-per-node 8 training/train.py --method dino --data.train DIR

`--help` shows the options. Read from top to bottom, this file is what happens in a run.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from pipelines.batch import Batch
from pipelines.loader import Loader
from shards.store import Store
from training import checkpoint, optim
from training.backbones import EncoderFactory, read_initial, resolve_options
from training.blocks import norm
from training.command_line import parse_command_line
from training.config import Config, find_method, steps_between, total_steps
from training.ending import run_and_exit
from training.guard import Guard, Signals, catch_signals
from training.meters import Journal, Meters
from training.method import Facts, Method, Progress
from training.samples import (
    feature_pass,
    held_out_passes,
    largest_side_pixels,
    open_train,
    open_training_loader,
    read_subset,
    with_paths,
)
from training.validation import evaluates, validate
from training.world import World, distributed, join, seed_layers


def main(arguments: Sequence[str]) -> int:
    config = parse_command_line(arguments, lambda path: largest_side_pixels(open_train(path)))
    config, out = with_paths(config)
    with (
        join(config.run.device) as world,
        catch_signals() as signals,
        checkpoint.locked(out, world),
    ):
        return train(config, open_train(config.data.train), out, world, signals)


def train(config: Config, store: Store, out: Path, world: World, signals: Signals) -> int:
    """A whole run, or the rest of one that was stopped. Returns the exit code."""
    data, run = config.data, config.run
    before = checkpoint.load(out, world.device, resume=run.resume)

    # ------------------------------------------------------------------------------------- Data
    subset = read_subset(data.subset, store)
    engine = before["engine"] if before and data.engine == "auto" else data.engine
    loader = open_training_loader(config, store, subset, world, engine)
    epoch_steps = loader.steps_per_epoch
    steps = total_steps(run, epoch_steps)

    # ----------------------------------------------------------------------------------- Method
    torch.manual_seed(run.seed)  # the weights' randomness, equal on every rank
    view_pixels = tuple(view.size for view in config.augmentation.flat_views)
    test_pixels = config.test.flat_views[0].size
    options = resolve_options(config.backbone, config.backbone_options, view_pixels, test_pixels)
    initial = read_initial(config.init) if config.init and not before else None
    make_encoder = EncoderFactory(config.backbone, options, initial=initial, compiled=run.compile)
    facts = Facts(len(store.classes), len(store), view_pixels, data.batch_size, epoch_steps, steps)
    method: Method = find_method(config.method).build(config.objective, make_encoder, facts)
    method.to(world.device)
    if run.batch_norm == "global":
        norm.convert(method, world)
    model = distributed(method, world)

    # ---------------------------------------------------------------------------- Optimisation
    schedule = optim.Schedule(config.optim, data.batch_size, steps / epoch_steps)
    optimizer = optim.build_optimizer(method.param_groups(), schedule)
    trained = optim.trained_parameters(optimizer)
    bf16 = run.precision == "bf16" or (run.precision == "auto" and world.device.type == "cuda")
    guard = Guard(method, optimizer, world, signals)

    # ------------------------------------------------------------------------------ Other passes
    context = feature_pass(config, store, subset, world, loader.engine_name, bf16=bf16)
    held_out = held_out_passes(config, context) if evaluates(method) else {}
    evaluate_steps = steps_between(run.evaluate_every, epoch_steps) or steps

    # ------------------------------------------------------------------------ Begin or continue
    config = replace(config, backbone_options=options)
    fingerprint = config.fingerprint(
        loader.fingerprint, total_steps=steps, precision=context.precision, world_size=world.size
    )
    if before:
        checkpoint.require_same(out, before["fingerprint"], fingerprint)
        method.load_state_dict(before["method"])
        optimizer.load_state_dict(before["optimizer"])
        loader.load_state_dict(before["loader"])
    start = before["step"] if before else 0
    meters = Meters(world, data.batch_size, before["meters"] if before else None)
    if world.is_main and start < steps:
        derived = {"steps": steps, "learning_rate": schedule.peak, "world_size": world.size}
        derived |= {"engine": loader.engine_name, "precision": context.precision}
        checkpoint.begin(out, start, config.declaration(), derived, fingerprint)

    def state(step: int) -> dict[str, Any]:
        return {
            "step": step,
            "method": method.state_dict(),
            "optimizer": optimizer.state_dict(),
            "loader": loader.state_dict(),
            "meters": meters.state_dict(),
            "engine": loader.engine_name,
            "fingerprint": fingerprint,
        }

    # ------------------------------------------------------------------------------------- Loop
    with loader, Journal(out, world, start=start, total_steps=steps) as journal:
        journal.say(
            f"{config.method}, preset {config.preset}, {config.backbone}: {out}\n"
            f"{store.uri}: {len(store)} images, {epoch_steps} steps of {data.batch_size} in an "
            f"epoch, by the {loader.engine_name} engine\n"
            f"step {start} of {steps} on {world.size} x {world.device.type}, "
            f"peak learning rate {schedule.peak:.3g}"
        )
        batches = forever(loader)
        for step in range(start, steps):
            progress = Progress(step, steps, epoch_steps, run.seed)
            guard.begin()
            seed_layers(run.seed, step, world)
            if step % epoch_steps == 0:
                method.before_epoch(context, progress)
            method.before_step(progress)
            rates = schedule.apply(optimizer, progress.fraction)

            taken, embeddings, losses = [], [], []
            for part in range(run.accumulate):
                with meters.waiting():
                    batch = next(batches)
                more = part + 1 < run.accumulate
                ddp = isinstance(model, DistributedDataParallel)
                with model.no_sync() if ddp and more else nullcontext():
                    with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
                        outputs, embedded = model(batch, progress)
                    (outputs["loss"] / run.accumulate).backward()
                meters.add(outputs)
                taken.append(batch)
                embeddings.append({name: tensor.detach() for name, tensor in embedded.items()})
                losses.append(outputs["loss"].detach())
            gradient_norm = optim.gradient_norm(trained)
            guard.check([*losses, gradient_norm])
            if config.optim.clip_norm is not None:
                optim.clip_gradients(trained, gradient_norm, config.optim.clip_norm)
            method.after_backward(progress)
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(embeddings, taken, progress)
            guard.end(step + 1, taken)
            meters.step({"gradient_norm": gradient_norm})
            journal.advance()

            # What follows looks at the device, each at its own cadence.
            done = step + 1
            evaluating = bool(held_out) and (done % evaluate_steps == 0 or done == steps)
            logging = done % run.log_every == 0 or done == steps or evaluating
            saving = done % run.save_every == 0 or done == steps
            verdict = guard.read(drain=logging or saving)
            if verdict.failed_step is not None:
                return checkpoint.fail(out, verdict.failed_step, verdict.ids, state(done), world)
            if logging:
                values = {"step": done, "epoch": done / epoch_steps, **meters.take(), **rates}
                with meters.paused():
                    evaluated = validate(method, held_out) if evaluating else {}
                journal.record(values, evaluated)
            if saving or verdict.stop:
                with meters.paused():
                    journal.flush()
                    checkpoint.save_step(out, state(done), method.encoder, world)
            if verdict.stop and done < steps:
                journal.say(f"{guard.signal_name}: saved; the same command goes on at step {done}")
                return guard.exit_code
        journal.say(f"finished: {out} is at step {steps} of {steps}")
    return 0


def forever(loader: Loader) -> Iterator[Batch]:
    """Epoch after epoch."""
    while True:
        yield from loader


if __name__ == "__main__":
    run_and_exit(main)
