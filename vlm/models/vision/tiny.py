"""A small vision transformer with a convolutional stem, for worlds of small images and for CPUs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.models.transformer import EncoderBlock, drop_tokens, initialise


class TinyVision(nn.Module):
    """ViT whose patches come from strided 3x3 convolutions; their maximum comes first and serves as CLS.

    The stem learns in a fraction of the steps that a linear patch projection needs (Xiao et al., arXiv 2106.14881):
    with 16-pixel linear patches small objects were never learnt within a CPU's budget. A class read from the maximum
    over the patches is learnt by the patch that shows it, and each patch stays different from the others. Read from
    their mean, or from a CLS token of its own, all patches of an image came to be nearly the same (7% of the variance
    lay between them, against 45%), and no fusion module learnt to attend to the right one.
    """

    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    interpolation = "bicubic"

    def __init__(
        self, width: int, depth: int, num_heads: int, patch_size: int, image_pixels: int, patch_dropout: float = 0.0
    ) -> None:
        super().__init__()
        num_halvings = int(math.log2(patch_size))
        if 2**num_halvings != patch_size or image_pixels % patch_size:
            raise ValueError(
                f"patch_size must be a power of two that divides image_pixels. Got {patch_size} and {image_pixels}"
            )
        self.width = width
        self.image_pixels = image_pixels
        self.patch_dropout = patch_dropout
        stem: list[nn.Module] = []
        channels = 3
        for step in range(num_halvings):
            out = max(16, width // 2 ** (num_halvings - 1 - step))
            stem += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.GroupNorm(1, out), nn.GELU()]
            channels = out
        self.stem = nn.Sequential(*stem, nn.Conv2d(channels, width, 1))
        self.position = nn.Parameter(torch.zeros(1, (image_pixels // patch_size) ** 2, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.blocks.apply(initialise)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p d"]:
        return self.layers(image, 1)[0]

    def layers(self, image: Float[Tensor, "b 3 h w"], count: int) -> tuple[Float[Tensor, "b p d"], ...]:
        """States after each of the last `count` blocks, through the final norm; the last is what `forward` gives."""
        states: deque[Tensor] = deque(maxlen=count)
        x = self.stem(image).flatten(2).transpose(1, 2) + self.position
        if self.training and self.patch_dropout:
            x = drop_tokens(x, self.patch_dropout)
        for block in self.blocks:
            x = block(x)
            states.append(x)
        normed = [self.norm(x) for x in states]
        return tuple(torch.cat([x.amax(dim=1, keepdim=True), x], dim=1) for x in normed)

    def fit_states(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The position embeddings of a run at another image size, resampled to this one's."""
        theirs = states.get("position")
        if theirs is None or theirs.shape == self.position.shape:
            return {}
        from timm.layers.pos_embed import resample_abs_pos_embed

        side = math.isqrt(self.position.shape[1])
        return {"position": resample_abs_pos_embed(theirs, [side, side], num_prefix_tokens=0)}
