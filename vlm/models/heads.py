"""Small modules between fused states and losses."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.models.transformer import initialise


class PairPooler(nn.Module):
    """[text CLS; image CLS], each through a linear layer and tanh. Source: METER, arXiv 2111.02387."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.text = nn.Linear(width, width)
        self.image = nn.Linear(width, width)
        self.apply(initialise)

    def forward(self, text: Float[Tensor, "n l d"], image: Float[Tensor, "n p d"]) -> Float[Tensor, "n 2*d"]:
        return torch.cat([self.text(text[:, 0]).tanh(), self.image(image[:, 0]).tanh()], dim=-1)


class PairStates(nn.Module):
    """[text CLS; image CLS] as the fusion gives them. Source: the released code of arXiv 2211.00262."""

    def forward(self, text: Float[Tensor, "n l d"], image: Float[Tensor, "n p d"]) -> Float[Tensor, "n 2*d"]:
        return torch.cat([text[:, 0], image[:, 0]], dim=-1)


class VocabularyHead(nn.Sequential):
    """BERT's masked-word head: linear, GELU, norm, vocabulary. Give it states at masked positions only."""

    def __init__(self, width: int, vocabulary_size: int) -> None:
        super().__init__(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, vocabulary_size))
        self.apply(initialise)


class AnswerHead(nn.Sequential):
    """Two-layer classifier over pooled pairs, twice as wide inside (METER's task head)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, num_classes)
        )
        self.apply(initialise)
