"""The rating files of a run: one score of every rated path of a block, and how sure it is."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from bossnas.errors import ConfigError
from bossnas.runs.certainty import Certainty, Parts, certainty, unpacked

LARGEST = 1e300  # scores below it add up to a finite number


@dataclass(frozen=True)
class BlockRating:
    """One score of every rated path of a block."""

    block: int
    prefix: list[str]  # the encoded winners of the blocks before, on whose features the block was rated, or nothing
    score: str
    better: str  # lower | higher
    scores: dict[str, float]  # encoded path -> value
    candidates: list[str]  # names by candidate id
    parts: Parts | None = None  # what groups of images say of it, rows in the order of ``scores``; None: an older file
    chance: float | None = None  # the score where nothing tells images apart, of scores that have such a value

    def error(self, path: str) -> float | None:
        """Standard error of a path's score over images; None where it is not known."""
        if self.parts is None or path not in self.scores:
            return None
        error = float(self.parts.error(self.parts.values[list(self.scores).index(path)]))
        return error if math.isfinite(error) else None

    @property
    def certainty(self) -> Certainty | None:
        """How sure the winner is; None where the file is of a version that did not keep it."""
        return None if self.parts is None else certainty(self.scores, self.parts, self.better)


def read_ratings(folder: Path, score: str | None = None) -> list[BlockRating]:
    """The ratings of a run's blocks, ratings/block_0.json and so on, as far as they go.

    ``score`` names one of the scores that the files hold; default: the one the run chose by. Raises ConfigError when a
    file is missing or damaged, lacks the score or holds a value that is not finite, or the blocks' scores differ or
    disagree about which value is better.
    """
    files = folder / "ratings"
    numbers = sorted(int(f.stem[6:]) for f in files.glob("block_*.json") if f.stem[6:].isdecimal())
    if not numbers:
        raise ConfigError("run", f"{folder} holds no ratings/block_0.json", "name the folder of a rated run")
    ratings = [_read_rating(files / f"block_{block}.json", block, score) for block in range(numbers[-1] + 1)]
    names = sorted({rating.score for rating in ratings})
    if len(names) > 1:
        raise ConfigError(
            "score",
            f"the blocks of {folder} were rated by different scores",
            f"choose one of {', '.join(names)}, or rate again with bossnas rate {folder}",
        )
    if len({rating.better for rating in ratings}) > 1:
        raise ConfigError(
            "run",
            f"the blocks of {folder} disagree whether a lower {names[0]} is better",
            f"rate again with bossnas rate {folder}",
        )
    return ratings


def read_winners(folder: Path) -> list[str]:
    """The encoded winners of the blocks that a search has finished. Raises ConfigError where there are none."""
    file = folder / "winners.json"
    try:
        winners = json.loads(file.read_text(encoding="utf-8"))["winners"]
        if not all(isinstance(text, str) and text.isascii() and text.isalnum() for text in winners):
            raise ValueError("a winner is no path")
    except FileNotFoundError:
        winners = []
    except OSError as error:
        raise ConfigError("run", f"cannot read {file} ({error.strerror})", "restore it") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError("run", f"{file} is damaged ({type(error).__name__}: {error})", "restore it") from None
    if not winners:
        raise ConfigError("run", f"{folder} has finished no block", "wait, or go on with its search")
    return winners


def _read_rating(file: Path, block: int, score: str | None) -> BlockRating:
    repair = "rate the block again with bossnas rate RUN"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        name = values["score"] if score is None else score
        tables = values.get("scores") or {values["score"]: values["paths"]}
        better = values.get("better") or {"population_centre": "lower"}
        if name not in tables:
            raise ConfigError("score", f"{file} has no score {name!r}", f"choose one of {', '.join(tables)}")
        groups = values.get("groups")
        parts = None if groups is None else unpacked(groups["means"][name], groups["images"], len(tables[name]))
        chance = values.get("chance", {}).get(name)
        if chance is not None and not abs(chance) < LARGEST:
            raise ValueError(f"chance gives {chance!r}")
        rating = BlockRating(
            block, values["prefix"], name, better[name], tables[name], values["candidates"], parts, chance
        )
        if values["block"] != block or rating.better not in ("lower", "higher") or not rating.scores:
            raise ValueError("it does not describe the ratings of this block")
        if len(rating.prefix) not in (0, block) or not all(p.isascii() and p.isalnum() for p in rating.prefix):
            raise ValueError(f"its prefix is {rating.prefix!r}")
        for path, value in rating.scores.items():
            if not (path.isascii() and path.isalnum()) or isinstance(value, bool) or not abs(value) < LARGEST:
                raise ValueError(f"path {path!r} has the score {value!r}")
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError("run", f"cannot read {file} ({error.strerror})", repair) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # ValueError: of Unicode, too
        raise ConfigError("run", f"{file} is damaged ({type(error).__name__}: {error})", repair) from None
    return rating
