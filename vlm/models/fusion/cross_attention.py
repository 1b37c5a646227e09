"""Cross-attention: the text reads the image, and nothing reads the text."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.models.fusion.coattention import CoAttentionLayer
from vlm.models.transformer import initialise


class CrossAttention(nn.Module):
    """The text stream of co-attention alone; image states pass through.

    Source: ALBEF's multimodal encoder, arXiv 2107.07651, section 3.1. Heads see the image's own CLS state beside a text
    CLS state that has read the image.
    """

    def __init__(self, width: int, depth: int, num_heads: int, pre_norm: bool, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList(CoAttentionLayer(width, num_heads, pre_norm, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.apply(initialise)

    def forward(
        self, image: Float[Tensor, "b p d"], text: Float[Tensor, "b l d"], text_mask: Bool[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b p d"], Float[Tensor, "b l d"]]:
        """Image states as they came, and fused text states."""
        for layer in self.layers:
            text = layer(text, text_mask, image, None)
        return image, self.norm(text)
