"""Co-attention: two streams that read themselves and each other."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.models.transformer import Attention, FeedForward, Residual, initialise


class CoAttentionLayer(nn.Module):
    """One stream's layer: self-attention, attention to the other stream, feed-forward."""

    def __init__(self, width: int, num_heads: int, pre_norm: bool, dropout: float) -> None:
        super().__init__()
        self.self_attention = Residual(width, Attention(width, num_heads, dropout), pre_norm, dropout)
        self.other_norm = nn.LayerNorm(width) if pre_norm else nn.Identity()  # un-normed streams grow with depth
        self.cross_attention = Residual(width, Attention(width, num_heads, dropout), pre_norm, dropout)
        self.feed_forward = Residual(width, FeedForward(width, dropout), pre_norm, dropout)

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        x_mask: Bool[Tensor, "b q"] | None,
        other: Float[Tensor, "b c d"],
        other_mask: Bool[Tensor, "b c"] | None,
    ) -> Float[Tensor, "b q d"]:
        x = self.self_attention(x, None, x_mask)
        x = self.cross_attention(x, self.other_norm(other), other_mask)
        return self.feed_forward(x)  # type: ignore[no-any-return]  # a module's call gives Any


class CoAttention(nn.Module):
    """Two streams of co-attention layers; each layer reads the other stream as it entered the layer.

    Source: METER, arXiv 2111.02387, section 3.2; `pre_norm=False` is the published form. Pre-norm ends each stream
    with a layer norm and is our default, since it trains at higher learning rates without warm-up trouble.
    """

    def __init__(self, width: int, depth: int, num_heads: int, pre_norm: bool, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.text_layers = nn.ModuleList(CoAttentionLayer(width, num_heads, pre_norm, dropout) for _ in range(depth))
        self.image_layers = nn.ModuleList(CoAttentionLayer(width, num_heads, pre_norm, dropout) for _ in range(depth))
        self.text_norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.image_norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.apply(initialise)

    def forward(
        self, image: Float[Tensor, "b p d"], text: Float[Tensor, "b l d"], text_mask: Bool[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b p d"], Float[Tensor, "b l d"]]:
        """Fused image and text states."""
        for image_layer, text_layer in zip(self.image_layers, self.text_layers, strict=True):
            image, text = (
                image_layer(image, None, text, text_mask),
                text_layer(text, text_mask, image, None),
            )
        return self.image_norm(image), self.text_norm(text)
