"""What a run says: console lines and progress, log.txt, metrics.jsonl, and TensorBoard scalars when installed."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bossnas.runfolder import write_text

logger = logging.getLogger("bossnas")
_SPEAKERS = (logger, logging.getLogger("bossnas_kernels"))
console = Console(stderr=True)
PLAIN_SECONDS = 10  # without a terminal, progress is a line this often


def setup(folder: Path | None, main: bool = True) -> None:
    """Console logging on the main rank (warnings alone elsewhere), and ``folder``/log.txt when given."""
    handlers: list[logging.Handler] = [
        RichHandler(console=console, show_path=False, show_time=False, markup=False) if console.is_terminal
        else logging.StreamHandler(sys.stderr)]
    handlers[0].setLevel(logging.INFO if main else logging.WARNING)
    handlers[0].setFormatter(logging.Formatter("%(message)s"))
    if folder is not None and main:
        handlers.append(logging.FileHandler(folder / "log.txt", encoding="utf-8"))
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in logger.handlers:
        handler.close()
    for speaker in _SPEAKERS:
        speaker.handlers[:] = handlers
        speaker.propagate = False
        speaker.setLevel(logging.INFO)


class Metrics:
    """Appends one JSON object a line to ``folder``/metrics.jsonl, and scalars to TensorBoard when it is installed.

    Opening drops the lines for which ``keep(line)`` is false: those that a resumed run will write again.
    """

    def __init__(self, folder: Path | None, keep=lambda line: True):
        self.file, self.board = None, None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _complete(line)]
            kept = [line for line in lines if keep(json.loads(line))]
            write_text(path, "".join(line + "\n" for line in kept))
        self.file = path.open("a", encoding="utf-8")
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, kind: str, block: int | None, step: int, **values: Any) -> None:
        """``step`` counts optimizer steps within the block; None: of a run without blocks. Values that are not finite
        become null."""
        if self.file is None:
            return
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        place = {} if block is None else {"block": block}
        self.file.write(json.dumps({"kind": kind, **place, "step": step, **values}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f"{kind}/{name}" if block is None else f"block_{block}/{kind}_{name}", value,
                                          step)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


def _complete(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False  # the process was killed while it wrote this line


class Task:
    """One piece of work with a known number of steps; `advance` shows how far it is."""

    def __init__(self, title: str, total: int, done: int, bar: Progress | None, show: bool):
        self.title, self.total, self.done, self.bar, self.show = title, total, done, bar, show
        self.task = bar.add_task(title, total=total, completed=done, info="") if bar is not None else None
        self.started, self.first, self.spoken = time.monotonic(), done, time.monotonic()

    def advance(self, info: str = "", count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, info=info)
        elif self.show and (now - self.spoken > PLAIN_SECONDS or self.done == self.total):
            self.spoken = now
            left = (now - self.started) / max(1, self.done - self.first) * (self.total - self.done)
            logger.info("%s %d/%d  %s  ETA %d s", self.title, self.done, self.total, info, left)


@contextlib.contextmanager
def progress(title: str, total: int, done: int = 0, show: bool = True) -> Iterator[Task]:
    """A live bar on a terminal, a line every few seconds elsewhere, nothing when ``show`` is false."""
    if not (show and console.is_terminal):
        yield Task(title, total, done, None, show)
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
               TextColumn("{task.fields[info]}"), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        yield Task(title, total, done, bar, show)
