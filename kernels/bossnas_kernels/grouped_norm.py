"""K1: grouped batch norm + residual + activation on NHWC maps, forward and backward, in Triton.

A map is a matrix of rows (positions of all images) and channels; group g is an equal run of rows. Forward:
statistics of row chunks -> combined by group -> applied. Backward: sums of row chunks -> added up -> applied, where the
first programs also write the gradients of weight and bias. Evaluation reads the running statistics as they lie. There
are no atomics, so results repeat to the bit. Sums are taken around a pivot (a chunk's first row) and combined as
(count, mean, M2) by Chan's formula: E[x^2] - E[x]^2 turns negative where the mean is large.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bossnas_kernels import checks, common
from bossnas_kernels.common import dense, new_map, sigmoid

# elements: of a tile, rows x channels. channels: at most, per tile. programs: about as many in the reducing passes.
# parts, part_elements: of a tile, at most parts x channels, where a group's parts are combined: there may be thousands.
TABLE = {
    "sm_80": {"elements": 4096, "channels": 128, "programs": 864, "parts": 128, "part_elements": 2048, "num_warps": 4},
    "sm_90": {"elements": 4096, "channels": 128, "programs": 1056, "parts": 128, "part_elements": 2048, "num_warps": 4},
    "gfx942": {
        "elements": 4096,
        "channels": 128,
        "programs": 1216,
        "parts": 128,
        "part_elements": 2048,
        "num_warps": 4,
    },
    "default": {
        "elements": 4096,
        "channels": 128,
        "programs": 864,
        "parts": 128,
        "part_elements": 2048,
        "num_warps": 4,
    },
    "interpreter": {
        "elements": 4096,
        "channels": 128,
        "programs": 4,
        "parts": 32,
        "part_elements": 4096,
        "num_warps": 4,
    },
}


def gbn_act(
    x,
    weight,
    bias,
    *,
    groups=1,
    residual=None,
    act="none",
    training=True,
    running_mean=None,
    running_var=None,
    eps=1e-5,
    partial_stats=None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`bossnas_kernels.gbn_act` for fp32, bf16 and fp16 tensors of one CUDA or ROCm device."""
    checks.gbn_act(x, weight, bias, groups, residual, act, training, running_mean, running_var)
    if x.dtype not in common.DTYPES:
        raise ValueError(f"x: the kernel takes float32, bfloat16 or float16, got {x.dtype}")
    checks.same_device(
        x,
        weight=weight,
        bias=bias,
        residual=residual,
        running_mean=running_mean,
        running_var=running_var,
        partial_stats=partial_stats,
    )
    if residual is not None:
        residual = residual.to(x.dtype)
    if training:
        if partial_stats is not None and (partial_stats.shape[:2] + partial_stats.shape[3:] != (3, groups, x.shape[1])):
            raise ValueError(
                f"partial_stats: expected [3, {groups}, parts, {x.shape[1]}] from a kernel called with as "
                f"many groups, got {tuple(partial_stats.shape)}"
            )
        y, statistics = _operation(x, weight, bias, residual, None, None, partial_stats, groups, act, eps)
        mean, _, var = statistics.unbind()
        return y, mean, var
    y, _ = _operation(x, weight, bias, residual, running_mean, running_var, None, groups, act, eps)
    return y, running_mean.float().expand(groups, -1), running_var.float().expand(groups, -1)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    partial_stats: Tensor | None,
    groups: int,
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """-> y, and [3, G, C] fp32: mean, 1 / sqrt(biased var + eps), unbiased var (empty in evaluation)."""
    x = dense("x of gbn_act", x)
    residual = None if residual is None else dense("residual of gbn_act", residual)
    plan = _plan(x.shape, groups, x.device)
    if running_mean is None:
        statistics = torch.empty(3, groups, plan.channels, dtype=torch.float32, device=x.device)
        if partial_stats is None:
            partial_stats = torch.empty(3, groups, plan.chunks, plan.channels, dtype=torch.float32, device=x.device)
            _statistics[plan.reducing_grid](
                x,
                partial_stats,
                plan.rows,
                plan.channels,
                plan.chunks,
                plan.chunk_rows,
                groups * plan.chunks * plan.channels,
                **plan.tile,
            )
        parts = partial_stats.shape[2]
        grid, tile = plan.combining(parts)
        _combine[grid](
            partial_stats.contiguous(),
            statistics,
            plan.channels,
            parts,
            groups * parts * plan.channels,
            groups * plan.channels,
            eps,
            **tile,
        )
    else:
        statistics = torch.empty(0, dtype=torch.float32, device=x.device)
    y = new_map(x)
    _apply[plan.grid](
        x,
        x if residual is None else residual,
        y,
        *_normaliser(statistics, running_mean, running_var, eps),
        weight.contiguous(),
        bias.contiguous(),
        _group_stride(weight),
        _group_stride(bias),
        plan.rows,
        plan.channels,
        RUNNING=running_mean is not None,
        HAS_RESIDUAL=residual is not None,
        ACT=act,
        **plan.tile,
    )
    return y, statistics


