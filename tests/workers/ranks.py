"""Starts worker scripts in their own process group, under a launcher or none, and never waits for ever."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ROOT / "tests/workers"
HANG = 600  # seconds: longer than anything takes on a busy machine, short enough to find what hangs
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """Of a process that is started from a test: this checkout's code, one thread, CPU, no ranks inherited."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHED and not name.startswith("SLURM_")}
    return env | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(HANG),
    }


def until(happened: Callable[[], object], what: str, every: float = 0.02) -> object:
    """Waits for ``happened()`` to be true and returns it; fails with ``what`` after HANG seconds."""
    end = time.monotonic() + HANG
    while not (value := happened()):
        assert time.monotonic() < end, f"waited {HANG} s for this: {what}"
        time.sleep(every)
    return value


def start(launcher: str, ranks: int, script: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of ``tests/workers/script``. ``launcher``: python | torchrun | deepspeed."""
    port = str(free_port())
    front = {
        "python": [],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port],
        "deepspeed": [
            "-m",
            "deepspeed.launcher.runner",
            "--num_accelerators",
            str(ranks),
            "--master_port",
            port,
        ],
    }[launcher]
    process = subprocess.Popen(
        [sys.executable, *front, str(WORKERS / script), *arguments],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=HANG)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{script} hangs under {launcher}:\n{output}") from None
    return process.returncode, output
