"""Q-Former: a few learned queries read the image, and the text reads them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.models.transformer import Attention, FeedForward, Residual, initialise


class QFormerLayer(nn.Module):
    """Self-attention over [queries; text], attention of the queries to the image, and a feed-forward each."""

    def __init__(self, width: int, num_heads: int, pre_norm: bool, dropout: float, reads_image: bool) -> None:
        super().__init__()
        self.self_attention = Residual(width, Attention(width, num_heads, dropout), pre_norm, dropout)
        self.cross_attention: Residual | None = None
        if reads_image:
            self.cross_attention = Residual(width, Attention(width, num_heads, dropout), pre_norm, dropout)
        self.query_feed_forward = Residual(width, FeedForward(width, dropout), pre_norm, dropout)
        self.text_feed_forward = Residual(width, FeedForward(width, dropout), pre_norm, dropout)

    def forward(
        self,
        queries: Float[Tensor, "b q d"],
        text: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b q+l"],
        image: Float[Tensor, "b p d"],
    ) -> tuple[Float[Tensor, "b q d"], Float[Tensor, "b l d"]]:
        both = self.self_attention(torch.cat([queries, text], dim=1), None, mask)
        queries, text = both.split([queries.shape[1], text.shape[1]], dim=1)
        if self.cross_attention is not None:
            queries = self.cross_attention(queries, image)
        return self.query_feed_forward(queries), self.text_feed_forward(text)


class QFormer(nn.Module):
    """Learned queries in place of image tokens: the text sees the image only through them.

    Source: BLIP-2, arXiv 2301.12597, section 3.1, with `pre_norm=False`; queries and text see each other, as in its
    image-text matching. Heads read the first query, where BLIP-2's takes the mean of its outputs over all of them.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        pre_norm: bool,
        dropout: float,
        num_queries: int,
        read_image_every: int,
    ) -> None:
        super().__init__()
        self.width = width
        # As large as normed states: small ones would attend almost evenly, and all become the same.
        self.queries = nn.Parameter(torch.randn(1, num_queries, width))
        self.image_norm = nn.LayerNorm(width)  # the image is the same in all layers
        self.layers = nn.ModuleList(
            QFormerLayer(width, num_heads, pre_norm, dropout, reads_image=number % read_image_every == 0)
            for number in range(depth)
        )
        self.query_norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.text_norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.apply(initialise)

    def forward(
        self, image: Float[Tensor, "b p d"], text: Float[Tensor, "b l d"], text_mask: Bool[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b q d"], Float[Tensor, "b l d"]]:
        """States of the queries, in place of the image's, and fused text states."""
        queries, image = self.queries.expand(len(image), -1, -1), self.image_norm(image)
        mask = torch.cat([text_mask.new_ones(queries.shape[:2]), text_mask], dim=1)
        for layer in self.layers:
            queries, text = layer(queries, text, mask, image)
        return self.query_norm(queries), self.text_norm(text)