def _normaliser(
    statistics: Tensor, running_mean: Tensor | None, running_var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, int, int, int, float]:
    """What kernels normalise by: mean; 1 / standard deviation of the batch, or the running variance; how far the latter
    lies from its pointer; distances of groups in both; eps."""
    if running_mean is None or running_var is None:
        _, groups, channels = statistics.shape
        return statistics, statistics, groups * channels, channels, channels, eps
    mean, var = running_mean.contiguous(), running_var.contiguous()
    return mean, var, 0, _group_stride(mean), _group_stride(var), eps


def _fake_forward(x, weight, bias, residual, running_mean, running_var, partial_stats, groups, act, eps):
    shape = (3, groups, x.shape[1]) if running_mean is None else (0,)
    return new_map(x), torch.empty(shape, dtype=torch.float32, device=x.device)


def _backward(
    dy: Tensor,
    x: Tensor,
    extra: Tensor | None,
    statistics: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx, dz (the residual's gradient; empty if there is none), gradients of weight and bias.

    extra: with a residual, what tells z: y for relu, the residual for silu. Without one, z is recomputed from x.
    """
    x, dy = dense("x of gbn_act", x), dense("gradient of gbn_act", dy)
    extra = None if extra is None else dense("residual of gbn_act", extra)
    plan = _plan(x.shape, groups, x.device)
    weight, bias = weight.contiguous(), bias.contiguous()
    partial = torch.empty(2, groups, plan.chunks, plan.channels, dtype=torch.float32, device=x.device)
    sums = torch.empty(2, groups, plan.channels, dtype=torch.float32, device=x.device)
    dx, dz, dweight, dbias = _fake_backward(
        dy, x, extra, statistics, running_mean, running_var, weight, bias, groups, act, eps
    )
    running = running_mean is not None
    affine = (
        *_normaliser(statistics, running_mean, running_var, eps),
        weight,
        bias,
        _group_stride(weight),
        _group_stride(bias),
        plan.rows,
        plan.channels,
    )
    _reduce_gradient[plan.reducing_grid](
        dy,
        x,
        x if extra is None else extra,
        dz,
        partial,
        *affine,
        plan.chunks,
        plan.chunk_rows,
        groups * plan.chunks * plan.channels,
        RUNNING=running,
        HAS_EXTRA=extra is not None,
        ACT=act,
        **plan.tile,
    )
    grid, tile = plan.combining(plan.chunks, 2 * groups)
    _add_up[grid](partial, sums, plan.channels, plan.chunks, **tile)
    # dz, once written, replaces dy and needs no activation any more
    given, act = (dy, act) if extra is None else (dz, "none")
    _apply_gradient[plan.grid](
        given,
        x,
        dx,
        sums,
        dweight,
        dbias,
        groups,
        *affine,
        RUNNING=running,
        ACT=act,
        **plan.tile,
    )
    return dx, dz, dweight, dbias


def _fake_backward(dy, x, extra, statistics, running_mean, running_var, weight, bias, groups, act, eps):
    dz = torch.empty(0, dtype=x.dtype, device=x.device) if extra is None else new_map(x)
    dweight, dbias = (torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in (weight, bias))
    return new_map(x), dz, dweight, dbias


def _save(ctx, inputs, output):
    x, weight, bias, residual, running_mean, running_var, _, groups, act, eps = inputs
    y, statistics = output
    extra = None if residual is None or act == "none" else y if act == "relu" else residual
    ctx.save_for_backward(x, extra, statistics, running_mean, running_var, weight, bias)
    ctx.settings = groups, act, eps
    ctx.mark_non_differentiable(statistics)


def _gradients(ctx, backward, dy, *_):
    saved = ctx.saved_tensors
    dx, dz, dweight, dbias = backward(dy, *saved, *ctx.settings)
    dresidual = (dy if saved[1] is None else dz) if ctx.needs_input_grad[3] else None
    return dx, dweight, dbias, dresidual, None, None, None, None, None, None


_operation = common.operation("gbn_act_v2", _forward, _fake_forward, _backward, _fake_backward, _save, _gradients)


class _Plan:
    """Tiles and grids for a dense map or matrix of this shape, in ``groups`` groups."""

    def __init__(self, shape: torch.Size, groups: int, device: torch.device):
        table = common.config(TABLE, device)
        self.channels = shape[1]
        self.rows = shape.numel() // (self.channels * groups)  # of a group
        block_c = min(table["channels"], triton.next_power_of_2(self.channels))
        block_m = max(1, min(table["elements"] // block_c, triton.next_power_of_2(self.rows)))
        self.table, self.groups = table, groups
        self.tile = {"BLOCK_M": block_m, "BLOCK_C": block_c, "num_warps": table["num_warps"]}
        self.tiles_c = triton.cdiv(self.channels, block_c)
        chunks = max(1, min(table["programs"] // (self.tiles_c * groups), triton.cdiv(self.rows, block_m)))
        self.chunk_rows = triton.cdiv(triton.cdiv(self.rows, chunks), block_m) * block_m
        self.chunks = triton.cdiv(self.rows, self.chunk_rows)
        self.reducing_grid = (self.tiles_c * self.chunks * groups,)
        self.grid = (self.tiles_c * triton.cdiv(self.rows, block_m) * groups,)

        self._combining: dict[tuple[int, int], tuple[tuple[int], dict]] = {}

    def combining(self, parts: int, rows: int = 0) -> tuple[tuple[int], dict]:
        """Grid and tile that combine ``parts`` parts of every group, or of each of so many ``rows``."""
        known = self._combining.get((parts, rows))
        if known is None:
            block_p = max(16, min(self.table["parts"], triton.next_power_of_2(parts)))
            block_c = self.table["part_elements"] // block_p
            grid = (triton.cdiv(self.channels, block_c) * (rows or self.groups),)
            tile = {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": self.table["num_warps"]}
            known = self._combining[parts, rows] = grid, tile
        return known


_plan = common.remembered(_Plan)


def _group_stride(value: Tensor) -> int:
    return value.shape[1] if value.dim() == 2 else 0


@triton.jit
def _place(parts, part_rows, rows, channels, BLOCK_C: tl.constexpr):
    """This program's channels c, whether they exist, group, part of it, first row (of all) and number of rows."""
    tiles_c = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    part = pid // tiles_c % parts
    group = pid // tiles_c // parts
    first = group.to(tl.int64) * rows + part * part_rows
    return c, c < channels, group, part, first, tl.minimum(part_rows, rows - part * part_rows)


@triton.jit
def _statistics(x, partial, rows, channels, chunks, chunk_rows, plane, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Count, mean and M2 of one chunk of rows and tile of channels -> partial [3, G, chunks, C]."""
    c, c_ok, group, chunk, first, count = _place(chunks, chunk_rows, rows, channels, BLOCK_C)
    tile = tl.arange(0, BLOCK_M)[:, None] * channels + c[None, :]
    pivot = tl.load(x + first * channels + c, mask=c_ok, other=0).to(tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, count, BLOCK_M):
        mask = (start + tl.arange(0, BLOCK_M) < count)[:, None] & c_ok[None, :]
        v = tl.load(x + (first + start) * channels + tile, mask=mask, other=0).to(tl.float32)
        v = tl.where(mask, v - pivot[None, :], 0)
        total += v
        squares += v * v
    shift = tl.sum(total, 0) / count
    to = partial + (group.to(tl.int64) * chunks + chunk) * channels + c
    tl.store(to, (shift * 0 + count).to(tl.float32), mask=c_ok)
    tl.store(to + plane, pivot + shift, mask=c_ok)
    tl.store(to + 2 * plane, tl.sum(squares, 0) - tl.sum(total, 0) * shift, mask=c_ok)


@triton.jit
def _combine(
    partial, statistics, channels, parts, plane, statistics_plane, eps, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Parts (count, mean, M2) of every group, [3, G, parts, C] -> statistics [3, G, C]."""
    c, c_ok, group, _, _, _ = _place(1, 1, 1, channels, BLOCK_C)
    partial += group.to(tl.int64) * parts * channels
    pivot = tl.load(partial + plane + c, mask=c_ok, other=0)
    count = tl.zeros([BLOCK_C], tl.float32)
    shift = tl.zeros([BLOCK_C], tl.float32)
    for p in range(0, parts, BLOCK_P):
        r = p + tl.arange(0, BLOCK_P)
        at = partial + r[:, None] * channels + c[None, :]
        mask = (r < parts)[:, None] & c_ok[None, :]
        n = tl.load(at, mask=mask, other=0)
        # a part without rows has no mean: whatever stands there is not read
        m = tl.load(at + plane, mask=mask & (n > 0), other=0)
        count += tl.sum(n, 0)
        shift += tl.sum(tl.where(n > 0, n * (m - pivot[None, :]), 0), 0)
    count = tl.where(c_ok, count, 2)
    centre = pivot + shift / count
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for p in range(0, parts, BLOCK_P):
        r = p + tl.arange(0, BLOCK_P)
        at = partial + r[:, None] * channels + c[None, :]
        mask = (r < parts)[:, None] & c_ok[None, :]
        n = tl.load(at, mask=mask, other=0)
        d = tl.load(at + plane, mask=mask & (n > 0), other=0) - centre[None, :]
        inner = tl.load(at + 2 * plane, mask=mask & (n > 0), other=0)
        m2 += tl.sum(tl.where(n > 0, inner + n * d * d, 0), 0)
    to = statistics + group.to(tl.int64) * channels + c
    tl.store(to, centre, mask=c_ok)
    tl.store(to + statistics_plane, 1 / tl.sqrt(m2 / count + eps), mask=c_ok)
    tl.store(to + 2 * statistics_plane, m2 / (count - 1), mask=c_ok)


@triton.jit
def _affine(
    mean,
    spread,
    plane,
    mean_stride,
    spread_stride,
    eps,
    weight,
    bias,
    weight_stride,
    bias_stride,
    group,
    c,
    c_ok,
    RUNNING: tl.constexpr,
):
    """Mean, 1 / standard deviation, weight and bias of this program's channels, fp32."""
    group = group.to(tl.int64)
    m = tl.load(mean + group * mean_stride + c, mask=c_ok, other=0).to(tl.float32)
    r = tl.load(spread + plane + group * spread_stride + c, mask=c_ok, other=1).to(tl.float32)
    if RUNNING:
        r = 1 / tl.sqrt(r + eps)
    w = tl.load(weight + group * weight_stride + c, mask=c_ok, other=0).to(tl.float32)
    b = tl.load(bias + group * bias_stride + c, mask=c_ok, other=0).to(tl.float32)
    return m, r, w, b


@triton.jit
def _apply(
    x,
    residual,
    y,
    mean,
    spread,
    plane,
    mean_stride,
    spread_stride,
    eps,
    weight,
    bias,
    weight_stride,
    bias_stride,
    rows,
    channels,
    RUNNING: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = act((x - mean) * rstd * weight + bias + residual) on one tile."""
    c, c_ok, group, _, first, count = _place(tl.cdiv(rows, BLOCK_M), BLOCK_M, rows, channels, BLOCK_C)
    m, r, w, b = _affine(
        mean,
        spread,
        plane,
        mean_stride,
        spread_stride,
        eps,
        weight,
        bias,
        weight_stride,
        bias_stride,
        group,
        c,
        c_ok,
        RUNNING,
    )
    row = tl.arange(0, BLOCK_M)
    mask = (row < count)[:, None] & c_ok[None, :]
    tile = row[:, None] * channels + c[None, :]
    base = first * channels  # int64; offsets in a tile are 32 bits wide
    z = (tl.load(x + base + tile, mask=mask, other=0).to(tl.float32) - m[None, :]) * (r * w)[None, :] + b[None, :]
    if HAS_RESIDUAL:
        z += tl.load(residual + base + tile, mask=mask, other=0).to(tl.float32)
    if ACT == "relu":
        z = tl.where(z < 0, 0.0, z)  # keeps NaN, as maximum does not in every version
    elif ACT == "silu":
        z = z * sigmoid(z)
    tl.store(y + base + tile, z.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _before_activation(dy, normal, extra, w, b, HAS_EXTRA: tl.constexpr, ACT: tl.constexpr):
    """Gradient before the activation. normal: normalised x; extra: y (relu) or the residual (silu)."""
    dz = dy
    if ACT == "relu":
        if HAS_EXTRA:
            dz = tl.where(extra > 0, dy, 0.0)
        else:
            dz = tl.where(normal * w[None, :] + b[None, :] > 0, dy, 0.0)
    elif ACT == "silu":
        z = normal * w[None, :] + b[None, :]
        if HAS_EXTRA:
            z += extra
        s = sigmoid(z)
        dz = dy * s * (1 + z * (1 - s))
    return dz


@triton.jit
def _reduce_gradient(
    dy,
    x,
    extra,
    dz_out,
    partial,
    mean,
    spread,
    plane,
    mean_stride,
    spread_stride,
    eps,
    weight,
    bias,
    weight_stride,
    bias_stride,
    rows,
    channels,
    chunks,
    chunk_rows,
    partial_plane,
    RUNNING: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of dz and of dz * normalised x over one chunk -> partial [2, G, chunks, C]; dz itself with a residual."""
    c, c_ok, group, chunk, first, count = _place(chunks, chunk_rows, rows, channels, BLOCK_C)
    m, r, w, b = _affine(
        mean,
        spread,
        plane,
        mean_stride,
        spread_stride,
        eps,
        weight,
        bias,
        weight_stride,
        bias_stride,
        group,
        c,
        c_ok,
        RUNNING,
    )
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    product = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    tile = tl.arange(0, BLOCK_M)[:, None] * channels + c[None, :]
    for start in range(0, count, BLOCK_M):
        mask = (start + tl.arange(0, BLOCK_M) < count)[:, None] & c_ok[None, :]
        base = (first + start) * channels
        normal = (tl.load(x + base + tile, mask=mask, other=0).to(tl.float32) - m[None, :]) * r[None, :]
        dz = tl.load(dy + base + tile, mask=mask, other=0).to(tl.float32)  # 0 outside, so that nothing there counts
        e = dz
        if HAS_EXTRA:
            e = tl.load(extra + base + tile, mask=mask, other=0).to(tl.float32)
        dz = _before_activation(dz, normal, e, w, b, HAS_EXTRA, ACT)
        if HAS_EXTRA:
            tl.store(dz_out + base + tile, dz.to(dz_out.dtype.element_ty), mask=mask)
        total += dz
        product += dz * normal
    to = partial + (group.to(tl.int64) * chunks + chunk) * channels + c
    tl.store(to, tl.sum(total, 0), mask=c_ok)
    tl.store(to + partial_plane, tl.sum(product, 0), mask=c_ok)


@triton.jit
def _add_up(partial, sums, channels, parts, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums over parts, [rows, parts, C] -> [rows, C]."""
    c, c_ok, row, _, _, _ = _place(1, 1, 1, channels, BLOCK_C)
    row = row.to(tl.int64)
    partial += row * parts * channels
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < parts)[:, None] & c_ok[None, :]
        total += tl.load(partial + p[:, None] * channels + c[None, :], mask=mask, other=0)
    tl.store(sums + row * channels + c, tl.sum(total, 0), mask=c_ok)


@triton.jit
def _store_affine(sums, to, stride, group, groups, channels, c, c_ok):
    """A parameter's gradient from sums [G, C]: this group's row of it or, where groups share it (stride 0), the sum."""
    own = group * 0 + stride != 0  # not a constant, even where the stride is 1
    if own | (group == 0):
        first = tl.where(own, group, 0)
        total = tl.zeros_like(tl.load(sums + c, mask=c_ok, other=0))
        for g in range(first, tl.where(own, group + 1, groups)):
            total += tl.load(sums + g * channels + c, mask=c_ok, other=0)
        tl.store(to + first * stride + c, total.to(to.dtype.element_ty), mask=c_ok)


@triton.jit
def _apply_gradient(
    dy,
    x,
    dx,
    sums,
    dweight,
    dbias,
    groups,
    mean,
    spread,
    plane,
    mean_stride,
    spread_stride,
    eps,
    weight,
    bias,
    weight_stride,
    bias_stride,
    rows,
    channels,
    RUNNING: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx on one tile: through the batch's own statistics in training, through the affine map alone otherwise.

    The first tiles also write the gradients of weight and bias.
    """
    c, c_ok, group, part, first, count = _place(tl.cdiv(rows, BLOCK_M), BLOCK_M, rows, channels, BLOCK_C)
    products = sums + groups * channels
    if part == 0:
        _store_affine(products, dweight, weight_stride, group, groups, channels, c, c_ok)
        _store_affine(sums, dbias, bias_stride, group, groups, channels, c, c_ok)
    m, r, w, b = _affine(
        mean,
        spread,
        plane,
        mean_stride,
        spread_stride,
        eps,
        weight,
        bias,
        weight_stride,
        bias_stride,
        group,
        c,
        c_ok,
        RUNNING,
    )
    row = tl.arange(0, BLOCK_M)
    mask = (row < count)[:, None] & c_ok[None, :]
    tile = row[:, None] * channels + c[None, :]
    base = first * channels
    normal = (tl.load(x + base + tile, mask=mask, other=0).to(tl.float32) - m[None, :]) * r[None, :]
    dz = tl.load(dy + base + tile, mask=mask, other=0).to(tl.float32)
    dz = _before_activation(dz, normal, dz, w, b, False, ACT)
    if not RUNNING:
        to = group.to(tl.int64) * channels + c
        share = tl.load(sums + to, mask=c_ok, other=0) / rows
        slope = tl.load(products + to, mask=c_ok, other=0) / rows
        dz = dz - share[None, :] - normal * slope[None, :]
    tl.store(dx + base + tile, (dz * (r * w)[None, :]).to(dx.dtype.element_ty), mask=mask)
