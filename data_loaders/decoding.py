"""Encoded bytes -> a picture, with a cap on what a stranger's file may ask of memory. Free of torch: the processes that
prepare data import this alone."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from vlm.errors import UserError

MAX_PIXELS = 64_000_000  # 192 MB as RGB; photographs of the usual data sets stay far below


class ImageError(UserError):
    """An image that cannot be had from its bytes. `reason` is the same for all that are alike."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def decode_image(data: bytes, name: str) -> Image.Image:
    """The picture as RGB. `name` is what an error calls it."""
    with decoding(name):
        return as_rgb(open_image(data, name))


def check_image(data: bytes, name: str) -> None:
    """Raise what `decode_image` would raise. A JPEG is decoded at an eighth of its size: every byte of it is read, but
    most of the arithmetic is left out, in a third of the time."""
    with decoding(name):
        image = open_image(data, name)
        if image.format == "JPEG":
            image.draft(None, (1, 1))
            image.load()
        else:
            as_rgb(image)


def open_image(data: bytes, name: str) -> Image.Image:
    """The picture with its pixels not yet decoded, once its size is known to be below the cap."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap below is the lower one
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "GIF", "BMP"))
    refuse_too_large(image.width, image.height, name)
    return image


def refuse_too_large(width: int, height: int, name: str) -> None:
    """An `ImageError` for a picture of more than `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        message = f"{name}: {width} x {height} pixels is over the limit of {MAX_PIXELS:,}"
        raise ImageError(message, reason="too many pixels")


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises into an `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError)  # whose own text holds an address in memory
        said = "no known format" if unknown else f"{type(error).__name__}: {error}"
        message = f"{name}: the image cannot be decoded ({said})"
        raise ImageError(message, "no image" if unknown else "damaged") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB; transparent parts become white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
