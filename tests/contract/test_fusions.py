"""What every fusion must do, alone and inside the whole model. The members come from the union itself."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from vlm.config import CustomConfig
from vlm.errors import UserError
from vlm.models import ModelConfig
from vlm.models.fusion import FusionConfig
from vlm.models.language import TinyLanguageConfig
from vlm.models.vision import TimmVisionConfig, TinyVisionConfig
from vlm.models.vision.timm import TimmVision
from vlm.models.vision_language import VisionLanguageModel
from vlm.types import Encoded, View

WIDTH, PATCHES, TOKENS, PAIRS = 32, 5, 7, 3  # tokens and patches are odd on purpose
SMALL: dict[str, Any] = {"width": WIDTH, "depth": 2, "num_heads": 4, "dropout": 0, "num_queries": 3, "num_latents": 3}
MEMBERS = [member for member in get_args(get_args(FusionConfig)[0]) if member is not CustomConfig]


def small(member: Any, **changes: Any) -> Any:
    """A member of the union in a small size."""
    return member(**{name: value for name, value in (SMALL | changes).items() if name in member.model_fields})


def name_of(config: Any) -> str:
    reader = f"-{config.reader}" if hasattr(config, "reader") else ""
    return f"{config.type}{reader}{'' if getattr(config, 'pre_norm', True) else '-post_norm'}"


FUSIONS = [
    small(member, **dict(zip(("pre_norm", "reader"), values, strict=True)))
    for member in MEMBERS
    for values in itertools.product(
        (True, False) if "pre_norm" in member.model_fields else (True,),
        ("cross_attention", "merged") if "reader" in member.model_fields else (None,),
    )
]
every_fusion = pytest.mark.parametrize("config", FUSIONS, ids=[name_of(config) for config in FUSIONS])


def build(config: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    fusion: nn.Module = config.build()
    return fusion


def inputs(fusion: nn.Module, patches: int = PATCHES, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Random states, of several layers where the fusion takes these, and texts of 7, 4 and 1 tokens."""
    generator = torch.Generator().manual_seed(1)
    layers = [getattr(fusion, "num_encoder_layers", 0)] if hasattr(fusion, "num_encoder_layers") else []
    image = torch.randn(PAIRS, *layers, patches, WIDTH, generator=generator)
    text = torch.randn(PAIRS, *layers, tokens, WIDTH, generator=generator)
    return image, text, torch.arange(tokens) < torch.tensor([[tokens], [max(1, tokens - 3)], [1]])


def is_fused(config: Any) -> bool:
    """Whether words can learn of the image."""
    return config.type not in ("late", "none")


# --- The module alone ------------------------------------------------------------------------------------------------


@every_fusion
@pytest.mark.parametrize(("patches", "tokens"), [(1, 1), (1, 7), (13, 1), (5, 7)])
def test_texts_keep_their_length_and_images_have_a_first_token(config: Any, patches: int, tokens: int) -> None:
    fusion = build(config)
    image, text = fusion(*inputs(fusion, patches, tokens))
    num_images = {"qformer": 3, "perceiver": 3}.get(config.type, patches)
    assert image.shape == (PAIRS, num_images, WIDTH)
    assert text.shape == (PAIRS, tokens, WIDTH)


@every_fusion
def test_padding_changes_nothing(config: Any) -> None:
    fusion = build(config).eval()
    image, text, mask = inputs(fusion)
    other, longer = text.clone(), torch.cat([text, 9 * torch.randn_like(text[..., :2, :])], dim=-2)
    hidden = ~mask if text.ndim == 3 else ~mask[:, None].expand(text.shape[:-1])
    other[hidden] = 100.0
    with torch.no_grad():
        expected_image, expected_text = fusion(image, text, mask)
        for changed in (other, longer):
            longer_mask = torch.cat([mask, mask.new_zeros(PAIRS, changed.shape[-2] - TOKENS)], dim=1)
            fused_image, fused_text = fusion(image, changed, longer_mask)
            torch.testing.assert_close(fused_image, expected_image, atol=1e-5, rtol=0)
            torch.testing.assert_close(fused_text[:, :TOKENS][mask], expected_text[mask], atol=1e-5, rtol=0)


@every_fusion
def test_no_pair_learns_of_another(config: Any) -> None:
    fusion = build(config).eval()
    image, text, mask = inputs(fusion)
    with torch.no_grad():
        together = fusion(image, text, mask)
        alone = fusion(image[1:2], text[1:2], mask[1:2])
    for whole, part in zip(together, alone, strict=True):
        torch.testing.assert_close(whole[1:2], part, atol=1e-5, rtol=0)


