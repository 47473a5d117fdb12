"""Checkpoints of a run that are there entirely or not at all, written by any number of ranks, read by any other.

``root`` holds nothing else. A checkpoint is the folder ``root/name/`` with the tensors in the files of
torch.distributed.checkpoint (DCP), of which each rank writes a share, ``state.json``, and ``manifest.json``: size and
CRC-32 of every file. It is written as ``root/name.tmp/``, synced and renamed; then the file ``root/latest`` is
replaced, which names it. A kill at any moment leaves the previous checkpoint in place.

Nothing is unpickled freely: state and manifest are JSON, tensors are read as plain data, and DCP's index may hold
nothing but DCP's own records.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from bossnas.distributed import dist
from bossnas.distributed.engines.protocol import Engine
from bossnas.errors import ConfigError
from bossnas.files import sync, write_text
from bossnas.runs import tensorfiles

T = TypeVar("T")
FORMAT = 2
STATE, MANIFEST, LATEST = "state.json", "manifest.json", "latest"
_OLD_STATE = "state.pt"  # of format 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger("bossnas.runs.checkpoint")


class Saver:
    """Writes the checkpoints of one run into ``root`` and keeps the last ``keep`` of them.

    All ranks make it and call its methods at the same time. ``asynchronous``: `save` copies the tensors to the CPU's
    memory and returns; a thread writes them, whose messages run in a group of ranks of its own. One save is under way
    at a time. An error of it is raised by the next `save` or `wait`, on all ranks alike.
    """

    def __init__(self, root: str | Path, keep: int, asynchronous: bool = True):
        self.root, self.keep, self.asynchronous = Path(root), keep, asynchronous
        self._group: Any = torch_dist.new_group(backend="gloo") if dist.world_size() > 1 else None
        self._stager = DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._checked = False  # the checkpoints that were there before

    def save(self, name: str, tensors: dict[str, Tensor], state: dict) -> None:
        """Writes checkpoint ``name``.

        ``tensors``: by name, this rank's; a name that several ranks have means the same tensor, plain, or a DTensor of
        which each holds its share. ``state``: what JSON can hold; rank 0's counts. Raises ConfigError on all ranks
        when the disk is full or cannot be written; the older checkpoints then stay.
        """
        assert name not in (LATEST, "") and not name.endswith((".tmp", ".old")) and Path(name).name == name, name
        self.wait()
        text = json.dumps({"format": FORMAT, **state}, indent=2)
        if not self.asynchronous:
            self._write(name, tensors, text)
            return
        staged = self._stager.stage(tensors)
        self._thread = threading.Thread(
            target=self._in_background, args=(name, staged, text), daemon=True, name="checkpoint"
        )  # a daemon: the end of the process never waits for it
        self._thread.start()

    def wait(self) -> None:
        """Returns when no save is under way; raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits without raising: for the way out, also after an error."""
        try:
            self.wait()
        except Exception as error:
            _log.error("%s", error)
        self._stager.close()

    def _in_background(self, name: str, tensors: dict[str, Tensor], state: str) -> None:
        try:
            self._write(name, tensors, state)
        except BaseException as error:
            self._error = error

    def _write(self, name: str, tensors: dict[str, Tensor], state: str) -> None:
        main, temporary = dist.rank() == 0, self.root / f"{name}.tmp"

        def begin() -> None:
            if main:
                _clean(self.root)
                temporary.mkdir(parents=True)
                _write(temporary / STATE, state)

        def checksums() -> dict[str, list[int]]:
            own = [path.name for path in temporary.glob(f"__{dist.rank()}_*")]
            return {name: _fingerprint(temporary / name) for name in own + [tensorfiles.INDEX, STATE] * main}

        self._phase(temporary, begin)
        self._phase(temporary, lambda: tensorfiles.write(temporary, tensors, self._group))
        files = {file: seen for part in self._phase(temporary, checksums) for file, seen in part.items()}
        self._phase(temporary, lambda: self._publish(name, temporary, files) if main else None)

    def _phase(self, temporary: Path, function: Callable[[], T]) -> list[T]:
        """What ``function`` gives on each rank. If it fails on one it fails on all, and no rank is left waiting."""
        result, failure = None, None
        try:
            result = function()
        except tensorfiles.FAILURES as error:
            failure = (tensorfiles.errno_of(error), tensorfiles.text_of(error))
        everyone: list[Any] = [(result, failure)]
        if self._group is not None:
            everyone = [None] * dist.world_size()
            torch_dist.all_gather_object(everyone, (result, failure), group=self._group)
        failures = [failure for _, failure in everyone if failure is not None]
        if not failures:
            return [result for result, _ in everyone]
        if dist.rank() == 0:
            with contextlib.suppress(OSError):
                _remove(temporary)
        number, text = max(failures)  # the rank with the system's error says why
        if number in _NO_ROOM:
            raise ConfigError(
                "out",
                f"no room on the disk of {self.root}, the checkpoint was not written",
                "free some space and start again: the run goes on from the last checkpoint",
            )
        if number:
            raise ConfigError(
                "out",
                f"cannot write to {self.root} ({os.strerror(number)})",
                "choose a folder that exists and can be written",
            )
        raise RuntimeError(f"the checkpoint {temporary} failed: {text}")

    def _publish(self, name: str, temporary: Path, files: dict[str, list[int]]) -> None:
        for file, (size, _) in files.items():
            if not (temporary / file).is_file() or (temporary / file).stat().st_size != size:
                raise ConfigError(
                    "out",
                    f"rank 0 does not see the {file} that another rank wrote to {self.root}",
                    "choose a folder that all nodes share",
                )
        # it would push a whole one out. Once only: this reads every byte, and what this saver wrote is whole
        if not self._checked:  # a damaged one is not counted among those that are kept
            for path in _by_age(self.root):
                if (damage := find_damage(path)) is not None:
                    _log.warning("checkpoint %s is removed: %s", path, damage)
                    _remove(path)
            self._checked = True
        older, final = _by_age(self.root), self.root / name
        order = 1 + max((_manifest(path).get("order", 0) for path in older), default=0)
        # one by one, each synced: files, their folder, its name, the pointer; older ones go last. A kill in between
        # leaves a .tmp that nobody reads, or a whole checkpoint that `latest` does not name yet
        _write(temporary / MANIFEST, json.dumps({"order": order, "files": files}, indent=2))
        sync(temporary)
        if final.exists():  # written again after a resume
            # rename does not replace a folder with files in it; killed here, `_by_age` finds .old and `_clean` mends it
            final.rename(self.root / f"{name}.old")
        temporary.rename(final)
        sync(self.root)
        _point(self.root, name)
        _remove(self.root / f"{name}.old")
        others = [path for path in older if path != final]
        for path in others[: max(len(others) - (self.keep - 1), 0)]:
            _remove(path)


def latest(root: str | Path) -> Path | None:
    """The checkpoint to go on from: the one that ``latest`` names, else the newest whole one; None if there is none.

    Raises ConfigError if there are some, but all are damaged or of an earlier version.
    """
    root = Path(root)
    candidates = _by_age(root)
    with contextlib.suppress(FileNotFoundError):
        named = root / (root / LATEST).read_text(encoding="utf-8").strip()
        candidates = [path for path in candidates if path != named] + [named]
    damage = None
    for path in reversed(candidates):
        damage = find_damage(path)
        if damage is None:
            return path
        _log.warning("checkpoint %s is passed over: %s", path, damage)
    if damage is not None:
        raise unusable(path, damage)
    return None


def whole(folder: Path) -> Path | None:
    """``folder`` itself if it is a checkpoint, else the `latest` of the run in ``folder``. Raises ConfigError if it is
    damaged."""
    if not (folder / MANIFEST).exists():
        return latest(folder / "checkpoints")
    if (damage := find_damage(folder)) is not None:
        raise unusable(folder, damage)
    return folder


def find_damage(path: Path) -> str | None:
    """What is wrong with checkpoint ``path``, None if nothing. Reads all of it."""
    if not path.is_dir():
        return "there is no such folder"
    files = _manifest(path).get("files", {})
    if (path / _OLD_STATE).exists():
        return "it is of an earlier version of bossnas, which this one cannot read"
    if not {STATE, tensorfiles.INDEX} <= files.keys():
        return f"{MANIFEST} is missing or damaged"
    try:
        for name, (size, checksum) in files.items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                return f"{name} has {'no' if found is None else found} bytes, {size} were written"
            if _fingerprint(path / name)[1] != checksum:
                return f"{name} has changed since it was written (its checksum differs)"
        values = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        return f"it cannot be read ({error})"
    if values.get("format") != FORMAT:
        return f"its format is {values.get('format')}, this version of bossnas reads {FORMAT}"
    return None


def unusable(path: Path, damage: str) -> ConfigError:
    """The error of a checkpoint with that damage."""
    return ConfigError(
        "out", f"checkpoint {path} is unusable: {damage}", "name a whole one as `resume`, or choose a new out"
    )


def read_state(path: Path) -> dict:
    """What `Saver.save` was given as state, of a checkpoint without damage."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fills ``tensors``, plain or DTensors, with those of the same names; no other rank is needed.

    The checkpoint has no damage (`find_damage`). Raises ConfigError where it lacks one or has it in another shape.
    """
    try:
        tensorfiles.read_into(path, tensors)
    except tensorfiles.FAILURES as error:
        if tensorfiles.errno_of(error):
            raise unusable(path, f"it cannot be read ({tensorfiles.text_of(error)})") from None
        raise _misfit(path, tensorfiles.text_of(error)) from None


def read(path: Path, kinds: Collection[str]) -> dict[str, Tensor]:
    """All tensors whose names begin with one of ``kinds`` and a dot, on the CPU, of a checkpoint without damage."""
    tensors = {
        name: torch.empty(shape, dtype=dtype)
        for name, (shape, dtype) in _index(path).items()
        if name.partition(".")[0] in kinds
    }
    load(path, tensors)
    return tensors


def momentum(block: int, engine: Engine) -> dict[str, Tensor]:
    """The state of the engine's optimizer by the names that it has in a checkpoint."""
    return {f"momentum.{block}.{name}": tensor for name, tensor in engine.state().items()}


