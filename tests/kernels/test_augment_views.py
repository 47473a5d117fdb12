"""augment_views, kernels and reference, against Pillow by torchvision's functions: crops, colours, blur, all of it."""

from __future__ import annotations

import itertools

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode, functional as F

import bossnas_kernels
from bossnas_kernels import Looks, augment_colours, augment_crops, augment_reference, common

CROPS = {"kernel": augment_crops.crop_views, "reference": augment_reference.crop_views}
FINISH = {"kernel": augment_colours.finish_views, "reference": augment_reference.finish_views}
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
PLAIN = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # a normalisation that gives the levels back
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# PyTorch's resize, on a CPU, has weights of 16 bits: a pixel in a hundred is a level off.
CROP_TOLERANCE = 0.05
OLD_PILLOW = int(PIL.__version__.split(".")[0]) < 13
exact_pillow = pytest.mark.skipif(OLD_PILLOW, reason="before Pillow 13 tall pictures were resized along rows first")


@pytest.fixture(autouse=True)
def auto():
    yield
    bossnas_kernels.use("auto")


@pytest.fixture(params=list(CROPS))
def name(request):
    return request.param


def picture(height, width, seed=0):
    """Waves, edges and grain in colour, with black, white and grey corners: uint8 [height, width, 3]."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width][..., None] / 20
    waves = np.sin(y * draw.uniform(0.2, 2, 3) + x * draw.uniform(0.2, 2, 3) + draw.uniform(0, 6, 3))
    levels = 128 + 90 * waves + 60 * ((x + 2 * y) % 3 < 1) * draw.uniform(-1, 1, 3) + draw.normal(0, 12, waves.shape)
    levels[: height // 5, : width // 5], levels[-height // 6 :, -width // 6 :] = 0, 255
    levels[: height // 6, -width // 6 :] = levels[: height // 6, -width // 6 :, :1]
    return np.clip(levels, 0, 255).astype(np.uint8)


def pack(pictures, device, gap=0):
    """pixels and table of pictures, with so many bytes of something else before each."""
    table, parts, offset = [], [], 0
    for array in pictures:
        parts += [np.full(gap, 77, np.uint8), array.ravel()]
        table.append([offset + gap, *array.shape[:2]])
        offset += gap + array.size
    return torch.from_numpy(np.concatenate(parts)).to(device), torch.tensor(table)


def looks(views, sizes, seed=0, **fixed):
    """Random looks of pictures of ``sizes``; every order, flag and blur comes up. fixed: columns of ints, by name."""
    draw = np.random.default_rng(seed)
    images = len(sizes)
    ints, floats = np.zeros((views, images, 13), np.int32), np.ones((views, images, 5), np.float32)
    for v, n in itertools.product(range(views), range(images)):
        height, width = sizes[n]
        h, w = draw.integers(1, height + 1), draw.integers(1, width + 1)
        ints[v, n, :4] = draw.integers(0, height - h + 1), draw.integers(0, width - w + 1), h, w
        ints[v, n, 6] = draw.integers(2)
        ints[v, n, 7:11] = np.where(draw.random(4) < 0.85, draw.permutation(4), -1)
        ints[v, n, 11:] = draw.random(2) < 0.3
        floats[v, n, :3] = draw.uniform(0, 2, 3)
        floats[v, n, 3:] = draw.uniform(-0.5, 0.5), draw.choice([0, draw.uniform(0.1, 2.4)])
    return Looks(torch.from_numpy(ints), torch.from_numpy(floats))


def crop_only(given):
    ints, floats = given.ints.clone(), given.floats.clone()
    ints[..., 7:11], ints[..., 11:], floats[..., 4] = -1, 0, 0
    return Looks(ints, floats)


def no_looks(views, images):
    return crop_only(Looks(torch.zeros(views, images, 13, dtype=torch.int32), torch.ones(views, images, 5)))


def pillow_crop(array, ints, size):
    top, left, height, width, down, right, flip = (int(i) for i in ints[:7])
    view = F.resized_crop(Image.fromarray(array), top, left, height, width, [size, size], InterpolationMode.BICUBIC)
    view = view.crop((right, down, right + size, down + size))
    return np.asarray(F.hflip(view) if flip else view)


def pillow_finish(array, ints, floats):
    view = Image.fromarray(array)
    for operation in ints[7:11].tolist():
        if operation >= 0:
            view = ADJUST[operation](view, float(floats[operation]))
    if ints[11]:
        view = F.rgb_to_grayscale(view, 3)
    if floats[4] > 0:
        view = view.filter(ImageFilter.GaussianBlur(float(floats[4])))
    return np.asarray(ImageOps.solarize(view, 128) if ints[12] else view)


def levels(view):
    """[3, S, S], not normalised -> [S, S, 3], whole numbers."""
    return view.permute(1, 2, 0).cpu().numpy()


def check_finish(name, crops, given):
    """Equal to Pillow's to the bit, without a tolerance."""
    got = FINISH[name](crops, given, *PLAIN)
    for v, n in itertools.product(*(range(k) for k in got.shape[:2])):
        want = pillow_finish(crops[v, n].cpu().numpy(), given.ints[v, n], given.floats[v, n])
        # (p / 255) / (1 / 255) is rounded
        np.testing.assert_array_equal(
            np.rint(levels(got[v, n])), want, err_msg=f"{given.ints[v, n]} {given.floats[v, n]}"
        )
        assert np.abs(levels(got[v, n]) - want).max() < 1e-3


