"""All blocks train at once, each on what the target network of the block before it makes of the same micro-batch.

What every block sees is a function of seed and position alone: the features of a micro-batch of step s are made with
the target network's weights before the update of step s, along the current leader of every block before, with batch
norm over the batch itself. So it does not matter how the blocks are laid out over rows of ranks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bossnas import log
from bossnas.distributed import dist, pipe
from bossnas.distributed.alive import MARGIN_SECONDS
from bossnas.distributed.engines.protocol import Engine
from bossnas.distributed.pipe import Place, Receiver, Sender
from bossnas.log import logger
from bossnas.runs import checkpoint
from bossnas.search import winners
from bossnas.search.stage import Job, Late, measures, rating_due, save_due, train_batches, train_with, warn
from bossnas.spaces import Space
from bossnas.spaces.paths import Choices, encode
from bossnas.supernet.supernet import Item, Supernet
from bossnas.supernet.train_block import Report, RunState

LEADERS = 3  # the random stream of the first leaders, beside those of bossnas.supernet.train_block


def block_parallel(job: Job, where: Path | None) -> None:
    """Trains all blocks at once, rating them in mid-stage to choose their leaders; then rates them in order, each on
    the winners before it. ``where``: the checkpoint to go on from."""
    run, state = job.run, job.run.state
    total, blocks = run.total_steps, run.space.blocks
    if not state.leaders:
        state.leaders[:] = first_leaders(run.space, run.config.seed)
        logger.info("first leaders %s", "|".join(map(encode, state.leaders)))
    if state.step < total:
        row = _Row(job, where)
        with log.progress("all blocks train", total, state.step, dist.rank() == 0) as task:
            while state.step < total:
                if rating_due(run, state.step):
                    job.session.saver.wait()
                    row.share_weights()
                    row.follow(_rated_leaders(job))
                stop = row.train(next(s for s in range(state.step + 1, total + 1) if save_due(run, s)), task)
                row.report()
                job.save(row.engines, stop)
        row.close()
        row.share_weights()
    while state.block < blocks:
        job.finish_block()
        job.save({})


def first_leaders(space: Space, seed: int) -> list[Choices]:
    """A path of every block, drawn from those that can follow the ones before it."""
    leaders: list[Choices] = []
    for block in range(space.blocks):
        paths = space.paths(block, list(leaders))
        leaders.append(paths[int(np.random.default_rng([seed, LEADERS, block]).integers(len(paths)))])
    return leaders


def _rated_leaders(job: Job) -> list[Choices]:
    """The best path of every block, each rated on the best ones before it. All ranks hold all weights."""
    run = job.run
    leaders: list[Choices] = []
    for block in range(run.space.blocks):
        leader = job.rate_midway(block, leaders)
        if block + 1 < run.space.blocks:  # a prefix has fixed statistics, as when the block is finished
            winners.calibrate_path(run, block, leaders, leader)
            run.target.part(block).eval()
        leaders.append(leader)
    run.target.train()
    return leaders


@torch.no_grad()
def hand_over(target: Supernet, block: int, leader: Choices, views: list[Tensor]) -> Tensor:
    """What the block's target network, in training mode, makes of the micro-batch: see `pipe.pack`.

    ``views``: [n, C, H, W] each; batch norm takes each view's own statistics.
    """
    return pipe.pack(target.forward(block, [Item(leader, x) for x in views]))


class _Row:
    """This rank's blocks at work: the training of each, and the stream that goes through them.

    Micro-batch by micro-batch, the features of all own blocks and of the next row are made before any own block trains
    on it: the next row can begin, and no weights have changed. So one micro-batch is held at a time.
    """

    def __init__(self, job: Job, where: Path | None):
        run, state, mesh = job.run, job.run.state, job.run.machine.mesh
        self.job, self.run, self.trace = job, run, job.trace
        self.step = state.step
        self.positions, self.prefixes, self.stages, self.queues = {}, {}, {}, {}
        for block in mesh.own:
            bad = state.bad_by_block[block] if state.bad_by_block else 0
            self.positions[block] = RunState(block, state.step, state.images_seen, bad)
            self.prefixes[block] = state.leaders[:block]
            queue: deque[list[Tensor]] = deque()
            self.queues[block] = queue
            # `_stream` fills the queue before each `next` of the training: popleft finds a micro-batch, never None
            self.stages[block] = train_with(run, self.positions[block], iter(queue.popleft, None), self.prefixes[block])
            if where is not None and state.step:
                checkpoint.load_engine(where, block, self.stages[block].engine)
            self.stages[block].target.part(block).train()  # it hands over before it trains
        self.records: list[tuple[int, int, dict]] = []
        self.losses: dict[int, str] = {}
        self.late = Late(self._note)
        self.images = train_batches(run, 0, state.step) if mesh.row == 0 else None
        rows, queue_length = len(mesh.blocks), run.config.engine.queue
        self.source = self.sink = None
        if rows > 1:
            link = pipe.connect(run.machine.device, run.config.engine.timeout_minutes + MARGIN_SECONDS / 60)
            if mesh.row > 0:
                self.source = Receiver(link, dist.rank() - mesh.shards, queue_length)
            if mesh.row + 1 < rows:
                self.sink = Sender(link, dist.rank() + mesh.shards, queue_length)
        # the first row is at most so many steps ahead of the last one
        # (a link holds `queue` micro-batches, its receiver one); with less lag it would wait for the others' votes,
        # with more a stop would come later
        self.lag = -(-(rows - 1) * (queue_length + 1) // run.accumulate) + (rows > 1)

    @property
    def engines(self) -> dict[int, Engine]:
        return {block: stage.engine for block, stage in self.stages.items()}

    def train(self, until: int, task: log.Task) -> bool:
        """Trains the own blocks up to step ``until``, or to the step after which all ranks stop, which it tells."""
        micros, own = range(self.run.accumulate), self.run.machine.mesh.own
        if self.source is not None:
            self.source.expect(Place(s, m) for s in range(self.step, until) for m in micros)
        name = f"block {own[0]}" if len(own) == 1 else f"blocks {own[0]} to {own[-1]}"
        stop = False
        while self.step < until and not stop:
            waited, reports = self.trace.waited, []
            for micro in micros:
                self._stream(Place(self.step, micro))
                for block in own:
                    with self.trace.span(f"block {block}"):
                        step = next(self.stages[block].steps)
                    if step is not None:
                        reports.append((step, block))
            self.step += 1
            self.job.session.guard.at(f"{name} step {self.step}")
            with self.trace.span("vote"):
                # at `until` the rows wait for each other in any case: all votes are counted, and none stays under way
                stop = self.job.session.guard.should_stop(0 if self.step == until else self.lag)
            for step, block in reports:
                self.late.add(step, block, round(self.trace.waited - waited, 4))
            self.late.flush(before=self.step)
            task.advance(f"loss of {name} {' '.join(self.losses.values())}")
        self.late.flush()
        if self.sink is not None:
            with self.trace.span("send"):
                self.sink.drain()
        return stop

    def _stream(self, place: Place) -> None:
        """Brings a micro-batch to the own blocks and on to the next row."""
        if self.source is None:
            assert self.images is not None, "the first row has the images"
            with self.trace.span("images"):
                views = next(self.images)
        else:
            with self.trace.span("receive"):
                views = pipe.unpack(self.source.receive())
        for block in self.run.machine.mesh.own:
            self.queues[block].append(views)
            if block + 1 == self.run.space.blocks:
                return
            engine, target, _ = self.stages[block]
            with self.trace.span("hand over"), engine.autocast():
                packed = hand_over(target, block, self.run.state.leaders[block], views)
            views = pipe.unpack(packed)
        if self.sink is not None:
            with self.trace.span("send"):
                self.sink.send(place, packed)

    def _note(self, step: Report, block: int, waited: float) -> None:
        self.losses[block] = f"{step.loss:+.3f}"
        if self.run.machine.mesh.shard == 0:
            warn(replace(self.positions[block], step=step.number), step, self.run.config.train.collapse_below)
            self.records.append((step.number, block, {**measures(step), "waited_seconds": waited}))

    def report(self) -> None:
        """Moves the run's state to the step that all rows have done, and writes their metrics. All ranks call it."""
        bad = {block: position.bad_steps for block, position in self.positions.items()}
        seen = next(iter(self.positions.values())).images_seen
        everyone = dist.all_gather_object((self.step, bad, self.records))
        self.records = []
        assert len({step for step, _, _ in everyone}) == 1, "the rows are at different steps"
        for step, block, values in sorted(chain(*(records for _, _, records in everyone)), key=lambda r: r[:2]):
            self.job.session.metrics.write("train", block, step, **values)
        state = self.run.state
        counts: dict[int, int] = {}
        for _, of_row, _ in everyone:
            counts |= of_row
        state.step, state.images_seen = self.step, seen
        state.bad_by_block[:] = [counts[block] for block in range(self.run.space.blocks)]

    def follow(self, leaders: list[Choices]) -> None:
        """From now on features are handed on along ``leaders``."""
        self.run.state.leaders[:] = leaders
        for block, prefix in self.prefixes.items():
            # in place: the block's training holds this list, and samples along it from its next step on
            prefix[:] = leaders[:block]

    def share_weights(self) -> None:
        """Gives every block's weights to all ranks. All of them call it."""
        run, mesh = self.run, self.run.machine.mesh
        for engine in self.engines.values():
            engine.gather()
        for row, blocks in enumerate(mesh.blocks):
            for block in blocks:
                modules = nn.ModuleList([run.online.part(block), run.target.part(block), run.predictors[block]])
                dist.broadcast([*modules.parameters(), *modules.buffers()], row * mesh.shards)

    def close(self) -> None:
        """Ends the training; the modules hold the weights."""
        for stage in self.stages.values():
            stage.steps.close()
            stage.engine.close()
        self.stages = {}
        if self.images is not None:
            self.images.close()
