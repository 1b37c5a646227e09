"""What every objective keeps to, alone and beside any others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from vlm.models import ModelConfig
from vlm.models.fusion import CoAttentionConfig
from vlm.models.language import TinyLanguageConfig
from vlm.models.language.tokenizer import Tokenizer
from vlm.models.vision import TinyVisionConfig
from vlm.objectives import (
    CaptioningConfig,
    ContrastiveConfig,
    CustomObjectiveConfig,
    DistillationConfig,
    ImageClassesConfig,
    MaskedLanguageConfig,
    MatchingConfig,
    ObjectiveConfig,
)
from vlm.training.optimizer import OptimizerConfig
from vlm.training.pretraining import Pretraining
from vlm.types import Batch, Encoded, Source

CLASSES = ("circle", "square", "star")
TEXTS = ("a red circle above a blue square", "a green star", "two yellow circles", "nothing", "three stars", "a square")
SIZE = len(TEXTS)
VISION = TinyVisionConfig(width=16, depth=1, num_heads=2, patch_size=8, image_pixels=16)
LANGUAGE = TinyLanguageConfig(width=24, depth=1, num_heads=2, vocabulary_size=48, max_tokens=16)
FUSION = CoAttentionConfig(width=32, depth=1, num_heads=4, dropout=0.1)
FORMS: dict[str, Any] = {
    "token": MaskedLanguageConfig(),
    "whole_word": MaskedLanguageConfig(masking="whole_word"),
    "whole_label": MaskedLanguageConfig(masking="whole_label"),
    "text_alone": MaskedLanguageConfig(with_image=False),
    "in_batch": MatchingConfig(),
    "random": MatchingConfig(negatives="random"),
    "hard": MatchingConfig(negatives="hard"),
    "clip": ContrastiveConfig(),
    "siglip": ContrastiveConfig(loss="siglip", temperature=0.1),
    "captioning": CaptioningConfig(),
    "image_classes": ImageClassesConfig(),
}
DISTILLED = ("token", "whole_word", "whole_label", "text_alone", "clip", "siglip")
FAMILIES = (
    (None, "token", "text_alone"),
    (None, "in_batch", "hard"),
    (None, "clip", "siglip"),
    (None, "captioning"),
    (None, "image_classes"),
)
SUBSETS = [
    names
    for chosen in itertools.product(*FAMILIES)
    if (names := tuple(name for name in chosen if name))
    and ("hard" not in names or {"clip", "siglip"} & set(names))  # whose similarities it draws by
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("texts") / "train.txt"
    file.write_text("\n".join(TEXTS))
    return LANGUAGE.build_tokenizer(file)


def make_batch(tokenizer: Tokenizer, num_extra: int = 0, sources: tuple[Source, ...] = ()) -> Batch:
    generator = torch.Generator().manual_seed(1)
    texts = ["" if sources and sources[row] == "none" else text for row, text in enumerate(TEXTS)]
    ids, mask, special, starts = tokenizer.with_words(texts)
    return Batch(
        keys=tuple(f"key-{number}" for number in range(SIZE + num_extra)),
        image=torch.randint(256, (SIZE + num_extra, 3, 16, 16), dtype=torch.uint8, generator=generator),
        text_ids=ids,
        text_mask=mask,
        special_mask=special,
        label_tokens=(~special)[:, None],
        word_starts=starts,
        targets=torch.randint(2, (SIZE + num_extra, len(CLASSES)), generator=generator).float(),
        sources=sources,
    )


def build(tokenizer: Tokenizer, *names: str, distillation: DistillationConfig | None = None) -> Pretraining:
    """The objectives beside each other. `hard` gets the contrast that it needs."""
    torch.manual_seed(0)
    model = ModelConfig(vision=VISION, language=LANGUAGE, fusion=FUSION).build()
    if "hard" in names and not {"clip", "siglip"} & set(names):
        names = (*names, "clip")
    objectives = {name: FORMS[name].build(model, tokenizer, CLASSES) for name in names}
    weights = dict.fromkeys(names, 1.0)
    return Pretraining(model, objectives, weights, OptimizerConfig(), 10, 0, distillation=distillation)


def batch_for(tokenizer: Tokenizer, *names: str) -> Batch:
    return make_batch(tokenizer, num_extra=SIZE // 2 if "random" in names else 0)


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The first argument of each call of `module`."""
    calls: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0]))
    yield calls
    handle.remove()


