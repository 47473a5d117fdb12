"""What training and rating take, counted by running the real code on tensors without data.

`train_block` itself runs, at full size, under PyTorch's FakeTensorMode: every operation has its real shapes, dtypes and
lifetimes and costs no memory, so a laptop can count what a cluster will do. What a candidate, a projector or a
predictor does is counted once for each kind of input and played back after that (`bossnas.planning.remembered`), and
every count is a polynomial in the images, so one run stands for all sizes of a micro-batch (`bossnas.planning.meter`).
The operations are those of the plain implementation on batches of more images than the image has pixels in a row; the
Triton kernels keep the same maps for the backward pass and move about as many bytes.

Against runs in which every operation is counted: the same floating-point operations; in 16 bits a cast of each weight
for each batch, where autocast casts a weight that several batches share once (HyTra: three casts more, 0.1 % of the
bytes); the highest memory up to 4 % above. It is below only in 16 bits with checkpointing where weights outweigh maps
(4 % at a sixteenth of HyTra's width), as autocast holds their casts to the end of the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bossnas.config.search import Config, TrainConfig
from bossnas.distributed.engines import protocol
from bossnas.planning.meter import DEGREE, Meter, Unwritten, images_to_count
from bossnas.planning.remembered import Memory, Remembered, watch
from bossnas.spaces import Space, cost, ops
from bossnas.spaces.cost import CostTable, Shape
from bossnas.spaces.ops import Chain
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
        self.mode, self.memory = FakeTensorMode(), Memory()
        hidden, self.out = config.heads.hidden, config.heads.out
        with self.mode, Unwritten():
            # counts do not depend on values, so this one is the target network as well
            self.network = Supernet(space, hidden, self.out)
            self.table = CostTable.of(space, self.image, self.network.stem, self._layer)
            self.predictors = [Remembered(heads.predictor(hidden, self.out), self.memory) for _ in range(space.blocks)]
            self.unit = images_to_count(max(config.train.micro_batch, self.image), [self.network, *self.predictors])
            self._remember()
        self.winners = list(winners or self._middle())
        self._draws: dict[tuple, tuple[int, int, int]] = {}
        self._counted: dict[tuple, Counted] = {}
        self._micros: dict[tuple, Micro] = {}

    def _layer(self, block: int, layer: int) -> nn.Module:
        return cast("nn.ModuleList", self.network.blocks[block])[layer]

    def _remember(self) -> None:
        """Has the network's stem, layers, adapters and projectors counted once for each kind of input."""
        network, memory = self.network, self.memory
        stem = not isinstance(network.stem, nn.Identity)  # the network asks whether it is one
        if stem:
            network.stem = Remembered(network.stem, memory, first=True)
        for block, layers in enumerate(cast("list[nn.ModuleList]", network.blocks)):
            for depth, layer in enumerate(layers):
                layers[depth] = Remembered(layer, memory, first=depth == 0 and not (block == 0 and stem))
            projector = network.projector(block)
            projector.adapter = Remembered(projector.adapter, memory)
            projector.mlp = cast("Chain", Remembered(projector.mlp, memory))

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
        return 2 * _size(self.network) + sum(_size(p) for p in self.predictors)

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
            _size(self.network.part(block)),
            _size(self.predictors[block]),
            _size(self.network.part(block)),
            shape,
            math.prod(shape) * feature,
            max(math.prod(start.shape) for start in self.table.starts[block]) * feature,
            (trie + projector, trie + projector + predictor),
        )

    def _head_macs(self, block: int, shape: Shape, paths: Sequence[Choices]) -> tuple[int, int]:
        """Multiply-adds of an image in the projector and in the predictor, summed over the paths."""
        projector, predictor = self.network.projector(block).eval(), self.predictors[block].eval()

        def through(choice: int, shape: Shape) -> Tensor:
            return projector.mlp(projector.pool(torch.zeros(1, *shape), choice))

        ends = [(path[-1], self.table.path(block, path, shape)[1]) for path in paths]
        with self.mode, torch.no_grad():
            one = {end: cost.count([projector], partial(through, *end))["macs"] for end in set(ends)}
            row = cost.count([predictor], lambda: predictor(torch.zeros(1, self.out)))["macs"]
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
        key = (block, tuple(winners))
        if key not in self._draws:
            shape, pairs = self.input_shape(block, winners), self.space.view_pairs
            macs, sizes = [], []
            for step in range(DRAWS):
                paths = sample_paths(self.space, block, list(winners), self.seed, 2 * step, self.train.paths)
                nodes = self._nodes(block, shape, [(j % pairs, path) for j, path in enumerate(paths)]).values()
                macs.append(sum(entry.cost.macs for entry in nodes))
                sizes.append(sum(math.prod(entry.shape) for entry in nodes))
            middle = np.abs(np.array(macs) - np.mean(macs)).argmin()
            self._draws[key] = int(middle), int(np.argmax(sizes)), max(sizes)
        return self._draws[key]

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
        key = (block, tuple(winners), step, recompute)
        if key not in self._counted:
            if recompute:  # parts are met for the first time without it, as they cannot be recorded inside of it
                self.micro(block, winners, step, images, False)
            settings = self.train.model_copy(update={"activation_checkpointing": recompute})
            with self.mode:
                self._counted[key] = count_micro(
                    Networks(self.network, self.network, cast("Chain", self.predictors[block])),
                    self.space,
                    winners,
                    settings,
                    step,
                    torch.empty(self.unit, 3, self.image, self.image),
                    self.seed,
                    self.memory,
                )
        at = (*key, images)
        if at not in self._micros:
            self._micros[at] = self._counted[key].of(images)
        return self._micros[at]


