"""`bossnas rank`: a rating against an accuracy table, beside size baselines and zero-cost proxies."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bossnas import log, spaces
from bossnas.config.shared import SpaceConfig
from bossnas.errors import ConfigError
from bossnas.networks.from_space import standalone
from bossnas.runs.folder import read_config
from bossnas.selection import HOW, combine
from bossnas.selection.ranking import correlation, intervals, proxies, tables
from bossnas.selection.sizes import SIZE_DEFINITIONS, size_baselines
from bossnas.spaces import Space
from bossnas.spaces.cost import CostTable
from bossnas.spaces.paths import Choices, decode

CHANNELS = re.compile(r"\d+(:\d+)+")
PROXY_IMAGES = 64  # per batch; random normal, as the labels are random

Architecture = tuple[Choices, ...]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: plain values for a file, and the points behind the figures."""

    result: dict[str, Any]
    scores: dict[str, np.ndarray]  # the rating first, then with size, then the baselines; larger is better
    accuracy: np.ndarray


@dataclass(frozen=True)
class Rated:
    """Which ratings are compared.

    ``score``, ``better``: of the files, see `tables.read_scores`. ``how``: how the scores of blocks are put together, a
    name of HOW. ``seeds``: every source is a rating of its own, of the same search with another seed; they are summed,
    after standardising each over the architectures that are compared. ``size_weight``: how much the sum of log channels
    counts in the figures of rating and size.
    """

    sources: list[Path]
    score: str | None = None
    better: str = "higher"
    how: str = "sum"
    seeds: bool = False
    size_weight: float = 1.0


@dataclass(frozen=True)
class Sampling:
    """What is drawn: ``resamples`` of the bootstrap, and ``sample`` architectures of which the proxies ``proxies`` are
    computed; both by ``seed``."""

    resamples: int = 1000
    proxies: Sequence[str] = ()
    sample: int = 200
    seed: int = 0


def compare(
    rated_by: Rated,
    accuracy: Path,
    *,
    column: str | None = None,
    space: str | None = None,
    image_size: int | None = None,
    sampling: Sampling | None = None,
) -> Comparison:
    """Reads ratings and accuracies, matches their architectures and computes every figure.

    ``column``: of the accuracies. ``space`` names the space where the ratings are no run folder and the texts do not
    tell it; ``image_size``: of its networks, pixels (None: as published).
    Raises ConfigError for everything that cannot be read or matched.
    """
    sampling = sampling or Sampling()
    sources, how, size_weight = rated_by.sources, rated_by.how, rated_by.size_weight
    seeds, resamples, seed = rated_by.seeds, sampling.resamples, sampling.seed
    ratings = _read(sources, rated_by.score, rated_by.better, seeds)
    first = ratings[0]
    if how != "sum" and isinstance(first, tables.TableScores):
        raise ConfigError("how", f"{sources[0]} holds one score per architecture, none of blocks", "leave it out")
    table = tables.read_accuracies(accuracy, column)
    chosen = _choose_space(sources, first, table, space, image_size)
    reader = _Reader(chosen.space)
    measured = reader.read_all(table, "accuracy", accuracy)
    sign = 1 if first.better == "higher" else -1
    rated, blocks = _rate_all(reader, ratings, list(measured), sources, how)
    blocks = sign * blocks  # [seeds, blocks, architectures]
    truth = np.array([measured[architecture] for architecture in rated])
    costs = CostTable.of(chosen.space, chosen.image_size)
    sizes = size_baselines(costs, rated, chosen.classes)
    totals = blocks.sum(1)
    values = _standardised_sum(totals) if seeds else totals[0]
    name = first.name if first.name not in {*sizes, *sampling.proxies} else f"{first.name} (given)"
    with_size = combine.standardised(values) + size_weight * combine.standardised(sizes["sum_log_channels"])
    scores = {name: values, f"{name} + size": with_size, **sizes}
    figures = correlation.report(scores, truth, sizes, resamples=resamples, seed=seed)
    offered = max(
        math.prod(map(len, r.blocks)) if isinstance(r, tables.BlockScores) else len(r.values) for r in ratings
    )
    result = {
        "ratings": [str(source) for source in sources],
        "accuracy": str(accuracy),
        "space": chosen.name,
        "space_from": chosen.told_by,
        "image_size": chosen.image_size,
        "classes": chosen.classes,
        "score": name,
        "better": first.better,
        "score_negated": sign < 0,
        "combine": how,
        "size_weight": size_weight,
        "n": len(rated),
        "missing": {"without_score": len(measured) - len(rated), "without_accuracy": offered - len(rated)},
        "seed": seed,
        "bootstrap": resamples,
        "intervals": {"architectures": len(rated), "method": intervals.method(len(rated))},
        **figures[name],
        "with_size": figures[f"{name} + size"],
        "baselines": {name: figures[name] for name in sizes},
    }
    if chosen.run is not None:
        budgets = [row["budget_params"] for row in figures[name]["regret"]]
        result["run"] = _in_selects_count(chosen.run, rated, sizes["params"], budgets)
    if isinstance(first, tables.BlockScores):
        alone = {str(b): _standardised_sum(blocks[:, b]) for b in range(blocks.shape[1])}
        result["blocks"] = list(correlation.brief(alone, truth, sizes).values())
    if seeds:
        result["seeds"] = _spread(ratings, blocks, truth, sizes)
    if sampling.proxies:
        result["proxies"] = _with_proxies(chosen, rated, scores, truth, sizes, sampling)
    result["definitions"] = {**correlation.DEFINITIONS, **SIZE_DEFINITIONS, "combine": HOW[how]}
    return Comparison(result, scores, truth)


