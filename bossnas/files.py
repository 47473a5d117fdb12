"""Files of a run that are there whole or not at all: each begins as a draft beside its place (`draft`)."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# read once: a process has one mask for all its threads, and it can only be read by setting it
_MASK = os.umask(0o077)
os.umask(_MASK)


class Abandoned(Exception):
    """Raised within a `draft`, which then ends without an error: the file stays as it was."""


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` to write to, which takes its place in one step when the block ends without an error.

    A reader sees the old file or the new one, never a half, also after a power cut. A block that fails, or raises
    Abandoned, leaves ``path`` as it was. Raises OSError.
    """
    # the writer's own: ranks of other nodes, with equal process numbers, may write the same file on a shared disk
    made = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield made
        # the data before the name: a file system may write the rename first, and a cut between them leaves a hole
        sync(made)
        os.replace(made, path)
    except Abandoned:
        pass
    finally:
        made.unlink(missing_ok=True)


def remove_drafts(folder: Path) -> None:
    """Removes what killed writers left in a folder that nobody writes to at the moment."""
    for left_over in folder.glob(".*.tmp"):
        left_over.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file through a `draft`."""
    with draft(path) as made:
        made.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON through a `draft`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync(path: Path) -> None:
    """Has the system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_to_others(path: Path) -> None:
    """Gives a new file the permissions of any other; safetensors writes files for their owner alone."""
    path.chmod(0o666 & ~_MASK)
