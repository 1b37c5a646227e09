"""Perceiver resampler: image tokens, however many, become a few latents, which another fusion joins to the text."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.models.transformer import Attention, FeedForward, Residual, initialise


class ResamplerLayer(nn.Module):
    """Latents read [image; latents], each with a norm of its own, and pass a feed-forward."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.image_norm = nn.LayerNorm(width)
        self.latents_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, dropout)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = Residual(width, FeedForward(width, dropout), pre_norm=True, dropout=dropout)

    def forward(self, latents: Float[Tensor, "b q d"], image: Float[Tensor, "b p d"]) -> Float[Tensor, "b q d"]:
        inner = self.latents_norm(latents)
        read = self.attention(inner, torch.cat([self.image_norm(image), inner], dim=1))
        return self.feed_forward(latents + self.dropout(read))  # type: ignore[no-any-return]  # a module's call gives Any


class Resampler(nn.Module):
    """Image tokens to `num_latents` latents, without the text.

    Source: Flamingo, arXiv 2204.14198, section 2.1, of one frame; with biases, and GELU for its squared ReLU, as
    everywhere here.
    """

    def __init__(self, width: int, depth: int, num_heads: int, num_latents: int, dropout: float) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, num_latents, width))
        self.layers = nn.ModuleList(ResamplerLayer(width, num_heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.apply(initialise)

    def forward(self, image: Float[Tensor, "b p d"]) -> Float[Tensor, "b q d"]:
        latents = self.latents.expand(len(image), -1, -1)
        for layer in self.layers:
            latents = layer(latents, image)
        return self.norm(latents)  # type: ignore[no-any-return]  # a module's call gives Any


class Perceiver(nn.Module):
    """A resampler, and a fusion to which its latents are the image."""

    def __init__(self, resampler: Resampler, reader: nn.Module) -> None:
        super().__init__()
        self.width = reader.width
        self.resampler = resampler
        self.reader = reader

    def forward(
        self, image: Float[Tensor, "b p d"], text: Float[Tensor, "b l d"], text_mask: Bool[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b q d"], Float[Tensor, "b l d"]]:
        """States of the latents, in place of the image's, and fused text states."""
        return self.reader(self.resampler(image), text, text_mask)  # type: ignore[no-any-return]  # a module's call gives Any
