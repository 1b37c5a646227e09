"""Image-text contrast between the projected states of the two encoders, before any fusion."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm.objectives.matching import same_key
from vlm.objectives.objective import Objective
from vlm.types import Batch, Encoded, Loss, View

if TYPE_CHECKING:
    from vlm.objectives import ContrastiveConfig

MAX_SCALE = 100.0  # CLIP's bound on the inverse temperature, arXiv 2103.00020, section 2.5


class Contrastive(Objective):
    """Symmetric cross-entropy over the similarities of all images and texts of the micro-batch.

    Align before fuse (ALBEF, arXiv 2107.07651), but between means of all projected tokens rather than CLS tokens: the
    very states that the fusion attends to come to lie in one space.
    """

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    def view(self, batch: Batch) -> View:
        assert batch.special_mask is not None
        same = same_key(batch)[:, : len(batch.special_mask)]
        again = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
        return View("apart", batch.text_ids, batch.text_mask, targets={"words": ~batch.special_mask, "again": again})

    def loss(self, view: View, encoded: Encoded) -> Loss:
        words = view.targets["words"].unsqueeze(-1)
        text = (cast(Tensor, encoded.text) * words).sum(1) / words.sum(1).clamp(min=1)
        image = cast(Tensor, encoded.image)[: len(text), 1:].mean(1)  # beyond them lie images drawn as negatives
        scale = self.log_scale.exp().clamp(max=MAX_SCALE)
        similarity = scale * F.normalize(text.float(), dim=-1) @ F.normalize(image.float(), dim=-1).T
        similarity = similarity.masked_fill(view.targets["again"], -math.inf)  # an example is no negative of itself
        own = torch.arange(len(text), device=text.device)
        loss = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
        return Loss(loss, len(text), {"accuracy": (similarity.argmax(-1) == own).float().mean()})
