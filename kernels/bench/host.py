"""What a call of a kernel costs the host, launch by Triton included, where no GPU is needed: the driver is left out.

    python kernels/bench/host.py
    python kernels/bench/host.py --project OTHER_CHECKOUT --rounds 3

Microseconds of the thread's CPU time, the smallest of many, on tensors so small that PyTorch's own work is hidden
nowhere. Kernels are compiled for sm_90 on the CPU. With ``--project`` another checkout takes turns with this one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
LOOPS, REPEATS = 10, 100
TENSORS = 445  # of HyTra's block 0, of which a step gives 178 a gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, help="another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each, in turns (default 1)")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.one)))
        return
    if options.project and not (options.project / "kernels" / "bossnas_kernels").is_dir():
        parser.error(f"--project: {options.project} is no checkout of this project")
    projects = {"ours": HERE, **({"theirs": options.project} if options.project else {})}
    best: dict[str, dict[str, float]] = {name: {} for name in projects}
    for _ in range(options.rounds):
        for name, project in projects.items():
            command = [sys.executable, __file__, "--one", str(project.resolve())]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            for case, value in found.items():
                best[name][case] = min(value, best[name].get(case, value))
    print(f"{'us per call':<38}" + "".join(f"{name:>10}" for name in best))
    for case in best["ours"]:
        print(f"{case:<38}" + "".join(f"{values[case]:>10.1f}" for values in best.values()))


def measured(project: Path) -> dict[str, float]:
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path[:0] = [str(project), str(project / "kernels"), str(project / "tests" / "kernels")]
    import aot
    import torch
    import triton
    from triton.compiler.compiler import CompiledKernel

    torch.set_num_threads(1)
    triton.runtime.driver.set_active(aot.StubDriver(aot.TARGETS["sm_90"][0], 100))
    # the launcher written in C is all that is left out
    CompiledKernel.run = property(lambda self: lambda *arguments: None)
    CompiledKernel._init_handles = lambda self: None
    CompiledKernel.launch_metadata = lambda self, *arguments: None

    from bossnas_kernels import attention, common, depthwise, ensemble_loss, grouped_norm, lars

    common.architecture = lambda device: "sm_90"
    torch.manual_seed(0)

    def map_of(channels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(8, channels, 2, 2).to(dtype).contiguous(memory_format=torch.channels_last)

    x, dy = map_of(64).requires_grad_(), map_of(64)
    qkv, dout = map_of(192, torch.bfloat16).requires_grad_(), map_of(64, torch.bfloat16)
    weight, bias, mean, var = (torch.rand(64) + 1 for _ in range(4))
    weight.requires_grad_(), bias.requires_grad_()
    taps = torch.randn(64, 1, 3, 3).requires_grad_()
    q, k = torch.randn(4, 8, 64).requires_grad_(), torch.randn(4, 8, 64)
    weights = [torch.zeros(64 + i % 7) for i in range(TENSORS)]
    momenta, targets = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    gradients = [torch.zeros_like(w) if i % 5 < 2 else None for i, w in enumerate(weights)]
    excluded = [i % 2 == 0 for i in range(TENSORS)]
    running = {"training": False, "running_mean": mean, "running_var": var}

    def norm(**how) -> torch.Tensor:
        return grouped_norm.gbn_act(x, weight, bias, act="relu", **how)[0]

    def no_grad(call: Callable) -> None:
        with torch.no_grad():
            call()

    def step() -> None:
        if not hasattr(lars, "lars_squares"):  # older checkouts look at the tensors before the call
            lars.takes(weights, gradients, momenta, targets)
        settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-6, "trust": 1e-3, "ema": 0.99}
        lars.lars_ema_step(weights, gradients, momenta, excluded, targets, **settings)

    grad, inputs = torch.autograd.grad, (x, weight, bias)
    cases: dict[str, Callable] = {
        "gbn_act, training, no gradient": lambda: no_grad(lambda: norm(groups=8)),
        "gbn_act, evaluation, no gradient": lambda: no_grad(lambda: norm(**running)),
        "gbn_act, training, with backward": lambda: grad(norm(groups=8), inputs, dy),
        "gbn_act, evaluation, with backward": lambda: grad(norm(**running), inputs, dy),
        "dwconv2d_stats, with backward": lambda: grad(
            depthwise.dwconv2d_stats(x, taps, bias, groups=8)[0], (x, taps, bias), dy
        ),
        "mhsa2d_stats, with backward": lambda: grad(attention.mhsa2d_stats(qkv, 1, groups=8)[0], qkv, dout),
        "byol_ensemble_loss, with backward": lambda: grad(ensemble_loss.byol_ensemble_loss(q, k).sum(), q),
        f"lars_ema_step, {TENSORS} tensors": step,
    }
    return {name: fastest(case) for name, case in cases.items()}


def fastest(call: Callable) -> float:
    for _ in range(20):
        call()
    seconds = []
    for _ in range(REPEATS):
        started = time.thread_time()
        for _ in range(LOOPS):
            call()
        seconds.append(time.thread_time() - started)
    return min(seconds) / LOOPS * 1e6


if __name__ == "__main__":
    main()
