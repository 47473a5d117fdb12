"""K4, first half: crops of a batch of pictures in three launches, in Triton.

Weights of the filter for every crop -> first direction of the resize -> second. All in whole numbers, as in Pillow, so
that the crops are Pillow's to the bit. What each launch does is planned on the host from looks and table, which stay
on the CPU: nothing waits for the GPU. Part of the data path: no gradients, not for torch.compile or CUDA graphs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bossnas_kernels import checks, common
from bossnas_kernels.augment_reference import CROP_BITS, columns_first
from bossnas_kernels.looks import FLIP, Looks

# tile: elements of a program of the resize.
TABLE = {
    "sm_80": {"tile": 2048, "num_warps": 4},
    "sm_90": {"tile": 2048, "num_warps": 4},
    "gfx942": {"tile": 2048, "num_warps": 4},
    "default": {"tile": 2048, "num_warps": 4},
    "interpreter": {"tile": 2048, "num_warps": 4},
}
# Columns of a plan, one row for each of two directions of each view's resize. Of source and target (the picture between
# the directions is the target of the first): offset, bytes from row to row. Of the target: rows, bytes in a row.
# Whether it goes along columns (1) or rows (0). In that direction: pixels of the crop, taps of the filter, the row of
# `weights` where its own start, shift and mirror of the view.
_SOURCE, _SOURCE_ROW, _TARGET, _TARGET_ROW, _ROWS, _BYTES, _ALONG, _LENGTH, _TAPS, _WEIGHTS, _SHIFT, _MIRROR = range(12)
_COLUMNS: tl.constexpr = tl.constexpr(12)
_ALIGN: tl.constexpr = tl.constexpr(16)  # bytes; rows of the picture between the directions start at multiples of it
_BITS: tl.constexpr = tl.constexpr(CROP_BITS)
_ONE: tl.constexpr = tl.constexpr(2**CROP_BITS)  # the weight of a pixel that is taken as it is
_HALF: tl.constexpr = tl.constexpr(2 ** (CROP_BITS - 1))


def crop_views(pixels: Tensor, table: Tensor, looks: Looks, size: int) -> Tensor:
    """`bossnas_kernels.crop_views` for pixels of one CUDA or ROCm device."""
    checks.crop_views(pixels, table, looks, size)
    device, (views, images) = pixels.device, looks.ints.shape[:2]
    crops = torch.empty(views, images, size, size, 3, dtype=torch.uint8, device=device)
    plan, scratch_bytes, weight_rows = _plan(table, looks.ints, size)
    config = common.config(TABLE, device)
    along, across = (config["tile"] // 64, 64), (config["tile"] // 32, 32)  # rows x bytes of a tile
    with torch.cuda.device_of(pixels):
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
        first = torch.empty(2, views * images, size, dtype=torch.int32, device=device)
        weights = torch.empty(weight_rows, size, dtype=torch.int32, device=device)
        sent = common.send(plan, device)
        block = min(256, triton.next_power_of_2(size))
        _weigh[(2 * views * images * triton.cdiv(size, block),)](
            sent, first, weights, SIZE=size, BLOCK=block, num_warps=max(1, block // 64), enable_fp_fusion=False
        )
        for turn, (source, target) in enumerate(((pixels.contiguous(), scratch), (scratch, crops))):
            here = plan[turn]
            tiles = int(torch.where(here[:, _ALONG] == 1, _tiles(here, *along), _tiles(here, *across)).max())
            _resize[(views * images * tiles,)](
                source,
                target,
                sent[turn],
                first[turn],
                weights,
                tiles,
                SIZE=size,
                SECOND=turn == 1,
                ALONG_ROWS=along[0],
                ALONG_BYTES=along[1],
                ACROSS_ROWS=across[0],
                ACROSS_BYTES=across[1],
                num_warps=config["num_warps"],
            )
    return crops


def _plan(table: Tensor, ints: Tensor, size: int) -> tuple[Tensor, int, int]:
    """-> plan int64 [2, N*V, 12], picture by picture, so that its views find it in the cache; the bytes between the two
    directions; the rows of weights."""
    views, images = ints.shape[:2]
    top, left, height, width, down, right, flip = ints[..., : FLIP + 1].long().transpose(0, 1).reshape(-1, 7).unbind(1)
    offset, _, whole_width = table.repeat_interleave(views, 0).unbind(1)
    columns = columns_first(height, width, size)
    plan = torch.zeros(2, len(top), _COLUMNS.value, dtype=torch.int64)
    first, second = plan[0], plan[1]
    first[:, _SOURCE], first[:, _SOURCE_ROW] = offset + 3 * (top * whole_width + left), 3 * whole_width
    first[:, _ROWS], first[:, _BYTES] = torch.where(columns, size, height), 3 * torch.where(columns, width, size)
    first[:, _TARGET_ROW] = (first[:, _BYTES] + _ALIGN.value - 1) // _ALIGN.value * _ALIGN.value
    sizes = first[:, _ROWS] * first[:, _TARGET_ROW]
    first[:, _TARGET] = sizes.cumsum(0) - sizes
    second[:, _SOURCE], second[:, _SOURCE_ROW] = first[:, _TARGET], first[:, _TARGET_ROW]
    place = torch.arange(views * images).view(views, images).T.reshape(-1)
    second[:, _TARGET], second[:, _TARGET_ROW] = place * (3 * size * size), 3 * size
    second[:, _ROWS], second[:, _BYTES] = size, 3 * size
    for turn, along in ((first, columns), (second, ~columns)):
        turn[:, _ALONG], turn[:, _LENGTH] = along, torch.where(along, height, width)
        turn[:, _SHIFT], turn[:, _MIRROR] = torch.where(along, down, right), torch.where(along, 0, flip)
        turn[:, _TAPS] = 2 * ((2 * turn[:, _LENGTH] + size - 1) // size).clamp(min=2) + 1
    taps = plan[..., _TAPS].flatten().cumsum(0)
    plan[..., _WEIGHTS] = (taps - plan[..., _TAPS].flatten()).view(2, -1)
    return plan, int(sizes.sum()), int(taps[-1])


def _tiles(plan: Tensor, rows: int, row_bytes: int) -> Tensor:
    """Tiles of so many rows and bytes that the targets of a plan have."""
    return (plan[:, _ROWS] + rows - 1) // rows * ((plan[:, _BYTES] + row_bytes - 1) // row_bytes)


@triton.jit
def _bicubic(place, centre, narrow):
    """Weight of a pixel of the crop, fp64, not normalised. narrow: 1 / how far the filter is stretched."""
    x = tl.abs((place.to(tl.float64) - centre + 0.5) * narrow)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((x - 5.0) * x + 8.0) * x * -0.5 + 2.0
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@triton.jit
def _weigh(plan, first, weights, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """For every pixel of a view in one direction: the first pixel of the crop that counts, weights from there on."""
    blocks = (SIZE + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    x = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row_plan = plan + row * _COLUMNS
    length = tl.load(row_plan + 7).to(tl.int32)
    taps = tl.load(row_plan + 8).to(tl.int32)
    shift = tl.load(row_plan + 10).to(tl.int32)
    mirror = tl.load(row_plan + 11)
    resized = tl.where(mirror != 0, SIZE - 1 - x, x) + shift
    inside = (resized >= 0) & (resized < SIZE)
    scale = length.to(tl.float64) / SIZE
    stretch = tl.where(scale < 1.0, 1.0, scale)
    narrow = 1.0 / stretch
    centre = (resized.to(tl.float64) + 0.5) * scale
    low = tl.where(inside, tl.maximum((centre - 2.0 * stretch + 0.5).to(tl.int32), 0), 0)
    high = tl.where(inside, tl.minimum((centre + 2.0 * stretch + 0.5).to(tl.int32), length), 0)
    total = tl.zeros([BLOCK], tl.float64)
    for k in range(taps):
        total += tl.where(low + k < high, _bicubic(low + k, centre, narrow), 0.0)
    total = tl.where(inside, total, 1.0)
    to = weights + tl.load(row_plan + 9) * SIZE + x
    for k in range(taps):
        weight = tl.where(low + k < high, _bicubic(low + k, centre, narrow), 0.0) / total * _ONE
        weight += tl.where(weight < 0.0, -0.5, 0.5)
        tl.store(to, weight.to(tl.int32), mask=x < SIZE)  # cut off
        to += SIZE
    tl.store(first + row * SIZE + x, low, mask=x < SIZE)


@triton.jit
def _to_bytes(sums):
    return tl.minimum(tl.maximum((sums + _HALF) >> _BITS, 0), 255).to(tl.uint8)


@triton.jit
def _resize_columns(
    source,
    source_row,
    target,
    target_row,
    rows,
    row_bytes,
    first,
    weights,
    taps,
    last,
    tile,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """A tile of the target, along columns."""
    across = tl.cdiv(row_bytes, BYTES)
    y = tile // across * ROWS + tl.arange(0, ROWS)
    j = tile % across * BYTES + tl.arange(0, BYTES)
    inside = (y < rows)[:, None] & (j < row_bytes)[None, :]
    start = tl.load(first + y, mask=y < rows, other=0)
    sums = tl.zeros([ROWS, BYTES], tl.int32)
    for k in range(taps):
        weight = tl.load(weights + k * SIZE + y, mask=y < rows, other=0)
        at = tl.minimum(start + k, last) * source_row  # weights behind the last pixel are 0
        pixel = tl.load(source + at[:, None] + j[None, :], mask=inside, other=0)
        sums += pixel.to(tl.int32) * weight[:, None]
    tl.store(target + y[:, None] * target_row + j[None, :], _to_bytes(sums), mask=inside)


@triton.jit
def _resize_rows(
    source,
    source_row,
    target,
    target_row,
    rows,
    row_bytes,
    first,
    weights,
    taps,
    last,
    tile,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """A tile of the target, along rows."""
    across = tl.cdiv(row_bytes, BYTES)
    y = tile // across * ROWS + tl.arange(0, ROWS)
    j = tile % across * BYTES + tl.arange(0, BYTES)
    x = j // 3
    inside = (y < rows)[:, None] & (j < row_bytes)[None, :]
    start = tl.load(first + x, mask=x < SIZE, other=0)
    line = source + y[:, None] * source_row
    sums = tl.zeros([ROWS, BYTES], tl.int32)
    for k in range(taps):
        weight = tl.load(weights + k * SIZE + x, mask=x < SIZE, other=0)
        at = tl.minimum(start + k, last) * 3 + j % 3
        pixel = tl.load(line + at[None, :], mask=inside, other=0)
        sums += pixel.to(tl.int32) * weight[None, :]
    tl.store(target + y[:, None] * target_row + j[None, :], _to_bytes(sums), mask=inside)


@triton.jit
def _resize(
    source,
    target,
    plan,
    first,
    weights,
    tiles,
    SIZE: tl.constexpr,
    SECOND: tl.constexpr,
    ALONG_ROWS: tl.constexpr,
    ALONG_BYTES: tl.constexpr,
    ACROSS_ROWS: tl.constexpr,
    ACROSS_BYTES: tl.constexpr,
):
    """One tile of one view in one direction. SECOND: the sources are the pictures between the directions."""
    view = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    plan += view * _COLUMNS
    source += tl.load(plan)
    source_row = tl.load(plan + 1).to(tl.int32)
    target += tl.load(plan + 2)
    target_row = tl.load(plan + 3).to(tl.int32)
    rows = tl.load(plan + 4).to(tl.int32)
    row_bytes = tl.load(plan + 5).to(tl.int32)
    last = tl.load(plan + 7).to(tl.int32) - 1
    taps = tl.load(plan + 8).to(tl.int32)
    weights += tl.load(plan + 9) * SIZE
    first += view * SIZE
    if SECOND:
        source = tl.multiple_of(source, _ALIGN)
        source_row = tl.multiple_of(source_row, _ALIGN)
        row_bytes = 3 * SIZE
        target_row = 3 * SIZE
    else:
        target = tl.multiple_of(target, _ALIGN)
        target_row = tl.multiple_of(target_row, _ALIGN)
    if tl.load(plan + 6) != 0:
        if tile // tl.cdiv(row_bytes, ALONG_BYTES) * ALONG_ROWS < rows:
            _resize_columns(
                source,
                source_row,
                target,
                target_row,
                rows,
                row_bytes,
                first,
                weights,
                taps,
                last,
                tile,
                ALONG_ROWS,
                ALONG_BYTES,
                SIZE,
            )
    else:
        if tile // tl.cdiv(row_bytes, ACROSS_BYTES) * ACROSS_ROWS < rows:
            _resize_rows(
                source,
                source_row,
                target,
                target_row,
                rows,
                row_bytes,
                first,
                weights,
                taps,
                last,
                tile,
                ACROSS_ROWS,
                ACROSS_BYTES,
                SIZE,
            )
