"""From shards to batches: an order that no number of ranks or workers changes.

Indexed shards: the global batch i of an epoch is a slice of one permutation seeded by (seed, epoch); a rank takes its
part of every global batch. A view's randomness is seeded by (seed, epoch, sample, view). So the same images and pixels
come for any ranks and workers of the same global batch, and a run may go on anywhere: its place is two numbers, the
epoch and the micro-batch (`order.EpochSlice`). `view_batches` and `fixed_view_batches` give views; `epoch_batches` and
`same_batches`, on which they stand, what any batcher makes of the pictures and their labels.

Streamed shards: the shards of an epoch, in an order seeded by (seed, epoch), are dealt out to the readers, which are
the workers of all ranks; the same place is exact as long as there are as many readers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count as count_up, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from bossnas.config.search import DataConfig
from bossnas.config.shared import ReaderConfig
from bossnas.data.collate import Batcher, Collate, place
from bossnas.data.images import BadImage, decode
from bossnas.data.loader import BegunBatch, load
from bossnas.data.order import FIXED_EPOCH, EpochSlice, FixedBatches, permutation
from bossnas.data.shards import ShardIndex, is_remote
from bossnas.data.streams import Sample, ShardStream, share
from bossnas.data.views import Views
from bossnas.errors import ConfigError

SAMPLE = Path(__file__).parent / "sample"
CPU = torch.device("cpu")
ShardSet = ShardIndex | ShardStream


@dataclass(frozen=True)
class Data:
    """Training and validation images; ``is_sample``: the small set that comes with the package."""

    train: ShardSet
    val: ShardSet
    is_sample: bool


def open_data(settings: ReaderConfig, train_images: int | None = None) -> Data:
    """Opens the shards of both sets, or the packaged sample (Fashion-MNIST) when neither is named.

    ``train_images``: images of a training epoch, where the config says it; streams whose number of images is not known
    need it, and data.val_images. Raises ConfigError that names the key, also when only one of the sets is given.
    """
    train, val = settings.train, settings.val
    if (train is None) != (val is None):
        unset, is_set = ("train", "val") if train is None else ("val", "train")
        raise ConfigError(
            f"data.{unset}", f"is not set, but data.{is_set} is", "set both, or neither for the packaged sample"
        )
    return Data(open_set(settings, "train", train_images), open_set(settings, "val"), train is None)


def open_set(settings: ReaderConfig, name: Literal["train", "val"], train_images: int | None = None) -> ShardSet:
    """Opens the shards of one set, or the packaged sample's when neither set is named. Else as `open_data`."""
    pattern = settings.train if name == "train" else settings.val
    if pattern is None:
        if settings.train is not None or settings.val is not None:
            raise ConfigError(f"data.{name}", "is not set", "name its shards")
        pattern = [str(SAMPLE / f"{name}-000000.tar.gz")]
    images, key = (
        (train_images, "train.steps_per_epoch") if name == "train" else (settings.val_images, "data.val_images")
    )
    return _open(pattern, f"data.{name}", settings, images, key)


def _open(pattern: str | list[str], field: str, settings: ReaderConfig, images: int | None, key: str) -> ShardSet:
    remote = [is_remote(text) for text in ([pattern] if isinstance(pattern, str) else pattern)]
    if not (any(remote) if settings.reader == "auto" else settings.reader == "stream"):
        return ShardIndex.open(pattern, field)
    stream = ShardStream.open(
        pattern,
        field,
        allow_pipe=settings.allow_pipe,
        retries=settings.retries,
        timeout=settings.timeout_s,
        images=images,
    )
    if stream.samples is None:
        raise ConfigError(
            key,
            f"is not set, and nothing says how many images {field} has",
            "set it, or put the pack.json of bossnas pack beside the shards",
        )
    return stream


def readers(source: ShardSet, settings: ReaderConfig, world: int) -> int | None:
    """How many readers share the shards of a stream; None for an index, whose order has nothing to do with it."""
    return world * max(settings.workers, 1) if isinstance(source, ShardStream) else None


def data_state(source: ShardSet, settings: ReaderConfig, world: int) -> dict[str, Any]:
    """What the order of the images depends on, besides a run's position and config: kept with its checkpoints."""
    return {"images": len(source), "readers": readers(source, settings, world)}


