"""Pre-train an image encoder: from a data set and a method's preset to RUN/encoder.safetensors.

    python training/train.py --method dino
    python training/train.py --method dino --data.train DIR --gpus 8

`--help` shows the options. Read from top to bottom, this file is what happens in a run.
"""

if __name__ == "__main__":
    # Help and mistakes need none of what follows; then this file is imported, and `main` called.
    from headrace.training import launch

    launch.train()

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from headrace.pipelines.batch import Batch
from headrace.pipelines.compiling import told_of_compiling
from headrace.pipelines.loader import Loader
from headrace.shards.store import Store
from headrace.training import optim
from headrace.training.blocks import norm
from headrace.training.build import method_of_run, with_backbone
from headrace.training.catalogue import find_method
from headrace.training.collapse import collapse_in_words
from headrace.training.command_line import parse_command_line
from headrace.training.config import Config, steps_between, total_steps
from headrace.training.data_sets import census_of, largest_side_pixels, open_train
from headrace.training.first_words import first_words
from headrace.training.gradients import cache_sentences
from headrace.training.guard import Guard, Signals, catch_signals
from headrace.training.initial import require_same_init
from headrace.training.inputs import (
    feature_pass,
    fitted_batch,
    open_training_loader,
    with_paths,
)
from headrace.training.meters import Meters
from headrace.training.method import Method, Progress
from headrace.training.parallel import model_for
from headrace.training.requirements import free_on_resume, require_runnable
from headrace.training.run import checkpoint
from headrace.training.run.directory import begin
from headrace.training.run.export import timm_config
from headrace.training.run.faults import Faults, UnusableImage, how_to_go_on
from headrace.training.run.journal import open_journal
from headrace.training.run.kept import Kept, require_metric
from headrace.training.run.lock import locked
from headrace.training.run.record import read_record
from headrace.training.run.what_now import what_now
from headrace.training.step import early_parameters, optimiser_step
from headrace.training.subset import read_subset
from headrace.training.validation import prepare_validation
from headrace.training.world import World, join, seed_layers, takes_bf16


def main(arguments: Sequence[str]) -> int:
    config = parse_command_line(arguments, lambda path: largest_side_pixels(open_train(path)))
    config, out = with_paths(with_backbone(config))
    with (
        join(config.run.device) as world,
        catch_signals() as signals,
        locked(out),
    ):
        store = open_train(config.data.train)
        if world.is_main:
            print(*census_of(store), sep="\n", flush=True)
        return train(config, store, out, world, signals)


