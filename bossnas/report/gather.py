"""What a report shows of runs, read from their folders as plain values. Nothing is written, and no line of a log or of
the metrics is trusted to be whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bossnas import spaces
from bossnas.config.retrain import RetrainConfig
from bossnas.config.search import Config
from bossnas.errors import ConfigError
from bossnas.report import records
from bossnas.runs.certainty import Certainty
from bossnas.runs.folder import kind_of, read_config
from bossnas.runs.ratings import BlockRating, read_ratings
from bossnas.runs.show import winners
from bossnas.selection import select
from bossnas.selection.graph import Graph
from bossnas.selection.ranking.compare import Comparison, Rated, compare
from bossnas.selection.ranking.correlation import coefficients
from bossnas.spaces import Space
from bossnas.spaces.cost import Cost, CostTable
from bossnas.spaces.paths import Choices, decode
from bossnas.spaces.words import Layer, layers, path_words, summary, words

CURVES = ("loss", "spread", "lr", "images_per_second")
DRAWN = 200_000  # architectures drawn where a space has more
BEST = 0.1  # share of the drawn architectures, by score, whose layers are counted
LINES = 200  # warnings that are kept


@dataclass(frozen=True)
class Effect:
    """What a candidate of a layer does to the score: the mean of the paths that have it, less that of all paths."""

    words: str
    difference: float
    error: float | None  # standard error over images
    paths: int


@dataclass(frozen=True)
class BlockStory:
    """A block: its rating as far as there is one, and its training."""

    number: int
    rating: BlockRating | None
    certainty: Certainty | None
    scores: dict[str, dict[str, float]]  # score -> encoded path -> value
    better: dict[str, str]
    costs: dict[str, Cost]
    words: dict[str, str]
    effects: list[list[Effect]]  # by layer
    score_names: list[str]
    score_agreement: np.ndarray  # Spearman, [scores, scores]; of all a higher value counts as better
    midway: list[tuple[int, float, str]]  # step, best score, leader
    curves: dict[str, list[float]]  # "step", and those of CURVES that there are


@dataclass(frozen=True)
class RunStory:
    """One run as its folder tells it."""

    folder: Path
    kind: str  # search | rating without training | retraining
    config: dict[str, Any]
    changed: list[tuple[str, Any, Any]]  # key, value, default
    versions: dict[str, Any]
    finished: bool
    position: str
    warnings: list[tuple[str, str, str]]  # time, level, text
    faults: dict[str, int]
    blocks: list[BlockStory] = field(default_factory=list)
    space: Space | None = None
    architecture: list[Choices] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    summary: str = ""
    cost: Cost = field(default_factory=lambda: Cost(0, 0))
    curves: dict[str, list[float]] = field(default_factory=dict)  # of a retraining
    evaluations: dict[str, list[float]] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Story:
    """One run, or several that differ in their seed; the first is the one that is told."""

    runs: list[RunStory]
    selected: dict[str, Any] | None  # of `select.select`, with the Pareto front
    unselected: str  # why there is no selection
    density: list[list[float]] | None  # by layer and candidate: its share among the best architectures
    drawn: int  # architectures from which these are
    seeds: list[np.ndarray]  # by block: Spearman between the runs' scores of the block's paths
    accuracy: Comparison | None

    @property
    def run(self) -> RunStory:
        return self.runs[0]


def gather(folders: Sequence[Path], accuracy: Path | None = None, score: str | None = None) -> Story:
    """Reads everything. ``score``: another than the runs chose by. Raises ConfigError for what is no run."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("run", "the same run is named twice", "name each run once")
    runs = [_run(folder, score) for folder in folders]
    if len(runs) > 1 and any(run.kind == "retraining" for run in runs):
        raise ConfigError("run", "several runs are told together only if all are searches", "name one retraining alone")
    selected, unselected, density, drawn, comparison = None, "", None, 0, None
    main = runs[0]
    rated = main.space is not None and all(
        sum(block.rating is not None for block in run.blocks) == main.space.blocks for run in runs
    )
    if rated:
        try:
            selected = select.select(folders, score=score, top=10, front_cost="macs")
            density, drawn = _density(folders, score)
        except ConfigError as error:
            unselected = f"{error.problem}; {error.fix}"
    elif main.kind != "retraining":
        unselected = "not all blocks are rated yet"
    if accuracy is not None:
        comparison = compare(Rated(list(folders), score, seeds=len(folders) > 1), accuracy)
    return Story(runs, selected, unselected, density, drawn, _seeds(runs), comparison)


