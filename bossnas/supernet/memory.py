"""How much memory work takes: a unit of paths while it is rated, images in the frozen blocks, paths in training."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bossnas.spaces.ops import Frozen, Statistics
from bossnas.spaces.paths import Choices
from bossnas.supernet.supernet import Item, Supernet
from bossnas.supernet.units import Unit, units

PREFIX_BYTES, KEPT_BYTES = 256 * 2**20, 512 * 2**20

T = TypeVar("T")


class Footprint:
    """Bytes that units of a block need at once, from each candidate's own, measured with two nodes of a few images
    that are calibrated.

    ``x``: the block's input for those images, [2N, C, H, W]. Not counted: the weights, the input, the statistics.
    """

    @torch.no_grad()
    def __init__(self, network: Supernet, block: int, paths: Sequence[Choices], x: Tensor):
        self.paths, self.images = paths, len(x)
        self.inputs: dict[Choices, int] = {}  # output bytes of each node of the trie; () is the first layer's input
        self.kinds: dict[Choices, tuple] = {}  # which candidate makes it from which shape: one kind, one batch
        self.inner: dict[tuple, int] = {}  # peak of each kind, its output included
        outputs: dict[tuple, Tensor] = {}
        entered = network.enter(block, x)  # as one node: every path shares it
        shapes: dict[Choices, tuple[int, ...]] = {(): tuple(entered.shape[1:])}
        samples: dict[Choices, Tensor] = {(): entered}
        self.inputs[()] = entered.nbytes
        for path in paths:
            for depth, choice in enumerate(path):
                node, parent = path[: depth + 1], path[:depth]
                if node in shapes:
                    continue
                kind = (depth, choice, shapes[parent])
                if kind not in outputs:
                    item = Item(path, samples[parent], 2)
                    self.inner[kind], (outputs[kind],) = _measured(
                        partial(network, block, [item], Statistics(), start=depth, stop=depth + 1)
                    )
                samples[node] = outputs[kind]
                self.kinds[node], shapes[node] = kind, tuple(outputs[kind].shape[1:])
                self.inputs[node] = outputs[kind].nbytes
        projector = network.projector(block)
        self.pools: dict[tuple, int] = {}  # peak of the projector's first part, by the last layer's kind
        for path in paths:
            kind = self.kinds[path]
            if kind not in self.pools:
                self.pools[kind], pooled = _measured(partial(projector.pool, samples[path], path[-1], 2, Statistics()))
                # the second part
                self.head = pooled.nbytes + peak_bytes(partial(projector.mlp, pooled, 2, Statistics()))

    def of(self, unit: Unit, images: int) -> int:
        """Bytes at the unit's peak when ``images`` pass it together: each layer's inputs, outputs, and one candidate at
        work, with its inputs put together and, for what it does node by node, one node more."""
        paths = [self.paths[row] for row in unit.rows]
        trail = [unit.prefix[:d] for d in range(len(unit.prefix) + 1)]
        prefix = sum(self.inputs[node] for node in trail)
        peak = max((self.inner[self.kinds[node]] for node in trail[1:]), default=0)
        for depth in range(len(unit.prefix), len(paths[0])):
            parents, children = ({p[:d] for p in paths} for d in (depth, depth + 1))
            size = sum(self.inputs[n] for n in parents) + sum(self.inputs[n] for n in children)
            for kind, count in Counter(self.kinds[n] for n in children).items():
                entering = next(self.inputs[n[:-1]] for n in children if self.kinds[n] == kind)
                peak = max(peak, size + count * entering + (count + 1) * self.inner[kind])
        size = sum(self.inputs[p] for p in paths)
        for kind, count in Counter(self.kinds[p] for p in paths).items():
            entering = next(self.inputs[p] for p in paths if self.kinds[p] == kind)
            peak = max(peak, size + count * entering + (count + 1) * self.pools[kind])
        peak = max(peak, size + 2 * len(paths) * self.head)
        return -(-(prefix + peak) * images // self.images)

    def most(self, images: int, limit: int) -> int:
        """The largest ``most`` with which `units` keeps within ``limit`` bytes; 0 if not even one path fits."""
        low, high = 0, len(self.paths)
        while low < high:
            middle = (low + high + 1) // 2
            if max(self.of(unit, images) for unit in units(self.paths, middle)) <= limit:
                low = middle
            else:
                high = middle - 1
        return low


def images_at_once(network: Supernet, winners: Sequence[Choices], x: Tensor) -> int:
    """How many images go through the frozen blocks together: as many as keep their maps within a limit, which is
    256 MiB on a CPU and an eighth of a GPU's memory. ``x``: images [n, 3, S, S], of which two are tried."""
    if not winners:
        return len(x)
    limit = PREFIX_BYTES
    if x.device.type == "cuda":
        limit = torch.cuda.get_device_properties(x.device).total_memory // 8
    few = x[:2]
    call = partial(network.features, winners, few, Frozen())
    call()  # what stays, such as folded weights, is made now and not counted
    return max(1, limit * len(few) // max(1, peak_bytes(call)))


def paths_at_once(network: Supernet, block: int, path: Choices, a: Tensor, b: Tensor, recompute: bool) -> int:
    """How many paths of a step share a forward and a backward pass: on a CPU as many as need at most 512 MiB of
    maps for the backward pass, if all are like ``path``. Together or one by one they give the same gradients, and
    cost about the same time.

    ``a``, ``b``: the path's views of a micro-batch, [n, C, H, W]; ``recompute``: see `Supernet.forward`. The answer
    depends on their shapes alone.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def pack(t: Tensor) -> None:  # what is packed is never asked for; a tensor here would keep its graph alive
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()

    # of all images: with few, blocks of memory would be left behind that fit nothing later
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: _):
        network.embed(block, [Item(path, a), Item(path, b)], recompute=recompute)
    given = {t.untyped_storage().data_ptr() for t in (*network.parameters(), a, b)}
    size = sum(storage.nbytes() for address, storage in kept.items() if address not in given)
    return max(1, KEPT_BYTES // max(1, size))


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes of tensors that ``call`` made and that were alive at once. What a single operation allocates and
    frees inside is not seen. Works on every device."""
    return _measured(call)[0]


def _measured(call: Callable[[], T]) -> tuple[int, T]:
    """`peak_bytes`, and what ``call`` gave."""
    with _Alive() as alive:
        result = call()
    return alive.peak, result


class _Alive(TorchDispatchMode):
    """Follows the storages that operations make until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage.data_ptr() not in given and storage not in self.known:
                    self.known.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, size: int) -> None:
        self.now -= size
