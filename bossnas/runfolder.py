"""The run folder: which run it holds, and its JSON files (ratings, winners, architecture), each written atomically."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bossnas
from bossnas.config import Config, dump, validate
from bossnas.errors import ConfigError

# What may change between a run and its continuation, since results do not depend on it.
FREE = ("data.workers", "checkpoint.every_steps", "checkpoint.keep", "out")


def claim(config: Config, resume: bool) -> Path:
    """Makes the folder ready for this run and returns it. Raises ConfigError if it holds another run."""
    folder = Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError("out", f"{folder} is a file", "name a folder")
    if (folder / "config.json").exists():
        changed = _differences(read_config(folder), config)
        if changed:
            raise ConfigError("out", f"{folder} holds another run ({', '.join(changed)} differ)",
                              "choose another folder with --set out=FOLDER")
        if not resume:
            raise ConfigError("out", f"{folder} already holds this run",
                              "go on with --resume auto, or choose another folder with --set out=FOLDER")
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError("out", f"{folder} is not empty and holds no run", "choose another folder")
    return folder


def prepare(folder: Path, config: Config) -> None:
    """Writes the resolved config and the versions into the claimed folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("out", f"cannot make {folder} ({error.strerror})", "choose another folder") from None
    write_text(folder / "config.json", dump(config))
    (folder / "ratings").mkdir(exist_ok=True)
    write_json(folder / "versions.json", _versions())


def read_config(folder: Path) -> Config:
    """The config of the run in ``folder``. Raises ConfigError when there is none."""
    try:
        return validate(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError("--run", f"{folder} holds no config.json", "name the folder of a run") from None
    except json.JSONDecodeError as error:
        raise ConfigError("--run", f"{folder}/config.json is damaged ({error})", "restore it") from None


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


def _differences(old: Config, new: Config) -> list[str]:
    a, b = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key) and key not in FREE]


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
