"""Shards: WebDataset tars, read by index.

A shard is a plain tar in which the consecutive members ``<key>.<ext>`` make one sample: an image
(jpg, jpeg, png or webp) and, where classes are known, ``<key>.cls`` with the class number in ASCII.
"""

from __future__ import annotations

import glob
import gzip
import io
import logging
import lzma
import os
import re
import secrets
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import braceexpand
import numpy as np

from bossnas.errors import ConfigError
from bossnas.images import EXTENSIONS

log = logging.getLogger("bossnas.shards")
OPENERS = {".tar": open, ".tar.gz": gzip.open, ".tgz": gzip.open, ".tar.xz": lzma.open}
TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)
INDEX_FORMAT = 1
OPEN_FILES = 128
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")


class ShardIndex:
    """Random access to the samples of local shards, numbered in shard order, then in tar order.

    ``.tar`` shards are read in place. Their index is kept beside them in ``.<shard>.index.npz`` (or in
    memory where the folder is read-only) and made anew when a shard's size or time changes. Compressed
    shards (``.tar.gz``, ``.tgz``, ``.tar.xz``) are unpacked into the memory of every process that reads
    them, so they suit small sets only. May be pickled and forked; not for several threads.
    """

    def __init__(self, shards: list[Path], tables: list[dict[str, np.ndarray]], field: str):
        self.shards, self.field = shards, field
        self._tables = tables
        self._ends = np.cumsum([len(table["offset"]) for table in tables])
        self._files: OrderedDict[int, int] = OrderedDict()
        self._memory: dict[int, bytes] = {}

    @classmethod
    def open(cls, pattern: str | list[str], field: str = "data.train") -> ShardIndex:
        """Indexes the shards of a glob, a brace pattern (``train-{000000..000009}.tar``) or a list of these.

        Raises ConfigError that names ``field`` when nothing matches, a shard is missing, damaged or
        without images, or a label is not a number.
        """
        shards = _expand(pattern, field)
        index = cls(shards, [_table(shard, field) for shard in shards], field)
        log.debug("%s: %d images in %d shards", field, len(index), len(shards))
        return index

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, i: int) -> tuple[bytes, str, int | None]:
        """Sample i: the image's bytes, its extension and its label (None where there is no ``.cls``).

        Raises IndexError, and ConfigError when the shard cannot be read or has changed meanwhile.
        """
        shard, row = self._locate(i)
        table = self._tables[shard]
        data = self._bytes(shard, int(table["offset"][row]), int(table["size"][row]))
        label = int(table["label"][row])
        return data, EXTENSIONS[table["ext"][row]], None if label < 0 else label

    def key(self, i: int) -> str:
        """The key of sample i: its member's name without the extension."""
        shard, row = self._locate(i)
        ends = self._tables[shard]["key_end"]
        blob = self._tables[shard]["keys"][ends[row - 1] if row else 0:ends[row]]
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
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return shard, i - (int(self._ends[shard - 1]) if shard else 0)

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        path = self.shards[shard]
        try:
            if _kind(path) != ".tar":
                if shard not in self._memory:
                    self._memory[shard] = _unpack(path)
                data = self._memory[shard][offset:offset + size]
            else:
                if shard not in self._files:
                    self._files[shard] = os.open(path, os.O_RDONLY)
                    if len(self._files) > OPEN_FILES:
                        os.close(self._files.popitem(last=False)[1])
                self._files.move_to_end(shard)
                data = os.pread(self._files[shard], size, offset)
        except TAR_ERRORS as error:
            raise ConfigError(self.field, f"{path} cannot be read ({error})", "restore the shard") from error
        if len(data) != size:
            raise ConfigError(self.field, f"{path} has become shorter since it was indexed",
                              "restore the shard and start again")
        return data


def _kind(path: Path) -> str | None:
    return next((kind for kind in OPENERS if path.name.endswith(kind)), None)


def _unpack(path: Path) -> bytes:
    with OPENERS[_kind(path)](path, "rb") as file:
        return file.read()


