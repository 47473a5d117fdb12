"""The training loop of one block, written once, top to bottom (METHOD 3)."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bossnas.config.search import TrainConfig
from bossnas.distributed import dist
from bossnas.distributed.engines.protocol import Engine, Outcome, outcome
from bossnas.optim.base import check_bad_steps
from bossnas.optim.cosine import ema_momentum, learning_rate
from bossnas.spaces import Space
from bossnas.spaces.paths import Choices
from bossnas.supernet import losses
from bossnas.supernet.memory import images_at_once, paths_at_once
from bossnas.supernet.supernet import Item, Networks, Supernet

PATHS, SHUFFLE = 1, 2  # random streams: everything drawn is a pure function of (seed, stream, block, micro-batch)


@dataclass
class RunState:
    """Where a run is. Randomness and data order are functions of the seed and this position."""

    block: int = 0
    step: int = 0  # optimizer steps done in the block
    images_seen: int = 0
    bad_steps: int = 0  # of the block, skipped because their gradient was not finite
    winners: list[Choices] = field(default_factory=list)
    # where all blocks train at once: the paths along which features are handed on, and the bad steps of every block
    leaders: list[Choices] = field(default_factory=list)
    bad_by_block: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """What one optimizer step reports, in numbers. ``loss``: mean over paths, micro-batches and ranks, of the
    bootstrapping in [-4, 4], not finite in a step that was not applied, perhaps."""

    epoch: int
    ends_epoch: bool
    loss: float
    spread: float
    lr: float
    ema_momentum: float
    images_per_second: float
    outcome: Outcome = "applied"
    loss_scale: float = 1.0


class Report:
    """What an optimizer step reports, which a GPU may still be working on. The numbers come to the host by themselves;
    reading one (`Step` says which there are) too early waits for the GPU.

    ``number``: steps of the block that are done with it; ``images``: images of the run.
    """

    def __init__(self, state: RunState, settings: TrainConfig, known: dict[str, Any], values: Tensor):
        """``known``: of the fields of `Step`; ``values``: loss, spread, applied, loss scale of this step and the
        next."""
        self.number, self.images = state.step, state.images_seen
        self._state, self._settings, self._known = state, settings, known
        self.waits = waits_for(values.device)
        self._step: Step | None = None
        self._event = None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def settle(self) -> Step:
        """The numbers. Counts a step that was bad; raises ConfigError where there are too many of them now. Steps are
        settled in their order."""
        if self._step is None:
            if self._event is not None:
                self._event.synchronize()
            loss, spread, applied, scale, next_scale = self._values.tolist()
            result = outcome(bool(applied), scale)
            self._step = Step(loss=loss, spread=spread, outcome=result, loss_scale=next_scale, **self._known)
            self._state.bad_steps += result == "bad"
            of = f" of block {self._state.block}"
            check_bad_steps(self._state.bad_steps, self._settings.max_bad_steps, of, self.number)
        return self._step

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.settle(), name)


def waits_for(device: torch.device) -> bool:
    """Whether reading a number of the device waits for what was asked of it before."""
    return device.type != "cpu"


def sample_paths(
    space: Space, block: int, winners: Sequence[Choices], seed: int, micro: int, most: int | None = None
) -> list[Choices]:
    """The paths of micro-batch ``micro`` of the block, at most ``most``: equal on all ranks, and after a resume."""
    return space.sample(block, list(winners), np.random.default_rng([seed, PATHS, block, micro]))[:most]


@dataclass(frozen=True)
class Training:
    """How a block is trained. ``steps_per_epoch``: optimizer steps; ``accumulate``: micro-batches per step; ``group``:
    the ranks that share a batch (None: all); ``check_paths``: compare the sampled paths over these ranks."""

    settings: TrainConfig
    steps_per_epoch: int
    accumulate: int = 1
    seed: int = 0
    group: Any = None
    check_paths: bool = False

    @property
    def steps(self) -> int:
        """Optimizer steps of a block's stage."""
        return self.settings.epochs * self.steps_per_epoch


