"""The model encodes everything once, trains what is to be trained, and gives the same numbers however it is asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn

from vlm.config import Config
from vlm.models import ModelConfig
from vlm.models.fusion import CoAttentionConfig
from vlm.models.fusion.coattention import CoAttention, CoAttentionLayer
from vlm.models.language import TinyLanguageConfig
from vlm.models.language.tokenizer import Tokenizer
from vlm.models.transformer import Residual
from vlm.models.vision import TimmVisionConfig, TinyVisionConfig
from vlm.models.vision_language import VisionLanguageModel
from vlm.objectives import CustomObjectiveConfig, MaskedLanguageConfig, ObjectiveConfig
from vlm.training.optimizer import OptimizerConfig, matrices
from vlm.types import Batch, Encoded, View

SIZE = 6
CLASSES = ("circle", "square", "star")
TEXTS = (
    "a red circle above a blue square",
    "a green star",
    "two yellow circles beside one red star",
    "nothing",
    "a blue square left of a green circle",
    "three stars",
)
VISION = TinyVisionConfig(width=16, depth=1, num_heads=2, patch_size=8, image_pixels=16)
LANGUAGE = TinyLanguageConfig(width=24, depth=1, num_heads=2, vocabulary_size=48, max_tokens=16)
FUSION = CoAttentionConfig(width=32, depth=2, num_heads=4, dropout=0)
# Every member of the union, and masked language over text alone beside its form with the picture.
MEMBERS: list[Config] = [
    member() for member in get_args(get_args(ObjectiveConfig)[0]) if member is not CustomObjectiveConfig
]
OBJECTIVES = {getattr(member, "type", ""): member for member in MEMBERS}
OBJECTIVES["masked_language_alone"] = MaskedLanguageConfig(with_image=False)
SUBSETS = [names for size in range(1, len(OBJECTIVES) + 1) for names in itertools.combinations(OBJECTIVES, size)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("texts") / "train.txt"
    file.write_text("\n".join(TEXTS))
    return LANGUAGE.build_tokenizer(file)


def build(seed: int = 0, **changes: Config) -> VisionLanguageModel:
    torch.manual_seed(seed)
    return ModelConfig(**{"vision": VISION, "language": LANGUAGE, "fusion": FUSION} | changes).build()  # type: ignore[arg-type]  # pydantic checks


def make_batch(tokenizer: Tokenizer, num_extra: int = 0, pixels: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids, mask, special = tokenizer(TEXTS)
    return Batch(
        keys=tuple(f"key-{number}" for number in range(SIZE + num_extra)),
        image=torch.randint(256, (SIZE + num_extra, 3, pixels, pixels), dtype=torch.uint8, generator=generator),
        text_ids=ids,
        text_mask=mask,
        special_mask=special,
        targets=torch.randint(2, (SIZE + num_extra, len(CLASSES)), generator=generator).float(),
    )


def objectives_of(model: VisionLanguageModel, tokenizer: Tokenizer, names: Sequence[str]) -> nn.ModuleDict:
    configs: dict[str, Any] = {name: OBJECTIVES[name] for name in names}
    return nn.ModuleDict({name: config.build(model, tokenizer, CLASSES) for name, config in configs.items()})


def step(model: VisionLanguageModel, objectives: nn.ModuleDict, batch: Batch) -> Tensor:
    """The sum of the losses over one shared encoding."""
    parts: list[Any] = list(objectives.values())
    views = [objective.view(batch) for objective in parts]
    encoded = model.encode(batch.image, views)
    losses = [part.loss(view, states).value for part, view, states in zip(parts, views, encoded, strict=True)]
    return torch.stack(losses).sum()


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The first argument of each call of `module`."""
    calls: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0]))
    yield calls
    handle.remove()


def assert_equal(left: Encoded, right: Encoded) -> None:
    for name in ("text", "image", "pooled"):
        first, second = getattr(left, name), getattr(right, name)
        assert (first is None) == (second is None), name
        if first is not None:
            torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