def seeded_losses(module: Pretraining, batch: Batch, training: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return module.losses_of(batch, training=training)


def test_every_member_of_the_union_is_here() -> None:
    members = set(get_args(get_args(ObjectiveConfig)[0])) - {CustomObjectiveConfig}
    assert {type(form) for form in FORMS.values()} == members


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_any_subset_trains_with_one_pass_of_the_images_and_of_each_distinct_text(
    tokenizer: Tokenizer, names: tuple[str, ...]
) -> None:
    module, batch = build(tokenizer, *names), make_batch(tokenizer)
    model = module.model
    with inputs_of(model.vision) as images, inputs_of(model.language) as texts, inputs_of(model.fusion) as pairs:
        loss = module.losses_of(batch, training=True)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert [len(call) for call in images] == [SIZE] * (names != ("text_alone",))
    assert len(texts) <= 1 and len(pairs) <= 1
    blocks = [tuple(block.flatten().tolist()) for call in texts for block in call.split(SIZE)]
    assert len(set(blocks)) == len(blocks)
    masks = bool({"token", "text_alone"} & set(names))
    assert len(blocks) == masks + bool({"in_batch", "hard", "clip", "siglip"} & set(names))


@pytest.mark.parametrize(
    "names", [("token", "hard", "clip", "captioning"), ("text_alone",), ("in_batch", "captioning")]
)
def test_a_teacher_costs_one_pass_more_over_what_it_teaches(tokenizer: Tokenizer, names: tuple[str, ...]) -> None:
    module, batch = build(tokenizer, *names, distillation=DistillationConfig()), make_batch(tokenizer)
    assert module.teacher is not None
    teacher = module.teacher.model
    with inputs_of(module.model.vision) as own, inputs_of(teacher.vision) as images, inputs_of(teacher.fusion) as pairs:
        module.losses_of(batch, training=True)
    with inputs_of(teacher.language) as held_out:
        module.losses_of(batch)
    taught = {"token", "clip", "text_alone"} & set(names)
    assert len(own) == (names != ("text_alone",))
    assert len(images) == bool(taught - {"text_alone"})
    assert [len(call) for call in pairs] == [SIZE] * ("token" in names)  # no pairs of matching
    assert held_out == []  # a validation is by hard targets alone


@pytest.mark.parametrize("name", FORMS)
def test_gradients_reach_every_parameter_of_the_objective(tokenizer: Tokenizer, name: str) -> None:
    module = build(tokenizer, name)
    seeded_losses(module, batch_for(tokenizer, name))[f"{name}/loss"].backward()
    named = module.objectives[name].named_parameters()
    assert [key for key, value in named if value.grad is None or not value.grad.any()] == []


@pytest.mark.parametrize("name", FORMS)
def test_a_state_dict_carries_the_objective(tokenizer: Tokenizer, name: str, tmp_path: Path) -> None:
    module, batch = build(tokenizer, name).eval(), batch_for(tokenizer, name)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    other = build(tokenizer, name).eval()
    expected, before = seeded_losses(module, batch)["loss"], seeded_losses(other, batch)["loss"]
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert not torch.equal(before, expected)
    assert torch.equal(seeded_losses(other, batch)["loss"], expected)


@pytest.mark.parametrize("name", FORMS)
def test_evaluation_gives_the_same_twice(tokenizer: Tokenizer, name: str) -> None:
    module, batch = build(tokenizer, name).eval(), batch_for(tokenizer, name)
    first, second = seeded_losses(module, batch), seeded_losses(module, batch)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", FORMS)
def test_losses_and_gradients_are_finite_in_bfloat16(tokenizer: Tokenizer, name: str) -> None:
    distillation = DistillationConfig() if name in DISTILLED else None
    module, batch = build(tokenizer, name, distillation=distillation), batch_for(tokenizer, name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = seeded_losses(module, batch, training=True)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", [name for name in FORMS if name != "image_classes"])
def test_a_batch_without_any_text_costs_nothing(tokenizer: Tokenizer, name: str) -> None:
    distillation = DistillationConfig() if name in DISTILLED else None
    module = build(tokenizer, name, distillation=distillation)
    batch = make_batch(tokenizer, SIZE // 2 if name == "random" else 0, ("none",) * SIZE)
    values = seeded_losses(module, batch, training=True)
    values["loss"].backward()
    assert float(values["loss"].detach()) == 0.0
    assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("image_classes", "text_alone")])
def test_what_stands_for_an_absent_text_changes_no_loss(tokenizer: Tokenizer, name: str) -> None:
    sources: tuple[Source, ...] = ("human", "none", "machine", "human", "none", "human")
    module = build(tokenizer, name).eval()
    batch = make_batch(tokenizer, SIZE // 2 if name == "random" else 0, sources)
    expected = seeded_losses(module, batch)["loss"]
    assert torch.isfinite(expected)
    if isinstance(FORMS[name], MaskedLanguageConfig):  # which goes by the words, and an absent text has none
        return
    assert batch.text_ids is not None
    batch.text_ids[1, 1:3] = 7
    torch.testing.assert_close(seeded_losses(module, batch)["loss"], expected)


@pytest.mark.parametrize("name", FORMS)
def test_the_count_is_known_before_anything_is_encoded(tokenizer: Tokenizer, name: str) -> None:
    module, batch = build(tokenizer, name), batch_for(tokenizer, name)
    views = module.views_of(batch)
    encoded = dict(zip(views, module.model.encode(batch.image, list(views.values())), strict=True))
    objective: Any = module.objectives[name]
    loss = objective.loss(views[name], encoded[name])
    assert loss.count == objective.count(views[name]) > 0
    if loss.items is not None:
        items = loss.items()
        assert len(items.loss) == len(items.row) == loss.count
        torch.testing.assert_close(items.loss.mean(), loss.value.detach())


@pytest.mark.parametrize("name", ["token", "in_batch", "captioning", "siglip", "clip", "image_classes"])
def test_training_on_one_batch_takes_the_loss_towards_nothing(tokenizer: Tokenizer, name: str) -> None:
    """A model of its size learns six pairs by heart: what remains of the loss is no part of its form."""
    module, batch = build(tokenizer, name), batch_for(tokenizer, name)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    values = []
    for _ in range(150):
        loss = seeded_losses(module, batch, training=True)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.05 * values[0], values[::30]


def test_a_perfect_predictor_costs_nothing(tokenizer: Tokenizer) -> None:
    """Of contrast: states that are the same for a pair and orthogonal to all others, at the sharpest temperature."""
    for name in ("clip", "siglip"):
        module, batch = build(tokenizer, name), make_batch(tokenizer)
        objective: Any = module.objectives[name]
        with torch.no_grad():
            objective.log_scale.fill_(10.0)
            if name == "siglip":
                objective.bias.fill_(-50.0)
        states = torch.eye(32)[:SIZE, None]
        assert batch.text_ids is not None
        encoded = Encoded(text=states.expand(-1, batch.text_ids.shape[1], -1), image=states.expand(-1, 5, -1))
        loss = objective.loss(objective.view(batch), encoded)
        assert float(loss.value.detach()) < 1e-6
        assert float(loss.figures["accuracy"]) == 1.0
