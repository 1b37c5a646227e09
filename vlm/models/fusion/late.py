"""Late fusion: no token reads a token of the other side; what meets is the two CLS states."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.models.transformer import FeedForward, Residual, initialise


class Late(nn.Module):
    """Perceptrons over [text CLS; image CLS]: the baseline of the fusions with attention.

    All other tokens pass through, so masked language modelling has nothing of the image to learn from. Without these
    perceptrons a linear head could only add what each side says alone, and matching would stay at chance.
    """

    def __init__(self, width: int, depth: int, pre_norm: bool, dropout: float) -> None:
        super().__init__()
        self.width = width
        both = 2 * width
        self.layers = nn.ModuleList(Residual(both, FeedForward(both, dropout), pre_norm, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(both) if pre_norm else nn.Identity()
        self.apply(initialise)

    def forward(
        self, image: Float[Tensor, "b p d"], text: Float[Tensor, "b l d"], text_mask: Bool[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b p d"], Float[Tensor, "b l d"]]:
        """The states as they came, but for the two CLS states."""
        pair = torch.cat([text[:, :1], image[:, :1]], dim=-1)
        for layer in self.layers:
            pair = layer(pair)
        text_cls, image_cls = self.norm(pair).chunk(2, dim=-1)
        return torch.cat([image_cls, image[:, 1:]], dim=1), torch.cat([text_cls, text[:, 1:]], dim=1)
