"""Optimisers for large batches: the step of each tensor is proportional to the tensor's own length.

LARS and LARC rescale the gradient before the momentum of SGD, LAMB the step that Adam would take.
Each works tensor by tensor, and skips its update, state included, while its `found_inf` is 1; a
parameter without gradient is left alone.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


class _PerTensor(torch.optim.Optimizer):
    """What the three share: the loop, and steps that `found_inf` blocks.

    found_inf: float32 scalar, 1 blocks the step; as on torch's fused optimisers.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Parameters,
        defaults: dict[str, Any],
        initial_state: Callable[[Tensor], Mapping[str, Tensor]],
    ) -> None:
        super().__init__(params, defaults)
        # From the beginning, so that a checkpoint has it even if the first step was blocked.
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].update(initial_state(parameter))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if closure is not None:
            raise ValueError(f"{type(self).__name__} takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    moved, after = self._moved(parameter, parameter.grad, state, group)
                    self._keep(parameter, moved)
                    for name, value in after.items():
                        self._keep(state[name], value)

    def _moved(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The parameter and its state after this step; the arguments stay as they are."""
        raise NotImplementedError

    def _keep(self, tensor: Tensor, value: Tensor) -> None:
        if self.found_inf is None:
            tensor.copy_(value)
        else:
            torch.where(self.found_inf > 0, tensor, value, out=tensor)


class LARS(_PerTensor):
    """SGD with momentum whose gradient is rescaled per tensor (You et al. 2017, arXiv 1708.03888).

        u = gradient + weight_decay * p
        u = u * trust_coefficient * |p| / |u|       (1 where either norm is 0)
        m = momentum * m + u
        p = p - learning_rate * m

    Biases, norms and whatever else has one dimension, and groups with decay=False, take neither
    the decay nor the rescaling: the semantics of moco-v3's `moco/optimizer.py` and mae's
    `util/lars.py`. SimCLR's `lars_optimizer.py` keeps the learning rate inside the momentum
    (m = momentum * m + learning_rate * u; p = p - m), which differs only while the rate changes.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "decay": True,
        }
        super().__init__(params, defaults, _momentum)

    def _moved(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        update = gradient
        if group["decay"] and parameter.ndim > 1:
            update = gradient + group["weight_decay"] * parameter
            own, other = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
            ratio = group["trust_coefficient"] * own / other
            update = update * torch.where((own > 0) & (other > 0), ratio, 1.0)
        return _with_momentum(parameter, update, state, group)


class LARC(_PerTensor):
    """LARS as NVIDIA's apex has it, in its scaling mode, which SwAV trains with.

        u = (gradient + weight_decay * p) * trust_coefficient * |p|
            / (|gradient| + weight_decay * |p| + eps)
        u = gradient                                (where |p| or |gradient| is 0)
        m = momentum * m + u
        p = p - learning_rate * m

    apex `parallel/LARC.py` with clip=False around torch's SGD. Every tensor is rescaled, biases and
    norms too; that they decay, as in SwAV, is for the method's groups to say.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
        }
        super().__init__(params, defaults, _momentum)

    def _moved(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        decay = group["weight_decay"]
        own, other = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(gradient)
        ratio = group["trust_coefficient"] * own / (other + decay * own + group["eps"])
        rescaled = (gradient + decay * parameter) * ratio
        update = torch.where((own > 0) & (other > 0), rescaled, gradient)
        return _with_momentum(parameter, update, state, group)


class LAMB(_PerTensor):
    """Adam whose step is rescaled per tensor (You et al. 2019, arXiv 1904.00962).

        m = beta_1 * m + (1 - beta_1) * gradient
        v = beta_2 * v + (1 - beta_2) * gradient^2
        u = (m / (1 - beta_1^t)) / (sqrt(v / (1 - beta_2^t)) + eps) + weight_decay * p
        u = u * |p| / |u|                           (1 where either norm is 0)
        p = p - learning_rate * u

    Tensors that do not decay are not rescaled either. As timm's `Lamb` and SparK's
    `utils/lamb.py`, which clip the global gradient norm themselves; here --optim.clip-norm does.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, _moments)

    def _moved(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        (beta_1, beta_2), decay = group["betas"], group["weight_decay"]
        step = state["step"] + 1
        mean = state["exp_avg"].lerp(gradient, 1 - beta_1)
        square = beta_2 * state["exp_avg_sq"] + (1 - beta_2) * gradient.square()
        denominator = (square / (1 - beta_2**step)).sqrt() + group["eps"]
        update = mean / (1 - beta_1**step) / denominator
        if decay != 0:
            update = update + decay * parameter
            own, other = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
            update = update * torch.where((own > 0) & (other > 0), own / other, 1.0)
        moved = parameter - group["lr"] * update
        return moved, {"step": step, "exp_avg": mean, "exp_avg_sq": square}


def _momentum(parameter: Tensor) -> dict[str, Tensor]:
    return {"momentum_buffer": torch.zeros_like(parameter)}


def _moments(parameter: Tensor) -> dict[str, Tensor]:
    # float64, for in float32 four digits of 1 - 0.999 are gone.
    step = torch.zeros((), dtype=torch.float64, device=parameter.device)
    return {
        "step": step,
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _with_momentum(
    parameter: Tensor, update: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """m = momentum * m + update, p = p - learning_rate * m, as torch's SGD: (p, {m})."""
    buffer = group["momentum"] * state["momentum_buffer"] + update
    return parameter - group["lr"] * buffer, {"momentum_buffer": buffer}
