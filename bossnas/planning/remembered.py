"""Parts of a network that are counted once for each kind of input and played back after that.

A micro-batch runs each candidate, projector and predictor on few kinds of input, and other micro-batches, the other
layers of a block and other blocks meet the same ones again. The training loop runs as it is; only what it does inside
such a part is taken from the first time.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bossnas.planning.meter import NOTHING, Meter, Notes, Row, Size, minus, total
from bossnas.spaces.alike import alike

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]  # shape, strides and dtype of a tensor


def _layout(t: Tensor) -> Layout:
    return t.shape, t.stride(), t.dtype


def _empty(layout: Layout) -> Tensor:
    shape, strides, dtype = layout
    return torch.empty_strided(shape, strides, dtype=dtype)


@dataclass
class _Backward:
    rows: list[Row]
    changes: list[Size]
    averages: list[int]
    gradient: Layout | None  # of the input
    moved: list[int]  # positions of the parameters that get a gradient


@dataclass
class _Forward:
    """What a call takes. ``kept``: what it holds for the backward pass beside its input and its output;
    ``backward``: by the layout of the output's gradient; ``pending``: the run itself, until a backward pass
    is known."""

    rows: list[Row]
    changes: list[Size]
    averages: list[int]
    output: Layout
    differentiable: bool = False
    kept: Size = NOTHING
    keeps: tuple[bool, bool] = (False, False)  # the input; the output
    backward: dict[Layout, _Backward] = field(default_factory=dict)
    pending: _Recording | None = None


class Memory:
    """What is known of the parts. ``meter``: counts the present run; None: nothing is counted or remembered."""

    def __init__(self) -> None:
        self.meter: Meter | None = None
        self.anchor = torch.zeros(1, requires_grad=True)  # has a result take a gradient where no input does
        self._builds: list[nn.Module] = []
        self._known: dict[Hashable, _Forward | None] = {}

    def build(self, module: nn.Module) -> int:
        """The same number for modules that are alike."""
        for number, other in enumerate(self._builds):
            if alike(module, other):
                return number
        self._builds.append(module)
        return len(self._builds) - 1

    def call(self, part: Remembered, x: Tensor, rest: tuple) -> Tensor:
        """``part.inner(x, *rest)``, without running it where it is known."""
        if self.meter is None:
            return part.inner(x, *rest)
        if part.build is None:
            part.build = self.build(part.inner)
        grad = torch.is_grad_enabled()
        # the target network does what the online network does on the same batches, and holds less meanwhile
        twin = part.inner.training and not grad
        recorded = (True, not part.first) if twin else (grad, x.requires_grad)
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        recording = _Recording(part.inner, rest, _layout(x), recorded, autocast)
        key = (part.build, rest, _layout(x), recorded, autocast, part.inner.training)
        if key not in self._known:
            self._known[key] = recording.forward(self.meter)
            recording = _Recording(part.inner, rest, _layout(x), recorded, autocast)
        known = self._known[key]
        if known is None:
            return part.inner(x, *rest)
        return _Replay.apply(x, self.anchor if known.differentiable and grad else None, self, known, recording)


class Remembered(nn.Module):
    """Stands for ``inner``, which is called with a tensor and hashable values and has no state that a call changes.

    ``first``: whether it is the first part that is trained, so that its input takes no gradient.
    """

    def __init__(self, inner: nn.Module, memory: Memory, first: bool = False):
        super().__init__()
        self.inner, self.memory, self.first = inner, memory, first
        self.build: int | None = None

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return self.memory.call(self, x, rest)


def watch(module: nn.Module, notes: Notes) -> list[RemovableHandle]:
    """Notes which parameters get a gradient. As from the second micro-batch on, each has one that is added to."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [p.register_post_accumulate_grad_hook(notes.moved.add) for p in parameters]