def _run(folder: Path, score: str | None) -> RunStory:
    kind = kind_of(folder)
    schema = RetrainConfig if kind == "retraining" else Config
    config = read_config(folder, schema)
    values, defaults = records.flat(config.model_dump(mode="json")), records.flat(schema().model_dump(mode="json"))
    versions = records.read_object(folder / "versions.json")
    lines = records.metrics(folder / "metrics.jsonl")
    warnings = records.warnings(folder / "log.txt")
    base: dict[str, Any] = {
        "folder": folder,
        "kind": kind,
        "config": values,
        "changed": [(key, value, defaults.get(key)) for key, value in values.items() if value != defaults.get(key)],
        "versions": versions,
        "finished": (folder / "done").exists() or (kind == "rating without training" and _all_rated(folder)),
        "warnings": warnings[:LINES],
        "faults": records.faults(lines, warnings, folder),
    }
    if kind == "retraining":
        train, evals = ([line for line in lines if line.get("kind") == name] for name in ("train", "eval"))
        return RunStory(
            **base,
            position=records.position(lines),
            curves=records.curves(train, ("loss", "lr", "images_per_second")),
            evaluations=records.curves(evals, ("top1", "top5", "loss")),
            result=records.read_object(folder / "result.json"),
        )
    assert isinstance(config, Config), "all but retrainings have a search's config"
    space = spaces.make(**config.space.model_dump())
    table = select.table_of(config.space)
    ratings = _ratings(folder, score)
    architecture = winners(folder, space, len(ratings)) if (folder / "winners.json").exists() else []
    numbers = sorted({*range(len(ratings)), *(int(line["block"]) for line in lines if records.is_block(line, space))})
    return RunStory(
        **base,
        position=records.position(lines),
        blocks=[
            _block(folder, number, ratings[number] if number < len(ratings) else None, table, architecture, lines)
            for number in numbers
        ],
        space=space,
        architecture=architecture,
        layers=layers(table, architecture),
        summary=summary(space, architecture),
        cost=table.cost(architecture),
    )


def _ratings(folder: Path, score: str | None) -> list[BlockRating]:
    """Those that there are: a run that has just begun has none."""
    return read_ratings(folder, score) if any((folder / "ratings").glob("block_?.json")) else []


def _block(
    folder: Path,
    number: int,
    rating: BlockRating | None,
    table: CostTable,
    architecture: list[Choices],
    lines: list[dict[str, Any]],
) -> BlockStory:
    own = [line for line in lines if line.get("block") == number]
    midway = [
        (int(line["step"]), float(line["best"]), str(line.get("path", "")))
        for line in own
        if line.get("kind") == "rating" and records.is_number(line.get("best")) and records.is_number(line.get("step"))
    ]
    curves = records.curves([line for line in own if line.get("kind") == "train"], CURVES)
    if rating is None:
        return BlockStory(number, None, None, {}, {}, {}, {}, [], [], np.zeros((0, 0)), midway, curves)
    space, paths = table.space, [decode(text) for text in rating.scores]
    prefix = [decode(text) for text in rating.prefix] or architecture[:number]
    shape = table.image
    for block, path in enumerate(prefix):
        shape = table.path(block, path, shape)[1]
    values = records.read_object(folder / "ratings" / f"block_{number}.json")
    scores = values.get("scores") or {rating.score: rating.scores}
    better = values.get("better") or {rating.score: rating.better}
    names = [
        name
        for name, of in scores.items()
        if of.keys() == rating.scores.keys() and all(map(records.is_number, of.values()))
    ]
    signed = np.array([[(-1 if better.get(n) == "lower" else 1) * v for v in scores[n].values()] for n in names])
    return BlockStory(
        number,
        rating,
        rating.certainty,
        {name: scores[name] for name in names},
        better,
        {text: table.path(number, path, shape)[0] for text, path in zip(rating.scores, paths, strict=True)},
        {text: path_words(space, number, path) for text, path in zip(rating.scores, paths, strict=True)},
        _effects(space, rating, paths),
        names,
        _spearman(signed),
        midway,
        curves,
    )


def _effects(space: Space, rating: BlockRating, paths: list[Choices]) -> list[list[Effect]]:
    values, result = np.array(list(rating.scores.values())), []
    for layer in range(len(paths[0])):
        found = []
        for choice in sorted({path[layer] for path in paths}):
            has = np.array([path[layer] == choice for path in paths])
            error = None
            if rating.parts is not None:
                off = rating.parts.values[has].mean(0) - rating.parts.values.mean(0)
                error = float(rating.parts.error(off))
            text = words(space, rating.block, layer, choice).text
            difference = float(values[has].mean() - values.mean())
            known = error is not None and math.isfinite(error)
            found.append(Effect(text, difference, error if known else None, int(has.sum())))
        result.append(found)
    return result


def _density(folders: Sequence[Path], score: str | None) -> tuple[list[list[float]], int]:
    """The share of each layer's candidates among the best architectures, and from how many drawn ones that is.

    Architectures are drawn evenly from all that can be put together from rated paths, by the number of completions
    behind each path.
    """
    graph = select.graph_of(folders, score)
    rng, counts = np.random.default_rng(0), [np.ones(1)]
    for starts in reversed(graph.blocks):
        counts.append(
            np.array([counts[-1][options.following].sum() if len(options.paths) else 0.0 for options in starts])
        )
    counts.reverse()
    total = DRAWN if graph.size() > DRAWN else max(1000, graph.size())
    at, totals, taken = np.zeros(total, np.int64), np.zeros(total, np.int64), []
    for block, starts in enumerate(graph.blocks):
        chosen, following = np.zeros((total, graph.table.space.layers(block)), np.int64), np.zeros(total, np.int64)
        for start, options in enumerate(starts):
            here = np.flatnonzero(at == start)
            if not len(here):
                continue
            weight = counts[block + 1][options.following]
            rows = rng.choice(len(options.paths), len(here), p=weight / weight.sum())
            chosen[here] = np.array(options.paths)[rows]
            totals[here] += options.scores[rows]
            following[here] = options.following[rows]
        at = following
        taken += list(chosen.T)
    best = np.argsort(totals, kind="stable")[: max(1, int(BEST * total))]
    widest = [len(graph.table.space.candidates(b)) for b in range(len(graph.blocks)) for _ in range(_layers(graph, b))]
    return [
        (np.bincount(layer[best], minlength=count) / len(best)).tolist()
        for layer, count in zip(taken, widest, strict=True)
    ], total


def _layers(graph: Graph, block: int) -> int:
    return graph.table.space.layers(block)


def _seeds(runs: Sequence[RunStory]) -> list[np.ndarray]:
    """By block that all runs have rated with the same paths by the same score."""
    result = []
    for blocks in zip(*(run.blocks for run in runs), strict=False):
        ratings = [block.rating for block in blocks if block.rating is not None]
        same = len(ratings) == len(runs) > 1 and len({(r.score, frozenset(r.scores)) for r in ratings}) == 1
        if same:
            result.append(_spearman(np.array([[r.scores[p] for p in ratings[0].scores] for r in ratings])))
    return result


def _spearman(rows: np.ndarray) -> np.ndarray:
    """Between each two rows [n, m]; NaN where it is not defined."""
    found = np.eye(len(rows))
    for i in range(len(rows)):
        for j in range(i):
            value = coefficients(rows[i], rows[j])["spearman"]
            found[i, j] = found[j, i] = np.nan if value is None else value
    return found


def _all_rated(folder: Path) -> bool:
    return (folder / "architecture.json").exists()