def load_engine(path: Path, block: int, engine: Engine) -> None:
    """Gives the engine of ``block`` the state that its optimizer has in checkpoint ``path``, on whatever engine and
    number of ranks it was saved. Raises ConfigError if it is another model's."""
    needed = momentum(block, engine)
    held = {name for name in _index(path) if name.startswith(f"momentum.{block}.")}
    if held != needed.keys():
        raise _misfit(path, f"of block {block}'s optimizer it has {len(held)} tensors, {len(needed)} are needed")
    tensors = {name: torch.empty_like(tensor) for name, tensor in needed.items()}
    load(path, tensors)
    engine.load({name.removeprefix(f"momentum.{block}."): tensor for name, tensor in tensors.items()})


def newer(path: Path) -> list[Path]:
    """The checkpoints of its folder that were written after ``path``, which has no damage."""
    order = _manifest(path)["order"]
    # one whose manifest is damaged has no order: it is passed over where a run goes on, and removed by the next save
    return [other for other in _by_age(path.parent) if _manifest(other).get("order", 0) > order]


def rewind(path: Path) -> list[str]:
    """Makes checkpoint ``path`` the latest of its folder and removes the newer ones; returns their names."""
    removed = newer(path)
    _point(path.parent, path.name)
    for other in removed:
        _remove(other)
    return [other.name for other in removed]


