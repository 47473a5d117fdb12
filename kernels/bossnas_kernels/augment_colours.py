"""K4, second half: colours of views in up to four launches, in Triton.

Sums of luma, which contrast needs, after the operations before it -> colours; views that are not blurred are done ->
blur along rows -> blur along columns, solarise, normalise. Everything is fp32 with a rounding where Pillow has one, and
launches do not contract products and sums (`enable_fp_fusion`): the result is the reference's to the bit. Nothing waits
for the GPU. Part of the data path: no gradients, not for torch.compile or CUDA graphs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bossnas_kernels import checks, common
from bossnas_kernels.augment_reference import BLUR_BITS, MAX_SIGMA, blur_boxes, factors_of, normalisation
from bossnas_kernels.looks import CONTRAST, GREY, ORDER, SIGMA, SOLARISE, Looks

# block: pixels, or bytes in a blur. chunk: pixels of a partial sum of luma.
TABLE = {
    "sm_80": {"block": 512, "chunk": 4096, "num_warps": 4},
    "sm_90": {"block": 512, "chunk": 4096, "num_warps": 4},
    "gfx942": {"block": 1024, "chunk": 4096, "num_warps": 4},
    "default": {"block": 512, "chunk": 4096, "num_warps": 4},
    "interpreter": {"block": 2048, "chunk": 2048, "num_warps": 4},
}
# Columns of the two tables of looks: order of colours (4), grey, solarise, blur (0 none, 1 and 2 the reach of its box)
# and the two weights of the box; factors of brightness, contrast, saturation, and hue in 1/255 of a turn.
_INTS: tl.constexpr = tl.constexpr(9)
_FLOATS: tl.constexpr = tl.constexpr(4)
_BITS: tl.constexpr = tl.constexpr(BLUR_BITS)
_HALF: tl.constexpr = tl.constexpr(2 ** (BLUR_BITS - 1))


def finish_views(
    crops: Tensor, looks: Looks, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """`bossnas_kernels.finish_views` for crops of one CUDA or ROCm device."""
    checks.finish_views(crops, looks, mean, std, dtype, MAX_SIGMA)
    device, size, number = crops.device, crops.shape[2], crops.shape[0] * crops.shape[1]
    crops, out = crops.contiguous(), torch.empty(crops.shape, dtype=dtype, device=device)
    ints, floats = looks.ints.flatten(0, 1), looks.floats.flatten(0, 1)
    boxes, whole = blur_boxes(floats[:, SIGMA])
    blur = torch.where(floats[:, SIGMA] > 0, whole + 1, 0)
    contrasted, blurred = (ints[:, ORDER] == CONTRAST).any(1).nonzero()[:, 0], blur.nonzero()[:, 0]
    ints = torch.cat([ints[:, ORDER], ints[:, [GREY, SOLARISE]], blur[:, None], boxes], 1)
    scale, shift = normalisation(mean, std)
    config = common.config(TABLE, device)
    block, chunk, pixels = config["block"], config["chunk"], size * size
    parts = triton.cdiv(pixels, chunk)
    how = {"SIZE": size, "BLOCK": block, "num_warps": config["num_warps"], "enable_fp_fusion": False}
    with torch.cuda.device_of(crops):
        ints, floats = common.send(ints, device), common.send(factors_of(floats), device)
        sums = torch.empty(number, parts, dtype=torch.int32, device=device)
        painted, along_rows = (
            torch.empty(crops.shape if len(blurred) else (0,), dtype=torch.uint8, device=device) for _ in range(2)
        )
        if len(contrasted):
            which, grid = common.send(contrasted, device), (len(contrasted) * parts,)
            _sum_luma[grid](crops, ints, floats, which, sums, CHUNK=chunk, PARTS=parts, **how)
        _colour[(number * triton.cdiv(pixels, block),)](
            crops,
            ints,
            floats,
            sums,
            painted,
            out,
            *scale,
            *shift,
            PARTS=parts,
            WIDE=triton.next_power_of_2(parts),
            **how,
        )
        if len(blurred):
            which, grid = common.send(blurred, device), (len(blurred) * triton.cdiv(3 * pixels, block),)
            _blur_rows[grid](painted, ints, which, along_rows, **how)
            _blur_columns[grid](along_rows, ints, which, out, *scale, *shift, **how)
    return out.permute(0, 1, 4, 2, 3)


@triton.jit
def _load_colours(at, mask):
    red = tl.load(at, mask=mask, other=0).to(tl.float32)
    green = tl.load(at + 1, mask=mask, other=0).to(tl.float32)
    blue = tl.load(at + 2, mask=mask, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def _luma(red, green, blue):
    return tl.floor((red * 19595.0 + green * 38470.0 + blue * 7471.0 + 32768.0) * (1.0 / 65536.0))


@triton.jit
def _blend(other, value, factor):
    return tl.floor(tl.minimum(tl.maximum((value - other) * factor + other, 0.0), 255.0))


@triton.jit
def _lose(high, lost, way):
    return tl.floor(high - tl.minimum(tl.maximum(way, 0.0), 255.0) * lost + 0.5)


@triton.jit
def _turn_hue(red, green, blue, turn):
    """As in the reference, with selections instead of its minima and maxima."""
    more = tl.maximum(red, green)
    less = tl.minimum(red, green)
    high = tl.maximum(more, blue)
    spread = high - tl.minimum(less, blue)
    below = tl.div_rn(high - tl.maximum(less, tl.minimum(more, blue)), tl.maximum(spread, 1.0))
    is_red = red == high
    is_green = green == high
    rises = tl.where(is_red, green < blue, tl.where(is_green, blue < red, red < green))
    base = tl.where(is_red, 1.0, tl.where(is_green, 3.0, 5.0))
    hue = tl.where(rises, base - 2.0 + below, base - below)
    hue = tl.div_rn(hue, tl.full(hue.shape, 6.0, tl.float32))
    hue = tl.floor(tl.where(hue < 0.0, hue + 1.0, hue) * 255.0) + turn
    hue = tl.where(hue < 0.0, hue + 256.0, hue)
    hue = tl.where(hue >= 256.0, hue - 256.0, hue) * 6.0
    lost = tl.floor(tl.div_rn(spread, tl.maximum(high, 1.0)) * 255.0) * high * (1.0 / 65025.0)
    return (
        _lose(high, lost, 510.0 - tl.abs(hue - 765.0)),
        _lose(high, lost, tl.abs(hue - 510.0) - 255.0),
        _lose(high, lost, tl.abs(hue - 1020.0) - 255.0),
    )


@triton.jit
def _jitter(red, green, blue, operation, mean, factors):
    """One colour operation, -1 for none. mean: of the luma, for contrast."""
    if operation == 0:
        factor = tl.load(factors)
        red = _blend(0.0, red, factor)
        green = _blend(0.0, green, factor)
        blue = _blend(0.0, blue, factor)
    elif operation == 1:
        factor = tl.load(factors + 1)
        red = _blend(mean, red, factor)
        green = _blend(mean, green, factor)
        blue = _blend(mean, blue, factor)
    elif operation == 2:
        factor = tl.load(factors + 2)
        grey = _luma(red, green, blue)
        red = _blend(grey, red, factor)
        green = _blend(grey, green, factor)
        blue = _blend(grey, blue, factor)
    elif operation == 3:
        red, green, blue = _turn_hue(red, green, blue, tl.load(factors + 3))
    return red, green, blue


@triton.jit
def _sum_luma(
    crops, ints, floats, views, sums, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    """Sum of the luma of a chunk of one of ``views``, after the operations before contrast -> sums [views, PARTS]."""
    view = tl.load(views + tl.program_id(0) // PARTS)
    part = tl.program_id(0) % PARTS
    crops += view * (3 * SIZE * SIZE)
    ints += view * _INTS
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, CHUNK, BLOCK):
        i = part * CHUNK + start + tl.arange(0, BLOCK)
        mask = i < SIZE * SIZE
        red, green, blue = _load_colours(crops + 3 * i, mask)
        before = True
        for slot in range(4):
            operation = tl.load(ints + slot)
            before = before & (operation != 1)
            red, green, blue = _jitter(red, green, blue, tl.where(before, operation, -1), 0.0, floats + view * _FLOATS)
        total += tl.where(mask, _luma(red, green, blue), 0.0).to(tl.int32)
    tl.store(sums + view * PARTS + part, tl.sum(total, 0))


@triton.jit
def _store(out, i, red, green, blue, mask, s0, s1, s2, t0, t1, t2):
    kind = out.dtype.element_ty
    tl.store(out + 3 * i, (red * s0 + t0).to(kind), mask=mask)
    tl.store(out + 3 * i + 1, (green * s1 + t1).to(kind), mask=mask)
    tl.store(out + 3 * i + 2, (blue * s2 + t2).to(kind), mask=mask)


@triton.jit
def _colour(
    crops,
    ints,
    floats,
    sums,
    painted,
    out,
    s0,
    s1,
    s2,
    t0,
    t1,
    t2,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Jitter and grey of a block of pixels; then to ``painted`` what is blurred, and the rest, finished, to ``out``."""
    PIXELS: tl.constexpr = SIZE * SIZE
    blocks = (PIXELS + BLOCK - 1) // BLOCK
    view = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = i < PIXELS
    ints += view * _INTS
    red, green, blue = _load_colours(crops + view * (3 * PIXELS) + 3 * i, mask)
    for slot in range(4):
        operation = tl.load(ints + slot)
        mean = 0.0
        if operation == 1:
            part = tl.arange(0, WIDE)
            total = tl.sum(tl.load(sums + view * PARTS + part, mask=part < PARTS, other=0), 0).to(tl.int64)
            mean = ((2 * total + PIXELS) // (2 * PIXELS)).to(tl.float32)
        red, green, blue = _jitter(red, green, blue, operation, mean, floats + view * _FLOATS)
    if tl.load(ints + 4) != 0:
        grey = _luma(red, green, blue)
        red = grey
        green = grey
        blue = grey
    if tl.load(ints + 6) != 0:
        _store(painted + view * (3 * PIXELS), i, red, green, blue, mask, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    else:
        if tl.load(ints + 5) != 0:
            red = tl.minimum(red, 255.0 - red)
            green = tl.minimum(green, 255.0 - green)
            blue = tl.minimum(blue, 255.0 - blue)
        _store(out + view * (3 * PIXELS), i, red, green, blue, mask, s0, s1, s2, t0, t1, t2)


@triton.jit
def _box3(left, middle, right, inner, outer):
    """A box that takes part of its neighbours, rounded; 32 bits without a sign just hold the sum."""
    return (middle * inner + (left + right) * outer + _HALF) >> _BITS


@triton.jit
def _box5(p0, p1, p2, p3, p4, inner, outer):
    return ((p1 + p2 + p3) * inner + (p0 + p4) * outer + _HALF) >> _BITS


@triton.jit
def _pixel(base, place, offset, mask, step, SIZE: tl.constexpr):
    """The pixel so far away, or the nearest one inside."""
    near = tl.minimum(tl.maximum(place + offset, 0), SIZE - 1)
    return tl.load(base + near * step, mask=mask, other=0).to(tl.uint32)


@triton.jit
def _three_boxes(base, place, mask, step, ints, SIZE: tl.constexpr):
    """Three boxes, one after the other, at ``place`` in a row or column whose pixels are ``step`` apart.

    What lies outside counts as the outermost value of the box before, so values there are replaced from the inside.
    """
    reach = tl.load(ints + 6)
    inner = tl.load(ints + 7).to(tl.uint32)
    outer = tl.load(ints + 8).to(tl.uint32)
    p = _pixel(base, place, 0, mask, step, SIZE)
    l1 = _pixel(base, place, -1, mask, step, SIZE)
    l2 = _pixel(base, place, -2, mask, step, SIZE)
    l3 = _pixel(base, place, -3, mask, step, SIZE)
    r1 = _pixel(base, place, 1, mask, step, SIZE)
    r2 = _pixel(base, place, 2, mask, step, SIZE)
    r3 = _pixel(base, place, 3, mask, step, SIZE)
    if reach == 1:
        a = _box3(l1, p, r1, inner, outer)
        al1 = tl.where(place < 1, a, _box3(l2, l1, p, inner, outer))
        al2 = tl.where(place < 2, al1, _box3(l3, l2, l1, inner, outer))
        ar1 = tl.where(place >= SIZE - 1, a, _box3(p, r1, r2, inner, outer))
        ar2 = tl.where(place >= SIZE - 2, ar1, _box3(r1, r2, r3, inner, outer))
        b = _box3(al1, a, ar1, inner, outer)
        bl1 = tl.where(place < 1, b, _box3(al2, al1, a, inner, outer))
        br1 = tl.where(place >= SIZE - 1, b, _box3(a, ar1, ar2, inner, outer))
        p = _box3(bl1, b, br1, inner, outer)
    else:
        l4 = _pixel(base, place, -4, mask, step, SIZE)
        l5 = _pixel(base, place, -5, mask, step, SIZE)
        l6 = _pixel(base, place, -6, mask, step, SIZE)
        r4 = _pixel(base, place, 4, mask, step, SIZE)
        r5 = _pixel(base, place, 5, mask, step, SIZE)
        r6 = _pixel(base, place, 6, mask, step, SIZE)
        a = _box5(l2, l1, p, r1, r2, inner, outer)
        al1 = tl.where(place < 1, a, _box5(l3, l2, l1, p, r1, inner, outer))
        al2 = tl.where(place < 2, al1, _box5(l4, l3, l2, l1, p, inner, outer))
        al3 = tl.where(place < 3, al2, _box5(l5, l4, l3, l2, l1, inner, outer))
        al4 = tl.where(place < 4, al3, _box5(l6, l5, l4, l3, l2, inner, outer))
        ar1 = tl.where(place >= SIZE - 1, a, _box5(l1, p, r1, r2, r3, inner, outer))
        ar2 = tl.where(place >= SIZE - 2, ar1, _box5(p, r1, r2, r3, r4, inner, outer))
        ar3 = tl.where(place >= SIZE - 3, ar2, _box5(r1, r2, r3, r4, r5, inner, outer))
        ar4 = tl.where(place >= SIZE - 4, ar3, _box5(r2, r3, r4, r5, r6, inner, outer))
        b = _box5(al2, al1, a, ar1, ar2, inner, outer)
        bl1 = tl.where(place < 1, b, _box5(al3, al2, al1, a, ar1, inner, outer))
        bl2 = tl.where(place < 2, bl1, _box5(al4, al3, al2, al1, a, inner, outer))
        br1 = tl.where(place >= SIZE - 1, b, _box5(al1, a, ar1, ar2, ar3, inner, outer))
        br2 = tl.where(place >= SIZE - 2, br1, _box5(a, ar1, ar2, ar3, ar4, inner, outer))
        p = _box5(bl2, bl1, b, br1, br2, inner, outer)
    return p


@triton.jit
def _blurred_block(views, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """This program's view and bytes of it."""
    blocks = (3 * SIZE * SIZE + BLOCK - 1) // BLOCK
    view = tl.load(views + tl.program_id(0) // blocks)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return view, i, i < 3 * SIZE * SIZE


@triton.jit
def _blur_rows(painted, ints, views, along_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Blur of a block of bytes of one of ``views`` along its rows."""
    view, i, mask = _blurred_block(views, SIZE, BLOCK)
    x = i % (3 * SIZE) // 3
    start = painted + view * (3 * SIZE * SIZE) + (i - 3 * x)  # of the row, in the pixel's channel
    value = _three_boxes(start, x, mask, 3, ints + view * _INTS, SIZE)
    tl.store(along_rows + view * (3 * SIZE * SIZE) + i, value.to(tl.uint8), mask=mask)


@triton.jit
def _blur_columns(along_rows, ints, views, out, s0, s1, s2, t0, t1, t2, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Blur along columns, solarisation and normalisation."""
    view, i, mask = _blurred_block(views, SIZE, BLOCK)
    start = along_rows + view * (3 * SIZE * SIZE) + i % (3 * SIZE)  # of the column
    ints += view * _INTS
    value = _three_boxes(start, i // (3 * SIZE), mask, 3 * SIZE, ints, SIZE).to(tl.float32)
    if tl.load(ints + 5) != 0:
        value = tl.minimum(value, 255.0 - value)
    channel = i % 3
    value = value * tl.where(channel == 0, s0, tl.where(channel == 1, s1, s2)) + tl.where(
        channel == 0, t0, tl.where(channel == 1, t1, t2)
    )
    tl.store(out + view * (3 * SIZE * SIZE) + i, value.to(out.dtype.element_ty), mask=mask)
