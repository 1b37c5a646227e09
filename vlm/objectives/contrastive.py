"""Image-text contrast between the projected states of the two encoders, before any fusion."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.objectives.matching import rows_with_text, same_key
from vlm.objectives.objective import Objective
from vlm.types import Batch, Encoded, Items, Loss, View

if TYPE_CHECKING:
    from vlm.objectives import ContrastiveConfig

MAX_SCALE = 100.0  # CLIP's bound on the inverse temperature, arXiv 2103.00020, section 2.5


class Contrastive(Objective):
    """Symmetric cross-entropy over the similarities of all images and texts of the micro-batch.

    Align before fuse (ALBEF, arXiv 2107.07651), but between means of all projected tokens rather than CLS tokens: the
    very states that the fusion attends to come to lie in one space. An image without a text is a negative of the other
    texts and nothing else.
    """

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    def view(self, batch: Batch) -> View:
        assert batch.special_mask is not None
        same = same_key(batch)[:, : len(batch.special_mask)]
        again = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        rows = rows_with_text(batch)
        targets = {"words": ~batch.special_mask, "again": again} | ({} if rows is None else {"rows": rows})
        return View("apart", batch.text_ids, batch.text_mask, targets=targets)

    def count(self, view: View) -> int:
        return len(view.targets.get("rows", view.targets["words"]))

    def loss(self, view: View, encoded: Encoded) -> Loss:
        words = view.targets["words"].unsqueeze(-1)
        text = (cast(Tensor, encoded.text) * words).sum(1) / words.sum(1).clamp(min=1)
        image = cast(Tensor, encoded.image)[: len(text), 1:].mean(1)  # beyond them lie images drawn as negatives
        scale = self.log_scale.exp().clamp(max=MAX_SCALE)
        similarity = scale * F.normalize(text.float(), dim=-1) @ F.normalize(image.float(), dim=-1).T
        similarity = similarity.masked_fill(view.targets["again"], -math.inf)  # an example is no negative of itself
        own = place = torch.arange(len(text), device=text.device)  # an image's column, and its own text's place
        of_image = similarity.T
        rows = view.targets.get("rows")
        if rows is not None:
            own, place = rows, own[: len(rows)]
            similarity, of_image = similarity[rows], of_image[rows][:, rows]
        if not len(own):  # no text in the batch; a mean over nothing would poison the weights
            return Loss(similarity.sum(), 0, {"accuracy": torch.zeros((), device=text.device)})
        correct = similarity.argmax(-1) == own

        def items() -> Items:
            both = [(similarity.detach(), own), (of_image.detach(), place)]
            losses = [F.cross_entropy(logits, target, reduction="none") for logits, target in both]
            return Items(own, (losses[0] + losses[1]) / 2, correct)

        loss = (F.cross_entropy(similarity, own) + F.cross_entropy(of_image, place)) / 2
        return Loss(loss, len(own), {"accuracy": correct.float().mean()}, items)