def frozen_inputs(
    target: Supernet,
    winners: Sequence[Choices],
    batches: Iterator[list[Tensor]],
    autocast: Callable[[], AbstractContextManager],
) -> Iterator[list[Tensor]]:
    """What the frozen blocks make of micro-batches of views of images: the inputs of block ``len(winners)``."""
    most = 0
    for views in batches:
        with autocast():
            most = most or images_at_once(target, winners, views[0])
            features = target.features_of_views(winners, views, most)
        yield features


def train_block(
    networks: Networks,
    space: Space,
    engine: Engine,
    inputs: Iterator[list[Tensor]],
    state: RunState,
    training: Training,
    prefix: list[Choices],
) -> Generator[Report | None]:
    """Trains block ``state.block`` from ``state.step`` to the end of its stage.

    Yields None after every micro-batch but an update's last, and a Report after the optimizer step. ``inputs`` gives
    the micro-batches from there on, for block 0 images, for others features of the block before: per view one tensor
    [n, C, H, W] on the device, channels_last, views 0..J-1 of kind A and J..2J-1 of kind B. ``prefix``: the paths of
    the blocks before, which say what paths this block has; it may change between two steps. ``engine`` wraps the
    block's trainable modules; its optimizer moves the target network, too. The caller may rate or save between two
    steps.

    A step whose gradient is not finite is skipped and counted; raises ConfigError after more than
    settings.max_bad_steps of them, on a GPU a step late. With one rank nothing in a step waits for a GPU.
    """
    online, target, predictor = networks
    settings, seed, group = training.settings, training.seed, training.group
    accumulate, steps_per_epoch, total = training.accumulate, training.steps_per_epoch, training.steps
    block, pairs, ranks = state.block, space.view_pairs, dist.world_size(group)
    device = next(predictor.parameters()).device
    online.part(block).train()
    target.part(block).train()
    at_once: tuple[list[Choices], int] | None = None
    late: Report | None = None
    warmup = round(settings.warmup_epochs * steps_per_epoch * accumulate)

    while state.step < total:
        started = time.perf_counter()
        loss_sum, spread_sum, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
        for m in range(accumulate):
            micro = state.step * accumulate + m
            paths = sample_paths(space, block, prefix, seed, micro, settings.paths)
            if training.check_paths:
                _check_paths(paths, block, micro, group)
            features = next(inputs)
            n = len(features[0])
            # METHOD 3.3, as the shuffled batch norm of MoCo (He et al. 2020): if both networks normalised the same
            # images together, the shared batch statistics would help them match without learning
            order = None
            if ranks > 1:
                rng = np.random.default_rng([seed, SHUFFLE, block, micro])
                order = torch.from_numpy(rng.permutation(n * ranks))

            if at_once is None or at_once[0] != prefix:
                at_once = list(prefix), _paths_at_once(online, space, block, prefix, training, features, engine)
            chunks = [range(len(paths))[start : start + at_once[1]] for start in range(0, len(paths), at_once[1])]

            # of all paths before any chunk of them trains: the ensemble target is the mean over all (METHOD 3.3)
            targets: list[Tensor] = []
            if settings.objective != "instance":
                with torch.no_grad(), engine.autocast():
                    for chosen in chunks:
                        targets += _targets(target, block, _items(paths, chosen, pairs, features), order, group)

            for chosen in chunks:
                items = _items(paths, chosen, pairs, features)
                with engine.autocast():
                    projections = online.embed(block, items, recompute=settings.activation_checkpointing)
                    loss = _loss(settings, predictor, projections, targets[0::2], targets[1::2])
                # `last` once in an update, in its last backward pass: FSDP2 and DeepSpeed end the accumulation there
                engine.micro(loss, last=m == accumulate - 1 and chosen.stop == len(paths))
                # the gradient is that of the sum over the paths, the reported loss their mean (METHOD 3.3)
                loss_sum += loss.detach() / len(paths)
                seen_a = torch.stack([p.detach() for p in projections[0::2]])
                spread_sum += losses.spread(seen_a) * len(chosen) / len(paths)
            seen += n * ranks
            if m < accumulate - 1:
                yield None

        epoch = state.step // steps_per_epoch
        # `micro` is now that of the update's last micro-batch, by which METHOD 3.4 counts
        lr = learning_rate(settings.lr, epoch, settings.epochs, micro, warmup)
        momentum = ema_momentum(micro, total * accumulate, settings.ema)
        verdict = engine.begin_step(lr, momentum)
        state.step += 1
        state.images_seen += seen
        means = torch.stack(dist.all_gather(torch.stack([loss_sum, spread_sum]) / accumulate, group)).mean(0)
        rest = [
            value.to(means).view(1) if isinstance(value, Tensor) else means.new_full((1,), float(value))
            for value in verdict
        ]
        if late is not None:
            late.settle()  # one step late, while the device works on this one
        known = {
            "epoch": epoch,
            "ends_epoch": state.step % steps_per_epoch == 0,
            "lr": lr,
            "ema_momentum": momentum,
            "images_per_second": seen / (time.perf_counter() - started),
        }
        report = Report(state, settings, known, torch.cat([means, *rest]))
        if not report.waits:
            report.settle()
        late = report
        yield report


