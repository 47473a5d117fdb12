"""Decoding: what comes out RGB, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from bossnas.data import images
from bossnas.data.images import BadImage, decode

pytestmark = pytest.mark.quick


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_come_out_as_pillow_gives_them_with_and_without_simplejpeg(mode, monkeypatch):
    pytest.importorskip("simplejpeg")
    data = encoded(noise(mode=mode), "JPEG", quality=80)
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(image.convert("RGB"))
    assert np.array_equal(decode(data), wanted)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert np.array_equal(decode(data), wanted)


def test_the_content_decides_not_the_name():
    image = noise()
    assert np.array_equal(decode(encoded(image, "PNG")), np.asarray(image))  # whatever it was called in its shard


def test_an_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(noise(40, 30), "JPEG", exif=exif)).shape == (30, 40, 3)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    for kind in ("PNG", "JPEG", "WEBP"):
        with pytest.raises(BadImage, match="40x30 pixels, more than 1000"):
            decode(encoded(noise(), kind))
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(BadImage, match="bytes, more than 100"):
        decode(encoded(noise(), "PNG"))


@pytest.mark.parametrize("cut", [0, 3, 100, -1, -100])
def test_a_truncated_jpeg_is_bad(cut):
    data = encoded(noise(), "JPEG")
    with pytest.raises(BadImage):
        decode(data[:cut])


@pytest.mark.parametrize(
    ("ext", "mode", "expected"),
    [
        ("jpg", "L", (99, 99, 99)),
        ("png", "L", (99, 99, 99)),
        ("png", "LA", (99, 99, 99)),
        ("jpg", "CMYK", (200, 60, 30)),
        ("jpg", "RGB", (200, 60, 30)),
        ("png", "RGBA", (200, 60, 30)),
        ("webp", "RGB", (200, 60, 30)),
        ("png", "P", (204, 51, 51)),
        ("png", "1", None),
    ],
)
def test_decode_gives_rgb(ext, mode, expected):
    file = io.BytesIO()
    image = Image.new("RGB", (12, 9), (200, 60, 30)).convert(mode, dither=Image.Dither.NONE)
    image.save(file, {"jpg": "JPEG"}.get(ext, ext.upper()))
    image = decode(file.getvalue())
    assert image.dtype == np.uint8 and image.shape == (9, 12, 3)
    if expected:
        assert np.abs(image.astype(int) - expected).max() <= 3


def test_decode_scales_16_bit_grey_and_drops_a_palettes_transparency():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 0x80FF, 0xFFFF]], np.uint16)).save(file, "PNG")
    assert decode(file.getvalue())[0, :, 0].tolist() == [0, 0x80, 0xFF]
    file = io.BytesIO()
    Image.fromarray(np.array([[7]], np.uint8)).convert("P").save(file, "PNG", transparency=b"\0" * 8)
    assert decode(file.getvalue()).tolist() == [[[7, 7, 7]]]


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"RIFF0000WEBP"])
def test_undecodable_images_raise(data):
    with pytest.raises(BadImage):
        decode(data)