SIZES = [
    (1, 40),
    (40, 1),
    (1, 1),
    (3, 2),
    (24, 24),
    (24, 50),
    (23, 24),
    (25, 23),
    (40, 37),
    (60, 30),
    (61, 43),
    (90, 61),
    (150, 90),
    (97, 150),
    (400, 20),
    (20, 400),
]


@exact_pillow
@pytest.mark.parametrize("size", [7, 24, 33])
def test_the_slow_resize_is_pillows(size):
    for i, (height, width) in enumerate(SIZES):
        array = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        want = np.asarray(Image.fromarray(array).resize((size, size), Image.Resampling.BICUBIC))
        got = augment_reference.resize_exactly(torch.from_numpy(array), size)
        np.testing.assert_array_equal(got.numpy(), want, err_msg=f"{height}x{width}")


@exact_pillow
def test_the_fast_resize_is_near_pillows_in_every_picture():
    for i, (height, width) in enumerate([*SIZES, (375, 500), (500, 375), (480, 330)]):
        array = picture(height, width, i)
        want = np.asarray(Image.fromarray(array).resize((64, 64), Image.Resampling.BICUBIC))
        got = augment_reference.resize_nearly(torch.from_numpy(array), 64).numpy()
        assert np.abs(got.astype(int) - want).mean() <= CROP_TOLERANCE, f"{height}x{width}"


@exact_pillow
@pytest.mark.parametrize("size", [7, 33])
def test_crops(device, name, size):
    arrays = [picture(*hw, seed) for seed, hw in enumerate([(45, 60), (61, 40), (1, 30), (90, 33), (20, 20)])]
    pixels, table = pack(arrays, device, gap=5)
    given = looks(2, table[:, 1:].tolist(), seed=size)
    given.ints[0, :, :4] = torch.stack([torch.zeros(5), torch.zeros(5), *table[:, 1:].T], 1)  # the whole picture
    shifts = [(2, 0), (-1, 3), (size - 1, 0), (-size, 1), (size + 5, -size - 9)]
    given.ints[1, :, 4:6] = torch.tensor(shifts, dtype=torch.int32)
    got = CROPS[name](pixels, table, given, size).cpu().numpy()
    assert got.dtype == np.uint8 and got.shape == (2, 5, size, size, 3)
    for v, n in itertools.product(range(2), range(5)):
        want = pillow_crop(arrays[n], given.ints[v, n], size)
        if name == "kernel" or device.type != "cpu":
            np.testing.assert_array_equal(got[v, n], want, err_msg=f"{given.ints[v, n]}")
        else:
            assert np.abs(got[v, n].astype(int) - want).mean() <= CROP_TOLERANCE


@pytest.mark.quick
def test_a_crop_of_the_views_size_is_only_copied(device, name):
    arrays = [picture(16, 16, seed) for seed in range(3)]
    pixels, table = pack(arrays, device)
    given = no_looks(1, 3)
    given.ints[..., 2:4] = 16
    np.testing.assert_array_equal(CROPS[name](pixels, table, given, 16)[0].cpu().numpy(), np.stack(arrays))


