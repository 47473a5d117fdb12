"""Tolerances and comparisons that the kernels' tests share."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest error, relative to the largest value of the float64 truth (at least 1). fp32: sums of some thousand products
# in another order. bf16 and fp16: twice the distance of neighbouring numbers below 1 (the interpreter cuts off instead
# of rounding; a second rounding comes from gradients stored between two passes).
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2 * 2**-7, torch.float16: 2 * 2**-10}


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value of ``want`` (at least 1); NaN if ``got`` holds one."""
    if want.numel() == 0:
        return 0.0
    scale = max(1.0, want.abs().max().item())
    return (got.double() - want.to(got.device)).abs().max().item() / scale


def check(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    off = error(got, want)
    assert off <= tolerance, f"{name} is off by {off:.1e}, more than {tolerance:.0e}"


def strided_gradients(like: Tensor):
    """Gradients of every kind of stride that autograd may hand on: (name, tensor)."""
    noise = torch.linspace(-2, 2, 2 * like.numel(), dtype=torch.float64).cos().to(like.device, like.dtype)
    yield "expanded", torch.full((1,) * like.dim(), 0.3, dtype=like.dtype, device=like.device).expand(like.shape)
    yield "row expanded", noise[: like[0].numel()].reshape(like[:1].shape).expand(like.shape)
    yield "every second", noise.reshape(*like.shape, 2)[..., 0]
    yield "transposed", noise[: like.numel()].reshape(like.transpose(0, 1).shape).transpose(0, 1)
    if like.dim() == 4:
        nhwc = noise[: like.numel()].reshape(like.permute(0, 2, 3, 1).shape)
        yield "channels last", nhwc.permute(0, 3, 1, 2)
        halves = noise.reshape(like.shape[0], 2 * like.shape[1], *like.shape[2:])
        yield "slice of a concatenation", halves[:, like.shape[1] :]
