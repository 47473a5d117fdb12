"""Search spaces, chosen by name or from a file of one's own."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bossnas.errors import ConfigError
from bossnas.spaces.paths import MAX_CANDIDATES
from bossnas.spaces.space import Space, Traits, Words, traits

__all__ = ["Space", "Traits", "Words", "known", "make", "recognise", "traits"]


def known() -> dict[str, type]:
    """The classes of the built-in spaces by name."""
    from bossnas.spaces import hytra, mbconv, nats

    return {"hytra": hytra.HyTra, "mbconv": mbconv.MBConv, "nats": nats.Nats}


def recognise(lengths: Sequence[int]) -> tuple[str, dict[str, Any]] | None:
    """Name and options of the built-in space whose blocks have these numbers of layers; None if there is none."""
    for name, kind in known().items():
        for options in traits(kind).variants:
            space = kind(**options)
            if [space.layers(block) for block in range(space.blocks)] == list(lengths):
                return name, options
    return None


def make(name: str, *, width: float = 1.0, image_size: int, **options: Any) -> Space:
    """Builds a space from the values of the config's section. ``path/to/file.py:Class`` loads a space of one's own,
    built with ``width``. ``options``: the section's other keys, of which a space takes its own; the others must have
    their default.

    Raises ConfigError for an unknown name or an image too small for the space's scales.
    """
    kind = known().get(name)
    if kind is None and ".py:" not in name:
        raise ConfigError(
            "space.name", f"there is no space {name!r}", f"choose {', '.join(known())} or path/to/file.py:ClassName"
        )
    takes = traits(kind).options if kind is not None else {}
    defaults = {key: value for other in known().values() for key, value in traits(other).options.items()}
    for key, value in options.items():
        if key not in takes and value != defaults[key]:
            raise ConfigError(f"space.{key}", f"does nothing for {name}", "leave it out")
    if kind is None:
        space = _own(name, width)
    else:
        space = kind(width, **{key: options[key] for key in takes if key in options})
    most = max(len(space.candidates(block)) for block in range(space.blocks))
    if most > MAX_CANDIDATES:
        raise ConfigError("space.name", f"{name} has {most} candidates in a layer", f"use at most {MAX_CANDIDATES}")
    if image_size < space.stride:
        raise ConfigError(
            "space.image_size",
            f"{image_size} px leaves no pixel at the last scale of {name}",
            f"use at least {space.stride}",
        )
    return space


def _own(name: str, width: float) -> Space:
    file, _, attribute = name.rpartition(":")
    if not Path(file).is_file():
        raise ConfigError("space.name", f"there is no file {file}", "name a Python file as path/to/file.py:ClassName")
    spec = importlib.util.spec_from_file_location(f"bossnas_own_space_{Path(file).stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError("space.name", f"{file} is no Python file", "name one as path/to/file.py:ClassName")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    cls = getattr(module, attribute, None)
    if cls is None:
        raise ConfigError("space.name", f"{file} defines no {attribute}", "name a class of that file")
    space = cls(width=width)
    wanted = [m for m, _ in inspect.getmembers(Space, inspect.isfunction) if not m.startswith("_")]
    missing = [m for m in [*wanted, "blocks", "view_pairs", "stride"] if not hasattr(space, m)]
    if missing:
        raise ConfigError("space.name", f"{attribute} lacks {', '.join(missing)}", "see docs/own_space.md")
    return space
