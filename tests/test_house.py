"""The house: imports run downward only. pyproject.toml holds the floors (import-linter) and who may use what (ruff)."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import HANG

ROOT = Path(__file__).resolve().parent.parent


def faults(folder: Path, *command: str) -> str:
    """What a linter says of the packages in the folder; "" if nothing."""
    path = os.pathsep.join([str(folder), str(folder / "kernels"), str(Path(sys.executable).parent)])
    run = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "PATH": path + os.pathsep + os.environ["PATH"]},
    )
    return "" if run.returncode == 0 else run.stdout + run.stderr


FLOORS = ("lint-imports", "--no-cache", "--config", "pyproject.toml")
USERS = ("ruff", "check", "--no-cache", "--select", "TID251", "--output-format", "concise", "bossnas")


@pytest.mark.parametrize("command", [FLOORS, USERS], ids=["floors", "users"])
def test_every_import_runs_downward(command):
    assert not faults(ROOT, *command)


@pytest.mark.parametrize(
    ("file", "line", "command", "fault"),
    [
        ("errors.py", "from bossnas.config import shared", FLOORS, "bossnas.errors is not allowed to import"),
        (
            "data/views.py",
            "def f():\n    from bossnas.search import run",
            FLOORS,
            "bossnas.data is not allowed to import",
        ),
        (
            "networks/nats.py",
            "from bossnas import runs",
            FLOORS,
            "bossnas.networks is not allowed to import bossnas.runs",
        ),
        ("news.py", "import torch", FLOORS, "news"),
        (
            "optim/groups.py",
            "def f():\n    from bossnas.optim import base",
            FLOORS,
            "No imports in circles BROKEN",
        ),
        ("supernet/heads.py", "import torch.distributed as dist", USERS, "torch.distributed"),
        ("supernet/heads.py", "import torch\n\ntorch.distributed.barrier()", USERS, "torch.distributed"),
        ("supernet/heads.py", "from bossnas_kernels import gbn_act", USERS, "bossnas_kernels"),
    ],
)
def test_the_checks_find_faults(tmp_path, file, line, command, fault):
    for name in ("bossnas", "kernels/bossnas_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.gz", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "bossnas" / file).open("a", encoding="utf-8") as text:
        text.write(f"\n\n{line}\n")
    assert fault in faults(tmp_path, *command)


def imported(file: Path) -> set[str]:
    """Full names of the modules that a file imports, in functions too."""
    nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
    return {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names} | {
        node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)
    }


def test_kernels_need_torch_and_triton_only():
    allowed = {"torch", "triton", "bossnas_kernels"} | sys.stdlib_module_names
    for file in sorted((ROOT / "kernels/bossnas_kernels").rglob("*.py")):
        names = {full.partition(".")[0] for full in imported(file)}
        assert names <= allowed, f"{file.name} imports {sorted(names - allowed)}"


def test_launch_scripts_import_the_command_line_only():
    for file in sorted((ROOT / "launch").glob("*.py")):
        assert {name for name in imported(file) if name.startswith("bossnas")} == {"bossnas.cli"}, file.name
