"""Scores and accuracies of architectures from files: run folders, CSV, YAML, the release's ratings, NATS-Bench.

Architectures stay the texts that the files hold; what they mean only a search space can say.
"""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bossnas.errors import ConfigError
from bossnas.runs.ratings import read_ratings

ACCURACY_COLUMNS = ("accuracy", "test_accuracy", "top1")  # taken before others, in this order
NATS_BENCH_EPOCHS = "90"  # the longest training in NATS-Bench's size space
DEEPEST = 20  # nesting of YAML; a rating has three levels


@dataclass(frozen=True)
class BlockScores:
    """A rating of blocks: the score of an architecture is the sum of its paths' scores (METHOD 5)."""

    name: str
    better: str  # lower | higher
    blocks: list[dict[str, float]]  # encoded path -> score
    prefixes: list[list[str]]  # of each block: the encoded winners on which it was rated


@dataclass(frozen=True)
class TableScores:
    """One score per architecture."""

    name: str
    better: str
    values: dict[str, float]  # an architecture's text -> score


Scores = BlockScores | TableScores


def read_scores(sources: list[Path], score: str | None = None, better: str = "higher") -> Scores:
    """A run folder, a CSV file, or the per-block YAML files of the original release (in a folder, or one by one).

    ``score`` names a score of the run or a column of the CSV file; ``better`` says which of two values in a CSV file is
    the better one. Raises ConfigError for everything that cannot be read, with the file and the row or entry.
    """
    first = sources[0]
    if len(sources) == 1 and first.is_dir():
        if any(first.glob("path_rank_*.y*ml")):
            return _release_scores(_release_files(first), score)
        ratings = read_ratings(first, score)
        return BlockScores(
            ratings[0].score, ratings[0].better, [r.scores for r in ratings], [r.prefix for r in ratings]
        )
    if all(source.suffix in (".yml", ".yaml") for source in sources):
        return _release_scores(sources, score)
    if len(sources) == 1 and first.suffix == ".csv":
        name, values = _read_csv("ratings", first, score, "score", ("score",))
        return TableScores(name, better, values)
    raise ConfigError(
        "ratings",
        f"cannot tell what {', '.join(map(str, sources))} is",
        "name a run folder, one .csv file, or the original release's .yml files in the order of the blocks",
    )


def read_accuracies(source: Path, column: str | None = None) -> dict[str, float]:
    """Architecture -> accuracy, in the file's order, of a CSV or YAML file or a NATS-Bench file or folder.

    ``column`` names the column of a CSV file, or NATS-Bench's data set (default cifar10). Raises ConfigError.
    """
    if source.suffix == ".csv":
        return _read_csv("accuracy", source, column, "column", ACCURACY_COLUMNS)[1]
    if source.suffix in (".yml", ".yaml"):
        if column is not None:
            raise ConfigError("column", f"{source} has no columns", "leave it out")
        return _read_yaml_mapping(source)
    if source.is_dir() or source.suffix in (".pbz2", ".pickle"):
        return _read_nats_bench(source, column or "cifar10")
    raise ConfigError(
        "accuracy",
        f"cannot tell what {source} is",
        "name a .csv or .yaml file, or a NATS-Bench file (.pickle.pbz2) or folder (…-simple)",
    )


def _read_csv(
    field: str, source: Path, column: str | None, option: str, usual: tuple[str, ...]
) -> tuple[str, dict[str, float]]:
    """The column's name, and first column -> value. Row numbers in errors count the header as row 1."""
    try:
        rows = list(csv.reader(_text(field, source).splitlines()))
    except csv.Error as error:
        raise ConfigError(field, f"{source} is no CSV file ({error})", "name a text file") from None
    if not rows or len(rows[0]) < 2:
        raise ConfigError(
            field, f"{source} has no header with two columns", f"write a first row such as architecture,{usual[0]}"
        )
    header = [name.strip() for name in rows[0]]
    if any(_is_number(name) for name in header[1:]):
        raise ConfigError(
            field,
            f"{source} begins with values, not with the columns' names",
            f"write a first row such as architecture,{usual[0]}",
        )
    name = column or next((n for n in usual if n in header[1:]), header[1] if len(header) == 2 else None)
    if name is not None and header[1:].count(name) > 1:
        raise ConfigError(field, f"{source} has several columns {name!r}", "rename or remove all but one")
    if name not in header[1:]:
        raise ConfigError(
            option,
            f"{source} has no column {name!r}" if name else f"{source} has several columns",
            f"choose of {', '.join(header[1:])}",
        )
    at = header.index(name, 1)
    for number, row in enumerate(rows[1:], 2):
        if row and len(row) != len(header):
            raise ConfigError(
                field, f"{source} row {number} has {len(row)} cells, the header {len(header)}", "mend the row"
            )
    entries = ((f"row {number}", row[0], row[at]) for number, row in enumerate(rows[1:], 2) if row)
    return name, _values(field, source, entries)


def _read_yaml_mapping(source: Path) -> dict[str, float]:
    root = _yaml("accuracy", source, compose=True)
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError("accuracy", f"{source} holds no mapping", "write lines such as '8:8:64:64:8: 91.2'")
    entries = []
    for key, value in root.value:
        where = f"line {key.start_mark.line + 1}"
        for node in (key, value):
            if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
                raise ConfigError("accuracy", f"{source} {where} is not 'architecture: accuracy'", "mend the line")
        entries.append((where, key.value, value.value))
    return _values("accuracy", source, entries)


