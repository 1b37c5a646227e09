"""RandAugment(2, 9) as the released code of arXiv 2211.00262 has it, on whole pictures before they are resized.

It took it from METER (arXiv 2111.02387), without the operations that invert or drop colors: questions ask for these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image, ImageEnhance, ImageOps

NUM_OPERATIONS = 2
SHARE = 9 / 30  # magnitude 9 of 30: how far an operation goes from the lower end of its range to the upper
ENHANCED = 0.1 + SHARE * (1.9 - 0.1)  # always below 1: a picture is only ever paler, darker or softer
DEGREES, SHEAR, SHIFT = SHARE * 30, SHARE * 0.3, SHARE * 100  # either way; SHIFT in pixels, whatever the picture's size

Operation = Callable[[Image.Image, float], Image.Image]


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda picture, _: kind(picture).enhance(ENHANCED)


def _affine(*row: float) -> Operation:
    """`row` holds what is added to the identity's six coefficients; what is uncovered becomes black."""

    def moved(picture: Image.Image, sign: float) -> Image.Image:
        coefficients = [one + sign * added for one, added in zip((1, 0, 0, 0, 1, 0), row, strict=True)]
        return picture.transform(picture.size, Image.Transform.AFFINE, coefficients)

    return moved


OPERATIONS: tuple[Operation, ...] = (
    lambda picture, _: ImageOps.autocontrast(picture),
    lambda picture, _: ImageOps.equalize(picture),
    lambda picture, sign: picture.rotate(sign * DEGREES),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    _affine(0, SHEAR, 0, 0, 0, 0),
    _affine(0, 0, 0, SHEAR, 0, 0),
    _affine(0, 0, SHIFT, 0, 0, 0),
    _affine(0, 0, 0, 0, 0, SHIFT),
)


def released_augmentation(picture: Image.Image) -> Image.Image:
    """Two operations, drawn with replacement from torch's generator, each to either side at random."""
    for number in torch.randint(len(OPERATIONS), (NUM_OPERATIONS,)).tolist():
        sign = 1.0 if torch.rand(()) < 0.5 else -1.0
        picture = OPERATIONS[number](picture, sign)
    return picture
