"""Shards: WebDataset tars, read by index.

A shard is a plain tar in which the consecutive members ``<key>.<ext>`` make one sample: an image
(jpg, jpeg, png or webp) and, where classes are known, ``<key>.cls`` with the class number in ASCII.
Members with other extensions are passed over: nothing in a shard is ever unpickled or run.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import logging
import lzma
import os
import re
import time
import zipfile
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np

from bossnas.data.images import EXTENSIONS, MAX_BYTES
from bossnas.data.tars import TAR_ERRORS, entries
from bossnas.errors import ConfigError
from bossnas.files import draft

log = logging.getLogger("bossnas.data.shards")
OPENERS: dict[str, Callable[..., Any]] = {".tar": open, ".tar.gz": gzip.open, ".tgz": gzip.open, ".tar.xz": lzma.open}
INDEX_FORMAT = 2
INDEX_THREADS = 8  # they wait for the storage side by side; the parsing itself holds the interpreter's lock
MANY_SHARDS = 20  # from here on the log says that shards are indexed
PROGRESS_SECONDS = 10.0
OPEN_FILES = 128


class ShardIndex:
    """Random access to the samples of local shards, numbered in shard order, then in tar order.

    ``.tar`` shards are read in place. Their index is kept beside them in ``.<shard>.index.npz`` (in the user's
    cache folder where theirs is read-only, in memory where that fails too) and made anew when a shard's size
    or time changes. Compressed shards (``.tar.gz``, ``.tgz``, ``.tar.xz``) are unpacked into the memory of
    every process that reads them, so they suit small sets only. May be pickled and forked; not for several
    threads.
    """

    def __init__(self, shards: list[Path], tables: list[dict[str, np.ndarray]], field: str):
        self.shards, self.field = shards, field
        self._tables = tables
        self._ends = np.cumsum([len(table["offset"]) for table in tables]).tolist()
        self._is_packed = [_kind(shard) != ".tar" for shard in shards]
        self._files: OrderedDict[int, int] = OrderedDict()
        self._memory: dict[int, bytes] = {}

    @classmethod
    def open(cls, pattern: str | list[str], field: str = "data.train") -> ShardIndex:
        """Indexes the shards of a glob, a brace pattern (``train-{000000..000009}.tar``) or a list of these.

        Raises ConfigError that names ``field`` when nothing matches, a shard is missing, damaged or
        without images, or a label is not a number.
        """
        shards = expand(pattern, field)
        cached = [_cached(shard) for shard in shards]
        made = iter(_index_all([shard for shard, table in zip(shards, cached, strict=True) if table is None], field))
        index = cls(shards, [next(made) if table is None else table for table in cached], field)
        log.debug("%s: %d images in %d shards", field, len(index), len(shards))
        return index

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def ends(self) -> list[int]:
        """Of every shard the number after its last sample's."""
        return self._ends

    @property
    def labels(self) -> np.ndarray:
        """Of every sample its label, -1 where there is none: int64."""
        return np.concatenate([table["label"] for table in self._tables])

    def read(self, i: int) -> tuple[bytes, str, int | None]:
        """Sample i: the image's bytes, its extension and its label (None where there is no ``.cls``).

        Of an image above images.MAX_BYTES come MAX_BYTES + 1 bytes, which decode refuses. Raises IndexError,
        and ConfigError when the shard cannot be read or has changed meanwhile.
        """
        shard, row = self._locate(i)
        table = self._tables[shard]
        data = self._bytes(shard, table["offset"].item(row), min(table["size"].item(row), MAX_BYTES + 1))
        label = table["label"].item(row)
        return data, EXTENSIONS[table["ext"].item(row)], None if label < 0 else label

    def key(self, i: int) -> str:
        """The key of sample i: its member's name without the extension."""
        shard, row = self._locate(i)
        ends = self._tables[shard]["key_end"]
        blob = self._tables[shard]["keys"][ends[row - 1] if row else 0 : ends[row]]
        return blob.tobytes().decode("utf-8", "surrogateescape")

    def name(self, i: int) -> str:
        """Where sample i is, for messages: ``<shard file>/<key>``."""
        return f"{self.shards[self._locate(i)[0]]}/{self.key(i)}"

    def close(self) -> None:
        """Closes the open shards; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self):
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": OrderedDict(), "_memory": {}}

    def _locate(self, i: int) -> tuple[int, int]:
        if not 0 <= i < self._ends[-1]:
            raise IndexError(f"sample {i} of {len(self)}")
        shard = bisect_right(self._ends, i)
        return shard, i - self._ends[shard - 1] if shard else i

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        try:
            if self._is_packed[shard]:
                if shard not in self._memory:
                    self._memory[shard] = _unpack(self.shards[shard])
                data = self._memory[shard][offset : offset + size]
            else:
                if shard not in self._files:
                    self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
                    if len(self._files) > OPEN_FILES:
                        os.close(self._files.popitem(last=False)[1])
                self._files.move_to_end(shard)
                # pread, not seek and read: forked workers share the position of a file that was open before
                data = os.pread(self._files[shard], size, offset)
        except TAR_ERRORS as error:
            raise ConfigError(
                self.field, f"{self.shards[shard]} cannot be read ({error})", "restore the shard"
            ) from error
        if len(data) != size:
            raise ConfigError(
                self.field,
                f"{self.shards[shard]} has become shorter since it was indexed",
                "restore the shard and start again",
            )
        return data


def is_remote(pattern: str) -> bool:
    """Whether a shard pattern is a URL (``https://…``, ``s3://…``, ``pipe:…``) rather than a local path."""
    return re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", pattern) is not None


def expand_braces(text: str, field: str) -> list[str]:
    """``a-{0..2}.tar`` -> three names. Raises ConfigError for unbalanced braces."""
    try:
        return list(braceexpand.braceexpand(text))
    except braceexpand.UnbalancedBracesError:  # type: ignore[attr-defined]  # its stubs lack the name
        raise ConfigError(field, f"{text!r} has unbalanced braces", "close them") from None


def expand(pattern: str | list[str], field: str) -> list[Path]:
    """The local shards of a glob, a brace pattern or a list of these; globs are sorted.

    Raises ConfigError when nothing matches or a file is missing, no shard, or listed twice.
    """
    names: list[str] = []
    for text in [pattern] if isinstance(pattern, str) else pattern:
        if is_remote(text):
            raise ConfigError(
                field,
                f"{text!r} is a URL, and data.reader=index reads local shards only",
                "set data.reader=stream, or copy the shards to a disk",
            )
        for name in [text] if os.path.exists(text) else expand_braces(text, field):
            is_glob = glob.has_magic(name) and not os.path.exists(name)
            names += sorted(glob.glob(name)) if is_glob else [name]
    if not names:
        raise ConfigError(field, f"no file matches {pattern!r}", "check the path, or run bossnas pack")
    for name in names:
        if os.path.isdir(name):
            raise ConfigError(field, f"{name} is a folder", f"name its shards, such as '{name}/train-*.tar'")
        if _kind(Path(name)) is None:
            raise ConfigError(field, f"{name} is not a shard", f"name files ending in {', '.join(OPENERS)}")
    missing = [name for name in names if not os.path.exists(name)]
    if missing:
        raise ConfigError(
            field,
            f"{len(missing)} of {len(names)} shards are missing, first {missing[0]}",
            "restore them or correct the pattern",
        )
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(field, f"{twice} is listed more than once", "list every shard once")
    return [Path(name) for name in names]


def index_shard(path: Path, field: str) -> dict[str, np.ndarray]:
    """The index of one shard, taken from its cache when that is valid, else made and cached.

    Columns, one row per sample: offset, size (bytes), label (-1: none), ext (number in EXTENSIONS), key_end; and
    the keys' text. Raises ConfigError as ShardIndex.open.
    """
    if (table := _cached(path)) is not None:
        return table
    if _kind(path) != ".tar":
        return _scan(path, field)
    # before the scan: a shard that changes while it is read has another stamp, and its index is made anew
    stamp = _stamp(path)
    table = _scan(path, field)
    arrays: dict[str, Any] = {"stamp": stamp, **table}
    for cache in _caches(path):
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with draft(cache) as made, open(made, "wb") as file:
                np.savez(file, **arrays)
            return table
        except OSError as error:
            log.debug("the index %s cannot be written (%s)", cache, error)
    log.info("the index of %s stays in memory", path)
    return table


def _kind(path: Path) -> str | None:
    return next((kind for kind in OPENERS if path.name.endswith(kind)), None)


def _unpack(path: Path) -> bytes:
    kind = _kind(path)
    assert kind is not None, "`expand` takes shards alone"
    with OPENERS[kind](path, "rb") as file:
        return file.read()


def _stamp(path: Path) -> np.ndarray:
    stat = path.stat()
    return np.array([INDEX_FORMAT, stat.st_size, stat.st_mtime_ns])


def _caches(path: Path) -> tuple[Path, Path]:
    """Where the index of a shard may lie: beside it, or in the user's cache folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bossnas", "index")
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()
    return path.with_name(f".{path.name}.index.npz"), folder / f"{name}.npz"


def _cached(path: Path) -> dict[str, np.ndarray] | None:
    """The index of a shard if there is a valid one; compressed shards have none."""
    if _kind(path) != ".tar":
        return None
    for cache in filter(os.path.exists, _caches(path)):
        try:
            with np.load(cache, allow_pickle=False) as file:
                table = dict(file)
            if np.array_equal(table.pop("stamp"), _stamp(path)):
                return table
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            log.warning("the index %s is unusable (%s) and is made anew", cache, error)
    return None


def _index_all(shards: list[Path], field: str) -> list[dict[str, np.ndarray]]:
    if len(shards) > MANY_SHARDS:
        log.info("%s: %d shards have no index yet and are indexed", field, len(shards))
    tables, shown = [], time.monotonic()
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        for table in pool.map(lambda shard: index_shard(shard, field), shards):
            tables.append(table)
            if time.monotonic() - shown > PROGRESS_SECONDS:
                log.info("%s: %d of %d shards are indexed", field, len(tables), len(shards))
                shown = time.monotonic()
    return tables


def _scan(path: Path, field: str) -> dict[str, np.ndarray]:
    try:
        file = open(path, "rb") if _kind(path) == ".tar" else io.BytesIO(_unpack(path))
    except TAR_ERRORS as error:
        raise ConfigError(
            field, f"the shard {path} is damaged or cannot be read ({error})", "copy it again or repack it"
        ) from error
    with file:
        rows = list(entries(file, str(path), field, with_data=False))
    keys = [row.key.encode("utf-8", "surrogateescape") for row in rows]
    return {
        "offset": np.array([row.offset for row in rows], np.int64),
        "size": np.array([row.size for row in rows], np.int64),
        "label": np.array([-1 if row.label is None else row.label for row in rows], np.int64),
        "ext": np.array([EXTENSIONS.index(row.ext) for row in rows], np.uint8),
        "keys": np.frombuffer(b"".join(keys), np.uint8),
        "key_end": np.cumsum([len(key) for key in keys]),
    }
