"""All architectures that can be put together from the rated paths of a space's blocks.

An architecture is a walk through the blocks: what a block can begin from (`CostTable.starts`: its input's shape and the
paths allowed there) follows from the path before it. Scores and costs are integers that add up along the walk, so sums
are exact, in whatever order they are made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bossnas.errors import ConfigError
from bossnas.runs.ratings import BlockRating
from bossnas.spaces.cost import COSTS, Cost, CostTable, Start
from bossnas.spaces.paths import Choices, decode, encode

# int64 has 13 bits more: a sum over blocks does not overflow, and the order of adding does not show
SCORE_BITS = 50  # scores are added as multiples of 2**-50 of the power of two above the largest
NO_LIMIT = 2**62


@dataclass(frozen=True)
class Selected:
    """An architecture with its score, the sum over the blocks, and its cost."""

    architecture: list[Choices]
    score: float
    cost: Cost


@dataclass(frozen=True)
class Options:
    """The rated paths of a block from one of its starts, in lexicographic order."""

    paths: list[Choices]
    scores: np.ndarray  # int64 [n], lower is better
    costs: np.ndarray  # int64 [n, 3], in the order of COSTS
    following: np.ndarray  # int [n]: which start of the next block each path leads to


class Graph:
    """All architectures that can be put together from rated paths, with the integers that select them."""

    def __init__(self, table: CostTable, ratings: Sequence[BlockRating]):
        """Raises ConfigError when the ratings do not fit the space: too few blocks, or paths that it does not have."""
        blocks = table.space.blocks
        if len(ratings) != blocks:
            raise ConfigError("run", f"has ratings of {len(ratings)} of {blocks} blocks", "finish its search first")
        self.table, self.sign = table, 1 if ratings[0].better == "lower" else -1
        largest = max(abs(value) for rating in ratings for value in rating.scores.values())
        self.exponent = SCORE_BITS - math.frexp(largest)[1]
        self.blocks = [self._options(block, ratings[block]) for block in range(blocks)]

    def _options(self, block: int, rating: BlockRating) -> list[Options]:
        """A rating holds where the same paths may follow as after the prefix it was made on; without one everywhere."""
        space, starts = self.table.space, self.table.starts[block]
        prefix = [decode(text) for text in rating.prefix]
        if any(path not in space.paths(b, prefix[:b]) for b, path in enumerate(prefix)):
            raise ConfigError(
                "run",
                f"block {block} was rated on {'|'.join(rating.prefix)}, which the space does not have",
                "use the config that the ratings were made with",
            )
        held = [s for s in starts if not prefix or s.paths == tuple(space.paths(block, prefix))]
        values = {decode(text): self.sign * value for text, value in rating.scores.items()}
        unknown = set(values).difference(*(start.paths for start in held))
        if unknown:
            raise ConfigError(
                "run",
                f"block {block} has ratings of paths such as {encode(min(unknown))}, which the "
                "space does not have there",
                "use the config that the ratings were made with",
            )
        return [self._from(block, start, values if start in held else {}) for start in starts]

    def _from(self, block: int, start: Start, values: dict[Choices, float]) -> Options:
        paths = sorted(path for path in start.paths if path in values)
        costs = [self.table.path(block, path, start.shape)[0] for path in paths]
        following = self._following(block, start, paths)
        scores = np.rint(np.ldexp(np.array([values[path] for path in paths], np.float64), self.exponent))
        return Options(
            paths,
            scores.astype(np.int64),
            np.array([[getattr(cost, name) for name in COSTS] for cost in costs], np.int64).reshape(-1, len(COSTS)),
            following,
        )

    def _following(self, block: int, start: Start, paths: list[Choices]) -> np.ndarray:
        if block + 1 == len(self.table.starts):
            return np.zeros(len(paths), np.int64)
        index = {start: i for i, start in enumerate(self.table.starts[block + 1])}
        return np.array([index[self.table.after(block, start, path)] for path in paths], np.int64)

    def score(self, value: int) -> float:
        """The sum of scores that the integer ``value`` stands for."""
        return math.ldexp(self.sign * int(value), -self.exponent)

    def selected(self, architecture: list[Choices], value: int) -> Selected:
        space = self.table.space
        if any(path not in space.paths(block, architecture[:block]) for block, path in enumerate(architecture)):
            raise ConfigError(
                "space.name", "the paths that may follow depend on more than the last winner", "see docs/own_space.md"
            )
        return Selected(architecture, self.score(value), self.table.cost(architecture))

    @cached_property
    def least(self) -> list[np.ndarray]:
        """Per block, [starts, 3]: the least of each cost, taken alone, with which a walk reaches each start; at the end
        [1, 3]: the least of each cost of a whole network."""
        reached = [np.zeros((1, len(COSTS)), np.int64)]
        for block, starts in enumerate(self.blocks):
            last = block + 1 == len(self.blocks)
            after = np.full((1 if last else len(self.blocks[block + 1]), len(COSTS)), NO_LIMIT, np.int64)
            for start, options in enumerate(starts):
                if reached[block][start].max() < NO_LIMIT:
                    np.minimum.at(after, options.following, options.costs + reached[block][start])
            reached.append(after)
        return reached

    def size(self) -> int:
        """Number of architectures that can be put together from rated paths."""
        counts = [1]
        for starts in reversed(self.blocks):
            counts = [sum(counts[following] for following in options.following) for options in starts]
        return counts[0]


def size(table: CostTable) -> int:
    """Number of architectures of the space."""
    counts: dict[Start, int] = {}
    for block in reversed(range(len(table.starts))):
        last = block + 1 == len(table.starts)
        counts = {
            start: len(start.paths) if last else sum(counts[table.after(block, start, p)] for p in start.paths)
            for start in table.starts[block]
        }
    return counts[next(iter(table.starts[0]))]


def greedy(graph: Graph) -> Selected | None:
    """The best path of each block, one block after the other, as the search keeps its winners.

    None where a choice ends at a start from which no path has been rated.
    """
    architecture, total, start = [], 0, 0
    for starts in graph.blocks:
        options = starts[start]
        if not options.paths:
            return None
        best = int(options.scores.argmin())
        architecture.append(options.paths[best])
        total, start = total + int(options.scores[best]), int(options.following[best])
    return graph.selected(architecture, total)
