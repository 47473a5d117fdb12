"""Weight-sharing supernet: many (path, input) items through one block in as few large batches as possible."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bossnas.heads import Projector
from bossnas.ops import Statistics
from bossnas.paths import Path
from bossnas.spaces import Space


class Item(NamedTuple):
    """One thing to compute: ``x`` [groups*N, C, H, W] through ``path``; each of its groups is normalised alone."""

    path: Path
    x: Tensor
    groups: int = 1


class Supernet(nn.Module):
    """Stem, blocks of candidate layers, and one projector per block. The online and the target network are each one.

    ``hidden`` and ``out``: units of the projectors' hidden layer and of the embedding.
    """

    def __init__(self, space: Space, hidden: int, out: int):
        super().__init__()
        self.stem = space.stem()
        self.blocks = nn.ModuleList(
            nn.ModuleList(space.layer(b, layer) for layer in range(space.layers(b))) for b in range(space.blocks))
        self.projectors = nn.ModuleList(
            Projector(space.adapter(b), space.neck_width(b), hidden, out) for b in range(space.blocks))

    def forward(self, block: int, items: Sequence[Item], stats: Statistics | None = None) -> list[Tensor]:
        """Features of every item at the block's end, in the items' order.

        Layer by layer, items that go through the same candidate and share an input shape make one batch, in which
        batch norms treat each item by itself; items with the same choices so far and the same input tensor are
        computed once. For block 0 inputs are images, for later blocks the features of the block before.
        ``stats`` records or supplies batch-norm statistics and takes one path at a time.
        """
        keys: list[Hashable] = [id(item.x) for item in items]
        nodes = {key: (item.x, item.groups) for key, item in zip(keys, items, strict=True)}
        if block == 0 and not isinstance(self.stem, nn.Identity):
            nodes = self._batched(nodes, {key: 0 for key in nodes}, lambda x, _, groups: self.stem(x, groups, stats))
        for depth, layer in enumerate(self.blocks[block]):
            parents = keys
            keys = [(key, item.path[depth]) for key, item in zip(keys, items, strict=True)]
            inputs = {key: nodes[parent] for key, parent in zip(keys, parents, strict=True)}
            choices = {key: item.path[depth] for key, item in zip(keys, items, strict=True)}
            nodes = self._batched(inputs, choices, lambda x, c, groups, m=layer: m(x, c, groups, stats))
        return [nodes[key][0] for key in keys]

    def embed(self, block: int, items: Sequence[Item], stats: Statistics | None = None) -> list[Tensor]:
        """Projections [groups*N, out] of every item."""
        features = self.forward(block, items, stats)
        projector = self.projectors[block]
        nodes = {i: (x, item.groups) for i, (x, item) in enumerate(zip(features, items, strict=True))}
        last = {i: item.path[-1] for i, item in enumerate(items)}
        out = self._batched(nodes, last, lambda x, c, groups: projector.pool(x, c, groups, stats))
        rows = self._batched(out, {i: 0 for i in out}, lambda x, _, groups: projector.mlp(x, groups, stats))
        return [rows[i][0] for i in range(len(items))]

    def part(self, block: int) -> nn.ModuleDict:
        """The modules that are trained with a block: its layers, its projector, and with block 0 the stem."""
        parts = {"block": self.blocks[block], "projector": self.projectors[block]}
        return nn.ModuleDict({"stem": self.stem, **parts} if block == 0 else parts)

    @torch.no_grad()
    def features(self, winners: Sequence[Path], x: Tensor) -> Tensor:
        """Input of block ``len(winners)``: images through the finished blocks, each along its winning path.

        These blocks must be in evaluation mode with calibrated statistics (`freeze`), so that the result does not
        depend on which images share a batch.
        """
        for block, path in enumerate(winners):
            x = self.forward(block, [Item(path, x)])[0]
        return x

    def freeze(self, block: int) -> None:
        """Ends a block's training: evaluation mode, no gradients."""
        self.part(block).eval().requires_grad_(False)

    @staticmethod
    def _batched(inputs: dict, choices: dict, call) -> dict:
        """Runs ``call(x, choice, groups)`` once per (choice, shape, group size); returns the outputs by key."""
        batches: dict[tuple, list] = {}
        for key, (x, groups) in inputs.items():
            batches.setdefault((choices[key], x.shape[1:], x.shape[0] // groups), []).append(key)
        outputs = {}
        for (choice, *_), keys in batches.items():
            xs, groups = zip(*(inputs[key] for key in keys), strict=True)
            y = call(xs[0] if len(xs) == 1 else torch.cat(xs), choice, sum(groups))
            for key, piece, g in zip(keys, y.split([x.shape[0] for x in xs]), groups, strict=True):
                outputs[key] = (piece, g)
        return outputs
