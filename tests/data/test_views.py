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
from torchvision.transforms import InterpolationMode, functional as F

from bossnas.data import views
from bossnas.errors import ConfigError
from bossnas_kernels import crop_views

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def rng(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(seed)))


def photo(width: int, height: int) -> Image.Image:
    """A smooth coloured picture with some noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 7 + y / 11), np.cos(x / 5), np.sin(y / 9 + 1)], -1)
    return Image.fromarray((127 + 100 * waves + rng(0).integers(-20, 20, waves.shape)).astype(np.uint8))


def looks(augmentation: int, count: int = 4000, width: int = 640, height: int = 480) -> views.Looks:
    """Of one view of so many images: [1, count, ...]."""
    return views.recipe("imagenet", 32).draw(
        np.tile([height, width], (count, 1)), range(count), [augmentation], 1, seed=3, epoch=0
    )


def rows(drawn: views.Looks):
    """(ints, floats) of every view, as `reference` and `paint` take them."""
    return zip(drawn.ints.flatten(0, 1).tolist(), drawn.floats.flatten(0, 1).tolist(), strict=True)


def crop(image: Image.Image, ints: list[int], size: int) -> np.ndarray:
    out = np.full((1, size, size, 3), 77, np.uint8)
    views.crop(np.array(image), [ints[:7]], out)
    return out[0]


def off(a: Image.Image | np.ndarray, b: Image.Image | np.ndarray) -> float:
    """Mean difference, of 255."""
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).mean()


def near(share: float, expected: float, count: int) -> bool:
    """Within five standard errors of the expected probability (exact where it is 0 or 1)."""
    return abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize(("augmentation", "blur", "solarise"), [(0, 0.1, 0.0), (1, 1.0, 0.2)])
def test_probabilities_of_both_augmentations(augmentation, blur, solarise):
    ints, floats = (t[0].numpy() for t in looks(augmentation))
    for column, expected in ((views.FLIP, 0.5), (views.GREY, 0.2), (views.SOLARISE, solarise)):
        assert near(ints[:, column].mean(), expected, len(ints)), column
    assert near((ints[:, 7] >= 0).mean(), 0.8, len(ints))
    sigmas = floats[:, 4]
    assert near((sigmas > 0).mean(), blur, len(ints))
    sigmas = sigmas[sigmas > 0]
    assert 0.1 <= min(sigmas) < 0.2 and 1.9 < max(sigmas) <= 2.0 and abs(np.mean(sigmas) - 1.05) < 0.15


def test_colour_jitter_factors_and_order():
    ints, floats = (t[0].numpy() for t in looks(0))
    orders = ints[:, views.ORDER]
    assert {tuple(order) for order in orders} == {*itertools.permutations(range(4)), (-1, -1, -1, -1)}
    for which, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        factors, span = floats[:, which], high - low
        assert low <= factors.min() + 1e-6 and factors.min() < low + 0.01 * span
        assert high - 0.01 * span < factors.max() <= high + 1e-6
        assert abs(factors.mean() - (low + high) / 2) < 0.03 * span
    numbers = np.column_stack([floats, ints])
    still = numbers.std(0) == 0  # the shift of the crop
    assert still.sum() == 2 + (ints[:, views.SOLARISE].max() == 0)
    correlations = np.corrcoef(floats[:, :4].T)
    assert np.abs(correlations - np.eye(4)).max() < 0.07


@pytest.mark.parametrize(("width", "height"), [(640, 480), (32, 32), (300, 40), (9, 200)])
def test_crops_are_distributed_as_torchvisions(width, height):
    count = 3000
    ours = views.draw_boxes(np.tile([height, width], (count, 1)), rng(1).random((1, count, 10, 4)))[0]
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


@pytest.mark.quick
@pytest.mark.parametrize("size", [32, 224])
def test_the_reference_is_torchvisions_transforms_at_the_same_parameters(size):
    image = photo(320, 240)
    for ints, floats in [*rows(looks(1, 12, 320, 240)), *rows(looks(0, 12, 320, 240))]:
        expected = F.resized_crop(image, *ints[:4], [size, size], InterpolationMode.BICUBIC)
        expected = T.RandomHorizontalFlip(float(ints[views.FLIP]))(expected)
        for which in ints[views.ORDER]:  # torchvision's own transform, pinned to one factor
            if which >= 0:
                name = ("brightness", "contrast", "saturation", "hue")[which]
                expected = T.ColorJitter(**{name: (floats[which], floats[which])})(expected)
        expected = T.RandomGrayscale(float(ints[views.GREY]))(expected)
        if floats[4]:  # the method's blur is Pillow's
            expected = expected.filter(ImageFilter.GaussianBlur(radius=floats[4]))
        if ints[views.SOLARISE]:
            pixels = np.asarray(expected)
            expected = Image.fromarray(np.where(pixels < 128, pixels, 255 - pixels))
        assert np.array_equal(np.asarray(views.reference(image, ints, floats, size)), np.asarray(expected))
        normalised = views.normalise(torch.from_numpy(np.array(expected)), views.recipe("imagenet", size))
        torch.testing.assert_close(normalised, T.Normalize(*IMAGENET)(T.ToTensor()(expected)), rtol=0, atol=2e-6)


@pytest.mark.quick
@pytest.mark.parametrize("with_opencv", [True, False])
def test_painting_is_the_reference_within_its_tolerance(with_opencv, monkeypatch):
    if with_opencv:
        pytest.importorskip("cv2")
    else:
        monkeypatch.setattr(views, "cv2", None)
    image = photo(320, 240)
    differences = []
    for ints, floats in [*rows(looks(1, 40, 320, 240)), *rows(looks(0, 40, 320, 240))]:
        bare = [*ints[:7], -1, -1, -1, -1, 0, 0]
        cropped = np.asarray(views.reference(image, bare, [1, 1, 1, 0, 0], 96))
        differences.append(off(views.paint(cropped, ints, floats), views.reference(image, ints, floats, 96)))
    assert max(differences) <= (0.6 if with_opencv else 0) and np.mean(differences) <= 0.1


@pytest.mark.parametrize("which", range(4))
def test_each_colour_operation_of_painting_is_nearly_pillows(which):
    pytest.importorskip("cv2")
    picture = Image.fromarray(rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8))  # all colours
    for factor in (-0.1, -0.003, 0.05, 0.1) if which == 3 else (0.6, 0.93, 1.0, 1.4):
        ints, floats = [0, 0, 64, 64, 0, 0, 0, which, -1, -1, -1, 0, 0], [1, 1, 1, 0, 0]
        floats[which] = factor
        assert off(views.paint(np.array(picture), ints, floats), views.reference(picture, ints, floats, 64)) <= 0.05


def test_crop_is_antialiased_and_keeps_to_its_box():
    image = Image.new("RGB", (200, 100), (255, 0, 0))
    image.paste(Image.fromarray(np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255), (100, 20))
    view = crop(image, [20, 100, 64, 64, 0, 0, 0], 8).astype(float)
    assert np.abs(view - 127.5).max() < 6  # a checkerboard becomes grey; no red comes in over the edge


@pytest.mark.parametrize("with_opencv", [True, False])
def test_crops_are_the_references(with_opencv, monkeypatch):
    if not with_opencv:
        monkeypatch.setattr(views, "cv2", None)
    image = photo(320, 240)
    boxes = [ints[:7] for ints, _ in rows(looks(0, 30, 320, 240))]
    boxes += [
        [*box[:4], down, right, box[6]]
        for box, down, right in zip(boxes[:8], (1, -1, 3, -5, 0, 0, 47, -47), (0, 2, -4, -1, 7, -7, 0, 9), strict=True)
    ]
    drawn = views.Looks(torch.zeros(1, len(boxes), 13, dtype=torch.int32), torch.zeros(1, len(boxes), 5))
    drawn.ints[0, :, :7] = torch.tensor(boxes)
    pixels = torch.from_numpy(np.array(image)).flatten()
    kernels = crop_views(pixels, torch.tensor([[0, 240, 320]] * len(boxes)), drawn, 48)[0].numpy()
    for box, of_kernels in zip(boxes, kernels, strict=True):
        made = crop(image, box, 48)
        assert off(made, views.reference(image, [*box, -1, -1, -1, -1, 0, 0], [1, 1, 1, 0, 0], 48)) <= 0.05
        assert np.array_equal(made, of_kernels)


@pytest.mark.parametrize("name", ["imagenet", "cifar"])
def test_a_look_depends_on_seed_epoch_sample_and_view_alone(name):
    recipe, sizes = views.recipe(name, 32), np.array([[60, 80], [50, 90], [33, 21]])

    def draw(samples=(7, 2**40, 0), numbers=(0, 1, 2, 3), seed=1, epoch=2, of=slice(None)) -> torch.Tensor:
        drawn = recipe.draw(sizes[of], samples[of], numbers, 2, seed=seed, epoch=epoch)
        return torch.cat([drawn.ints.double(), drawn.floats.double()], -1)

    every = draw()
    for generator in (np.random.seed, torch.manual_seed, random.seed):
        generator(99)
    state = torch.get_rng_state()
    assert torch.equal(draw(), every) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draw(numbers=(3, 1)), every[[3, 1]])
    assert torch.equal(draw(of=slice(1, 3)), every[:, 1:])
    assert not torch.equal(draw(seed=2), every) and not torch.equal(draw(epoch=3), every)
    flat = recipe.draw(np.tile([32, 32], (500, 1)), range(500), range(4), 2, seed=0, epoch=0)
    assert len(torch.cat([flat.ints.double(), flat.floats.double()], -1).flatten(0, 1).unique(dim=0)) > (
        1990 if name == "imagenet" else 160
    )


def test_cifar_views_are_the_crops_and_flips_of_the_padded_image():
    image, recipe = photo(32, 32), views.recipe("cifar", 32)
    padded = T.Pad(4)(image)
    crops = {
        np.asarray(side.crop((left, top, left + 32, top + 32))).tobytes(): (flip, top, left)
        for flip, side in enumerate((padded, padded.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
        for top in range(9)
        for left in range(9)
    }
    drawn = recipe.draw(np.tile([32, 32], (600, 1)), range(600), [0], 1, seed=0, epoch=0)
    places = []
    for ints, floats in rows(drawn):
        made = crop(image, ints, 32)
        assert np.array_equal(made, np.asarray(views.reference(image, ints, floats, 32)))
        places.append(crops[made.tobytes()])
    assert len(set(places)) > 145  # of 162; 158 expected
    assert near(np.mean([flip for flip, *_ in places]), 0.5, 600)


def test_cifar_resizes_other_images_first():
    recipe = views.recipe("cifar", 16)
    small = photo(28, 28).resize((16, 16), Image.Resampling.BICUBIC)
    made = [
        crop(image, recipe.draw(np.array([image.size]), [5], [0], 1, seed=0, epoch=0).ints[0, 0].tolist(), 16)
        for image in (photo(28, 28), small)
    ]
    assert off(*made) <= 0.05


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (500, 2)])
def test_tiny_and_narrow_images_have_views(width, height):
    drawn = looks(1, 20, width, height)
    for ints, floats in rows(drawn):
        cropped = crop(Image.new("RGB", (width, height), (9, 99, 199)), ints, 8)
        assert (cropped == [9, 99, 199]).all() and views.paint(cropped, ints, floats).shape == (8, 8, 3)


def test_wrong_use_is_refused():
    with pytest.raises(ConfigError, match="data.recipe: 'mnist' is unknown; choose one of imagenet, cifar"):
        views.recipe("mnist", 32)
    with pytest.raises(ConfigError, match="space.image_size"):
        views.recipe("cifar", 0)
    with pytest.raises(ValueError, match="expected 0..1"):
        views.recipe("cifar", 32).draw(np.array([[32, 32]]), [0], [2], 1, seed=0, epoch=0)
