"""Loader processes: batches made ahead of the run, unreadable images counted, mistakes carried over."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sized
from contextlib import closing, contextmanager
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from bossnas.data.collate import Batcher
from bossnas.data.views import one_thread
from bossnas.distributed import dist
from bossnas.errors import ConfigError

log = logging.getLogger("bossnas.data.batches")
PREFETCH = 2  # batches that every worker makes ahead
SHOWN = 10  # unreadable images that an error lists
# a scheduler sends them to every process of a run, which must still get batches until it has saved its state
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class BegunBatch(NamedTuple):
    """What a worker hands over: a batch that a collate began, the unreadable images met (name -> problem), things to be
    logged, and a ConfigError's parts (the whole would not travel)."""

    parts: dict[str, Tensor]
    bad: dict[str, str]
    notes: list[str] = []
    error: tuple[str, ...] = ()

    @classmethod
    def failed(cls, error: ConfigError, bad: dict[str, str]) -> BegunBatch:
        return cls({}, bad, [], (error.field, error.problem, error.fix))


def load(
    dataset: Dataset, collate: Batcher, allowed: int, workers: int, device: torch.device, known: dict[str, str]
) -> Generator[Any]:
    """The batches of a dataset of BegunBatches, completed on ``device``. ``known``: unreadable images met before.

    Raises the ConfigErrors that the workers met, and one (data.max_bad) for more than ``allowed`` unreadable images.
    """
    met: dict[str, str] = {}
    items = _from_workers(dataset, workers, device) if workers else _here(dataset)
    with closing(items):
        for parts, bad, notes, error in items:
            for name, problem in bad.items():
                if name not in known:
                    log.warning("unreadable image %s is replaced: %s", name, problem)
            for note in notes:
                log.warning(note)
            known.update(bad)
            met.update(bad)
            if len(met) > allowed:
                shown = "; ".join(f"{name}: {problem}" for name, problem in list(met.items())[:SHOWN])
                raise ConfigError(
                    "data.max_bad",
                    f"{len(met)} images cannot be read, more than {allowed} ({shown})",
                    "pack the images again, which leaves such out, or raise data.max_bad",
                )
            if error:
                raise ConfigError(*error)
            yield collate.complete(parts, device)


def _here(dataset: Dataset) -> Generator[BegunBatch]:
    if isinstance(dataset, IterableDataset):
        yield from dataset
    else:
        assert isinstance(dataset, Sized)
        for i in range(len(dataset)):
            yield dataset[i]


def _start_worker(worker: int) -> None:
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    one_thread()


def _end_with_parent() -> None:
    """A run that was killed leaves no workers: torch's look at the server that forked them, which they keep alive."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _held_back() -> Iterator[None]:
    """Processes started inside, the server that forks workers among them, never get the IGNORED signals. This one gets
    them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    try:
        resource_tracker.ensure_running()  # its start lets SIGTERM and SIGINT through again
        signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _context(dataset: Dataset) -> multiprocessing.context.BaseContext:
    """How loader processes start. A process group has threads of its own, as have the drivers of object stores, and a
    fork may then take over a lock that one of them holds just then: seen as a worker that hangs inside os.fork. So with
    several ranks, and for streams, a server that has no threads forks."""
    if dist.world_size() == 1 and not isinstance(dataset, IterableDataset):
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    collate = getattr(dataset, "collate", None)
    context.set_forkserver_preload(["bossnas.data.batches", *([] if collate is None else [type(collate).__module__])])
    return context


def _from_workers(dataset: Dataset, workers: int, device: torch.device) -> Generator[BegunBatch]:
    # its own generator: the loader must not draw from the run's random numbers
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
        multiprocessing_context=_context(dataset),
        pin_memory=device.type == "cuda",
    )
    handler = signal.getsignal(signal.SIGCHLD)
    others = set(multiprocessing.active_children())
    with _held_back():
        iterator = iter(loader)
    started = set(multiprocessing.active_children()) - others

    def end() -> None:
        for worker in started:
            worker.kill()

    # a generator that an exception holds is not closed at the interpreter's exit, which would wait for the workers
    # after a SIGTERM that they ignore
    atexit.register(end)
    if threading.current_thread() is threading.main_thread():
        # torch's handler would raise for a dead worker wherever the run is just then, say while it saves its
        # state; without it, the next batch raises
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    try:
        yield from iterator
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ConfigError(
            "data.workers",
            f"a loader process died ({error})",
            "use fewer, or give the machine more memory and shared memory (/dev/shm)",
        ) from error
    finally:
        atexit.unregister(end)
