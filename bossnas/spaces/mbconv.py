"""MBConv: the ImageNet space of inverted residuals, five searched blocks (METHOD 1.2; DNA, BossNAS section 5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from bossnas.spaces.ops import Chain, GroupedBatchNorm, HalvePool, NoAdapter, SqueezeExcite, Statistics, conv, conv_norm
from bossnas.spaces.paths import Choices, all_paths, encode, fair_sample
from bossnas.spaces.space import Traits, Words

CANDIDATES = ((6, 3), (6, 5), (3, 3), (3, 5))  # (expansion, kernel) by candidate id
BLOCKS = ((24, 2, 2), (40, 2, 4), (80, 2, 4), (112, 1, 4), (192, 2, 4))  # (width, first stride, layers)


def count_architectures() -> int:
    """4**18 = 6.9e10."""
    return len(CANDIDATES) ** sum(layers for _, _, layers in BLOCKS)


class MBConv:
    """The space; ``width`` multiplies all channels, rounded to multiples of 8."""

    blocks = len(BLOCKS)
    view_pairs = 4
    stride = 32
    traits = Traits(image_size=224)

    def __init__(self, width: float = 1.0):
        self.width = width

    def channels(self, block: int) -> int:
        """Output channels of a block; -1 is the stem."""
        return _round8((16 if block < 0 else BLOCKS[block][0]) * self.width)

    def layers(self, block: int) -> int:
        return BLOCKS[block][2]

    def candidates(self, block: int) -> list[str]:
        return [f"expand{e}_k{k}" for e, k in CANDIDATES]

    def words(self, block: int, layer: int, choice: int) -> Words:
        expansion, kernel = CANDIDATES[choice]
        text = f"{kernel}x{kernel} expand {expansion}"
        return Words(text, text)

    def stem(self) -> nn.Module:
        c = _round8(32 * self.width)
        return Chain(
            conv_norm(3, c, 3, 2, "silu"),
            conv_norm(c, c, 3, 1, "silu", depthwise=True),
            SqueezeExcite(c, max(1, round(c / 4))),
            conv_norm(c, self.channels(-1)),
        )

    def layer(self, block: int, layer: int) -> nn.Module:
        c_in = self.channels(block - 1 if layer == 0 else block)
        return _Layer(c_in, self.channels(block), BLOCKS[block][1] if layer == 0 else 1)

    def adapter(self, block: int) -> nn.Module:
        return NoAdapter()

    def neck_width(self, block: int) -> int:
        return self.channels(block)

    def paths(self, block: int, winners: list[Choices]) -> list[Choices]:
        return all_paths([len(CANDIDATES)] * self.layers(block))

    def sample(self, block: int, winners: list[Choices], rng: np.random.Generator) -> list[Choices]:
        return fair_sample(len(CANDIDATES), self.layers(block), rng)

    def describe(self, architecture: list[Choices]) -> dict:
        return {
            "candidates": [[self.candidates(0)[c] for c in path] for path in architecture],
            "widths": [self.channels(block) for block in range(len(architecture))],
        }

    def network(self, architecture: Sequence[Choices]) -> tuple[str, dict]:
        return "bossnas_mbconv", {"paths": [encode(path) for path in architecture], "width": self.width}


class _Layer(nn.Module):
    """Four inverted residuals and the one shortcut that they share; no activation after the sum."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.candidates = nn.ModuleList(_inverted_residual(c_in, c_out, e, k, stride) for e, k in CANDIDATES)
        self.shortcut = Chain(
            *([HalvePool()] if stride == 2 else []), *([conv_norm(c_in, c_out)] if c_in != c_out else [])
        )

    def forward(self, x: Tensor, choice: int, groups: int = 1, stats: Statistics | None = None) -> Tensor:
        return self.candidates[choice](x, groups, stats, residual=self.shortcut(x, groups, stats))


def _inverted_residual(c_in: int, c_out: int, expand: int, kernel: int, stride: int) -> Chain:
    middle = _round8(expand * c_in)
    return Chain(
        conv_norm(c_in, middle, act="silu"),
        conv(middle, middle, kernel, stride, depthwise=True),
        GroupedBatchNorm(middle, "silu"),
        SqueezeExcite(middle, max(1, round(c_in / 4))),
        conv_norm(middle, c_out),
    )


def _round8(channels: float) -> int:
    return max(8, int(channels + 4) // 8 * 8)
