"""Shards, read as streams: for object stores and web servers, where seeking costs a request.

The order of the shards and a shuffle buffer are seeded, so a reader gives the same samples in the same order as long as
it gets the same shards; a place in it is a number of samples. A connection that breaks is taken up again at the byte
where it broke. Readers for random access are in bossnas.data.shards.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from bossnas.data.shards import OPENERS, expand, expand_braces, is_remote
from bossnas.data.tars import Unpacked, entries
from bossnas.errors import ConfigError

log = logging.getLogger("bossnas.data.streams")
CHUNK = 2**20  # bytes asked of a source at once
STORE_BLOCK = 2**23  # bytes of one request to an object store
HTTP_BUFFER = 2**18  # bytes read ahead; aiohttp forgets them when the connection breaks
LONGEST_WAIT = 30.0  # seconds between two tries
DRIVERS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
# of the 4xx answers of a web server, those that may be another in a moment; aiohttp says 400 for garbled answers, too
PASSING_STATUS = (400, 408, 425, 429)
NO_SUCH_RANGE = 416
REASON = 200  # characters of an error's text; some quote the data
MISSING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Sample(NamedTuple):
    """An image file as it stands in its shard. ``id``: shard * 2**32 + row in the shard; ``name`` is for messages."""

    id: int
    data: bytes
    label: int | None
    name: str


@dataclass(frozen=True)
class ShardStream:
    """Shards that are read from their beginning to their end. Holds no connection, so it may be pickled and forked.

    ``counts``: the samples of every shard where the pack.json beside the shards lists them all, else None; ``retries``:
    failures in a row, without a byte in between, that are put up with; ``timeout``: seconds without a byte that are
    a failure (object stores: as their driver is set); ``backoff``: seconds before the first retry, doubled at each;
    ``stated``: the samples of all shards as the user says.
    """

    urls: list[str]
    field: str
    counts: list[int] | None
    retries: int
    timeout: float
    backoff: float
    stated: int | None = None

    @classmethod
    def open(
        cls,
        pattern: str | list[str],
        field: str = "data.train",
        *,
        allow_pipe: bool = False,
        retries: int = 5,
        timeout: float = 60.0,
        backoff: float = 0.5,
        images: int | None = None,
    ) -> ShardStream:
        """Names the shards of a URL, a local path or a list of them, with braces (``train-{000000..000146}.tar``).

        Globs work for local paths and object stores. ``images``: how many there are, where pack.json does not say it.
        Nothing is opened but pack.json. Raises ConfigError that names ``field`` when no shard is named, one is named
        twice, a driver is missing, or a ``pipe:`` is not allowed.
        """
        urls: list[str] = []
        for text in [pattern] if isinstance(pattern, str) else pattern:
            if not is_remote(text):
                urls += map(str, expand(text, field))
                continue
            for url in expand_braces(text, field):
                urls += _named(url, field, allow_pipe)
        if not urls:
            raise ConfigError(field, "names no shard", "give URLs or paths of shards")
        if len(set(urls)) != len(urls):
            twice = next(url for url in urls if urls.count(url) > 1)
            raise ConfigError(field, f"{shown(twice)} is listed more than once", "list every shard once")
        return cls(urls, field, _counts(urls, timeout), retries, timeout, backoff, images)

    @property
    def samples(self) -> int | None:
        """Samples of all shards, where pack.json tells it, else what was stated."""
        return self.stated if self.counts is None else sum(self.counts)

    def __len__(self) -> int:
        if self.samples is None:
            raise TypeError("nothing says how many samples the stream has")
        return self.samples

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The shards' numbers in the order of an epoch; share() splits it over the readers."""
        return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(self.urls))

    def read(
        self, shards: Sequence[int] | np.ndarray, seed_key: Sequence[int], buffer: int, skip: int = 0
    ) -> Iterator[Sample]:
        """The samples of these shards, in this order, through a shuffle buffer of ``buffer`` samples (up to 1: none).

        The same arguments give the same sequence. The first ``skip`` samples of it are fetched but not given out.
        Raises ConfigError that names the shard when one is missing, damaged, incomplete, or when its connection fails
        more than ``retries`` times in a row.
        """
        samples = chain.from_iterable(map(self._shard, map(int, shards)))
        if buffer > 1:
            os.environ.setdefault("WDS_SECURE", "1")  # read at the import: no pipes, no pickles
            import webdataset

            rng = random.Random(int(np.random.PCG64(list(seed_key)).random_raw()))
            samples = webdataset.shuffle(buffer, initial=buffer, rng=rng)(samples)
        return islice(samples, skip, None)

    def _shard(self, number: int) -> Iterator[Sample]:
        url, name = self.urls[number], shown(self.urls[number])
        path = url if not is_remote(url) or url.startswith("pipe:") else urlsplit(url).path
        opener: Callable[..., Any] = next((OPENERS[kind] for kind in OPENERS if path.endswith(kind)), open)
        is_tar = opener is open or url.startswith("pipe:")
        row = -1
        with contextlib.closing(ByteStream(url, self.field, self.retries, self.timeout, self.backoff, is_tar)) as file:
            unpacked: Unpacked = file if is_tar else opener(file)
            for row, entry in enumerate(entries(unpacked, name, self.field, with_data=True)):
                yield Sample(number << 32 | row, entry.data, entry.label, f"{name}/{entry.key}")
        if self.counts is not None and row + 1 != self.counts[number]:
            raise ConfigError(
                self.field,
                f"{name} holds {row + 1} samples, but pack.json says {self.counts[number]}",
                "copy the shard and pack.json again",
            )


