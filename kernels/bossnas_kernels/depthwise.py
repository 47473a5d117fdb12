"""K2: depthwise convolution of NHWC maps, 3x3, 5x5 and patches, forward and both gradients, in Triton.

A program walks down a strip: some columns (of as many images as it takes) by some channels. It reads each row of x once
for every tap of a kernel row and adds it to all output rows under way, whose sums stay in registers: conversions and
index arithmetic, which would bound a program that reads all taps for each output, shrink by the kernel's height. The
weight's gradient walks likewise, with the last rows of dy in registers, and is summed in two stages: there are no
atomics, so results repeat to the bit. Forward can leave the statistics of what it wrote, for `grouped_norm`. It keeps
the weights as they are read, tap by tap, for the backward pass.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from bossnas_kernels import checks, common
from bossnas_kernels.common import dense, new_map

# elements: columns x channels of a strip (of cells, for the input's gradient). weight_elements: the same where the
# weight's gradient is summed, which keeps a sum for each of up to 15 taps. programs, weight_programs: about as many.
# part_elements: of a tile, parts x sums, where the weight's gradients of all programs are added up.
TABLE = {
    "sm_80": {
        "elements": 1024,
        "weight_elements": 1024,
        "programs": 1728,
        "weight_programs": 864,
        "part_elements": 2048,
        "num_warps": 4,
    },
    "sm_90": {
        "elements": 1024,
        "weight_elements": 1024,
        "programs": 2112,
        "weight_programs": 1056,
        "part_elements": 2048,
        "num_warps": 4,
    },
    "gfx942": {
        "elements": 2048,
        "weight_elements": 2048,
        "programs": 2432,
        "weight_programs": 1216,
        "part_elements": 2048,
        "num_warps": 4,
    },
    "default": {
        "elements": 1024,
        "weight_elements": 1024,
        "programs": 1728,
        "weight_programs": 864,
        "part_elements": 2048,
        "num_warps": 4,
    },
    "interpreter": {
        "elements": 8192,
        "weight_elements": 8192,
        "programs": 2,
        "weight_programs": 2,
        "part_elements": 8192,
        "num_warps": 4,
    },
}
# rows and columns of the kernel that one program of the weight's gradient takes, by kernel size: what registers hold
WEIGHT_TAPS = {2: (2, 2), 3: (3, 3), 4: (1, 4), 5: (3, 5), 8: (1, 4)}


def dwconv2d(x, weight, bias=None, *, stride=1) -> Tensor:
    """`bossnas_kernels.dwconv2d` for fp32, bf16 and fp16 maps on a CUDA or ROCm device."""
    _check(x, weight, bias, stride)
    return _operation(x, weight, bias, stride, 0)[0]


def dwconv2d_stats(x, weight, bias=None, *, stride=1, groups=1) -> tuple[Tensor, Tensor]:
    """`bossnas_kernels.dwconv2d_stats`: the result and its statistics, fp32 [3 (count, mean, M2), groups, parts, C]."""
    _check(x, weight, bias, stride)
    checks.stats_groups(groups, x.shape[0])
    return _operation(x, weight, bias, stride, groups)[:2]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> None:
    checks.dwconv2d(x, weight, bias, stride)
    checks.same_device(x, weight=weight, bias=bias)
    if x.dtype not in common.DTYPES:
        raise ValueError(f"x: the kernel takes float32, bfloat16 or float16, got {x.dtype}")
    if x[0].numel() >= 2**31:
        raise ValueError(f"x: the kernel takes images of less than 2^31 elements, got shape {tuple(x.shape)}")


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, its statistics by group, [3, groups, parts, C] fp32 (empty for groups = 0), and `_arrange`d taps."""
    x = dense("x of dwconv2d", x)
    plan = _plan(x.shape, weight.shape[-1], stride, groups, x.device)
    taps = torch.empty(plan.taps_shape, dtype=torch.float32, device=x.device)
    _arrange[plan.taps_grid](weight.contiguous(), taps, plan.channels, **plan.taps_tile)
    y = new_map(x, shape=plan.out_shape)
    stats = torch.empty(plan.strips.stats_shape, dtype=torch.float32, device=x.device)
    _convolve[plan.strips.grid](
        x,
        taps,
        x if bias is None else bias.contiguous(),
        y,
        stats,
        *plan.sizes,
        plan.channels,
        *plan.strips.walk,
        plan.strips.plane,
        HAS_BIAS=bias is not None,
        STATS=groups > 0,
        FLIP=False,
        **plan.kernel,
        **plan.strips.tile,
    )
    return y, stats, taps


