"""augment_views against torchvision's transforms v2, view after view, on the same device.

Planning on the host is part of a call, so no CUDA graph holds it: about 2 ms of one core for 2048 views, while the GPU
is at work on the call before.

Calculated for 8 views of each of 256 pictures of 500x375 at 224, bf16, 55 % of them blurred: the launches move 3.15 GB
(1050 us at 3 TB/s), 1.30 times the floor of 2.42 GB: pictures read once, views written once in 8 bits and once
finished, and four passes of 16 bits over what is blurred.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from timing import Case, Inputs, Results, Side
from torch import Tensor

from bossnas_kernels import Looks, augment_reference, augment_views, crop_views, finish_views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# (recipe, views, pictures, height, width, size of a view)
FULL = [("imagenet", 8, 32, 375, 500, 224), ("imagenet", 8, 256, 375, 500, 224), ("cifar", 2, 256, 32, 32, 32)]
CPU_FULL = [("imagenet", 8, 2, 375, 500, 224), ("cifar", 2, 64, 32, 32, 32)]
MOST_BASELINE_VIEWS = 512  # more would take torchvision, which makes one view at a time, seconds a call


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """All of it; on ImageNet's recipe also what follows the crops alone."""
    for shape in (CPU_FULL if device.type == "cpu" else FULL)[: 1 if quick else None]:
        yield _case(shape, "views", device)
        if shape[0] == "imagenet" and not quick:
            yield _case(shape, "finish", device)


def _case(shape: tuple, part: str, device: torch.device) -> Case:
    recipe, views, images, height, width, size = shape
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    looks = draw_looks(recipe, views, images, height, width, size)
    table = torch.tensor([[3 * height * width * n, height, width] for n in range(images)])

    def draw() -> Inputs:
        source = torch.Generator().manual_seed(0)
        coarse = torch.rand(images, 3, 12, 16, generator=source) * 255  # smooth, as pictures are
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
        pixels = smooth.byte().permute(0, 2, 3, 1).reshape(-1).to(device)
        inputs: Inputs = {"pixels": pixels}
        if part == "finish":
            inputs["crops"] = crop_views(pixels, table, looks, size)
        return inputs

    def work(finish: Callable[..., Tensor], whole: Callable[..., Tensor]) -> Callable[[Inputs], Results]:
        if part == "finish":
            return lambda i: (finish(i["crops"], looks, MEAN, STD, dtype),)
        return lambda i: (whole(i["pixels"], table, looks, size, MEAN, STD, dtype),)

    values, blurred = 3 * size * size * views * images, 3 * size * size * int((looks.floats[..., 4] > 0).sum())
    moved = values * (1 + dtype.itemsize) + blurred * 4 * dtype.itemsize
    if part == "views":
        moved += 3 * height * width * images
    baselines = {}
    if views * images <= MOST_BASELINE_VIEWS and part == "views":
        baselines["torchvision v2"] = Side(work(finish_views, torchvision_views), graph=False)
    name = f"augment_views {recipe} {part} {views}x{images} of {height}x{width} to {size} {str(dtype)[6:]}"
    return Case(name, dtype, draw, Side(work(finish_views, augment_views), graph=False),
                work(augment_reference.finish_views, augment_reference.augment_views),
                baselines, moved, floor_ratio=2.0, speedups={"torchvision v2": 5.0})  # fmt: skip


def draw_looks(recipe: str, views: int, images: int, height: int, width: int, size: int) -> Looks:
    """Looks as the recipes have them: the second half of "imagenet" views is always blurred."""
    source = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *more: int) -> Tensor:
        return torch.rand(views, images, *more, generator=source) * (high - low) + low

    ints, floats = torch.zeros(views, images, 13, dtype=torch.int32), torch.ones(views, images, 5)
    floats[..., 3:], ints[..., 7:11], ints[..., 6] = 0, -1, uniform(0, 1) < 0.5
    if recipe == "cifar":
        ints[..., 2], ints[..., 3], ints[..., 4:6] = height, width, uniform(-4, 5, 2).floor()
        return Looks(ints, floats)
    area, ratio = uniform(0.08, 1) * height * width, uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    high, wide = ((area / ratio).sqrt().round().clamp(1, height), (area * ratio).sqrt().round().clamp(1, width))
    top, left = uniform(0, 1) * (height - high), uniform(0, 1) * (width - wide)
    ints[..., :4] = torch.stack([top, left, high, wide], -1)
    second = torch.arange(views)[:, None] >= views / 2
    ints[..., 7:11] = torch.where(uniform(0, 1, 1) < 0.8, uniform(0, 1, 4).argsort(-1), -1)
    ints[..., 11], ints[..., 12] = uniform(0, 1) < 0.2, second & (uniform(0, 1) < 0.2)
    floats[..., :4] += torch.tensor([0.4, 0.4, 0.2, 0.1]) * uniform(-1, 1, 4)
    floats[..., 4] = uniform(0.1, 2) * (second | (uniform(0, 1) < 0.1))
    return Looks(ints, floats)


def torchvision_views(
    pixels: Tensor, table: Tensor, looks: Looks, size: int, mean: tuple, std: tuple, dtype: torch.dtype
) -> Tensor:
    """The same views, each by torchvision's functions of uint8 tensors; its blur is a true Gaussian."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    done = []
    for ints, floats in zip(looks.ints.flatten(0, 1).tolist(), looks.floats.flatten(0, 1).tolist(), strict=True):
        offset, height, width = table[len(done) % len(table)].tolist()
        picture = pixels[offset : offset + 3 * height * width].view(height, width, 3).permute(2, 0, 1)
        view = F.resized_crop(picture, *ints[:4], [size, size], InterpolationMode.BICUBIC, antialias=True)
        if ints[4] or ints[5]:
            view = F.crop(view, ints[4], ints[5], size, size)  # fills with black
        view = F.horizontal_flip(view) if ints[6] else view
        for operation in ints[7:11]:
            if operation >= 0:
                view = adjust[operation](view, floats[operation])
        view = F.rgb_to_grayscale(view, 3) if ints[11] else view
        view = F.gaussian_blur(view, [13, 13], [floats[4]] * 2) if floats[4] > 0 else view
        view = F.solarize(view, 128) if ints[12] else view
        done.append(F.normalize(F.to_dtype(view, torch.float32, scale=True), mean, std).to(dtype))
    return torch.stack(done).unflatten(0, looks.ints.shape[:2])