def train(config: Config, store: Store, out: Path, world: World, signals: Signals) -> int:
    """A whole run, or the rest of one that was stopped. Returns the exit code."""
    before = checkpoint.load(out, world.device, resume=config.run.resume)
    if before:
        require_same_init(config.init, read_record(out).init, out)

    # ------------------------------------------------------------------------------------- Data
    subset = read_subset(config.data.subset, store)
    config, about_batches = fitted_batch(config, store, subset, world.size)
    data, run = config.data, config.run
    engine = before["engine"] if before and data.engine == "auto" else data.engine
    loader = open_training_loader(config, store, subset, world, engine, stops_at_faults=True)
    epoch_steps = loader.steps_per_epoch
    steps = total_steps(run, epoch_steps)

    # ----------------------------------------------------------------------------------- Method
    about_weights: list[str] = []
    method = method_of_run(
        config,
        store,
        subset,
        epoch_steps=epoch_steps,
        steps=steps,
        resumed=before is not None,
        say=about_weights.extend,
    )
    method.to(world.device)
    require_runnable(config, method, world.size)
    method.before_run()
    if run.batch_norm == "global":
        norm.convert(method, world)
    model = model_for(method, world, cached=run.gradient_cache)

    # ---------------------------------------------------------------------------- Optimisation
    schedule = optim.Schedule(config.optim, data.batch_size, steps / epoch_steps)
    optimizer = optim.build_optimizer(method.param_groups(), schedule)
    bf16 = takes_bf16(run.precision, world.device)
    guard = Guard(method, optimizer, world, signals, early_parameters(method))

    # ------------------------------------------------------------------------------ Other passes
    context = feature_pass(config, store, subset, world, loader.engine_name, bf16=bf16)
    validation = prepare_validation(config, method, context)
    evaluate_steps = steps_between(run.evaluate_every, epoch_steps) or steps
    require_metric(run.keep_best, validation.names)

    # ------------------------------------------------------------------------ Begin or continue
    fingerprint = config.fingerprint(
        loader.fingerprint, total_steps=steps, precision=context.precision, world_size=world.size
    )
    faults = Faults(store, before.get("faults") if before else None)
    if before:
        faults.accept_repairs(before)
        free = free_on_resume(method, schedule, before, epoch_steps)
        checkpoint.require_same(out, before["fingerprint"], fingerprint, free=free)
        method.load_state_dict(before["method"])
        optimizer.load_state_dict(before["optimizer"])
        if before["step"] % epoch_steps:
            follow_table(loader, method, Progress(before["step"], steps, epoch_steps, run.seed))
        loader.load_state_dict(before["loader"])
    network = timm_config(method.encoder, config.test, store.classes)
    start = before["step"] if before else 0
    kept = Kept(out, world, start, keep_every=run.keep_every, keep_best=run.keep_best)
    meters = Meters(world, data.batch_size, before["meters"] if before else None)
    if world.is_main and start < steps:
        derived = {"steps": steps, "learning_rate": schedule.peak, "world_size": world.size}
        derived |= {"engine": loader.engine_name, "precision": context.precision}
        derived |= {"classes": len(store.classes), "epoch_steps": epoch_steps}
        derived |= {"class_names": list(store.classes)}
        begin(out, start, config.declaration(), derived, fingerprint)

    def state(step: int) -> dict[str, Any]:
        return {
            "step": step,
            "method": method.state_dict(),
            "optimizer": optimizer.state_dict(),
            "loader": loader.state_dict(divmod(step, epoch_steps)),
            "meters": meters.state_dict(),
            "faults": faults.known,
            "engine": loader.engine_name,
            "fingerprint": fingerprint,
        }

    def require_images(step: int, *, begun: bool) -> str:
        """What passes over images just left out, in words; the run ends saved where it may not."""
        left_out = faults.in_passes(context.unusable)
        if left_out and data.on_error == "raise":
            if begun:
                guard.restore()
            checkpoint.save_step(out, state(step), method.exports(), network, world)
            raise UnusableImage(f"{left_out}. {how_to_go_on(out, step)}")
        return left_out

    # ------------------------------------------------------------------------------------- Loop
    with (
        loader,
        open_journal(out, world, start=start, total_steps=steps) as journal,
        told_of_compiling(journal.say),
    ):
        for sentence in (
            *first_words(config, store, loader, schedule, world, start=start, steps=steps),
            *about_weights,
            *about_batches,
            *validation.sentences,
            *cache_sentences(method, run.gradient_cache),
        ):
            journal.say(sentence)
        batches = meters.timed(forever(loader))
        for step in range(start, steps):
            progress = Progress(step, steps, epoch_steps, run.seed)
            guard.begin()
            seed_layers(run.seed, step, world)
            if step % epoch_steps == 0:
                with meters.paused():
                    method.before_epoch(context, progress)
                    follow_table(loader, method, progress)
                if left_out := require_images(step, begun=True):
                    journal.say(left_out)
            rates = schedule.apply(optimizer, progress.fraction)
            report = optimiser_step(
                method,
                model,
                optimizer,
                batches,
                progress,
                world=world,
                micro_batches=run.accumulate,
                clip_norm=config.optim.clip_norm,
                bf16=bf16,
                cached=run.gradient_cache,
                guard=guard,
            )
            done = step + 1
            guard.end(done, report.batches)
            # What follows looks at the device, each at its own cadence.
            evaluating = bool(validation.sets) and (done % evaluate_steps == 0 or done == steps)
            logging = done % run.log_every == 0 or done == steps or evaluating
            saving = done % run.save_every == 0 or done == steps
            verdict = guard.read(drain=logging or saving)
            for sentence in faults.met(verdict.faults, out, world, skipped=not verdict.missing):
                journal.say(sentence)
            if missing := verdict.missing:
                meters.forget(done - missing[0])
                checkpoint.save_step(out, state(missing[0] - 1), method.exports(), network, world)
                raise faults.stopped(*missing, out)
            if verdict.failed_step is not None:
                return checkpoint.fail(out, verdict.failed_step, verdict.ids, state(done), world)
            meters.step(report.scalars)
            journal.advance()
            evaluated: dict[str, float] = {}
            if logging:
                values = {"step": done, "epoch": done / epoch_steps, **meters.take(), **rates}
                with meters.paused():
                    if evaluating:
                        evaluated = validation.measure(method, progress)
                journal.record(values, evaluated)
                if collapsed := collapse_in_words(values, config.objective):
                    journal.say(collapsed)
                if evaluating and (left_out := require_images(done, begun=False)):
                    journal.say(left_out)
            if names := kept.due(done, evaluated):
                with meters.paused():
                    kept.write(names, done, method.exports(), network)
            if saving or verdict.stop:
                with meters.paused():
                    journal.flush()
                    checkpoint.save_step(out, state(done), method.exports(), network, world)
            if verdict.stop and done < steps:
                journal.say(f"{guard.signal_name}: saved; the same command goes on at step {done}")
                return guard.exit_code
        journal.say(f"finished: {out} is at step {steps} of {steps}")
        journal.say(what_now(out, network, find_method(config.method).judged_by))
    return 0


def follow_table(loader: Loader, method: Method, progress: Progress) -> None:
    """The method's own order of this epoch, where it has one."""
    table = method.order_table(progress.epoch_start)
    if table is not None:
        loader.use_table(table.cpu().numpy())


def forever(loader: Loader) -> Iterator[Batch]:
    """Epoch after epoch."""
    while True:
        yield from loader
