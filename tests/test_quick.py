"""`pytest -m quick`: in less than a minute something of every room is tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ranks import HANG

pytestmark = pytest.mark.quick
ROOT = Path(__file__).resolve().parent.parent


def rooms_without(root: Path) -> list[str]:
    """The rooms of which no test is quick: the packages in bossnas, and what else has a folder of tests."""
    rooms = [package.parent.name for package in sorted((root / "bossnas").glob("*/__init__.py"))]
    return [
        room
        for room in [*rooms, "bench", "kernels"]
        if not any("pytest.mark.quick" in file.read_text("utf-8") for file in (root / "tests" / room).glob("test_*.py"))
    ]


def test_every_room_has_a_quick_test():
    assert not rooms_without(ROOT), "mark one of their tests with pytest.mark.quick, a fast and telling one"


def test_a_new_room_needs_one(tmp_path):
    rooms = ("bench", "kernels", "news", "olds")
    for room in rooms:
        (tmp_path / "tests" / room).mkdir(parents=True)
        (tmp_path / "tests" / room / "test_it.py").write_text("@pytest.mark.quick\n" * (room != "news"), "utf-8")
    for room in rooms[2:]:
        (tmp_path / "bossnas" / room).mkdir(parents=True)
        (tmp_path / "bossnas" / room / "__init__.py").touch()
    assert rooms_without(tmp_path) == ["news"]


def test_the_quick_tests_of_the_kernels(request):
    """They run in Triton's interpreter, which is chosen before anything imports triton: here other rooms did."""
    kernels = [item for item in request.session.items if item.path.parent == ROOT / "tests/kernels"]
    if not any(item.get_closest_marker("skip") for item in kernels):
        pytest.skip("the kernels' tests are not to run here, or run here themselves")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "quick", "-p", "no:cacheprovider", "tests/kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr
