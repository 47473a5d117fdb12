"""Plain PyTorch implementations of the kernels: correct on every device and dtype, fast on CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bossnas_kernels import checks
from bossnas_kernels.eager import on_cpu

# Groups of at most this many elements are folded into channels and normalised by one call. Larger ones are
# cheaper one by one: the copies that folding makes cost more than the calls it saves (measured on CPU).
_FOLD_ELEMENTS = 8 * 1024

# Large weights are updated in pieces of so many elements a thread: weight, gradient and momentum stay in the cache
# between the operations of an update.
_UPDATE_ELEMENTS = 64 * 1024

# Self-attention over at most this many positions of an NCHW map in fp32 is written out: its products read the map as it
# lies, scaled_dot_product_attention only a transposed copy (measured on CPU: 1.1 to 1.6 times faster up to here, then
# less and less, slower at 196).
_WRITTEN_OUT_TOKENS = 64


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
    """`bossnas_kernels.gbn_act` in plain torch; channels_last inputs give channels_last results."""
    checks.gbn_act(x, weight, bias, groups, residual, act, training, running_mean, running_var)
    channels = x.shape[1]
    stats_dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(stats_dtype), bias.to(stats_dtype)
    if residual is not None:
        residual = residual.to(x.dtype)

    if not training:
        mean, var = running_mean.to(stats_dtype), running_var.to(stats_dtype)
        if groups == 1 or max(t.dim() for t in (weight, bias, mean, var)) == 1:
            flat = (t.flatten() for t in (mean, var, weight, bias))
            y = F.batch_norm(x, *flat, False, 0.0, eps)
            y = _activate(y if residual is None else y + residual, act)
        else:
            y = _evaluate_groups(x, weight, bias, mean, var, residual, groups, act, eps)
        return y, mean.expand(groups, channels), var.expand(groups, channels)

    # torch.compile fuses the folding away, and cannot trace kernels that write into views
    if groups > 1 and x.numel() > groups * _FOLD_ELEMENTS and not torch.compiler.is_compiling():
        return _GroupByGroup.apply(x, weight, bias, residual, groups, act, eps)
    return _fold_groups(x, weight, bias, residual, groups, act, eps)


def _activate(x: Tensor, act: str) -> Tensor:
    """Apply act to a map that nothing else refers to: in place where no gradient needs it, which saves a map."""
    if act == "silu":
        return F.silu(x, inplace=not torch.is_grad_enabled())
    return F.relu_(x) if act == "relu" else x


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

    Against an eager loop this saves the concatenation, the autograd nodes of every group, and the map before the
    activation: the backward pass reads ReLU's sign from the result, and normalises x again for SiLU. Temporaries are of
    one group at a time, while it is in the cache.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, residual, groups, act, eps):
        layout = _memory_format(x)
        x = x.contiguous(memory_format=layout)
        y = torch.empty_like(x)
        mean, var = weight.new_zeros(2, groups, x.shape[1])
        saved_mean, saved_rstd = weight.new_empty(2, groups, x.shape[1])
        weight_rows, bias_rows = _group_rows(weight, groups), _group_rows(bias, groups)
        mean_rows, var_rows = mean.unbind(), var.unbind()
        saved_mean_rows, saved_rstd_rows = saved_mean.unbind(), saved_rstd.unbind()
        x_rows, y_rows = x.chunk(groups), y.chunk(groups)
        residual_rows = None if residual is None else residual.chunk(groups)
        z_rows = (torch.empty_like(x_rows[0]),) * groups if act == "silu" else y_rows
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
        # what tells the map before the activation, beside x
        extra = y if act == "relu" else residual if act == "silu" else None
        ctx.save_for_backward(x, weight, bias, saved_mean, saved_rstd, extra)
        ctx.groups, ctx.act, ctx.eps, ctx.layout, ctx.has_residual = groups, act, eps, layout, residual is not None
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _dmean, _dvar):
        x, weight, bias, saved_mean, saved_rstd, extra = ctx.saved_tensors
        groups, channels, act = ctx.groups, x.shape[1], ctx.act
        dy = dy.contiguous(memory_format=ctx.layout)
        dx = torch.empty_like(x)
        dweight, dbias = torch.empty_like(saved_mean), torch.empty_like(saved_mean)
        dy_rows, x_rows, dx_rows = dy.chunk(groups), x.chunk(groups), dx.chunk(groups)
        extra_rows = None if extra is None else extra.chunk(groups)
        of_residual = ctx.has_residual and ctx.needs_input_grad[3]
        if act == "none":
            dz_rows, dresidual = dy_rows, dy if of_residual else None
        else:
            # Without a residual the gradient before the activation is only needed one group at a time.
            dresidual = torch.empty_like(x) if of_residual else None
            dz_rows = (torch.empty_like(x_rows[0]),) * groups if dresidual is None else dresidual.chunk(groups)
        weight_rows = _group_rows(weight, groups)
        dweight_rows, dbias_rows = dweight.unbind(), dbias.unbind()
        mean_rows, rstd_rows = saved_mean.unbind(), saved_rstd.unbind()
        count = x_rows[0].numel() // channels
        scale = (weight * saved_rstd).unbind()  # [C] of every group
        shift = (bias - saved_mean * weight * saved_rstd).unbind() if act == "silu" else ()
        aten, unit, own = torch.ops.aten, _Unit(weight), on_cpu(x)
        for g in range(groups):
            if act == "relu":
                aten.threshold_backward.grad_input(dy_rows[g], extra_rows[g], 0, grad_input=dz_rows[g])
            elif act == "silu":
                # dx is free until the end of the turn
                z = unit.affine(x_rows[g], scale[g], shift[g], out=dx_rows[g])
                if extra_rows is not None:
                    z.add_(extra_rows[g])
                aten.silu_backward.grad_input(dy_rows[g], z, grad_input=dz_rows[g])
            given = dz_rows[g], x_rows[g], weight_rows[g], None, None, mean_rows[g], rstd_rows[g], True, ctx.eps
            if not own:
                aten.native_batch_norm_backward.out(
                    *given, (True, True, True), out0=dx_rows[g], out1=dweight_rows[g], out2=dbias_rows[g]
                )
                continue
            _, dweight_g, dbias_g = aten.native_batch_norm_backward(*given, (False, True, True))
            dweight_rows[g].copy_(dweight_g)
            dbias_rows[g].copy_(dbias_g)
            # dx = scale (dz - mean of dz - (x - mean) rstd mean of dz (x - mean) rstd); that operation's own dx would
            # be copied
            slope = -scale[g] * rstd_rows[g] * dweight_g / count
            unit.affine(dz_rows[g], scale[g], -scale[g] * dbias_g / count - slope * mean_rows[g], out=dx_rows[g])
            dx_rows[g].addcmul_(x_rows[g], slope.view((-1,) + (1,) * (x.dim() - 2)))
        if weight.dim() == 1:
            dweight = dweight.sum(0)
        if bias.dim() == 1:
            dbias = dbias.sum(0)
        return dx, dweight, dbias, dresidual, None, None, None


class _Unit:
    """x * scale + shift by channel in one pass: a batch norm whose statistics are mean 0 and variance 1."""

    def __init__(self, like: Tensor):
        channels = like.shape[-1]
        self.mean, self.var, self.unused = like.new_zeros(channels), like.new_ones(channels), like.new_empty(0)

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
        torch.native_batch_norm(
            x, scale, shift, self.mean, self.var, False, 0.0, 0.0, out=(out, self.unused, self.unused)
        )
        return out


def _group_rows(value: Tensor, groups: int) -> tuple[Tensor, ...]:
    return value.unbind() if value.dim() == 2 else (value,) * groups


def dwconv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1) -> Tensor:
    """See `bossnas_kernels.dwconv2d`."""
    checks.dwconv2d(x, weight, bias, stride)
    kernel = weight.shape[-1]
    bias, weight = None if bias is None else bias.to(x.dtype), weight.to(x.dtype)
    if kernel == 5 and on_cpu(x, weight):
        return _Depthwise5.apply(x, weight, bias, stride)
    return F.conv2d(x, weight, bias, stride, 0 if kernel == stride else kernel // 2, groups=x.shape[1])


class _Depthwise5(torch.autograd.Function):
    """5x5 with a weight gradient in two windows, columns 0 to 2 and 2 to 4: oneDNN has no fast one for kernels wider
    than 3 (measured on CPU: 14 against 36 ms, of a map of 16 x 144 x 56 x 56)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, bias, stride, 2, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        layout = _memory_format(x)
        dy = dy.contiguous(memory_format=layout)

        def gradients(dy: Tensor, x: Tensor, weight: Tensor, padding: list[int], wanted: tuple[bool, ...]) -> tuple:
            sizes = None if not of_bias else [len(weight)]
            strides = [ctx.stride] * 2
            return torch.ops.aten.convolution_backward(
                dy, x, weight, sizes, strides, padding, [1, 1], False, [0, 0], len(weight), wanted
            )

        dx, _, dbias = gradients(dy, x, weight, [2, 2], (of_x, False, of_bias))
        dweight = None
        if of_weight:
            # a window of three columns, padded by one, begins one column before or behind where it should
            left, right = (
                gradients(dy, F.pad(x, (shift, -shift)), weight[..., :3], [2, 1], (False, True, False))[1]
                for shift in (1, -1)
            )
            if ctx.stride * (dy.shape[3] - 1) == x.shape[3] - 1:  # the last column has left the map
                last = [t[..., -1:].contiguous(memory_format=layout) for t in (dy, x)]
                left[..., 2:] += gradients(*last, weight[..., :1], [2, 0], (False, True, False))[1]
            dweight = torch.cat([left, right[..., 1:]], 3)
        return dx, dweight, dbias, None


