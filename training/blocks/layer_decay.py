"""Learning rates that fall with the depth of a vision transformer's layer (Clark et al. 2020)."""

from torch import nn


def decayed_groups(
    method: nn.Module, prefix: str, depth: int, decay: float, patch_embed_scale: float = 1.0
) -> list[dict[str, object]]:
    """`Method.param_groups` of all that is trained; biases and one-dimensional ones do not decay.

    prefix: of the timm VisionTransformer's parameters, "student."; depth: its blocks. Its block i
    of 0 .. depth - 1 has a learning rate of decay ** (depth - i) of the others', the embeddings
    (patches, positions, class and mask tokens, which are all that has no other place) decay **
    (depth + 1). patch_embed_scale: one more factor of the patch embedding. Its last norm and
    everything named "*head*" have 1. As dinov2 `utils/param_groups.py`.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        match name.removeprefix(prefix).split("."):
            case ["blocks", number, *_]:
                below_top = depth - int(number)
            case ["norm", *_]:
                below_top = 0
            case [first, *_] if "head" in first:
                below_top = 0
            case _:
                below_top = depth + 1
        scale = decay**below_top
        if name.startswith(f"{prefix}patch_embed."):
            scale *= patch_embed_scale
        groups.setdefault((scale, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "decay": decays, "learning_rate_scale": scale}
        for (scale, decays), parameters in groups.items()
    ]
