"""mhsa2d against attention written out and PyTorch's fused attention with the transposes that it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from timing import Case, Inputs, Results, Side, generator
from torch import Tensor

from bossnas_kernels import mhsa2d, reference

# (space, rows, heads, head width, side of the map): the two scales of HyTra that have attention.
FULL = [("hytra", 256, 4, 64, 14), ("hytra", 256, 8, 64, 7), ("hytra", 64, 4, 64, 14), ("hytra", 64, 8, 64, 7)]
CPU_FULL = [("hytra", 16, 1, 32, 14), ("hytra", 32, 1, 64, 7), ("hytra", 8, 4, 64, 14), ("hytra", 16, 8, 64, 7)]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The most telling cases first, in training (forward and backward) and in rating (forward)."""
    shapes = CPU_FULL if device.type == "cpu" else FULL
    for shape in shapes[:2] if quick else shapes:
        yield _case(shape, True, device)
        yield _case(shape, False, device)


def _case(shape: tuple, train: bool, device: torch.device) -> Case:
    space, rows, heads, width, side = shape
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def draw() -> Inputs:
        normal = generator(device, dtype)
        return {
            "qkv": normal(rows, 3 * heads * width, side, side).requires_grad_(train),
            "dy": normal(rows, heads * width, side, side),
        }

    def work(attend: Callable[[Tensor, int], Tensor]) -> Callable[[Inputs], Results]:
        def run(i: Inputs) -> Results:
            if not train:
                with torch.no_grad():
                    return (attend(i["qkv"], heads),)
            y = attend(i["qkv"], heads)
            return y, *torch.autograd.grad(y, [i["qkv"]], i["dy"])

        return run

    # Forward reads q, k, v and writes the result; backward reads these and dy and writes three gradients.
    moved = (12 if train else 4) * rows * heads * width * side * side * dtype.itemsize
    name = (
        f"mhsa2d {space} {rows}x{side}x{side} {heads} heads of {width} {str(dtype).removeprefix('torch.')} "
        f"{'train' if train else 'forward'}"
    )
    return Case(
        name, dtype, draw, Side(work(mhsa2d)), work(reference.mhsa2d),
        {"naive": Side(work(naive)), "SDPA": Side(work(sdpa))}, moved, gradients=int(train),
        floor_ratio=(4 * 1.5 + 8 * 2) / 12 if train else 1.5,
        speedups={"SDPA": 1.2, **({"naive": 3.0} if side == 14 else {})})  # fmt: skip


def naive(qkv: Tensor, heads: int) -> Tensor:
    """Scores, softmax and sum as three operations."""
    q, k, v = _split(qkv, heads)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return _join(scores @ v, qkv)


def sdpa(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = _split(qkv, heads)
    return _join(F.scaled_dot_product_attention(q, k, v), qkv)


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[N, 3*heads*d, H, W] -> three of [N, heads, H*W, d], views of a channels_last map."""
    q, k, v = qkv.permute(0, 2, 3, 1).unflatten(3, (3, heads, -1)).flatten(1, 2).permute(2, 0, 3, 1, 4)
    return q, k, v


def _join(out: Tensor, qkv: Tensor) -> Tensor:
    """[N, heads, H*W, d] -> [N, heads*d, H, W] in channels_last."""
    return out.transpose(1, 2).flatten(2).unflatten(1, qkv.shape[2:]).permute(0, 3, 1, 2)
