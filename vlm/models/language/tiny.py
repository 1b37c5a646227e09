"""A small BERT-like text encoder, for worlds of few words and for CPUs."""

from __future__ import annotations

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
        places = torch.arange(text_ids.shape[1], device=text_ids.device)
        x = self.embedding_norm(self.word(text_ids) + self.position(places))
        for block in self.blocks:
            x = block(x, text_mask)
        return self.norm(x)  # type: ignore[no-any-return]  # a module's call gives Any
