"""Files that are there whole or not at all: every one that the project writes begins as a draft (`draft`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` to write to, which takes its place in one step when the block ends without an error.

    A reader sees the old file or the new one, never a half, also after a power cut. A block that fails, or removes the
    draft itself, leaves ``path`` as it was. Raises OSError.
    """
    made = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # the process's own: two may write the same file
    try:
        yield made
        if made.exists():
            # the data before the name: a file system may write the rename first, and a cut between them leaves a hole
            sync(made)
            open_to_others(made)
            os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)


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
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
