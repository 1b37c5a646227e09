"""Relevance: gradients at the fusion's door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import register
from PIL import Image

from vlm.config import compose
from vlm.errors import UserError
from vlm.hub import LoadedModel
from vlm.inspect.relevance import relevance
from vlm.models.heads import AnswerHead
from vlm.models.language.tokenizer import Tokenizer
from vlm.run import RunConfig, image_transform

IMAGE = Image.linear_gradient("L").convert("RGB")


FUSIONS = {
    "coattention": "nlvr2",
    "merged": "vqav2",
    "cross_attention": "vqav2",
    "bridges": "nlvr2",
    "qformer": "vqav2",
    "perceiver": "nlvr2",
    "late": "vqav2",
    "none": "vqav2",
}


def built(fusion: str, folder: Path, *overrides: str) -> LoadedModel:
    """An untrained model of two layers."""
    torch.manual_seed(0)
    small = [f"model.{part}.{key}" for part in ("vision", "language") for key in ("width=32", "depth=2")]
    sizes = {"none": "", "late": ", depth: 2"}.get(fusion, ", depth: 2, num_heads: 2")
    wanted = [f"model.fusion={{type: {fusion}, width: 32{sizes}}}", f"task={FUSIONS[fusion]}"]
    config = compose("finetune", [*small, *wanted, *overrides], RunConfig)
    task: Any = config.task
    (folder / "texts").write_text("what color is the circle")
    tokenizer = Tokenizer.from_words(folder / "texts", 256, 16)
    model = config.model.build().eval()
    head = AnswerHead(task.images_per_text * 2 * model.width, 2).eval()
    return LoadedModel(
        model, image_transform(config, model, training=False), tokenizer, config, head, ("True", "False")
    )


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return built("coattention", tmp_path_factory.mktemp("model"))


def pictures(loaded: LoadedModel) -> list[Image.Image]:
    task: Any = loaded.config.task
    return [IMAGE.rotate(90 * number) for number in range(task.images_per_text)]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_relevance_is_how_the_logit_moves_when_all_states_grow(fusion: str, tmp_path: Path) -> None:
    loaded = built(fusion, tmp_path)
    found = relevance(loaded, pictures(loaded), "what color is the circle", "False")
    maps = [grid for grid in found.patches if grid is not None]
    assert len(maps) == len(pictures(loaded)) and all(grid.shape == (3, 3) for grid in maps)
    assert all(bool(grid.any()) == (fusion not in ("late", "none")) for grid in maps)  # these read CLS alone
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


@pytest.mark.parametrize(
    ("kind", "name", "pixels", "side"),
    [
        ("timm", "test_vit.r160_in1k", 48, 3),
        ("timm", "test_vit2.r160_in1k", 48, 3),  # a register, and a pooled state before it
        ("timm", "test_convnext.r160_in1k", 96, 3),
        ("open_clip", "tiny-clip", 24, 3),
        ("open_clip", "tiny-siglip", 64, 4),
    ],
)
def test_maps_have_the_encoders_grid(kind: str, name: str, pixels: int, side: int, tmp_path: Path) -> None:
    if kind == "open_clip":
        pytest.importorskip("open_clip")
        register(tmp_path)
    vision = f"model.vision={{type: {kind}, name: {name}, pretrained: false, image_pixels: {pixels}}}"
    loaded = built("coattention", tmp_path, vision)
    found = relevance(loaded, pictures(loaded), "what")
    assert [grid is not None and grid.shape for grid in found.patches] == [(side, side)] * 2
    assert all(grid is not None and bool((grid != 0).all()) for grid in found.patches)


def test_only_answers_that_the_model_has_are_asked_about(loaded: LoadedModel) -> None:
    with pytest.raises(UserError, match="none of the model's 2 answers"):
        relevance(loaded, pictures(loaded), "what", "perhaps")


def test_nothing_is_left_behind(loaded: LoadedModel) -> None:
    first = relevance(loaded, pictures(loaded), "what")
    assert first.answer in loaded.answers
    assert not loaded.model.vision_projection._forward_hooks
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
