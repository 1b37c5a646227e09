"""Encoded bytes -> square uint8 pixels, with a cap on what a stranger's file may ask of memory."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vlm.errors import UserError

MAX_PIXELS = 64_000_000  # 192 MB as RGB; photographs of the usual data sets stay far below
Augmentation = Literal["none", "randaugment"]
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class ImageError(UserError):
    """An image that cannot be had from its bytes. `reason` is the same for all that are alike."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def decode_image(data: bytes, name: str) -> Image.Image:
    """The picture as RGB. `name` is what an error calls it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap below is the lower one
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "GIF", "BMP"))
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(
                f"{name}: {image.width} x {image.height} pixels is over the limit of {MAX_PIXELS:,}",
                reason="too many pixels",
            )
        return as_rgb(image)
    except ImageError:
        raise
    except Exception as error:
        reason = "no image" if isinstance(error, UnidentifiedImageError) else "damaged"
        message = f"{name}: the image cannot be decoded ({type(error).__name__}: {error})"
        raise ImageError(message, reason) from None


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB; transparent parts become white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


class ImageTransform:
    """Decode, resize to a square, optionally augment. Returns bytes: normalisation belongs to the model."""

    def __init__(self, image_pixels: int, interpolation: str = "bicubic", augmentation: Augmentation = "none") -> None:
        self.image_pixels = image_pixels
        self.resampling = RESAMPLING[interpolation]
        self.augment: Callable[[Tensor], Tensor] | None = None
        if augmentation == "randaugment":  # torchvision takes a second to import
            from torchvision.transforms.v2 import RandAugment

            self.augment = RandAugment(num_ops=2, magnitude=9)  # the reference paper's

    def __call__(self, picture: bytes | Image.Image, name: str = "image") -> UInt8[Tensor, "3 h w"]:
        """`picture` is encoded, or decoded already; `name` is what an error calls it."""
        image = decode_image(picture, name) if isinstance(picture, bytes) else as_rgb(picture)
        size = (self.image_pixels, self.image_pixels)
        if image.size != size:
            image = image.resize(size, self.resampling)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels if self.augment is None else self.augment(pixels)
