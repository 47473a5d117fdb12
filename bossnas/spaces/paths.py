"""Paths: one candidate per layer of a block; how they are listed, drawn and written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

Choices = tuple[int, ...]  # one candidate id per layer of a block: a path of the search space
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
MAX_CANDIDATES = len(_DIGITS)


def encode(path: Choices) -> str:
    """(5, 4, 3, 3) -> "5433"; candidates above 9 are letters. At most 36 candidates a layer."""
    return "".join(_DIGITS[choice] for choice in path)


def decode(text: str) -> Choices:
    """The inverse of `encode`. Raises ValueError on any other character."""
    return tuple(int(character, 36) for character in text)


def all_paths(candidates: Sequence[int]) -> list[Choices]:
    """Every combination of ``candidates[l]`` choices per layer l, in lexicographic order."""
    return list(itertools.product(*(range(n) for n in candidates)))


def fair_sample(candidates: int, layers: int, rng: np.random.Generator) -> list[Choices]:
    """As many paths as candidates, each candidate of each layer used exactly once (METHOD: fair sampling).

    Each layer has an independent random permutation; path j takes the j-th entry of every layer.
    """
    return list(zip(*(rng.permutation(candidates).tolist() for _ in range(layers)), strict=True))


def uniform_sample(paths: Sequence[Choices], count: int, rng: np.random.Generator) -> list[Choices]:
    """``count`` distinct paths, uniformly without replacement."""
    return [paths[i] for i in rng.choice(len(paths), size=min(count, len(paths)), replace=False)]
