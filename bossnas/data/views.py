"""Augmented views of images (METHOD 3.1): what is random about them, and how the CPU makes them.

All random parameters of a view (its look) are drawn beforehand, in `Recipe.draw`, from (seed, epoch, sample, view) and
nothing else. `reference` says by Pillow's and torchvision's operations what view a look describes; `paint`
makes it with OpenCV, several times faster; `bossnas_kernels.augment_views` makes the views of a whole batch on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional as F

from bossnas.config.shared import MEAN, STD
from bossnas.errors import ConfigError
from bossnas_kernels import Looks, augment_reference, augment_views, finish_views
from bossnas_kernels.looks import BOX, BRIGHTNESS, CONTRAST, FLIP, GREY, HUE, ORDER, SATURATION, SIGMA, SOLARISE

try:
    import cv2
except ImportError:  # no wheel for this platform: Pillow makes the views, more slowly
    cv2 = None  # type: ignore[assignment]  # mypy knows no module that may be missing

CROP_AREA, CROP_RATIO, CROP_TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
FLIP_P, JITTER_P, GREY_P = 0.5, 0.8, 0.2
JITTER = np.array([0.4, 0.4, 0.2, 0.1])  # brightness, contrast, saturation, hue
BLUR_SIGMA = (0.1, 2.0)  # pixels, at any image size
BLUR_P, SOLARISE_P = np.array([0.1, 1.0]), np.array([0.0, 0.2])  # of augmentations A and B
SOLARISE_AT = 128
ONE_FILTER = 1.05  # sigma from which one filter stands for Pillow's three: what they round in between is small then
DRAWS = {"imagenet": 56, "cifar": 4}  # uniform numbers set aside for a view: a multiple of the generator's 4
MAX_VIEWS = 256  # of a sample

SHIFT = slice(4, 6)  # columns of Looks.ints: down, right
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


@dataclass(frozen=True)
class Recipe:
    """How views are made: ``name`` "imagenet" or "cifar", and the side of the square view in pixels."""

    name: str
    image_size: int

    @property
    def mean(self) -> tuple[float, float, float]:
        return MEAN[self.name]

    @property
    def std(self) -> tuple[float, float, float]:
        return STD[self.name]

    def draw(
        self, sizes: np.ndarray, samples: Sequence[int], views: Sequence[int], view_pairs: int, *, seed: int, epoch: int
    ) -> Looks:
        """The looks of V views of N images, [V, N, ...] on the CPU.

        sizes: [N, 2], height and width of the images. samples: their numbers. views: numbers below 2J, J =
        ``view_pairs``: 0..J-1 follow augmentation A, J..2J-1 augmentation B ("cifar" has only one). The look of a
        view depends on seed, epoch, sample, view and the image's size alone. ValueError for another view.
        """
        if not all(0 <= view < min(2 * view_pairs, MAX_VIEWS) for view in views):
            raise ValueError(f"views {list(views)} of {view_pairs} pairs: expected 0..{2 * view_pairs - 1}")
        u = _uniform(seed, epoch, samples, views, DRAWS[self.name])
        augmentations = (np.asarray(views) >= view_pairs).astype(int)
        if self.name == "cifar":
            return _draw_cifar(u, np.asarray(sizes), self.image_size)
        return _draw_imagenet(u, np.asarray(sizes), augmentations)


@dataclass(frozen=True)
class Views:
    """Which views are made of every image: those numbered ``ids``, of ``pairs`` pairs (see `Recipe.draw`)."""

    recipe: Recipe
    ids: tuple[int, ...]
    pairs: int


def recipe(name: str, image_size: int) -> Recipe:
    """The named recipe. Raises ConfigError for an unknown name or an impossible size."""
    if name not in MEAN:
        raise ConfigError("data.recipe", f"{name!r} is unknown", f"choose one of {', '.join(MEAN)}")
    if image_size < 1:
        raise ConfigError("space.image_size", f"{image_size} is too small", "use 1 or more")
    return Recipe(name, image_size)


def _uniform(seed: int, epoch: int, samples: Sequence[int], views: Sequence[int], draws: int) -> np.ndarray:
    """[V, N, draws] in [0, 1). A counter-based generator goes to each sample's place in one sequence: setting up a
    generator for every view would cost more than decoding a small image."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    generator, at, each = np.random.Generator(bits), 0, draws // 4  # four numbers for every step of the counter
    numbers = np.empty((len(samples), max(views) + 1, draws))
    for row, sample in zip(numbers, samples, strict=True):
        # room for MAX_VIEWS views of every sample: what a view draws does not depend on the other views asked for
        place = int(sample) * MAX_VIEWS * each
        bits.advance((place - at) % 2**256)
        generator.random(out=row)
        at = place + row.size // 4
    return numbers[:, list(views)].swapaxes(0, 1)


