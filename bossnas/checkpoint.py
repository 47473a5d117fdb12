"""Checkpoints of the whole run state that are there entirely or not at all.

``root`` holds nothing else. ``root/name.tmp/`` is written, synced and renamed to ``root/name/``; then the
file ``root/latest`` is replaced, which names it. A kill at any moment leaves the previous checkpoint in
place. ``manifest.json`` holds the size of every file, so that a torn checkpoint is told from a good one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from bossnas import dist
from bossnas.engines.protocol import Engine
from bossnas.errors import ConfigError

STATE, OPTIMIZER, MANIFEST, LATEST = "state.pt", "optimizer.pt", "manifest.json", "latest"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger("bossnas.checkpoint")


def save(root: str | Path, name: str, state: dict, engine: Engine | None, keep: int) -> Path:
    """Writes checkpoint ``name`` and keeps the last ``keep``. All ranks call it; rank 0's ``state`` counts.

    ``state``: nested dicts and lists of tensors, numbers, strings, None. ``engine`` adds its optimizer's
    state. Raises ConfigError on all ranks when the disk is full or cannot be written; the older checkpoints
    then stay.
    """
    root = Path(root)
    assert name not in (LATEST, "") and not name.endswith((".tmp", ".old")) and Path(name).name == name, name
    temporary = root / f"{name}.tmp"
    with _together(root, temporary):
        if dist.rank() == 0:
            _clean(root)
            temporary.mkdir(parents=True)
    with _together(root, temporary):
        if engine is not None:
            optimizer = engine.state()
            if dist.rank() == 0:
                torch.save({name: tensor.cpu().clone() for name, tensor in optimizer.items()}, temporary / OPTIMIZER)
    with _together(root, temporary):
        if dist.rank() == 0:
            with open(temporary / STATE, "wb") as file:
                torch.save(state, file)
            _publish(root, name, temporary, keep)
    return root / name


def latest(root: str | Path) -> Path | None:
    """The checkpoint to go on from: the one that ``latest`` names, else the newest whole one, else None."""
    root = Path(root)
    candidates = _by_age(root)
    with contextlib.suppress(FileNotFoundError):
        candidates.append(root / (root / LATEST).read_text(encoding="utf-8").strip())
    for path in reversed(candidates):
        damage = _damage(path)
        if damage is None:
            return path
        _log.warning("checkpoint %s is passed over: %s", path, damage)
    return None


def load(path: str | Path) -> dict:
    """The state of checkpoint ``path``, on the CPU. Raises ConfigError when it is missing or torn.

    Nothing but plain data is unpickled. The engine's part is read by `load_engine`.
    """
    path = Path(path)
    damage = _damage(path)
    if damage is None:
        try:
            return torch.load(path / STATE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            damage = f"{STATE} cannot be read ({str(error).splitlines()[0]})"
    raise ConfigError(
        "out",
        f"checkpoint {path} is unusable: {damage}",
        "remove that folder to go on from the checkpoint before it, or choose a new out",
    )


def load_engine(path: str | Path, engine: Engine) -> None:
    """Gives the engine the optimizer's state of checkpoint ``path``. Raises ConfigError if it is another model's."""
    state = torch.load(Path(path) / OPTIMIZER, map_location="cpu", weights_only=True)
    try:
        engine.load(state)
    except ValueError as error:
        raise ConfigError("out", f"{path} does not fit this run ({error})",
                          "go on with the config of that run, or choose another folder") from None


def require_room(root: str | Path, bytes_needed: int) -> None:
    """Raises ConfigError unless the disk that holds ``root`` has ``bytes_needed`` bytes free."""
    place = Path(root).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        raise ConfigError(
            "out",
            f"no room in {place}: {free / 2**30:.2f} GiB are free, the run needs "
            f"{bytes_needed / 2**30:.2f} GiB",
            "free some space or choose another disk",
        )


@contextlib.contextmanager
def _together(root: Path, temporary: Path) -> Any:
    """Runs a part of a save. If it fails on one rank it fails on all, and no rank is left waiting."""
    error: BaseException | None = None
    try:
        yield
    except (OSError, RuntimeError) as caught:
        error = caught
    if not dist.any_rank(error is not None):
        return
    if dist.rank() == 0:
        _remove(temporary)
    number = _errno(error)
    number = max(
        [int(code) for code in dist.all_gather(torch.tensor(number))]
    )  # the rank that failed says why
    if number in _NO_ROOM:
        raise ConfigError(
            "out",
            f"no room on the disk of {root}, the checkpoint was not written",
            "free some space and start again: the run goes on from the last checkpoint",
        ) from error
    if number:
        raise ConfigError(
            "out", f"cannot write to {root} ({os.strerror(number)})", "choose a folder that can be written"
        ) from error
    raise RuntimeError("the checkpoint failed on another rank") if error is None else error


def _errno(error: BaseException | None) -> int:
    """The system's error number behind ``error``; torch.save turns an OSError into a RuntimeError."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno or 0
        error = error.__cause__ or error.__context__
    return 0


def _clean(root: Path) -> None:
    """Mends what a kill left behind."""
    for left_over in root.glob("*.tmp"):
        _remove(left_over)
    for old in root.glob("*.old"):  # killed while a checkpoint of the same name was replaced
        if _damage(old.with_suffix("")) is None:
            _remove(old)
        else:
            _remove(old.with_suffix(""))
            old.rename(old.with_suffix(""))


def _publish(root: Path, name: str, temporary: Path, keep: int) -> None:
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files}
    older = _by_age(root)
    order = 1 + max((_manifest(path).get("order", 0) for path in older), default=0)
    _write(temporary / MANIFEST, json.dumps({"order": order, "files": sizes}, indent=2))
    for path in [*files, *{path.parent for path in files}]:
        _sync(path)
    final = root / name
    if final.exists():  # written again after a resume
        final.rename(root / f"{name}.old")
    temporary.rename(final)
    _sync(root)
    _write(root / f"{LATEST}.tmp", name + "\n")
    os.replace(root / f"{LATEST}.tmp", root / LATEST)
    _sync(root)
    _remove(root / f"{name}.old")
    others = [path for path in older if path != final]
    for path in others[: max(len(others) - (keep - 1), 0)]:
        _remove(path)


def _by_age(root: Path) -> list[Path]:
    """Folders with a manifest, oldest first."""
    found = [
        (int(_manifest(path.parent).get("order", 0)), path.parent)
        for path in root.glob(f"*/{MANIFEST}")
        if path.parent.suffix != ".tmp"
    ]
    return [path for _, path in sorted(found)]


def _manifest(path: Path) -> dict:
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _damage(path: Path) -> str | None:
    """What is wrong with checkpoint ``path``, None if nothing."""
    if not path.is_dir():
        return "there is no such folder"
    sizes = _manifest(path).get("files")
    if not isinstance(sizes, dict) or STATE not in sizes:
        return f"{MANIFEST} is missing or damaged"
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            return f"{name} has {'no' if found is None else found} bytes, {size} were written"
    return None


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
