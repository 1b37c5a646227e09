from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vlm.errors import UserError
from vlm.models import ModelConfig
from vlm.models.fusion import CoAttentionConfig
from vlm.models.language import TinyLanguageConfig
from vlm.models.vision import TinyVisionConfig
from vlm.models.vision_language import VisionLanguageModel
from vlm.objectives.image_classes import ImageClasses
from vlm.types import Batch, Encoded

CLASSES = ("circle", "square", "star")


def make_model() -> VisionLanguageModel:
    return ModelConfig(
        vision=TinyVisionConfig(width=8, depth=1, num_heads=2, patch_size=8, image_pixels=16),
        language=TinyLanguageConfig(width=8, depth=1, num_heads=2, vocabulary_size=16, max_tokens=8),
        fusion=CoAttentionConfig(width=8, depth=1, num_heads=2, dropout=0),
    ).build()


def outcome(logits: list[list[float]], classes: list[list[float]]) -> tuple[float, float]:
    """(loss, F1) where the head, made to copy the CLS state, gives these logits."""
    objective = ImageClasses(make_model(), CLASSES)
    with torch.no_grad():
        objective.head.weight.copy_(torch.eye(3, 8))
        objective.head.bias.zero_()
    targets = torch.tensor(classes, dtype=torch.float32)
    view = objective.view(Batch(tuple("abcd"[: len(classes)]), targets=targets))
    states = torch.randn(len(logits), 5, 8)
    states[:, 0, :3] = torch.tensor(logits, dtype=torch.float32)
    loss = objective.loss(view, Encoded(image=states))
    expected = 3 * F.binary_cross_entropy_with_logits(states[:, 0, :3], targets)
    torch.testing.assert_close(loss.value, expected)
    return float(loss.value.detach()), float(loss.figures["f1"])


def test_f1_counts_classes_over_the_whole_batch() -> None:
    # found 2 of 4 true ones, with 3 named: precision 2/3, recall 2/4
    _, f1 = outcome([[5, -5, 5], [5, -5, -5]], [[1, 1, 0], [1, 0, 1]])
    assert f1 == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))


def test_a_perfect_namer_has_an_f1_of_one() -> None:
    loss, f1 = outcome([[30, -30, 30], [-30, -30, 30]], [[1, 0, 1], [0, 0, 1]])
    assert f1 == 1.0
    assert loss < 1e-6


def test_without_any_class_f1_is_zero_and_finite() -> None:
    assert outcome([[-5, -5, -5]], [[0, 0, 0]])[1] == 0.0


def test_data_without_classes_is_refused() -> None:
    with pytest.raises(UserError, match="the data's images have no classes"):
        ImageClasses(make_model(), ())
