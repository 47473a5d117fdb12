"""Which tensors the kernels of `lars` take. They stay from step to step, so what is known of them is remembered."""

from __future__ import annotations

import collections
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bossnas_kernels import checks, common


class Verdict(NamedTuple):
    why_not: str | None  # None: the kernels take the tensors
    copied: list[int]  # gradients that lie in memory unlike their weights


class _Kept(NamedTuple):
    """What is known of the tensors that stay from step to step: weights, momenta and targets, one after the other."""

    lengths: list[int | None]
    references: list[Callable[[], Tensor | None]]  # weak
    pointers: list[int]
    looks: tuple  # their `_fingerprint`
    why_not: str | None


# The last tensors are found by who they are or, where a step makes new views of its shares, by all that a verdict
# depends on. No address is part of that: memory that is used again for other tensors cannot mislead.
_kept: collections.deque[_Kept] = collections.deque(maxlen=8)
_PLAIN = {Tensor, torch.nn.Parameter}


def judge(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    momenta: Sequence[Tensor] | None = None,
    excluded: Sequence[bool] | None = None,
    targets: Sequence[Tensor | None] | None = None,
) -> Verdict:
    """Whether the kernels can work on these tensors; says once why not. Gradients may have any strides.

    Raises ValueError as `lars_ema_step` does.
    """
    kept = _known(weights, momenta, excluded, targets)
    index = [i for i, gradient in enumerate(gradients) if gradient is not None]
    missing, shapes, strides, dtypes, devices, types = _fingerprint(gradients)
    why_not = kept.why_not
    if (
        len(missing) != len(weights)
        or shapes != [weights[i].shape for i in index]
        or not set(dtypes) <= {torch.float32}
        or not set(devices) <= {weights[0].device}
        or not set(types) <= _PLAIN
    ):
        checks.lars_ema_step(weights, gradients, momenta, excluded, targets)
        why_not = why_not or _why_not(weights, gradients, (), ())
    copied = []
    wanted = kept.looks[2]  # weights come first, and none of them is missing
    if not why_not and strides != [wanted[i] for i in index]:
        copied = [i for i in index if not _same_order(weights[i], gradients[i])]
    if why_not:
        common.tell_once(f"lars_ema_step: {why_not} are updated by the reference")
    if copied:
        common.tell_once("lars_ema_step: gradients laid out unlike their weights are copied on every step")
    return Verdict(why_not, copied)


def _known(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    excluded: Sequence[bool] | None,
    targets: Sequence[Tensor | None] | None,
) -> _Kept:
    """Raises ValueError where the lists do not fit."""
    lengths = [None if values is None else len(values) for values in (weights, momenta, excluded, targets)]
    tensors = [*weights, *(momenta or ()), *(targets or ())]
    pointers = [0 if t is None else t.data_ptr() for t in tensors if type(t) in _PLAIN or t is None]
    recent = [kept for kept in tuple(_kept) if kept.lengths == lengths]
    for kept in recent:
        if (
            kept.pointers == pointers
            and all(map(operator.is_, [reference() for reference in kept.references], tensors))
            and [t.dtype for t in tensors if t is not None] == kept.looks[3]
        ):
            return kept
    looks = _fingerprint(tensors)
    why_not = next((kept.why_not for kept in recent if kept.looks == looks), _UNKNOWN)
    if why_not is _UNKNOWN:
        checks.lars_ema_step(weights, [None] * len(weights), momenta, excluded, targets)
        why_not = _why_not(weights, (), momenta or (), targets or ())
    references = [_nothing if t is None else weakref.ref(t) for t in tensors]
    _kept.appendleft(_Kept(lengths, references, pointers, looks, why_not))
    return _kept[0]


_UNKNOWN = "not looked at yet"


def _fingerprint(tensors: Sequence[Tensor | None]) -> tuple:
    """All that a verdict depends on: which are missing; shapes, strides, dtypes, devices and types of the others."""
    present = [t for t in tensors if t is not None]
    return (
        [t is None for t in tensors],
        [t.shape for t in present],
        list(map(Tensor.stride, present)),
        [t.dtype for t in present],
        [t.device for t in present],
        list(map(type, present)),
    )


def _nothing() -> None:
    """The reference to no tensor."""


def _why_not(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    momenta: Sequence[Tensor],
    targets: Sequence[Tensor | None],
) -> str | None:
    kept = [t for t in (*weights, *momenta, *targets) if t is not None]
    if any(t.dtype != torch.float32 for t in (*kept, *gradients) if t is not None):
        return "tensors that are not all float32"
    if any(hasattr(t, "__tensor_flatten__") for t in (*kept, *gradients) if t is not None):
        return "sharded or otherwise wrapped tensors"
    if not all(t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last) for t in weights):
        return "weights that are neither contiguous nor channels_last"
    if not all(
        t is None or _same_order(w, t) for others in (momenta, targets) for w, t in zip(weights, others, strict=False)
    ):
        return "momenta or targets laid out unlike the weights"
    return None


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order: strides of single rows do not matter."""
    return a.stride() == b.stride() or all(
        n == 1 or i == j for n, i, j in zip(a.shape, a.stride(), b.stride(), strict=False)
    )
