"""Encoded bytes -> square uint8 pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from data_loaders.decoding import as_rgb, decode_image

Augmentation = Literal["none", "randaugment"]
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


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
