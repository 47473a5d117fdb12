"""A tiny search space for tests in which every layer keeps the scale or halves it, as in HyTra: what a block hands over
depends on its path, and so do the paths of the block after it. `Hop2` has two blocks instead of three."""

from torch import nn

from bossnas.spaces.ops import conv_norm
from bossnas.spaces.paths import all_paths, uniform_sample

CHANNELS = (4, 6, 8, 10)  # by the number of halvings so far
MOST = len(CHANNELS) - 1  # halvings of an architecture


class Layer(nn.Module):
    """Candidates 0 and 1 keep the scale, 2 halves it; each has weights of its own for every width that may come."""

    def __init__(self):
        super().__init__()
        self.keep = nn.ModuleList(
            nn.ModuleDict({str(c): conv_norm(c, c, kernel, act="relu") for c in CHANNELS}) for kernel in (1, 3)
        )
        self.halve = nn.ModuleDict(
            {str(a): conv_norm(a, b, 3, 2, act="relu") for a, b in zip(CHANNELS, CHANNELS[1:], strict=False)}
        )

    def forward(self, x, choice, groups=1, stats=None):
        c = str(x.shape[1])
        return self.halve[c](x, groups, stats) if choice == 2 else x + self.keep[choice][c](x, groups, stats)


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.widen = nn.ModuleDict({str(c): conv_norm(c, CHANNELS[-1]) for c in CHANNELS})

    def forward(self, x, choice, groups=1, stats=None):
        return self.widen[str(x.shape[1])](x, groups, stats)


class Hop:
    blocks, view_pairs, stride = 3, 2, 16

    def __init__(self, width=1.0):
        pass

    def layers(self, block):
        return 2

    def candidates(self, block):
        return ["keep1", "keep3", "halve"]

    def stem(self):
        return conv_norm(3, CHANNELS[0], 3, 2, act="relu")

    def layer(self, block, layer):
        return Layer()

    def adapter(self, block):
        return Adapter()

    def neck_width(self, block):
        return CHANNELS[-1]

    def paths(self, block, winners):
        left = MOST - sum(path.count(2) for path in winners)
        return [p for p in all_paths([3, 3]) if p.count(2) <= left]

    def sample(self, block, winners, rng):
        return uniform_sample(self.paths(block, winners), 3, rng)

    def describe(self, architecture):
        return {"halvings": [path.count(2) for path in architecture]}


class Hop2(Hop):
    blocks = 2
