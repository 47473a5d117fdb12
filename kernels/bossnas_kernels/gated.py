"""Squeeze-and-excitation and the 1x1 convolution behind it, without the gated map between the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bossnas_kernels.eager import on_cpu

# One product for every image runs at half of a convolution's speed: from here on that costs more than the maps do
# (measured on CPU: 1.4 to 1.7 times faster at 16 and 24 outputs, 1.5 times slower at 112).
_MOST_OUTPUTS = 64


def gated_pointwise(
    x: Tensor, weight: Tensor, gate: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]
) -> Tensor:
    """1x1 convolution [O, C, 1, 1] of x times its gates, [N, C, H, W] -> [N, O, H, W].

    ``gate`` makes them from the channels' means, [N, C, 1, 1] -> [N, C, 1, 1], with these parameters.

    On a CPU, where O is small, the gates go into the weights, one matrix for every image, so that neither pass writes
    or keeps a map of the input's size but the input's gradient. A forward pass alone would gain nothing.
    """
    if not torch.is_grad_enabled() or len(weight) > _MOST_OUTPUTS or not on_cpu(x, weight, *parameters):
        return F.conv2d(x * gate(x.mean((2, 3), keepdim=True)), weight)
    return _GatedPointwise.apply(x, weight, gate, *parameters)


class _GatedPointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, gate: Callable[[Tensor], Tensor], *parameters: Tensor) -> Tensor:
        rows, matrix = _rows(x), weight.flatten(1)
        mean = rows.mean(1)[:, :, None, None]
        factor = gate(mean).flatten(1)
        ctx.save_for_backward(x, weight, mean, factor)
        ctx.gate, ctx.parameters = gate, parameters
        y = torch.bmm(rows, (matrix * factor[:, None]).mT)  # [N, H*W, O]
        return y.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, factor = ctx.saved_tensors
        rows, dy_rows, matrix = _rows(x), _rows(dy), weight.flatten(1)
        by_image = torch.bmm(dy_rows.mT, rows)  # [N, O, C]
        dweight = (by_image * factor[:, None]).sum(0).view_as(weight)
        leaves = [mean.detach().requires_grad_(), *ctx.parameters]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.enable_grad():  # again, since it is small: a graph kept from the forward pass would be checkpointed
            again = ctx.gate(leaves[0])
        found = iter(torch.autograd.grad(again, wanted, (by_image * matrix).sum(1).view_as(again)))
        dmean, *dparameters = [next(found) if leaf.requires_grad else None for leaf in leaves]
        dx = torch.baddbmm((dmean.flatten(1) / rows.shape[1])[:, None], dy_rows, matrix * factor[:, None])
        return dx.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2), dweight, None, *dparameters


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H*W, C], a view of a channels_last map."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
