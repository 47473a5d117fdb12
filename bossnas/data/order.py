"""Which images come when: a part of an epoch for one rank, or fixed batches that are the same at every call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bossnas.data.shards import ShardIndex

FIXED_EPOCH = 2**31 - 1  # the epoch of fixed batches: none that a training reaches


@dataclass(frozen=True)
class EpochSlice:
    """Micro-batches ``start``..``steps`` - 1 of an epoch that has ``steps`` of them, for one rank.

    ``batch``: images of a micro-batch on one rank, of the ``world`` ranks that share every micro-batch. The order is a
    function of ``seed`` and ``epoch``, so this says where a run is in its data; for a stream as long as it has as many
    readers.
    """

    seed: int
    epoch: int
    start: int
    steps: int
    batch: int
    rank: int = 0
    world: int = 1

    @property
    def images(self) -> int:
        """What the whole epoch takes, on all ranks."""
        return self.steps * self.batch * self.world


@dataclass(frozen=True)
class FixedBatches:
    """Batches of ``count`` images (None, or more than there are: all). The last batch may be short.

    ``shuffle``: the first images of an order seeded by ``seed`` (for calibration), else the first of the shards (for
    validation). ``only``: the numbers of the batches to give, in this order (None: all).
    """

    count: int | None
    batch: int
    seed: int = 0
    shuffle: bool = False
    only: Sequence[int] | None = None

    def of_rank(self, images: int, rank: int, world: int) -> FixedBatches:
        """Every ``world``-th of the batches of ``images`` images, from number ``rank`` on."""
        assert self.only is None, "batches are dealt out once"
        count = images if self.count is None else min(self.count, images)
        return replace(self, only=range(rank, -(-count // self.batch), world))


def permutation(index: ShardIndex, seed: int, epoch: int, block: int | None) -> np.ndarray:
    """A seeded permutation of the samples. ``block``: of the shards instead, and within every so many samples: reads
    then stay within a few shards at a time, for storage that is slow at random access."""
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    if block is None:
        return rng.permutation(len(index))
    ends = index.ends
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    order = np.concatenate([np.arange(*spans[shard]) for shard in rng.permutation(len(spans))])
    for first in range(0, len(order), block):
        rng.shuffle(order[first : first + block])
    return order
