"""Staying alive: a run that is asked to stop saves first, and one that hangs says where and ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as torch_dist

from bossnas.distributed import dist, launch
from bossnas.errors import ConfigError, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
BEAT_SECONDS = 2.0  # between two signs of life of a rank
SILENT_BEATS = 5  # a rank that missed as many gives no sign of life
MARGIN_SECONDS = 60.0  # collectives fail this much later than the watchdog, which knows more, speaks
STORE_SECONDS = 5.0  # the watchdog waits this long for what the store knows
SHOWN = 16  # other ranks that the watchdog lists


class Guard:
    """Listens to signals and watches that this rank moves, while its ``with`` block runs. All ranks enter it.

    What asks the run to stop: SIGTERM, SIGUSR1, Ctrl-C, a terminal that closes (SIGHUP, unless nohup has it ignored),
    and for ranks the death of the launcher that started them. `should_stop` then tells all ranks at the same call;
    they save and raise `stopped()`. A second Ctrl-C leaves at once.

    A rank that calls `at` less often than every ``timeout_minutes`` prints where it is and where every other rank was
    seen last, and ends its process with exit code 1, for the launcher to start the run again: a collective that hangs,
    a rank that was stopped, a loader that is stuck.
    """

    def __init__(self, timeout_minutes: float):
        self.timeout = 60 * timeout_minutes  # seconds
        self.place, self._moved = "the start", time.monotonic()
        self._signal = 0  # that this rank got
        self._interrupted = False  # Ctrl-C was pressed
        self._voted = 0  # that one of the ranks got, known to all
        self._votes: deque[tuple[Any, torch.Tensor]] = deque()  # under way, oldest first
        self._left = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Guard:
        self._moved, self._parent = time.monotonic(), os.getppid()
        self.alone = dist.world_size() == 1
        if not self.alone:
            dist.set_timeout((self.timeout + MARGIN_SECONDS) / 60)
            # its own group: a vote may be under way while other collectives run in another order
            self._group = dist.host_group((self.timeout + MARGIN_SECONDS) / 60)
            self._store = torch_dist.PrefixStore("alive", torch_dist.distributed_c10d._get_default_store())
            self._start(self._beat)
        self._start(self._watch)
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # only there can Python listen
            self._handlers = {
                number: signal.signal(number, self._hear)
                for number in SIGNALS
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
            }
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._left.set()
        if isinstance(error, Exception) and not isinstance(error, (Stopped, ConfigError)):
            print(f"rank {dist.rank()}: {type(error).__name__} at {self.place}", file=sys.stderr, flush=True)
        if error is None or isinstance(error, Stopped):  # else the other ranks may be somewhere else
            self._count_votes(0)
        for thread in self._threads:
            thread.join(1.0)

    @property
    def reason(self) -> str:
        """The signal on which the run stops, after `should_stop` said so."""
        return signal.Signals(self._voted).name

    def at(self, place: str) -> None:
        """Says where this rank is ("block 0 step 12") and that it moves."""
        self.place, self._moved = place, time.monotonic()

    def should_stop(self, lag: int = 0) -> bool:
        """Whether one of the ranks was asked to stop, as of ``lag`` calls ago; once true it stays so.

        Every rank calls it equally often and gets the same answers. It waits for ranks that are more than ``lag`` calls
        behind.
        """
        if self.alone:
            self._voted = self._signal
        else:
            # the largest number of a signal, 0 for none, so that all ranks name the same. Not awaited here: a row that
            # is ahead of the others goes on
            vote = torch.tensor([self._signal])
            work = torch_dist.all_reduce(vote, torch_dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._votes.append((work, vote))
            self._count_votes(lag)
        return self._voted > 0

    def stopped(self) -> Stopped:
        """What to raise when `should_stop` is true and everything is saved."""
        return Stopped(
            f"stopped on {self.reason} at {self.place}; everything is saved; go on with --resume auto",
            self._voted,
            self._parent,
        )

    def _count_votes(self, lag: int) -> None:
        while len(self._votes) > lag:
            work, vote = self._votes.popleft()
            work.wait()
            self._voted = self._voted or int(vote)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if dist.rank() == 0 and not self._signal:  # print may not be called within a print
            more = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: the run saves and stops at the next step{more}\n".encode())
        self._signal = self._signal or number

    def _start(self, function: Callable[[], None]) -> None:
        thread = threading.Thread(target=function, name=f"guard{function.__name__}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _beat(self) -> None:
        """Signs of life in the store. A thread of its own, for a store that hangs must not hold up anything else."""
        pause = min(BEAT_SECONDS, self.timeout / 4)
        while True:
            sign = [time.time(), time.monotonic() - self._moved, self.place]
            try:
                self._store.set(str(dist.rank()), json.dumps(sign))
            except RuntimeError:  # the store went with its process; the collectives will tell
                return
            if self._left.wait(pause):
                return

    def _watch(self) -> None:
        while not self._left.wait(min(1.0, self.timeout / 4)):
            if not self.alone and os.getppid() != self._parent:  # nobody would end these ranks any more
                self._signal = self._signal or signal.SIGHUP
            still = time.monotonic() - self._moved
            if still > self.timeout:
                lines = [f"rank {dist.rank()} has not moved for {_span(still)}: it is at {self.place}, {_position()}"]
                if not self.alone:
                    lines += self._others()
                lines.append(
                    f"rank {dist.rank()} ends, for the launcher to start the run again; go on with "
                    "--resume auto (the limit is engine.timeout_minutes)"
                )
                # not print: the main thread may hang while it holds the lock of stderr
                os.write(2, "".join(f"{line}\n" for line in lines).encode())
                time.sleep(min(launch.GRACE_SECONDS, self.timeout))  # the other ranks may have something to say, too
                # sys.exit would end this thread alone, and the main thread is the one that hangs
                os._exit(1)

    def _others(self) -> list[str]:
        """Where every other rank was seen last, the ones that stand still longest first."""
        seen: dict[int, tuple[float, float, str]] = {}

        def read() -> None:
            with suppress(RuntimeError):  # the store went with its process
                for other in range(dist.world_size()):
                    if other != dist.rank() and self._store.check([str(other)]):
                        beat, still, place = json.loads(self._store.get(str(other)))
                        silent = max(time.time() - beat, 0.0)  # as far as the clocks of the nodes agree
                        seen[other] = (still + silent, silent, place)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(STORE_SECONDS)
        lines = []
        by_age = sorted(list(seen.items()), key=lambda item: -item[1][0])
        for other, (still, silent, place) in by_age[:SHOWN]:
            lines.append(f"  rank {other} was last seen at {place}, {_span(still)} ago")
            if silent > SILENT_BEATS * min(BEAT_SECONDS, self.timeout / 4):
                lines[-1] += f"; its process gives no sign of life for {_span(silent)}"
        if len(by_age) > SHOWN:
            lines.append(f"  and {len(by_age) - SHOWN} more, all of them later")
        if len(by_age) < dist.world_size() - 1:
            lines.append(
                f"  of {dist.world_size() - 1 - len(by_age)} ranks nothing is known: the store, which rank 0 "
                "or its launcher holds, does not answer"
            )
        return lines


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.1f} s"


def _position() -> str:
    """Where the main thread is just now: the innermost function of this package, and of all."""
    main = threading.main_thread().ident
    assert main is not None
    stack = traceback.extract_stack(sys._current_frames()[main])
    ours = [f for f in stack if Path(f.filename).parent.is_relative_to(Path(__file__).parents[1])]
    return " in ".join(f"{f.name} ({f.filename}:{f.lineno})" for f in [*ours[-1:], stack[-1]][::-1])
