"""From block ratings to architectures: the exact optimum of the summed score under limits of cost, and Pareto fronts.

Dynamic programming over what each block can begin from, see `bossnas.selection.graph`: the ways to complete a
network from there that no other dominates, in the score and every cost that is limited.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bossnas import spaces
from bossnas.config.shared import SpaceConfig
from bossnas.errors import ConfigError
from bossnas.runs.folder import read_config
from bossnas.runs.ratings import BlockRating, read_ratings
from bossnas.selection import combine, latency
from bossnas.selection.doubt import Doubt
from bossnas.selection.graph import NO_LIMIT, Graph, Options, Selected, greedy, size
from bossnas.selection.pareto import nondominated
from bossnas.selection.sizes import log_channels
from bossnas.spaces.cost import COSTS, CostTable
from bossnas.spaces.paths import Choices, decode, encode
from bossnas.spaces.words import summary

MERGED = 2_000_000  # rows of sums that are made at once
NAMES = {"macs": "macs", "params": "params", "latency_ns": "latency_ms"}  # of the costs, in results
FLAGS = {"macs": "--max-macs", "params": "--max-params", "latency_ns": "--max-latency-ms"}


def select(
    folders: Sequence[Path],
    *,
    score: str | None = None,
    how: str = "sum",
    size_weight: float = 0.0,
    limits: dict[str, int] | None = None,
    top: int = 5,
    front_cost: str | None = None,
    latencies: Path | None = None,
) -> dict[str, Any]:
    """Selects from the ratings of a finished run, or of several that differ in their seed; plain values, for JSON.

    ``how``: how the scores of blocks are put together, a name of HOW. ``size_weight``: how much the sum of the
    logarithms of the layers' channels counts beside the rating, 1: as much. ``limits``: the highest value allowed of
    each cost, by name of COSTS. ``front_cost``: a name of COSTS, adds the Pareto front against it. ``latencies``: a
    file of `bossnas cost --measure`. Raises ConfigError for what the user can mend, such as limits that no rated
    architecture meets.
    """
    folder = folders[0]
    limits, config = limits or {}, read_config(folder)
    if latencies is None and "latency_ns" in (*limits, front_cost):
        raise ConfigError("latencies", "is needed to select by latency", "name a table of bossnas cost --measure")
    runs = _read(folders, score)
    table = table_of(config.space)
    space = table.space
    ratings, doubt = _together(runs, how, table, size_weight)
    if latencies is not None:
        table = latency.attach(table, latencies, f"bossnas cost --config {folder}/config.json --measure --json FILE")
    graph = Graph(table, ratings)
    chosen = best(graph, limits, top)
    plain = greedy(graph)

    sign = 1 if ratings[0].better == "lower" else -1

    def row(selected: Selected) -> dict[str, Any]:
        paths = [encode(path) for path in selected.architecture]
        costs: dict[str, float] = {"macs": selected.cost.macs, "params": selected.cost.params}
        if table.has_latency:
            costs["latency_ms"] = selected.cost.latency_ms
        behind = sign * (selected.score - chosen[0].score) + 0.0  # below 0: of one that exceeds a limit
        pair = selected.architecture, chosen[0].architecture
        errors = doubt.over_images(*pair), doubt.over_seeds(*pair)
        return {
            "architecture": "|".join(paths),
            "paths": paths,
            "words": summary(space, selected.architecture),
            "score": selected.score,
            "behind": behind,
            "behind_error_images": errors[0],
            "behind_error_seeds": errors[1],
            "level_with_best": doubt.level(behind, chosen[0].score, errors),
            **costs,
            "exceeds": [FLAGS[name] for name in limits if getattr(selected.cost, name) > limits[name]],
            "describe": space.describe(selected.architecture),
        }

    result: dict[str, Any] = {
        "runs": [str(f) for f in folders],
        "space": config.space.model_dump(mode="json"),
        "score": ratings[0].score,
        "better": ratings[0].better,
        "combine": how,
        "size_weight": size_weight,
        "architectures": size(table),
        "rated": graph.size(),
        "limits": {NAMES[name]: value / 1e6 if name == "latency_ns" else value for name, value in limits.items()},
        "greedy": row(plain) if plain else None,
        "top": [row(selected) for selected in chosen],
    }
    if doubt.known:
        # on the front every cost has its best score: what lies behind it is no better, and dearer
        level = (row(selected) for selected in front(graph, limits, "macs"))
        result["cheapest_level"] = next((point for point in level if point["level_with_best"]), result["top"][0])
    if front_cost is not None:
        result["front"] = {
            "cost": NAMES[front_cost],
            "points": [row(selected) for selected in front(graph, limits, front_cost)],
        }
    return result


@functools.lru_cache(maxsize=4)
def table_of(config: SpaceConfig) -> CostTable:
    """The costs of a space; it takes seconds, so a process that asks again gets the same."""
    return CostTable.of(spaces.make(**config.model_dump()), config.image_size)


def graph_of(folders: Sequence[Path], score: str | None = None, how: str = "sum") -> Graph:
    """All architectures that the ratings of a run cover, or of several put together."""
    table = table_of(read_config(folders[0]).space)
    return Graph(table, _together(_read(folders, score), how, table, 0.0)[0])


def _read(folders: Sequence[Path], score: str | None) -> list[list[BlockRating]]:
    """The ratings of every run. Raises ConfigError where they cannot be summed."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("run", "the same run is named twice", "name each run once")
    runs = [read_ratings(folder, score) for folder in folders]
    first, space = runs[0], read_config(folders[0]).space
    for folder, ratings in zip(folders[1:], runs[1:], strict=True):
        if read_config(folder).space != space:
            raise ConfigError(
                "run",
                f"{folder} searched in another space than {folders[0]}",
                "name runs that differ in their seed alone",
            )
        if (ratings[0].score, ratings[0].better) != (first[0].score, first[0].better):
            raise ConfigError(
                "score",
                f"{folders[0]} was rated by {first[0].score}, {folder} by {ratings[0].score}",
                "name a score that all of them hold",
            )
        if len(ratings) != len(first):
            raise ConfigError(
                "run",
                f"{folder} has ratings of {len(ratings)} blocks, {folders[0]} of {len(first)}",
                "finish all searches first",
            )
        for one, other in zip(first, ratings, strict=True):
            if one.scores.keys() != other.scores.keys():
                raise ConfigError(
                    "run",
                    f"block {one.block} was rated with other paths in {folder} than in "
                    f"{folders[0]}, since the blocks before it ended elsewhere",
                    "name runs whose winners leave the same paths open, or select from each run by itself",
                )
    return runs


