"""The run folder: which run it holds, and its JSON files (ratings, winners, architecture), each written atomically."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bossnas
from bossnas.config import C, Config, RunConfig, dump, validate
from bossnas.errors import ConfigError

LARGEST = 1e300  # scores below it add up to a finite number
# What may change between a run and its continuation, since results do not depend on it; "engine.": all of that section.
FREE = ("data.workers", "data.retries", "data.timeout_s", "data.allow_pipe", "train.activation_checkpointing",
        "train.channels_last", "train.compile", "train.fused", "rating.max_gib", "evaluate.batch", "engine.",
        "checkpoint.", "out")


def claim(config: RunConfig, resume: bool) -> Path:
    """Makes the folder ready for this run and returns it. Raises ConfigError if it holds another run."""
    folder = Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError("out", f"{folder} is a file", "name a folder")
    if (folder / "config.json").exists():
        check_same(folder, config)
        if not resume:
            raise ConfigError("out", f"{folder} already holds this run",
                              "go on with --resume auto, or choose another folder with --set out=FOLDER")
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError("out", f"{folder} is not empty and holds no run", "choose another folder")
    return folder


def check_same(folder: Path, config: RunConfig, field: str = "out") -> None:
    """Raises ConfigError unless ``folder`` holds such a run with this config, but for what may change (FREE)."""
    fix = "choose another folder with --set out=FOLDER" if field == "out" else "give it the config of that run"
    if (kind := kind_of(folder)) != config.kind:
        raise ConfigError(field, f"{folder} holds a {kind}", fix)
    old = read_config(folder, type(config))
    changed = _differences(old, config)
    if changed == ["schedule"]:
        raise ConfigError("schedule", f"is {config.schedule}, but the run in {folder} began with {old.schedule}, and "
                          "what it has trained depends on it", f"set it to {old.schedule}, or {fix}")
    if changed:
        raise ConfigError(field, f"{folder} holds another run ({', '.join(changed)} differ)", fix)


def prepare(folder: Path, config: RunConfig, kind: str | None = None) -> None:
    """Writes the resolved config, the versions and the kind of run (None: the config's) into the claimed folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("out", f"cannot make {folder} ({error.strerror})", "choose another folder") from None
    write_text(folder / "config.json", dump(config))
    if isinstance(config, Config):
        (folder / "ratings").mkdir(exist_ok=True)
    write_json(folder / "versions.json", {"kind": kind or config.kind, **_versions()})


def read_config(folder: Path, schema: type[C] = Config) -> C:
    """The config of the run in ``folder``. Raises ConfigError when there is none, or one of another kind."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError("--run", f"{folder} holds no config.json", "name the folder of a run") from None
    except OSError as error:
        raise ConfigError("--run", f"cannot read {folder}/config.json ({error.strerror})", "restore it") from None
    except (ValueError, RecursionError) as error:  # ValueError: of json and of Unicode
        raise ConfigError("--run", f"{folder}/config.json is damaged ({error})", "restore it") from None
    if (schema.kind == "retraining") != ((kind := kind_of(folder)) == "retraining"):
        raise ConfigError("--run", f"{folder} holds a {kind}", f"name the folder of a {schema.kind}")
    return validate(values, schema)


@dataclass(frozen=True)
class BlockRating:
    """One score of every rated path of a block."""

    block: int
    prefix: list[str]  # the encoded winners of the blocks before, on whose features the block was rated, or nothing
    score: str
    better: str  # lower | higher
    scores: dict[str, float]  # encoded path -> value
    candidates: list[str]  # names by candidate id


def read_ratings(folder: Path, score: str | None = None) -> list[BlockRating]:
    """The ratings of a run's blocks, ratings/block_0.json and so on, as far as they go.

    ``score`` names one of the scores that the files hold; default: the one the run chose by. Raises ConfigError when a
    file is missing or damaged, lacks the score or holds a value that is not finite, or the blocks' scores differ or
    disagree about which value is better.
    """
    files = folder / "ratings"
    numbers = sorted(int(f.stem[6:]) for f in files.glob("block_*.json") if f.stem[6:].isdecimal())
    if not numbers:
        raise ConfigError("RUN", f"{folder} holds no ratings/block_0.json", "name the folder of a rated run")
    ratings = [_read_rating(files / f"block_{block}.json", block, score) for block in range(numbers[-1] + 1)]
    names = sorted({rating.score for rating in ratings})
    if len(names) > 1:
        raise ConfigError("--score", f"the blocks of {folder} were rated by different scores", "choose one of "
                          f"{', '.join(names)}, or rate again with bossnas rate {folder}")
    if len({rating.better for rating in ratings}) > 1:
        raise ConfigError("RUN", f"the blocks of {folder} disagree whether a lower {names[0]} is better",
                          f"rate again with bossnas rate {folder}")
    return ratings


def _read_rating(file: Path, block: int, score: str | None) -> BlockRating:
    repair = "rate the block again with bossnas rate RUN"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        name = values["score"] if score is None else score
        tables = values.get("scores") or {values["score"]: values["paths"]}
        better = values.get("better") or {"population_centre": "lower"}
        if name not in tables:
            raise ConfigError("--score", f"{file} has no score {name!r}", f"choose one of {', '.join(tables)}")
        rating = BlockRating(block, values["prefix"], name, better[name], tables[name], values["candidates"])
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
        raise ConfigError("RUN", f"cannot read {file} ({error.strerror})", repair) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # ValueError: of Unicode, too
        raise ConfigError("RUN", f"{file} is damaged ({type(error).__name__}: {error})", repair) from None
    return rating


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces the file in one step: a reader sees the old or the new text, never a half."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def open_to_others(path: Path) -> None:
    """Gives a new file the permissions of any other; safetensors writes files for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def kind_of(folder: Path) -> str:
    """What the run in ``folder`` is: search, retraining, or another kind that `prepare` was told."""
    try:
        return json.loads((folder / "versions.json").read_text(encoding="utf-8")).get("kind", "search")
    except (OSError, json.JSONDecodeError):
        return "search"


def _differences(old: RunConfig, new: RunConfig) -> list[str]:
    a, b = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    changed = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return [key for key in changed if key not in FREE and f"{key.partition('.')[0]}." not in FREE]


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _versions() -> dict[str, str | None]:
    packages: dict[str, str | None] = {}
    for name in ("torch", "torchvision", "triton", "deepspeed", "webdataset", "timm", "numpy", "apex"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    git = subprocess.run(["git", "-C", str(Path(bossnas.__file__).parent), "rev-parse", "HEAD"], capture_output=True,
                         text=True, check=False)
    return {"bossnas": bossnas.__version__, "git": git.stdout.strip() or None, "python": platform.python_version(),
            "platform": platform.platform(), **packages}
