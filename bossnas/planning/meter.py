"""Counts operations and memory as they run: floating-point operations, bytes moved, bytes alive."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# A number as a polynomial in the images of a micro-batch: constant, linear and quadratic coefficient. The quadratic one
# is for products of all images with all images.
Size = tuple[int, int, int]
Row = tuple[Size, Size, Size]  # of an operation: floating-point operations in 16 bits, in more, bytes moved
DEGREE = 3
NOTHING: Size = (0, 0, 0)


def images_to_count(least: int, modules: Iterable[nn.Module]) -> int:
    """The smallest prime above ``least`` that divides no dimension of a parameter or buffer of the modules.

    With ``least`` at or above the image size it divides no dimension of a map either, so a tensor of such a micro-batch
    has as many factors of it as it has dimensions that grow with the images.
    """
    dimensions = {n for m in modules for t in (*m.parameters(), *m.buffers()) for n in t.shape if n}
    number = least + 1
    while any(number % k == 0 for k in range(2, math.isqrt(number) + 1)) or any(n % number == 0 for n in dimensions):
        number += 1
    return number


def total(sizes: Iterable[Size]) -> Size:
    a = b = c = 0
    for x, y, z in sizes:
        a, b, c = a + x, b + y, c + z
    return a, b, c


def minus(size: Size) -> Size:
    return -size[0], -size[1], -size[2]


class Unwritten(TorchDispatchMode):
    """Leaves out operations that only write into tensors without data which exist already, since these stay as they
    are: building networks and counting them is several times faster."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        return perform(func, args, kwargs or {})


def perform(func, args: tuple, kwargs: dict) -> object:
    """``func(*args, **kwargs)``, which is left out where it only writes into existing tensors without data."""
    places = _written(func)
    if places:
        given = [args[i] if i < len(args) else kwargs.get(name) for i, name in places]
        if all(isinstance(t, FakeTensor) and t.numel() for t in given):
            return given[0] if len(given) == 1 else tuple(given)
    return func(*args, **kwargs)


_places: dict[object, list[tuple[int, str]]] = {}


def _written(func) -> list[tuple[int, str]]:
    """Position and name of the argument that each result is, if all results are arguments that ``func`` writes into."""
    if func not in _places:
        schema, places = func._schema, []
        for result in schema.returns:
            alias = result.alias_info
            if alias is None or not alias.is_write or torch.Tag.inplace_view in func.tags:
                break
            places += [
                (i, argument.name)
                for i, argument in enumerate(schema.arguments)
                if argument.alias_info is not None and argument.alias_info.before_set == alias.before_set
            ]
        _places[func] = places if len(places) == len(schema.returns) else []
    return _places[func]


class _Alive(NamedTuple):
    size: Size
    death: weakref.ref


@dataclass
class Notes:
    """What a meter notes: ``rows`` of each phase, ``changes`` of the memory, the storages that are ``alive`` by their
    address, the bytes of each average over ranks, and the parameters that got a gradient."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    changes: list[Size] = field(default_factory=list)
    alive: dict[int, _Alive] = field(default_factory=dict)
    averages: list[int] = field(default_factory=list)
    moved: set[nn.Parameter] = field(default_factory=set)


class Meter(TorchDispatchMode):
    """Notes of every operation its floating-point operations and bytes, by ``phase``, and of every storage that is made
    or freed by how many bytes it changes the memory.

    ``images``: of the micro-batch that runs; all sizes are polynomials in their number. They hold for other numbers,
    too, if this one is from `images_to_count`, and else for this one alone.
    """

    def __init__(self, phase: str, images: int):
        super().__init__()
        self.phase, self.images, self.notes = phase, images, Notes()

    @contextmanager
    def aside(self, notes: Notes, phase: str) -> Iterator[None]:
        """Has what runs inside go into other notes."""
        before = self.notes, self.phase
        self.notes, self.phase = notes, phase
        try:
            yield
        finally:
            self.notes, self.phase = before

    def play(self, rows: Sequence[Row], changes: Sequence[Size], averages: Sequence[int]) -> None:
        """Adds what was counted before; the memory is afterwards what it was."""
        self.notes.rows.setdefault(self.phase, []).extend(rows)
        self.notes.changes += changes
        self.notes.changes.append(minus(total(changes)))
        self.notes.averages += averages

    def enlarge(self, t: Tensor, size: Size) -> None:
        """Takes the storage of ``t`` for one that is larger by ``size``."""
        key = t.untyped_storage()._cdata
        self.notes.alive[key] = _Alive(total([self.notes.alive[key].size, size]), self.notes.alive[key].death)
        self.notes.changes.append(size)

    def size(self, number: int) -> Size:
        """A number of bytes or operations as a polynomial in the images."""
        if number == 0 or number % self.images:
            return number, 0, 0
        number //= self.images
        return (0, number, 0) if number % self.images else (0, 0, number // self.images)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # by far the most frequent call
        if func.namespace == "prim":  # questions about a tensor
            return func(*args, **kwargs)
        inputs, outputs = _tensors(args), _outputs(func)
        given = inputs + _tensors([v for k, v in kwargs.items() if k not in outputs])
        before = {t.untyped_storage()._cdata for t in given}
        before |= {t.untyped_storage()._cdata for t in _tensors([v for k, v in kwargs.items() if k in outputs])}
        result = perform(func, args, kwargs)
        made = _tensors((result,))
        new = [t for t in made if t.untyped_storage()._cdata not in before]
        for t in new:
            self._born(t.untyped_storage())
        name = func._overloadpacket.__name__
        if (new and not name.startswith("empty")) or func._schema.is_mutable:  # neither a view nor an allocation
            work = self.size(int(_flops(func, args, kwargs, result)))
            half = bool(given) and given[0].element_size() == 2
            moved = total(self.size(_nbytes(t)) for t in given + made)
            self.notes.rows.setdefault(self.phase, []).append(
                (work if half else NOTHING, NOTHING if half else work, moved),
            )
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.notes.alive:
            return
        alive, changes = self.notes.alive, self.notes.changes  # of now: it may be freed when others are in their place

        def freed(_: weakref.ref) -> None:
            changes.append(minus(alive.pop(key).size))

        size = self.size(storage.nbytes())
        alive[key] = _Alive(size, weakref.ref(storage, freed))
        changes.append(size)


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"  # what stands for the GPU's; PyTorch's table lacks it


def _flops(func, args: tuple, kwargs: dict, result: object) -> int:
    name = func._overloadpacket.__name__
    if name == ATTENTION:
        return sdpa_flop_count(*(t.shape for t in args[:3]))
    if name == ATTENTION + "_backward":
        return sdpa_backward_flop_count(*(t.shape for t in args[:4]))
    if name == "convolution_backward":  # PyTorch takes the weight gradient of a depthwise one for that of a dense one
        gradient, x, weight, *_, transposed, _, _, wanted = args
        return (wanted[0] + wanted[1]) * conv_flop_count(x.shape, weight.shape, gradient.shape, transposed)
    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=result)


@cache
def _outputs(func) -> set[str]:
    return {argument.name for argument in func._schema.arguments if argument.is_out}


def _tensors(values: Iterable) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _nbytes(t: Tensor) -> int:
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
