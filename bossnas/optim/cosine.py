"""Learning rate of a block, and how fast its target network follows (METHOD 3.4, 3.5)."""

from __future__ import annotations

import math


def learning_rate(base: float, epoch: int, epochs: int, micro: int, warmup_micro: int) -> float:
    """Cosine over the epochs of a block, constant within one; linear warm-up from 1e-4 of it (METHOD 3.5).

    ``epoch`` of ``epochs`` and micro-iteration ``micro`` count from the block's start; the warm-up takes
    ``warmup_micro`` micro-iterations.
    """
    rate = base * (1 + math.cos(math.pi * epoch / epochs)) / 2
    if micro < warmup_micro:
        rate *= 1 - (1 - micro / warmup_micro) * (1 - 1e-4)
    return rate


def ema_momentum(micro: int, total_micro: int, base: float = 0.99) -> float:
    """Share of the target that stays, at micro-iteration ``micro`` of ``total_micro`` (METHOD 3.4)."""
    return 1 - (1 - base) * (math.cos(math.pi * micro / total_micro) + 1) / 2
