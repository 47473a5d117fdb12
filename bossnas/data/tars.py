"""What a tar holds: members, and the samples that they make. Read forwards, for the index and for streams alike."""

from __future__ import annotations

import gzip
import io
import logging
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from bossnas.data.images import EXTENSIONS, MAX_BYTES
from bossnas.errors import ConfigError

log = logging.getLogger("bossnas.data.shards")
TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
BLOCK = tarfile.BLOCKSIZE
# From byte 124 of a plain header: size, (time), checksum, type (file or notes), (link, owner, device), no prefix
PLAIN_HEADER = re.compile(rb"([0-7]{11})[\0 ].{12}([0-7]{6})[\0 ]{2}([0\0x]).{188}\0", re.DOTALL)
NOTES = b"xgXLK"  # types of members that say more of the member after them, such as a long name
TELLING_NOTES = re.compile(rb" (path|size|hdrcharset|GNU)")  # webdataset's writer notes just a time for every member
MAX_NOTES = 2**20  # bytes of them before one member


class Unpacked(Protocol):
    """An unpacked tar that is read forwards."""

    def read(self, size: int, /) -> bytes: ...

    def read1(self, size: int, /) -> bytes: ...

    def seek(self, position: int, /) -> object: ...


@dataclass(slots=True)
class Entry:
    """A sample of a tar. ``data``: of the image, where asked for; at most MAX_BYTES + 1 bytes."""

    key: str
    ext: str = ""
    offset: int = -1
    size: int = 0
    label: int | None = None
    data: bytes = b""


def entries(file: Unpacked, name: str, field: str, with_data: bool) -> Iterator[Entry]:
    """The samples of an unpacked tar that is read forwards from byte 0: both readers number them in this order.

    The image or the label coming again under the key of the sample before starts another sample; of images with
    different extensions under one key the first is taken. Both are warned of once a shard, samples without an image are
    counted in the log. Raises ConfigError that names ``field`` and the shard (``name``) when it is damaged, holds no
    image or a label that is no number.
    """
    entry: Entry | None = None
    seen: set[str] = set()
    count = repeated = surplus = imageless = 0
    try:
        for member, offset, size, is_file in members(file):
            named = MEMBER.fullmatch(member)
            if named is None:
                continue
            key, ext = named[1], named[2].lower()
            if entry is None or key != entry.key or ext in seen:
                if entry is not None:
                    repeated += key == entry.key
                    if entry.offset < 0:
                        imageless += 1
                    else:
                        count += 1
                        yield entry
                entry, seen = Entry(key), set()
            if ext != "cls" and ext not in EXTENSIONS:
                continue
            if not is_file:
                raise ConfigError(
                    field,
                    f"{member} in {name} is a link or no whole file",
                    "repack it with its files (tar --dereference --hard-dereference)",
                )
            seen.add(ext)
            if ext == "cls":
                entry.label = _label(file.read(min(size, 64)), f"{name}/{key}.cls", field)
            elif entry.offset >= 0:
                surplus += 1
            else:
                entry.ext, entry.offset, entry.size = ext, offset, size
                entry.data = file.read(min(size, MAX_BYTES + 1)) if with_data else b""
    except TAR_ERRORS as error:
        is_storage = isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile)
        what = "cannot be read" if is_storage else "is damaged"
        raise ConfigError(field, f"the shard {name} {what} ({error})", "copy it again or repack it") from error
    if entry is not None and entry.offset >= 0:
        count += 1
        yield entry
    elif entry is not None:
        imageless += 1
    if not count:
        raise ConfigError(field, f"the shard {name} holds no {', '.join(EXTENSIONS)} image", "remove or repack it")
    if repeated:
        log.warning("%s: %d keys come twice in a row; each is a sample of its own", name, repeated)
    if surplus:
        log.warning("%s: %d images are passed over, for another image has their key", name, surplus)
    if imageless:
        log.info("%s: %d samples have no image and are passed over", name, imageless)


def members(file: Unpacked) -> Iterator[tuple[str, int, int, bool]]:
    """The members of an unpacked tar: name, offset of the data, size in bytes, and whether it is a regular file.

    At each of them the file stands at the data's first byte, and up to ``size`` bytes may be read from it. Other than
    tarfile, which takes a damaged header for the end, this raises tarfile.ReadError unless the tar ends in an end mark
    and zeros. tarfile parses the headers that are not plain ones.
    """
    start, notes = 0, b""
    while True:
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise tarfile.ReadError(f"it ends before byte {start + BLOCK}, without an end mark")
        if not header[0] and not header.strip(b"\0"):
            break
        data = start + BLOCK
        plain = None if notes else PLAIN_HEADER.match(header, 124)
        if plain is not None and int(plain[2], 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            plain = None
        try:
            info: tarfile.TarInfo | None
            if plain is not None:
                kind, size = plain[3], int(plain[1], 8)
            else:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
                kind, size = info.type, info.size
            end = data + size + -size % BLOCK
            if kind in NOTES:
                if len(notes) + size > MAX_NOTES:
                    raise tarfile.ReadError("an extended header is absurdly long")
                text = file.read(end - data)
                if notes or kind != b"x" or TELLING_NOTES.search(text):
                    notes += header + text
                start = end
                continue
            if plain is not None:
                name, is_file = header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape"), True
            else:
                notes += header
                with tarfile.open(fileobj=io.BytesIO(notes), mode="r:", encoding="utf-8") as tar:
                    info = tar.next()
                if info is None:
                    raise tarfile.ReadError("its extended header has nothing after it")
                name, size, is_file = info.name, info.size, info.isreg() and info.sparse is None
                end, notes = data + tar.offset - len(notes), b""
        except ConfigError:  # of the stream that the tar comes through
            raise
        except (tarfile.TarError, ValueError, IndexError) as error:  # the last two: sparse files cut short
            raise tarfile.ReadError(f"no valid header at byte {start}: {error}") from error
        yield name, data, size, is_file
        start = end
        file.seek(start)
    while block := file.read1(2**20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"no valid header at byte {start}")


def _label(text: bytes, name: str, field: str) -> int:
    text = text.strip()
    if not text.isdigit() or len(text) > 18:
        raise ConfigError(field, f"{name} is no class number: {text[:20]!r}", "repack it with class numbers")
    return int(text)
