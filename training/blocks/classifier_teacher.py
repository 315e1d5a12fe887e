"""A trained classifier that teaches: it looks at the student's pictures as it was trained to.

The student's view is undone of its normalisation, given the teacher's, and resized where the
teacher was trained on another size. Mixed and erased pictures stay what they are, as in DeiT.
"""

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from headrace.training.backbones import check_name
from headrace.training.method import Facts
from headrace.training.preset import ConfigError
from headrace.training.run.directory import CLASSIFIER_FILE
from headrace.training.run.record import read_network


class ClassifierTeacher(nn.Module):
    """[B, 3, H, W] as the student sees it -> logits float32 [B, C], without gradient.

    Always in evaluation mode. mean, std, pixels: what the network expects; student_mean,
    student_std: what the view was normalised with.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pixels: int,
        student_mean: tuple[float, ...],
        student_std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.pixels = pixels
        teacher_mean, teacher_std, view_mean, view_std = (
            torch.tensor(channels).view(3, 1, 1)
            for channels in (mean, std, student_mean, student_std)
        )
        # (view * view_std + view_mean - teacher_mean) / teacher_std
        self.register_buffer("scale", view_std / teacher_std, persistent=False)
        self.register_buffer("shift", (view_mean - teacher_mean) / teacher_std, persistent=False)

    @override
    def train(self, mode: bool = True) -> "ClassifierTeacher":
        return super().train(False)

    def digest(self) -> int:
        """Of its weights; not 0."""
        weights = hashlib.blake2b(digest_size=7)
        for value in self.network.state_dict().values():
            weights.update(value.detach().cpu().contiguous().numpy().tobytes())
        return int.from_bytes(weights.digest(), "little") + 1

    @torch.no_grad()
    def forward(self, view: Tensor) -> Tensor:
        pictures = view * self.scale + self.shift
        if pictures.shape[-1] != self.pixels:
            size = (self.pixels, self.pixels)
            pictures = F.interpolate(pictures.float(), size, mode="bicubic", antialias=True)
        return self.network(pictures).float()


class LazyTeacher:
    """A teacher that is opened when first asked for, and not saved: it never changes.

    So a run's encoder can be judged where its teacher is not. Of the teacher a checkpoint holds
    its digest alone, in a buffer of the method, which tells one teacher from another. Arguments as
    those of `open_teacher`.
    """

    def __init__(self, teacher: str, weights: Path | None, facts: Facts, option: str) -> None:
        self._teacher = teacher
        self._weights = weights
        self._facts = facts
        self._option = option
        self._opened: ClassifierTeacher | None = None
        self._checked = False

    def on(self, device: torch.device) -> ClassifierTeacher:
        """Raises ConfigError, as `open_teacher`."""
        if self._opened is None:
            teacher = open_teacher(self._teacher, self._weights, self._facts, self._option)
            self._opened = teacher.to(device)
        return self._opened

    def check(self, digest: Tensor) -> None:
        """Before each step: the first time, writes the teacher's digest into `digest` (int64
        scalar), if that is 0.

        Raises ConfigError where another teacher's stands there: of the run that is continued.
        """
        if self._checked:
            return
        teacher_digest = self.on(digest.device).digest()
        if int(digest) not in (0, teacher_digest):
            raise ConfigError(
                f"{self._option} {self._teacher} has other weights than the teacher that this run "
                f"began with"
            )
        digest.fill_(teacher_digest)
        self._checked = True


def open_teacher(
    teacher: str, weights: Path | None, facts: Facts, option: str
) -> ClassifierTeacher:
    """The teacher of a run.

    teacher: the directory of a run that wrote classifier.safetensors (`--method supervised`), or a
    timm model, with `weights` (a state dict: .safetensors, or .pth as torch saves it) or, where
    that is None, timm's own, which timm downloads. option: how the command line calls it.
    Raises ConfigError for what cannot be read, and where it knows other classes than the data set.
    """
    run = Path(teacher).expanduser()
    if run.is_dir():
        if weights is not None:
            raise ConfigError(f"{option} {teacher} is a run, which has its own weights")
        return _from_run(run, facts, option)
    if "/" in teacher or teacher.startswith("."):
        raise ConfigError(f"{option} {teacher}: there is no such run, nor timm model")
    check_name(teacher)
    if weights is None:
        try:
            network = timm.create_model(teacher, pretrained=True)
        except Exception as error:  # whatever timm's way to its weights may raise
            raise ConfigError(
                f"{option} {teacher}: timm has no weights for it here ({error}); give a file of "
                f"weights, or a run"
            ) from error
    else:
        network = timm.create_model(teacher, num_classes=_classes_of(weights, teacher))
        _load(network, _read(weights), weights)
    config: dict[str, Any] = dict(network.pretrained_cfg or {})  # pyright: ignore
    return _fitting(
        network,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        pixels=int(config["input_size"][-1]),
        facts=facts,
        name=f"{option} {teacher}",
    )


def _from_run(run: Path, facts: Facts, option: str) -> ClassifierTeacher:
    path = run / CLASSIFIER_FILE
    if not path.is_file():
        raise ConfigError(
            f"{option} {run} holds no {CLASSIFIER_FILE}: a run of --method supervised writes it "
            f"with its first checkpoint"
        )
    try:
        recorded = read_network(run)
    except ConfigError as error:
        raise ConfigError(f"{option} {run}: {error}") from error
    name, test = recorded.backbone, recorded.test
    classes = _classes_of(path, name)
    network = timm.create_model(name, num_classes=classes, **recorded.backbone_options)
    _load(network, _read(path), path)
    return _fitting(
        network,
        mean=test.mean,
        std=test.std,
        pixels=test.flat_views[0].shape[0],
        facts=facts,
        name=f"{option} {run}",
    )


def _fitting(
    network: nn.Module,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    pixels: int,
    facts: Facts,
    name: str,
) -> ClassifierTeacher:
    """Raises ConfigError where the network knows other classes. name: for a message to people."""
    classes = getattr(network, "num_classes", None)
    if classes != facts.num_classes:
        raise ConfigError(
            f"{name} knows {classes} classes, and the data set has {facts.num_classes}: a teacher "
            f"has to know the same ones"
        )
    return ClassifierTeacher(
        network,
        mean=mean,
        std=std,
        pixels=pixels,
        student_mean=facts.mean,
        student_std=facts.std,
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, SafetensorError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read as weights: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"{path} holds no state dict")
    return state


def _classes_of(path: Path, name: str) -> int:
    """Of a state dict: the length of the classifier's bias, or of the last one where the file has
    other names than timm."""
    state = _read(path)
    with torch.device("meta"):
        config: Any = timm.create_model(name).pretrained_cfg
    named = state.get(f"{config['classifier']}.bias")
    biases = [value for value in state.values() if value.ndim == 1]
    if named is None and not biases:
        raise ConfigError(f"{path} holds no weights of {name!r}")
    return len(biases[-1] if named is None else named)


def _load(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """By name, or in order where every tensor has the shape of its place (a port of the same
    network under other names)."""
    places = network.state_dict()
    shapes = [value.shape for value in state.values()]
    if state.keys() != places.keys() and shapes == [value.shape for value in places.values()]:
        state = dict(zip(places, state.values(), strict=True))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path} does not fit the teacher: {reason}") from error