def _together(
    runs: list[list[BlockRating]], how: str, table: CostTable, size_weight: float
) -> tuple[list[BlockRating], Doubt]:
    """The runs' ratings as one, and with it the sum of log channels, as far as that counts; and how sure they are."""
    first, scores = runs[0], [[rating.scores for rating in ratings] for ratings in runs]
    blocks, scales = combine.together(scores, how), combine.scales(scores, how)
    if size_weight:
        Graph(table, first)  # refuses paths that the space does not have
        sign = 1 if first[0].better == "higher" else -1
        sizes = []
        for r in first:
            logs = log_channels(table, r.block, [decode(p) for p in r.prefix], map(decode, r.scores))
            sizes.append({encode(path): sign * value for path, value in logs.items()})
        if all(len(set(size.values())) == 1 for size in sizes):
            raise ConfigError(
                "size_weight",
                "all rated architectures have the same numbers of channels",
                "leave it out; a limit such as `params` keeps sizes apart",
            )
        both, weights = [blocks, sizes], [1, size_weight]
        again = combine.scales(both, "sum", weights)
        if scales is not None and again is not None:
            scales = [[scale * more for scale, more in zip(of_run, again[0], strict=True)] for of_run in scales]
        blocks = combine.together(both, "sum", weights)
    found = [replace(rating, scores=values, parts=None) for rating, values in zip(first, blocks, strict=True)]
    return found, Doubt(runs, scales)


