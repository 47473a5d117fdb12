"""The whole run: train the blocks, rate them, keep the winners; then the architecture."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from bossnas import layout, log
from bossnas.config.search import Config
from bossnas.distributed import dist
from bossnas.distributed.engines.protocol import Engine
from bossnas.files import write_json
from bossnas.runs import checkpoint
from bossnas.runs.folder import prepare_folder
from bossnas.runs.resume import begin_at, claim
from bossnas.runs.session import opened, require_room
from bossnas.runs.show import lines, show_run
from bossnas.search.block_parallel import block_parallel
from bossnas.search.run import Run, announce, build, restore, write_architecture
from bossnas.search.stage import (
    Job,
    Late,
    Trace,
    measures,
    rating_due,
    save_due,
    train_batches,
    train_with,
    warn,
)
from bossnas.supernet.train_block import Report, frozen_inputs

DONE = "done"  # the file that a finished run has


def search(config: Config, resume: str | None = None, trace: Trace | None = None) -> Path:
    """Runs or continues the search that ``config`` describes and returns the run folder.

    Every rank calls it, after `group.init`. ``trace``: takes down where this rank's time goes. Raises ConfigError for
    what the user can mend, and Stopped when a signal asked the run to stop and its state is saved.
    """
    main = dist.rank() == 0
    log.setup(None, main)
    folder = Path(config.out)
    run = dist.together(lambda: _start(config, resume))
    run.machine.mesh = dist.connected(run.machine.mesh, config.engine.timeout_minutes)
    log.setup(folder, main)
    where = restore(run, folder)
    announce(run, folder, "search")
    with opened(config, lambda line: _is_past(run, line)) as session:
        job = Job(run, session, trace or Trace())
        if config.schedule == "sequential":
            sequential(job, where)
        else:
            block_parallel(job, where)
    if main:
        write_architecture(run, folder)
    dist.barrier()
    if main:
        write_json(folder / DONE, {"steps": run.state.step, "images": run.state.images_seen})
        log.say("\n".join(["", *lines(show_run(folder), layout.width())]))
    return folder


def _start(config: Config, resume: str | None) -> Run:
    """Checks everything that can be checked beforehand; only then does the main rank write into the run folder."""
    if dist.rank() > 0:
        return build(config)
    folder, begin = Path(config.out), claim(config, resume)
    run = build(config)
    require_room(config, _checkpoint_bytes(run))
    if begin is not None:
        begin_at(config, begin)
    prepare_folder(folder, config)
    return run


def _is_past(run: Run, line: dict) -> bool:
    """Whether the run, as it was restored, has a line of metrics behind it. It will write the others again; ratings of
    the step where it is are yet to come."""
    state, block, step, rated = run.state, line["block"], line["step"], line["kind"] == "rating"
    if run.config.schedule == "sequential":
        return block < state.block or block == state.block and step + rated <= state.step
    return block < state.block or step + rated <= state.step


def sequential(job: Job, where: Path | None) -> None:
    """One block after the other: trains it on the frozen blocks before, rates it, keeps its winner. ``where``: the
    checkpoint to go on from."""
    state = job.run.state
    while state.block < job.run.space.blocks:
        _train_block(job, where)
        where = None
        job.finish_block()
        state.step = state.bad_steps = 0
        job.save({})


def _train_block(job: Job, where: Path | None) -> None:
    run, state = job.run, job.run.state
    block, total = state.block, run.total_steps
    engine, steps = start_block(run)
    if where is not None and state.step:
        checkpoint.load_engine(where, block, engine)
    with log.progress(f"block {block} train", total, state.step, dist.rank() == 0) as task:

        def write(step: Report) -> None:
            job.session.metrics.write("train", block, step.number, **measures(step))
            warn(replace(state, step=step.number), step, run.config.train.collapse_below)
            task.advance(f"loss {step.loss:+.3f}  {step.images_per_second:.0f} images/s")

        reports = Late(write)
        while state.step < total:
            if rating_due(run, state.step):  # it informs; it never enters the block's own prefix
                job.session.saver.wait()
                engine.gather()
                job.rate_midway(block, state.winners)
            with job.trace.span(f"block {block}"):
                step = next(step for step in steps if step is not None)
            reports.add(step)
            reports.flush(before=state.step)
            job.session.guard.at(f"block {block} step {state.step}")
            stop = job.session.guard.should_stop()
            if stop or save_due(run, state.step):
                reports.flush()
                job.save({block: engine}, stop)
    steps.close()
    engine.close()


def start_block(run: Run, batches: Iterator[list[Tensor]] | None = None) -> tuple[Engine, Generator[Report | None]]:
    """The engine of the state's block and its training on the winners before it; nothing has run yet.

    ``batches``: micro-batches of views of images (None: those of the config's data).
    """
    state = run.state
    if batches is None:
        # epochs count on from block to block: no stage repeats the order and the views of the one before (METHOD 7.8)
        batches = train_batches(run, state.block * run.config.train.epochs, state.step)

    def autocast() -> AbstractContextManager:
        return stage.engine.autocast()

    stage = train_with(run, state, frozen_inputs(run.target, state.winners, batches, autocast), state.winners)
    return stage.engine, stage.steps


def _checkpoint_bytes(run: Run) -> int:
    """An upper bound: both networks, the predictors, and one momentum per parameter of the blocks that train at once,
    or of the largest block."""

    def size(module: nn.Module) -> int:
        return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])

    momentum = [size(run.online.part(b)) + size(run.predictors[b]) for b in range(run.space.blocks)]
    at_once = max if run.config.schedule == "sequential" else sum
    return size(run.online) + size(run.target) + size(run.predictors) + at_once(momentum)
