"""CPU seconds of commands that do no work: how long a user waits for help and for the news of a mistake.

    python bench/startup.py [OTHER_CHECKOUT] [--repeats 10]

Each command runs in a process of its own, the checkouts in turn: a busy moment of the machine falls on both. The table
has the median of user and system time, with the lowest and highest; with another checkout the ratio of medians.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
COMMANDS = {
    "import bossnas": ["-c", "import bossnas"],
    "bossnas --help": ["-m", "bossnas.cli", "--help"],
    "bossnas --version": ["-m", "bossnas.cli", "--version"],
    "a mistake in a config": [
        "-m",
        "bossnas.cli",
        "search",
        "--config",
        "configs/hytra_ds.json",
        "--set",
        "train.epoch=2",
    ],
}


def seconds(checkout: Path, command: list[str]) -> float:
    """User and system time of one process that runs a command with a checkout's code."""
    env = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'kernels'}"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=checkout, env=env, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    checkouts = [HERE] if options.other is None else [options.other.resolve(), HERE]
    for name, command in COMMANDS.items():
        times: dict[Path, list[float]] = {checkout: [] for checkout in checkouts}
        for _ in range(options.repeats + 1):
            for checkout in checkouts:
                times[checkout].append(seconds(checkout, command))
        medians, cells = [], []
        for checkout in checkouts:
            counted = times[checkout][1:]  # the first one may still write bytecode and warm the disk's cache
            medians.append(statistics.median(counted))
            cells.append(f"{medians[-1]:.2f} s ({min(counted):.2f} to {max(counted):.2f})")
        ratio = f"  {medians[0] / medians[1]:.1f} times" if len(medians) == 2 else ""
        print(f"{name:22} {'  '.join(cells)}{ratio}", flush=True)


if __name__ == "__main__":
    main()