def _in_selects_count(
    config: SpaceConfig, rated: list[Architecture], params: np.ndarray, budgets: list[int]
) -> dict[str, Any]:
    """The run's width, and what `bossnas select` counts of the networks of so many ``params``, the largest if they
    differ: at the run's width, without a classifier."""
    costs = CostTable.of(spaces.make(**config.model_dump()), config.image_size)
    found = []
    for budget in budgets:
        of_that_size = [rated[i] for i in np.flatnonzero(params == budget)]
        found.append(int(costs.networks(of_that_size)["params"].max()))
    return {"width": config.width, "budget_params": found}


def _standardised_sum(rows: np.ndarray) -> np.ndarray:
    """Of the rows, each of them standardised."""
    return cast("np.ndarray", sum(map(combine.standardised, rows)))


def _read(sources: list[Path], score: str | None, better: str, seeds: bool) -> list[tables.Scores]:
    """The ratings, of the same kind and score: one, or with ``seeds`` one of each source."""
    if not seeds:
        return [tables.read_scores(sources, score, better)]
    if len(sources) < 2:
        raise ConfigError(
            "seeds", "puts ratings of several seeds together, but one is named", "name two or more, or leave it out"
        )
    if len({source.resolve() for source in sources}) < len(sources):
        raise ConfigError("ratings", "the same rating is named twice", "name each seed once")
    ratings = [tables.read_scores([source], score, better) for source in sources]
    for source, rating in zip(sources, ratings, strict=True):
        for what in ("name", "better"):
            one, other = getattr(ratings[0], what), getattr(rating, what)
            if type(rating) is not type(ratings[0]) or one != other:
                raise ConfigError(
                    "ratings",
                    f"{sources[0]} and {source} hold no ratings of the same kind ({one}, {other})",
                    "name seeds of one search, or choose a `score`",
                )
    return ratings


