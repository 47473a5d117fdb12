"""Imports inside bossnas run one way only: a module may import what stands before it in LEVELS."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Module after module, from bottom to top; "" is bossnas/__init__.py, a package's name its __init__.py.
# Within a level, too, only what stands earlier may be imported. A new module gets its place here.
LEVELS: dict[int, tuple[str, ...]] = {
    0: ("",),
    1: ("errors", "config", "retrain_config", "paths", "dist", "runfolder", "log", "tables", "combine", "intervals"),
    2: ("ops", "heads", "optim", "engines.protocol", "optimizers", "images", "tars", "shards", "stream", "views",
        "pareto", "sources", "imagenet", "cifar", "pack", "verify", "machine", "alive", "pipe"),
    3: ("spaces.hytra", "spaces.mbconv", "spaces.nats", "spaces", "cost", "latency", "supernet", "collate",
        "loader", "data", "labelled", "standalone", "bossnet", "mbconv_net", "nats_net", "timm_models", "networks",
        "fusing", "kernel_layers", "pretrained"),
    4: (
        "bootstrap", "scores", "units", "engines.single", "engines.ddp", "engines.fsdp2", "engines.deepspeed",
        "engines", "tensorfiles", "checkpoint", "weights",
    ),
    5: ("train", "rate", "baselines", "proxies"),
    6: (
        "workload", "sharding", "plan", "plan_tables",
        "graph", "select", "resume", "run", "rating", "stage", "schedule", "search",
        "inherit", "evaluate", "retraining", "retrain", "card", "standalone_file", "export", "rank", "compare",
        "report", "sample", "sample.make",
    ),
    7: ("cli_options", "cli_networks", "cli"),
}
ORDER = [module for level in sorted(LEVELS) for module in LEVELS[level]]
LEVEL_OF = {module: level for level, modules in LEVELS.items() for module in modules}
READERS_OF_RUN_FILES = ("rank", "report")  # these import levels 0 and 1 only
KERNEL_USERS = ("ops", "optim", "bootstrap", "views", "kernel_layers")
DISTRIBUTED_USERS = ("dist", "alive", "pipe", "checkpoint", "tensorfiles", "engines")  # and all of engines/
ONLY = "only " + ", ".join(DISTRIBUTED_USERS) + " may"


def module_name(file: Path, package: Path) -> str:
    """spaces/hytra.py -> spaces.hytra, spaces/__init__.py -> spaces, __init__.py -> ""."""
    parts = list(file.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool, modules: set[str]) -> set[str]:
    """Full names of all that the source imports, in functions too.

    `from bossnas.spaces import hytra` is an import of bossnas.spaces.hytra if there is such a module, else of
    bossnas.spaces; `modules` are the names as in LEVELS. Using torch.distributed counts as importing it.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["bossnas", *module.split(".")] if module else ["bossnas"]
                here = here[: len(here) - node.level + is_package]
                base = ".".join([*here, base] if base else here)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                ours = base.partition(".")[0] == "bossnas"
                found.add(base if ours and full.removeprefix("bossnas.") not in modules else full)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found.add("torch.distributed")
    return found


def steps_up(graph: dict[str, set[str]]) -> list[str]:
    """What is wrong with a graph {module: full names of its imports}; [] if nothing is."""
    faults = []
    for module, imported in graph.items():
        if module not in ORDER:
            faults.append(f"bossnas.{module} has no place in LEVELS of tests/test_imports.py")
            continue
        for full in sorted(imported):
            name = full.partition(".")[0]
            if name == "bossnas_kernels" and module not in KERNEL_USERS:
                faults.append(f"{module} imports {full}; only {', '.join(KERNEL_USERS)} may")
            if full.startswith("torch.distributed") and module.partition(".")[0] not in DISTRIBUTED_USERS:
                faults.append(f"{module} imports {full}; only {', '.join(DISTRIBUTED_USERS)} may")
            if name != "bossnas":
                continue
            other = full.removeprefix("bossnas").removeprefix(".")
            if other not in ORDER:
                faults.append(f"{module} imports {full}, which has no place in LEVELS")
            elif ORDER.index(other) >= ORDER.index(module):
                way = "sideways" if LEVEL_OF[other] == LEVEL_OF[module] else "up"
                faults.append(f"{module} (level {LEVEL_OF[module]}) imports {way}: {full}")
            elif module in READERS_OF_RUN_FILES and LEVEL_OF[other] > 1:
                faults.append(f"{module} reads run files and may import level 1 only, not {full}")
    return faults


def read_graph(package: Path) -> dict[str, set[str]]:
    files = {module_name(file, package): file for file in sorted(package.rglob("*.py"))}
    return {
        name: imports(file.read_text("utf-8"), name, file.name == "__init__.py", set(files))
        for name, file in files.items()
    }


def test_every_import_runs_downward():
    graph = read_graph(ROOT / "bossnas")
    assert len(graph) > 10, "found too few modules: is the package where this test looks?"
    faults = steps_up(graph)
    assert not faults, "\n" + "\n".join(faults)


def test_every_module_has_one_place():
    assert len(ORDER) == len(set(ORDER))


def test_kernels_need_torch_and_triton_only():
    allowed = {"torch", "triton", "bossnas_kernels"} | sys.stdlib_module_names
    for file in sorted((ROOT / "kernels" / "bossnas_kernels").rglob("*.py")):
        names = {full.partition(".")[0] for full in imports(file.read_text("utf-8"), "", False, set())}
        assert names <= allowed, f"{file.name} imports {sorted(names - allowed)}"


def test_launch_scripts_import_the_command_line_only():
    for file in sorted((ROOT / "launch").glob("*.py")):
        found = imports(file.read_text("utf-8"), "", False, set(ORDER))
        assert {f for f in found if f.startswith("bossnas")} <= {"bossnas.cli"}, file.name


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("ops", "import bossnas.supernet", "imports up"),
        ("ops", "def f():\n    from bossnas import supernet", "imports up"),
        ("ops", "from . import supernet", "imports up"),
        ("ops", "from .heads import Projector", "imports sideways"),
        ("engines.single", "from ..train import train_block", "imports up"),
        ("engines.single", "from .deepspeed import DeepSpeedEngine", "imports sideways"),
        ("spaces.hytra", "from bossnas.spaces import nats", "imports sideways"),
        ("spaces.hytra", "from bossnas.spaces import Space", "imports sideways"),
        ("rank", "from bossnas.cost import macs", "level 1 only"),
        ("supernet", "import torch.distributed as dist", ONLY),
        ("supernet", "from torch import distributed", ONLY),
        ("supernet", "import torch\ntorch.distributed.barrier()", ONLY),
        ("engines.single", "import torch.distributed", None),
        ("heads", "from bossnas_kernels import gbn_act", "only ops, optim, bootstrap, views, kernel_layers may"),
        ("news", "import torch", "has no place"),
        ("search", "from bossnas.news import x", "has no place"),
        ("heads", "from bossnas.ops import Chain", None),
        ("supernet", "from bossnas.spaces import Space\nfrom bossnas import heads, __version__", None),
        ("engines", "from .protocol import Engine\nfrom bossnas.engines import single", None),
    ],
)
def test_the_check_finds_faults(module, source, fault):
    faults = steps_up({module: imports(source, module, module in ("engines", "spaces"), set(ORDER))})
    if fault is None:
        assert not faults
    else:
        assert len(faults) == 1 and fault in faults[0]