def test_colours_of_the_whole_cube():
    """Every third level of each channel with every other; odd ones in the kernel's test and in the random views."""
    axis = np.arange(0, 256, 3, dtype=np.uint8)
    cube = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    side = int(np.ceil(len(cube) ** 0.5))
    square = np.resize(cube, (side, side, 3))
    given = no_looks(5, 1)
    for v, (operation, factor) in enumerate([(3, 0.1), (3, -0.5), (2, 1.7), (1, 0.3), (0, 1.3)]):
        given.ints[v, 0, 7], given.floats[v, 0, operation] = operation, factor
    check_finish("reference", torch.from_numpy(square).expand(5, 1, side, side, 3), given)


@pytest.mark.parametrize("operation", range(4))
def test_one_colour_operation(device, name, operation):
    extremes = [0.0, 1.0, 2.0, 0.6, 1.4, 1e-3] if operation < 3 else [0.0, 0.5, -0.5, 0.1, -0.1, 1 / 255]
    crops = torch.from_numpy(np.stack([picture(33, 33, seed) for seed in range(6)]))[None].to(device)
    given = no_looks(1, 6)
    given.ints[0, :, 7 + operation], given.floats[0, :, operation] = operation, torch.tensor(extremes)
    check_finish(name, crops, given)


@pytest.mark.parametrize("level", [0, 1, 127, 128, 255])
def test_one_level_everywhere(device, name, level):
    """No hue, no contrast; blur keeps it; solarisation turns it over from 128 on."""
    given = looks(3, [(9, 9)], seed=level)
    given.ints[..., 12] = 1
    check_finish(name, torch.full((3, 1, 9, 9, 3), level, dtype=torch.uint8, device=device), given)


@pytest.mark.parametrize("size", [1, 2, 5, 33])
def test_blur(device, name, size):
    sigmas = torch.tensor([0.1, 0.36, 0.7, 1.0, 1.41, 1.42, 1.9, 2.4])  # 1: many sums are halves
    crops = torch.from_numpy(np.random.default_rng(size).integers(0, 256, (8, 1, size, size, 3), dtype=np.uint8))
    crops[::2] = torch.from_numpy(picture(size, size))
    given = no_looks(8, 1)
    given.floats[:, 0, 4] = sigmas
    check_finish(name, crops.to(device), given)


@pytest.mark.parametrize("size, images", [(7, 5), (33, 4), (40, 9)])
def test_finished_views(device, name, size, images):
    views = 1 if name == "kernel" and size > 7 and device.type == "cpu" else 3
    crops = torch.from_numpy(np.stack([picture(size, size, seed) for seed in range(views * images)]))
    crops = crops.unflatten(0, (views, images)).to(device)
    check_finish(name, crops, looks(views, [(size, size)] * images, seed=size))


@exact_pillow
def test_whole_views_of_the_reference():
    arrays = [picture(*hw, seed) for seed, hw in enumerate([(375, 500), (500, 334), (200, 210), (96, 64)])]
    pixels, table = pack(arrays, "cpu")
    given = looks(4, table[:, 1:].tolist(), seed=3)
    given.ints[..., 2:4] = given.ints[..., 2:4].clamp(min=30)
    given.ints[..., :2] = torch.minimum(given.ints[..., :2], table[:, 1:].int() - given.ints[..., 2:4]).clamp(min=0)
    got = bossnas_kernels.augment_views(pixels, table, given, 96, *PLAIN)
    for v, n in itertools.product(range(4), range(4)):
        crop = pillow_crop(arrays[n], given.ints[v, n], 96)
        want = pillow_finish(crop, given.ints[v, n], given.floats[v, n])
        # a level in the crop is more after jitter: factors are up to 2, twice the recipe's
        assert np.abs(levels(got[v, n]) - want).mean() <= 0.3, f"{given.ints[v, n]} {given.floats[v, n]}"


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_gives_the_references_numbers(device, dtype):
    size = 33
    crops = torch.from_numpy(np.stack([picture(size, size, seed) for seed in range(6)]))
    crops = crops.unflatten(0, (2, 3)).to(device)
    given = looks(2, [(size, size)] * 3, seed=11)
    got, want = (FINISH[k](crops, given, MEAN, STD, dtype) for k in ("kernel", "reference"))
    assert got.shape == want.shape == (2, 3, 3, size, size) and got.dtype == want.dtype == dtype
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in (*got, *want))
    if dtype == torch.float32 or device.type != "cpu":
        assert torch.equal(got, want)
    else:  # the interpreter cuts off, where PyTorch rounds
        ulp = torch.finfo(dtype).eps * want.float().abs()
        assert ((got.float() - want.float()).abs() <= ulp).all()
    plain = crops[1, 2].float().permute(2, 0, 1) / 255
    bare = FINISH["reference"](crops, no_looks(2, 3), MEAN, STD)[1, 2]
    torch.testing.assert_close(
        bare,
        (plain - torch.tensor(MEAN, device=device)[:, None, None]) / torch.tensor(STD, device=device)[:, None, None],
        rtol=0,
        atol=1e-6,
    )


