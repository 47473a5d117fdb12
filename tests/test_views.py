"""Views: the right operations against torchvision's, the right probabilities, one seed one view."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from bossnas import views
from bossnas.errors import ConfigError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201))


def rng(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(seed)))


def photo(width: int, height: int) -> Image.Image:
    """A smooth coloured picture with some noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 7 + y / 11), np.cos(x / 5), np.sin(y / 9 + 1)], -1)
    return Image.fromarray((127 + 100 * waves + rng(0).integers(-20, 20, waves.shape)).astype(np.uint8))


def looks(augmentation: int, count: int = 4000, width: int = 640, height: int = 480) -> list[views.Look]:
    generator = rng(augmentation)
    return [views.draw_look(width, height, augmentation, generator) for _ in range(count)]


def near(share: float, expected: float, count: int) -> bool:
    """Within five standard errors of the expected probability (exact where it is 0 or 1)."""
    return abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize(("augmentation", "blur", "solarise"), [(0, 0.1, 0.0), (1, 1.0, 0.2)])
def test_probabilities_of_both_augmentations(augmentation, blur, solarise):
    drawn = looks(augmentation)
    for attribute, expected in (("flip", 0.5), ("jitter", 0.8), ("grey", 0.2), ("solarise", solarise)):
        share = np.mean([bool(getattr(look, attribute)) for look in drawn])
        assert near(share, expected, len(drawn)), (attribute, share)
    assert near(np.mean([look.sigma is not None for look in drawn]), blur, len(drawn))
    sigmas = [look.sigma for look in drawn if look.sigma is not None]
    assert 0.1 <= min(sigmas) < 0.2 and 1.9 < max(sigmas) <= 2.0 and abs(np.mean(sigmas) - 1.05) < 0.15


def test_colour_jitter_factors_and_order():
    drawn = [look.jitter for look in looks(0) if look.jitter]
    every = set(itertools.permutations(range(4)))
    assert all(sorted(which for which, _ in jitter) == [0, 1, 2, 3] for jitter in drawn)
    assert {tuple(which for which, _ in jitter) for jitter in drawn} == every
    for which, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        factors = np.array([dict(jitter)[which] for jitter in drawn])
        span = high - low
        assert low <= factors.min() < low + 0.01 * span and high - 0.01 * span < factors.max() <= high
        assert abs(factors.mean() - (low + high) / 2) < 0.03 * span


@pytest.mark.parametrize(("width", "height"), [(640, 480), (32, 32), (300, 40), (9, 200)])
def test_crops_are_distributed_as_torchvisions(width, height):
    count, generator = 3000, rng(1)
    ours = np.array([views.draw_box(width, height, generator.random((10, 4))) for _ in range(count)], float)
    image, scale, ratio = torch.empty(3, height, width), [0.08, 1.0], [3 / 4, 4 / 3]
    torch.manual_seed(0)
    theirs = [T.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)]
    theirs = np.array(theirs, float)
    log_ratios = [np.log(boxes[:, 3] / boxes[:, 2]) for boxes in (ours, theirs)]
    error = math.sqrt(sum(ratios.var() / count for ratios in log_ratios))
    assert abs(log_ratios[0].mean() - log_ratios[1].mean()) <= 4 * error
    for side in (0, 1):
        assert (ours[:, side] >= 0).all()
        assert (ours[:, side] + ours[:, 2 + side] <= (height, width)[side]).all()
    for a, b in zip(ours.T, theirs.T, strict=True):  # Kolmogorov-Smirnov, p about 1e-4
        grid = np.unique(np.concatenate([a, b]))
        ranks = [np.searchsorted(np.sort(values), grid, "right") for values in (a, b)]
        assert np.abs(ranks[0] - ranks[1]).max() / count < 2.2 * math.sqrt(2 / count)


@pytest.mark.parametrize("size", [32, 224])
def test_view_equals_torchvisions_transforms_at_the_same_parameters(size):
    image = photo(320, 240)
    for look in looks(1, 12, 320, 240) + looks(0, 12, 320, 240):
        jitter = dict(look.jitter)
        expected = F.resized_crop(image, *look.box, [size, size], InterpolationMode.BICUBIC)
        expected = T.RandomHorizontalFlip(float(look.flip))(expected)
        for which, _ in look.jitter:  # torchvision's own transform, pinned to one factor
            name = ("brightness", "contrast", "saturation", "hue")[which]
            expected = T.ColorJitter(**{name: (jitter[which], jitter[which])})(expected)
        expected = T.RandomGrayscale(float(look.grey))(expected)
        if look.sigma is not None:  # the method's blur is Pillow's
            expected = expected.filter(ImageFilter.GaussianBlur(radius=look.sigma))
        if look.solarise:
            pixels = np.asarray(expected)
            expected = Image.fromarray(np.where(pixels < 128, pixels, 255 - pixels))
        view = views.apply_look(image, look, size)
        assert np.array_equal(np.asarray(view), np.asarray(expected))
        reference = T.Normalize(*IMAGENET)(T.ToTensor()(expected))
        torch.testing.assert_close(views.normalise(view, "imagenet"), reference, rtol=0, atol=2e-6)


