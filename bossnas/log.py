"""What a run says: console lines and progress, log.txt, metrics.jsonl, and TensorBoard scalars when installed."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger("bossnas")
_SPEAKERS = (logger, logging.getLogger("bossnas_kernels"))
console = Console(stderr=True)
PLAIN_SECONDS = 10  # without a terminal, progress is a line this often


def setup(folder: Path | None, main: bool = True) -> None:
    """Console logging on the main rank (warnings alone elsewhere), and ``folder``/log.txt when given."""
    handlers: list[logging.Handler] = [
        RichHandler(console=console, show_path=False, show_time=False, markup=False)
        if console.is_terminal
        else logging.StreamHandler(sys.stderr)
    ]
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


def say(text: str) -> None:
    """Shows text of several lines, such as a table, as it is, and keeps it in log.txt."""
    for line in text.splitlines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(logger.makeRecord(logger.name, logging.INFO, "", 0, line, (), None))


class Task:
    """One piece of work with a known number of steps; `advance` shows how far it is."""

    def __init__(self, title: str, total: int, done: int, bar: Progress | None, show: bool):
        self.title, self.total, self.done, self.show = title, total, done, show
        self.bar = (bar, bar.add_task(title, total=total, completed=done, info="")) if bar is not None else None
        self.started, self.first, self.spoken = time.monotonic(), done, time.monotonic()

    def advance(self, info: str = "", count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if self.bar is not None:
            bar, task = self.bar
            bar.update(task, completed=self.done, info=info)
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
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield Task(title, total, done, bar, show)
