"""The reference paper's released pictures: short side, central square, and its own list of augmentations."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data_loaders import released_augmentation as released
from data_loaders.transforms import ImageTransform


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=95)
    return data.getvalue()


@pytest.mark.parametrize("size", [(64, 40), (40, 64), (51, 33), (33, 33), (16, 90)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_crop_is_what_torchvision_cuts_after_resizing_the_short_side(
    size: tuple[int, int], interpolation: str
) -> None:
    picture = noise(*size)
    expected = F.center_crop(F.resize(picture, [16], v2.InterpolationMode(interpolation)), [16])
    assert torch.equal(ImageTransform(16, interpolation, fit="crop")(picture), F.pil_to_tensor(expected))


def test_a_crop_of_a_jpeg_at_reduced_scale_is_close_to_the_exact_one() -> None:
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)).resize((620, 410))
    reduced, exact = (ImageTransform(64, fit="crop", decode=decode)(encoded(smooth)) for decode in ("reduced", "exact"))
    assert reduced.shape == (3, 64, 64)
    assert (reduced.float() - exact.float()).abs().mean() < 1.5


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (2, lambda picture: F.rotate(picture, 9.0)),
        (3, lambda picture: F.adjust_saturation(picture, 0.64)),
        (4, lambda picture: F.adjust_contrast(picture, 0.64)),
        (5, lambda picture: F.adjust_brightness(picture, 0.64)),
        (6, lambda picture: F.adjust_sharpness(picture, 0.64)),
        (9, lambda picture: F.affine(picture, 0.0, [-30, 0], 1.0, [0.0, 0.0])),
        (10, lambda picture: F.affine(picture, 0.0, [0, -30], 1.0, [0.0, 0.0])),
    ],
)
def test_operations_have_the_released_strength(number: int, expected: Callable[[Image.Image], Image.Image]) -> None:
    picture = noise(80, 60)
    assert np.array_equal(released.OPERATIONS[number](picture, 1.0), expected(picture))


@pytest.mark.parametrize(("number", "moves"), [(7, (3, 0)), (8, (0, 3))])
def test_shears_move_a_pixel_by_three_tenths_of_its_distance_at_full_magnitude(
    number: int, moves: tuple[int, int]
) -> None:
    """At magnitude 9 of 30: by 0.09 of it, so that a dot 40 pixels from the corner moves by 3.6."""
    picture = Image.new("RGB", (100, 100))
    picture.putpixel((40, 40), (255, 255, 255))
    rows, columns = np.nonzero(np.array(released.OPERATIONS[number](picture, -1.0))[..., 0])
    assert abs(int(columns[0]) - 40 - moves[0]) <= 1 and abs(int(rows[0]) - 40 - moves[1]) <= 1


def test_pictures_are_augmented_whole_and_drawn_from_torchs_generator() -> None:
    """A shift of 30 pixels is a tenth of this picture's width, not two widths of the square."""
    transform = ImageTransform(16, "bilinear", "released", fit="crop")
    data = encoded(noise(300, 200))
    drawn = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        drawn.append(transform(data))
        torch.manual_seed(seed)
        picture = released.released_augmentation(Image.open(io.BytesIO(data)))
        assert torch.equal(drawn[-1], ImageTransform(16, "bilinear", fit="crop")(picture))
    assert torch.equal(drawn[0], drawn[1]) and any(not torch.equal(drawn[0], other) for other in drawn[2:])
