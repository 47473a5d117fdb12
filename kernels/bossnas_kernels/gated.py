"""Squeeze-and-excitation and the 1x1 convolution behind it, without the gated map between the two."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# One product for every image runs at half of a convolution's speed: from here on that costs more than the maps do
# (measured on CPU: 1.4 to 1.7 times faster at 16 and 24 outputs, 1.5 times slower at 112).
_MOST_OUTPUTS = 64


def gate(mean: Tensor, reduce: Tensor, reduce_bias: Tensor, expand: Tensor, expand_bias: Tensor) -> Tensor:
    """sigmoid(expand silu(reduce mean)) of the channels' means [N, C]; weights [R, C, 1, 1] and [C, R, 1, 1]."""
    hidden = F.silu(F.linear(mean, reduce.flatten(1), reduce_bias))
    return F.linear(hidden, expand.flatten(1), expand_bias).sigmoid()


def gated_pointwise(
    x: Tensor, reduce: Tensor, reduce_bias: Tensor, expand: Tensor, expand_bias: Tensor, weight: Tensor
) -> Tensor:
    """1x1 convolution [O, C, 1, 1] of x times its gate (see `gate`), [N, C, H, W] -> [N, O, H, W].

    On a CPU, where O is small, the gates go into the weights, one matrix for every image, so that neither pass writes
    or keeps a map of the input's size but the input's gradient.
    """
    parts = (reduce, reduce_bias, expand, expand_bias)
    if (
        x.device.type != "cpu"
        or len(weight) > _MOST_OUTPUTS
        or x.dtype not in (torch.float32, torch.float64)
        or x.dtype != weight.dtype
        or torch.is_autocast_enabled("cpu")
        or torch.jit.is_tracing()
        or torch.compiler.is_compiling()
    ):
        factor = gate(x.mean((2, 3)), *(p.to(x.dtype) for p in parts))
        return F.conv2d(x * factor[:, :, None, None], weight)
    return _GatedPointwise.apply(x, weight, *parts)


class _GatedPointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, *parts: Tensor) -> Tensor:
        rows, matrix = _rows(x), weight.flatten(1)
        ctx.save_for_backward(x, weight)
        with torch.enable_grad():  # of the small network in the gate; its graph serves the backward pass
            ctx.leaves = [t.detach().requires_grad_() for t in (rows.mean(1), *parts)]
            ctx.gate = gate(*ctx.leaves)
        y = torch.bmm(rows, (matrix * ctx.gate.detach()[:, None]).mT)  # [N, H*W, O]
        return y.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, dy_rows, matrix, factor = _rows(x), _rows(dy), weight.flatten(1), ctx.gate.detach()
        by_image = torch.bmm(dy_rows.mT, rows)  # [N, O, C]
        dweight = (by_image * factor[:, None]).sum(0).view_as(weight)
        with torch.enable_grad():
            dmean, *dparts = torch.autograd.grad(
                ctx.gate, ctx.leaves, (by_image * matrix).sum(1), retain_graph=True, allow_unused=True
            )
        dx = torch.baddbmm((dmean / rows.shape[1])[:, None], dy_rows, matrix * factor[:, None])
        return dx.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2), dweight, *dparts


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H*W, C], a view of a channels_last map."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