def dwconv2d_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, groups: int = 1
) -> tuple[Tensor, None]:
    """See `bossnas_kernels.dwconv2d_stats`; no statistics."""
    checks.dwconv2d(x, weight, bias, stride)
    checks.stats_groups(groups, x.shape[0])
    return dwconv2d(x, weight, bias, stride=stride), None


def mhsa2d(qkv: Tensor, heads: int) -> Tensor:
    """`bossnas_kernels.mhsa2d` in plain torch; the result lies in memory as qkv does."""
    checks.mhsa2d(qkv, heads)
    batch, _, height, width = qkv.shape
    layout, tokens = _memory_format(qkv), height * width
    if (
        layout is torch.contiguous_format
        and tokens <= _WRITTEN_OUT_TOKENS
        and qkv.device.type == "cpu"
        and qkv.dtype in (torch.float32, torch.float64)
    ):
        q, k, v = qkv.reshape(batch, 3, heads, -1, tokens).unbind(1)  # [N, heads, d, T]
        weight = torch.softmax((q * q.shape[2] ** -0.5).transpose(2, 3) @ k, 3)
        return (v @ weight.transpose(2, 3)).reshape(batch, -1, height, width)
    rows = qkv.flatten(2).transpose(1, 2).contiguous()  # [N, T, 3*heads*d], free for channels_last
    q, k, v = rows.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v)  # [N, heads, T, d]
    out_NHWC = out.transpose(1, 2).reshape(batch, height, width, -1)
    return out_NHWC.permute(0, 3, 1, 2).contiguous(memory_format=layout)