@every_fusion
def test_the_first_states_alone_give_every_parameter_a_gradient(config: Any) -> None:
    """Heads over pooled pairs read no more than these: whatever they left out would stop DistributedDataParallel."""
    fusion = build(config).train()
    given_image, given_text, mask = inputs(fusion)
    image, text = fusion(given_image.requires_grad_(), given_text, mask)  # where nothing learns, what came learns
    weight = torch.randn(2, WIDTH)  # behind a norm the plain sum over the width is constant
    ((image[:, 0] * weight[0]).sum() + (text[:, 0] * weight[1]).sum()).backward()
    without = [name for name, value in fusion.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


@every_fusion
def test_words_learn_of_the_image_unless_the_fusion_is_late_or_none(config: Any) -> None:
    fusion = build(config)
    image, text, mask = inputs(fusion)
    image.requires_grad_()
    text.requires_grad_()
    (fusion(image, text, mask)[1][:, 1:][mask[:, 1:]] * torch.randn(WIDTH)).sum().backward()
    reached = image.grad is not None and bool(image.grad[:2].flatten(0, -2).abs().sum(-1).gt(0).all())
    assert reached == is_fused(config)


@every_fusion
def test_a_state_dict_carries_the_whole_fusion(config: Any, tmp_path: Path) -> None:
    first, second = build(config, seed=0).eval(), build(config, seed=1).eval()
    torch.save(first.state_dict(), tmp_path / "weights.pt")
    second.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    with torch.no_grad():
        for ours, theirs in zip(first(*inputs(first)), second(*inputs(second)), strict=True):
            assert torch.equal(ours, theirs)


@every_fusion
def test_evaluation_is_deterministic_and_training_drops_out(config: Any) -> None:
    fusion = build(config.model_copy(update={"dropout": 0.3}) if hasattr(config, "dropout") else config)
    given = inputs(fusion)
    for training in (False, True):
        fusion.train(training)
        (image, text), (again_image, again_text) = fusion(*given), fusion(*given)
        same = torch.equal(image, again_image) and torch.equal(text, again_text)
        assert same != (training and hasattr(config, "dropout"))


@every_fusion
def test_half_precision_is_near_and_finite(config: Any) -> None:
    fusion = build(config)
    given = inputs(fusion)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halves = fusion(*given)
        loss = sum(states.float().square().mean() for states in halves)
    assert isinstance(loss, Tensor)
    if list(fusion.parameters()):
        loss.backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in fusion.parameters())
    for half, whole in zip(halves, fusion(*given), strict=True):
        torch.testing.assert_close(half.float(), whole, atol=0.1, rtol=0.1)


COMPILED = """
import sys
import torch
from pydantic import TypeAdapter
from vlm.models.fusion import FusionConfig
from vlm.models.vision_language import VisionLanguageModel  # what imports it first, as in a run

torch.manual_seed(0)
fusion = TypeAdapter(FusionConfig).validate_json(sys.argv[1]).build()
layers = [fusion.num_encoder_layers] if hasattr(fusion, "num_encoder_layers") else []
image, text = (torch.randn(3, *layers, length, 32, requires_grad=True) for length in (5, 7))
mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
results = []
for module in (fusion, torch.compile(fusion)):
    states = module(image, text, mask)
    learners = [image, *fusion.parameters()]
    loss = torch.stack([(part * torch.linspace(-1, 1, 32)).square().mean() for part in states]).sum()
    results.append([*states, *torch.autograd.grad(loss, learners)])
for eager, compiled in zip(*results, strict=True):
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
"""


@pytest.mark.slow
@every_fusion
def test_the_compiled_fusion_gives_the_same(config: Any) -> None:
    """In a process of its own: shapes are not checked at each call there, which the compiler cannot see through."""
    subprocess.run(
        [sys.executable, "-c", COMPILED, config.model_dump_json()], check=True, cwd=Path(__file__).parents[2]
    )


# --- Inside the whole model ------------------------------------------------------------------------------------------

VISION = TinyVisionConfig(width=16, depth=3, num_heads=2, patch_size=8, image_pixels=24)
LANGUAGE = TinyLanguageConfig(width=24, depth=2, num_heads=2, vocabulary_size=48, max_tokens=16)


def build_model(config: Any, **changes: Any) -> VisionLanguageModel:
    torch.manual_seed(0)
    return ModelConfig(**({"vision": VISION, "language": LANGUAGE, "fusion": config} | changes)).build()


def examples(num_images: int = PAIRS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    image = torch.randint(256, (num_images, 3, 24, 24), generator=generator, dtype=torch.uint8)
    ids = torch.randint(5, 48, (PAIRS, TOKENS), generator=generator)
    return image, ids, torch.arange(TOKENS) < torch.tensor([[TOKENS], [4], [2]])


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[int]]:
    """How many rows each call of `module` had."""
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    yield calls
    handle.remove()