def _paths_at_once(
    online: Supernet,
    space: Space,
    block: int,
    prefix: list[Choices],
    training: Training,
    features: list[Tensor],
    engine: Engine,
) -> int:
    """Paths that share a forward and a backward pass. Asked of the block's first micro-batch, whichever is next: the
    sums of a run that was resumed are rounded as those of one that was not."""
    settings, few = training.settings, training.settings.paths_per_pass
    # a forward pass on shares must have its backward pass
    if few or engine.sharded or features[0].device.type != "cpu":
        return few or 2**31
    first = sample_paths(space, block, prefix, training.seed, 0, settings.paths)[0]
    with engine.autocast():
        a, b = features[0], features[space.view_pairs]
        return paths_at_once(online, block, first, a, b, settings.activation_checkpointing)


def _items(paths: list[Choices], chosen: range, pairs: int, features: list[Tensor]) -> list[Item]:
    """View A and view B along each of the chosen paths."""
    return [Item(paths[j], features[v]) for j in chosen for v in (j % pairs, j % pairs + pairs)]


def _targets(target: Supernet, block: int, items: list[Item], order: Tensor | None, group: Any) -> list[Tensor]:
    """The target network's projections of the items, of images that are mixed over the ranks."""
    if order is None:
        return target.embed(block, items)
    views = {id(item.x): item.x for item in items}  # paths may share a view, which then is computed once
    shown = {key: dist.shuffle(x, order, group) for key, x in views.items()}
    projections = target.embed(block, [Item(item.path, shown[id(item.x)]) for item in items])
    return [dist.shuffle(t, order.argsort(), group) for t in projections]


def _loss(
    settings: TrainConfig,
    predictor: nn.Module,
    projections: list[Tensor],
    targets_a: list[Tensor],
    targets_b: list[Tensor],
) -> Tensor:
    """The objective of some paths, summed over them; ``projections`` of view A and view B by turns."""
    total = torch.zeros((), device=projections[0].device)
    if settings.objective != "instance":
        predicted = _predict(predictor, projections)
        total = (
            losses.ensemble_loss(predicted[0::2], targets_b) + losses.ensemble_loss(predicted[1::2], targets_a)
        ).sum()
    if settings.objective != "bootstrap":
        total = total + losses.instance_loss(projections[0::2], projections[1::2], settings.temperature).sum()
    return total


def _predict(predictor: nn.Module, projections: list[Tensor]) -> list[Tensor]:
    """The predictor over all items in one batch, each item normalised by itself."""
    sizes = [len(o) for o in projections]
    return list(predictor(torch.cat(projections), len(projections)).split(sizes))


def _check_paths(paths: list[Choices], block: int, micro: int, group: Any) -> None:
    """Fails where ranks that share a batch have sampled different paths: their gradients would be mixed up."""
    digest = zlib.crc32(repr(paths).encode())
    everyone = [int(x) for x in dist.all_gather(torch.tensor(digest), group)]
    if len(set(everyone)) > 1:
        raise RuntimeError(f"block {block}, micro-batch {micro}: the ranks have sampled different paths {everyone}")
