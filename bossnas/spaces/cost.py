"""Multiply-adds and parameters: of anything that runs (`count`), and of every network of a space (`CostTable`)."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bossnas.errors import ConfigError
from bossnas.spaces.alike import alike
from bossnas.spaces.ops import torch_operations
from bossnas.spaces.paths import Choices, decode, encode
from bossnas.spaces.space import Space

Shape = tuple[int, int, int]  # channels, height, width of one image's map
Key = tuple[int, int, int, Shape]  # block, layer, candidate id, input shape
LARGE = 3_000_000  # weights of a layer
COSTS = ("macs", "params", "latency_ns")


@dataclass(frozen=True)
class Cost:
    """Cost of a layer, a path or a network: MACs of one image, parameters, and the measured latency of one batch."""

    macs: int
    params: int
    latency_ns: int = 0  # 0 in a table without latencies

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.params + other.params, self.latency_ns + other.latency_ns)

    @property
    def latency_ms(self) -> float:
        return self.latency_ns / 1e6


class Entry(NamedTuple):
    """What a layer candidate costs on one input shape, and what it gives out."""

    cost: Cost
    shape: Shape


class Start(NamedTuple):
    """What a block can begin from: its input's shape (the image's for block 0) and the paths that may follow."""

    shape: Shape
    paths: tuple[Choices, ...]


class CostTable:
    """The cost of every layer candidate on every input shape that can occur in a space.

    Stem and searched layers count; adapters, projectors and classifiers do not. Costs of layers add up to exactly what
    `count` gives for the whole path or network, since every layer has weights of its own. ``starts[k]`` holds what
    block k can begin from, each with one list of winners that leads there: two winners lead to the same start if they
    end in the same shape and `Space.paths` lets the same paths follow.
    """

    def __init__(self, space: Space, image_size: int, stem: nn.Module | None = None):
        self.space = space
        self.image: Shape = (3, image_size, image_size)
        self.entries: dict[Key, Entry] = {}
        self.starts: list[dict[Start, list[Choices]]] = []
        self.has_latency = False
        stem = (stem or space.stem()).eval()
        self.stem = run(lambda x: call_stem(stem, x), [stem], self.image)
        self._known: dict[tuple[int, Choices, Shape], Entry] = {}

    @classmethod
    def of(
        cls,
        space: Space,
        image_size: int,
        stem: nn.Module | None = None,
        layer: Callable[[int, int], nn.Module] | None = None,
    ) -> CostTable:
        """Runs every candidate once per input shape with one image, two layers' weights in memory at a time. A layer of
        the same build as the one before it runs only on other shapes.

        ``stem``, ``layer(block, layer)``: modules that exist already, which are left in evaluation mode; None: of the
        space.
        """
        if stem is None and layer is None:
            with _shapes_alone(space):
                return cls._of(space, image_size, None, space.layer)
        return cls._of(space, image_size, stem, layer or space.layer)

    @classmethod
    def along(cls, space: Space, image_size: int, architecture: Sequence[Choices]) -> CostTable:
        """A table of what one architecture, or its first blocks, has; it knows no starts."""
        with _shapes_alone(space):
            table = cls(space, image_size)
            shape = table.stem.shape
            for block, path in enumerate(architecture):
                for layer, choice in enumerate(path):
                    module = space.layer(block, layer).eval()
                    entry = run(partial(_through, module, choice), [module], shape)
                    table.entries[block, layer, choice, shape], shape = entry, entry.shape
        return table

    @classmethod
    def _of(
        cls, space: Space, image_size: int, stem: nn.Module | None, layer: Callable[[int, int], nn.Module]
    ) -> CostTable:
        table = cls(space, image_size, stem)
        starts: dict[Start, list[Choices]] = {Start(table.image, tuple(space.paths(0, []))): []}
        for block in range(space.blocks):
            table.starts.append(starts)
            table._run_block(block, layer)
            following: dict[Start, list[Choices]] = {}
            for start, winners in starts.items():
                for path in start.paths if block + 1 < space.blocks else ():
                    # any winners that lead to a start stand for all: what may follow and its cost depend on the start
                    following.setdefault(table.after(block, start, path), [*winners, path])
            starts = following
        return table

    def _run_block(self, block: int, layer_of: Callable[[int, int], nn.Module]) -> None:
        reached = {
            (start.shape, path): self.stem.shape if block == 0 else start.shape
            for start in self.starts[block]
            for path in start.paths
        }
        module: nn.Module | None = None
        known: dict[tuple[int, Shape], Entry] = {}
        for layer in range(self.space.layers(block)):
            following = layer_of(block, layer).eval()
            if module is None or not alike(module, following):
                known = {}
            module = following
            for choice, shape in sorted({(path[layer], shape) for (_, path), shape in reached.items()}):
                if (choice, shape) not in known:
                    known[choice, shape] = run(partial(_through, module, choice), [module], shape)
                self.entries[block, layer, choice, shape] = known[choice, shape]
            reached = {key: self.entries[block, layer, key[1][layer], shape].shape for key, shape in reached.items()}

    def after(self, block: int, start: Start, path: Choices) -> Start:
        """What the next block begins from when this one takes ``path`` from ``start``."""
        shape = self.path(block, path, start.shape)[1]
        return Start(shape, tuple(self.space.paths(block + 1, [*self.starts[block][start], path])))

    def path(self, block: int, path: Choices, shape: Shape) -> tuple[Cost, Shape]:
        """Cost and output shape of a path on an input shape; in block 0 the input is the image and the stem counts.

        Raises ConfigError where the space does not let this path meet this input.
        """
        known = self._known.get((block, path, shape))
        if known is not None:
            return known
        cost, out = (self.stem.cost, self.stem.shape) if block == 0 and shape == self.image else (Cost(0, 0), shape)
        for layer, choice in enumerate(path):
            entry = self.entries.get((block, layer, choice, out))
            if entry is None:
                raise ConfigError(
                    "architecture",
                    f"path {encode(path)} of block {block} cannot follow an input of {'x'.join(map(str, shape))}",
                    "name an architecture of the space",
                )
            cost, out = cost + entry.cost, entry.shape
        self._known[block, path, shape] = Entry(cost, out)
        return cost, out

    def cost(self, architecture: Sequence[Choices]) -> Cost:
        """Cost of a network, one path per block (or of its first blocks)."""
        total, shape = Cost(0, 0), self.image
        for block, path in enumerate(architecture):
            cost, shape = self.path(block, path, shape)
            total = total + cost
        return total

    def network(self, architecture: Sequence[Choices]) -> dict[str, int]:
        """{"macs", "params"} of a network, one path per block."""
        total = self.cost(architecture)
        return {"macs": total.macs, "params": total.params}

    def networks(self, architectures: Sequence[Sequence[Choices]]) -> dict[str, np.ndarray]:
        """{"macs", "params"}, each an int64 array with one value per architecture."""
        costs = [self.cost(architecture) for architecture in architectures]
        return {name: np.array([getattr(cost, name) for cost in costs], np.int64) for name in ("macs", "params")}

    def with_latency(self, stem_ns: int, latencies_ns: dict[Key, int]) -> CostTable:
        """A table with measured latencies, one for each entry of this one."""
        table = copy.copy(self)
        table.stem = Entry(replace(self.stem.cost, latency_ns=stem_ns), self.stem.shape)
        table.entries = {
            key: Entry(replace(entry.cost, latency_ns=latencies_ns[key]), entry.shape)
            for key, entry in self.entries.items()
        }
        table.has_latency, table._known = True, {}
        return table

    def rows(self) -> list[dict[str, Any]]:
        """The table as plain values: the stem (block and layer null), then every entry."""

        def row(entry: Entry, **head: Any) -> dict[str, Any]:
            return {**head, "output": list(entry.shape), "macs": entry.cost.macs, "params": entry.cost.params}

        stem = row(self.stem, block=None, layer=None, candidate=None, name="stem", input=list(self.image))
        return [
            stem,
            *(
                row(entry, block=b, layer=layer, candidate=c, name=self.space.candidates(b)[c], input=list(shape))
                for (b, layer, c, shape), entry in self.entries.items()
            ),
        ]


@contextlib.contextmanager
def _shapes_alone(space: Space) -> Iterator[None]:
    """Has a built-in space with large layers compute shapes without values: HyTra at full size in a fifth of the time.
    Small layers are computed faster than PyTorch can say their shapes. A user's own space may do with values what it
    likes, so it has them."""
    built_in = type(space).__module__.startswith("bossnas.spaces.")
    with FakeTensorMode():
        weights = sum(p.numel() for p in space.layer(space.blocks - 1, 0).parameters()) if built_in else 0
    if weights < LARGE:
        yield
        return
    with FakeTensorMode(), torch_operations():
        yield


def read_architecture(space: Space, text: str) -> list[Choices]:
    """ "5433|3230|0010|0000" -> one path per block. Raises ConfigError for what is not an architecture of the space."""
    fix = "write one path per block as bossnas search does, such as '5433|3230|0010|0000' for hytra"
    parts = text.split("|")
    if len(parts) != space.blocks:
        raise ConfigError("architecture", f"{text!r} has {len(parts)} paths, the space {space.blocks} blocks", fix)
    architecture: list[Choices] = []
    for block, part in enumerate(parts):
        if not (part.isascii() and part.isalnum()):
            raise ConfigError("architecture", f"{part!r} is no path", fix)
        path = decode(part.lower())
        if path not in space.paths(block, architecture):
            raise ConfigError(
                "architecture",
                f"block {block} has no path {part!r} after {'|'.join(parts[:block]) or 'the stem'}",
                fix,
            )
        architecture.append(path)
    return architecture


def call_stem(stem: nn.Module, x: Tensor) -> Tensor:
    """A space without a stem has an nn.Identity, which takes nothing but ``x``."""
    return x if isinstance(stem, nn.Identity) else stem(x, 1, None)


def _through(layer: nn.Module, choice: int, x: Tensor) -> Tensor:
    return layer(x, choice, 1, None)


@torch.no_grad()
def run(call: Callable[[Tensor], Tensor], modules: list[nn.Module], shape: Shape) -> Entry:
    """Runs ``call`` with one image's map of zeros; what it cost of ``modules``, and the output's shape."""
    x = torch.zeros(1, *shape)
    shapes: list[Shape] = []
    price = count(modules, lambda: shapes.append(cast("Shape", tuple(call(x).shape[1:]))))
    return Entry(Cost(price["macs"], price["params"]), shapes[0])


class _Products(TorchDispatchMode):
    """Adds up floating-point operations by PyTorch's table, without its `FlopCounterMode`'s sums for each module, which
    take longer than the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


@torch.no_grad()
def count(modules: list[nn.Module], call: Callable[[], object]) -> dict[str, int]:
    """Runs ``call()`` and returns {"macs", "params"} of what it used of ``modules``.

    MACs are those of convolutions, linear layers and attention products; give one image for the cost of an image.
    Parameters are those of the leaf modules that ran; a convolution that ran on a slice of its weights counts the
    slice. Norms and activations add no MACs, as in the literature.
    """
    used: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            kernel = math.prod(module.weight.shape[2:])
            size = output.shape[1] * inputs[0].shape[1] // module.groups * kernel
            used[module] = size + (0 if module.bias is None else output.shape[1])
        else:
            used[module] = sum(p.numel() for p in module.parameters(recurse=False))

    handles = [
        leaf.register_forward_hook(note)
        for module in modules
        for leaf in module.modules()
        if any(True for _ in leaf.parameters(recurse=False))
    ]
    try:
        with _Products() as products, sdpa_kernel(SDPBackend.MATH):
            call()
    finally:
        for handle in handles:
            handle.remove()
    return {"macs": products.flops // 2, "params": sum(used.values())}
