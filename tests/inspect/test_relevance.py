"""Relevance: gradients at the fusion's door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlm.config import compose
from vlm.errors import UserError
from vlm.hub import LoadedModel
from vlm.inspect.relevance import relevance
from vlm.models.heads import AnswerHead
from vlm.models.language.tokenizer import Tokenizer
from vlm.run import RunConfig, image_transform

IMAGE = Image.linear_gradient("L").convert("RGB")


@pytest.fixture(params=["vqav2", "nlvr2"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedModel:
    torch.manual_seed(0)
    small = [f"model.{part}.width=32" for part in ("vision", "language", "fusion")]
    config = compose("finetune", [*small, f"task={request.param}"], RunConfig)
    task: Any = config.task
    (tmp_path / "texts").write_text("what color is the circle")
    tokenizer = Tokenizer.from_words(tmp_path / "texts", 256, 16)
    model = config.model.build().eval()
    head = AnswerHead(task.images_per_text * 2 * model.width, 2).eval()
    return LoadedModel(
        model, image_transform(config, model, training=False), tokenizer, config, head, ("True", "False")
    )


def pictures(loaded: LoadedModel) -> list[Image.Image]:
    task: Any = loaded.config.task
    return [IMAGE.rotate(90 * number) for number in range(task.images_per_text)]


def test_relevance_is_how_the_logit_moves_when_all_states_grow(loaded: LoadedModel) -> None:
    found = relevance(loaded, pictures(loaded), "what color is the circle", "False")
    maps = [grid for grid in found.patches if grid is not None]
    assert len(maps) == len(pictures(loaded)) and all(grid.shape == (3, 3) for grid in maps)
    assert [word for word, _ in found.tokens][1:3] == ["what", "color"]
    total = sum(float(grid.sum()) for grid in maps) + sum(found.overall) + sum(value for _, value in found.tokens)

    def logit(scale: float) -> float:
        """Of "False", up to what both answers share, from its log-odds."""
        hooks = [
            module.register_forward_hook(lambda _, __, states: states * scale)
            for module in (loaded.model.vision_projection, loaded.model.language_projection)
        ]
        kept: list[torch.Tensor] = []
        assert loaded.head is not None
        hooks.append(loaded.head.register_forward_hook(lambda _, __, logits: kept.append(logits)))
        images: Any = pictures(loaded)
        loaded.answer([images[0] if len(images) == 1 else images], ["what color is the circle"])
        for hook in hooks:
            hook.remove()
        return float(kept[0][0, 1])

    assert total == pytest.approx((logit(1.01) - logit(0.99)) / 0.02, rel=0.02, abs=1e-4)


def test_only_answers_that_the_model_has_are_asked_about(loaded: LoadedModel) -> None:
    with pytest.raises(UserError, match="none of the model's 2 answers"):
        relevance(loaded, pictures(loaded), "what", "perhaps")


def test_nothing_is_left_behind(loaded: LoadedModel) -> None:
    first = relevance(loaded, pictures(loaded), "what")
    assert first.answer in loaded.answers
    assert not loaded.model.vision_projection._forward_hooks
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
