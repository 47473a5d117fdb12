"""Units of a rating: which paths are computed together, and the memory that this takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bossnas.spaces.paths import Choices


class Unit(NamedTuple):
    """Paths that are computed together, as positions in the block's list; all of them begin with ``prefix``."""

    prefix: Choices
    rows: tuple[int, ...]


def units(paths: Sequence[Choices], most: int) -> list[Unit]:
    """Cuts the trie of ``paths`` into units of at most ``most`` paths: runs of neighbouring subtrees."""
    result: list[Unit] = []

    def cut(prefix: Choices, rows: list[int]) -> None:
        if len(rows) <= most:
            result.append(Unit(prefix, tuple(rows)))
            return
        below: dict[int, list[int]] = {}
        for row in rows:
            below.setdefault(paths[row][len(prefix)], []).append(row)
        run: list[int] = []
        for choice, subtree in below.items():
            # the run is closed before a larger subtree is cut: units stay in the trie's order (`rate_block._features`)
            if run and len(run) + len(subtree) > most:
                result.append(Unit(prefix, tuple(run)))
                run = []
            if len(subtree) > most:
                cut((*prefix, choice), subtree)
            else:
                run += subtree
        if run:
            result.append(Unit(prefix, tuple(run)))

    cut((), list(range(len(paths))))
    return result
