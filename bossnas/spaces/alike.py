"""Whether two modules are of one build, so that what is counted of one holds for the other."""

from __future__ import annotations

from torch import Tensor, nn

_TENSORS, _FREE = ("_parameters", "_buffers"), ("training", "_modules")


def alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether both have the same class and the same attributes, down to every part.

    Of parameters and buffers the shape, the dtype and whether they take a gradient are compared, not the values. An
    attribute that cannot be compared makes the modules differ. Training or evaluation mode is not compared.
    """
    if a is b:
        return True
    own, other = vars(a), vars(b)
    if type(a) is not type(b) or own.keys() != other.keys() or a._modules.keys() != b._modules.keys():
        return False
    for name, value in own.items():
        if name in _TENSORS:
            if {k: _build(t) for k, t in value.items()} != {k: _build(t) for k, t in other[name].items()}:
                return False
        elif name not in _FREE and not _equal(value, other[name]):
            return False
    return all(
        part is twin or (part is not None and twin is not None and alike(part, twin))
        for part, twin in zip(a._modules.values(), b._modules.values(), strict=True)
    )


def _build(t: Tensor | None) -> tuple | None:
    return None if t is None else (t.shape, t.dtype, t.requires_grad)


def _equal(a: object, b: object) -> bool:
    if a is b:
        return True
    try:
        return bool(a == b)
    except Exception:  # such as an array, whose comparison is an array
        return False
