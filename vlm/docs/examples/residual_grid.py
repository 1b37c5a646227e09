"""A vision encoder from outside: convolutions on a grid, whose cells are the tokens."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.inner = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.outer = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.outer(nn.functional.gelu(self.inner(self.norm(x))))
        return x + change


class ResidualGrid(nn.Module):
    # What the framework asks of a vision encoder beside `forward`:
    mean = (0.5, 0.5, 0.5)  # bytes come in as (pixels / 255 - mean) / std
    std = (0.5, 0.5, 0.5)
    interpolation = "bicubic"  # how pictures are resized to `image_pixels`

    def __init__(self, width: int = 64, depth: int = 2, patch_size: int = 8, image_pixels: int = 48) -> None:
        super().__init__()
        self.width = width  # of the states
        self.image_pixels = image_pixels
        self.stem = nn.Conv2d(3, width, patch_size, stride=patch_size)
        # What freezing, adapters, layer-wise rates and checkpointing ask for; the stem stands before them.
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        """[b 3 h w] normalised pixels -> [b p d] states, CLS first: here the mean of the cells."""
        return self.layers(image, 1)[0]

    def layers(self, image: Tensor, count: int) -> tuple[Tensor, ...]:
        """The states after each of the last `count` blocks; only `model.fusion.type=bridges` asks for them."""
        states: deque[Tensor] = deque(maxlen=count)
        x = self.stem(image)
        for block in self.blocks:
            x = block(x)
            states.append(self.norm(x.flatten(2).transpose(1, 2)))
        return tuple(torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1) for cells in states)