def _expand(pattern: str | list[str], field: str) -> list[Path]:
    names: list[str] = []
    for text in [pattern] if isinstance(pattern, str) else pattern:
        if re.match(r"(pipe:|[a-z0-9]+://)", text):
            raise ConfigError(field, f"{text!r} is not a local path", "copy the shards to a disk")
        try:
            expanded = [text] if os.path.exists(text) else list(braceexpand.braceexpand(text))
        except braceexpand.UnbalancedBracesError:
            raise ConfigError(field, f"{text!r} has unbalanced braces", "close them") from None
        for name in expanded:
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
        raise ConfigError(field, f"{len(missing)} of {len(names)} shards are missing, first {missing[0]}",
                          "restore them or correct the pattern")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(field, f"{twice} is listed more than once", "list every shard once")
    return [Path(name) for name in names]


def _table(path: Path, field: str) -> dict[str, np.ndarray]:
    """The index of one shard, from its cache when that is valid."""
    if _kind(path) != ".tar":
        return _scan(path, field)
    cache = path.with_name(f".{path.name}.index.npz")
    stat = path.stat()
    stamp = np.array([INDEX_FORMAT, stat.st_size, stat.st_mtime_ns])
    try:
        with np.load(cache, allow_pickle=False) as file:
            table = dict(file)
        if np.array_equal(table.pop("stamp"), stamp):
            return table
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        log.warning("the index %s is unusable (%s) and is made anew", cache, error)
    table = _scan(path, field)
    temporary = cache.with_name(f"{cache.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, stamp=stamp, **table)
        os.replace(temporary, cache)
    except OSError as error:
        log.info("the index of %s stays in memory (%s)", path, error)
        temporary.unlink(missing_ok=True)
    return table


def _scan(path: Path, field: str) -> dict[str, np.ndarray]:
    """Reads every header of a tar: per sample the image's offset and size, label (-1: none), ext and key."""
    rows: list[list] = []  # key, offset, size, label, ext
    try:
        with (open(path, "rb") if _kind(path) == ".tar" else io.BytesIO(_unpack(path))) as stream:
            _read_headers(stream, rows, path, field)
    except TAR_ERRORS as error:
        raise ConfigError(field, f"the shard {path} is damaged ({error})",
                          "copy it again or repack it") from error
    rows = [row for row in rows if row[1] >= 0]
    if not rows:
        raise ConfigError(field, f"the shard {path} holds no {', '.join(EXTENSIONS)} image",
                          "remove or repack it")
    keys = [row[0].encode("utf-8", "surrogateescape") for row in rows]
    column = {name: np.array([row[i] for row in rows], np.int64)
              for i, name in ((1, "offset"), (2, "size"), (3, "label"))}
    return {**column, "ext": np.array([row[4] for row in rows], np.uint8),
            "keys": np.frombuffer(b"".join(keys), np.uint8), "key_end": np.cumsum([len(key) for key in keys])}


def _read_headers(stream: io.BufferedIOBase, rows: list[list], path: Path, field: str) -> None:
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            named = MEMBER.fullmatch(member.name)
            if named is None or not member.isreg() or member.sparse is not None:
                continue
            key, ext = named[1], named[2].lower()
            if not rows or rows[-1][0] != key:
                rows.append([key, -1, 0, -1, 0])
            if ext in EXTENSIONS and rows[-1][1] < 0:
                rows[-1][1:3], rows[-1][4] = [member.offset_data, member.size], EXTENSIONS.index(ext)
            elif ext == "cls":
                stream.seek(member.offset_data)
                text = stream.read(member.size).strip()
                if not text.isdigit():
                    raise ConfigError(field, f"{path}/{key}.cls is no class number: {text[:20]!r}",
                                      "repack it with class numbers")
                rows[-1][3] = int(text)
        # tarfile takes a damaged header for the end; a whole tar ends in blocks of zeros and nothing else
        stream.seek(tar.offset)
        end = 0
        while block := stream.read(1 << 20):
            end += len(block)
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"no valid header at byte {tar.offset}")
        if end < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without an end mark")
