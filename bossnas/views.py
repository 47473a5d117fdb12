"""Augmented views of an image, one at a time on the CPU (METHOD §3.1).

All random parameters are drawn from a NumPy generator that the caller seeds, before and apart from the
pixel work, so that a view depends on nothing but its seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from bossnas.errors import ConfigError

CROP_AREA, CROP_RATIO, CROP_TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
FLIP_P, JITTER_P, GREY_P = 0.5, 0.8, 0.2
JITTER = np.array([0.4, 0.4, 0.2, 0.1])  # brightness, contrast, saturation, hue
BLUR_SIGMA = (0.1, 2.0)  # pixels, at any image size
BLUR_P, SOLARISE_P = (0.1, 1.0), (0.0, 0.2)  # of augmentations A and B
SOLARISE_AT = 128
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
STATISTICS = {  # mean and standard deviation by channel, of pixels in 0..1
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)),
}
SCALE_SHIFT = {name: (1 / (255 * torch.tensor(std)[:, None, None]),
                      -torch.tensor(mean)[:, None, None] / torch.tensor(std)[:, None, None])
               for name, (mean, std) in STATISTICS.items()}


class Box(NamedTuple):
    """A crop of the image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Look(NamedTuple):
    """Everything that is random in one ImageNet view."""

    box: Box
    flip: bool
    jitter: tuple[tuple[int, float], ...]  # (which of ADJUST, factor), in this order; may be empty
    grey: bool
    sigma: float | None  # of the Gaussian blur; None: no blur
    solarise: bool


@dataclass(frozen=True)
class Recipe:
    """How views are made: ``name`` "imagenet" or "cifar", and the side of the square view in pixels."""

    name: str
    image_size: int

    def make(self, image: Image.Image, view: int, view_pairs: int, rng: np.random.Generator) -> Tensor:
        """One normalised view [3, S, S] (float32) of an RGB image.

        Views 0..J-1 follow augmentation A, views J..2J-1 augmentation B, J = ``view_pairs``; "cifar" has
        only one augmentation. Raises ValueError for another view or an image that is not RGB.
        """
        if not 0 <= view < 2 * view_pairs:
            raise ValueError(f"view {view} of {view_pairs} pairs: expected 0..{2 * view_pairs - 1}")
        if image.mode != "RGB":
            raise ValueError(f"image mode {image.mode}: expected RGB")
        if self.name == "cifar":
            picture = _cifar_view(image, self.image_size, rng)
        else:
            look = draw_look(image.width, image.height, int(view >= view_pairs), rng)
            picture = apply_look(image, look, self.image_size)
        return normalise(picture, self.name)


def recipe(name: str, image_size: int) -> Recipe:
    """The named recipe. Raises ConfigError for an unknown name or an impossible size."""
    if name not in STATISTICS:
        raise ConfigError("data.recipe", f"{name!r} is unknown", f"choose one of {', '.join(STATISTICS)}")
    if image_size < 1:
        raise ConfigError("space.image_size", f"{image_size} is too small", "use 1 or more")
    return Recipe(name, image_size)


def draw_look(width: int, height: int, augmentation: int, rng: np.random.Generator) -> Look:
    """Draws an ImageNet view's parameters; ``augmentation``: 0 = A, 1 = B. Every draw is always made."""
    box = draw_box(width, height, rng.random((CROP_TRIES, 4)))
    flip, jitter, grey, blur, solarise = rng.random(5)
    factors = [1, 1, 1, 0] + JITTER * rng.uniform(-1, 1, 4)  # hue is an offset in turns
    order = rng.permutation(4)
    sigma = rng.uniform(*BLUR_SIGMA)
    return Look(box=box, flip=bool(flip < FLIP_P), grey=bool(grey < GREY_P),
                jitter=tuple((int(k), float(factors[k])) for k in order) if jitter < JITTER_P else (),
                sigma=float(sigma) if blur < BLUR_P[augmentation] else None,
                solarise=bool(solarise < SOLARISE_P[augmentation]))


def draw_box(width: int, height: int, tries: np.ndarray) -> Box:
    """Random resized crop: the first of ``tries`` (uniform numbers [n, 4]) that fits, else a central crop."""
    low, high = np.log(CROP_RATIO)
    for area, ratio, down, right in tries:
        area = width * height * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * area)
        ratio = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(down * (height - h + 1)), int(right * (width - w + 1)), h, w)
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def apply_look(image: Image.Image, look: Look, size: int) -> Image.Image:
    """The view (size x size, not yet normalised) that a Look describes."""
    image = F.resized_crop(image, *look.box, [size, size], InterpolationMode.BICUBIC)  # Pillow: antialiased
    if look.flip:
        image = F.hflip(image)
    for which, factor in look.jitter:
        image = ADJUST[which](image, factor)
    if look.grey:
        image = F.rgb_to_grayscale(image, 3)
    if look.sigma is not None:
        image = image.filter(ImageFilter.GaussianBlur(look.sigma))
    return ImageOps.solarize(image, SOLARISE_AT) if look.solarise else image


def _cifar_view(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Crop from the image (resized to ``size`` first) with a black border of size/8 (4 at 32), and flip."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pad = max(1, size // 8)
    down, right, flip = rng.random(3)
    top, left = int(down * (2 * pad + 1)) - pad, int(right * (2 * pad + 1)) - pad
    image = image.crop((left, top, left + size, top + size))  # Pillow fills the outside with black
    return F.hflip(image) if flip < FLIP_P else image


def normalise(image: Image.Image, name: str) -> Tensor:
    """(pixel / 255 - mean) / std of an RGB image with the named STATISTICS, as float32 [3, H, W]."""
    pixels_HWC = torch.from_numpy(np.array(image))
    scale, shift = SCALE_SHIFT[name]
    return torch.mul(pixels_HWC.permute(2, 0, 1).contiguous(), scale).add_(shift)
