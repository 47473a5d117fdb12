"""NATS-Bench size space: five layers, each with one of eight widths (METHOD 1.3; Dong et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from bossnas.spaces.ops import GroupedBatchNorm, HalvePool, PooledPointwise, SlimConv, Statistics
from bossnas.spaces.paths import Choices, all_paths, fair_sample
from bossnas.spaces.space import Traits, Words

WIDTHS = tuple(range(8, 65, 8))  # by candidate id
KINDS = ("N", "R", "N", "R", "N")  # normal cell or residual down-sampling, by layer of the network
SPLITS = {"cifar10": (2, 2, 1), "cifar100": (2, 1, 2)}  # layers per block
NECK_WIDTH = 2048


class Nats:
    """The space; ``width`` multiplies all channels. All widths of a layer share slimmable weights."""

    blocks = 3
    view_pairs = 1
    stride = 4
    traits = Traits(
        options={"split": "cifar10"},
        variants=tuple({"split": split} for split in SPLITS),
        image_size=32,
        classes=10,
        recipe="cifar",
        as_searched={"skip_relu": True},  # the benchmark's skips to another width have no ReLU, the supernet's have
        channel_texts=True,
        norm_before_head=True,
    )

    def __init__(self, width: float = 1.0, split: str = "cifar10"):
        self.split = SPLITS[split]
        self.widths = tuple(max(1, round(w * width)) for w in WIDTHS)
        self._neck_width = max(8, round(NECK_WIDTH * width))

    def layers(self, block: int) -> int:
        return self.split[block]

    def candidates(self, block: int) -> list[str]:
        return [f"width{w}" for w in self.widths]

    def words(self, block: int, layer: int, choice: int) -> Words:
        text = f"{self.widths[choice]} channels"
        return Words(text, text)

    def stem(self) -> nn.Module:
        return nn.Identity()  # the stem has the first layer's width, so it belongs to that layer

    def layer(self, block: int, layer: int) -> nn.Module:
        position = sum(self.split[:block]) + layer
        cell = _Residual(self.widths) if KINDS[position] == "R" else _Normal(self.widths)
        return _WithStem(cell, self.widths) if position == 0 else cell

    def adapter(self, block: int) -> nn.Module:
        return _NeckAdapter(self.widths, self._neck_width)

    def neck_width(self, block: int) -> int:
        return self._neck_width

    def paths(self, block: int, winners: list[Choices]) -> list[Choices]:
        return all_paths([len(self.widths)] * self.layers(block))

    def sample(self, block: int, winners: list[Choices], rng: np.random.Generator) -> list[Choices]:
        return fair_sample(len(self.widths), self.layers(block), rng)

    def describe(self, architecture: list[Choices]) -> dict:
        return {"widths": [[self.widths[c] for c in path] for path in architecture]}

    def network(self, architecture: Sequence[Choices]) -> tuple[str, dict]:
        return "bossnas_nats", {"widths": [self.widths[choice] for path in architecture for choice in path]}


class _Op(nn.Module):
    """ReLU, slimmable convolution, batch norm of the output width (one norm per width)."""

    def __init__(
        self, widths: tuple[int, ...], kernel: int, stride: int = 1, c_in: int | None = None, relu: bool = True
    ):
        super().__init__()
        self.conv = SlimConv(c_in or max(widths), max(widths), kernel, stride)
        self.norms = nn.ModuleList(GroupedBatchNorm(w) for w in widths)
        self.widths, self.relu = widths, relu

    def forward(
        self, x: Tensor, choice: int, groups: int = 1, stats: Statistics | None = None, residual: Tensor | None = None
    ) -> Tensor:
        x = self.conv(F.relu(x) if self.relu else x, self.widths[choice])
        return self.norms[choice](x, groups, stats, residual)


class _Normal(nn.Module):
    """Nodes n1 = f(n0), n2 = f(n0) + f(n1), n3 = skip(n0) + f(n1) + f(n2), each f a 3x3 op of its own."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.ops = nn.ModuleDict({name: _Op(widths, 3) for name in ("01", "02", "12", "13", "23")})
        self.skip = _Op(widths, 1)
        self.widths = widths

    def forward(self, x: Tensor, choice: int, groups: int = 1, stats: Statistics | None = None) -> Tensor:
        def op(edge: str, node: Tensor, plus: Tensor | None = None) -> Tensor:
            return self.ops[edge](node, choice, groups, stats, plus)

        n1 = op("01", x)
        n2 = op("12", n1, plus=op("02", x))
        skip = x if x.shape[1] == self.widths[choice] else self.skip(x, choice, groups, stats)
        return op("23", n2, plus=op("13", n1, plus=skip))


class _Residual(nn.Module):
    """Two 3x3 ops, the first with stride 2, plus the pooled input through a 1x1 convolution without norm."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.first, self.second = _Op(widths, 3, 2), _Op(widths, 3)
        self.pool = HalvePool()
        self.shortcut = SlimConv(max(widths), max(widths), 1)
        self.widths = widths

    def forward(self, x: Tensor, choice: int, groups: int = 1, stats: Statistics | None = None) -> Tensor:
        shortcut = self.shortcut(self.pool(x), self.widths[choice])
        return self.second(self.first(x, choice, groups, stats), choice, groups, stats, shortcut)


class _WithStem(nn.Module):
    """The first layer: a 3x3 stem to the layer's own width, batch norm, then the cell."""

    def __init__(self, cell: nn.Module, widths: tuple[int, ...]):
        super().__init__()
        self.stem = _Op(widths, 3, c_in=3, relu=False)
        self.cell = cell

    def forward(self, x: Tensor, choice: int, groups: int = 1, stats: Statistics | None = None) -> Tensor:
        return self.cell(self.stem(x, choice, groups, stats), choice, groups, stats)


class _NeckAdapter(nn.Module):
    """Per output width: 1x1 convolution to the neck's width, batch norm, global average pool (METHOD 2)."""

    def __init__(self, widths: tuple[int, ...], neck_width: int):
        super().__init__()
        self.fixes = nn.ModuleList(PooledPointwise(w, neck_width) for w in widths)

    def forward(self, x: Tensor, choice: int, groups: int = 1, stats: Statistics | None = None) -> Tensor:
        return self.fixes[choice](x, groups, stats)
