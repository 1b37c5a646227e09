"""A language encoder from outside, with its tokenizer: words and their place, and nothing that mixes them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vlm.models.language.tokenizer import Tokenizer

VOCABULARY_SIZE = 256


class WordBag(nn.Module):
    def __init__(self, width: int = 64, max_tokens: int = 50) -> None:
        super().__init__()
        self.width = width
        self.word = nn.Embedding(VOCABULARY_SIZE, width)
        self.position = nn.Embedding(max_tokens, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(1))

    def forward(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """[n l] token ids, and True at real tokens -> [n l d] states, CLS first."""
        x: Tensor = self.word(text_ids) + self.position(torch.arange(text_ids.shape[1], device=text_ids.device))
        for block in self.blocks:
            x = x + block(x)
        return x

    @staticmethod
    def build_tokenizer(texts: Path, max_tokens: int) -> Tokenizer:
        """`texts`: the unpaired texts of the data root, one a line."""
        return Tokenizer.from_words(texts, VOCABULARY_SIZE, max_tokens)
