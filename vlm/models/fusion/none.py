"""No fusion."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn


class NoFusion(nn.Module):
    """Projected states as they are: heads read the two CLS states of encoders that never met."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(
        self, image: Float[Tensor, "b p d"], text: Float[Tensor, "b l d"], text_mask: Bool[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b p d"], Float[Tensor, "b l d"]]:
        return image, text
