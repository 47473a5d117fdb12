"""What documents and docstrings name is there: `bossnas.room.file.name`, and files and folders of the checkout."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick
ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"(?<![\w./-])bossnas(?:_kernels)?(?:\.[A-Za-z_]\w*)+(?![\w/-])")
FILE = re.compile(
    r"(?<![\w./*-])(?:bossnas|kernels|bench|tests|launch|configs|docs)/[\w./-]*\w\.(?:py|md|sh|yaml|json|sbatch)\b"
)
FOLDERS = ("docs", "configs", "bossnas", "kernels", "bench", "launch")
KINDS = (".py", ".md", ".sh", ".yaml", ".json", ".sbatch")
TEXTS = [
    file
    for place in (ROOT.glob("*"), *((ROOT / name).rglob("*") for name in FOLDERS))
    for file in sorted(place)
    if file.suffix in KINDS and file.name != "CHANGELOG.md"
]
ALLOWED = {"bossnas.sif"}  # a file that a user makes
EXAMPLES = {"bossnas/spaces/mine.py", "kernels/bench/mine.py", "tests/kernels/test_mine.py"}  # of CONTRIBUTING.md
GONE = {"tests/test_imports.py"}  # docs/results/house.md compares with what was


def is_there(name: str) -> bool:
    """Whether a dotted name can be imported, or is an attribute of what can be."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_every_name_is_there():
    named = {
        (name.group(), str(file.relative_to(ROOT))) for file in TEXTS for name in NAME.finditer(file.read_text("utf-8"))
    }
    known = {name: is_there(name) for name in {name for name, _ in named} - ALLOWED}
    missing = sorted(f"{file}: {name}" for name, file in named if not known.get(name, True))
    assert len(known) > 50 and not missing, "\n".join(missing)


def test_every_file_is_there():
    kept = set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split())
    files = kept or {str(file.relative_to(ROOT)) for file in ROOT.rglob("*") if file.is_file()}
    missing = sorted(
        f"{text.relative_to(ROOT)}: {name.group()}"
        for text in TEXTS
        for name in FILE.finditer(text.read_text("utf-8"))
        if name.group() not in files | EXAMPLES | GONE
    )
    assert not missing, "\n".join(missing)


def test_the_check_finds_what_is_gone():
    assert is_there("bossnas.optim.lars.LARS.step") and is_there("bossnas_kernels.gbn_act")
    assert not is_there("bossnas.optimizers") and not is_there("bossnas.optim.lars.Lars")