def _read_nats_bench(source: Path, dataset: str) -> dict[str, float]:
    """Mean test accuracy over NATS-Bench's seeds after its longest training. The package unpickles the file."""
    try:
        nats_bench = importlib.import_module("nats_bench")
    except ImportError:
        raise ConfigError(
            "accuracy",
            f"{source} is read as a NATS-Bench file, which needs the nats_bench package",
            "pip install nats_bench, or name a .csv or .yaml file",
        ) from None
    try:
        api = nats_bench.create(str(source), "sss", fast_mode=source.is_dir(), verbose=False)
        entries = [
            (
                f"architecture {i}",
                text,
                api.get_more_info(i, dataset, hp=NATS_BENCH_EPOCHS, is_random=False)["test-accuracy"],
            )
            for i, text in enumerate(api.meta_archs)
        ]
    except Exception as error:  # whatever a foreign package raises on a file that is not its own
        text = " ".join(str(error).split())
        raise ConfigError(
            "accuracy",
            f"nats_bench cannot read {dataset} from {source} ({type(error).__name__}: {text})",
            "name NATS-Bench's size space, and a data set of it as `column`",
        ) from None
    return _values("accuracy", source, entries)


def _release_files(folder: Path) -> list[Path]:
    files = {file.stem.removeprefix("path_rank_"): file for file in folder.glob("path_rank_*.y*ml")}
    wanted = [str(block) for block in range(len(files))]
    missing = [f"path_rank_{block}.yml" for block in wanted if block not in files]
    if missing:
        raise ConfigError("ratings", f"{folder} lacks {missing[0]}", "restore it, or name the files one by one")
    return [files[block] for block in wanted]


def _release_scores(files: list[Path], score: str | None) -> BlockScores:
    """The original release's ratings: per block a list of (path, loss) tuples, lower is better."""
    if score is not None:
        raise ConfigError("score", f"{files[0]} holds one score without a name", "leave it out")
    blocks = []
    for file in files:
        pairs = _yaml("ratings", file)
        if not isinstance(pairs, list) or not pairs:
            raise ConfigError("ratings", f"{file} holds no list of (path, loss)", "name a rating of the release")
        for number, pair in enumerate(pairs, 1):
            if not (
                isinstance(pair, (tuple, list))
                and len(pair) == 2
                and all(isinstance(v, str) for v in pair)
                and pair[0].isascii()
                and pair[0].isalnum()
            ):
                raise ConfigError("ratings", f"{file} entry {number} is not (path, loss)", "mend the file")
        blocks.append(_values("ratings", file, ((f"entry {n}", *pair) for n, pair in enumerate(pairs, 1))))
    winners = [min((value, path) for path, value in block.items())[1] for block in blocks]
    return BlockScores("population_centre", "lower", blocks, [winners[:block] for block in range(len(blocks))])


_Fastest: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's parser is ten times faster


class _Loader(_Fastest):
    """Text, lists, and tuples under their Python tag; nothing else is made, and nothing is ever run.

    Scalars stay text: read as YAML 1.1, `8:8:8:8:8` would be a number to the base of 60 and `0123` one to the base 8.
    """

    yaml_implicit_resolvers: dict = {}
    yaml_constructors: dict = {}
    depth = 0

    def descend_resolver(self, current_node: Any, current_index: Any) -> None:
        """Called around each node. Refuses deep nesting, on which libyaml's recursion would end the process."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError("nested too deeply")

    def ascend_resolver(self) -> None:
        self.depth -= 1


_Loader.add_constructor("tag:yaml.org,2002:str", yaml.SafeLoader.construct_scalar)
_Loader.add_constructor("tag:yaml.org,2002:seq", yaml.SafeLoader.construct_yaml_seq)
_Loader.add_constructor("tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node)))
_Loader.add_constructor(None, yaml.SafeLoader.construct_undefined)


def _yaml(field: str, source: Path, compose: bool = False) -> Any:
    text = _text(field, source)
    try:
        return yaml.compose(text, _Loader) if compose else yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(
            field,
            f"{source}{line} is refused ({' '.join(str(problem).split())})",
            "name a file of plain text and numbers",
        ) from None


def _text(field: str, source: Path) -> str:
    try:
        return source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            field, f"cannot read {source} ({getattr(error, 'strerror', None) or error})", "name a text file"
        ) from None


def _values(field: str, source: Path, entries: Iterable[tuple[str, str, Any]]) -> dict[str, float]:
    """(where, architecture, value) -> a table without duplicates, of finite numbers."""
    values: dict[str, float] = {}
    for where, text, value in entries:
        text = text.strip()
        if not text:
            raise ConfigError(field, f"{source} {where} names no architecture", "mend or remove it")
        if text in values:
            raise ConfigError(field, f"{source} {where} names {text} a second time", "remove one of the two")
        number = float(value) if _is_number(value) else math.nan
        if not math.isfinite(number):
            raise ConfigError(field, f"{source} {where} has the value {value!r} for {text}", "write a finite number")
        values[text] = number
    if not values:
        raise ConfigError(field, f"{source} holds no architecture", "name a file with some")
    return values


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
