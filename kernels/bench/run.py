"""Kernel microbenchmarks: every kernel against a named baseline, in the same run, interleaved.

    python kernels/bench/run.py --quick
    python kernels/bench/run.py --only gbn_act --json gbn_act.json

A case is timed only if its results agree with the baseline's. Both sides are timed in turn; shown are the
median and the 20 % and 80 % quantiles of forward and backward together. "ratio" is the median of baseline ÷
ours over pairs of neighbours, so that a disturbance of the machine hits both: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402

BENCHMARKS = ("gbn_act",)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few cases, few repeats: done within seconds")
    parser.add_argument("--only", choices=BENCHMARKS, help="run this benchmark alone")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the measurements to this file")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(argv)
    if options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available; leave --device out or say cpu")
    torch.set_num_threads(options.threads)
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")

    about = environment(device)
    for key, value in about.items():
        print(f"{key}: {value}")
    if device.type == "cpu":
        print("On CPU the plain PyTorch reference is timed against the eager baseline.")
    print(f"\n{'case':<36} {'ours ms (20-80 %)':>26} {'baseline ms (20-80 %)':>26} {'ratio':>6} {'GB/s':>6}")

    results, wrong = [], []
    for name in BENCHMARKS if options.only is None else (options.only,):
        module = importlib.import_module(name)
        for case in module.cases(device, options.quick):
            fault = disagreement(case, module.TOLERANCE)
            if fault:
                wrong.append(f"{case.name}: {fault}")
                print(f"{case.name:<36} NOT TIMED, its results are wrong: {fault}", flush=True)
                continue
            ours, baseline, ratio = measure(case, device, rounds=15 if options.quick else 40)
            rate = case.bytes_moved / ours["median_ms"] / 1e6
            shown = f"{_shown(ours):>26} {_shown(baseline):>26} {ratio:>6.2f} {rate:>6.1f}"
            print(f"{case.name:<36} {shown}", flush=True)
            results.append(
                {"case": case.name, "ours": ours, "baseline": baseline, "ratio": ratio, "gb_per_s": rate}
            )
    if options.json:
        report = {"environment": about, "results": results, "wrong": wrong}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if wrong:
        print(f"{len(wrong)} case(s) gave wrong results and were not timed", file=sys.stderr)
    return 1 if wrong else 0


def environment(device: torch.device) -> dict[str, str | int]:
    """What a measurement depends on."""
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": f"{device.type} ({name})",
        "implementation": "reference",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def disagreement(case, tolerance: float) -> str | None:
    """How the case's results differ from the baseline's; None if they agree."""
    for position, (got, want) in enumerate(zip(case.ours(), case.baseline(), strict=True)):
        if got.shape != want.shape:
            return f"result {position} has shape {tuple(got.shape)}, the baseline's {tuple(want.shape)}"
        error = (got - want).abs().max().item() / max(1.0, want.abs().max().item())
        if not error <= tolerance:
            return f"result {position} differs by {error:.1e}, more than {tolerance:.0e}"
    return None


def measure(case, device: torch.device, rounds: int) -> tuple[dict[str, float], dict[str, float], float]:
    """Time both sides in turn, so that what disturbs the machine disturbs both."""
    for _ in range(3):
        case.ours(), case.baseline()
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(rounds):
        for side in (0, 1) if step % 2 else (1, 0):
            times[side].append(_milliseconds((case.ours, case.baseline)[side], device))
    ratio = statistics.median(theirs / ours for ours, theirs in zip(*times, strict=True))
    return _summary(times[0]), _summary(times[1]), ratio


def _milliseconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def _summary(times: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"median_ms": statistics.median(times), "q20_ms": fifths[0], "q80_ms": fifths[3]}


def _shown(summary: dict[str, float]) -> str:
    return f"{summary['median_ms']:.3f} ({summary['q20_ms']:.3f}-{summary['q80_ms']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