def mhsa2d_stats(qkv: Tensor, heads: int, *, groups: int = 1) -> tuple[Tensor, None]:
    """`bossnas_kernels.mhsa2d_stats` in plain torch, which saves nothing by statistics: they are None."""
    out = mhsa2d(qkv, heads)
    checks.stats_groups(groups, len(qkv))
    return out, None


@torch.no_grad()
def lars_ema_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    momenta: Sequence[Tensor],
    excluded: Sequence[bool],
    targets: Sequence[Tensor | None] | None = None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust: float,
    ema: float = 1.0,
    loss_scale: float | Tensor = 1.0,
    clip: float = 0.0,
    squares: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """`bossnas_kernels.lars_ema_step` in plain torch: foreach operations on a CPU, nothing that waits elsewhere."""
    checks.lars_ema_step(weights, gradients, momenta, excluded, targets)
    checks.lars_norms(weights, squares, norm, loss_scale)
    index = [i for i, g in enumerate(gradients) if g is not None]
    moved, buffers = [weights[i] for i in index], [momenta[i] for i in index]
    given = [gradients[i].to(weights[i].dtype) for i in index]
    fixed = [bool(excluded[i]) for i in index]
    pairs = [(t, w) for t, w in zip(targets or (), weights, strict=False) if t is not None]
    settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
    if not _read_at_once(weights):
        if squares is None:
            squares = lars_squares(weights, gradients)
        w_norm, g_norm = squares.sqrt().unbind()
        norm = g_norm.norm() if norm is None else norm
        applied = norm.isfinite()
        factor = _gradient_factor(torch.ones_like(norm), norm, loss_scale, clip)
        parts = moved, given, buffers, fixed, _take(w_norm, index), _take(g_norm, index)
        _update_where(applied, *parts, factor, **settings)
        for target, weight in pairs:
            target.copy_(torch.where(applied, torch.lerp(target, weight, 1 - ema), target))
        return applied
    if squares is None:
        norms = torch._foreach_norm(moved) + torch._foreach_norm(given) if index else ()
        w_norm, g_norm = torch.stack(norms).double().view(2, -1).tolist() if index else ([], [])
        whole = math.hypot(*g_norm)
    else:
        w_norm, g_norm = squares[:, index].sqrt().tolist()
        whole = squares[1].sum().sqrt().item()
    whole = whole if norm is None else norm.item()
    applied = math.isfinite(whole)
    if applied:
        factor = float(_gradient_factor(1.0, whole, loss_scale, clip))
        lars_update(moved, given, buffers, fixed, w_norm, g_norm, factor=factor, **settings)
        _follow(pairs, 1 - ema)
    return torch.tensor(applied)