def test_crop_is_antialiased_and_keeps_to_its_box():
    image = Image.new("RGB", (200, 100), (255, 0, 0))
    image.paste(Image.fromarray(np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255), (100, 20))
    look = views.Look(views.Box(20, 100, 64, 64), False, (), False, None, False)
    view = np.asarray(views.apply_look(image, look, 8), float)
    assert np.abs(view - 127.5).max() < 6  # a checkerboard becomes grey; no red comes in over the edge


def test_augmentations_a_and_b_differ():
    image, recipe = Image.effect_noise((64, 64), 80).convert("RGB"), views.recipe("imagenet", 64)

    def sharpness(view: int) -> float:
        made = torch.stack([recipe.make(image, view, 4, rng(7, i)) for i in range(60)])
        return (made[..., 1:] - made[..., :-1]).abs().mean().item()
    a, b = [sharpness(view) for view in range(4)], [sharpness(view) for view in range(4, 8)]
    assert a == [a[0]] * 4 and b == [b[0]] * 4  # one augmentation within each half, at equal draws
    assert b[0] < 0.7 * a[0]


@pytest.mark.parametrize(("name", "size"), [("imagenet", 48), ("cifar", 32)])
def test_a_view_depends_on_its_seed_alone(name, size):
    image, recipe = photo(80, 60), views.recipe(name, size)
    first = recipe.make(image, 1, 1, rng(1, 2, 3))
    for generator in (np.random.seed, torch.manual_seed, random.seed):
        generator(99)
    state = torch.get_rng_state()
    again = recipe.make(image, 1, 1, rng(1, 2, 3))
    assert torch.equal(first, again) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, recipe.make(image, 1, 1, rng(1, 2, 4)))
    assert first.shape == (3, size, size) and first.dtype == torch.float32 and first.is_contiguous()


def test_cifar_views_are_the_crops_and_flips_of_the_padded_image():
    image, recipe = photo(32, 32), views.recipe("cifar", 32)
    padded = T.Normalize(*CIFAR)(T.ToTensor()(T.Pad(4)(image)))
    crops = torch.stack([(padded.flip(-1) if flip else padded)[:, top:top + 32, left:left + 32]
                         for flip in (False, True) for top in range(9) for left in range(9)])
    places = []
    for i in range(600):
        distance = (crops - recipe.make(image, i % 2, 1, rng(i))).abs().amax((1, 2, 3))
        assert (distance < 1e-5).sum() == 1
        places.append(int(distance.argmin()))
    assert len(set(places)) > 145  # of 162; 158 expected
    assert near(np.mean(np.array(places) >= 81), 0.5, 600)


def test_cifar_resizes_other_images_first():
    recipe = views.recipe("cifar", 16)
    small = photo(28, 28).resize((16, 16), Image.Resampling.BICUBIC)
    assert torch.equal(recipe.make(photo(28, 28), 0, 1, rng(5)), recipe.make(small, 0, 1, rng(5)))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (500, 2)])
def test_tiny_and_narrow_images_have_views(width, height):
    recipe = views.recipe("imagenet", 8)
    for i in range(20):
        view = recipe.make(Image.new("RGB", (width, height), (9, 99, 199)), i % 8, 4, rng(i))
        assert view.shape == (3, 8, 8) and torch.isfinite(view).all()


def test_wrong_use_is_refused():
    with pytest.raises(ConfigError, match="data.recipe: 'mnist' is unknown; choose one of imagenet, cifar"):
        views.recipe("mnist", 32)
    with pytest.raises(ConfigError, match="space.image_size"):
        views.recipe("cifar", 0)
    with pytest.raises(ValueError, match="expected 0..1"):
        views.recipe("cifar", 32).make(photo(32, 32), 2, 1, rng(0))
    with pytest.raises(ValueError, match="expected RGB"):
        views.recipe("cifar", 32).make(photo(32, 32).convert("L"), 0, 1, rng(0))
