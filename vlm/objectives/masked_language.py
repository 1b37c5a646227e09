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
from vlm.types import Batch, Encoded, Items, Loss, View

if TYPE_CHECKING:
    from vlm.objectives import MaskedLanguageConfig


def mask_tokens(
    ids: Int[Tensor, "b l"],
    special: Bool[Tensor, "b l"],
    fraction: float,
    mask_id: int,
    vocabulary_size: int,
    word_starts: Int[Tensor, "b l"] | None = None,
) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
    """Masked ids and the positions to predict: `fraction` of real tokens and at least one a text.

    Of those, 80% become the mask token, 10% a random one and 10% stay (Devlin et al., arXiv 1810.04805, section 3.1).

    `word_starts`: where each token's word begins; then `fraction` of the words, each with all of its tokens. Which of
    the 80/10/10 befalls a token is drawn token by token, as in the authors' code (Cui et al., arXiv 1906.08101).
    """
    draw = torch.rand(ids.shape, device=ids.device)
    if word_starts is not None:
        draw = draw.gather(1, word_starts)
    draw = draw.masked_fill(special, 2.0)
    predicted = draw < fraction
    rows = torch.arange(len(ids), device=ids.device)
    lowest = draw.argmin(dim=1)
    predicted[rows, lowest] |= draw[rows, lowest] < 2.0  # a short text would often have nothing to predict
    if word_starts is not None:
        predicted = predicted.gather(1, word_starts)  # the other tokens of that word; the first is the lowest
    choice = torch.rand(ids.shape, device=ids.device)
    random_ids = torch.randint(vocabulary_size, ids.shape, device=ids.device)
    masked = torch.where(predicted & (choice < 0.8), mask_id, ids)
    masked = torch.where(predicted & (choice >= 0.9), random_ids, masked)
    return masked, predicted


def mask_labels(
    ids: Int[Tensor, "b l"],
    label_tokens: Bool[Tensor, "b labels l"],
    fraction: float,
    mask_id: int,
    vocabulary_size: int,
    released: bool = False,
) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
    """Masked ids and the positions to predict: all tokens of k = max(1, round(fraction * n)) of a text's n labels.

    A label is hidden as a whole: one draw of 80/10/10 for all its tokens. A text without labels has nothing to predict
    here. Labels that were cut off do not count.

    `released`: how the reference paper's code counts (arXiv 2211.00262). There k = round(fraction * n); a text with
    k = 0 gets none, and every text behind it in the batch exactly one. The paper's numbers come from that; here it
    serves to reproduce them: what a text loses depends on its neighbours, and most labels are never asked for. Each
    token of a label has a draw of 80/10/10 of its own, so that a label of several tokens can be left in part. That code
    also matches a label as a substring, which is `label_tokens`' affair (`label_spans`).
    """
    there = label_tokens.any(-1)
    num_labels = there.sum(1)
    count = (fraction * num_labels.double()).round().long()  # half to even, as Python rounds
    if released:
        empty = ((count == 0) & (num_labels > 0)).long()
        behind = empty.cumsum(0) > empty
        count = torch.where(behind, 1, count)
    else:
        count = count.clamp(min=1)
    draw = torch.rand(there.shape, device=ids.device).masked_fill(~there, 2.0)
    chosen = there & (draw.argsort(1).argsort(1) < count[:, None])
    choice = torch.rand(there.shape, device=ids.device)
    of_token = torch.where(label_tokens & chosen[..., None], choice[..., None], -1.0)
    of_token = torch.cat([of_token, of_token.new_full((len(ids), 1, ids.shape[1]), -1.0)], dim=1).amax(1)
    if released:
        of_token = torch.where(of_token >= 0, torch.rand(ids.shape, device=ids.device), of_token)
    random_ids = torch.randint(vocabulary_size, ids.shape, device=ids.device)
    masked = torch.where((of_token >= 0) & (of_token < 0.8), mask_id, ids)
    return torch.where(of_token >= 0.9, random_ids, masked), of_token >= 0


class MaskedLanguage(Objective):
    """Cross-entropy over masked tokens; vocabulary logits are computed at those positions only.

    With `masking=whole_word` a word is hidden with all of its tokens. With `masking=whole_label`, texts that are lists
    of labels lose whole labels and all others tokens, as before. A text without words has nothing to predict and adds
    nothing to the loss.
    """

    distils = True

    def __init__(self, config: MaskedLanguageConfig, model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        self.mask_id = tokenizer.mask_id
        self.vocabulary_size = tokenizer.vocabulary_size
        width = model.width if config.with_image else int(cast(int, model.language.width))
        self.head = VocabularyHead(width, tokenizer.vocabulary_size)

    def view(self, batch: Batch) -> View:
        assert batch.text_ids is not None and batch.special_mask is not None
        starts = None
        if self.config.masking == "whole_word":
            starts = batch.word_starts
            if starts is None:
                raise ValueError("masking=whole_word needs a batch that says where words begin")
        special, share = batch.special_mask, self.config.mask_fraction
        masked, predicted = mask_tokens(batch.text_ids, special, share, self.mask_id, self.vocabulary_size, starts)
        if self.config.masking == "whole_label" and batch.label_tokens is not None:
            released = self.config.label_masking == "released"
            fraction, tokens = self.config.mask_fraction, batch.label_tokens
            labels = mask_labels(batch.text_ids, tokens, fraction, self.mask_id, self.vocabulary_size, released)
            is_list = tokens.flatten(1).any(1)[:, None]
            masked, predicted = torch.where(is_list, labels[0], masked), torch.where(is_list, labels[1], predicted)
        targets = {"predicted": predicted, "ids": batch.text_ids[predicted]}
        if not self.config.with_image:
            return View("text", masked, batch.text_mask, targets=targets)
        own = None  # all images, unless the loader appended some as another objective's negatives
        if batch.image is not None and len(batch.image) > len(masked):
            own = torch.arange(len(masked), device=masked.device)
        return View("pair", masked, batch.text_mask, image_index=own, targets=targets)

    def count(self, view: View) -> int:
        return len(view.targets["ids"])

    def loss(self, view: View, encoded: Encoded) -> Loss:
        assert encoded.text is not None
        logits = self.head(encoded.text[view.targets["predicted"]])
        ids = view.targets["ids"]
        if not len(ids):  # no text has a word; a mean over nothing would poison the weights
            return Loss(logits.float().sum(), 0, {"accuracy": torch.zeros((), device=logits.device)})
        correct = logits.argmax(-1) == ids

        def items() -> Items:
            rows = view.targets["predicted"].nonzero()[:, 0]
            return Items(rows, F.cross_entropy(logits.detach().float(), ids, reduction="none"), correct)

        value = F.cross_entropy(logits.float(), ids)
        if "soft" in view.targets:
            alpha, soft = view.targets["alpha"], view.targets["soft"]
            value = (1 - alpha) * value + alpha * F.cross_entropy(logits.float(), soft)
        return Loss(value, len(ids), {"accuracy": correct.float().mean()}, items)

    def teach(self, view: View, encoded: Encoded) -> dict[str, Tensor]:
        """A distribution over the vocabulary for each masked token."""
        assert encoded.text is not None
        return {"soft": self.head(encoded.text[view.targets["predicted"]]).float().softmax(-1)}
