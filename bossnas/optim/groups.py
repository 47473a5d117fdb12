"""The parameters that an optimizer gets, and the target network that follows them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(module: nn.Module, followers: nn.Module | None = None) -> list[dict]:
    """One group per trainable parameter, in module order: ``{"params": [p], "name", "excluded", "target"}``.

    Excluded from trust ratio and weight decay: every bias and every weight of a normalisation, known by its
    type (or by ``is_norm = True`` on the module), never by its name. Target: the parameter of that name in
    ``followers``, the part of the target network that follows; None where it has none.
    """
    groups, seen = [], set()
    targets = {} if followers is None else dict(followers.named_parameters())
    for prefix, child in module.named_modules():
        is_norm = isinstance(child, _NORMS) or getattr(child, "is_norm", False)
        for name, parameter in child.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{name}" if prefix else name
            groups.append(
                {
                    "params": [parameter],
                    "name": name,
                    # LARS multiplies a step by |w|: an attention branch's last gamma starts at 0 and would stay there,
                    # so that its branch gets no gradient (METHOD 7.1)
                    "excluded": bool(is_norm) or name.endswith("bias"),
                    "target": targets.pop(name, None),
                }
            )
    assert not targets, f"target parameters without an online one: {', '.join(targets)}"
    return groups


@torch.no_grad()
def ema_update(target_params: Iterable[Tensor], online_params: Iterable[Tensor], m: float) -> None:
    """target <- m target + (1 - m) online, in place (METHOD 3.4). ValueError if they do not match."""
    target, online = list(target_params), list(online_params)
    if [t.shape for t in target] != [o.shape for o in online]:
        raise ValueError("ema_update: target and online parameters differ in number or shape")
    if target:
        torch._foreach_lerp_(target, [o.detach() for o in online], 1 - m)
