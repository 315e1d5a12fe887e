"""Which of a timm model's parameters see no weight decay besides biases and norms."""

from torch import nn


def token_free_groups(method: nn.Module, encoder: nn.Module) -> list[dict[str, object]]:
    """`Method.param_groups` of all that is trained: without decay are what the encoder's own
    `no_weight_decay` names (a ViT's tokens and positions) and all of one dimension.

    timm `optim/optim_factory.py`, `add_weight_decay`, as DeiT's code calls it.
    """
    undecayed_names: set[str] = getattr(encoder, "no_weight_decay", set)()
    undecayed = {id(p) for name, p in encoder.named_parameters() if name in undecayed_names}
    trained = [p for p in method.parameters() if p.requires_grad]
    undecayed |= {id(p) for p in trained if p.ndim <= 1}
    return [
        {"params": [p for p in trained if id(p) not in undecayed], "decay": True},
        {"params": [p for p in trained if id(p) in undecayed], "decay": False},
    ]
