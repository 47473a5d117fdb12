"""Image files to pixels: JPEG, PNG and WebP from sources that nobody vouches for."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow decodes, more slowly
    simplejpeg = None

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_BYTES = 2**26  # of an image file
MAX_PIXELS = 2**26  # of an image: 201 MB as RGB
JPEG = b"\xff\xd8\xff"


class BadImage(ValueError):
    """An image that cannot be decoded; the text says why."""


def decode(data: bytes) -> np.ndarray:
    """Decodes a JPEG, PNG or WebP by its content, whatever it is called, to RGB: uint8 [H, W, 3].

    Greyscale, palette, CMYK, 16-bit grey and transparent images come out RGB (alpha is dropped); an EXIF rotation is
    not applied, as in torchvision's ImageFolder. An animation gives its first picture. Raises BadImage, also for files
    above MAX_BYTES and for images of more than MAX_PIXELS, of which nothing is decoded.
    """
    if len(data) > MAX_BYTES:
        raise BadImage(f"{len(data)} bytes, more than {MAX_BYTES}")
    if simplejpeg is not None and data[:3] == JPEG:
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(width, height)
            if space in ("YCbCr", "Gray", "RGB"):
                return simplejpeg.decode_jpeg(data, "RGB")
        except BadImage:
            raise
        except ValueError:
            pass  # Pillow has the last word, and says better what is wrong
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            _check_size(*image.size)
            return np.array(_to_rgb(image))
    except UnidentifiedImageError:
        raise BadImage("no JPEG, PNG or WebP" if data else "an empty file") from None
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 8 instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels, more than {MAX_PIXELS}")