@torch.no_grad()
def lars_squares(weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """`bossnas_kernels.lars_squares` in plain torch; norms are taken in the tensors' own dtype."""
    checks.lars_ema_step(weights, gradients, None, None, None)
    index = [i for i, g in enumerate(gradients) if g is not None]
    if not index:
        where = weights[0].device if weights else None
        return torch.zeros(2, len(weights), dtype=torch.float64, device=where)
    given = [gradients[i].to(weights[i].dtype) for i in index]
    norms = torch._foreach_norm([weights[i] for i in index]) + torch._foreach_norm(given)
    nothing = torch.zeros_like(norms[0])
    columns = {i: at for at, i in enumerate(index)}
    ordered = [
        nothing if i not in columns else norms[columns[i] + of * len(index)]
        for of in (0, 1)
        for i in range(len(weights))
    ]
    return torch.stack(ordered).double().square().view(2, -1)


def _read_at_once(tensors: Sequence[Tensor]) -> bool:
    """Whether numbers are read from the tensors without waiting for a device."""
    return not tensors or tensors[0].device.type == "cpu"


def _gradient_factor(one, norm, loss_scale: float | Tensor, clip: float):
    """What gradients of this norm are multiplied by; number or tensor, as ``one`` and ``norm`` are."""
    factor = one / loss_scale
    if clip > 0:
        limit = clip / (norm * factor + 1e-6)
        factor = factor * (limit.clamp(max=1) if isinstance(limit, Tensor) else min(1.0, limit))
    return factor


def _take(values: Tensor, index: Sequence[int]) -> list[Tensor]:
    parts = values.unbind()
    return [parts[i] for i in index]


def _update_where(
    applied: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    excluded: Sequence[bool],
    w_norm: Sequence[Tensor],
    g_norm: Sequence[Tensor],
    factor: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust: float,
) -> None:
    """`lars_update` by numbers that stay on the device."""
    for weight, gradient, buffer, fixed, w, g in zip(
        weights, gradients, momenta, excluded, w_norm, g_norm, strict=True
    ):
        moves = applied & (g != 0)
        if fixed:
            update = gradient * factor * lr
        else:
            scale = lr * trust * w / (g * factor + weight_decay * w)
            update = (gradient * factor + weight_decay * weight) * scale
        update = momentum * buffer + update
        buffer.copy_(torch.where(moves, update, buffer))
        weight.copy_(torch.where(moves, weight - update, weight))


@torch.no_grad()
def lars_update(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    excluded: Sequence[bool],
    w_norm: Sequence[float],
    g_norm: Sequence[float],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust: float,
    factor: float = 1.0,
) -> None:
    """The update of `lars_ema_step` with norms that are known, as where each rank holds a piece of a tensor.

    A gradient of norm 0 moves nothing. ``factor``: what gradients and their norms are multiplied by.
    """
    live = [i for i, norm in enumerate(g_norm) if norm != 0]
    if not live:
        return
    weights, gradients, momenta = ([tensors[i] for i in live] for tensors in (weights, gradients, momenta))
    # trust ratio (You et al. 2017; METHOD 3.5). `live` keeps g_norm off 0: the quotient is never 0 / 0
    scale = [
        lr if excluded[i] else lr * trust * w_norm[i] / (g_norm[i] * factor + weight_decay * w_norm[i]) for i in live
    ]
    few = [j for j, i in enumerate(live) if not _in_pieces(weights[j], gradients[j], momenta[j])]
    if few:
        small, given, buffers = ([tensors[j] for j in few] for tensors in (weights, gradients, momenta))
        updates = torch._foreach_mul(small, [0.0 if excluded[live[j]] else weight_decay for j in few])
        torch._foreach_add_(updates, given, alpha=factor)
        torch._foreach_mul_(updates, [scale[j] for j in few])
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, updates)
        torch._foreach_sub_(small, buffers)
    for j in sorted(set(range(len(live))) - set(few)):
        decay = 0.0 if excluded[live[j]] else weight_decay
        for w, g, buffer in zip(*map(_split, (weights[j], gradients[j], momenta[j])), strict=True):
            buffer.mul_(momentum).add_(g, alpha=scale[j] * factor).add_(w, alpha=scale[j] * decay)
            w.sub_(buffer)


def _follow(pairs: Sequence[tuple[Tensor, Tensor]], share: float) -> None:
    """Moves each target by ``share`` towards its weight."""
    if pairs:
        torch._foreach_lerp_([t for t, _ in pairs], [w for _, w in pairs], share)


def _in_pieces(*tensors: Tensor) -> bool:
    """Whether tensors of one shape are worked on piece by piece, without a temporary of their size."""
    return tensors[0].numel() >= 2 * _UPDATE_ELEMENTS and all(t.is_contiguous() for t in tensors)


def _split(t: Tensor) -> tuple[Tensor, ...]:
    return t.view(-1).split(_UPDATE_ELEMENTS * torch.get_num_threads())


def byol_ensemble_loss(q: Tensor, k: Tensor) -> Tensor:
    """`bossnas_kernels.byol_ensemble_loss` in plain torch; fp64 for an fp64 q."""
    checks.byol_ensemble_loss(q, k)
    q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k.detach()))
    target = F.normalize(k, dim=2).mean(0)
    direction = F.normalize(target, dim=1, eps=1e-8).to(q.dtype)
    return -2 * (F.normalize(q, dim=2, eps=1e-8) * direction).sum(2).mean(1)
