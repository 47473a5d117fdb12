"""How far the kernels are from float64, forward and backward, by dtype: python tests/kernels/errors.py

Runs in Triton's interpreter where there is no GPU. Errors are relative to the largest value of the truth (at least 1).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "kernels"), str(Path(__file__).resolve().parent)]

import torch
import triton
from compare import error

from bossnas_kernels import attention, depthwise, ensemble_loss, grouped_norm, lars, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*size, dtype=torch.float32):
    x = torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(DEVICE, dtype)
    return (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and size[1] > 1 else x).requires_grad_()


def cases(dtype):
    """Name, function of (module with the kernels or the reference, tensors), tensors that have a gradient."""
    norm = [draw(6, 48, 9, 7, dtype=dtype), draw(48), draw(48), draw(6, 48, 9, 7, dtype=dtype)]
    for act in ("none", "relu", "silu"):
        yield (
            f"gbn_act {act}",
            lambda m, x, w, b, r, act=act: m.gbn_act(x, w, b, groups=3, residual=r, act=act)[0],
            norm,
            grouped_norm,
        )
    for k, stride in ((3, 1), (3, 2), (5, 1), (5, 2), (4, 4)):
        yield (
            f"dwconv2d {k}x{k} stride {stride}",
            lambda m, x, w, b, stride=stride: m.dwconv2d(x, w, b, stride=stride),
            [draw(3, 40, 13, 12, dtype=dtype), draw(40, 1, k, k), draw(40)],
            depthwise,
        )
    for side in (7, 14):
        yield (
            f"mhsa2d {side * side} positions",
            lambda m, qkv: m.mhsa2d(qkv, 1),
            [draw(2, 192, side, side, dtype=dtype)],
            attention,
        )
    k = draw(4, 9, 200, dtype=dtype).detach()
    yield (
        "byol_ensemble_loss",
        lambda m, q: m.byol_ensemble_loss(q, k.to(q.dtype)),
        [draw(4, 9, 200, dtype=dtype)],
        ensemble_loss,
    )


def lars_errors():
    shapes = ((64, 32, 3, 3), (1000,), (17,), (4096, 3))
    values = [
        [torch.randn(s, generator=torch.Generator().manual_seed(i + 10 * k)) for i, s in enumerate(shapes)]
        for k in range(4)
    ]
    given = [[t.to(DEVICE) for t in column] for column in values]
    truth = [[t.double() for t in column] for column in values]
    for step, lists in ((lars.lars_ema_step, given), (reference.lars_ema_step, truth)):
        for _ in range(5):
            step(
                *lists[:3],
                [False, True, True, False],
                lists[3],
                lr=0.5,
                momentum=0.9,
                weight_decay=1e-2,
                trust=0.1,
                ema=0.9,
            )
    return [max(error(g, t) for g, t in zip(a, b, strict=True)) for a, b in zip(given, truth, strict=True)]


def main():
    print(
        f"{DEVICE}, triton {triton.__version__}, torch {torch.__version__}, "
        f"{'interpreter' if grouped_norm.common.INTERPRET else 'native'}\n"
    )
    print("| kernel | dtype | result | gradients, in the order of the arguments |\n|---|---|---|---|")
    for dtype in DTYPES:
        for name, function, leaves, module in cases(dtype):
            exact = [t.detach().double().cpu().requires_grad_() for t in leaves]
            y, want = function(module, *leaves), function(reference, *exact)
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
            if "relu" in name:  # nearer to 0 than y's rounding, the sign before ReLU is a toss-up
                grad = grad * (want.abs() > 2**-6)
            got = torch.autograd.grad(y, leaves, grad.to(DEVICE))
            wanted = torch.autograd.grad(want, exact, grad.double())
            off = " ".join(f"{error(a, b):.0e}" for a, b in zip(got, wanted, strict=True))
            print(f"| {name} | {str(dtype)[6:]} | {error(y.detach(), want.detach()):.0e} | {off} |")
    weight, _, momentum, target = lars_errors()
    print(f"| lars_ema_step, 5 steps | float32 | weight {weight:.0e}, momentum {momentum:.0e}, target {target:.0e} | |")


if __name__ == "__main__":
    main()
