"""The run folder: which run it holds, and its JSON files (ratings, winners, architecture), each written atomically."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, overload

import bossnas
from bossnas.config.loading import C, dump, validate
from bossnas.config.search import Config
from bossnas.config.shared import RunConfig
from bossnas.errors import ConfigError
from bossnas.files import remove_drafts, write_json, write_text

# What may change between a run and its continuation, since results do not depend on it; "engine.": all of that section.
FREE = (
    "data.workers",
    "data.retries",
    "data.timeout_s",
    "data.allow_pipe",
    "train.activation_checkpointing",
    "train.channels_last",
    "train.compile",
    "train.fused",
    "rating.max_gib",
    "evaluate.batch",
    "engine.",
    "checkpoint.",
    "out",
)


def claim_folder(config: RunConfig, resume: bool) -> Path:
    """Makes the folder ready for this run and returns it. Raises ConfigError if it holds another run."""
    folder = Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError("out", f"{folder} is a file", "name a folder")
    if (folder / "config.json").exists():
        check_same(folder, config)
        if not resume:
            raise ConfigError(
                "out",
                f"{folder} already holds this run",
                "go on with `resume` auto, or choose another folder with `out`",
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError("out", f"{folder} is not empty and holds no run", "choose another folder with `out`")
    return folder


def check_same(folder: Path, config: RunConfig, field: str = "out") -> None:
    """Raises ConfigError unless ``folder`` holds such a run with this config, but for what may change (FREE)."""
    fix = "choose another folder with `out`" if field == "out" else "give it the config of that run"
    if (kind := kind_of(folder)) != config.kind:
        raise ConfigError(field, f"{folder} holds a {kind}", fix)
    old = read_config(folder, type(config))
    changed = _differences(old, config)
    if changed == ["schedule"]:
        assert isinstance(config, Config) and isinstance(old, Config), "a search alone has a schedule"
        raise ConfigError(
            "schedule",
            f"is {config.schedule}, but the run in {folder} began with {old.schedule}, and "
            "what it has trained depends on it",
            f"set it to {old.schedule}, or {fix}",
        )
    if changed:
        raise ConfigError(field, f"{folder} holds another run ({', '.join(changed)} differ)", fix)


def prepare_folder(folder: Path, config: RunConfig, kind: str | None = None) -> None:
    """Writes the resolved config, the versions and the kind of run (None: the config's) into the claimed folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "out", f"cannot make {folder} ({error.strerror})", "choose another folder with `out`"
        ) from None
    remove_drafts(folder)
    remove_drafts(folder / "ratings")
    write_text(folder / "config.json", dump(config))
    if isinstance(config, Config):
        (folder / "ratings").mkdir(exist_ok=True)
    write_json(folder / "versions.json", {"kind": kind or config.kind, **_versions()})


@overload
def read_config(folder: Path) -> Config: ...


@overload
def read_config(folder: Path, schema: type[C]) -> C: ...


def read_config(folder: Path, schema: type[RunConfig] = Config) -> RunConfig:
    """The config of the run in ``folder``. Raises ConfigError when there is none, or one of another kind."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError("run", f"{folder} holds no config.json", "name the folder of a run") from None
    except OSError as error:
        raise ConfigError("run", f"cannot read {folder}/config.json ({error.strerror})", "restore it") from None
    except (ValueError, RecursionError) as error:  # ValueError: of json and of Unicode
        raise ConfigError("run", f"{folder}/config.json is damaged ({error})", "restore it") from None
    if (schema.kind == "retraining") != ((kind := kind_of(folder)) == "retraining"):
        raise ConfigError("run", f"{folder} holds a {kind}", f"name the folder of a {schema.kind}")
    return validate(values, schema)


def kind_of(folder: Path) -> str:
    """What the run in ``folder`` is: search, retraining, or another kind that `prepare_folder` was told."""
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
    git = subprocess.run(
        ["git", "-C", str(Path(bossnas.__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "bossnas": bossnas.__version__,
        "git": git.stdout.strip() or None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **packages,
    }
