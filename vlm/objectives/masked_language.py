"""Masked language modelling, over text alone or with the picture beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from vlm.models.heads import VocabularyHead
from vlm.models.language.tokenizer import Tokenizer
from vlm.models.vision_language import VisionLanguageModel
from vlm.objectives.objective import Objective
from vlm.types import Batch, Encoded, Loss, View

if TYPE_CHECKING:
    from vlm.objectives import MaskedLanguageConfig


def mask_tokens(
    ids: Int[Tensor, "b l"], special: Bool[Tensor, "b l"], fraction: float, mask_id: int, vocabulary_size: int
) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
    """Masked ids and the positions to predict: `fraction` of real tokens and at least one a text.

    Of those, 80% become the mask token, 10% a random one and 10% stay (Devlin et al., arXiv 1810.04805, section 3.1).
    """
    draw = torch.rand(ids.shape, device=ids.device).masked_fill(special, 2.0)
    predicted = draw < fraction
    rows = torch.arange(len(ids), device=ids.device)
    lowest = draw.argmin(dim=1)
    predicted[rows, lowest] |= draw[rows, lowest] < 2.0  # a short text would often have nothing to predict
    choice = torch.rand(ids.shape, device=ids.device)
    random_ids = torch.randint(vocabulary_size, ids.shape, device=ids.device)
    masked = torch.where(predicted & (choice < 0.8), mask_id, ids)
    masked = torch.where(predicted & (choice >= 0.9), random_ids, masked)
    return masked, predicted


class MaskedLanguage(Objective):
    """Cross-entropy over masked tokens; vocabulary logits are computed at those positions only."""

    def __init__(self, config: MaskedLanguageConfig, model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        self.mask_id = tokenizer.mask_id
        self.vocabulary_size = tokenizer.vocabulary_size
        width = model.width if config.with_image else int(cast(int, model.language.width))
        self.head = VocabularyHead(width, tokenizer.vocabulary_size)

    def view(self, batch: Batch) -> View:
        assert batch.text_ids is not None and batch.special_mask is not None
        masked, predicted = mask_tokens(
            batch.text_ids, batch.special_mask, self.config.mask_fraction, self.mask_id, self.vocabulary_size
        )
        targets = {"predicted": predicted, "ids": batch.text_ids[predicted]}
        if not self.config.with_image:
            return View("text", masked, batch.text_mask, targets=targets)
        own = None  # all images, unless the loader appended some as another objective's negatives
        if batch.image is not None and len(batch.image) > len(masked):
            own = torch.arange(len(masked), device=masked.device)
        return View("pair", masked, batch.text_mask, image_index=own, targets=targets)

    def loss(self, view: View, encoded: Encoded) -> Loss:
        assert encoded.text is not None
        logits = self.head(encoded.text[view.targets["predicted"]])
        ids = view.targets["ids"]
        if not len(ids):  # no text has a word; a mean over nothing would poison the weights
            return Loss(logits.float().sum(), 0, {"accuracy": torch.zeros((), device=logits.device)})
        accuracy = (logits.argmax(-1) == ids).float().mean()
        return Loss(F.cross_entropy(logits.float(), ids), len(ids), {"accuracy": accuracy})
