"""The training loop of one block, written once, top to bottom (METHOD 3)."""

from __future__ import annotations

import time
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bossnas.config.search import TrainConfig
from bossnas.distributed import dist
from bossnas.distributed.engines.protocol import Engine, Outcome
from bossnas.optim.base import check_bad_steps
from bossnas.optim.cosine import ema_momentum, learning_rate
from bossnas.spaces import Space
from bossnas.spaces.paths import Choices
from bossnas.supernet import losses
from bossnas.supernet.memory import paths_at_once
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
    """What one optimizer step reports. ``loss``: mean over paths, micro-batches and ranks, of the bootstrapping in
    [-4, 4], not finite in a step that was not applied, perhaps."""

    epoch: int
    ends_epoch: bool
    loss: float
    spread: float
    lr: float
    ema_momentum: float
    images_per_second: float
    outcome: Outcome = "applied"
    loss_scale: float = 1.0


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


def train_block(
    networks: Networks,
    space: Space,
    engine: Engine,
    inputs: Iterator[list[Tensor]],
    state: RunState,
    training: Training,
    prefix: list[Choices],
) -> Generator[Step | None]:
    """Trains block ``state.block`` from ``state.step`` to the end of its stage.

    Yields None after every micro-batch but an update's last, and a Step after the optimizer step. ``inputs`` gives the
    micro-batches from there on, for block 0 images, for others features of the block before: per view one tensor
    [n, C, H, W] on the device, channels_last, views 0..J-1 of kind A and J..2J-1 of kind B. ``prefix``: the paths of
    the blocks before, which say what paths this block has; it may change between two steps. ``engine`` wraps the
    block's trainable modules; its optimizer moves the target network, too. The caller may rate or save between two
    steps.

    A step whose gradient is not finite is skipped and counted; raises ConfigError after more than
    settings.max_bad_steps of them.
    """
    online, target, predictor = networks
    settings, seed, group = training.settings, training.seed, training.group
    accumulate, steps_per_epoch, total = training.accumulate, training.steps_per_epoch, training.steps
    block, pairs, ranks = state.block, space.view_pairs, dist.world_size(group)
    device = next(predictor.parameters()).device
    online.part(block).train()
    target.part(block).train()
    at_once: tuple[list[Choices], int] | None = None
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
        outcome = engine.step(lr, momentum)
        state.step += 1
        state.images_seen += seen
        state.bad_steps += outcome == "bad"
        sums = torch.stack([loss_sum, spread_sum]) / accumulate
        means = torch.stack(dist.all_gather(sums, group)).mean(0).tolist()
        check_bad_steps(state.bad_steps, settings.max_bad_steps, f" of block {block}", state.step)
        yield Step(
            epoch,
            state.step % steps_per_epoch == 0,
            means[0],
            means[1],
            lr,
            momentum,
            seen / (time.perf_counter() - started),
            outcome,
            engine.loss_scale,
        )


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