class _Recording:
    """Runs a part by itself on an input of layout ``x``. ``grad``: whether for a backward pass, and whether that gives
    the input a gradient."""

    def __init__(self, inner: nn.Module, rest: tuple, x: Layout, grad: tuple[bool, bool], autocast: torch.dtype | None):
        self.inner, self.rest, self.input, self.autocast = inner, rest, x, autocast
        self.grad, self.needs_gradient = grad
        self.notes = Notes()
        self.meter: Meter
        self.end: Tensor
        self.begins = 0, 0, 0  # rows, changes and averages before the backward pass
        self.given: Layout  # of the output's gradient
        self.gradient: Layout | None = None  # of the input's

    def forward(self, meter: Meter) -> _Forward | None:
        """None if the result is the input or a view of it."""
        notes = self.notes
        # without autocast's cache: what a call takes must not depend on the calls before it
        cast = torch.autocast("cpu", self.autocast, self.autocast is not None, cache_enabled=False)
        with meter.aside(notes, "forward"), torch.set_grad_enabled(self.grad), cast:
            x = _empty(self.input)
            if self.needs_gradient:
                x = _Entrance.apply(x.requires_grad_(), self)
            place, start, outside = x.untyped_storage()._cdata, len(notes.changes), set(notes.alive)
            y = self.inner(x, *self.rest)
            made, output = y.untyped_storage()._cdata, _layout(y)
            if made not in notes.alive or made == place:
                return None
            found = _Forward(notes.rows.get("forward", []), notes.changes[start:], notes.averages[:], output)
            if y.requires_grad:
                found.differentiable, found.pending = True, self
                self.end = _Exit.apply(y, self)
                outside |= {made, self.end.untyped_storage()._cdata}
                del x, y
                found.keeps = place in notes.alive, made in notes.alive
                found.kept = total(alive.size for key, alive in notes.alive.items() if key not in outside)
            return found

    def backward(self, meter: Meter, given: Layout) -> _Backward:
        """The backward pass that begins with an output's gradient of this layout."""
        notes, self.meter, self.given = self.notes, meter, given
        with meter.aside(notes, "gradients"), torch.autocast("cpu", enabled=False):
            handles = watch(self.inner, notes)
            meter.phase = "backward"
            self.end.backward()
        for handle in handles:
            handle.remove()
        rows, changes, averages = self.begins
        return _Backward(
            notes.rows["backward"][rows:],
            notes.changes[changes:],
            notes.averages[averages:],
            self.gradient,
            [i for i, parameter in enumerate(self.inner.parameters()) if parameter in notes.moved],
        )


class _Entrance(torch.autograd.Function):
    """A leaf, which holds no memory of the input -> a tensor like the input, which only those hold that use it."""

    @staticmethod
    def forward(ctx, leaf: Tensor, recording: _Recording) -> Tensor:
        ctx.recording = recording
        return _empty(recording.input)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        ctx.recording.gradient = _layout(gradient)
        return None, None


class _Exit(torch.autograd.Function):
    """Output -> a tensor of one value, from which the backward pass begins with a gradient of a given layout."""

    @staticmethod
    def forward(ctx, y: Tensor, recording: _Recording) -> Tensor:
        ctx.recording = recording
        return torch.empty(1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        recording, notes = ctx.recording, ctx.recording.notes
        recording.begins = len(notes.rows["backward"]), len(notes.changes), len(notes.averages)
        return _empty(recording.given), None


class _Replay(torch.autograd.Function):
    """Gives the meter what a call and its backward pass took, and results without data."""

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor | None, memory: Memory, known: _Forward, again: _Recording):
        meter = memory.meter
        assert meter is not None
        meter.play(known.rows, known.changes, known.averages)
        y = _empty(known.output)
        if anchor is not None:
            kept = torch.empty(0)
            meter.enlarge(kept, known.kept)
            ctx.save_for_backward(kept, *([x] if known.keeps[0] else []), *([y] if known.keeps[1] else []))
            ctx.memory, ctx.known, ctx.again = memory, known, again
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor):
        held = ctx.saved_tensors  # with checkpointing this runs the part again
        meter, known, layout = ctx.memory.meter, ctx.known, _layout(gradient)
        if layout not in known.backward:
            recording, known.pending = known.pending, None
            if recording is None:
                recording = ctx.again
                recording.forward(meter)
            known.backward[layout] = recording.backward(meter, layout)
        found = known.backward[layout]
        # the gradient's storage is free after the first operation that takes it, and is in `changes` from its birth on
        size = meter.size(gradient.untyped_storage().nbytes())
        given = [minus(size)] if size == found.changes[0] else []
        meter.play(found.rows, [*given, *found.changes], found.averages)
        parameters = list(ctx.again.inner.parameters())
        meter.notes.moved.update(parameters[i] for i in found.moved)
        del held
        return None if found.gradient is None else _empty(found.gradient), None, None, None, None
