"""The training of one block, and what every order of training the blocks works with: saving, rating, stopping, time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from bossnas.data.batches import view_batches
from bossnas.data.order import EpochSlice
from bossnas.distributed import dist
from bossnas.distributed.engines.protocol import Engine
from bossnas.files import write_text
from bossnas.log import logger
from bossnas.optim.groups import parameter_groups
from bossnas.optim.lars import LARS
from bossnas.runs.session import Session, warn_bad_step
from bossnas.search import rating, winners
from bossnas.search.run import Run, make_engine, save
from bossnas.spaces.ops import Chain, synchronise
from bossnas.spaces.paths import Choices, encode
from bossnas.supernet.supernet import Networks, Supernet
from bossnas.supernet.train_block import Report, RunState, Step, Training, train_block

WAITS = ("receive", "send", "vote")  # spans in which a rank does no work


class Trace:
    """Where a rank's time goes. ``keep``: every span for `write`, otherwise only the sum by name."""

    def __init__(self, keep: bool = False):
        self.keep, self.seconds = keep, dict.fromkeys(WAITS, 0.0)
        self.spans: list[tuple[str, float, float]] = []  # name, start, seconds

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        started, clock = time.time(), time.perf_counter()
        yield
        took = time.perf_counter() - clock
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        if self.keep:
            self.spans.append((name, started, took))

    @property
    def waited(self) -> float:
        return sum(self.seconds[name] for name in WAITS)

    def write(self, file: Path, rank: int) -> None:
        """The spans as events for chrome://tracing or ui.perfetto.dev; those of several ranks may be put together."""
        events = [
            {"name": name, "ph": "X", "pid": 0, "tid": rank, "ts": start * 1e6, "dur": took * 1e6}
            for name, start, took in self.spans
        ]
        write_text(file, json.dumps({"traceEvents": events}))


@dataclass
class Job:
    """What a schedule works with: the run, what writes, saves and stops it, and what takes down its time."""

    run: Run
    session: Session
    trace: Trace

    def save(self, engines: dict[int, Engine], stop: bool = False) -> None:
        """A checkpoint of the run, and of the engines of the blocks that train now; after it the run stops, if it
        must."""
        with self.trace.span("save"):
            save(self.session.saver, self.run, engines)
        if stop:
            self.session.stop()

    def rate_midway(self, block: int, prefix: Sequence[Choices]) -> Choices:
        """Rates a block that still trains on the paths of the blocks before; returns the best path."""
        run, step = self.run, self.run.state.step
        name = f"block_{block}_epoch_{step // run.steps_per_epoch}"
        with self.trace.span("rate"):
            rated = rating.rate(
                run, block, self.session.folder / "ratings" / f"{name}.partial", prefix, self.session.guard
            )
        leader, value, sure = winners.winner_of(run, rated)
        logger.info(
            "block %d after %d epochs: leader %s with %s; %s",
            block,
            step // run.steps_per_epoch,
            encode(leader),
            winners.score_text(run, value, sure),
            sure.text(),
        )
        self.session.metrics.write("rating", block, step, best=value, path=encode(leader))
        rating.write(self.session.folder, run, block, rated, f"{name}.json", prefix)
        return leader

    def finish_block(self) -> None:
        """Rates the state's block, whose training is done and saved, and freezes it along its winner."""
        run, block = self.run, self.run.state.block
        self.session.saver.wait()
        with self.trace.span("rate"):
            rated = rating.rate(
                run, block, self.session.folder / "ratings" / f"block_{block}.partial", guard=self.session.guard
            )
        winner, value = winners.settle(run, self.session.folder, rated)
        self.session.metrics.write("rating", block, run.total_steps, best=value, path=encode(winner))


def rating_due(run: Run, step: int) -> bool:
    """Whether blocks are rated in mid-stage after ``step`` steps. The run has been saved before it is: a run that goes
    on from there rates them again, and finds the same."""
    every, (epoch, rest) = run.config.rating.every_epochs, divmod(step, run.steps_per_epoch)
    return every > 0 and 0 < step < run.total_steps and rest == 0 and epoch % every == 0


def save_due(run: Run, step: int) -> bool:
    return step % run.config.checkpoint.every_steps == 0 or step == run.total_steps or rating_due(run, step)