@dataclass(frozen=True)
class Counted:
    """A micro-batch as polynomials in its images (`meter.Size`): ``rows``, [operations, 3, 3], of each phase;
    ``changes`` of the memory, [storages made and freed, 3], and how many of them come before each backward pass."""

    rows: dict[str, np.ndarray]
    changes: np.ndarray
    backward: tuple[int, ...]
    used: int
    averages: tuple[int, int]

    def of(self, images: int) -> Micro:
        """For a number of images."""
        powers = np.array([float(images) ** k for k in range(DEGREE)])
        now = (self.changes @ powers).cumsum()
        return Micro(
            {phase: rows @ powers for phase, rows in self.rows.items()},
            int(max((now[end - 1] for end in self.backward), default=0)),
            int(now.max(initial=0)),
            self.used,
            self.averages,
        )


def count_micro(
    networks: Networks,
    space: Space,
    winners: Sequence[Choices],
    settings: TrainConfig,
    step: int,
    view: Tensor,
    seed: int,
    memory: Memory | None = None,
) -> Counted:
    """Runs the first micro-batch of update ``step`` of block ``len(winners)`` and counts it; on real tensors, too.

    ``view``: of its images, [n, 3, S, S]; ``memory``: of the networks' parts that are `Remembered`.
    """
    block, (online, target, predictor), images = len(winners), networks, len(view)
    trained = nn.ModuleDict({**online.part(block), "predictor": predictor}).train()
    before, meter = Meter("prefix", images), Meter("start", images)
    if settings.sync_batch_norm:
        ops.synchronise(trained, target.part(block), average=lambda t: _Averaged.apply(t, meter))
    if memory is None:
        memory, handles = Memory(), watch(trained, meter.notes)
    else:
        handles = []  # its parts are watched while they are recorded
    for k in range(block):
        target.part(k).eval()
    view = view.contiguous(memory_format=torch.channels_last)
    memory.meter = before
    with ops.torch_operations(), before, torch.no_grad(), protocol.autocast("cpu", settings.precision):
        # a tensor of its own for each view: the supernet knows equal inputs by that
        views = [view.clone() for _ in range(2 * space.view_pairs)]
        features = target.features_of_views(winners, views, images * len(views))
    engine = _Counting(meter, settings)
    # a GPU takes all paths at once, if the config says nothing
    once = {"epochs": 1, "warmup_epochs": 0, "paths_per_pass": settings.paths_per_pass or 2**31}
    # accumulate=2: the loop yields after the first micro-batch, before the engine takes a step
    loop = train_block(
        networks,
        space,
        cast("protocol.Engine", engine),  # it has what a micro-batch needs
        iter([features]),
        RunState(block, step),
        Training(settings.model_copy(update=once), step + 1, accumulate=2, seed=seed),
        list(winners),
    )
    memory.meter = meter
    with ops.torch_operations(), meter:
        next(loop)
    loop.close()
    memory.meter = None
    for handle in handles:
        handle.remove()
    if settings.sync_batch_norm:
        ops.synchronise(trained, target.part(block), average=None)
    rows = {"prefix": before.notes.rows.get("prefix", []) if block else [], "target": [], **meter.notes.rows}
    rows.pop("start", None)
    return Counted(
        {name: np.array(found, np.float64).reshape(-1, 3, DEGREE) for name, found in rows.items()},
        np.array(meter.notes.changes, np.float64).reshape(-1, DEGREE),
        tuple(engine.ends),
        sum(p.numel() for p in meter.notes.moved),
        (len(meter.notes.averages), sum(meter.notes.averages)),
    )


class _Averaged(torch.autograd.Function):
    """The identity, which notes the bytes that an average over ranks would carry, forward and backward."""

    @staticmethod
    def forward(ctx, x: Tensor, meter: Meter) -> Tensor:
        ctx.meter = meter
        meter.notes.averages.append(x.numel() * x.element_size())
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.meter.notes.averages.append(gradient.numel() * gradient.element_size())
        return gradient.clone(), None


class _Counting:
    """Stands in for an engine: says which phase runs, and goes back through a loss without taking a step."""

    def __init__(self, meter: Meter, settings: TrainConfig):
        self.meter, self.precision, self.targets = meter, settings.precision, settings.objective != "instance"
        self.ends: list[int] = []  # changes of the memory before each backward pass
        self.loss_scale = 1.0

    def autocast(self) -> AbstractContextManager:
        self.meter.phase = "target" if self.meter.phase == "start" and self.targets else "online"
        return protocol.autocast("cpu", self.precision)

    def micro(self, loss: Tensor, last: bool) -> None:
        self.ends.append(len(self.meter.notes.changes))
        self.meter.phase = "backward"
        loss.backward()


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
