"""From shards to batches of views: an order that no number of ranks or workers changes.

The global batch i of an epoch is a slice of one permutation seeded by (seed, epoch); a rank takes its part
of every global batch. A view's randomness is seeded by (seed, epoch, sample, view). So the same images and
pixels come for any ranks and workers of the same global batch, and a run may go on anywhere: its place
is two numbers, the epoch and the micro-batch.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bossnas import dist
from bossnas.errors import ConfigError
from bossnas.images import BadImage, decode
from bossnas.shards import ShardIndex
from bossnas.views import Recipe

log = logging.getLogger("bossnas.data")
SAMPLE = Path(__file__).parent / "sample"
FIXED_EPOCH = 2**31 - 1  # the epoch of fixed batches: none that a training reaches
PREFETCH = 2  # batches that every worker makes ahead
SHOWN = 10  # unreadable images that an error lists


@dataclass(frozen=True)
class Data:
    """Training and validation images; ``is_sample``: the small set that comes with the package."""

    train: ShardIndex
    val: ShardIndex
    is_sample: bool


def open_data(train: str | list[str] | None = None, val: str | list[str] | None = None) -> Data:
    """Opens the shards of both sets, or the packaged sample (Fashion-MNIST) when neither is named.

    Raises ConfigError naming data.train or data.val, also when only one of them is given.
    """
    if (train is None) != (val is None):
        unset, is_set = ("train", "val") if train is None else ("val", "train")
        raise ConfigError(f"data.{unset}", f"is not set, but data.{is_set} is",
                          "set both, or neither for the packaged sample")
    is_sample = train is None
    if is_sample:
        train, val = [str(SAMPLE / "train-000000.tar.gz")], [str(SAMPLE / "val-000000.tar.gz")]
    return Data(ShardIndex.open(train, "data.train"), ShardIndex.open(val, "data.val"), is_sample)


def batches(index: ShardIndex, recipe: Recipe, views: Sequence[int], view_pairs: int, *, seed: int,
            epoch: int, start: int, steps: int, batch: int, rank: int = 0, world: int = 1,
            workers: int = 0, max_bad: float = 0.001,
            bad: dict[int, str] | None = None) -> Iterator[list[Tensor]]:
    """The micro-batches start..steps-1 of an epoch that has ``steps`` of them, for one rank.

    Each is a list with a tensor [batch, 3, S, S] for every view in ``views`` (see Recipe.make). No sample
    comes twice in an epoch. ``workers`` processes make whole micro-batches ahead (0: in this process);
    close the iterator, or let it go, to end them (each ends with the micro-batch it is making).

    An unreadable image is replaced by the next good one of the index, logged with its shard and key, and
    put into ``bad`` (sample -> problem). The rank stops with a ConfigError (data.max_bad) when it has met
    more of them than max(1, max_bad * its share of the index) in these batches; with max_bad = 0, at the
    first. Raises ConfigError at once when the index is too small for the epoch.
    """
    need = steps * batch * world
    if need > len(index):
        raise ConfigError(index.field, f"holds {len(index)} images, but an epoch of {steps} micro-batches of "
                          f"{batch} on {world} ranks takes {need}", "give more images or ask for fewer steps")
    if not 0 <= start <= steps:
        raise ValueError(f"start {start}: expected 0..{steps}")
    order = _order(seed, epoch, len(index))[:need].reshape(steps, world, batch)[start:, rank]
    dataset = _Batches(index, recipe, tuple(views), view_pairs, seed, epoch, list(order), max_bad, world)
    return _run(dataset, workers, {} if bad is None else bad)


def fixed_batches(index: ShardIndex, recipe: Recipe, views: Sequence[int], view_pairs: int, *, seed: int,
                  count: int | None, batch: int, shuffle: bool, only: Sequence[int] | None = None, workers: int = 0,
                  max_bad: float = 0.001, bad: dict[int, str] | None = None) -> Iterator[list[Tensor]]:
    """Batches of ``count`` images (None, or more than there are: all) that are the same at every call.

    ``shuffle``: the first of a seeded permutation (for calibration), else the first of the index (for
    validation). The last batch may be short. ``only``: the numbers of the batches to give, in this order (None: all).
    Views, ``workers`` and unreadable images as in batches().
    """
    order = _order(seed, FIXED_EPOCH, len(index)) if shuffle else np.arange(len(index))
    order = order[:count]
    chunks = [order[i:i + batch] for i in range(0, len(order), batch)]
    chunks = chunks if only is None else [chunks[i] for i in only]
    dataset = _Batches(index, recipe, tuple(views), view_pairs, seed, FIXED_EPOCH, chunks, max_bad, 1)
    return _run(dataset, workers, {} if bad is None else bad)


def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


@dataclass
class _Batches(Dataset):
    """Batch i is made of the samples ``chunks[i]``. Travels to worker processes."""

    index: ShardIndex
    recipe: Recipe
    views: tuple[int, ...]
    view_pairs: int
    seed: int
    epoch: int
    chunks: list[np.ndarray]
    max_bad: float
    world: int

    @property
    def allowed(self) -> int:
        """Unreadable images that are put up with."""
        share = max(1, int(self.max_bad * len(self.index) / self.world)) if self.max_bad else 0
        return min(share, len(self.index) - 1)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, i: int) -> tuple[list[Tensor], dict[int, str], tuple[str, ...]]:
        """The views, the unreadable samples met, and a ConfigError's parts (the whole would not travel)."""
        size = self.recipe.image_size
        tensors = [torch.empty(len(self.chunks[i]), 3, size, size) for _ in self.views]
        bad: dict[int, str] = {}
        try:
            for row, sample in enumerate(map(int, self.chunks[i])):
                image = self._good_image(sample, bad)
                if image is None:
                    break
                for tensor, view in zip(tensors, self.views, strict=True):
                    rng = np.random.Generator(np.random.PCG64([self.seed, self.epoch, sample, view]))
                    tensor[row] = self.recipe.make(image, view, self.view_pairs, rng)
        except ConfigError as error:
            return [], bad, (error.field, error.problem, error.fix)
        return tensors, bad, ()

    def _good_image(self, sample: int, bad: dict[int, str]) -> Image.Image | None:
        """The sample or the next good one; None when more are bad than is allowed."""
        while len(bad) <= self.allowed:
            try:
                return Image.fromarray(decode(self.index.read(sample)[0]))
            except BadImage as error:
                bad[sample] = str(error)
                sample = (sample + 1) % len(self.index)
        return None


