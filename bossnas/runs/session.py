"""What a search and a retraining have in common around their work: machine, metrics, checkpoints, signals, checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from bossnas.config.shared import RunConfig, accumulation
from bossnas.distributed import dist
from bossnas.distributed.alive import Guard
from bossnas.errors import ConfigError
from bossnas.log import logger
from bossnas.runs import checkpoint
from bossnas.runs.metrics import Metrics


@dataclass
class Machine:
    """What a run works on: the device of this rank, which kernels run there (triton | reference, or off in a
    retraining), and how the ranks divide the work."""

    device: torch.device
    kernels: str
    mesh: dist.Mesh


class Counted:
    """What a search and a retraining count alike, of their config, images and machine."""

    config: Any
    images: Any  # a `data.batches.Data`
    machine: Machine

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step."""
        return accumulation(self.config, self.machine.mesh.shards)

    @property
    def steps_per_epoch(self) -> int:
        return self.config.train.steps_per_epoch or len(self.images.train) // self.config.train.batch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a retraining, or of a block's stage."""
        return self.config.train.epochs * self.steps_per_epoch

    @property
    def val_images(self) -> int:
        """Validation images that are used."""
        return min(self.config.data.val_images or len(self.images.val), len(self.images.val))


@dataclass
class Session:
    """What writes, saves and stops a run while it works. All ranks open it together (`opened`)."""

    folder: Path
    metrics: Metrics
    saver: checkpoint.Saver
    guard: Guard

    def stop(self) -> NoReturn:
        """Ends a run that was asked to stop and has saved its state: raises Stopped."""
        self.saver.wait()
        raise self.guard.stopped()


@contextmanager
def opened(config: RunConfig, is_past: Callable[[dict], bool]) -> Iterator[Session]:
    """The session of a run whose folder is prepared and whose state is restored.

    ``is_past(line)``: whether the restored run has this line of metrics behind it; the others it writes again.
    """
    folder = Path(config.out)
    # the saver is closed first: its last checkpoint is written while the guard still watches and signals still count
    with (
        closing(Metrics(folder if dist.rank() == 0 else None, is_past)) as metrics,
        Guard(config.engine.timeout_minutes) as guard,
        closing(
            checkpoint.Saver(folder / "checkpoints", config.checkpoint.keep, config.checkpoint.asynchronous)
        ) as saver,
    ):
        yield Session(folder, metrics, saver, guard)
        # raises the error of the last save, which `close` only logs
        saver.wait()


def epoch_images(config: RunConfig) -> int | None:
    """Images that an epoch takes, where the config says it; None: all that there are."""
    return config.train.batch * config.train.steps_per_epoch if config.train.steps_per_epoch else None


def check_epoch(config: RunConfig, images: int) -> None:
    """Raises ConfigError where ``images`` training images do not make an epoch."""
    needed = epoch_images(config) or config.train.batch
    if images < needed:
        raise ConfigError(
            "train.steps_per_epoch" if config.train.steps_per_epoch else "train.batch",
            f"an epoch takes {needed} images, but data.train has {images}",
            "lower it",
        )


def require_room(config: RunConfig, size: int) -> None:
    """Raises ConfigError unless the disk has room for the run's checkpoints of ``size`` bytes: those that are kept, and
    the one that is written before the oldest goes."""
    folder = Path(config.out)
    held = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    checkpoint.require_room(folder, max(size * (config.checkpoint.keep + 1) - held, 0))


def warn_of_sample(config: RunConfig, training: int, validation: int) -> None:
    """Says in the log that a run uses the embedded images, where its config names no others."""
    if config.data.train is None and dist.rank() == 0:
        logger.warning(
            "DEMONSTRATION: no data.train is set, so this run uses the embedded sample of Fashion-MNIST "
            "(%d training, %d validation images of 28x28 pixels). Its result says nothing about your data.",
            training,
            validation,
        )


def log_position(folder: Path, is_finished: bool, place: str) -> None:
    """Says in the log where a run that has begun goes on, such as "at step 12 of 40"."""
    logger.info("%s: %s", folder, "this run is finished" if is_finished else f"going on {place}")


def warn_bad_step(place: str, count: int) -> None:
    """Says in the log that a step was skipped. ``place``: such as "block 0 step 4"."""
    logger.warning("%s: its gradient is not finite, so it is skipped (%d so far)", place, count)
