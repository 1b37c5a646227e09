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
from data_loaders.released_augmentation import released_augmentation

Augmentation = Literal["none", "randaugment", "released"]
Decode = Literal["reduced", "exact"]
Fit = Literal["squeeze", "crop"]
PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# What `torch.nn.functional.interpolate(antialias=True)` calls. Only these take an output size and exact scales at once.
TORCH = {"bicubic": torch.ops.aten._upsample_bicubic2d_aa, "bilinear": torch.ops.aten._upsample_bilinear2d_aa}
JPEG = b"\xff\xd8"
MARGIN = 1.25  # with twice the pixels the difference is a quarter of this one, and decoding takes a quarter longer


class ImageTransform:
    """Decode, resize to a square, optionally augment. Returns bytes: normalisation belongs to the model.

    `fit`: the picture is squeezed into the square, which shows all of it, or its short side is resized and the central
    square cut out of it, as in the released code of arXiv 2211.00262.

    `augmentation="randaugment"` is torchvision's, on the square. `"released"` is that code's
    (`released_augmentation.py`), on the whole picture, which is then decoded at its full size.

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
        fit: Fit = "squeeze",
    ) -> None:
        self.image_pixels, self.decode, self.fit = image_pixels, decode, fit
        self.resampling, self.interpolation = PILLOW[interpolation], interpolation  # torch's operator cannot be pickled
        self.augmentation = augmentation
        self.randaugment: Callable[[Tensor], Tensor] | None = None
        if augmentation == "randaugment":  # torchvision takes a second to import
            from torchvision.transforms.v2 import RandAugment

            self.randaugment = RandAugment(num_ops=2, magnitude=9)  # the reference paper's

    def __call__(self, picture: bytes | Image.Image, name: str = "image") -> UInt8[Tensor, "3 h w"]:
        """`picture` is encoded, or decoded already; `name` is what an error calls it."""
        return self.augment(self.decoded(picture, name))

    def decoded(self, picture: bytes | Image.Image, name: str = "image") -> UInt8[Tensor, "3 h w"] | Image.Image:
        """All that comes before augmentation: the square, or the whole picture where that is to be augmented."""
        if isinstance(picture, bytes) and self.decode == "reduced" and picture[:2] == JPEG:
            pixels = None if self.augmentation == "released" else self._reduced(picture, name)
            if pixels is not None:
                return pixels
        image = decode_image(picture, name) if isinstance(picture, bytes) else as_rgb(picture)
        return image if self.augmentation == "released" else self._square(image)

    def augment(self, decoded: UInt8[Tensor, "3 h w"] | Image.Image) -> UInt8[Tensor, "3 h w"]:
        """The rest, which alone draws from torch's generator."""
        if isinstance(decoded, Image.Image):
            return self._square(released_augmentation(decoded))
        return decoded if self.randaugment is None else self.randaugment(decoded)

    def _square(self, image: Image.Image) -> UInt8[Tensor, "3 h w"]:
        width, height = self._resized(*image.size)
        if image.size != (width, height):
            image = image.resize((width, height), self.resampling)
        return self._cut(torch.from_numpy(np.array(image)).permute(2, 0, 1)).contiguous()

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """The size of a picture before it is cut to the square. Longer sides are rounded down, as torchvision does."""
        side, shortest = self.image_pixels, min(width, height)
        if self.fit == "squeeze":
            return side, side
        return side * width // shortest, side * height // shortest

    def _cut(self, pixels: UInt8[Tensor, "3 rows columns"]) -> UInt8[Tensor, "3 h w"]:
        """The central square."""
        side = self.image_pixels
        top, left = (round((length - side) / 2) for length in pixels.shape[1:])
        return pixels[:, top : top + side, left : left + side]

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
        to_width, to_height = self._resized(width, height)
        if (height, width) != (to_height, to_width):
            # A scaled picture has whole pixels: where its last ones stand for less, the scales say so.
            scales = (to_height / (height * eighths / 8), to_width / (width * eighths / 8))
            pixels = TORCH[self.interpolation](pixels[None], [to_height, to_width], False, *scales)[0]
        return self._cut(pixels).contiguous()