def _run(dataset: _Batches, workers: int, known: dict[int, str]) -> Iterator[list[Tensor]]:
    index, met = dataset.index, {}
    items = _from_workers(dataset, workers) if workers else (dataset[i] for i in range(len(dataset)))
    with closing(items):
        for tensors, bad, error in items:
            if error:
                raise ConfigError(*error)
            for sample, problem in bad.items():
                if sample not in known:
                    log.warning("unreadable image %s is replaced: %s", index.name(sample), problem)
            known.update(bad)
            met.update(bad)
            if len(met) > dataset.allowed:
                shown = "; ".join(f"{index.name(i)}: {problem}" for i, problem in list(met.items())[:SHOWN])
                raise ConfigError("data.max_bad",
                                  f"{len(met)} images cannot be read, more than {dataset.allowed} ({shown})",
                                  "pack the images again, which leaves such out, or raise data.max_bad")
            yield tensors


def _leave_signals_to_the_run(worker: int) -> None:
    # a scheduler signals the whole process group; the run must still get batches until it has saved its state
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _context() -> multiprocessing.context.BaseContext:
    """How loader processes start. A process group has threads of its own, and a fork may then take over a lock that one
    of them holds just then: seen as a worker that hangs inside os.fork. So with several ranks a server that has no
    threads forks."""
    if dist.world_size() == 1:
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _from_workers(dataset: _Batches, workers: int) -> Iterator[tuple]:
    # its own generator: the loader must not draw from the run's random numbers
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=PREFETCH,
                        worker_init_fn=_leave_signals_to_the_run, generator=torch.Generator(),
                        multiprocessing_context=_context())
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's handler would raise for a dead worker wherever the run is just then, say while it saves its
        # state; without it, the next batch raises
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    try:
        yield from iterator
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ConfigError("data.workers", f"a loader process died ({error})", "use fewer, or give the "
                          "machine more memory and shared memory (/dev/shm)") from error