def share(order: np.ndarray, reader: int, readers: int) -> np.ndarray:
    """The shards of one of the readers (ranks x workers). Raises ConfigError when some would have none."""
    if len(order) < readers:
        raise ConfigError(
            "data.workers",
            f"{readers} readers (ranks x workers) share {len(order)} shards, so {readers - len(order)} would have none",
            f"use so few workers or ranks that their product is at most {len(order)}, or smaller shards",
        )
    return order[reader::readers]


def shown(url: str) -> str:
    """A URL for messages: without user, password and query, which may be secrets."""
    if not is_remote(url) or url.startswith("pipe:"):
        return url
    scheme, _, rest = url.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


@dataclass
class Connection:
    """An open connection. ``start``: the byte it begins at; ``sure``: whether its end is the file's end for certain."""

    read: Callable[[int], bytes]
    close: Callable[[], object]
    start: int
    sure: bool


class ByteStream:
    """The bytes of a URL, forwards, over as many connections as it takes.

    ``is_tar``: an unpacked tar; read() is then called only for bytes that a whole tar has, so an end that comes before
    them is a dropped connection. Raises ConfigError that names URL, byte and reason.
    """

    def __init__(self, url: str, field: str, retries: int, timeout: float, backoff: float, is_tar: bool):
        self.url, self.field, self.retries, self.timeout, self.backoff = url, field, retries, timeout, backoff
        self.is_tar = is_tar
        self._source: Connection | None = None
        self._chunk, self._used = b"", 0
        self._fetched = 0  # bytes of the stream up to the end of the chunk
        self._has_ended = False

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes; fewer only where the stream ends."""
        parts = []
        while size > 0 and (self._used < len(self._chunk) or self._fetch(self.is_tar)):
            parts.append(self._chunk[self._used : self._used + size])
            self._used += len(parts[-1])
            size -= len(parts[-1])
        return b"".join(parts)

    def read1(self, size: int) -> bytes:
        """Some of the next bytes, at most ``size``; none at the end, wherever that is."""
        if self._used == len(self._chunk) and not self._fetch(False):
            return b""
        part = self._chunk[self._used : self._used + size]
        self._used += len(part)
        return part

    def seekable(self) -> bool:
        """Forwards; the readers of compressed files ask."""
        return True

    def seek(self, position: int) -> None:
        """Forwards to a byte, or to the end if that comes first."""
        while (left := position - (self._fetched - len(self._chunk) + self._used)) > 0:
            if not self.read(min(left, CHUNK)):
                break

    def close(self) -> None:
        if self._source is not None:
            source, self._source = self._source, None
            source.close()

    def _fetch(self, more_is_due: bool) -> bool:
        """Fetches the next chunk; False at the end."""
        failures = 0
        while not self._has_ended:
            ended = False
            try:
                source = self._connect() if self._source is None else self._source
                chunk = source.read(CHUNK)
                if chunk:
                    self._chunk, self._used = chunk, 0
                    self._fetched += len(chunk)
                    return True
                # a file or an object store that ends is at its end (sure); HTTP and a pipe end where they break, too
                if not more_is_due or source.sure:
                    break
                reason, ended = "the connection ended before the tar does", True
            except Exception as error:  # drivers of stores raise nearly anything; it is logged or raised below
                reason, cause = _reason(error), error
                if _is_lasting(error):
                    failures = self.retries
            self.close()
            if failures == self.retries:
                if ended:
                    break  # the tar's reader says what is missing
                raise ConfigError(
                    self.field,
                    f"{shown(self.url)} cannot be read at byte {self._fetched}: {reason}",
                    "check the URL, the access rights and the network, then start again",
                ) from cause
            wait = min(self.backoff * 2**failures, LONGEST_WAIT)
            failures += 1
            log.warning(
                "%s at byte %d: %s; retry %d of %d in %.1f s",
                shown(self.url),
                self._fetched,
                reason,
                failures,
                self.retries,
                wait,
            )
            time.sleep(wait)
        self._has_ended = True
        return False

    def _connect(self) -> Connection:
        self._source = source = _open(self.url, self._fetched, self.timeout)
        position = source.start
        while position < self._fetched:  # no range requests here
            skipped = source.read(min(CHUNK, self._fetched - position))
            if not skipped:
                raise EOFError(f"it now ends at byte {position}")
            position += len(skipped)
        return source


def _open(url: str, position: int, timeout: float) -> Connection:
    if not is_remote(url):
        file = open(url, "rb", buffering=0)
    elif url.startswith("pipe:"):
        pipe = _Pipe(url.removeprefix("pipe:"), timeout)
        return Connection(pipe.read, pipe.close, 0, False)
    elif url.startswith(("http://", "https://")):
        return _open_http(url, position, timeout)
    else:
        import fsspec

        store, path = fsspec.url_to_fs(url)
        file = store.open(path, "rb", block_size=STORE_BLOCK)
    file.seek(position)
    return Connection(file.read, file.close, position, True)


def _open_http(url: str, position: int, timeout: float) -> Connection:
    """One request for all from ``position`` on. The answer begins at 0 where the server does not know ranges."""
    import aiohttp
    import fsspec

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={position}-"} if position else {})
    limits = aiohttp.ClientTimeout(total=None, connect=timeout, sock_connect=timeout, sock_read=timeout)
    try:
        # block_size 0: one stream instead of a request per block; any size spares a HEAD, which signed URLs refuse
        file = fsspec.filesystem("http").open(
            url, block_size=0, size=1, headers=headers, timeout=limits, read_bufsize=HTTP_BUFFER
        )
    except aiohttp.ClientResponseError as error:
        if error.status != NO_SUCH_RANGE or not position:
            raise
        return Connection(lambda size: b"", lambda: None, position, True)
    return Connection(file.read, file.close, position if file.r.status == 206 else 0, False)


class _Pipe:
    """The standard output of a shell command."""

    def __init__(self, command: str, timeout: float):
        self.timeout = timeout
        self.process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout
        self.poll = select.poll()
        self.poll.register(self.output, select.POLLIN | select.POLLHUP)

    def read(self, size: int) -> bytes:
        if not self.poll.poll(self.timeout * 1000):
            raise TimeoutError(f"no byte for {self.timeout:g} s")
        data = os.read(self.output.fileno(), size)
        if not data and (code := self.process.wait(self.timeout)):
            raise OSError(f"the command ended with exit code {code}")
        return data

    def close(self) -> None:
        self.output.close()
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended just now
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _is_lasting(error: Exception) -> bool:
    """Whether a second try would meet the same."""
    status = getattr(error, "status", None)
    is_refused = isinstance(status, int) and 400 <= status < 500 and status not in PASSING_STATUS
    return is_refused or isinstance(error, (*MISSING, ImportError))


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "not found"
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    if status and message is not None:  # its text has the whole URL
        return f"HTTP {status} {message[:REASON]}".partition("\n")[0]
    return f"{type(error).__name__}: {str(error)[:REASON] or 'no answer in time'}".partition("\n")[0]


def _named(url: str, field: str, allow_pipe: bool) -> list[str]:
    """The shards that a URL names: itself, or those that its glob matches."""
    if url.startswith("pipe:"):
        if not allow_pipe:
            raise ConfigError(field, f"{url!r} runs a command", "set data.allow_pipe=true if you trust the config")
        return [url]
    import fsspec

    scheme = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        driver = DRIVERS.get(scheme, "its fsspec driver")
        raise ConfigError(field, f"{scheme}:// needs {driver} ({error})", f"pip install {driver}") from error
    except ValueError as error:
        raise ConfigError(
            field,
            f"{shown(url)}: no driver is known for {scheme}://",
            "use http, https, s3, gs or a scheme that fsspec knows",
        ) from error
    if scheme in ("http", "https"):
        if glob.has_magic(urlsplit(url).path):
            raise ConfigError(
                field,
                f"{shown(url)}: a web server does not list its files",
                "write braces, such as train-{000000..000146}.tar",
            )
        return [url]
    if not glob.has_magic(url):
        return [url]
    try:
        store, path = fsspec.url_to_fs(url)
        names = sorted(store.unstrip_protocol(name) for name in store.glob(path))
    except Exception as error:  # drivers of stores raise nearly anything
        raise ConfigError(
            field,
            f"{shown(url)} cannot be listed: {_reason(error)}",
            "check the URL, the access rights and the network",
        ) from error
    if not names:
        raise ConfigError(field, f"no file matches {shown(url)}", "check the URL")
    return names


def _counts(urls: list[str], timeout: float) -> list[int] | None:
    """The samples of every shard, if the pack.json beside them lists them all."""
    records: dict[str, dict] = {}
    counts = []
    for url in urls:
        if url.startswith("pipe:"):
            return None
        folder, slash, name = (url.partition("?")[0] if is_remote(url) else url).rpartition("/")
        if folder not in records:
            records[folder] = _pack_record(f"{folder}{slash}pack.json", timeout)
        count = records[folder].get(name, {}).get("samples")
        if not isinstance(count, int):
            return None
        counts.append(count)
    return counts


def _pack_record(url: str, timeout: float) -> dict[str, dict]:
    """The shards listed in a pack.json; {} where there is none."""
    try:
        with contextlib.closing(_open(url, 0, timeout)) as source:
            text = b"".join(iter(lambda: source.read(CHUNK), b""))
        shards = json.loads(text)["shards"]
        return {name: dict(made) for name, made in shards.items()}
    except Exception as error:  # drivers of stores raise nearly anything, and the file may hold anything
        if not _is_lasting(error):
            log.warning("%s is unusable, so the number of samples is unknown (%s)", shown(url), _reason(error))
        return {}