def _draw_imagenet(u: np.ndarray, sizes: np.ndarray, augmentations: np.ndarray) -> Looks:
    """Looks of [V, N, 56] uniform numbers. Every number has its use, whatever the others are."""
    views, images, _ = u.shape
    ints, floats = np.zeros((views, images, 13), np.int32), np.zeros((views, images, 5), np.float32)
    ints[..., BOX] = draw_boxes(sizes, u[..., : 4 * CROP_TRIES].reshape(views, images, CROP_TRIES, 4))
    flip, jitter, grey, blur, solarise = np.moveaxis(u[..., 40:45], -1, 0)
    of_view = augmentations[:, None]
    ints[..., FLIP], ints[..., GREY] = flip < FLIP_P, grey < GREY_P
    ints[..., SOLARISE] = solarise < SOLARISE_P[of_view]
    ints[..., ORDER] = np.where((jitter < JITTER_P)[..., None], np.argsort(u[..., 45:49], -1), -1)
    floats[..., :4] = [1, 1, 1, 0] + JITTER * (2 * u[..., 49:53] - 1)  # hue is an offset in turns
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * u[..., 53]
    floats[..., SIGMA] = np.where(blur < BLUR_P[of_view], sigma, 0)
    return Looks(torch.from_numpy(ints), torch.from_numpy(floats))