def test_a_view_does_not_depend_on_the_batch(device, name):
    arrays = [picture(*hw, seed) for seed, hw in enumerate([(30, 41), (55, 23), (12, 12)])]
    pixels, table = pack(arrays, device)
    given = looks(2, table[:, 1:].tolist(), seed=5)
    crops = CROPS[name](pixels, table, given, 16)
    views = FINISH[name](crops, given, MEAN, STD)
    for n in (0, 2):
        alone = Looks(given.ints[1:, n : n + 1], given.floats[1:, n : n + 1])
        own, own_table = pack(arrays[n : n + 1], device, gap=3)
        crop = CROPS[name](own, own_table, alone, 16)
        assert torch.equal(crop[0, 0], crops[1, n])
        assert torch.equal(FINISH[name](crop, alone, MEAN, STD)[0, 0], views[1, n])


def test_chunks_change_nothing(monkeypatch):
    crops = torch.from_numpy(np.stack([picture(12, 12, seed) for seed in range(30)]))[None]
    given = looks(1, [(12, 12)] * 30, seed=6)
    given.ints[0, ::2, 7:11] = torch.tensor([2, 1, 3, 0], dtype=torch.int32)  # many of one order
    together = FINISH["reference"](crops, given, MEAN, STD)
    monkeypatch.setitem(augment_reference.CHUNK, "cpu", 1)
    assert torch.equal(FINISH["reference"](crops, given, MEAN, STD), together)


def test_crops_of_any_strides(device, name):
    wide = torch.from_numpy(np.stack([picture(10, 20, seed) for seed in range(4)])).unflatten(0, (2, 2)).to(device)
    given = looks(2, [(10, 10)] * 2, seed=8)
    for crops in (wide[..., ::2, :], wide[..., :10, :].transpose(2, 3), wide[:1, :, :, 5:15].expand(2, -1, -1, -1, -1)):
        assert torch.equal(FINISH[name](crops, given, MEAN, STD), FINISH[name](crops.contiguous(), given, MEAN, STD))


def test_inputs_are_not_changed(device, name):
    pixels, table = pack([picture(20, 30)], device)
    given = looks(2, [(20, 30)], seed=9)
    crops = CROPS[name](pixels, table, given, 8)
    kept = [t.clone() for t in (pixels, table, *given, crops)]
    CROPS[name](pixels, table, given, 8), FINISH[name](crops, given, MEAN, STD)
    assert all(torch.equal(a, b) for a, b in zip(kept, (pixels, table, *given, crops), strict=True))


@pytest.mark.parametrize(
    "module, row",
    [
        pytest.param(module, row, id=f"{module.__name__.rpartition('_')[2]}-{'-'.join(map(str, row.values()))}")
        for module in (augment_crops, augment_colours)
        for row in [dict(r) for r in sorted({tuple(r.items()) for r in module.TABLE.values()})]
    ],
)
def test_every_config(device, module, row, monkeypatch):
    monkeypatch.setitem(module.TABLE, common.architecture(device), row)
    pixels, table = pack([picture(40, 33)], device)
    given = looks(1, [(40, 33)], seed=10)
    given.ints[..., 7:11], given.floats[..., 4] = torch.tensor([3, 2, 1, 0], dtype=torch.int32), 1.0
    crops = CROPS["kernel"](pixels, table, given, 24)
    want = pillow_crop(picture(40, 33), given.ints[0, 0], 24)
    assert np.abs(crops[0, 0].cpu().numpy().astype(int) - want).max() <= (2 if OLD_PILLOW else 0)
    check_finish("kernel", crops, given)