@dataclass(frozen=True)
class Completions:
    """The non-dominated ways from one start of a block to the network's end, the best score first."""

    rows: np.ndarray  # int64 [n, 1 + columns]: the score and some costs, each summed to the end
    option: np.ndarray  # int32 [n]: the path taken in this block
    rest: np.ndarray  # int32 [n]: which of the completions from there


def best(graph: Graph, limits: dict[str, int], count: int) -> list[Selected]:
    """The ``count`` best architectures that meet all ``limits`` (highest value allowed, by name of COSTS), or fewer.

    Exact. Of equal scores the architecture whose text comes first wins. Raises ConfigError when none meets the limits.
    """
    _require(graph, limits)
    columns = [COSTS.index(name) for name in limits]
    limit = np.array(list(limits.values()), np.int64)
    rest = completions(graph, limits, columns, first=1)
    found: list[Selected] = []
    # Best first. The first value is the exact least score of all completions of a prefix; then the prefix breaks ties.
    queue: list[tuple[int, list[Choices], int, int, np.ndarray]] = [(0, [], 0, 0, limit)]
    while queue and len(found) < count:
        _, prefix, score, start, budget = heapq.heappop(queue)
        block = len(prefix)
        if block == len(graph.blocks):
            found.append(graph.selected(prefix, score))
            continue
        options = graph.blocks[block][start]
        for i, least_rest in _completed(options, rest[block + 1], budget, columns):
            so_far = score + int(options.scores[i])
            heapq.heappush(
                queue,
                (
                    so_far + least_rest,
                    [*prefix, options.paths[i]],
                    so_far,
                    int(options.following[i]),
                    budget - options.costs[i, columns],
                ),
            )
    if not found:
        raise _infeasible(graph, limits)
    return found


def _completed(
    options: Options, rest: list[Completions], budget: np.ndarray, columns: list[int]
) -> list[tuple[int, int]]:
    """(option, least score of its completions) of every option that can be completed within the budget."""
    result: list[tuple[int, int]] = []
    for start, completions_there in enumerate(rest):
        rows = completions_there.rows
        open_options = np.flatnonzero(options.following == start)
        left = budget - options.costs[open_options][:, columns]  # [options, limits]
        for begin in range(0, len(rows), 512):
            chunk = rows[begin : begin + 512]
            fits = (chunk[:, 1:] <= left[:, None]).all(2)  # [options, chunk]
            done = fits.any(1)
            # rows come by score, the best first: the first that fits is the best that fits
            result += zip(open_options[done].tolist(), chunk[fits[done].argmax(1), 0].tolist(), strict=True)
            open_options, left = open_options[~done], left[~done]
    return result


def front(graph: Graph, limits: dict[str, int], cost: str) -> list[Selected]:
    """Every point of the Pareto front of score against ``cost`` among the architectures that meet the limits.

    Exact: no architecture within the limits has both a score and a cost at least as good, unless both are equal; of
    such equals one is given. Cheapest first. Raises ConfigError when no architecture meets the limits.
    """
    _require(graph, limits)
    names = [cost, *(name for name in limits if name != cost)]
    rest = completions(graph, limits, [COSTS.index(name) for name in names], first=0)
    whole = rest[0][0].rows
    if not len(whole):
        raise _infeasible(graph, limits)
    points = nondominated(whole[:, :2])
    return [graph.selected(_walk(graph, rest, int(i)), int(whole[i, 0])) for i in points[np.argsort(whole[points, 1])]]


def _walk(graph: Graph, rest: list[list[Completions]], row: int) -> list[Choices]:
    architecture, start = [], 0
    for block, starts in enumerate(graph.blocks):
        here = rest[block][start]
        option, row = int(here.option[row]), int(here.rest[row])
        architecture.append(starts[start].paths[option])
        start = int(starts[start].following[option])
    return architecture


