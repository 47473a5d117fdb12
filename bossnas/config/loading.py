"""Reads configs: JSON or YAML, overrides, validation with one line for each mistake."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, overload

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from bossnas.config.search import Config
from bossnas.config.shared import RunConfig
from bossnas.errors import ConfigError

C = TypeVar("C", bound=RunConfig)
SECTIONS_OF = (("model", "augment", "evaluate"), ("space", "heads", "rating", "schedule"))  # a retraining's, a search's


@overload
def load(path: str | Path | None, overrides: list[str] | None = None) -> Config: ...


@overload
def load(path: str | Path | None, overrides: list[str] | None = None, *, schema: type[C]) -> C: ...


@overload
def load(path: str | Path | None, overrides: list[str] | None, schema: type[C]) -> C: ...


def load(path: str | Path | None, overrides: list[str] | None = None, schema: type[RunConfig] = Config) -> RunConfig:
    """Reads a JSON or YAML config, applies ``a.b=value`` overrides (values are YAML) and validates.

    Raises ConfigError that names the field and the fix. ``path=None`` starts from the defaults. ``schema``: of a
    search, or RetrainConfig.
    """
    values = {} if path is None else _read(Path(path))
    for override in overrides or []:
        _apply(values, override)
    return validate(values, schema)


def override(config: C, overrides: Sequence[str]) -> C:
    """The config with ``a.b=value`` overrides applied and validated."""
    values = config.model_dump(mode="json")
    for text in overrides:
        _apply(values, text)
    return validate(values, type(config))


@overload
def validate(values: dict) -> Config: ...


@overload
def validate(values: dict, schema: type[C]) -> C: ...


def validate(values: dict, schema: type[RunConfig] = Config) -> RunConfig:
    """Validates plain values. Raises ConfigError on the first mistake."""
    try:
        config = schema.model_validate(values)
    except ValidationError as error:
        of_other = [
            e["loc"][0]
            for e in error.errors()
            if e["type"] == "extra_forbidden"
            and len(e["loc"]) == 1
            and e["loc"][0] in SECTIONS_OF[schema.kind != "search"]
        ]
        if of_other:
            raise ConfigError(
                "config",
                f"has the section {of_other[0]!r}, so it is not of a {schema.kind}",
                "search with bossnas search, train a network with bossnas retrain",
            ) from None
        raise _explain(error.errors()[0], schema) from None
    config.check()
    return config


def dump(config: RunConfig) -> str:
    """The resolved config as JSON, every default written out."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def _read(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "config",
            f"cannot read {path} ({getattr(error, 'strerror', None) or error})",
            "name a .json or .yaml file",
        ) from None
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError, RecursionError) as error:
        where = str(error).replace("\n", " ")
        raise ConfigError("config", f"{path} is not valid {path.suffix[1:]} ({where})", "mend the file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError("config", f"{path} holds no mapping of keys", "write sections such as space, data, train")
    values.pop("_comment", None)
    return values


def _apply(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError("overrides", f"{override!r} is not of the form a.b=value", "write for example train.epochs=2")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(key, f"{section} is a value, not a section", "see `bossnas search --help`")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(key, f"cannot read the value {text!r}", "quote it as YAML") from None


def _explain(error: ErrorDetails, schema: type[RunConfig]) -> ConfigError:
    where = ".".join(str(part) for part in error["loc"] if part not in ("str", "list[str]"))
    if error["type"] == "extra_forbidden":
        section: Any = schema
        for part in error["loc"][:-1]:
            kind = section.model_fields[part].annotation
            section = next((of for of in get_args(kind) if of is not type(None)), kind)  # of one that may be null
        names = list(section.model_fields)
        near = difflib.get_close_matches(str(error["loc"][-1]), names, n=1)
        return ConfigError(where, "unknown key", f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}")
    message = error["msg"][0].lower() + error["msg"][1:]
    return ConfigError(where, f"{message}, got {error['input']!r}", "change the value")