def test_repeats_to_the_bit(device):
    pixels, table = pack([picture(40, 33), picture(33, 60)], device)
    given = looks(2, table[:, 1:].tolist(), seed=12)

    def once():
        crops = CROPS["kernel"](pixels, table, given, 16)
        return crops, FINISH["kernel"](crops, given, MEAN, STD)

    first = once()
    for _ in range(50 if device.type == "cuda" else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_the_public_functions_run_the_kernels(device, monkeypatch):
    pixels, table = pack([picture(20, 30)], device)
    given = looks(2, [(20, 30)], seed=13)
    bossnas_kernels.use("reference")
    want = bossnas_kernels.augment_views(pixels, table, given, 8, MEAN, STD)
    for function in ("crop_views", "finish_views"):
        monkeypatch.setattr(augment_reference, function, None)  # calling it fails
    bossnas_kernels.use("triton")
    got = bossnas_kernels.augment_views(pixels, table, given, 8, MEAN, STD)
    # levels: a crop of the reference on a CPU may be one off, and jitter doubles it
    assert ((got - want).abs().mean() * 255 * min(STD)).item() <= 0.3


def good():
    """Arguments of crop_views and finish_views that fit."""
    given = no_looks(2, 1)
    given.ints[..., 2:4] = 4
    return {
        "pixels": torch.zeros(48, dtype=torch.uint8),
        "table": torch.tensor([[0, 4, 4]]),
        "looks": given,
        "size": 3,
        "crops": torch.zeros(2, 1, 3, 3, 3, dtype=torch.uint8),
        "mean": MEAN,
        "std": STD,
        "dtype": torch.float32,
    }


def put(given, part, column, value):
    """A copy of looks with one number changed in the view of the second place."""
    given = Looks(given.ints.clone(), given.floats.clone())
    getattr(given, part)[1, 0, column] = value
    return given


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pixels": torch.zeros(48)}, r"pixels: expected uint8 \[bytes\], got torch.float32 of shape \(48,\)"),
        ({"table": torch.tensor([[0, 4]])}, r"table: expected int64 \[N, 3\] on the CPU"),
        (
            {"table": torch.tensor([[1, 4, 4]])},
            r"table: expected pictures .* within the 48 bytes .*got \[1, 4, 4\] at \[0",
        ),
        ({"table": torch.tensor([[0, 4, 4], [0, 4, 4]])}, r"looks.ints: expected torch.int32 \[V, 2, 13\] on the CPU"),
        ({"size": 0}, "size: expected a positive number of pixels, got 0"),
        (
            {"part": ("ints", 0, 1)},
            r"looks.ints: expected crops .* within their pictures, got \[1, 0, 4, 4.*at \[1, 0\]",
        ),
        ({"part": ("ints", 3, 0)}, "looks.ints: expected crops of at least one pixel"),
        ({"crops": torch.zeros(2, 1, 3, 4, 3, dtype=torch.uint8)}, r"crops: expected uint8 \[V, N, S, S, 3\]"),
        ({"crops": torch.zeros(3, 1, 3, 3, 3, dtype=torch.uint8)}, r"looks.ints: expected torch.int32 \[3, 1, 13\]"),
        ({"crops": torch.zeros(2, 1, 0, 0, 3, dtype=torch.uint8)}, "crops: expected at least one view"),
        ({"part": ("ints", slice(7, 9), 2)}, "looks.ints: expected an order .* none of them twice"),
        ({"part": ("ints", 7, 4)}, r"looks.ints: expected an order \(columns 7..10\) of colour operations 0..3"),
        ({"part": ("floats", 1, float("nan"))}, "looks.floats: expected finite factors"),
        ({"part": ("floats", 4, 2.5)}, r"looks.floats: expected finite factors, and 0 to 2.4 for sigma \(column 4\)"),
        ({"mean": (0.0,)}, "mean: expected three numbers, one a channel, got 1"),
        ({"std": (0.0, 1.0, 1.0)}, "std: expected positive numbers"),
        ({"dtype": torch.float64}, "dtype: expected float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_errors(name, change, message):
    arguments = good()
    if "part" in change:
        change = {"looks": put(arguments["looks"], *change["part"])}
    arguments |= change
    with pytest.raises(ValueError, match=message):
        CROPS[name](*(arguments[k] for k in ("pixels", "table", "looks", "size")))
        FINISH[name](*(arguments[k] for k in ("crops", "looks", "mean", "std", "dtype")))