def draw_boxes(sizes: np.ndarray, tries: np.ndarray) -> np.ndarray:
    """Random resized crops [V, N, 4] (top, left, height, width) of images of ``sizes`` [N, 2]: the first of ``tries``
    (uniform numbers [V, N, n, 4]) that fits, else a central crop."""
    high, wide = (side[:, None] for side in sizes.T)
    area = high * wide * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * tries[..., 0])
    low, top = np.log(CROP_RATIO)
    ratio = np.exp(low + (top - low) * tries[..., 1])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= wide) & (h > 0) & (h <= high)
    y, x = np.floor(tries[..., 2] * (high - h + 1)), np.floor(tries[..., 3] * (wide - w + 1))
    first = fits.argmax(-1)[..., None, None]
    chosen = np.take_along_axis(np.stack([y, x, h, w], -1), first, -2)[..., 0, :]
    high, wide = sizes.T
    w = np.minimum(wide, np.maximum(1, np.rint(high * CROP_RATIO[1])))
    h = np.minimum(high, np.maximum(1, np.rint(wide / CROP_RATIO[0])))
    central = np.stack([(high - h) // 2, (wide - w) // 2, h, w], -1)
    return np.where(fits.any(-1)[..., None], chosen, central)


def _draw_cifar(u: np.ndarray, sizes: np.ndarray, size: int) -> Looks:
    """A crop from the whole image (resized to ``size``) with a black border of size/8 (4 at 32), and a flip."""
    ints, floats = np.zeros((*u.shape[:2], 13), np.int32), np.zeros((*u.shape[:2], 5), np.float32)
    pad = max(1, size // 8)
    ints[..., 2:4] = sizes
    ints[..., SHIFT] = np.floor(u[..., :2] * (2 * pad + 1)) - pad
    ints[..., FLIP] = u[..., 2] < FLIP_P
    ints[..., ORDER] = -1
    return Looks(torch.from_numpy(ints), torch.from_numpy(floats))


def reference(image: Image.Image, ints: Sequence[int], floats: Sequence[float], size: int) -> Image.Image:
    """The view (size x size, not normalised) of an RGB image that one look, a row of Looks, describes."""
    view = F.resized_crop(image, *ints[BOX], [size, size], InterpolationMode.BICUBIC)  # Pillow: antialiased
    down, right = ints[SHIFT]
    view = view.crop((right, down, right + size, down + size))  # Pillow fills the outside with black
    if ints[FLIP]:
        view = F.hflip(view)
    for which in ints[ORDER]:
        if which >= 0:
            view = ADJUST[which](view, floats[which])
    if ints[GREY]:
        view = F.rgb_to_grayscale(view, 3)
    if floats[SIGMA]:
        view = view.filter(ImageFilter.GaussianBlur(floats[SIGMA]))
    return ImageOps.solarize(view, SOLARISE_AT) if ints[SOLARISE] else view


def crop(picture: np.ndarray, places: Sequence[Sequence[int]], out: np.ndarray) -> None:
    """The crops of a picture (uint8 [H, W, 3]) for V views, written to ``out``, uint8 [V, S, S, 3].

    places: by view the first seven columns of Looks.ints: box, shift and flip. The same crops as
    `bossnas_kernels.crop_views`, one picture at a time.
    """
    size = out.shape[1]
    for (top, left, high, wide, down, right, flip), view in zip(places, out, strict=True):
        part = picture[top : top + high, left : left + wide]
        if part.shape[:2] != (size, size):
            part = augment_reference.resize_nearly(torch.from_numpy(part), size).numpy()
        if down or right:
            seen = part[max(down, 0) : size + min(down, 0), max(right, 0) : size + min(right, 0)]
            part = np.zeros_like(view)
            part[max(-down, 0) :, max(-right, 0) :][: seen.shape[0], : seen.shape[1]] = seen
        if flip:
            part = part[:, ::-1] if cv2 is None else cv2.flip(part, 1)
        view[:] = part


def augment(pixels: Tensor, table: Tensor, looks: Looks, recipe: Recipe) -> Tensor:
    """All views of a batch on the device of ``pixels`` (see bossnas_kernels.augment_views): [V, N, 3, S, S]."""
    return augment_views(pixels, table, looks, recipe.image_size, recipe.mean, recipe.std)


def finish(crops: Tensor, looks: Looks, recipe: Recipe) -> Tensor:
    """What follows the crops (see bossnas_kernels.finish_views): uint8 [V, N, S, S, 3] -> [V, N, 3, S, S]."""
    return finish_views(crops, looks, recipe.mean, recipe.std)


def normalise(pictures: Tensor, recipe: Recipe) -> Tensor:
    """(pixel / 255 - mean) / std of views: uint8 [..., S, S, 3] -> float32 [..., 3, S, S], every view channels_last."""
    scale, shift = augment_reference.normalisation(recipe.mean, recipe.std)
    pixels = pictures.to(torch.float32).mul_(torch.tensor(scale, device=pictures.device))
    return pixels.add_(torch.tensor(shift, device=pictures.device)).movedim(-1, -3)


def paint(crop: np.ndarray, ints: Sequence[int], floats: Sequence[float]) -> np.ndarray:
    """All that follows the crop (and flip) in `reference`: uint8 [S, S, 3] -> the same. Some pixels differ by a level
    or two from Pillow's; a view by 0.1 of 255 in the mean, at most by 0.6."""
    if cv2 is None:
        rest = [0, 0, *crop.shape[:2], 0, 0, 0, *ints[7:]]
        return np.asarray(reference(Image.fromarray(crop), rest, floats, len(crop)))
    for which in ints[ORDER]:
        if which == BRIGHTNESS:
            crop = cv2.LUT(crop, _blend(0, floats[which]))
        elif which == CONTRAST:
            crop = cv2.LUT(crop, _blend(int(cv2.mean(_grey(crop))[0] + 0.5), floats[which]))
        elif which == SATURATION:
            grey = cv2.cvtColor(_grey(crop), cv2.COLOR_GRAY2RGB)
            # Pillow cuts off, OpenCV rounds: just below a half less
            crop = cv2.addWeighted(crop, floats[which], grey, 1 - floats[which], -0.499)
        elif which == HUE:
            crop = _turn_hue(crop, floats[which])
    if ints[GREY]:
        crop = cv2.cvtColor(_grey(crop), cv2.COLOR_GRAY2RGB)
    if floats[SIGMA]:
        crop = _blur(crop, floats[SIGMA])
    return np.where(crop < SOLARISE_AT, crop, 255 - crop) if ints[SOLARISE] else crop


def one_thread() -> None:
    """Keeps OpenCV to the calling thread: loader processes are the threads."""
    if cv2 is not None:
        cv2.setNumThreads(0)


def _grey(picture: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)


def _blend(other: int, factor: float) -> np.ndarray:
    """Pillow's blend of a grey level with every level, [256]: cut off, not rounded."""
    return np.clip(other + np.float32(factor) * (np.arange(256, dtype=np.float32) - other), 0, 255).astype(np.uint8)


def _turn_hue(picture: np.ndarray, turns: float) -> np.ndarray:
    """torchvision's adjust_hue for Pillow images: hue and saturation have 8 bits, cut off."""
    rows = (picture.shape[0], -1)  # whole rows at once: NumPy is slow along a last dimension of 3
    hsv = cv2.cvtColor(picture.astype(np.float32), cv2.COLOR_RGB2HSV)  # 0..360, 0..1, 0..255
    scaled, width = hsv.reshape(rows), picture.shape[1]
    scaled *= _row(width, 255 / 360, 255, 1)
    # 1e-3: an exact level stays one in spite of rounding. Hues from 256 on start again at 0.
    scaled += _row(width, int(turns * 255) % 256 + 1e-3, 1e-3, 1e-3)
    levels = scaled.astype(np.int16).astype(np.uint8)
    np.multiply(levels, _row(width, 360 / 255, 1 / 255, 1), out=scaled)
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


@lru_cache(maxsize=256)
def _row(width: int, *of_pixel: float) -> np.ndarray:
    """The three numbers once for every pixel of a row."""
    return np.tile(np.array(of_pixel, np.float32), width)


def _blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Pillow's Gaussian blur: three box blurs of fractional radius in each direction, 8 bits after each. The radius is
    that of `augment_reference.blur_boxes`, in plain numbers, since views come one at a time here."""
    variance = sigma * sigma / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.array([part, *[1] * (2 * whole + 1), part], np.float32) / np.float32(2 * (whole + part) + 1)
    if sigma > ONE_FILTER:
        taps = np.convolve(np.convolve(box, box), box)
        return cv2.sepFilter2D(picture, -1, taps, taps, borderType=cv2.BORDER_REPLICATE)
    for kernel in 3 * [box[None]] + 3 * [box[:, None]]:
        picture = cv2.filter2D(picture, -1, kernel, borderType=cv2.BORDER_REPLICATE)
    return picture
