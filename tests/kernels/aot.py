"""Compiles every kernel for GPUs that need not be there, at real shapes, and shows what each takes.

    python tests/kernels/aot.py sm_90          # or sm_80, gfx942; --json FILE writes the table too

The real launchers run on `meta` tensors under a stub driver, so that what is compiled is what a GPU would get: same
constants, same argument specialisation. One target per process: compiled kernels are cached in the process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "kernels"), str(Path(__file__).resolve().parent)]

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
}


@dataclass
class Resources:
    """What one compiled kernel takes. stack and spills (loads and stores of local memory): bytes and instructions."""

    case: str
    kernel: str
    target: str
    registers: int | None
    stack: int | None
    spills: int
    shared: int
    widest_load: int  # bits
    wgmma: int
    grid: tuple[int, ...]
    warps: int
    constants: dict = field(default_factory=dict)


class StubDriver:
    """The current device is whatever target is compiled for."""

    def __init__(self, target: GPUTarget, device: int):
        self.target, self.device = target, device

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_all(target: str, cases) -> list[Resources]:
    """Runs every case (name, function) of ``cases`` with launches turned into compilations."""
    from bossnas_kernels import common

    gpu, _ = TARGETS[target]
    triton.runtime.driver.set_active(StubDriver(gpu, 100 + list(TARGETS).index(target)))
    common.architecture = lambda device: target
    found: list[Resources] = []
    run, known = JITFunction.run, {}
    current = ""

    def warm(self, *args, grid, warmup, **kwargs):
        grid = tuple(grid(kwargs) if callable(grid) else grid)
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in known:  # many cases share a kernel
            constants = {k: v for k, v in kwargs.items() if k.isupper()}
            known[kernel.hash] = measure(current, kernel, target, grid, constants)
        found.append(replace(known[kernel.hash], case=current, grid=grid))
        return kernel

    JITFunction.run = warm
    try:
        for name, function in cases:
            current = name
            function()
    finally:
        JITFunction.run = run
    return found


def measure(case: str, kernel, target: str, grid: tuple[int, ...], constants: dict) -> Resources:
    about = dict(
        case=case,
        kernel=kernel.metadata.name,
        target=target,
        shared=kernel.metadata.shared,
        grid=grid,
        warps=kernel.metadata.num_warps,
        constants=constants,
    )
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]

        def value(key: str) -> int:
            return int(re.search(rf"^\s*\.{key}:\s*(\d+)", text, re.M)[1])

        loads = [
            128 if "x4" in m else 64 if "x2" in m else 32 for m in re.findall(r"(?:global|buffer)_load_dword\w*", text)
        ]
        return Resources(
            **about,
            registers=value("vgpr_count"),
            stack=value("private_segment_fixed_size"),
            spills=value("vgpr_spill_count"),
            widest_load=max(loads, default=0),
            wgmma=0,
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    loads = [int(m or 32) for m in re.findall(r"\bLDG\.E(?:\.\w+)*?(?:\.(64|128))?(?:\.\w+)*\s", sass)]
    # cp.async copies (LDGSTS) are loads too
    loads += [int(m or 32) for m in re.findall(r"\bLDGSTS\.E(?:\.\w+)*?(?:\.(64|128))?(?:\.\w+)*\s", sass)]
    return Resources(
        **about,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        widest_load=max(loads, default=0),
        wgmma=len(re.findall(r"\b[HI]GMMA\b", sass)),
    )


def tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def table(resources: list[Resources]) -> str:
    head = (
        f"{'case':<44} {'kernel':<20} {'regs':>4} {'stack':>5} {'spill':>5} {'shared':>7} {'load':>4} {'wgmma':>5} grid"
    )
    rows = [
        f"{r.case:<44} {r.kernel:<20} {r.registers:>4} {r.stack:>5} {r.spills:>5} {r.shared:>7} {r.widest_load:>4} "
        f"{r.wgmma:>5} {'x'.join(map(str, r.grid))}"
        for r in resources
    ]
    return "\n".join([head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    options = parser.parse_args()
    from aot_cases import cases

    resources = compile_all(options.target, [(n, f) for n, f in cases() if options.only in n])
    print(f"{options.target}, triton {triton.__version__}, torch {torch.__version__}\n{table(resources)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in resources], indent=1) + "\n")


if __name__ == "__main__":
    main()
