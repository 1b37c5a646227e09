"""Encoded bytes -> square uint8 pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from data_loaders.decoding import as_rgb, decode_image, refuse_too_large

Augmentation = Literal["none", "randaugment"]
Decode = Literal["reduced", "exact"]
PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# What `torch.nn.functional.interpolate(antialias=True)` calls. Only these take an output size and exact scales at once.
TORCH = {"bicubic": torch.ops.aten._upsample_bicubic2d_aa, "bilinear": torch.ops.aten._upsample_bilinear2d_aa}
JPEG = b"\xff\xd8"
MARGIN = 1.25  # with twice the pixels the difference is a quarter of this one, and decoding takes a quarter longer


class ImageTransform:
    """Decode, resize to a square, optionally augment. Returns bytes: normalisation belongs to the model.

    `decode="exact"` decodes every picture whole and resizes it with Pillow: the same bytes on every machine.
    `decode="reduced"` does so too, but for JPEGs: these are decoded at 1/2, 1/4 or 1/8 of their size where that leaves
    `MARGIN` times the wanted pixels a side, which libjpeg does while it decodes, and are resized by torch, which may
    round otherwise on another processor. `experiments/loading_speed` has how far the pixels then are from the exact
    ones: 1 of 255 levels on average where the scale is reduced, 0.04 where it is not. What the fast decoder warns of
    goes to Pillow, so that both ways refuse the same files.
    """

    def __init__(
        self,
        image_pixels: int,
        interpolation: str = "bicubic",
        augmentation: Augmentation = "none",
        decode: Decode = "reduced",
    ) -> None:
        self.image_pixels, self.decode = image_pixels, decode
        self.resampling, self.interpolation = PILLOW[interpolation], interpolation  # torch's operator cannot be pickled
        self.augment: Callable[[Tensor], Tensor] | None = None
        if augmentation == "randaugment":  # torchvision takes a second to import
            from torchvision.transforms.v2 import RandAugment

            self.augment = RandAugment(num_ops=2, magnitude=9)  # the reference paper's

    def __call__(self, picture: bytes | Image.Image, name: str = "image") -> UInt8[Tensor, "3 h w"]:
        """`picture` is encoded, or decoded already; `name` is what an error calls it."""
        pixels = self.square(picture, name)
        return pixels if self.augment is None else self.augment(pixels)

    def square(self, picture: bytes | Image.Image, name: str = "image") -> UInt8[Tensor, "3 h w"]:
        """The picture before augmentation, which alone draws from torch's generator."""
        if isinstance(picture, bytes) and self.decode == "reduced" and picture[:2] == JPEG:
            pixels = self._reduced(picture, name)
            if pixels is not None:
                return pixels
        image = decode_image(picture, name) if isinstance(picture, bytes) else as_rgb(picture)
        size = (self.image_pixels, self.image_pixels)
        if image.size != size:
            image = image.resize(size, self.resampling)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def _reduced(self, data: bytes, name: str) -> UInt8[Tensor, "3 h w"] | None:
        """A JPEG at the smallest scale that serves, resized; None where Pillow must look at it."""
        try:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
            if colors not in ("YCbCr", "Gray", "RGB"):
                return None
            refuse_too_large(width, height, name)
            eighths = next(
                n for n in (1, 2, 4, 8) if n == 8 or min(width, height) * n / 8 >= MARGIN * self.image_pixels
            )
            # The decoder takes the smallest of its scales that gives as much as this.
            least = {"min_height": -(-height * eighths // 8), "min_width": -(-width * eighths // 8)}
            whole = eighths == 8
            decoded = simplejpeg.decode_jpeg(data, "RGB", min_factor=1.0, strict=True, **({} if whole else least))
        except ValueError:
            return None
        pixels = torch.from_numpy(decoded).permute(2, 0, 1)
        side = self.image_pixels
        if (height, width) != (side, side):
            # A scaled picture has whole pixels: where its last ones stand for less, the scales say so.
            scales = (side / (height * eighths / 8), side / (width * eighths / 8))
            pixels = TORCH[self.interpolation](pixels[None], [side, side], False, *scales)[0]
        return pixels.contiguous()
