"""Matrix products of float32 on a CPU by oneDNN, which is in every build of torch beside MKL.

torch hands these to MKL, which on processors that are not Intel's leaves half of the vector unit unused (AMD EPYC with
AVX-512, one thread: 105 GFLOP/s by MKL, 170 to 250 by oneDNN; see docs/results/step.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

from bossnas_kernels.eager import on_cpu

LEAST_WORK = 2**24  # multiply-adds; smaller products gain too little to be worth another rounding


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of a matrix: [rows, K], [N, K], [N] -> [rows, N]. Which library multiplies depends on the shapes
    alone, so a result does not change with what needs a gradient."""
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        HAS_ONEDNN
        and torch.backends.mkldnn.enabled
        and x.dtype == torch.float32
        and len(x) * weight.numel() >= LEAST_WORK
        and on_cpu(x, weight)
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(dy, weight.T) if of_x else None,
            _product(dy.T, x.T) if of_weight else None,
            dy.sum(0) if of_bias else None,
        )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] times the transpose of b [N, K], plus bias [N]."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
if HAS_ONEDNN and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape: tuple, weight_shape: tuple, *args: object, out_shape: object = None, **kwargs: object) -> int:
        return 2 * x_shape[0] * x_shape[1] * weight_shape[0]