def _spread(
    ratings: list[tables.Scores], blocks: np.ndarray, truth: np.ndarray, sizes: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The figures of every seed, their mean and standard deviation, and how far the seeds agree."""
    totals = blocks.sum(1)
    each = list(correlation.brief({str(i): total for i, total in enumerate(totals)}, truth, sizes).values())
    result: dict[str, Any] = {"each": each, **correlation.spread(each)}
    result["agreement"] = {"together": correlation.agreement(totals)}
    if isinstance(ratings[0], tables.BlockScores):
        of_blocks = []
        for block in range(blocks.shape[1]):
            named = {str(i): s for i, s in enumerate(blocks[:, block])}
            of_seeds = list(correlation.brief(named, truth, sizes).values())
            of_blocks.append({"each": of_seeds, **correlation.spread(of_seeds)})
        result["blocks"] = of_blocks
        result["agreement"]["blocks"] = [
            _agreement([rating.blocks[b] for rating in ratings if isinstance(rating, tables.BlockScores)])
            for b in range(blocks.shape[1])
        ]
    return result


def _agreement(of_seeds: list[dict[str, float]]) -> dict[str, Any]:
    """Between the seeds' scores of a block's paths; of the paths that all of them rate."""
    common = [path for path in of_seeds[0] if all(path in scores for scores in of_seeds)]
    values = np.array([[scores[path] for path in common] for scores in of_seeds])
    return {"paths": len(common), **correlation.agreement(values)}


@dataclass(frozen=True)
class _Chosen:
    name: str
    told_by: str  # "the run's config" | "--space" | "the architectures' texts"
    space: Space
    image_size: int
    classes: int
    run: SpaceConfig | None  # of a run folder, as it searched


def _choose_space(
    sources: list[Path], rating: tables.Scores, table: dict[str, float], named: str | None, image_size: int | None
) -> _Chosen:
    """The full-size space (width 1), as the networks of an accuracy table are, whatever width a run searched with."""
    if isinstance(rating, tables.BlockScores):
        text = "|".join(next(iter(block)) for block in rating.blocks)
    else:
        text = next((t for t in rating.values if not CHANNELS.fullmatch(t)), next(iter(rating.values)))
    name, options = _recognise([text, next(iter(table))])
    size, told_by, run = None, "the architectures' texts", None
    if named is not None:
        name, options, told_by = named, options if named == name else {}, "--space"
    elif (sources[0] / "config.json").is_file():
        run = read_config(sources[0]).space
        size, told_by = run.image_size, "the run's config"
        name, options = run.name, run.model_dump(exclude={"name", "width", "image_size"})
    if name is None:
        raise ConfigError(
            "space",
            f"cannot tell the space of architectures such as {text!r}",
            f"name it: {', '.join(spaces.known())} or path/to/file.py:ClassName",
        )
    published = spaces.traits(spaces.known().get(name, object))
    size = image_size or published.image_size or size
    if size is None and ".py:" in name:
        raise ConfigError("image_size", f"is not known for {name}", "give the side of its images, in pixels")
    # an unknown name is refused before the size matters
    space = spaces.make(name, image_size=size or 1, **options)
    assert size is not None, "the built-in spaces have one"
    return _Chosen(name, told_by, space, size, published.classes, run)


def _recognise(texts: list[str]) -> tuple[str | None, dict[str, Any]]:
    """Space and options by the layers per block of the first text that tells them, or by texts of channel numbers."""
    for text in texts:
        known = spaces.recognise([len(part) for part in text.split("|")])
        if known is not None and not CHANNELS.fullmatch(text):
            return known
    if any(CHANNELS.fullmatch(text) for text in texts):
        return next(name for name, kind in spaces.known().items() if spaces.traits(kind).channel_texts), {}
    return None, {}


class _Reader:
    """Turns texts into architectures of a space; knows the paths that may follow others."""

    def __init__(self, space: Space):
        self.space = space
        self._paths: dict[Architecture, frozenset[Choices]] = {}
        self._sets: dict[frozenset[Choices], frozenset[Choices]] = {}  # equal sets are kept once

    def paths(self, winners: Architecture) -> frozenset[Choices]:
        if winners not in self._paths:
            found = frozenset(self.space.paths(len(winners), list(winners)))
            self._paths[winners] = self._sets.setdefault(found, found)
        return self._paths[winners]

    def read_all(self, values: dict[str, float], field: str, source: Path) -> dict[Architecture, float]:
        """Raises ConfigError for a text that is no architecture of the space, or two that are the same one."""
        result: dict[Architecture, float] = {}
        for number, (text, value) in enumerate(values.items(), 1):
            try:
                architecture = self.read(text)
            except ValueError as error:
                raise ConfigError(
                    field,
                    f"{source} entry {number}, {text!r}: {error}",
                    "mend or remove it, or name another `space`",
                ) from None
            if architecture in result:
                raise ConfigError(
                    field,
                    f"{source} entry {number}, {text!r}, is an architecture that stood before",
                    "remove one of the two",
                )
            result[architecture] = value
        return result

    def read(self, text: str) -> Architecture:
        """`8:8:64:64:8` (channels) or `00|77|0` (paths). Raises ValueError."""
        parts = self._channels(text) if CHANNELS.fullmatch(text) else text.split("|")
        if len(parts) != self.space.blocks:
            raise ValueError(f"{len(parts)} paths, but the space has {self.space.blocks} blocks")
        architecture: Architecture = ()
        for block, part in enumerate(parts):
            path = decode(part) if isinstance(part, str) and part.isascii() and part.isalnum() else part
            if path not in self.paths(architecture):
                raise ValueError(f"block {block} has no such path")
            architecture += (path,)
        return architecture

    def _channels(self, text: str) -> list[Choices]:
        widths = getattr(self.space, "widths", None)
        if widths is None:
            raise ValueError("channel numbers, but the space is written in paths")
        numbers = [int(part) for part in text.split(":")]
        layers = [self.space.layers(block) for block in range(self.space.blocks)]
        if len(numbers) != sum(layers):
            raise ValueError(f"{len(numbers)} channel numbers, but the space has {sum(layers)} layers")
        unknown = set(numbers).difference(widths)
        if unknown:
            raise ValueError(f"{min(unknown)} is not among the widths {', '.join(map(str, widths))}")
        ids, result = [widths.index(number) for number in numbers], []
        for count in layers:
            result.append(tuple(ids[:count]))
            ids = ids[count:]
        return result


def _rate_all(
    reader: _Reader, ratings: list[tables.Scores], wanted: list[Architecture], sources: list[Path], how: str
) -> tuple[list[Architecture], np.ndarray]:
    """Those of the architectures that every rating has, and the scores of their blocks, [ratings, blocks, n]; of a
    table [ratings, 1, n]."""
    found = [_rate(reader, rating, wanted, source, how) for rating, source in zip(ratings, sources, strict=False)]
    rated = [a for a in wanted if all(a in values for values in found)]
    if len(rated) < correlation.MINIMUM:
        raise ConfigError(
            "accuracy",
            f"of its {len(wanted)} architectures {len(rated)} have a score, too few to rank",
            "name ratings and accuracies of the same architectures",
        )
    return rated, np.array([[values[a] for a in rated] for values in found], np.float64).reshape(
        len(found), len(rated), -1
    ).transpose(0, 2, 1)


def _rate(
    reader: _Reader, rating: tables.Scores, wanted: list[Architecture], source: Path, how: str
) -> dict[Architecture, tuple[float, ...]]:
    """The scores of the blocks of those of the architectures that have one.

    A block's rating holds for an architecture only if its own blocks before allow the same paths as the winners on
    which the block was rated: HyTra's blocks are rated at one scale.
    """
    if isinstance(rating, tables.TableScores):
        return {a: (value,) for a, value in reader.read_all(rating.values, "ratings", source).items()}
    if len(rating.blocks) != reader.space.blocks:
        raise ConfigError(
            "ratings",
            f"{source} rates {len(rating.blocks)} blocks, but the space has {reader.space.blocks}",
            "finish the search, name all files, or name another `space`",
        )
    blocks = [{decode(text): value for text, value in combine.combined(block, how).items()} for block in rating.blocks]
    allowed = [_allowed(reader, block, prefix) for block, prefix in enumerate(rating.prefixes)]
    for block, (scores, paths) in enumerate(zip(blocks, allowed, strict=True)):
        if paths is not None and not paths.issuperset(scores):
            raise ConfigError(
                "ratings",
                f"block {block} has paths that the space does not have there",
                "name another `space`",
            )
    return {
        architecture: tuple(blocks[k][path] for k, path in enumerate(architecture))
        for architecture in wanted
        if all(
            path in blocks[k] and allowed[k] in (None, reader.paths(architecture[:k]))
            for k, path in enumerate(architecture)
        )
    }


def _allowed(reader: _Reader, block: int, prefix: list[str]) -> frozenset[Choices] | None:
    """The paths that may follow the winners on which a block was rated; None for a rating that holds everywhere."""
    if block and not prefix:
        return None
    winners: Architecture = ()
    for path in map(decode, prefix):
        if path not in reader.paths(winners):
            raise ConfigError(
                "ratings",
                f"block {block} was rated on {'|'.join(prefix)}, which the space does not have",
                "name another `space`",
            )
        winners += (path,)
    return reader.paths(winners)


def _with_proxies(
    chosen: _Chosen,
    architectures: list[Architecture],
    scores: dict[str, np.ndarray],
    accuracy: np.ndarray,
    sizes: dict[str, np.ndarray],
    sampling: Sampling,
) -> dict[str, Any]:
    """Figures of the proxies, and of all other scores, on the same seeded sample of the architectures."""
    names, seed = sampling.proxies, sampling.seed
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(architectures), min(sampling.sample, len(architectures)), replace=False))
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(PROXY_IMAGES, 3, chosen.image_size, chosen.image_size, generator=generator)
    labels = torch.randint(chosen.classes, (PROXY_IMAGES,), generator=generator)
    values = {name: np.zeros(len(rows)) for name in names}
    seconds = dict.fromkeys(names, 0.0)
    with log.progress("proxies", len(rows)) as task:
        for i, row in enumerate(rows):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = proxies.open_branches(standalone(chosen.space, architectures[row], chosen.classes))
            for name in names:
                start = time.perf_counter()
                values[name][i] = proxies.PROXIES[name](network, images, labels)
                seconds[name] += time.perf_counter() - start
                if not math.isfinite(values[name][i]):
                    raise ConfigError(
                        "proxies",
                        f"{name} is {values[name][i]} for the network {architectures[row]}",
                        "leave this proxy out, or take another `seed`",
                    )
            task.advance()
    figures = correlation.report(
        {**{name: score[rows] for name, score in scores.items()}, **values},
        accuracy[rows],
        {name: size[rows] for name, size in sizes.items()},
        resamples=sampling.resamples,
        seed=seed,
    )
    return {
        "sample": len(rows),
        "images": f"{PROXY_IMAGES} random normal",
        "labels": "random",
        "intervals": {"architectures": len(rows), "method": intervals.method(len(rows))},
        "seconds_per_architecture": {name: seconds[name] / len(rows) for name in names},
        "figures": figures,
    }
