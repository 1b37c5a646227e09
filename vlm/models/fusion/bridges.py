"""Bridges: co-attention that is joined to several layers of the encoders, not only to their last."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.models.fusion.coattention import CoAttentionLayer
from vlm.models.transformer import initialise


class Bridges(nn.Module):
    """Two streams of co-attention layers; before layer i a bridge adds the states of the i-th of the encoders' layers.

    A bridge is `norm(stream + states)`; the first layer begins with the first states alone. Source: BridgeTower, arXiv
    2206.08657, section 3 (bridges of the form Add & Norm), with `pre_norm=False`. Its token type embeddings are left
    out: the streams share no weights that would have to tell them apart.
    """

    def __init__(self, width: int, depth: int, num_heads: int, pre_norm: bool, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.num_encoder_layers = depth
        self.text_bridges = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.image_bridges = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.text_layers = nn.ModuleList(CoAttentionLayer(width, num_heads, pre_norm, dropout) for _ in range(depth))
        self.image_layers = nn.ModuleList(CoAttentionLayer(width, num_heads, pre_norm, dropout) for _ in range(depth))
        self.text_norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.image_norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.apply(initialise)

    def forward(
        self, image: Float[Tensor, "b k p d"], text: Float[Tensor, "b k l d"], text_mask: Bool[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b p d"], Float[Tensor, "b l d"]]:
        """Fused image and text states, from those of the encoders' last k layers."""
        images, texts = image.unbind(1), text.unbind(1)
        fused_image, fused_text = images[0], texts[0]
        for number in range(self.num_encoder_layers):
            if number:
                fused_image, fused_text = fused_image + images[number], fused_text + texts[number]
            fused_image, fused_text = self.image_bridges[number](fused_image), self.text_bridges[number](fused_text)
            fused_image, fused_text = (
                self.image_layers[number](fused_image, None, fused_text, text_mask),
                self.text_layers[number](fused_text, text_mask, fused_image, None),
            )
        return self.image_norm(fused_image), self.text_norm(fused_text)
