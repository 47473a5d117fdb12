"""Weight-sharing supernet: many (path, input) items through one block in as few large batches as possible."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bossnas.spaces import Space
from bossnas.spaces.ops import Chain, Frozen, Statistics
from bossnas.spaces.paths import Choices
from bossnas.supernet.heads import Projector


class Item(NamedTuple):
    """One thing to compute: ``x`` [groups*N, C, H, W] through ``path``; each of its groups is normalised alone."""

    path: Choices
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
            nn.ModuleList(space.layer(b, layer) for layer in range(space.layers(b))) for b in range(space.blocks)
        )
        self.projectors = nn.ModuleList(
            Projector(space.adapter(b), space.neck_width(b), hidden, out) for b in range(space.blocks)
        )

    def forward(
        self,
        block: int,
        items: Sequence[Item],
        stats: Statistics | None = None,
        start: int | None = None,
        stop: int | None = None,
        recompute: bool = False,
    ) -> list[Tensor]:
        """Features of every item at the block's end, in the items' order.

        Layer by layer, items that go through the same candidate and share an input shape make one batch, in which
        batch norms treat each item by itself; items with the same choices so far and the same input tensor are
        computed once. For block 0 inputs are images, for later blocks the features of the block before.

        ``start``: the inputs are past the stem and that many layers already; ``stop``: go no further than that many.
        ``stats`` records batch-norm statistics, or supplies those recorded for the same items in the same order.
        ``recompute``: a backward pass computes a candidate's inner maps again instead of keeping them.
        """
        # the same tensor object is the same input; comparing values would wait for the device. `items` keeps all
        # tensors alive, so no id comes twice
        keys: list[Hashable] = [id(item.x) for item in items]
        nodes = {key: (item.x, item.groups) for key, item in zip(keys, items, strict=True)}
        if start is None and self._has_stem(block):
            nodes = self._batched(
                nodes, {key: 0 for key in nodes}, lambda x, _, *rest: self.stem(x, *rest), stats, "stem"
            )
        layers = list(cast("nn.ModuleList", self.blocks[block]))
        for depth in range(start or 0, len(layers) if stop is None else stop):
            parents = keys
            # a node is its parent and its choice: behind other choices the same candidate sees another map
            keys = [(key, item.path[depth]) for key, item in zip(keys, items, strict=True)]
            inputs = {key: nodes[parent] for key, parent in zip(keys, parents, strict=True)}
            choices = {key: item.path[depth] for key, item in zip(keys, items, strict=True)}
            layer = layers[depth]
            nodes = self._batched(inputs, choices, partial(recomputed, layer) if recompute else layer, stats, depth)
        return [nodes[key][0] for key in keys]

    def enter(self, block: int, x: Tensor, stats: Statistics | None = None) -> Tensor:
        """The first layer's input: in block 0 images pass the stem, which `forward` with ``start=0`` leaves out."""
        return self.stem(x, 1, stats) if self._has_stem(block) else x

    def embed(
        self, block: int, items: Sequence[Item], stats: Statistics | None = None, recompute: bool = False
    ) -> list[Tensor]:
        """Projections [groups*N, out] of every item."""
        return self.project(block, items, self.forward(block, items, stats, recompute=recompute), stats)

    def project(
        self,
        block: int,
        items: Sequence[Item],
        features: Sequence[Tensor],
        stats: Statistics | None = None,
        last: bool = True,
    ) -> list[Tensor]:
        """Projections [groups*N, out] of every item from its features at the block's end.

        Without the ``last`` linear layer, behind which there are no statistics: the hidden units [groups*N, hidden].
        """
        projector = self.projector(block)
        nodes = {i: (x, item.groups) for i, (x, item) in enumerate(zip(features, items, strict=True))}
        ends = {i: item.path[-1] for i, item in enumerate(items)}
        out = self._batched(nodes, ends, projector.pool, stats, "pool")
        mlp = projector.mlp if last else projector.mlp[:-1]
        rows = self._batched(out, {i: 0 for i in out}, lambda x, _, *rest: mlp(x, *rest), stats, "mlp")
        return [rows[i][0] for i in range(len(items))]

    def projector(self, block: int) -> Projector:
        return cast("Projector", self.projectors[block])

    def part(self, block: int) -> nn.ModuleDict:
        """The modules that are trained with a block: its layers, its projector, and with block 0 the stem."""
        parts = {"block": self.blocks[block], "projector": self.projectors[block]}
        return nn.ModuleDict({"stem": self.stem, **parts} if block == 0 else parts)

    def replaced(self, block: int, part: nn.ModuleDict) -> Supernet:
        """The same network, sharing all modules but those of the block, which come from ``part`` (see `part`)."""
        other = copy.copy(self)
        # copy.copy shares the table of submodules: without a table of its own the assignments below would change `self`
        other._modules = dict(self._modules)
        other.blocks = nn.ModuleList(part["block"] if b == block else layers for b, layers in enumerate(self.blocks))
        other.projectors = nn.ModuleList(
            part["projector"] if b == block else projector for b, projector in enumerate(self.projectors)
        )
        if block == 0:
            other.stem = part["stem"]
        return other

    @torch.no_grad()
    def features(self, winners: Sequence[Choices], x: Tensor, stats: Statistics | None = None) -> Tensor:
        """Input of block ``len(winners)``: images through the finished blocks, each along its winning path.

        These blocks must be in evaluation mode with calibrated statistics (`freeze`), so that the result does not
        depend on which images share a batch.
        """
        for block, path in enumerate(winners):
            x = self.forward(block, [Item(path, x)], stats)[0]
        return x

    def features_of_views(self, winners: Sequence[Choices], views: list[Tensor], most: int) -> list[Tensor]:
        """`features` of every view [n, 3, S, S], made of ``most`` images at a time, whichever views they are from, by
        weights that hold the norms behind them (`Frozen`)."""
        if not winners:
            return views
        images = torch.cat(views).split(most)
        return list(
            torch.cat([self.features(winners, piece, Frozen()) for piece in images]).split([len(x) for x in views])
        )

    def freeze(self, block: int) -> None:
        """Ends a block's training: evaluation mode, no gradients."""
        # evaluation mode: norms read their buffers (in the target the winner's calibrated statistics), so the features
        # of an image do not depend on the images beside it (METHOD 3.3: the prefix is frozen)
        self.part(block).eval().requires_grad_(False)

    def _has_stem(self, block: int) -> bool:
        return block == 0 and not isinstance(self.stem, nn.Identity)

    @staticmethod
    def _batched(inputs: dict, choices: dict, call, stats: Statistics | None, place: Hashable) -> dict:
        """Runs ``call(x, choice, groups, stats)`` once per (choice, shape, group size); returns the outputs by key."""
        batches: dict[tuple, list] = {}
        for key, (x, groups) in inputs.items():
            # batch norm cuts a batch into equal groups, so maps that share it have one shape and one group size: then
            # each item has the statistics that it would have alone
            batches.setdefault((choices[key], x.shape[1:], x.shape[0] // groups), []).append(key)
        outputs = {}
        for (choice, shape, _), keys in batches.items():
            xs, groups = zip(*(inputs[key] for key in keys), strict=True)
            # the choice is in the place, since candidates may share modules (METHOD 1.2: a shortcut); the group size
            # is not, since calibration and evaluation batches differ in it
            own = None if stats is None else stats.at((place, choice, *shape))
            y = call(xs[0] if len(xs) == 1 else torch.cat(xs), choice, sum(groups), own)
            for key, piece, g in zip(keys, y.split([x.shape[0] for x in xs]), groups, strict=True):
                outputs[key] = (piece, g)
        return outputs


class Networks(NamedTuple):
    """What the training and the rating of a block work on: both networks, and the block's predictor."""

    online: Supernet
    target: Supernet
    predictor: Chain


def recomputed(function: Callable, *args: object) -> Tensor:
    """``function(*args)``, of which a backward pass computes the inner values again."""
    # not reentrant: that form gives no gradients where no input needs one, as behind a frozen prefix. The generator's
    # state is not kept, since no layer draws numbers; one with dropout would need it
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
