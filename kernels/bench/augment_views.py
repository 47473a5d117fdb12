"""augment_views against torchvision's operations on tensors, view by view, with the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from timing import Case, Inputs, Results, Side
from torch import Tensor

from bossnas_kernels import Looks, augment_reference, augment_views

try:
    from torchvision.transforms.v2 import functional as F
except ImportError:  # then there is no baseline
    F = None

FULL, CPU_FULL = [(8, 256, 224), (2, 1024, 32)], [(8, 8, 224), (2, 64, 32)]  # views, pictures, side
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """ImageNet's views, half of the pictures' blurred, and crops and flips alone at CIFAR's size."""
    shapes = CPU_FULL if device.type == "cpu" else FULL
    for views, images, size in shapes[:1] if quick else shapes:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        yield _case(views, images, size, size > 32, dtype, device)


def _case(views: int, images: int, size: int, colours: bool, dtype: torch.dtype, device: torch.device) -> Case:
    side = torch.Generator().manual_seed(0)
    sizes = [(375, 500), (500, 333), (333, 500), (480, 640)] if colours else [(size, size)]
    table, offset = [], 0
    for i in range(images):
        height, width = sizes[i % len(sizes)]
        table.append((offset, height, width))
        offset += 3 * height * width
    looks, shapes = _looks(views, table, colours, side), torch.tensor(table)

    def draw() -> Inputs:
        source = torch.Generator(device).manual_seed(1)
        return {"pixels": torch.randint(0, 256, (offset,), dtype=torch.uint8, device=device, generator=source)}

    def work(augment: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[Inputs], Results]:
        return lambda i: (augment(i["pixels"], shapes, looks, size, MEAN, STD, dtype),)

    def truth(i: Inputs) -> Results:  # whole numbers in fp32, up to the normalisation
        return (augment_reference.augment_views(i["pixels"], shapes, looks, size, MEAN, STD).double(),)

    baselines = {} if F is None else {"torchvision v2": Side(work(_torchvision, dtype), graph=False)}
    crops, blurred = views * images * 3 * size**2, int((looks.floats[..., 4] > 0).sum()) * 3 * size**2
    # Pictures in; crops out and in again; blurred views out and in twice more; views out.
    moved = offset + 2 * crops + 4 * blurred + crops * dtype.itemsize
    name = f"augment_views {views} views {images} pictures {size}x{size} {str(dtype).removeprefix('torch.')}"
    # The host plans and copies, so no CUDA graph can hold it.
    return Case(name, dtype, draw, Side(work(augment_views, dtype), graph=False), truth, baselines, moved,
                floor_ratio=2.0, speedups={"torchvision v2": 5.0})


def _looks(views: int, table: list[tuple[int, int, int]], colours: bool, side: torch.Generator) -> Looks:
    """Half of each picture or more is cropped; with colours all operations are there, and half of the blurs."""
    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=side)

    shape = (views, len(table))
    ints, floats = torch.zeros(*shape, 13, dtype=torch.int32), torch.zeros(*shape, 5)
    extent = torch.tensor([row[1:] for row in table])
    length = (extent * (0.5 + 0.5 * uniform(*shape, 2))).int().clamp(min=1) if colours else extent.expand(*shape, 2)
    ints[..., :2] = ((extent - length + 1) * uniform(*shape, 2)).int().minimum((extent - length).int())
    ints[..., 2:4] = length
    ints[..., 4:6] = 0 if colours else torch.randint(-4, 5, (*shape, 2), generator=side)
    ints[..., 6] = uniform(*shape) < 0.5
    ints[..., 7:11] = uniform(*shape, 4).argsort(-1) if colours else -1
    floats[..., :3] = 0.6 + 0.8 * uniform(*shape, 3)
    floats[..., 3] = (0.2 * uniform(*shape) - 0.1) * colours
    if colours:
        ints[views // 2:, :, 12] = (uniform(*shape)[views // 2:] < 0.2).int()
        floats[views // 2:, :, 4] = 0.1 + 1.9 * uniform(*shape)[views // 2:]
    return Looks(ints, floats)


def _torchvision(pixels: Tensor, table: Tensor, looks: Looks, size: int, mean: tuple, std: tuple,
                 dtype: torch.dtype) -> Tensor:
    """[V, N, 3, size, size], one picture and view after another."""
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    out = torch.empty(*looks.ints.shape[:2], 3, size, size, dtype=dtype, device=pixels.device)
    for n, (offset, height, width) in enumerate(table.tolist()):
        picture = pixels[offset:offset + 3 * height * width].view(height, width, 3).permute(2, 0, 1)
        for v, (ints, floats) in enumerate(zip(looks.ints[:, n].tolist(), looks.floats[:, n].tolist(), strict=True)):
            view = F.resized_crop(picture, *ints[:4], [size, size], F.InterpolationMode.BICUBIC, antialias=True)
            if ints[4] or ints[5]:
                view = F.crop(view, ints[4], ints[5], size, size)
            view = F.horizontal_flip(view) if ints[6] else view
            for operation in ints[7:11]:
                view = adjust[operation](view, floats[operation]) if operation >= 0 else view
            if floats[4]:
                view = F.gaussian_blur(view, [13, 13], [floats[4]] * 2)
            view = F.solarize(view, 128) if ints[12] else view
            out[v, n] = F.normalize(view.float() / 255, list(mean), list(std)).to(dtype)
    return out
