"""Merged attention: text and image tokens side by side in one stream."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.models.transformer import EncoderBlock, initialise


class Merged(nn.Module):
    """Blocks of self-attention over [text; image], with one set of weights for both.

    Source: METER, arXiv 2111.02387, section 3.2; `pre_norm=False` is the published form. A layer has about a third of
    the parameters of a co-attention layer, whose two streams have weights of their own.
    """

    def __init__(self, width: int, depth: int, num_heads: int, pre_norm: bool, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList(EncoderBlock(width, num_heads, pre_norm, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.apply(initialise)

    def forward(
        self, image: Float[Tensor, "b p d"], text: Float[Tensor, "b l d"], text_mask: Bool[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b p d"], Float[Tensor, "b l d"]]:
        """Fused image and text states."""
        states = torch.cat([text, image], dim=1)
        mask = torch.cat([text_mask, text_mask.new_ones(image.shape[:2])], dim=1)
        for layer in self.layers:
            states = layer(states, mask)
        states = self.norm(states)
        return states[:, text.shape[1] :], states[:, : text.shape[1]]
