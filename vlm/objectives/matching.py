"""Image-text matching: is this the text of this image?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.errors import UserError
from vlm.models.vision_language import VisionLanguageModel
from vlm.objectives.objective import Objective
from vlm.types import Batch, Encoded, Items, Loss, View

if TYPE_CHECKING:
    from vlm.objectives import MatchingConfig


class Matching(Objective):
    """Cross-entropy over matched and mismatched pairs; the text is whole unless the config says `text=masked`.

    In-batch negatives give a text the image of another example of the same micro-batch, so no image is encoded twice.
    They stay inside the micro-batch: a uniform draw from the ranks' union has the same distribution, and a run on
    one process then equals a run on several. `random` negatives are extra images that the loader appends to the batch.
    An example without a text is left out: nothing there could match or not.

    `hard` negatives are those that the run's contrastive objective takes for alike: each text meets its own image, an
    image of another example and its image the text of another, both drawn in proportion to the softmax of the
    similarities in this very step (ALBEF, arXiv 2107.07651, section 3.2), so nothing is encoded for the choice. Two
    pairs in three are then mismatched. An example that comes twice in the batch is no negative of itself.
    """

    def __init__(self, config: MatchingConfig, model: VisionLanguageModel) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Linear(2 * model.width, 2)

    def view(self, batch: Batch) -> View:
        assert batch.text_ids is not None and batch.image is not None
        if self.config.negatives == "hard":
            return self._hard_view(batch)
        count, device = len(batch.text_ids), batch.text_ids.device
        num_negatives = round(self.config.negative_fraction * count) if count > 1 else 0
        chosen = torch.randperm(count, device=device)[:num_negatives]
        image_index = torch.arange(count, device=device)
        if self.config.negatives == "random":  # the loader appended an extra image for each negative
            image_index[chosen] = torch.arange(count, count + num_negatives, device=device)
        else:
            image_index[chosen] = (chosen + torch.randint(1, max(count, 2), chosen.shape, device=device)) % count
        matched = image_index == torch.arange(count, device=device)
        matched |= same_key(batch)[torch.arange(count, device=device), image_index]
        rows = rows_with_text(batch)
        if rows is not None:
            image_index, matched = image_index[rows], matched[rows]
        targets = {"matched": matched} | ({} if rows is None else {"rows": rows})
        return View("pair", batch.text_ids, batch.text_mask, text_index=rows, image_index=image_index, targets=targets)

    def _hard_view(self, batch: Batch) -> View:
        """How many pairs there are follows from the keys; which they are, `_choose` says once there are states."""
        assert batch.text_ids is not None
        count = len(batch.text_ids)
        other, rows = ~same_key(batch)[:, :count], rows_with_text(batch)
        rows = torch.arange(count, device=other.device) if rows is None else rows
        others_text = torch.zeros_like(other).index_fill(0, rows, True) & other
        with_image, with_text = rows[other[rows].any(1)], rows[others_text.any(0)[rows]]
        matched = torch.zeros(len(rows) + len(with_image) + len(with_text), dtype=torch.bool, device=other.device)
        matched[: len(rows)] = True
        targets = {"matched": matched, "rows": rows, "others_image": other, "others_text": others_text}
        targets |= {"with_image": with_image, "with_text": with_text}
        return View("pair", batch.text_ids, batch.text_mask, targets=targets)

    def _choose(self, view: View, contrast: View, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Text and image of each pair: the matched ones, then hard images of texts, then hard texts of images."""
        targets = view.targets
        rows, with_image, with_text = (targets[name] for name in ("rows", "with_image", "with_text"))
        if not len(rows):
            return rows, rows
        assert contrast.similarity is not None
        similarity = contrast.similarity(encoded).float()
        images = draw(similarity[with_image], targets["others_image"][with_image])
        texts = draw(similarity.T[with_text], targets["others_text"].T[with_text])
        return torch.cat([rows, with_image, texts]), torch.cat([rows, images, with_text])

    def beside(self, view: View, others: Mapping[str, View]) -> View:
        if self.config.negatives == "hard":
            contrast = next((other for other in others.values() if other.similarity is not None), None)
            if contrast is None:
                raise UserError("objectives: matching with negatives=hard needs a contrastive objective beside it")
            view = replace(view, chosen_from=contrast, choose=partial(self._choose, view, contrast))
        if self.config.text == "whole":
            return view
        masked = next(other for other in others.values() if other.kind == "pair" and "predicted" in other.targets)
        return replace(view, text_ids=masked.text_ids)

    def count(self, view: View) -> int:
        return len(view.targets["matched"])

    def loss(self, view: View, encoded: Encoded) -> Loss:
        logits, matched = self.head(encoded.pooled).float(), view.targets["matched"].long()
        if not len(matched):  # no text in the batch; a mean over nothing would poison the weights
            return Loss(logits.sum(), 0, {"accuracy": torch.zeros((), device=logits.device)})
        correct = logits.argmax(-1) == matched

        def items() -> Items:
            rows = torch.arange(len(matched), device=matched.device) if view.text_index is None else view.text_index
            return Items(rows, F.cross_entropy(logits.detach(), matched, reduction="none"), correct)

        return Loss(F.cross_entropy(logits, matched), len(matched), {"accuracy": correct.float().mean()}, items)


def draw(logits: Float[Tensor, "n m"], allowed: Bool[Tensor, "n m"]) -> Int[Tensor, " n"]:
    """One of the allowed columns for each row, in proportion to the softmax of its logits.

    By Gumbel's trick, which neither waits for the device nor stops it at a value that is not a number, as
    `torch.multinomial` does.
    """
    noise = -torch.empty_like(logits).exponential_().log()
    return (logits + noise).masked_fill(~allowed, -torch.inf).argmax(-1)


def rows_with_text(batch: Batch) -> Int[Tensor, " n"] | None:
    """The rows of the batch whose image has a text; None where all have one."""
    assert batch.text_ids is not None
    rows = [row for row, source in enumerate(batch.sources) if source != "none"]
    if len(rows) == len(batch.sources):
        return None
    return torch.tensor(rows, dtype=torch.long, device=batch.text_ids.device)


def same_key(batch: Batch) -> Bool[Tensor, "b n"]:
    """True where image n is the text's own: a small subset can hold an example twice in one batch."""
    assert batch.text_ids is not None
    numbers = {key: number for number, key in enumerate(dict.fromkeys(batch.keys))}
    keys = torch.tensor([numbers[key] for key in batch.keys], device=batch.text_ids.device)
    same: Tensor = keys[: len(batch.text_ids), None] == keys[None]
    return same