def assert_same(one: Encoded, other: Encoded) -> None:
    for name in ("text", "image", "pooled"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=0)


@every_fusion
def test_each_image_and_text_passes_its_encoder_once(config: Any) -> None:
    model = build_model(config)
    image, ids, mask = examples()
    twice = torch.tensor([0, 0, 2, 1])
    views = [
        View("image"),
        View("text", ids, mask),
        View("apart", ids, mask),
        View("pair", ids, mask),
        View("pair", ids, mask, text_index=twice, image_index=twice.flip(0)),
    ]
    encoders: list[Any] = [model.vision, model.language]
    with (
        calls_of(encoders[0].blocks[0]) as images,
        calls_of(encoders[1].blocks[0]) as texts,
        calls_of(model.fusion) as pairs,
    ):
        encoded = model.encode(image, views)
    assert (images, texts, pairs) == ([PAIRS], [PAIRS], [PAIRS + len(twice)])
    apart = encoded[2]
    assert apart.image is not None and apart.text is not None and apart.image.shape[:2] == (PAIRS, 10)
    last = model.vision_projection(model.vision(image / 127.5 - 1))
    torch.testing.assert_close(apart.image, last, atol=1e-5, rtol=0)


@every_fusion
def test_a_pair_is_the_same_in_any_view_and_in_retrieval(config: Any) -> None:
    model = build_model(config).eval()
    image, ids, mask = examples()
    texts, images = torch.tensor([1, 1, 1]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        chosen = View("pair", ids, mask, text_index=texts, image_index=images)
        pairs = model.encode(image, [View("image"), chosen])[1]
        assert_same(pairs, model.encode(image, [View("pair", ids[texts], mask[texts])])[0])
        pooled = model.fuse_all(
            model.project_image(model.encode_image(image)), model.encode_text(ids[1:2], mask[1:2]), mask[1:2]
        )
    torch.testing.assert_close(pooled, pairs.pooled, atol=1e-5, rtol=0)


@every_fusion
def test_images_in_turn_begin_with_the_pair_and_go_on_from_its_text(config: Any) -> None:
    model = build_model(config).eval()
    image, ids, mask = examples(2 * PAIRS)
    with torch.no_grad():
        pooled = model.pool_in_turn(image, ids, mask)
        pairs = [model.encode(part, [View("pair", ids, mask)])[0].pooled for part in image.split(PAIRS)]
    assert [part.shape for part in pooled] == [(PAIRS, 2 * WIDTH)] * 2
    torch.testing.assert_close(pooled[0], pairs[0], atol=1e-5, rtol=0)
    assert pairs[1] is not None
    is_another = bool((pooled[1] - pairs[1]).abs().max() > 1e-3)
    assert is_another == (config.type != "none")


@every_fusion
def test_pooled_pairs_give_every_parameter_of_the_model_a_gradient(config: Any) -> None:
    model = build_model(config)
    image, ids, mask = examples()
    pooled = model.encode(image, [View("pair", ids, mask)])[0].pooled
    assert pooled is not None
    (pooled * torch.randn(2 * WIDTH)).sum().backward()
    # A text's padding is no word, and which words occur is chance; else nothing may be left out.
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


@every_fusion
def test_padding_changes_nothing_of_a_pair(config: Any) -> None:
    model = build_model(config).eval()
    image, ids, mask = examples()
    padded = (
        torch.cat([ids, torch.zeros(PAIRS, 4, dtype=torch.long)], 1),
        torch.cat([mask, mask.new_zeros(PAIRS, 4)], 1),
    )
    with torch.no_grad():
        (short,), (long,) = model.encode(image, [View("pair", ids, mask)]), model.encode(image, [View("pair", *padded)])
    torch.testing.assert_close(long.pooled, short.pooled, atol=1e-5, rtol=0)
    torch.testing.assert_close(long.image, short.image, atol=1e-5, rtol=0)


@every_fusion
def test_states_that_were_kept_stand_for_their_pixels(config: Any) -> None:
    model = build_model(config, vision=VISION.model_copy(update={"frozen": True})).eval()
    image, ids, mask = examples()
    with torch.no_grad():
        view = View("pair", ids, mask)
        assert_same(model.encode(model.encode_image(image), [view])[0], model.encode(image, [view])[0])


# --- Layers of the encoders ------------------------------------------------------------------------------------------


def test_bridges_take_the_encoders_last_layers_in_their_order() -> None:
    model = build_model(small(MEMBERS[[m().type for m in MEMBERS].index("bridges")])).eval()
    image, ids, mask = examples()
    given: list[Any] = []
    model.fusion.register_forward_pre_hook(lambda _, arguments: given.extend(arguments))
    with torch.no_grad():
        model.encode(image, [View("pair", ids, mask)])
        for states, encoder, projection, inputs in (
            (given[0], model.vision, model.vision_projection, (image / 127.5 - 1,)),
            (given[1], model.language, model.language_projection, (ids, mask)),
        ):
            layers: Any = encoder
            expected = projection(torch.stack(layers.layers(*inputs, 2), dim=1))
            torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(states[:, 1], projection(encoder(*inputs)), atol=1e-5, rtol=0)
            assert not torch.allclose(states[:, 0], states[:, 1])


def test_bridges_to_more_layers_than_there_are_are_refused() -> None:
    bridges = small(MEMBERS[[m().type for m in MEMBERS].index("bridges")], depth=3)
    with pytest.raises(ValueError, match="takes 3 layers of the language encoder, which has 2"):
        build_model(bridges)


# --- Tokens that are dropped -----------------------------------------------------------------------------------------


@every_fusion
def test_dropped_tokens_are_missing_in_training_alone(config: Any) -> None:
    model = build_model(config, token_dropout=0.5)
    whole = build_model(config)
    image, ids, mask = examples()
    given: list[Tensor] = []
    model.fusion.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    pooled = model.train().encode(image, [View("pair", ids, mask), View("apart", ids, mask)])
    assert pooled[1].image is not None
    kept = given[0].shape[-2]
    assert kept == pooled[1].image.shape[1] == 1 + round(0.5 * 9)
    every = model.vision_projection(model.encode_image(image))
    torch.testing.assert_close(given[0][..., 0, :], every[..., 0, :], atol=1e-5, rtol=0)  # CLS stays where heads look
    distance = torch.cdist(given[0], every)  # each token is one of the image's own, and none comes twice
    assert bool((distance.amin(-1) < 1e-3).all())
    assert all(len(set(row.tolist())) == kept for row in distance.argmin(-1).flatten(0, -2))
    with torch.no_grad():
        pairs = [part.eval().encode(image, [View("pair", ids, mask)])[0] for part in (model, whole)]
    assert_same(*pairs)


def test_an_encoder_that_learns_drops_patches_before_its_blocks_in_training_alone() -> None:
    timm = TimmVisionConfig(name="test_vit.r160_in1k", pretrained=False, image_pixels=64, patch_dropout=0.5)
    for config, whole, part in ((VISION.model_copy(update={"patch_dropout": 0.5}), 10, 5), (timm, 17, 9)):
        encoder: Any = config.build()
        pixels = torch.randn(2, 3, encoder.image_pixels, encoder.image_pixels)
        lengths: list[int] = []
        encoder.blocks[0].register_forward_pre_hook(
            lambda _, arguments, seen=lengths: seen.append(arguments[0].shape[1])
        )
        assert encoder.train()(pixels).shape[1] == part and encoder.layers(pixels, 2)[0].shape[1] == part
        assert encoder.eval()(pixels).shape[1] == whole
        assert lengths[0] == lengths[1] < lengths[2]


def test_patches_are_not_dropped_where_the_encoder_is_frozen_or_has_none() -> None:
    for frozen in ({"frozen": True}, {"frozen_blocks": 1}):
        with pytest.raises(ValueError, match="Give token_dropout"):
            ModelConfig(vision=TinyVisionConfig(patch_dropout=0.5, **frozen))
    with pytest.raises(UserError, match="cannot drop patches"):
        TimmVisionConfig(name="resnet10t.c3_in1k", pretrained=False, patch_dropout=0.5).build()


# --- Layers of published encoders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["test_vit.r160_in1k", "deit_tiny_distilled_patch16_224.fb_in1k", "test_vit2.r160_in1k"]
)
def test_layers_of_timm_are_its_blocks_states_through_its_norm(name: str) -> None:
    torch.manual_seed(0)
    encoder = TimmVision(name, pretrained=False, image_pixels=64).eval()
    seen: list[Tensor] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _module, _arguments, output: seen.append(output))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        layers = encoder.layers(pixels, 2)
        assert len(seen) == len(encoder.blocks)  # one pass
        torch.testing.assert_close(layers[-1], encoder(pixels), atol=1e-5, rtol=0)
        expected = encoder.model.norm(seen[len(encoder.blocks) - 2])
        if not encoder.has_cls:
            expected = torch.cat([expected.mean(1, keepdim=True), expected], dim=1)
        torch.testing.assert_close(layers[0], expected, atol=1e-5, rtol=0)


def test_stages_of_different_scales_are_no_layers() -> None:
    encoder = TimmVision("resnet10t.c3_in1k", pretrained=False, image_pixels=64)
    assert encoder.layers(torch.randn(1, 3, 64, 64), 1)[0].shape[1] == 5
    with pytest.raises(UserError, match="stages of different scales"):
        encoder.layers(torch.randn(1, 3, 64, 64), 2)
