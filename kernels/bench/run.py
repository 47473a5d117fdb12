"""Kernel microbenchmarks: every kernel against named baselines, in the same run, interleaved.

    python kernels/bench/run.py --quick
    python kernels/bench/run.py --only gbn_act --json gbn_act.json
    python kernels/bench/run.py --json new.json --compare old.json

A case is timed only if its results agree with float64. Shown are medians and the 20 % and 80 % quantiles; a ratio is
the median of baseline ÷ ours over pairs of neighbours: above 1, ours is faster. "train" is forward and backward
together, "calibrate" and "evaluate" (or "forward") are the forward passes of a rating.

On a GPU the launches are timed inside CUDA graphs on buffers that are not in the cache any more; "eager" is a call from
Python, launch overhead included. The floor is the time that the memory alone takes for the bytes that must be moved.
On a CPU the plain PyTorch reference is timed against eager baselines, and there are no floors.

Exit code: 0, or 1 if a kernel gave wrong results (its other cases are still timed).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import timing
import torch

import bossnas_kernels

BENCHMARKS = ("gbn_act", "dwconv2d", "mhsa2d", "lars_ema", "ensemble_loss", "augment_views")
SLOWER = 1.1  # --compare flags a case that takes more than this many times the old median


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases, few repeats")
    parser.add_argument("--only", choices=BENCHMARKS, help="run this benchmark alone")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the measurements there, after every case")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="a file of --json to compare every case with")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further case after this long")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(argv)
    if options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available; leave --device out or say cpu")
    torch.set_num_threads(options.threads)
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    bandwidth, about = None, environment(device)
    if on_gpu:
        known = timing.BANDWIDTH.get(torch.cuda.get_device_name(device))
        bandwidth = known or timing.measured_bandwidth(device)
        about["bandwidth"] = f"{bandwidth / 1e12:.2f} TB/s ({'known' if known else 'measured by copying 1 GiB'})"
    try:
        old = {} if options.compare is None else old_medians(options.compare, about["device"])
    except ValueError as error:
        parser.error(f"--compare: {error}")
    for key, value in about.items():
        print(f"{key}: {value}")
    if not on_gpu:
        print("On a CPU the plain PyTorch reference is timed against eager baselines; there are no floors or targets.")

    report: dict[str, Any] = {"environment": about, "results": [], "wrong": [], "left_out": []}
    started = time.monotonic()
    for name in BENCHMARKS if options.only is None else (options.only,):
        for case in importlib.import_module(name).cases(device, options.quick):
            if time.monotonic() - started > options.seconds:
                report["left_out"].append(case.name)
            else:
                time_case(case, device, 15 if options.quick else 40, bandwidth, old, report)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")

    print()
    if options.compare:
        compared = [result for result in report["results"] if "to_old" in result]
        slower = [result for result in compared if result["to_old"] > SLOWER]
        print(
            f"{len(compared)} of {len(report['results'])} cases are in {options.compare}, "
            f"{len(slower)} slower by more than {SLOWER - 1:.0%}"
        )
        for result in slower:
            print(f"  {result['case']}: {result['to_old']:.2f} times the old time")
    if report["left_out"]:
        print(f"{len(report['left_out'])} case(s) left out after {options.seconds:.0f} s")
    if report["wrong"]:
        print(f"{len(report['wrong'])} case(s) gave wrong results and were not timed", file=sys.stderr)
    return 1 if report["wrong"] else 0


def time_case(
    case: timing.Case,
    device: torch.device,
    rounds: int,
    bandwidth: float | None,
    old: dict[str, float],
    report: dict[str, Any],
) -> None:
    """Checks a case, times it if it is right, and adds what came out to the report."""
    print(f"\n{case.name}", flush=True)
    try:
        fault = timing.fault(case)
        result = {} if fault else timing.measure(case, device, rounds, bandwidth)
    except Exception as error:  # one kernel that fails must not hide how the others do
        fault = timing.first_line(error)
    if fault:
        report["wrong"].append({"case": case.name, "fault": fault})
        print(f"  NOT TIMED, the kernel is wrong: {fault}", flush=True)
        return
    if case.name in old:
        result["to_old"] = result["ours"]["median_us"] / old[case.name]
    report["results"].append(result)
    show(result)


def environment(device: torch.device) -> dict[str, str | int]:
    """What a measurement depends on."""
    versions = {"torch": torch.__version__}
    for package in ("triton", "apex"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    about = {
        "device": f"{device.type} ({torch.cuda.get_device_name(device) if device.type == 'cuda' else _processor()})",
        "implementation": bossnas_kernels.implementation(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        **versions,
    }
    if device.type == "cuda":
        about |= {"cuda": torch.version.cuda or torch.version.hip, "cudnn": torch.backends.cudnn.version() or "none"}
    return about


def old_medians(file: Path, device: str) -> dict[str, float]:
    """Medians in µs by case of an earlier run. Raises ValueError if it is no such file or another device's."""
    try:
        report = json.loads(file.read_text())
        old_device = report["environment"]["device"]
        medians = {result["case"]: result["ours"]["median_us"] for result in report["results"]}
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is no result of this program; name a file that --json wrote") from None
    if old_device != device:
        raise ValueError(f"{file} was measured on {old_device}, this is {device}; compare runs of one device")
    return medians


def show(result: dict[str, Any]) -> None:
    """One line for ours, one per baseline, and the comparisons."""
    width = max(len(name) for name in ("ours", *result["baselines"]))
    floor = f"  {result['time_over_floor']:.2f} x floor" if "floor_us" in result else ""
    print(f"  {'ours':<{width}}  {_times(result['ours'])}  {result['gb_per_s']:.1f} GB/s{floor}")
    for name, baseline in result["baselines"].items():
        if "failed" in baseline:
            print(f"  {name:<{width}}  failed: {baseline['failed']}")
        else:
            print(f"  {name:<{width}}  {_times(baseline)}  ratio {baseline['ratio']:.2f}")
    if "verdict" in result:
        print(f"  {result['verdict']}")
    if "to_old" in result:
        print(f"  {result['to_old']:.2f} times the old time{'  SLOWER' if result['to_old'] > SLOWER else ''}")
    sys.stdout.flush()


def _times(side: dict[str, Any]) -> str:
    eager = f"  eager {side['eager_us']:.1f}{'' if side['graphed'] else ' (no graph)'}" if "eager_us" in side else ""
    return f"{side['median_us']:>9.1f} us ({side['q20_us']:.1f}-{side['q80_us']:.1f}){eager}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
