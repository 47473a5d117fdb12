"""Plain PyTorch implementations of the kernels: correct on every device and dtype, fast on CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ACTIVATIONS = ("none", "relu", "silu")

# Groups of at most this many elements are folded into channels and normalised by one call. Larger ones are
# cheaper one by one: the copies that folding makes cost more than the calls it saves (measured on CPU).
_FOLD_ELEMENTS = 8 * 1024


def gbn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = 1,
    residual: Tensor | None = None,
    act: str = "none",
    training: bool = True,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped batch norm: y = act(norm(x) * weight + bias + residual), each group by its own statistics.

    Group g is the rows [g*N, (g+1)*N) of x. The result equals `groups` separate batch norms, in value and in
    gradient; channels_last inputs give channels_last results.

    x: [groups*N, C, H, W] or [groups*N, C], fp64, fp32, bf16 or fp16.
    weight, bias: [C], shared by the groups (their gradients are summed), or [groups, C].
    residual: shape of x, added before the activation. act: "none", "relu" or "silu".
    training: normalise by the batch (biased variance, as `F.batch_norm`); otherwise by running_mean and
        running_var, [C] or [groups, C], which are read and never written.

    Returns (y, mean, var), y like x. In training mean and **unbiased** var are those of every group,
    [groups, C], without gradient: what running statistics are averaged from; autograd may hold them, so do
    not write to them. In evaluation they are the statistics used. Both are fp32 (fp64 for an fp64 input).
    Raises ValueError for shapes, groups or activations that do not fit, and in training for groups of a
    single value per channel.
    """
    if x.dim() not in (2, 4):
        raise ValueError(f"x: expected [groups*N, C, H, W] or [groups*N, C], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating-point tensor, got {x.dtype}")
    rows, channels = x.shape[:2]
    if groups < 1 or rows == 0 or rows % groups:
        raise ValueError(f"groups: expected a positive divisor of the {rows} rows of x, got {groups}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    stats_dtype = torch.promote_types(x.dtype, torch.float32)
    weight = _per_channel("weight", weight, groups, channels).to(stats_dtype)
    bias = _per_channel("bias", bias, groups, channels).to(stats_dtype)
    if residual is not None:
        residual = residual.to(x.dtype)

    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: expected tensors in evaluation mode, got None")
        mean = _per_channel("running_mean", running_mean, groups, channels).to(stats_dtype)
        var = _per_channel("running_var", running_var, groups, channels).to(stats_dtype)
        if groups == 1 or max(t.dim() for t in (weight, bias, mean, var)) == 1:
            flat = (t.flatten() for t in (mean, var, weight, bias))
            y = F.batch_norm(x, *flat, False, 0.0, eps)
            y = _activate(y if residual is None else y + residual, act)
        else:
            y = _evaluate_groups(x, weight, bias, mean, var, residual, groups, act, eps)
        return y, mean.expand(groups, channels), var.expand(groups, channels)

    if x.numel() == groups * channels:
        raise ValueError(
            f"x: expected more than one value per channel in each of the {groups} groups to normalise by, "
            f"got shape {tuple(x.shape)}"
        )
    if groups > 1 and x.numel() > groups * _FOLD_ELEMENTS:
        return _GroupByGroup.apply(x, weight, bias, residual, groups, act, eps)
    return _fold_groups(x, weight, bias, residual, groups, act, eps)


def _per_channel(name: str, value: Tensor, groups: int, channels: int) -> Tensor:
    if tuple(value.shape) not in ((channels,), (groups, channels)):
        raise ValueError(
            f"{name}: expected shape [{channels}] or [{groups}, {channels}], got {tuple(value.shape)}"
        )
    return value


def _activate(x: Tensor, act: str) -> Tensor:
    """Apply act to a map that nothing else refers to: ReLU works in place, which saves a map in memory."""
    return F.relu_(x) if act == "relu" else F.silu(x) if act == "silu" else x


def _memory_format(x: Tensor) -> torch.memory_format:
    # A map of one position or one channel is contiguous in both formats; the plain one is the faster then.
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _fold_groups(x, weight, bias, residual, groups, act, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Training-mode groups by one batch norm over groups*C channels: [groups*N, C] becomes [N, groups*C]."""
    channels = x.shape[1]
    mean, var = weight.new_zeros(2, groups * channels)
    if groups > 1:
        weight = weight.expand(groups, channels)
        bias = bias.expand(groups, channels)
    weight, bias = weight.flatten(), bias.flatten()

    def norm(folded: Tensor) -> Tensor:
        # With momentum 1 the running statistics become the batch's own, the variance unbiased.
        y = F.batch_norm(folded, mean, var, weight, bias, True, 1.0, eps)
        return _activate(y, act) if residual is None else y

    if groups == 1:
        y = norm(x)
    elif x.dim() == 4 and _memory_format(x) is torch.channels_last:
        x_NHWC = x.permute(0, 2, 3, 1)
        folded = x_NHWC.reshape(groups, -1, channels).transpose(0, 1).reshape(-1, groups * channels)
        y = norm(folded).view(-1, groups, channels).transpose(0, 1).contiguous()
        y = y.view(x_NHWC.shape).permute(0, 3, 1, 2)
    else:
        tail = x.shape[2:]
        folded = x.reshape(groups, -1, channels, *tail).transpose(0, 1).reshape(-1, groups * channels, *tail)
        y = norm(folded).view(-1, groups, channels, *tail).transpose(0, 1).contiguous().view(x.shape)
    if residual is not None:
        y = _activate(y + residual, act)
    return y, mean.view(groups, channels), var.view(groups, channels)


def _evaluate_groups(x, weight, bias, mean, var, residual, groups, act, eps) -> Tensor:
    """Evaluation: one pass over x by the affine map x * scale + shift of every group."""
    spread = (groups, 1, x.shape[1]) + (1,) * (x.dim() - 2)
    scale_GC = (weight * torch.rsqrt(var + eps)).expand(groups, -1)
    shift_GC = (bias - mean * scale_GC).expand(groups, -1)
    y = torch.addcmul(shift_GC.reshape(spread), x.unflatten(0, (groups, -1)), scale_GC.reshape(spread))
    y = y.flatten(0, 1).to(x.dtype)
    return _activate(y if residual is None else y + residual, act)


class _GroupByGroup(torch.autograd.Function):
    """Training-mode groups one after another, each written straight into its rows of one result.

    Against an eager loop this saves the concatenation, the autograd nodes of every group, and, with ReLU, the
    map before the activation: the backward pass reads the sign from the result. Activations are applied to
    one group at a time, while it is in the cache, and no further temporary of the whole map is made.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, residual, groups, act, eps):
        layout = _memory_format(x)
        x = x.contiguous(memory_format=layout)
        channels = x.shape[1]
        y = torch.empty_like(x)
        z = torch.empty_like(x) if act == "silu" else y  # the map before the activation, overwritten by ReLU
        mean, var = weight.new_zeros(2, groups, channels)
        saved_mean, saved_rstd = weight.new_empty(2, groups, channels)
        weight_rows, bias_rows = _group_rows(weight, groups), _group_rows(bias, groups)
        mean_rows, var_rows = mean.unbind(), var.unbind()
        saved_mean_rows, saved_rstd_rows = saved_mean.unbind(), saved_rstd.unbind()
        x_rows, y_rows, z_rows = x.chunk(groups), y.chunk(groups), z.chunk(groups)
        residual_rows = None if residual is None else residual.chunk(groups)
        for g in range(groups):
            # With momentum 1 the running statistics become the group's own, the variance unbiased.
            torch.native_batch_norm(
                x_rows[g], weight_rows[g], bias_rows[g], mean_rows[g], var_rows[g], True, 1.0, eps,
                out=(z_rows[g], saved_mean_rows[g], saved_rstd_rows[g]),
            )  # fmt: skip
            if residual_rows is not None:
                z_rows[g].add_(residual_rows[g])
            if act == "relu":
                z_rows[g].relu_()
            elif act == "silu":
                torch.ops.aten.silu.out(z_rows[g], out=y_rows[g])
        ctx.save_for_backward(x, weight, saved_mean, saved_rstd, None if act == "none" else z)
        ctx.groups, ctx.act, ctx.eps, ctx.layout, ctx.shared_bias = groups, act, eps, layout, bias.dim() == 1
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _dmean, _dvar):
        x, weight, saved_mean, saved_rstd, z = ctx.saved_tensors
        groups = ctx.groups
        dy = dy.contiguous(memory_format=ctx.layout)
        dx = torch.empty_like(x)
        dweight, dbias = torch.empty_like(saved_mean), torch.empty_like(saved_mean)
        dresidual = torch.empty_like(x) if ctx.needs_input_grad[3] and z is not None else None
        dy_rows, x_rows, dx_rows = dy.chunk(groups), x.chunk(groups), dx.chunk(groups)
        if z is None:
            dz_rows = dy_rows
            dresidual = dy if ctx.needs_input_grad[3] else None
        else:
            z_rows = z.chunk(groups)
            # Without a residual the gradient before the activation is only needed one group at a time.
            dz_rows = (
                (torch.empty_like(x_rows[0]),) * groups if dresidual is None else dresidual.chunk(groups)
            )
        weight_rows, dweight_rows, dbias_rows = _group_rows(weight, groups), dweight.unbind(), dbias.unbind()
        mean_rows, rstd_rows = saved_mean.unbind(), saved_rstd.unbind()
        aten = torch.ops.aten
        for g in range(groups):
            if ctx.act == "relu":
                aten.threshold_backward.grad_input(dy_rows[g], z_rows[g], 0, grad_input=dz_rows[g])
            elif ctx.act == "silu":
                aten.silu_backward.grad_input(dy_rows[g], z_rows[g], grad_input=dz_rows[g])
            aten.native_batch_norm_backward.out(
                dz_rows[g], x_rows[g], weight_rows[g], None, None, mean_rows[g], rstd_rows[g], True, ctx.eps,
                (True, True, True), out0=dx_rows[g], out1=dweight_rows[g], out2=dbias_rows[g],
            )  # fmt: skip
        if weight.dim() == 1:
            dweight = dweight.sum(0)
        if ctx.shared_bias:
            dbias = dbias.sum(0)
        return dx, dweight, dbias, dresidual, None, None, None


