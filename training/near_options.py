"""Which option was meant: the field has other words for most of ours."""

import difflib
from collections.abc import Collection

# What other programs of the field call it: ours. Where an option has the name itself, with or
# without what stands before its dot, nothing is needed here.
_OTHER_WORDS = {
    "--method": ("algorithm", "algo", "m", "model-type", "framework"),
    "--preset": ("config", "cfg", "config-file", "config-name", "recipe"),
    "--backbone": ("model", "arch", "architecture", "encoder", "network", "net", "a"),
    "--backbone-options": ("model-args", "model-kwargs", "patch-size", "drop-path", "img-size"),
    "--init": ("pretrained", "weights", "checkpoint", "ckpt", "finetune", "load", "pretrain"),
    "--gpus": ("gpu", "ngpus", "num-gpus", "devices", "nproc-per-node", "nproc", "world-size"),
    "--data.train": ("data", "data-path", "data-dir", "dataset", "root", "path", "d", "train-dir"),
    "--data.val": ("validation", "val-dir", "test", "eval-data", "data-val"),
    "--data.batch-size": ("bs", "batch", "b", "batchsize", "global-batch-size", "train-batch-size"),
    "--data.threads": ("workers", "num-workers", "j", "jobs", "cpus", "n-workers", "nworkers"),
    "--data.holdout": ("val-fraction", "val-split", "validation-split"),
    "--run.out": ("output", "output-dir", "o", "save-dir", "log-dir", "exp-dir", "outdir", "name"),
    "--run.epochs": ("e", "epoch", "num-epochs", "max-epochs", "n-epochs", "nepochs"),
    "--run.steps": ("iters", "iterations", "max-steps", "num-steps", "max-iter"),
    "--run.save-every": ("save-freq", "saveckp-freq", "checkpoint-every", "save-interval"),
    "--run.log-every": ("print-freq", "log-interval", "log-freq", "log-every-n-steps"),
    "--run.evaluate-every": ("eval-freq", "eval-every", "eval-interval", "val-every"),
    "--run.precision": ("amp", "fp16", "bf16", "use-fp16", "half", "dtype", "mixed-precision"),
    "--run.accumulate": (
        "accum-iter",
        "grad-accum",
        "gradient-accumulation-steps",
        "accumulate-grad-batches",
        "grad-accum-steps",
    ),
    "--run.batch-norm": ("sync-bn", "syncbn", "sync-batchnorm"),
    "--optim.name": ("opt", "optimizer", "optimiser"),
    "--optim.learning-rate": ("lr", "base-lr", "blr", "base-learning-rate", "max-lr"),
    "--optim.final-learning-rate": ("min-lr", "final-lr", "end-lr"),
    "--optim.warmup-epochs": ("warmup", "warmup-steps", "warm-up", "lr-warmup-epochs"),
    "--optim.schedule": ("scheduler", "sched", "lr-schedule", "lr-scheduler"),
    "--optim.milestones": ("lr-decay-epochs", "decay-epochs", "lr-steps"),
    "--optim.weight-decay": ("wd", "decay", "l2"),
    "--optim.final-weight-decay": ("weight-decay-end", "final-wd", "wd-end"),
    "--optim.clip-norm": ("clip-grad", "grad-clip", "max-grad-norm", "gradient-clip-val", "clip"),
    "--objective.temperature": ("temp", "tau", "t", "moco-t", "nce-t"),
    "--data.engine": ("loader", "backend", "dali"),
    "--test.size": ("image-size", "input-size", "resolution", "crop-size"),
}
_MEANT = {word: option for option, words in _OTHER_WORDS.items() for word in words}
_ALIKE = 0.72  # of the letters: "epoch" and "epochs" are, "lr" and "clip-norm" are not


def near_option(given: str, options: Collection[str]) -> str:
    """The end of a sentence about an option that there is not: ": did you mean ...?", or nothing.

    given: with its dashes. options: those that there are, spelled as in the help.
    """
    meant = _near(given.lstrip("-").lower().replace("_", "-"), options)
    return f": did you mean {' or '.join(meant)}?" if meant else ""


def _near(word: str, options: Collection[str]) -> list[str]:
    by_name = {option.lstrip("-"): option for option in options}
    if word in by_name:
        return [by_name[word]]
    last = word.rpartition(".")[2]
    for name in dict.fromkeys((word, last)):
        if _MEANT.get(name) in options:
            return [_MEANT[name]]
    ends = [option for option in options if _last(option) == last]
    if ends:
        return ends[:2]
    if near := difflib.get_close_matches(word, by_name, n=1, cutoff=_ALIKE):
        return [by_name[near[0]]]
    by_last = {_last(option): option for option in options} | _known_words(options)
    near = difflib.get_close_matches(last, by_last, n=1, cutoff=_ALIKE)
    return [by_last[near[0]]] if near else []


def _known_words(options: Collection[str]) -> dict[str, str]:
    return {word: option for word, option in _MEANT.items() if option in options and len(word) > 3}


def _last(option: str) -> str:
    return option.lstrip("-").rpartition(".")[2]