# --- Work is shared --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_extra", [0, 3], ids=["in_batch", "extra_images"])
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_a_step_encodes_each_image_and_each_distinct_text_once(
    tokenizer: Tokenizer, names: tuple[str, ...], num_extra: int
) -> None:
    model, batch = build(), make_batch(tokenizer, num_extra)
    with (
        inputs_of(model.vision) as images,
        inputs_of(model.language) as texts,
        inputs_of(model.fusion) as pairs,
    ):
        step(model, objectives_of(model, tokenizer, names), batch)
    looks = set(names) != {"masked_language_alone"}
    assert [len(call) for call in images] == [SIZE + num_extra] * looks
    assert len(texts) <= 1 and len(pairs) <= 1
    blocks = [tuple(block.flatten().tolist()) for call in texts for block in call.split(SIZE)]
    assert len(set(blocks)) == len(blocks)  # masked language draws its own mask; the others take the whole text
    assert bool(blocks) == (not set(names) <= {"image_classes", "captioning"})  # which show the language encoder none


def test_views_that_share_a_text_share_its_pass(tokenizer: Tokenizer) -> None:
    model, batch = build(), make_batch(tokenizer)
    ids, mask = batch.text_ids, batch.text_mask
    assert ids is not None
    views = [View("text", ids, mask), View("apart", ids, mask), View("pair", ids, mask)]
    with inputs_of(model.language) as texts:
        model.encode(batch.image, views)
        model.encode(batch.image, [*views, View("pair", ids.clone(), mask)])
    assert [len(call) for call in texts] == [SIZE, 2 * SIZE]


@pytest.mark.parametrize("pre_norm", [True, False])
def test_shared_states_equal_those_of_each_view_alone(tokenizer: Tokenizer, pre_norm: bool) -> None:
    model = build(fusion=FUSION.model_copy(update={"pre_norm": pre_norm})).eval()
    batch = make_batch(tokenizer, num_extra=2)
    ids, mask = batch.text_ids, batch.text_mask
    assert ids is not None
    texts, images = torch.tensor([0, 0, 5, 2]), torch.tensor([7, 1, 1, 0])
    own = torch.arange(SIZE)
    views = [
        View("pair", ids, mask, image_index=own),
        View("image"),
        View("text", ids, mask),
        View("pair", ids, mask, text_index=texts, image_index=images),
        View("apart", ids, mask),
        View("pair", ids.flip(0), mask.flip(0) if mask is not None else None, image_index=own),
    ]
    with torch.no_grad():
        together = model.encode(batch.image, views)
        for view, states in zip(views, together, strict=True):
            assert_equal(states, model.encode(batch.image, [view])[0])


def test_a_pair_is_its_text_with_its_image(tokenizer: Tokenizer) -> None:
    model, batch = build().eval(), make_batch(tokenizer)
    ids, mask, image = batch.text_ids, batch.text_mask, batch.image
    assert ids is not None and mask is not None and image is not None
    texts, images = torch.tensor([4, 4, 1]), torch.tensor([0, 5, 5])
    with torch.no_grad():
        pairs = model.encode(image, [View("pair", ids, mask, text_index=texts, image_index=images)])[0]
        plain = model.encode(image[images], [View("pair", ids[texts], mask[texts])])[0]
    assert_equal(pairs, plain)


def test_one_text_with_all_images_equals_its_pairs(tokenizer: Tokenizer) -> None:
    model, batch = build().eval(), make_batch(tokenizer)
    ids, mask, image = batch.text_ids, batch.text_mask, batch.image
    assert ids is not None and mask is not None and image is not None
    with torch.no_grad():
        view = View("pair", ids, mask, text_index=torch.full((SIZE,), 2), image_index=torch.arange(SIZE))
        expected = model.encode(image, [view])[0].pooled
        projected = model.vision_projection(model.encode_image(image))
        pooled = model.fuse_all(projected, model.encode_text(ids[2:3], mask[2:3]), mask[2:3])
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_images_in_turn_meet_the_text_as_the_one_before_left_it(tokenizer: Tokenizer, pre_norm: bool) -> None:
    model = build(fusion=FUSION.model_copy(update={"pre_norm": pre_norm})).eval()
    batch = make_batch(tokenizer, num_extra=SIZE)
    ids, mask, image = batch.text_ids, batch.text_mask, batch.image
    assert ids is not None and mask is not None and image is not None
    apart = [View("pair", ids, mask, image_index=torch.arange(SIZE) + first) for first in (0, SIZE)]
    with torch.no_grad():
        first, second = model.encode(image, apart)
        pooled = model.pool_in_turn(image, ids, mask)
        states = model.vision_projection(model.encode_image(image[SIZE:]))
        fused_image, fused_text = model.fusion(states, first.text, mask)
        expected = model.pooler(fused_text, fused_image)
    assert first.pooled is not None and second.pooled is not None
    torch.testing.assert_close(pooled[0], first.pooled, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled[1], expected, atol=1e-5, rtol=0)
    assert (pooled[1] - second.pooled).abs().max() > 1e-2  # and that is not the pair alone


