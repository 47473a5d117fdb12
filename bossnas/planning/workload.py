"""What training and rating take, counted by running the real code on tensors without data.

`train_block` itself runs, at full size, under PyTorch's FakeTensorMode: every operation has its real shapes, dtypes and
lifetimes and costs no memory, so a laptop can count what a cluster will do. The operations are those of the plain
implementation; the Triton kernels keep the same maps for the backward pass and move about as many bytes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from bossnas.config.search import Config, TrainConfig
from bossnas.distributed.engines import protocol
from bossnas.spaces import Space, cost, ops
from bossnas.spaces.cost import CostTable, Shape
from bossnas.spaces.paths import Choices
from bossnas.supernet import heads
from bossnas.supernet.supernet import Networks, Supernet
from bossnas.supernet.train_block import RunState, Training, sample_paths, train_block

DRAWS = 512  # micro-batches whose paths are looked at for the mean and the largest
WEIGHT = 4  # bytes: parameters, gradients, momentum and targets are float32 in every precision


@dataclass(frozen=True)
class Micro:
    """A micro-batch of one rank. ``phases``: prefix, target, online, backward -> one row for each operation, with its
    floating-point operations in 16 bits, in more, and the bytes that it reads and writes.

    ``kept``: bytes at the end of the forward passes, for the backward pass; ``peak``: the most at any time. Weights,
    gradients and the inputs are not in either. ``used``: parameters that get a gradient. ``averages``: calls and
    bytes of the collectives of synchronised batch norms.
    """

    phases: dict[str, np.ndarray]
    kept: int
    peak: int
    used: int
    averages: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Block:
    """What a block is: parameters of the online part, of its predictor and of the target part that follows; the input
    map of an image, on the assumed winners and at most; and the multiply-adds of rating an image along all paths, the
    target network's and the online network's, predictor included."""

    number: int
    paths: int
    parameters: int
    predictor: int
    followers: int
    input_shape: Shape
    input_bytes: int
    largest_input_bytes: int
    rated_macs: tuple[int, int]


class Workload:
    """Counts of a config. ``winners``: the paths that blocks hand over along (None: of each block, the path of which
    the multiply-adds are nearest to the mean). Nothing is trained and no data is read."""

    def __init__(self, config: Config, space: Space, winners: Sequence[Choices] | None = None):
        self.space, self.train, self.seed = space, config.train, config.seed
        self.image = config.space.image_size
        self.mode = FakeTensorMode()
        with self.mode:
            self.table = CostTable.of(space, self.image)
            self.online = Supernet(space, config.heads.hidden, config.heads.out)
            self.target = Supernet(space, config.heads.hidden, config.heads.out).requires_grad_(False)
            self.predictors = [heads.predictor(config.heads.hidden, config.heads.out) for _ in range(space.blocks)]
        self.winners = list(winners or self._middle())
        self._counted: dict[tuple, Micro] = {}

    def _middle(self) -> list[Choices]:
        winners: list[Choices] = []
        for block in range(self.space.blocks):
            shape = self.input_shape(block, winners)
            macs = {path: self.table.path(block, path, shape)[0].macs for path in self.space.paths(block, winners)}
            mean = sum(macs.values()) / len(macs)
            distance = {path: abs(value - mean) for path, value in macs.items()}
            winners.append(min(distance, key=distance.__getitem__))
        return winners

    @property
    def weights(self) -> int:
        """Parameters of both networks and all predictors."""
        return _size(self.online) + _size(self.target) + sum(_size(p) for p in self.predictors)

    def input_shape(self, block: int, winners: Sequence[Choices]) -> Shape:
        """Of one image, along the winners of the blocks before."""
        shape = self.table.image
        for k in range(block):
            shape = self.table.path(k, winners[k], shape)[1]
        return shape

    def block(self, block: int) -> Block:
        """What the block is, on the assumed winners."""
        winners = self.winners[:block]
        shape = self.input_shape(block, winners)
        paths = self.space.paths(block, winners)
        feature = 2 if block and self.train.precision != "fp32" else 4
        trie = sum(entry.cost.macs for entry in self._nodes(block, shape, [(0, path) for path in paths]).values())
        projector, predictor = self._head_macs(block, shape, paths)
        return Block(
            block,
            len(paths),
            _size(self.online.part(block)),
            _size(self.predictors[block]),
            _size(self.target.part(block)),
            shape,
            math.prod(shape) * feature,
            max(math.prod(start.shape) for start in self.table.starts[block]) * feature,
            (trie + projector, trie + projector + predictor),
        )

    def _head_macs(self, block: int, shape: Shape, paths: Sequence[Choices]) -> tuple[int, int]:
        """Multiply-adds of an image in the projector and in the predictor, summed over the paths."""
        projector, predictor = self.online.projector(block).eval(), self.predictors[block].eval()

        def through(choice: int, shape: Shape) -> Tensor:
            return projector.mlp(projector.pool(torch.zeros(1, *shape), choice))

        ends = [(path[-1], self.table.path(block, path, shape)[1]) for path in paths]
        with self.mode, torch.no_grad():
            one = {end: cost.count([projector], partial(through, *end))["macs"] for end in set(ends)}
            width = predictor[0].get_parameter("weight").shape[1]
            row = cost.count([predictor], lambda: predictor(torch.zeros(1, width)))["macs"]
        return sum(one[end] for end in ends), row * len(paths)

    def _nodes(self, block: int, shape: Shape, routes: Iterable[tuple[int, Choices]]) -> dict:
        """Cost entries of the trie of (input, path) pairs; the stem once for every input."""
        nodes: dict = {}
        for source, path in routes:
            here = shape
            if block == 0:
                nodes[source, ()] = self.table.stem
                here = self.table.stem.shape
            for depth, choice in enumerate(path):
                entry = self.table.entries[block, depth, choice, here]
                nodes[source, path[: depth + 1]] = entry
                here = entry.shape
        return nodes

    def draws(self, block: int, winners: Sequence[Choices]) -> tuple[int, int, int]:
        """Of the paths of `DRAWS` updates' first micro-batches: the step whose multiply-adds are nearest to the mean,
        the step with the largest maps, and the values of an image in these."""
        shape, pairs = self.input_shape(block, winners), self.space.view_pairs
        macs, sizes = [], []
        for step in range(DRAWS):
            paths = sample_paths(self.space, block, winners, self.seed, 2 * step, self.train.paths)
            nodes = self._nodes(block, shape, [(j % pairs, path) for j, path in enumerate(paths)]).values()
            macs.append(sum(entry.cost.macs for entry in nodes))
            sizes.append(sum(math.prod(entry.shape) for entry in nodes))
        middle = np.abs(np.array(macs) - np.mean(macs)).argmin()
        return int(middle), int(np.argmax(sizes)), max(sizes)

    def typical(self, block: int, images: int) -> Micro:
        """A micro-batch on the assumed winners, with paths of mean cost."""
        winners = self.winners[:block]
        return self.micro(block, winners, self.draws(block, winners)[0], images)

    def largest(self, block: int, images: int, recompute: bool) -> Micro:
        """The micro-batch with the largest maps, over what the blocks before can hand over and the paths drawn."""
        largest, step, at = 0, 0, self.winners[:block]
        for winners in self.table.starts[block].values():
            _, candidate, size = self.draws(block, winners)
            if size > largest:
                largest, step, at = size, candidate, winners
        return self.micro(block, at, step, images, recompute)

    def micro(
        self, block: int, winners: Sequence[Choices], step: int, images: int, recompute: bool | None = None
    ) -> Micro:
        """Runs the first micro-batch of update ``step`` of the block's training, of ``images`` images.

        ``recompute``: activation checkpointing (None: as the config says).
        """
        recompute = self.train.activation_checkpointing if recompute is None else recompute
        key = (block, tuple(winners), step, images, recompute)
        if key not in self._counted:
            settings = self.train.model_copy(update={"activation_checkpointing": recompute})
            with self.mode:
                self._counted[key] = count_micro(
                    Networks(self.online, self.target, self.predictors[block]),
                    self.space,
                    winners,
                    settings,
                    step,
                    images,
                    self.image,
                    self.seed,
                )
        return self._counted[key]


def count_micro(
    networks: Networks,
    space: Space,
    winners: Sequence[Choices],
    settings: TrainConfig,
    step: int,
    images: int,
    size: int,
    seed: int,
) -> Micro:
    """Runs the first micro-batch of update ``step`` of block ``len(winners)`` and counts it; on real tensors, too."""
    block, (online, target, predictor) = len(winners), networks
    trained = nn.ModuleDict({**online.part(block), "predictor": predictor}).train()
    for parameter in trained.parameters():  # as from the second micro-batch on: gradients exist and are added to
        parameter.grad = torch.zeros_like(parameter)
    averages: list[int] = []
    if settings.sync_batch_norm:
        ops.synchronise(trained, target.part(block), average=lambda t: _Averaged.apply(t, averages))
    moved: set[nn.Parameter] = set()
    handles = [p.register_post_accumulate_grad_hook(moved.add) for p in trained.parameters()]
    views = [
        torch.zeros(images, 3, size, size).contiguous(memory_format=torch.channels_last)
        for _ in range(2 * space.view_pairs)
    ]
    for k in range(block):
        target.part(k).eval()
    with Meter("prefix") as before, torch.no_grad(), protocol.autocast("cpu", settings.precision):
        features = [target.features(winners, x) for x in views]
    meter = Meter("start")
    engine = _Counting(meter, settings)
    # accumulate=2: the loop yields after the first micro-batch, before the engine takes a step
    loop = train_block(
        networks,
        space,
        cast("protocol.Engine", engine),  # it has what a micro-batch needs
        iter([features]),
        RunState(block, step),
        Training(settings.model_copy(update={"epochs": 1, "warmup_epochs": 0}), step + 1, accumulate=2, seed=seed),
        list(winners),
    )
    with meter:
        next(loop)
    loop.close()
    for handle in handles:
        handle.remove()
    trained.zero_grad(set_to_none=True)
    if settings.sync_batch_norm:
        ops.synchronise(trained, target.part(block), average=None)
    rows = {"prefix": before.rows.get("prefix", []) if block else [], "target": [], **meter.rows}
    rows.pop("start", None)
    phases = {name: np.array(found, np.float64).reshape(-1, 3) for name, found in rows.items()}
    return Micro(phases, engine.kept, meter.peak, sum(p.numel() for p in moved), (len(averages), sum(averages)))


class _Averaged(torch.autograd.Function):
    """The identity, which notes the bytes that an average over ranks would carry, forward and backward."""

    @staticmethod
    def forward(ctx, x: Tensor, noted: list[int]) -> Tensor:
        ctx.noted = noted
        noted.append(x.numel() * x.element_size())
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.noted.append(gradient.numel() * gradient.element_size())
        return gradient.clone(), None


class _Counting:
    """Stands in for an engine: says which phase runs, and goes back through a loss without taking a step."""

    def __init__(self, meter: Meter, settings: TrainConfig):
        self.meter, self.precision, self.targets = meter, settings.precision, settings.objective != "instance"
        self.kept, self.loss_scale = 0, 1.0

    def autocast(self) -> AbstractContextManager:
        self.meter.phase = "target" if self.meter.phase == "start" and self.targets else "online"
        return protocol.autocast("cpu", self.precision)

    def micro(self, loss: Tensor, last: bool) -> None:
        self.kept, self.meter.phase = max(self.kept, self.meter.now), "backward"
        loss.backward()


class Meter(TorchDispatchMode):
    """Notes of every operation its floating-point operations and bytes, by ``phase``, and of the storages that
    operations make how many bytes are alive (``now``) and were at most (``peak``)."""

    def __init__(self, phase: str):
        super().__init__()
        self.phase, self.now, self.peak = phase, 0, 0
        self.rows: dict[str, list[tuple[float, float, int]]] = {}
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":  # questions about a tensor
            return func(*args, **kwargs)
        given = _tensors((args, {k: v for k, v in kwargs.items() if k not in _outputs(func)}))
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        made = _tensors(result)
        new = [t for t in made if t.untyped_storage()._cdata not in before]
        for t in new:
            storage = t.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        name = func._overloadpacket.__name__
        if (new and not name.startswith("empty")) or func._schema.is_mutable:  # neither a view nor an allocation
            flops = _flops(func, args, kwargs, result)
            half = bool(given) and given[0].element_size() == 2
            moved = sum(_nbytes(t) for t in given) + sum(_nbytes(t) for t in made)
            self.rows.setdefault(self.phase, []).append((flops * half, flops * (not half), moved))
        return result

    def _free(self, size: int) -> None:
        self.now -= size


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


def _outputs(func) -> set[str]:
    return {argument.name for argument in func._schema.arguments if argument.is_out}


def _tensors(values: object) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _nbytes(t: Tensor) -> int:
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
