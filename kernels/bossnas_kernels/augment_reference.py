"""Augmented views of a batch of pictures in plain PyTorch: the truth of the `augment_views` kernels.

Everything is Pillow's 8-bit arithmetic, Pillow 13's where versions differ. Between the steps of `finish_views` the
planes are fp32 that holds whole numbers, and sums over a picture are exact: no result depends on an order of summation
or on what else is in the batch. Comparisons and `where` are slow on a CPU; minima and maxima are not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bossnas_kernels import checks
from bossnas_kernels.looks import (
    BRIGHTNESS,
    CONTRAST,
    GREY,
    HUE,
    ORDER,
    SIGMA,
    SOLARISE,
    Looks,
)

CROP_BITS = 22  # of the weights of a crop, as in Pillow
BLUR_BITS = 24  # and of a blur
MAX_SIGMA = 2.4  # pixels; a box of Pillow's blur reaches two pixels up to sqrt(6)
CHUNK = {"cpu": 2**16, "cuda": 2**24}  # pixels at a time: on a CPU they stay in its cache


def crop_views(pixels: Tensor, table: Tensor, looks: Looks, size: int) -> Tensor:
    """`bossnas_kernels.crop_views`. On a CPU by PyTorch's antialiased resize, 0.004 of 255 from Pillow's in the mean;
    elsewhere, far more slowly, Pillow's to the bit."""
    checks.crop_views(pixels, table, looks, size)
    resize = resize_nearly if pixels.device.type == "cpu" else resize_exactly
    views, images = looks.ints.shape[:2]
    crops = torch.zeros(views, images, size, size, 3, dtype=torch.uint8, device=pixels.device)
    for n, (offset, height, width) in enumerate(table.tolist()):
        picture = pixels[offset : offset + 3 * height * width].view(height, width, 3)
        for crop, (top, left, high, wide, down, right, flip) in zip(
            crops[:, n], looks.ints[:, n, :7].tolist(), strict=True
        ):
            resized = picture[top : top + high, left : left + wide]
            if (high, wide) != (size, size):
                resized = resize(resized, size)
            down, right = (min(max(shift, -size), size) for shift in (down, right))
            resized = resized[max(down, 0) : size + min(down, 0), max(right, 0) : size + min(right, 0)]
            inside = crop[max(-down, 0) :, max(-right, 0) :][: resized.shape[0], : resized.shape[1]]
            inside.copy_(resized)
            if flip:
                crop.copy_(crop.flip(1))
    return crops


def columns_first(height: Tensor, width: Tensor, size: int) -> Tensor:
    """Whether Pillow 13 resizes height x width to size x size along columns first, then along rows. Also of numbers."""
    return (height > size) & (height + size > 2 * width)