def copy(path: Path, root: Path) -> None:
    """Makes a copy of checkpoint ``path`` the only one in ``root``."""
    root.mkdir(parents=True)
    shutil.copytree(path, root / f"{path.name}.tmp")
    for file in (root / f"{path.name}.tmp").iterdir():
        sync(file)
    (root / f"{path.name}.tmp").rename(root / path.name)
    _point(root, path.name)


def require_room(root: str | Path, bytes_needed: int) -> None:
    """Raises ConfigError unless the disk that holds ``root`` has ``bytes_needed`` bytes free."""
    place = Path(root).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        raise ConfigError(
            "out",
            f"no room in {place}: {free / 2**30:.2f} GiB are free, the run needs {bytes_needed / 2**30:.2f} GiB",
            "free some space or choose another disk",
        )


def _index(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    try:
        return tensorfiles.index(path)
    except Exception as error:
        raise unusable(path, f"its index cannot be read ({tensorfiles.text_of(error)})") from None


def _misfit(path: Path, why: str) -> ConfigError:
    return ConfigError(
        "out",
        f"checkpoint {path} does not fit this run ({why})",
        "go on with the config of that run, or choose another folder with `out`",
    )


def _clean(root: Path) -> None:
    """Mends what a kill left behind."""
    for left_over in root.glob("*.tmp"):
        _remove(left_over)
    for old in root.glob("*.old"):  # killed while a checkpoint of the same name was replaced
        if find_damage(old.with_suffix("")) is None:
            _remove(old)
        else:
            _remove(old.with_suffix(""))
            old.rename(old.with_suffix(""))


def _by_age(root: Path) -> list[Path]:
    """Folders with a manifest, oldest first."""
    found = [
        (_manifest(path.parent).get("order", 0), path.parent)
        for path in root.glob(f"*/{MANIFEST}")
        if path.parent.suffix != ".tmp"
    ]
    return [path for _, path in sorted(found)]


def _manifest(path: Path) -> dict:
    """``order``: number of the save; ``files``: name -> [bytes, CRC-32]. {} if it is missing or damaged."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        sound = isinstance(content["order"], int) and isinstance(content["files"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return content if sound else {}


def _fingerprint(path: Path) -> list[int]:
    """Bytes and CRC-32 of a file."""
    size, checksum = 0, 0
    with open(path, "rb") as file:
        while piece := file.read(2**22):
            size, checksum = size + len(piece), zlib.crc32(piece, checksum)
    return [size, checksum]


def _point(root: Path, name: str) -> None:
    write_text(root / LATEST, name + "\n")
    sync(root)


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