def completions(graph: Graph, limits: dict[str, int], columns: list[int], first: int) -> list[list[Completions]]:
    """For every start of block ``first`` and later, the completions that no other dominates in score and ``columns``.

    Those that cannot stay within the limits, however cheaply the start is reached, are left out. The last element is
    the network's end, with one row of zeros. Blocks before ``first`` have an empty list.
    """
    limit = np.array([limits.get(COSTS[column], NO_LIMIT) for column in columns], np.int64)
    end = Completions(np.zeros((1, 1 + len(columns)), np.int64), np.zeros(1, np.int32), np.zeros(1, np.int32))
    rest: list[list[Completions]] = [[] for _ in graph.blocks] + [[end]]
    for block in reversed(range(first, len(graph.blocks))):
        reached = graph.least[block]
        rest[block] = [
            _merge(options, rest[block + 1], limit - reached[start][columns], columns)
            for start, options in enumerate(graph.blocks[block])
        ]
    return rest


def _merge(options: Options, rest: list[Completions], budget: np.ndarray, columns: list[int]) -> Completions:
    """Completions through every option of a start, within the budget; those of the next block are ``rest``."""
    own = np.column_stack([options.scores, options.costs[:, columns]])
    result = Completions(np.zeros((0, own.shape[1]), np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))
    for start, there in enumerate(rest):
        useful = np.flatnonzero(options.following == start)
        useful = np.sort(useful[nondominated(own[useful])])
        at_once = max(1, MERGED // max(1, len(there.rows)))
        for begin in range(0, len(useful), at_once):
            chosen = useful[begin : begin + at_once]
            sums = (own[chosen][:, None] + there.rows).reshape(-1, own.shape[1])
            fits = np.flatnonzero((sums[:, 1:] <= budget).all(1))
            option, row = np.divmod(fits, len(there.rows))
            rows = np.concatenate([result.rows, sums[fits]])
            # exact: scores and costs add up, and what can follow depends on the start alone, so behind any prefix a
            # dominated way can be exchanged for the one that dominates it (Bellman's principle)
            keep = nondominated(rows)
            result = Completions(
                rows[keep],
                np.concatenate([result.option, chosen[option].astype(np.int32)])[keep],
                np.concatenate([result.rest, row.astype(np.int32)])[keep],
            )
    return result


def _require(graph: Graph, limits: dict[str, int]) -> None:
    """Raises ConfigError where no architecture is rated, or none meets one of the limits."""
    if not graph.size():
        raise ConfigError("run", "no architecture can be put together from its ratings", "rate all blocks of one run")
    for name, limit in limits.items():
        least = int(graph.least[-1][0, COSTS.index(name)])
        if least > limit:
            raise ConfigError(
                name,
                f"no rated architecture has at most {show(name, limit)}, the smallest has {show(name, least)}",
                f"raise it to {show(name, least)} or more",
            )


def _infeasible(graph: Graph, limits: dict[str, int]) -> ConfigError:
    """Each limit can be met alone, but not all together: says how low each cost gets within the other limits."""
    reachable = []
    for name in limits:
        others = {other: limit for other, limit in limits.items() if other != name}
        rest = completions(graph, others, [COSTS.index(n) for n in (name, *others)], first=0)
        rows = rest[0][0].rows
        if len(rows):
            reachable.append(f"`{name}` of {show(name, int(rows[:, 1].min()))}")
    return ConfigError(
        " ".join(limits),
        "no rated architecture meets all limits at once",
        f"with the others as they are, raise to {' or '.join(reachable)}"
        if reachable
        else "raise more than one of them",
    )


def show(name: str, value: int) -> str:
    """A cost as it is written on the command line: exact, latencies in ms."""
    return f"{value / 1e6:.6f} ms" if name == "latency_ns" else f"{value} {'MACs' if name == 'macs' else 'parameters'}"
