"""Projector (the neck: adapter, pool, two-layer MLP) and predictor (METHOD 2)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from bossnas.spaces.ops import Chain, GroupedBatchNorm, Linear, Statistics


def mlp(width: int, hidden: int, out: int, std: float | None) -> Chain:
    """Linear, batch norm, ReLU, Linear; weights normal with ``std`` (None: sqrt(2 / fan_in)), biases 0."""
    first, second = Linear(width, hidden), Linear(hidden, out)
    layers = Chain(first, GroupedBatchNorm(hidden, act="relu"), second)
    for layer in (first, second):
        nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features) if std is None else std)
        nn.init.zeros_(layer.bias)
    return layers


class Projector(nn.Module):
    """Block outputs to embeddings: `pool` for each kind of output, then ``mlp`` for all of them in one batch.

    ``adapter(x, choice, groups, stats)`` brings each kind of block output to ``width`` channels (a map or pooled).
    """

    def __init__(self, adapter: nn.Module, width: int, hidden: int, out: int):
        super().__init__()
        self.adapter = adapter
        self.mlp = mlp(width, hidden, out, std=None)

    def pool(self, x: Tensor, choice: int, groups: int = 1, stats: Statistics | None = None) -> Tensor:
        """Output [groups*N, C, H, W] of candidate ``choice`` -> [groups*N, width]."""
        x = self.adapter(x, choice, groups, stats)
        return x.mean((2, 3)) if x.dim() == 4 else x


def predictor(hidden: int, out: int) -> Chain:
    """Online network only: embedding [groups*N, out] -> predicted target embedding [groups*N, out]."""
    return mlp(out, hidden, out, std=0.01)
