"""HyTra: hybrid CNN-transformer space with searchable down-sampling positions (METHOD 1.1; BossNAS, section 4).

Four blocks of four layers. A candidate id names its output scale, so a path says where the network goes down.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from torch import Tensor, nn

from bossnas.spaces.ops import Attention, Chain, GroupedBatchNorm, Statistics, conv, conv_norm
from bossnas.spaces.paths import Choices, all_paths, uniform_sample
from bossnas.spaces.space import Traits, Words

KINDS = ("ATT", "CONV", "ATT", "CONV", "CONV", "CONV")  # by candidate id
SCALES = (0, 0, 1, 1, 2, 3)  # by candidate id; scale s has stride 4 * 2**(3 - s)
DEPTHS = (4, 3, 2, 2)  # block k owns the candidates of scales below DEPTHS[k]
LAYERS = 4
PATHS_PER_STEP = 4


@cache
def path_set(depth: int, restricted: bool = True) -> tuple[Choices, ...]:
    """All paths of a block that starts at scale ``depth - 1``: no layer goes down more than one scale.

    Unrestricted, the first layer may start at any scale up to ``depth - 1``. Sizes: 51 / 131 (unrestricted) at depth
    4, 99 / 115 at 3, 80 at 2, 16 at 1.
    """
    start = depth - 1
    result = []
    for path in all_paths([sum(s < depth for s in SCALES)] * LAYERS):
        steps = [start, *(SCALES[c] for c in path)]
        drops = [a - b for a, b in zip(steps, steps[1:], strict=False)]
        first = 0 <= drops[0] <= (1 if restricted else start)
        if first and all(d in (0, 1) for d in drops[1:]):
            result.append(path)
    return tuple(result)


def count_runnable() -> int:
    """Architectures of the restricted space that run: 1,615,872 (no block may end at a scale the next one lacks)."""
    ends = {3: 1}
    for block in range(len(DEPTHS)):
        counts: dict[int, int] = {}
        for scale, ways in ends.items():
            for path in path_set(scale + 1):
                if _leads_on(block, path):
                    counts[SCALES[path[-1]]] = counts.get(SCALES[path[-1]], 0) + ways
        ends = counts
    return sum(ends.values())


def retraining_encoding(architecture: list[Choices]) -> list[list[int]]:
    """Layers grouped by stage (scale 3 first), 0 for attention and 1 for convolution (METHOD 4, hand-over)."""
    stages: list[list[int]] = [[], [], [], []]
    for path in architecture:
        for choice in path:
            stages[3 - SCALES[choice]].append(int(KINDS[choice] == "CONV"))
    return stages


def _leads_on(block: int, path: Choices) -> bool:
    """Whether the next block owns the scale at which the path ends (5555 and 4444 are dead ends)."""
    return block + 1 == len(DEPTHS) or SCALES[path[-1]] < DEPTHS[block + 1]


class HyTra:
    """The space; ``width`` multiplies all channels. ``restricted=False`` frees the first scale of block 0 (later
    blocks have no entry over two scales, so there the rule always holds)."""

    blocks = len(DEPTHS)
    view_pairs = 4
    stride = 32
    traits = Traits(options={"restricted": True}, image_size=224)

    def __init__(self, width: float = 1.0, restricted: bool = True):
        self.restricted = restricted
        self.stem_width = max(4, round(64 * width))

    def inner(self, scale: int) -> int:
        """Inner channels h_s; the output of a candidate has 4 h_s."""
        return self.stem_width * 2 ** (3 - scale)

    def layers(self, block: int) -> int:
        return LAYERS

    def candidates(self, block: int) -> list[str]:
        return [f"{k}@s{s}" for k, s in zip(KINDS, SCALES, strict=True) if s < DEPTHS[block]]

    def words(self, block: int, layer: int, choice: int) -> Words:
        kind = {"ATT": "attention", "CONV": "convolution"}[KINDS[choice]]
        scale = f"1/{4 * 2 ** (3 - SCALES[choice])}"
        return Words(f"{kind} at {scale}", scale, kind)

    def stem(self) -> nn.Module:
        return Chain(conv(3, self.stem_width, 7, 2), GroupedBatchNorm(self.stem_width, "relu"), nn.MaxPool2d(3, 2, 1))

    def layer(self, block: int, layer: int) -> nn.Module:
        return _Layer(self, block, first=block == 0 and layer == 0)

    def adapter(self, block: int) -> nn.Module:
        return _NeckAdapter(self, block)

    def neck_width(self, block: int) -> int:
        return 4 * self.inner(0)

    def paths(self, block: int, winners: list[Choices]) -> list[Choices]:
        depth = DEPTHS[0] if block == 0 else SCALES[winners[block - 1][-1]] + 1
        return [p for p in path_set(depth, self.restricted or block > 0) if _leads_on(block, p)]

    def sample(self, block: int, winners: list[Choices], rng: np.random.Generator) -> list[Choices]:
        return uniform_sample(self.paths(block, winners), PATHS_PER_STEP, rng)

    def describe(self, architecture: list[Choices]) -> dict:
        return {
            "scales": [[SCALES[c] for c in path] for path in architecture],
            "retraining_encoding": retraining_encoding(architecture),
        }

    def network(self, architecture: Sequence[Choices]) -> tuple[str, dict]:
        return "bossnet", {"encoding": retraining_encoding(list(architecture)), "width": self.stem_width}


class _Layer(nn.Module):
    """All candidates of one layer, private weights. The very first layer adapts the stem's output to each scale."""

    def __init__(self, space: HyTra, block: int, first: bool):
        super().__init__()
        scales = [s for s in SCALES if s < DEPTHS[block]]
        self.stem_adapters = nn.ModuleList()
        if first:
            c = space.stem_width
            for s in range(DEPTHS[block]):
                self.stem_adapters.append(
                    Chain(conv(c, c, 2 ** (3 - s), 2 ** (3 - s), depthwise=True), conv_norm(c, space.inner(s)))
                )
        self.candidates = nn.ModuleList(
            _Candidate(
                KINDS[i],
                space.inner(s),
                c_same=space.inner(s) if first else None,
                down=not first and s + 1 < DEPTHS[block],
            )
            for i, s in enumerate(scales)
        )

    def forward(self, x: Tensor, choice: int, groups: int = 1, stats: Statistics | None = None) -> Tensor:
        if self.stem_adapters:
            x = self.stem_adapters[SCALES[choice]](x, groups, stats)
        return self.candidates[choice](x, groups, stats)


