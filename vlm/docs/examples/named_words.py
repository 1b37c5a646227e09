"""An objective from outside: which words will the text of this image hold? Learnt from the image alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vlm.models.language.tokenizer import Tokenizer
from vlm.models.vision_language import VisionLanguageModel
from vlm.objectives.objective import Objective
from vlm.types import Batch, Encoded, Loss, View


class NamedWords(Objective):
    def __init__(
        self, model: VisionLanguageModel, tokenizer: Tokenizer, classes: tuple[str, ...], min_length: int = 1
    ) -> None:
        """The first three are what every objective is given; the rest are `options` of the config."""
        super().__init__()
        self.min_length = min_length
        self.head = nn.Linear(int(model.vision.width), tokenizer.vocabulary_size)  # type: ignore[arg-type]

    def view(self, batch: Batch) -> View:
        """What is to be encoded: here the images alone. "pair" asks for fused states, "apart" for projected ones.

        Asked before anything is encoded, so that all objectives share one pass of each encoder.
        """
        assert batch.text_ids is not None and batch.special_mask is not None
        words = torch.zeros(len(batch.text_ids), self.head.out_features, device=batch.text_ids.device)
        words.scatter_(1, batch.text_ids * ~batch.special_mask, 1.0)
        words[:, 0] = 0  # where the special tokens went
        # An image without a text (`sources: [{type: none}]`) has nothing to name.
        rows = words.sum(1) >= self.min_length
        return View("image", targets={"words": words[rows], "rows": rows.nonzero().squeeze(1)})

    def count(self, view: View) -> int:
        """Of what the loss will be a mean: it weighs micro-batches and ranks."""
        return len(view.targets["rows"])

    def loss(self, view: View, encoded: Encoded) -> Loss:
        assert encoded.image is not None
        logits, words = self.head(encoded.image[view.targets["rows"], 0]).float(), view.targets["words"]
        if not len(words):  # a mean over nothing would poison the weights
            return Loss(logits.sum(), 0)
        found = ((logits > 0) & (words > 0)).sum() / words.sum().clamp(min=1)
        return Loss(F.binary_cross_entropy_with_logits(logits, words), len(words), {"recall": found})
