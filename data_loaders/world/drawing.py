"""Scenes as pictures: PNG bytes of noisy dark boards with jittered objects.

Position, size, brightness and background vary and are never named.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw

from data_loaders.world.config import WorldConfig
from data_loaders.world.scenes import COLORS, SHAPES, Scene

RGB = {
    "red": (226, 44, 44),
    "green": (40, 180, 70),
    "blue": (50, 100, 245),
    "yellow": (245, 215, 40),
    "white": (240, 240, 240),
}
SIZES = (0.32, 0.35, 0.38, 0.41)  # radius in cells
SHIFTS = (-0.06, -0.02, 0.02, 0.06)  # from the middle of the cell, in cells; with the largest size nothing is cut off
SUPERSAMPLING = 8


@lru_cache(maxsize=4)
def sprites(cell_pixels: int) -> np.ndarray:
    """Coverage in [0, 1] of every shape, size and shift: float32 [shapes, sizes, shifts, shifts, h, w]."""
    side = cell_pixels * SUPERSAMPLING
    result = np.zeros((len(SHAPES), len(SIZES), len(SHIFTS), len(SHIFTS), cell_pixels, cell_pixels), dtype=np.float32)
    for place in np.ndindex(result.shape[:4]):
        shape, size, down, across = place
        image = Image.new("L", (side, side))
        x, y, radius = side * (0.5 + SHIFTS[across]), side * (0.5 + SHIFTS[down]), side * SIZES[size]
        _draw_shape(ImageDraw.Draw(image), SHAPES[shape], x, y, radius)
        coverage = np.asarray(image, dtype=np.float32) / 255
        result[place] = coverage.reshape(cell_pixels, SUPERSAMPLING, cell_pixels, SUPERSAMPLING).mean((1, 3))
    return result


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float) -> None:
    """A shape around (x, y) that stays within `radius` along both axes."""
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    elif shape == "square":
        half = 0.84 * radius
        draw.rectangle((x - half, y - half, x + half, y + half), fill=255)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + 0.85 * radius), (x + radius, y + 0.85 * radius)], fill=255)
    elif shape == "cross":  # diagonal, so that it shares few edges with the square
        arm, width = 0.95 * radius, 0.27 * radius
        for slope in (1, -1):
            ends = [(-arm, -width), (-arm, width), (arm, width), (arm, -width)]
            turned = [(x + math.sqrt(0.5) * (a - slope * b), y + math.sqrt(0.5) * (slope * a + b)) for a, b in ends]
            draw.polygon(turned, fill=255)
    else:
        raise ValueError(f"Unknown shape {shape!r}. Available: {', '.join(SHAPES)}")


def draw(scenes: Iterable[Scene], config: WorldConfig, rng: np.random.Generator) -> Iterator[bytes]:
    """One PNG a scene, RGB, `grid * cell_pixels` a side."""
    remaining = iter(scenes)
    while batch := tuple(islice(remaining, 256)):
        for pixels in _pixels(batch, config, rng):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG", compress_level=1)
            yield file.getvalue()


def _pixels(scenes: tuple[Scene, ...], config: WorldConfig, rng: np.random.Generator) -> np.ndarray:
    """uint8 [scenes, h, w, 3]."""
    grid, cell = config.grid, config.cell_pixels
    side = grid * cell
    background = rng.uniform(18, 50, (len(scenes), 1, 1, 1)) + rng.uniform(-6, 6, (len(scenes), 1, 1, 3))
    noise = rng.integers(0, 6, (len(scenes), side, side, 1), dtype=np.int8)
    canvas = (background.astype(np.float32) + noise).reshape(len(scenes), grid, cell, grid, cell, 3)

    image = [number for number, scene in enumerate(scenes) for _ in scene.things]
    things = [thing for scene in scenes for thing in scene.things]
    row, column = [thing.row for thing in things], [thing.column for thing in things]
    size = rng.integers(len(SIZES), size=len(things))
    down, across = rng.integers(len(SHIFTS), size=(2, len(things)))
    shape = [SHAPES.index(thing.shape) for thing in things]
    coverage = sprites(cell)[shape, size, down, across][..., None]  # [things, h, w, 1]
    palette = np.array([RGB[color] for color in COLORS], dtype=np.float32)
    paint = palette[[COLORS.index(thing.color) for thing in things]]
    paint = paint * rng.uniform(0.88, 1.04, (len(things), 1)).astype(np.float32)

    under = canvas[image, row, :, column]  # [things, h, w, 3]
    canvas[image, row, :, column] = under + coverage * (paint[:, None, None] - under)
    return canvas.reshape(len(scenes), side, side, 3).clip(0, 255).astype(np.uint8)
