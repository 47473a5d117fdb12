"""The ahead-of-time gate: every kernel compiles for GPUs that are not here, without spills, within their limits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ranks import HANG

triton = pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}  # bytes per program, by target
DOT_KERNELS = ("_attend", "_query_gradient", "_key_gradient")
# Read a few sums, one 64-bit number a thread; or single bytes, as a pixel is three of them.
NARROW = ("_totals", "_decide", "_arrange", "_weigh", "_sum_luma", "_colour", "_blur_rows", "_blur_columns")


@pytest.fixture(scope="module", params=SHARED_MEMORY)
def compiled(request, compilers):
    """What every case's kernels take on one target."""
    folder, running = compilers
    code = running[request.param].wait(timeout=HANG)
    table = (folder / f"{request.param}.txt").read_text()
    print(table)
    assert code == 0, table[-3000:]
    return request.param, json.loads((folder / f"{request.param}.json").read_text())


def names(resources) -> str:
    return "\n".join(f"{r['case']}: {r['kernel']} {r}" for r in resources)


def test_every_kernel_is_compiled(compiled):
    _, resources = compiled
    written = set()
    for file in (HERE.parents[1] / "kernels" / "bossnas_kernels").glob("*.py"):
        lines = file.read_text().splitlines()
        launched = "\n".join(lines)
        for line, following in zip(lines, lines[1:], strict=False):
            name = following.removeprefix("def ").partition("(")[0]
            # called with a grid, not by a kernel
            if line.startswith("@triton.jit") and re.search(rf"\b{name}\[", launched):
                written.add(name)
    assert written and {r["kernel"] for r in resources} == written


def test_nothing_spills(compiled):
    bad = [r for r in compiled[1] if r["stack"] or r["spills"]]
    assert not bad, names(bad)


def test_shared_memory_and_grids_fit(compiled):
    target, resources = compiled
    bad = [
        r
        for r in resources
        if r["shared"] > SHARED_MEMORY[target] or any(g > 65535 for g in r["grid"][1:]) or r["grid"][0] >= 2**31
    ]
    assert not bad, names(bad)


def test_loads_are_128_bits_wide(compiled):
    target, resources = compiled

    def narrow(r):
        """_resize reads bytes of the picture at first; then whole words, which the compiler for gfx942 splits."""
        early = r["kernel"] == "_resize" and (target == "gfx942" or not r["constants"]["SECOND"])
        return r["kernel"] in NARROW or early

    bad = [r for r in resources if r["widest_load"] < 128 and not narrow(r)]
    assert not bad, names(bad)


def test_dot_products_use_the_tensor_cores(compiled):
    target, resources = compiled
    dots = [r for r in resources if r["kernel"] in DOT_KERNELS and "float32" not in r["case"]]
    assert dots
    if target == "sm_90":
        assert all(r["wgmma"] for r in dots), names([r for r in dots if not r["wgmma"]])
