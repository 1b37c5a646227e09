"""Captioning: a small causal decoder that writes the text, word by word, from the states of its image."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.models.language.tokenizer import Tokenizer
from vlm.models.transformer import Attention, FeedForward, Residual, initialise
from vlm.models.vision_language import VisionLanguageModel
from vlm.objectives.matching import rows_with_text
from vlm.objectives.objective import Objective
from vlm.types import Batch, Encoded, Items, Loss, View

if TYPE_CHECKING:
    from vlm.objectives import CaptioningConfig

HEAD_WIDTH = 64  # of each attention head, as in BERT; a width that it does not divide gets wider heads


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the image, feed-forward."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Residual(width, Attention(width, num_heads, dropout, causal=True), True, dropout)
        self.cross_attention = Residual(width, Attention(width, num_heads, dropout), True, dropout)
        self.feed_forward = Residual(width, FeedForward(width, dropout), True, dropout)

    def forward(self, x: Float[Tensor, "n l d"], image: Float[Tensor, "n p d"]) -> Float[Tensor, "n l d"]:
        x = self.cross_attention(self.self_attention(x), image)
        return self.feed_forward(x)  # type: ignore[no-any-return]  # a module's call gives Any


class Captioning(Objective):
    """Cross-entropy over the next token of each text, the end included.

    The decoder has word embeddings of its own, whose matrix is the output layer too, and reads the projected states of
    the image. It takes nothing from the language encoder or the fusion, which see the whole text. What it teaches the
    model lies in the vision encoder and its projection. An image without a text is left out, and logits are
    computed at the positions of the loss alone. Source: the captioning decoder of CoCa, arXiv 2205.01917, made small.
    """

    def __init__(self, config: CaptioningConfig, model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        width = model.width
        num_heads = next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)
        self.word = nn.Embedding(tokenizer.vocabulary_size, width)
        self.position = nn.Embedding(tokenizer.max_tokens, width)
        self.dropout = nn.Dropout(config.dropout)
        self.image_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(DecoderBlock(width, num_heads, config.dropout) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.output_bias = nn.Parameter(torch.zeros(tokenizer.vocabulary_size))
        self.apply(initialise)

    def view(self, batch: Batch) -> View:
        assert batch.text_ids is not None and batch.text_mask is not None
        rows = rows_with_text(batch)
        rows = torch.arange(len(batch.text_ids), device=batch.text_ids.device) if rows is None else rows
        ids = batch.text_ids[rows]
        wanted = batch.text_mask[rows, 1:]  # at the place of each token but the last: is there a next one?
        targets = {"rows": rows, "ids": ids[:, :-1], "wanted": wanted, "following": ids[:, 1:][wanted]}
        return View("apart", targets=targets)

    def count(self, view: View) -> int:
        return len(view.targets["following"])

    def loss(self, view: View, encoded: Encoded) -> Loss:
        rows, ids, wanted, following = (view.targets[name] for name in ("rows", "ids", "wanted", "following"))
        states = self.decode(ids, cast(Tensor, encoded.image)[rows])
        logits = self.logits(states[wanted]).float()
        if not len(following):  # no text in the batch; a mean over nothing would poison the weights
            return Loss(logits.sum(), 0, {"accuracy": torch.zeros((), device=logits.device)})
        correct = logits.argmax(-1) == following

        def items() -> Items:
            losses = F.cross_entropy(logits.detach(), following, reduction="none")
            return Items(rows[wanted.nonzero()[:, 0]], losses, correct)

        value = F.cross_entropy(logits, following)
        return Loss(value, len(following), {"accuracy": correct.float().mean()}, items)

    def decode(self, ids: Int[Tensor, "n l"], image: Float[Tensor, "n p d"]) -> Float[Tensor, "n l d"]:
        """The state at each token, which knows the image and the tokens up to this one. Padding comes last."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x, image = self.dropout(self.word(ids) + self.position(places)), self.image_norm(image)
        for block in self.blocks:
            x = block(x, image)
        return self.norm(x)  # type: ignore[no-any-return]  # a module's call gives Any

    def logits(self, states: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
        return F.linear(states, self.word.weight, self.output_bias)