class _Candidate(nn.Module):
    """ATT or CONV bottleneck at one scale with a same-scale and (where it can be reached) a down-scale entry."""

    def __init__(self, kind: str, inner: int, c_same: int | None, down: bool):
        super().__init__()
        outer = 4 * inner
        c_same = c_same or outer
        self.same = _entry(c_same, inner, stride=1)
        self.same_shortcut = nn.Identity() if c_same == outer else conv_norm(c_same, outer, act="relu")
        if down:
            self.down = _entry(outer // 2, inner, stride=2)
            self.down_shortcut = conv_norm(outer // 2, outer, 3, 2, act="relu")
        mix = Attention(inner) if kind == "ATT" else conv(inner, inner, 3)
        self.body = Chain(
            mix, GroupedBatchNorm(inner, "relu"), conv(inner, outer), GroupedBatchNorm(outer, "relu", zero_init=True)
        )
        self.c_same = c_same

    def forward(self, x: Tensor, groups: int = 1, stats: Statistics | None = None) -> Tensor:
        same = x.shape[1] == self.c_same  # widths differ by scale, so they tell the scale at any image size
        entry, shortcut = (self.same, self.same_shortcut) if same else (self.down, self.down_shortcut)
        residual = shortcut(x, groups, stats) if isinstance(shortcut, Chain) else x
        return self.body(entry(x, groups, stats), groups, stats, residual)


def _entry(c_in: int, inner: int, stride: int) -> Chain:
    """1x1 convolution, PEG (depthwise 3x3 with bias, replaces its input), batch norm, ReLU of the body."""
    return Chain(
        conv(c_in, inner), conv(inner, inner, 3, stride, depthwise=True, bias=True), GroupedBatchNorm(inner, "relu")
    )


class _NeckAdapter(nn.Module):
    """Brings scale s > 0 to scale 0: depthwise patches of 2**s, 1x1 convolution to C_0, batch norm (METHOD 2)."""

    def __init__(self, space: HyTra, block: int):
        super().__init__()
        self.scales = nn.ModuleDict()
        for s in range(1, DEPTHS[block]):
            c = 4 * space.inner(s)
            self.scales[str(s)] = Chain(conv(c, c, 2**s, 2**s, depthwise=True), conv_norm(c, space.neck_width(block)))

    def forward(self, x: Tensor, choice: int, groups: int = 1, stats: Statistics | None = None) -> Tensor:
        scale = SCALES[choice]
        return self.scales[str(scale)](x, groups, stats) if scale else x
