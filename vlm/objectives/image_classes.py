"""Supervised pretraining of the vision encoder alone: which of the classes are in the image?"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from vlm.errors import UserError
from vlm.models.vision_language import VisionLanguageModel
from vlm.objectives.objective import Objective
from vlm.types import Batch, Encoded, Loss, View


class ImageClasses(Objective):
    """Binary cross-entropy over all classes from the vision encoder's CLS state; an image may have several."""

    def __init__(self, model: VisionLanguageModel, classes: tuple[str, ...]) -> None:
        super().__init__()
        if not classes:
            raise UserError("objectives.image_classes: the data's images have no classes")
        self.head = nn.Linear(int(cast(int, model.vision.width)), len(classes))

    def view(self, batch: Batch) -> View:
        assert batch.targets is not None
        return View("image", targets={"classes": batch.targets})

    def count(self, view: View) -> int:
        return len(view.targets["classes"])

    def loss(self, view: View, encoded: Encoded) -> Loss:
        assert encoded.image is not None
        logits, classes = self.head(encoded.image[:, 0]).float(), view.targets["classes"]
        predicted, true = logits > 0, classes > 0.5
        found = (predicted & true).sum()
        f1 = 2 * found / (predicted.sum() + true.sum()).clamp(min=1)
        loss = F.binary_cross_entropy_with_logits(logits, classes)
        return Loss(loss * logits.shape[1], len(logits), {"f1": f1.to(torch.float32)})