def test_without_a_pooler_a_pair_is_its_two_cls_states(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = ModelConfig(vision=VISION, language=LANGUAGE, fusion=FUSION, pooler="none").build().eval()
    batch = make_batch(tokenizer)
    with torch.no_grad():
        encoded = model.encode(batch.image, [View("pair", batch.text_ids, batch.text_mask)])[0]
    assert encoded.text is not None and encoded.image is not None
    assert torch.equal(encoded.pooled, torch.cat([encoded.text[:, 0], encoded.image[:, 0]], dim=-1))  # type: ignore[arg-type]
    assert not list(model.pooler.parameters())


def test_a_view_of_images_needs_images(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="the batch has none"):
        build().encode(None, [View("image")])


def test_shapes_in_signatures_are_checked_in_tests(tokenizer: Tokenizer) -> None:
    ids, mask, _ = tokenizer(TEXTS)
    with pytest.raises(TypeCheckError):
        build().encode_text(ids, mask[:, 1:])


# --- Padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre_norm", [True, False])
def test_padding_changes_no_other_output(tokenizer: Tokenizer, pre_norm: bool) -> None:
    model = build(fusion=FUSION.model_copy(update={"pre_norm": pre_norm})).eval()
    batch = make_batch(tokenizer)
    ids, mask = batch.text_ids, batch.text_mask
    assert ids is not None and mask is not None
    padding = torch.full((SIZE, 5), tokenizer.pad_id)
    longer = View("pair", torch.cat([ids, padding], 1), torch.cat([mask, torch.zeros_like(padding).bool()], 1))
    with torch.no_grad():
        expected, padded = (
            model.encode(batch.image, [View("pair", ids, mask)])[0],
            model.encode(batch.image, [longer])[0],
        )
    assert padded.text is not None and expected.text is not None
    torch.testing.assert_close(padded.text[:, : ids.shape[1]][mask], expected.text[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.image, expected.image, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.pooled, expected.pooled, atol=1e-5, rtol=0)


# --- Training --------------------------------------------------------------------------------------------------------


def test_gradients_reach_every_parameter(tokenizer: Tokenizer) -> None:
    model = build()
    objectives = objectives_of(model, tokenizer, ("masked_language", "matching"))
    step(model, objectives, make_batch(tokenizer)).backward()
    named = [*model.named_parameters(), *objectives.named_parameters()]
    without = [name for name, parameter in named if parameter.grad is None or not parameter.grad.any()]
    assert without == []


@pytest.mark.parametrize("frozen", [("vision",), ("language",), ("vision", "language")], ids="+".join)
def test_frozen_encoders_do_not_move(tokenizer: Tokenizer, frozen: tuple[str, ...]) -> None:
    changes = {
        name: {"vision": VISION, "language": LANGUAGE}[name].model_copy(update={"frozen": True}) for name in frozen
    }
    model = build(**changes).train()
    objectives = objectives_of(model, tokenizer, ("masked_language", "matching"))
    module = nn.ModuleDict({"model": model, "objectives": objectives})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = OptimizerConfig(learning_rate=0.01, weight_decay=0.1).parameter_groups(
        module.named_parameters(), matrices(module.named_parameters())
    )
    optimizer = torch.optim.AdamW(groups)
    step(model, objectives, make_batch(tokenizer)).backward()
    optimizer.step()
    for name in ("vision", "language"):
        encoder = getattr(model, name)
        assert all(part.training != (name in frozen) for part in encoder.modules()), name
        assert all((parameter.grad is None) == (name in frozen) for parameter in encoder.parameters()), name
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    still = tuple(f"{name}." for name in frozen)
    assert moved == {name for name, _ in model.named_parameters() if not name.startswith(still)}


def test_a_frozen_encoders_moving_statistics_stand_still(tokenizer: Tokenizer) -> None:
    vision = TimmVisionConfig(name="test_efficientnet.r160_in1k", pretrained=False, image_pixels=32, frozen=True)
    states = []
    for config in (vision, vision.model_copy(update={"frozen": False})):
        model = build(vision=config).train()
        before = {name: tensor.clone() for name, tensor in model.vision.state_dict().items()}
        assert any(name.endswith("running_mean") for name in before)
        model.encode(make_batch(tokenizer, pixels=32).image, [View("image")])
        after = model.vision.state_dict()
        states.append(all(torch.equal(after[name], tensor) for name, tensor in before.items()))
    assert states == [True, False]


# --- Fusion ----------------------------------------------------------------------------------------------------------


def silence(layer: CoAttentionLayer) -> None:
    """Make every residual branch return zero."""
    for residual in (part for part in layer.modules() if isinstance(part, Residual)):
        output = [part for part in residual.branch.modules() if isinstance(part, nn.Linear)][-1]
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_without_its_branches_a_layer_is_the_identity_or_a_norm(pre_norm: bool) -> None:
    torch.manual_seed(0)
    layer = CoAttentionLayer(16, 2, pre_norm, dropout=0.0)
    silence(layer)
    x, other = 3 + 2 * torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    expected = x if pre_norm else nn.functional.layer_norm(x, (16,))
    torch.testing.assert_close(layer(x, None, other, None), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_both_forms_end_normalised(pre_norm: bool) -> None:
    torch.manual_seed(0)
    fusion = CoAttention(16, 3, 2, pre_norm, dropout=0.0)
    for states in fusion(9 * torch.randn(2, 5, 16), 9 * torch.randn(2, 4, 16), torch.ones(2, 4, dtype=torch.bool)):
        torch.testing.assert_close(states.mean(-1), torch.zeros(states.shape[:-1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(states.var(-1, correction=0), torch.ones(states.shape[:-1]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_layer_reads_the_other_stream_as_it_entered(pre_norm: bool) -> None:
    fusion = CoAttention(16, 1, 2, pre_norm, dropout=0.0)
    image, text = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    for stream, other in ((0, fusion.text_layers), (1, fusion.image_layers)):
        fusion.zero_grad()
        fusion(image, text, torch.ones(2, 4, dtype=torch.bool))[stream].square().sum().backward()
        assert all(parameter.grad is None for parameter in other.parameters())


# --- Weights and modes -----------------------------------------------------------------------------------------------


def test_a_state_dict_carries_the_whole_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = build(seed=0).eval(), build(seed=1).eval()
    batch = make_batch(tokenizer)
    view = View("pair", batch.text_ids, batch.text_mask)
    torch.save(first.state_dict(), tmp_path / "weights.pt")
    with torch.no_grad():
        expected = first.encode(batch.image, [view])[0]
        before = second.encode(batch.image, [view])[0]
        second.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        after = second.encode(batch.image, [view])[0]
    assert expected.pooled is not None and before.pooled is not None and after.pooled is not None
    assert not torch.equal(before.pooled, expected.pooled)
    assert torch.equal(after.pooled, expected.pooled)
    assert set(first.state_dict()) == {name for name, _ in first.named_parameters()}


def test_the_seed_decides_the_weights() -> None:
    states = [build(seed).state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert any(not torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())


def test_evaluation_is_deterministic_and_training_drops_out(tokenizer: Tokenizer) -> None:
    model, batch = build(fusion=FUSION.model_copy(update={"dropout": 0.3})), make_batch(tokenizer)

    def pooled() -> Tensor:
        states = model.encode(batch.image, [View("pair", batch.text_ids, batch.text_mask)])[0].pooled
        assert states is not None
        return states

    model.eval()
    assert torch.equal(pooled(), pooled())
    model.train()
    assert not torch.equal(pooled(), pooled())


def test_pixels_are_normalised_by_the_encoders_mean_and_deviation(tokenizer: Tokenizer) -> None:
    model = build()
    image = make_batch(tokenizer).image
    assert image is not None
    with inputs_of(model.vision) as images:
        model.encode_image(image)
    torch.testing.assert_close(images[0], image / 127.5 - 1)
