"""The rows of a table that no other row dominates, in any number of columns (Kung, Luccio & Preparata 1975)."""

from __future__ import annotations

from typing import cast

import numpy as np

PAIRWISE = 64  # so few rows are compared each with each


def nondominated(rows: np.ndarray) -> np.ndarray:
    """Indices of the rows of ``rows`` [n, d] that no other row equals or undercuts in every column.

    Smaller is better. Of equal rows the first one stays. The indices come in the lexicographic order of their rows.
    """
    order = np.lexsort(rows.T[::-1])
    return order[_keep(rows[order])]


def _keep(rows: np.ndarray) -> np.ndarray:
    """Mask of the non-dominated of rows in lexicographic order, where only an earlier row can dominate a later one."""
    n = len(rows)
    if n <= PAIRWISE:
        return cast("np.ndarray", ~np.triu((rows[:, None] <= rows).all(2), 1).any(0))
    low, high = rows[: n // 2], rows[n // 2 :]
    keep_low = _keep(low)
    keep = np.zeros(n, bool)
    keep[: n // 2] = keep_low
    open_rows = np.flatnonzero(~dominated(high[:, 1:], low[keep_low][:, 1:]))  # column 0 is already in order
    keep[n // 2 + open_rows[_keep(high[open_rows])]] = True
    return keep


def dominated(rows: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Mask of the rows [n, d] that some row of ``by`` [m, d] equals or undercuts in every column."""
    if not len(rows) or not len(by):
        return np.zeros(len(rows), bool)
    if rows.shape[1] == 0:
        return np.ones(len(rows), bool)
    if rows.shape[1] == 1:
        return rows[:, 0] >= by[:, 0].min()
    if rows.shape[1] == 2:
        by = by[np.argsort(by[:, 0])]
        least = np.minimum.accumulate(by[:, 1])  # least second value up to each first value
        at = np.searchsorted(by[:, 0], rows[:, 0], side="right") - 1
        return (at >= 0) & (least[at] <= rows[:, 1])
    if len(rows) * len(by) <= PAIRWISE**2:
        return cast("np.ndarray", (by[:, None] <= rows).all(2).any(0))
    middle = np.partition(by[:, 0], (len(by) - 1) // 2)[(len(by) - 1) // 2]
    under, reached = by[:, 0] <= middle, rows[:, 0] >= middle
    result = np.zeros(len(rows), bool)
    result[reached] = dominated(rows[reached][:, 1:], by[under][:, 1:])
    below = by[:, 0] < middle
    result[~reached] = dominated(rows[~reached], by[below])
    rest = np.flatnonzero(reached & ~result)
    result[rest] = dominated(rows[rest], by[~under])
    return result