def _fake_forward(x, weight, bias, stride, groups):
    plan = _Plan(x.shape, weight.shape[-1], stride, groups, x.device)
    stats, taps = (
        torch.empty(shape, dtype=torch.float32, device=x.device) for shape in (plan.strips.stats_shape, plan.taps_shape)
    )
    return new_map(x, shape=plan.out_shape), stats, taps


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    stride: int,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of x, weight and bias; what is not wanted, or not there, is empty."""
    x, dy = dense("x of dwconv2d", x), dense("gradient of dwconv2d", dy)
    plan = _plan(x.shape, weight.shape[-1], stride, 0, x.device)
    dx, dweight, dbias = _fake_backward(dy, x, weight, bias, taps, stride, wants_x, wants_weight)
    if wants_x and stride == 1:  # the convolution of dy with the flipped kernel
        _convolve[plan.strips.grid](
            dy,
            taps,
            dy,
            dx,
            dx,
            *plan.sizes,
            plan.channels,
            *plan.strips.walk,
            0,
            HAS_BIAS=False,
            STATS=False,
            FLIP=True,
            **plan.kernel,
            **plan.strips.tile,
        )
    elif wants_x:
        _gather_gradient[plan.cells_grid](
            dy, taps, dx, *plan.sizes, plan.channels, plan.cells, **plan.kernel, **plan.cells_tile
        )
    if wants_weight:
        sums = plan.sums
        has_bias = bias is not None
        rows = weight[0].numel() + has_bias
        partial = torch.empty(sums.parts, rows, plan.channels, dtype=torch.float32, device=x.device)
        _sum_gradient[sums.grid](
            dy,
            x,
            partial,
            *plan.sizes,
            plan.channels,
            x.shape[0],
            sums.parts,
            sums.part_strips,
            HAS_BIAS=has_bias,
            **plan.kernel,
            **sums.tile,
        )
        columns = rows * plan.channels
        _add_up[(triton.cdiv(columns, sums.adding_tile["BLOCK"]),)](
            partial,
            dweight,
            dbias if has_bias else dweight,
            plan.channels,
            sums.parts,
            columns,
            TAPS=rows - has_bias,
            HAS_BIAS=has_bias,
            **sums.adding_tile,
        )
    return dx, dweight, dbias


def _fake_backward(dy, x, weight, bias, taps, stride, wants_x, wants_weight):
    def new(like, wanted):
        return torch.empty(like.shape if wanted else (0,), dtype=like.dtype, device=x.device)

    has_bias = bias is not None
    dbias = new(bias if has_bias else weight, has_bias and wants_weight)
    return new_map(x) if wants_x else x.new_empty(0), new(weight, wants_weight), dbias


def _save(ctx, inputs, output):
    x, weight, bias, stride, _ = inputs
    _, stats, taps = output
    ctx.save_for_backward(x, weight, bias, taps)
    ctx.stride = stride
    ctx.mark_non_differentiable(stats, taps)


def _gradients(ctx, backward, dy, *_):
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    dx, dweight, dbias = backward(dy, *ctx.saved_tensors, ctx.stride, wants_x, wants_weight or wants_bias)
    return dx if wants_x else None, dweight if wants_weight else None, dbias if wants_bias else None, None, None


_operation = common.operation("dwconv2d_v2", _forward, _fake_forward, _backward, _fake_backward, _save, _gradients)


def _block_c(channels: int) -> int:
    """Channels of a tile: the wider block, unless a narrower one leaves fewer of the last block idle."""
    return 32 if triton.cdiv(channels, 32) * 32 < triton.cdiv(channels, 64) * 64 else 64


class _Plan:
    """Sizes, tiles and grids of all kernels, for maps of this shape."""

    def __init__(self, shape: torch.Size, kernel: int, stride: int, groups: int, device: torch.device):
        self.table = table = common.config(TABLE, device)
        batch, self.channels, *size = shape
        padding = 0 if kernel == stride else kernel // 2
        out_size = [(n + 2 * padding - kernel) // stride + 1 for n in size]
        self.out_shape = (batch, self.channels, *out_size)
        self.sizes = (*size, *out_size)
        self.kernel = {"K": kernel, "STRIDE": stride, "PAD": padding}
        self.strips = _Strips(table, self.out_shape, kernel > stride, groups)
        block_c, warps = _block_c(self.channels), {"num_warps": table["num_warps"]}
        tiles_c = triton.cdiv(self.channels, block_c)
        self.taps_shape, self.taps_grid = (tiles_c, kernel * kernel, block_c), (tiles_c,)
        self.taps_tile = {"TAPS": kernel * kernel, "BLOCK_C": block_c, **warps}
        positions = table["elements"] // block_c
        self.cells = batch * triton.cdiv(size[0], stride) * triton.cdiv(size[1], stride)
        self.cells_tile = {"POSITIONS": positions, "BLOCK_C": block_c, **warps}
        self.cells_grid = (tiles_c * triton.cdiv(self.cells, positions),)

    @functools.cached_property
    def sums(self) -> _Sums:
        return _Sums(self.table, self.out_shape, self.kernel["K"])


class _Sums:
    """How the weight's gradient is summed: in parts of some strips, for some taps at a time."""

    def __init__(self, table: dict, out_shape: tuple[int, ...], kernel: int):
        batch, channels, _, width = out_shape
        block_c, (rows, columns), warps = _block_c(channels), WEIGHT_TAPS[kernel], {"num_warps": table["num_warps"]}
        positions = table["weight_elements"] // block_c
        self.tile = {"ROWS": rows, "COLUMNS": columns, "POSITIONS": positions, "BLOCK_C": block_c, **warps}
        tiles_c, splits = triton.cdiv(channels, block_c), triton.cdiv(kernel, rows) * (kernel // columns)
        strips = triton.cdiv(batch * width, positions)
        self.part_strips = triton.cdiv(strips, max(1, table["weight_programs"] // (tiles_c * splits)))
        self.parts = triton.cdiv(strips, self.part_strips)
        self.grid = (tiles_c * self.parts * splits,)
        block_p = max(16, min(128, triton.next_power_of_2(self.parts)))
        self.adding_tile = {"BLOCK_P": block_p, "BLOCK": table["part_elements"] // block_p, **warps}


class _Strips:
    """Strips of an output, cut into runs of rows; one program, and one part of statistics, a run."""

    def __init__(self, table: dict, out_shape: tuple[int, ...], overlap: bool, groups: int = 0):
        batch, channels, height, width = out_shape
        block_c = _block_c(channels)
        positions = table["elements"] // block_c
        self.tile = {"POSITIONS": positions, "BLOCK_C": block_c, "num_warps": table["num_warps"]}
        of = max(groups, 1)
        images = batch // of
        strips = triton.cdiv(images * width, positions)
        tiles_c = triton.cdiv(channels, block_c)
        # shorter runs of rows that overlap would read too many twice
        runs = max(1, min(table["programs"] // (tiles_c * strips * of), height // 7 if overlap else height))
        run_rows = triton.cdiv(height, runs)
        runs = triton.cdiv(height, run_rows)
        parts = strips * runs
        self.walk = (images, runs, run_rows)
        self.grid = (tiles_c * parts * of,)
        self.plane = parts * of * channels
        self.stats_shape = (3, groups, parts, channels) if groups else (0,)


_plan = common.remembered(_Plan)


@triton.jit
def _place(units, channels, BLOCK_C: tl.constexpr):
    """This program's channels c, whether they exist, its unit, and what of the grid is beyond the units."""
    tiles_c = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < channels, pid // tiles_c % units, pid // tiles_c // units


@triton.jit
def _strip(index, images, width, POSITIONS: tl.constexpr):
    """Image (int64: offsets of images may pass 2^31) and column of every position of a strip, and whether it exists."""
    p = index * POSITIONS + tl.arange(0, POSITIONS)
    return (p // width).to(tl.int64), p % width, p < images * width


@triton.jit
def _inside(ok, at, size, PAD: tl.constexpr):
    """ok, where rows or columns of x exist; without padding they do wherever the output does."""
    if PAD > 0:
        ok = ok & (at >= 0) & (at < size)
    return ok


@triton.jit
def _arrange(weight, taps, channels, TAPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """[C, 1, k, k] -> fp32 [tiles, TAPS, BLOCK_C]: wide loads, without a mask, at distances known when compiling."""
    BLOCK_T: tl.constexpr = triton.next_power_of_2(TAPS)
    b = tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)[:, None]
    c = tl.program_id(0) * BLOCK_C + b
    value = tl.load(weight + c[None, :] * TAPS + t, mask=(c < channels)[None, :] & (t < TAPS), other=0)
    to = taps + tl.program_id(0) * (TAPS * BLOCK_C) + t * BLOCK_C + b[None, :]
    tl.store(to, value.to(tl.float32), mask=(t < TAPS) & (b >= 0)[None, :])


@triton.jit
def _taps_of_block(taps, c, K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pointers to the first tap of channels c in [tiles, K*K, BLOCK_C]."""
    return taps + c // BLOCK_C * (K * K * BLOCK_C) + tl.arange(0, BLOCK_C)


@triton.jit
def _convolve(
    x,
    taps,
    bias,
    y,
    stats,
    height,
    width,
    out_height,
    out_width,
    channels,
    images,
    runs,
    run_rows,
    plane,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    FLIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STATS: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y on one run of rows of a strip; count, mean and M2 of them -> stats [3, G, parts, C].

    Step q reads STRIDE rows of x, from q * STRIDE - PAD on: the taps d * STRIDE ... of output row q - d, whose sum is
    sums[d]; the last of these is complete then.
    """
    strips = tl.cdiv(images * out_width, POSITIONS)
    c, c_ok, part, group = _place(strips * runs, channels, BLOCK_C)
    image, w, p_ok = _strip(part // runs, images, out_width, POSITIONS)
    first = part % runs * run_rows
    last = tl.minimum(first + run_rows, out_height)
    image += group.to(tl.int64) * images
    column = w * STRIDE - PAD
    source = x + (image * (height * width) + column)[:, None] * channels + c[None, :]
    target = y + (image * (out_height * out_width) + w)[:, None] * channels + c[None, :]
    ok = p_ok[:, None] & c_ok[None, :]
    taps = _taps_of_block(taps, c, K, BLOCK_C)
    start = tl.zeros([POSITIONS, BLOCK_C], tl.float32)
    if HAS_BIAS:
        start += tl.load(bias + c, mask=c_ok, other=0).to(tl.float32)[None, :]
    DEEP: tl.constexpr = (K + STRIDE - 1) // STRIDE
    ROWS: tl.constexpr = STRIDE if STRIDE <= 2 else 1  # of x, unrolled
    COLUMNS: tl.constexpr = 4 if K == 8 else K
    sums = (start,) * DEEP
    count = tl.sum(p_ok.to(tl.int32), 0)
    pivot = tl.zeros([BLOCK_C], tl.float32)
    total = tl.zeros([POSITIONS, BLOCK_C], tl.float32)
    squares = tl.zeros([POSITIONS, BLOCK_C], tl.float32)
    for q in range(tl.maximum(first, PAD // STRIDE), last + DEEP - 1):  # the rows of x before that are padding
        moved = (start,)
        for d in tl.static_range(DEEP - 1):
            moved = moved + (sums[d],)
        sums = moved
        for rest in range(0, STRIDE * K, ROWS * COLUMNS):  # more than one round for patches of 4 and 8
            r = rest // K
            e = rest % K if COLUMNS < K else 0
            values = ()
            for s in tl.static_range(ROWS):
                row = q * STRIDE - PAD + r + s
                row_ok = _inside(p_ok, row, height, PAD)
                for j in tl.static_range(COLUMNS):
                    there = _inside(row_ok, column + j, width, PAD)[:, None] & c_ok[None, :]
                    v = tl.load(source + (row * width + e + j) * channels, mask=there, other=0)
                    values = values + (v.to(tl.float32),)
            added = ()
            for d in tl.static_range(DEEP):
                z = sums[d]
                for s in tl.static_range(ROWS):
                    if d * STRIDE + s < K:
                        for j in tl.static_range(COLUMNS):
                            tap = (d * STRIDE + r + s) * K + e + j
                            if FLIP:
                                tap = K * K - 1 - tap
                            z += values[s * COLUMNS + j] * tl.load(taps + tap * BLOCK_C)[None, :]
                added = added + (z,)
            sums = added
        row = q - (DEEP - 1)
        if row >= first:
            rounded = sums[DEEP - 1].to(y.dtype.element_ty)
            tl.store(target + row * out_width * channels, rounded, mask=ok)
            if STATS:
                z = rounded.to(tl.float32)
                if row == first:
                    pivot = tl.sum(tl.where(ok, z, 0), 0) / count
                z = tl.where(ok, z - pivot[None, :], 0)
                total += z
                squares += z * z
    if STATS:
        count = count * (last - first)
        summed = tl.sum(total, 0)
        shift = summed / count
        to = stats + (group.to(tl.int64) * (strips * runs) + part) * channels + c
        tl.store(to, (shift * 0 + count).to(tl.float32), mask=c_ok)
        tl.store(to + plane, pivot + shift, mask=c_ok)
        tl.store(to + 2 * plane, tl.sum(squares, 0) - summed * shift, mask=c_ok)


@triton.jit
def _gather_gradient(
    dy,
    taps,
    dx,
    height,
    width,
    out_height,
    out_width,
    channels,
    cells,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx on cells of STRIDE x STRIDE positions, of which each meets just the taps that reach it (no tap: 0)."""
    c, c_ok, tile, _ = _place(tl.cdiv(cells, POSITIONS), channels, BLOCK_C)
    p = tile * POSITIONS + tl.arange(0, POSITIONS)
    rows = tl.cdiv(height, STRIDE)
    columns = tl.cdiv(width, STRIDE)
    image = (p // (rows * columns)).to(tl.int64)
    a = p // columns % rows
    b = p % columns
    source = dy + (image * (out_height * out_width) + a * out_width + b)[:, None] * channels + c[None, :]
    target = dx + (image * (height * width) + (a * width + b) * STRIDE)[:, None] * channels + c[None, :]
    taps = _taps_of_block(taps, c, K, BLOCK_C)
    for r in range(STRIDE):  # row and column within the cell
        for s in tl.static_range(STRIDE):
            z = tl.zeros([POSITIONS, BLOCK_C], tl.float32)
            for i in range((r + PAD) % STRIDE, K, STRIDE):
                up = (r + PAD - i) // STRIDE
                row_ok = (p < cells) & (a + up >= 0) & (a + up < out_height)
                for j in tl.static_range((s + PAD) % STRIDE, K, STRIDE):
                    left = (s + PAD - j) // STRIDE
                    there = (row_ok & (b + left >= 0) & (b + left < out_width))[:, None] & c_ok[None, :]
                    g = tl.load(source + (up * out_width + left) * channels, mask=there, other=0)
                    z += g.to(tl.float32) * tl.load(taps + (i * K + j) * BLOCK_C)[None, :]
            ok = (p < cells) & (a * STRIDE + r < height) & (b * STRIDE + s < width)
            tl.store(target + (r * width + s) * channels, z.to(dx.dtype.element_ty), mask=ok[:, None] & c_ok[None, :])


@triton.jit
def _sum_gradient(
    dy,
    x,
    partial,
    height,
    width,
    out_height,
    out_width,
    channels,
    images,
    parts,
    part_strips,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over strips of dy * x, for ROWS x COLUMNS taps -> partial [parts, K*K (+ 1: sums of dy), C].

    Step q as in `_convolve`, with dy of output row q - d in window[d].
    """
    c, c_ok, part, split = _place(parts, channels, BLOCK_C)
    i0 = split // (K // COLUMNS) * ROWS
    j0 = split % (K // COLUMNS) * COLUMNS
    zero = tl.zeros([POSITIONS, BLOCK_C], tl.float32)
    DEEP: tl.constexpr = (ROWS + STRIDE - 1) // STRIDE
    READ: tl.constexpr = STRIDE if STRIDE < ROWS else ROWS  # rows of x at a step
    sums = (zero,) * (ROWS * COLUMNS)
    total = zero
    end = tl.minimum((part + 1) * part_strips, tl.cdiv(images * out_width, POSITIONS))
    for strip in range(part * part_strips, end):
        image, w, p_ok = _strip(strip, images, out_width, POSITIONS)
        column = w * STRIDE - PAD + j0
        source = x + (image * (height * width) + column)[:, None] * channels + c[None, :]
        given = dy + (image * (out_height * out_width) + w)[:, None] * channels + c[None, :]
        window = (zero,) * DEEP
        for q in range(0, out_height + DEEP - 1):
            ok = (p_ok & (q < out_height))[:, None] & c_ok[None, :]
            g = tl.load(given + q * out_width * channels, mask=ok, other=0).to(tl.float32)
            if HAS_BIAS:
                total += g
            moved = (g,)
            for d in tl.static_range(DEEP - 1):
                moved = moved + (window[d],)
            window = moved
            values = ()
            for s in tl.static_range(READ):
                row = q * STRIDE - PAD + i0 + s
                row_ok = _inside(p_ok, row, height, PAD)
                for j in tl.static_range(COLUMNS):
                    there = _inside(row_ok, column + j, width, PAD)
                    v = tl.load(source + (row * width + j) * channels, mask=there[:, None] & c_ok[None, :], other=0)
                    values = values + (v.to(tl.float32),)
            added = ()
            for i in tl.static_range(ROWS):
                for j in tl.static_range(COLUMNS):
                    added = added + (sums[i * COLUMNS + j] + values[i % STRIDE * COLUMNS + j] * window[i // STRIDE],)
            sums = added
    to = partial + part.to(tl.int64) * (K * K + HAS_BIAS) * channels + c
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS):
            tap = (i0 + i) * K + j0 + j
            tl.store(to + tap * channels, tl.sum(sums[i * COLUMNS + j], 0), mask=c_ok & (tap < K * K))
    if HAS_BIAS:
        tl.store(to + K * K * channels, tl.sum(total, 0), mask=c_ok & (split == 0))


@triton.jit
def _add_up(
    partial,
    dweight,
    dbias,
    channels,
    parts,
    columns,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over parts of partial [parts, columns], the columns TAPS (+ 1) rows of C -> dweight [C, 1, k, k], dbias."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = column < columns
    total = tl.zeros([BLOCK_P, BLOCK], tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = partial + p.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(at, mask=(p < parts)[:, None] & ok[None, :], other=0)
    value = tl.sum(total, 0)
    row = column // channels
    c = column % channels
    tl.store(dweight + c * TAPS + row, value.to(dweight.dtype.element_ty), mask=ok & (row < TAPS))
    if HAS_BIAS:
        tl.store(dbias + c, value.to(dbias.dtype.element_ty), mask=ok & (row == TAPS))