def resize_nearly(crop: Tensor, size: int) -> Tensor:
    """uint8 [h, w, 3] -> [S, S, 3], by PyTorch, which resizes along rows first."""
    height, width = crop.shape[:2]
    picture = crop[None].permute(0, 3, 1, 2)  # in this order PyTorch sees channels_last, and gives it
    if columns_first(height, width, size):
        picture = F.interpolate(picture, (size, width), mode="bicubic", antialias=True)
    return F.interpolate(picture, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def resize_exactly(crop: Tensor, size: int) -> Tensor:
    """Pillow's bicubic resize, uint8 [h, w, 3] -> [S, S, 3]: in one direction after the other, rounded after each."""
    height, width = crop.shape[:2]
    along_rows, along_columns = (_weights(length, size, crop.device) for length in (width, height))
    crop = crop.double()
    if columns_first(height, width, size):
        crop = _rounded(torch.einsum("yh,hwc->ywc", along_columns, crop))
        return _rounded(torch.einsum("xw,ywc->yxc", along_rows, crop)).to(torch.uint8)
    crop = _rounded(torch.einsum("xw,hwc->hxc", along_rows, crop))
    return _rounded(torch.einsum("yh,hxc->yxc", along_columns, crop)).to(torch.uint8)


def _rounded(sums: Tensor) -> Tensor:
    return ((sums + 2 ** (CROP_BITS - 1)) / 2**CROP_BITS).floor().clamp(0, 255)


def _weights(length: int, size: int, device: torch.device) -> Tensor:
    """Weights of Pillow's bicubic filter in 1/2^CROP_BITS, whole numbers: sums in fp64 are exact. [size, length]."""
    scale = length / size
    stretch = max(scale, 1.0)  # antialiased: the filter is as wide as what it makes one pixel of
    centre = (torch.arange(size, dtype=torch.float64, device=device)[:, None] + 0.5) * scale
    place = torch.arange(length, dtype=torch.float64, device=device)
    inside = (place >= (centre - 2 * stretch + 0.5).trunc()) & (place < (centre + 2 * stretch + 0.5).trunc())
    x = ((place - centre + 0.5) * (1 / stretch)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((x - 5) * x + 8) * x * -0.5 + 2  # below 1, from 1 to 2; a = -0.5
    weight = torch.where(x < 1, near, far) * (inside & (x < 2))
    weight = weight / weight.sum(1, keepdim=True) * 2**CROP_BITS
    return (weight + torch.where(weight < 0, -0.5, 0.5)).trunc()


def finish_views(
    crops: Tensor, looks: Looks, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """`bossnas_kernels.finish_views`."""
    checks.finish_views(crops, looks, mean, std, dtype, MAX_SIGMA)
    size, device = crops.shape[2], crops.device
    flat, out = crops.reshape(-1, size * size, 3), torch.empty(crops.shape, dtype=dtype, device=device)
    rows = out.view(flat.shape)
    ints, floats = looks.ints.flatten(0, 1), looks.floats.flatten(0, 1)
    grey, solarise, sigma = ints[:, GREY] != 0, ints[:, SOLARISE] != 0, floats[:, SIGMA]
    (boxes, whole), factors = blur_boxes(sigma), factors_of(floats).to(device)
    blurs = [(reach, (sigma > 0) & (whole == reach)) for reach in (0, 1)]
    boxes = boxes.to(device)
    scale, shift = (torch.tensor(t, device=device)[:, None, None] for t in normalisation(mean, std))
    chunk = max(1, CHUNK.get(device.type, CHUNK["cuda"]) // size**2)
    for order, views in _same_order(ints):
        for some in views.split(chunk):
            at = slice(int(some), int(some) + 1) if len(some) == 1 else some.to(device)  # a slice makes no copy
            planes = flat[at].permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
            for operation in order:
                _jitter(planes, operation, factors[at, operation, None])
            for those, which in _chosen(grey[some], planes):
                planes[:, which] = _luma(those)
            for reach, chosen in blurs:
                for those, which in _chosen(chosen[some], planes):
                    planes[:, which] = _blur(those, size, boxes[at][which], reach)
            for those, which in _chosen(solarise[some], planes):
                planes[:, which] = torch.minimum(those, 255 - those)
            planes.mul_(scale).add_(shift)
            for channel in range(3):  # a CPU is three times slower with all at once
                rows[at, :, channel] = planes[channel].to(dtype)
    return out.permute(0, 1, 4, 2, 3)


def augment_views(
    pixels: Tensor,
    table: Tensor,
    looks: Looks,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`bossnas_kernels.augment_views`."""
    return finish_views(crop_views(pixels, table, looks, size), looks, mean, std, dtype)


def normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[list[float], list[float]]:
    """(pixel / 255 - mean) / std as pixel * scale + shift, by channel."""
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def factors_of(floats: Tensor) -> Tensor:
    """float32 [..., 5] of Looks on the CPU -> factors of the colour operations, [..., 4]: the hue in whole 1/255 of a
    turn, cut off in fp64 as torchvision does."""
    return torch.cat([floats[..., :HUE], (floats[..., HUE:SIGMA].double() * 255).trunc().float()], -1)


def blur_boxes(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The box that Pillow's Gaussian blur takes three times in each direction.

    sigma: [n], on the CPU. Returns int32 [n, 2], weights in 1/2^BLUR_BITS of the pixels up to `whole` away and of the
    two next, and `whole`, int32 [n], 0 or 1 up to MAX_SIGMA.
    """
    variance = sigma.double() ** 2 / 3
    whole = ((torch.sqrt(12 * variance + 1) - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    inner = (2**BLUR_BITS / ((whole + part).float() * 2 + 1)).floor().int()  # fp32, as in Pillow
    outer = (2**BLUR_BITS - (2 * whole.int() + 1) * inner) // 2
    return torch.stack([inner, outer], -1), whole.int()


def _same_order(ints: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """Orders of colour operations, and the numbers of the views that have them. ints: [views, 13]."""
    orders = ints[:, ORDER].tolist()
    by_order = sorted(range(len(orders)), key=orders.__getitem__)
    for order, views in itertools.groupby(by_order, key=orders.__getitem__):
        yield [operation for operation in order if operation >= 0], torch.tensor(list(views))


def _chosen(chosen: Tensor, planes: Tensor) -> Iterator[tuple[Tensor, Tensor | slice]]:
    """Planes [3, n, pixels] of the chosen views and their numbers; nothing if none is chosen. chosen: bool [n]."""
    if chosen.all():
        yield planes, slice(None)
    elif chosen.any():
        which = chosen.nonzero()[:, 0].to(planes.device)
        yield planes[:, which], which


def _jitter(planes: Tensor, operation: int, factor: Tensor) -> None:
    """One colour operation on planes [3, n, pixels], in place; factor: [n, 1]."""
    if operation == HUE:
        _turn_hue(planes, factor)
        return
    if operation == BRIGHTNESS:
        planes.mul_(factor)
    else:
        other = _luma(planes)
        if operation == CONTRAST:
            other = (other.sum(1, keepdim=True, dtype=torch.float64) / other.shape[1] + 0.5).floor().float()
        planes.sub_(other).mul_(factor).add_(other)
    planes.clamp_(0, 255).floor_()


def _luma(planes: Tensor) -> Tensor:
    """Pillow's greyscale of planes [3, n, pixels]: [n, pixels]."""
    red, green, blue = planes
    luma = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return luma.add_(2**15).mul_(2**-16).floor_()


def _turn_hue(planes: Tensor, turn: Tensor) -> None:
    """Pillow's HSV, which has 8 bits a channel, with another hue, in place. Every rounding is where Pillow has one.

    planes: [3, n, pixels]. turn: [n, 1], in 1/255.
    """
    red, green, blue = planes
    more, less = torch.maximum(red, green), torch.minimum(red, green)
    high, low = torch.maximum(more, blue), torch.minimum(less, blue)
    spread = high - low
    below = (high - torch.maximum(less, torch.minimum(more, blue))).div_(spread.clamp(min=1))
    # Hue 0..6 is base + below or base - below, by the order of the channels; equal ones give the same either way. Of
    # three comparisons around the circle one is true (+) or two are (-).
    a, b, c = (torch.ge(x, y, out=torch.empty_like(x)) for x, y in ((red, green), (green, blue), (blue, red)))
    b.add_(c)
    base = torch.addcmul(c, a, c).sub_((a - b).clamp_(min=0)).mul_(2).add_(1)
    hue = a.add_(b).mul_(-2).add_(3).mul_(below).add_(base).div_(6)
    hue.sub_(hue.floor()).mul_(255).floor_().add_(turn)
    hue.sub_((hue / 256).floor_(), alpha=256).mul_(6)
    # What a channel can lose of the highest value, in a 255th of the way from one corner of the hexagon to the next.
    lost = (spread / high.clamp(min=1)).mul_(255).floor_().mul_(high).mul_(1 / 65025)
    ways = (hue - 765).abs_().neg_().add_(510), (hue - 510).abs_().sub_(255), (hue - 1020).abs_().sub_(255)
    for plane, way in zip(planes, ways, strict=True):
        torch.sub(high, way.clamp_(0, 255).mul_(lost), out=plane)
    planes.add_(0.5).floor_()


def _blur(planes: Tensor, size: int, boxes: Tensor, whole: int) -> Tensor:
    """Three boxes along rows, three along columns, rounded after each. planes: [3, n, S*S]; boxes: [n, 2].

    Pillow's sums need 32 bits without a sign: these wrap around, and end in the right 8 bits.
    """
    reach = whole + 1
    inner, outer = boxes.T[:, :, None, None]
    planes = planes.to(torch.int32).unflatten(2, (size, size))
    for dim in (3, 2):
        wide = planes.new_empty([n + 2 * reach * (d == dim) for d, n in enumerate(planes.shape)])
        middle = wide.narrow(dim, reach, size).copy_(planes)
        for _ in range(3):
            wide.narrow(dim, 0, reach).copy_(middle.narrow(dim, 0, 1))
            wide.narrow(dim, reach + size, reach).copy_(middle.narrow(dim, size - 1, 1))
            around = (wide.narrow(dim, 0, size) + wide.narrow(dim, 2 * reach, size)).mul_(outer)
            if whole:
                middle.copy_((middle + wide.narrow(dim, 1, size)).add_(wide.narrow(dim, 3, size)))
            middle.mul_(inner).add_(around).add_(2 ** (BLUR_BITS - 1))
            middle.bitwise_right_shift_(BLUR_BITS).bitwise_and_(255)
        planes = middle
    return planes.flatten(2).float()
