"""What bounds a training run: the rule that `bench_training.py` applies to the rates it measured.

The rule (`decide`), with lost = 1 - real/synthetic rate and the wait share (on CUDA: the share of
time in which the device idled before a batch):
1. wait < 2 % and lost < 5 %: the model.
2. Input and model share cores (a run on a CPU that keeps them busy): of an image's time the model
   has real/synthetic and the input real/loader, divided as its parts take alone; the largest wins.
   This is work, not time spent waiting. What is missing to 1 is contention: threads in each other's
   way, or other work on the machine.
3. Otherwise the part of the input that alone takes longest; or transfer, where lost < 5 % but the
   synthetic run waits too: a copy to the device is nearly all that its input does.
The model is the synthetic run, with what little that engine does: it fills views with a constant.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

HARDLY_WAITS, AS_FAST = 0.02, 0.05

Part = Literal["storage", "decode", "augmentation", "transfer"]
Bound = Part | Literal["model"]
NAMES: dict[Bound, str] = {
    "storage": "storage",
    "decode": "decoding",
    "augmentation": "augmentation",
    "transfer": "the transfer to the device",
    "model": "the model",
}


@dataclass(frozen=True)
class Measured:
    """Images per second, and shares of time in [0, 1].

    storage: reading alone as the run found the data, cached: the same from the page cache. decode:
    reading and decoding. loader: all of the input. shares_cores: input and model use the same ones.
    """

    real: float
    synthetic: float
    wait_share: float
    synthetic_wait_share: float
    storage: float
    cached: float
    decode: float
    loader: float
    transfer: float | None
    shares_cores: bool


@dataclass(frozen=True)
class Verdict:
    """lost: 1 - real/synthetic. shares: how the time of an image's input divides; they sum to 1.

    contention: on shared cores, the part of `lost` that the input's work does not explain; else 0.
    """

    bound: Bound
    lost: float
    shares: dict[Part, float]
    contention: float = 0.0


def decide(measured: Measured) -> Verdict:
    """The rule of the module's docstring."""
    seconds: dict[Part, float] = {
        "storage": 1 / measured.storage,
        "decode": max(0.0, 1 / measured.decode - 1 / measured.cached),
        "augmentation": max(0.0, 1 / measured.loader - 1 / measured.decode),
    }
    if measured.transfer is not None:
        seconds["transfer"] = 1 / measured.transfer
    total = sum(seconds.values())
    shares: dict[Part, float] = {part: value / total for part, value in seconds.items()}
    slowest: Part = max(shares, key=shares.__getitem__)
    lost = 1 - measured.real / measured.synthetic
    bound: Bound = slowest
    contention = 0.0
    if measured.wait_share < HARDLY_WAITS and lost < AS_FAST:
        bound = "model"
    elif measured.shares_cores:
        work = min(max(0.0, lost), measured.real / measured.loader)
        contention = max(0.0, lost) - work
        bound = "model" if 1 - lost >= work * shares[slowest] else slowest
    elif lost < AS_FAST and measured.synthetic_wait_share >= HARDLY_WAITS and "transfer" in shares:
        bound = "transfer"
    return Verdict(bound, lost, shares, contention)


@dataclass(frozen=True)
class Setting:
    """What the advice depends on. packed: the data are shards, not a file per image.
    shares_cores: as in `Measured`."""

    engine: str
    device: str
    threads: int
    cores: int
    packed: bool
    shares_cores: bool


def sentence(measured: Measured, verdict: Verdict, setting: Setting) -> str:
    """What bounds the run, how that is known, and what to change."""
    name, lost, waits = NAMES[verdict.bound], max(0.0, verdict.lost), measured.wait_share
    change = advice(verdict.bound, setting)
    slower = f"{lost:.1%} slower than with synthetic data"
    if verdict.lost < -AS_FAST:
        slower = (
            "faster than with synthetic data, which take some work to make and normalise too: here "
            "they are no ceiling, unless the machine had other work"
        )
    if verdict.bound == "model" and waits < HARDLY_WAITS and lost < AS_FAST:
        return (
            f"The run is bound by the model: it waits for data in {waits:.1%} of its time and is "
            f"{slower}; {change}."
        )
    if measured.shares_cores:
        work = lost - verdict.contention
        parts = _listed({part: work * share for part, share in verdict.shares.items()})
        if verdict.contention > max(AS_FAST, work):
            parts += (
                f", and {verdict.contention:.0%} is neither's: threads in each other's way, or "
                f"other work on this machine"
            )
            change = "measure again without other work, and if it stays, take fewer --data.threads"
        elif verdict.bound == "model":
            largest = max(verdict.shares, key=verdict.shares.__getitem__)
            change += f", and for the input's part {advice(largest, setting)}"
        return (
            f"On {setting.cores} cores that the input and the model share, the run is bound by "
            f"{name}: of an image's time the model takes {1 - lost:.0%}, {parts}, where the "
            f"{work:.0%} of the input is work on these cores rather than time spent waiting "
            f"({waits:.1%}); {change}."
        )
    return (
        f"The run is bound by {name}: it waits for data in {waits:.1%} of its time and is "
        f"{slower}, and the time that an image's input takes alone is {_listed(verdict.shares)}; "
        f"{change}."
    )


def _listed(shares: Mapping[Part, float]) -> str:
    return ", ".join(f"{NAMES[part]} {share:.0%}" for part, share in shares.items())


def advice(bound: Bound, setting: Setting) -> str:
    """What to change first."""
    more = "give it more or faster cores"
    if setting.threads < setting.cores and not setting.shares_cores:
        more = f"raise --data.threads from {setting.threads} to {setting.cores}"
    match bound:
        case "model":
            return "only a faster step helps (--run.compile, a smaller --backbone, more devices)"
        case "storage":
            smaller = "store fewer bytes (make_shards.py --max-side, --quality)"
            if not setting.packed:
                return f"pack the images into shards (make_shards.py), or {smaller}"
            return f"put the shards on a faster or local disk, or {smaller}"
        case "transfer":
            if setting.device != "cpu" and setting.engine != "dali":
                return "take --data.engine dali, so that files cross the bus instead of pixels"
            return "make fewer or smaller views, or look at how the device is connected"
        case "decode" | "augmentation":
            best = "fused" if setting.device == "cpu" else "dali"
            if setting.engine != best:
                return f"take --data.engine {best} if it can run the recipe, or {more}"
            if bound == "decode":
                return f"store smaller pictures (make_shards.py --max-side), or {more}"
            return f"{more}, or make fewer or smaller views"