def view_batches(
    source: ShardSet,
    views: Views,
    settings: DataConfig,
    part: EpochSlice,
    *,
    device: torch.device = CPU,
    bad: dict[str, str] | None = None,
) -> Generator[list[Tensor]]:
    """The micro-batches of a part of an epoch, for one rank.

    Each is a list with a tensor [batch, 3, S, S] on ``device`` (channels_last) for every view in ``views``. No sample
    of an index comes twice in an epoch; a reader of a stream whose shards end before the epoch does begins them again,
    which is logged. settings.workers processes make whole micro-batches ahead (0: in this process); close the iterator,
    or let it go, to end them (each ends with the micro-batch it is making).

    An unreadable image is replaced, by the next good one of the index or by a neighbour in its batch of a stream,
    logged with its shard and key, and put into ``bad`` (name -> problem). The rank stops with a ConfigError
    (data.max_bad) when it has met more of them than max(1, max_bad * its share of the images) in these batches; with
    max_bad = 0, at the first. Raises ConfigError at once when there are too few images for the epoch, or shards for
    the readers.
    """
    collate = Collate(views, part.seed, part.epoch, place(settings.views_on, device))
    return epoch_batches(source, collate, settings, part, device=device, bad=bad)


def epoch_batches(
    source: ShardSet,
    collate: Batcher,
    settings: ReaderConfig,
    part: EpochSlice,
    *,
    copies: int = 1,
    device: torch.device = CPU,
    bad: dict[str, str] | None = None,
) -> Generator[Any]:
    """As `view_batches`, of whatever ``collate`` makes.

    ``copies``, of an index: how often a sample comes, on different ranks if there are as many, so that the epoch has as
    many fewer samples. The collate gets the numbers sample * copies + copy in place of the samples'.
    """
    start, steps, batch, rank, world = part.start, part.steps, part.batch, part.rank, part.world
    dataset: _Indexed | _Streamed
    if part.images > len(source):
        raise ConfigError(
            source.field,
            f"holds {len(source)} images, but an epoch of {steps} micro-batches of "
            f"{batch} on {world} ranks takes {part.images}",
            "give more images or ask for fewer steps",
        )
    if not 0 <= start <= steps:
        raise ValueError(f"start {start}: expected 0..{steps}")
    if isinstance(source, ShardStream):
        order, workers = source.order(part.seed, part.epoch), max(settings.workers, 1)
        dataset = _Streamed(
            source,
            collate,
            _allowed(settings.max_bad, steps * batch),
            [share(order, rank * workers + worker, world * workers) for worker in range(workers)],
            settings.buffer,
            range(start, steps),
            steps * batch,
            batch,
            is_endless=True,
        )
    else:
        order = permutation(source, part.seed, part.epoch, settings.shuffle_block)
        if copies == 1:
            # a rank's images lie side by side within the global micro-batch, so that it is the same for any world
            chunks = order[: part.images].reshape(steps, world, batch)[start:, rank]
        else:
            # the copies of an image go to neighbouring ranks, which see it at the same moment, as in DeiT
            numbers = (order[:, None] * copies + np.arange(copies)).reshape(-1)
            chunks = numbers[: part.images].reshape(steps, batch, world)[start:, :, rank]
        dataset = _Indexed(source, collate, _allowed(settings.max_bad, len(source) // world), list(chunks), copies)
    return load(dataset, collate, dataset.allowed, settings.workers, device, {} if bad is None else bad)


def fixed_view_batches(
    source: ShardSet,
    views: Views,
    settings: DataConfig,
    fixed: FixedBatches,
    *,
    device: torch.device = CPU,
    bad: dict[str, str] | None = None,
) -> Generator[list[Tensor]]:
    """Batches of views that are the same at every call.

    A stream is read by one process, from its beginning to the last batch asked for, and gives batches in ascending
    order alone. Views, device, workers and unreadable images as in `view_batches`.
    """
    collate = Collate(views, fixed.seed, FIXED_EPOCH, place(settings.views_on, device))
    return same_batches(source, collate, settings, fixed, device=device, bad=bad)


def same_batches(
    source: ShardSet,
    collate: Batcher,
    settings: ReaderConfig,
    fixed: FixedBatches,
    *,
    device: torch.device = CPU,
    bad: dict[str, str] | None = None,
) -> Generator[Any]:
    """As `fixed_view_batches`, of whatever ``collate`` makes."""
    count = len(source) if fixed.count is None else min(fixed.count, len(source))
    firsts = range(0, count, fixed.batch)
    chosen = range(len(firsts)) if fixed.only is None else fixed.only
    allowed, workers = _allowed(settings.max_bad, len(source)), settings.workers
    dataset: _Indexed | _Streamed
    if isinstance(source, ShardStream):
        shards = source.order(fixed.seed, FIXED_EPOCH) if fixed.shuffle else np.arange(len(source.urls))
        dataset = _Streamed(
            source,
            collate,
            allowed,
            [shards],
            settings.buffer if fixed.shuffle else 0,
            chosen,
            count,
            fixed.batch,
            is_endless=False,
        )
        workers = min(workers, 1)
    else:
        order = np.arange(len(source))
        if fixed.shuffle:
            order = permutation(source, fixed.seed, FIXED_EPOCH, settings.shuffle_block)
        chunks = [order[:count][firsts[i] : firsts[i] + fixed.batch] for i in chosen]
        dataset = _Indexed(source, collate, allowed, chunks)
    return load(dataset, collate, allowed, workers, device, {} if bad is None else bad)


def _allowed(share_bad: float, images: int) -> int:
    """Unreadable images that are put up with."""
    return max(1, int(share_bad * images)) if share_bad else 0


@dataclass
class _Indexed(Dataset):
    """Batch i is made of the numbers ``chunks[i]``, each sample * copies + copy. Travels to worker processes."""

    index: ShardIndex
    collate: Batcher
    allowed: int
    chunks: list[np.ndarray]
    copies: int = 1

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, i: int) -> BegunBatch:
        bad: dict[str, str] = {}
        numbers = self.chunks[i].tolist()
        try:
            good = [self._good_picture(number // self.copies, bad) for number in numbers]
            pictures, labels = [picture for picture, _ in good], [label for _, label in good]
            return BegunBatch(self.collate.begin(pictures, numbers, labels), bad)
        except ConfigError as error:
            return BegunBatch.failed(error, bad)

    def _good_picture(self, sample: int, bad: dict[str, str]) -> tuple[np.ndarray, int | None]:
        """The sample, with its label, or the next good one; an error when more are bad than is allowed."""
        for _ in range(len(self.index)):
            if len(bad) > self.allowed:
                break
            data, _, label = self.index.read(sample)
            try:
                return decode(data), label
            except BadImage as error:
                bad[self.index.name(sample)] = str(error)
                sample = (sample + 1) % len(self.index)
        raise ConfigError("data.max_bad", f"{len(bad)} images of a batch cannot be read", "pack the images again")


@dataclass
class _Streamed(IterableDataset):
    """Batches of a stream. ``parts``: the shards of each worker; batch i is made by worker i % len(parts)."""

    stream: ShardStream
    collate: Batcher
    allowed: int
    parts: list[np.ndarray]
    buffer: int
    chosen: Sequence[int]  # numbers of the batches to give
    images: int  # that all batches take from this rank's shards
    batch: int
    is_endless: bool  # whether shards are begun again when they have come to their end

    def __iter__(self) -> Iterator[BegunBatch]:
        workers, info = len(self.parts), get_worker_info()
        if not len(self.chosen):
            return
        # a loader asks its worker 0 first: that one takes over the part whose turn it is
        worker = ((0 if info is None else info.id) + self.chosen[0]) % workers
        notes: list[str] = []
        samples, taken = self._samples(worker, notes), 0
        try:
            for i in self.chosen:
                if i % workers != worker:
                    continue
                skipped = i // workers - taken  # batches of this worker that somebody else has had, or nobody wants
                size = min(self.batch, self.images - i * self.batch)
                chunk = list(islice(samples, skipped * self.batch, skipped * self.batch + size))
                taken = i // workers + 1
                if len(chunk) < size:
                    raise ConfigError(
                        self.stream.field,
                        f"ends {size - len(chunk)} images too early in batch {i}",
                        "correct data.val_images, or pack.json beside the shards",
                    )
                yield self._item(chunk, notes)
        except ConfigError as error:
            yield BegunBatch.failed(error, {})

    def _samples(self, worker: int, notes: list[str]) -> Iterator[Sample]:
        # a reader's first shard tells its shuffle from those of other readers, `again` from its own earlier passes
        key = [self.collate.seed, self.collate.epoch, int(self.parts[worker][0])]
        for again in count_up():
            yield from self.stream.read(self.parts[worker], [*key, again], self.buffer)
            if not self.is_endless:
                return
            notes.append(
                f"{self.stream.field}: a reader has come to the end of its {len(self.parts[worker])} shards "
                f"in epoch {self.collate.epoch} and begins them again"
            )

    def _item(self, chunk: list[Sample], notes: list[str]) -> BegunBatch:
        bad: dict[str, str] = {}
        good: list[tuple[np.ndarray, int | None] | None] = []
        for sample in chunk:
            try:
                good.append((decode(sample.data), sample.label))
            except BadImage as error:
                bad[sample.name] = str(error)
                good.append(good[-1] if good else None)
        first = next((pair for pair in good if pair is not None), None)
        if first is None:
            return BegunBatch.failed(
                ConfigError(
                    "data.max_bad", f"none of the {len(chunk)} images of a batch can be read", "pack the images again"
                ),
                bad,
            )
        said, notes[:] = list(notes), []
        pictures, labels = zip(*(first if pair is None else pair for pair in good), strict=True)
        return BegunBatch(self.collate.begin(list(pictures), [sample.id for sample in chunk], list(labels)), bad, said)