def train_batches(run: Run, first_epoch: int, step: int) -> Generator[list[Tensor]]:
    """The micro-batches of images of a stage whose epochs count from ``first_epoch``, from its ``step`` on."""
    config, mesh = run.config, run.machine.mesh
    first, start = divmod(step, run.steps_per_epoch)
    for epoch in range(first, config.train.epochs):
        part = EpochSlice(
            config.seed,
            first_epoch + epoch,
            start * run.accumulate,
            run.steps_per_epoch * run.accumulate,
            config.train.micro_batch,
            mesh.shard,
            mesh.shards,
        )
        views = run.views(*range(2 * run.space.view_pairs))
        yield from view_batches(run.images.train, views, config.data, part, device=run.machine.device, bad=run.bad)
        start = 0


class Stage(NamedTuple):
    """The training of a block: ``target`` is the target network as its engine keeps it."""

    engine: Engine
    target: Supernet
    steps: Generator[Report | None]


def train_with(run: Run, position: RunState, inputs: Iterator[list[Tensor]], prefix: list[Choices]) -> Stage:
    """A fresh engine for block ``position.block`` and the block's training on ``inputs`` (see `train_block`)."""
    config, block, train = run.config, position.block, run.config.train
    engine = make_engine(config, run.machine.mesh)

    def optimizer(module: nn.Module, followers: nn.Module | None, sharded: bool) -> LARS:
        return LARS(
            parameter_groups(module, followers),
            train.lr,
            train.momentum,
            train.weight_decay,
            train.trust,
            sharded=sharded,
            clip=train.clip,
        )

    trained = nn.ModuleDict({**run.online.part(block), "predictor": run.predictors[block]})
    followers = run.target.part(block)
    # before `wrap`: fsdp2 trains copies of the modules, and their norms must average, too
    if train.sync_batch_norm:
        synchronise(trained, followers, average=partial(dist.average, group=run.machine.mesh.group))
    ours, theirs = engine.wrap(trained, followers, optimizer)
    assert isinstance(ours, nn.ModuleDict) and isinstance(theirs, nn.ModuleDict), "an engine keeps what it is given"
    predictor = ours["predictor"]
    assert isinstance(predictor, Chain)
    networks = Networks(run.online.replaced(block, ours), run.target.replaced(block, theirs), predictor)
    training = Training(
        train, run.steps_per_epoch, run.accumulate, config.seed, run.machine.mesh.group, config.engine.check_paths
    )
    steps = train_block(networks, run.space, engine, inputs, position, training, prefix)
    return Stage(engine, networks.target, steps)


class Late:
    """Hands on what steps report: on a CPU at once, on a GPU when the next step is on its way, so that nothing waits.

    ``write(report, *rest)``: what `add` was given.
    """

    def __init__(self, write: Callable[..., None]):
        self._write = write
        self._held: list[tuple] = []

    def add(self, report: Report, *rest: Any) -> None:
        if report.waits:
            self._held.append((report, *rest))
        else:
            self._write(report, *rest)

    def flush(self, before: int | None = None) -> None:
        """Hands on all that is held, or that of steps before number ``before``. Due before a checkpoint: its count of
        bad steps must be whole."""
        while self._held and (before is None or self._held[0][0].number < before):
            self._write(*self._held.pop(0))


def measures(step: Report) -> dict[str, Any]:
    """What metrics.jsonl says of a step."""
    return {
        "epoch": step.epoch,
        "loss": step.loss,
        "spread": step.spread,
        "lr": step.lr,
        "ema_momentum": step.ema_momentum,
        "images": step.images,
        "images_per_second": round(step.images_per_second, 2),
        "outcome": step.outcome,
        "loss_scale": step.loss_scale,
    }


def warn(state: RunState, step: Step | Report, collapse_below: float) -> None:
    """Says in the log what is wrong with a step."""
    if step.outcome == "bad":
        warn_bad_step(f"block {state.block} step {state.step}", state.bad_steps)
    if step.spread < collapse_below:
        logger.warning(
            "block %d step %d: the embeddings are collapsing (spread %.3f < train.collapse_below %.3f); lower train.lr",
            state.block,
            state.step,
            step.spread,
            collapse_below,
        )