def _group_rows(value: Tensor, groups: int) -> tuple[Tensor, ...]:
    return value.unbind() if value.dim() == 2 else (value,) * groups


def attention(qkv: Tensor, heads: int) -> Tensor:
    """Multi-head self-attention over the positions of a map: out_i = sum_j softmax_j(q_i.k_j / sqrt(d)) v_j.

    qkv: [N, 3*heads*d, H, W], channels ordered q (all heads), k, v, with d consecutive channels a head; the
    tokens are the H*W positions, row by row; no positional term. Returns [N, heads*d, H, W] in the memory
    format of qkv. Raises ValueError for shapes that do not fit.
    """
    if qkv.dim() != 4:
        raise ValueError(f"qkv: expected [N, 3*heads*d, H, W], got shape {tuple(qkv.shape)}")
    batch, channels, height, width = qkv.shape
    if heads < 1 or channels == 0 or channels % (3 * heads):
        raise ValueError(f"heads: expected 3*heads to divide the {channels} channels of qkv, got {heads}")
    layout = _memory_format(qkv)
    tokens = qkv.flatten(2).transpose(1, 2).contiguous()  # [N, H*W, 3*heads*d], free for channels_last
    q, k, v = tokens.view(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v)  # [N, heads, H*W, d]
    out_NHWC = out.transpose(1, 2).reshape(batch, height, width, -1)
    return out_NHWC.permute(0, 3, 1, 2).contiguous(memory_format=layout)
