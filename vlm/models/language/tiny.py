"""A small BERT-like text encoder, for worlds of few words and for CPUs."""

from __future__ import annotations

from collections import deque

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm.models.transformer import EncoderBlock, initialise


class TinyLanguage(nn.Module):
    """Word and position embeddings, their layer norm as in BERT, and pre-norm blocks; the first token is CLS.

    Without that norm the small initial embeddings drown in what the blocks add: the states of all words come to be
    nearly the same, and a frozen encoder gives the fusion little to tell the words apart by.
    """

    def __init__(self, width: int, depth: int, num_heads: int, vocabulary_size: int, max_tokens: int) -> None:
        super().__init__()
        self.width = width
        self.vocabulary_size = vocabulary_size
        self.word = nn.Embedding(vocabulary_size, width)
        self.position = nn.Embedding(max_tokens, width)
        self.embedding_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(EncoderBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.apply(initialise)

    def forward(self, text_ids: Int[Tensor, "n l"], text_mask: Bool[Tensor, "n l"]) -> Float[Tensor, "n l d"]:
        return self.layers(text_ids, text_mask, 1)[0]

    def layers(
        self, text_ids: Int[Tensor, "n l"], text_mask: Bool[Tensor, "n l"], count: int
    ) -> tuple[Float[Tensor, "n l d"], ...]:
        """States after each of the last `count` blocks, through the final norm; the last is what `forward` gives."""
        states: deque[Tensor] = deque(maxlen=count)
        places = torch.arange(text_ids.shape[1], device=text_ids.device)
        x = self.embedding_norm(self.word(text_ids) + self.position(places))
        for block in self.blocks:
            x = block(x, text_mask)
            states.append(x)
        return tuple(self.norm(x) for x in states)
