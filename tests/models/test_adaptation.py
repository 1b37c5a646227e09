"""Of any encoder the first blocks can rest, adapters can learn in its place, and checkpointing changes no number."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from vlm.errors import UserError
from vlm.models import ModelConfig
from vlm.models.adaptation import Depth, LoraConfig, depths_of, fit_adapters, merge_adapters
from vlm.models.fusion import CoAttentionConfig
from vlm.models.language import LanguageConfig, TinyLanguageConfig, TransformersLanguageConfig
from vlm.models.vision import TimmVisionConfig, TinyVisionConfig, VisionConfig
from vlm.models.vision_language import VisionLanguageModel
from vlm.training.optimizer import OptimizerConfig, matrices
from vlm.types import View

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 48}
LIBRARY = {
    "bert": transformers.BertConfig(**SMALL),
    "roberta": transformers.RobertaConfig(**SMALL, pad_token_id=1),
    "electra": transformers.ElectraConfig(**SMALL, embedding_size=16),
}
TIMM = {"vit": "test_vit.r160_in1k", "vit_of_registers": "test_vit2.r160_in1k"}
TINY_VISION = TinyVisionConfig(width=16, depth=3, num_heads=2, patch_size=8, image_pixels=16)
TINY_LANGUAGE = TinyLanguageConfig(width=16, depth=3, num_heads=2, vocabulary_size=48, max_tokens=16)
ENCODERS = [*(("vision", name) for name in ("tiny", *TIMM)), *(("language", name) for name in ("tiny", *LIBRARY))]
LORA = LoraConfig(rank=4, alpha=8)
FUSION = CoAttentionConfig(width=16, depth=1, num_heads=2, dropout=0.1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models in the transformers library's format."""
    torch.manual_seed(0)
    found = {}
    for name, config in LIBRARY.items():
        found[name] = tmp_path_factory.mktemp(name)
        transformers.AutoModel.from_config(config).save_pretrained(found[name])
    return found


@pytest.fixture(params=ENCODERS, ids=lambda pair: "-".join(pair))
def make(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Callable[..., VisionLanguageModel]:
    """`make(frozen_blocks=1)`: a model whose encoder of this kind is asked for that; `make.adapted` names it."""
    kind, name = request.param

    def build(seed: int = 0, **asked: Any) -> VisionLanguageModel:
        return model_of(kind, name, folders, seed, **asked)

    build.adapted = kind  # type: ignore[attr-defined]
    return build


def model_of(kind: str, name: str, folders: dict[str, Path], seed: int = 0, **asked: Any) -> VisionLanguageModel:
    vision: VisionConfig = TINY_VISION
    language: LanguageConfig = TINY_LANGUAGE
    if name in TIMM:
        vision = TimmVisionConfig(name=TIMM[name], pretrained=False, image_pixels=64)
    elif name in LIBRARY:
        language = TransformersLanguageConfig(name=name, weights=folders[name])
    config = ModelConfig(vision=vision, language=language, fusion=FUSION)
    adapted = type(getattr(config, kind)).model_validate(getattr(config, kind).model_dump() | asked)
    torch.manual_seed(seed)
    return config.model_copy(update={kind: adapted}).build()


def kind_of(make: Any) -> str:
    kind: str = make.adapted
    return kind


def encoder_of(model: VisionLanguageModel, make: Any) -> Any:
    return getattr(model, kind_of(make))


def pooled(model: VisionLanguageModel) -> Tensor:
    """Of two pairs, one of them padded."""
    generator = torch.Generator().manual_seed(1)
    pixels: int = model.vision.image_pixels  # type: ignore[assignment]
    image = torch.randint(256, (2, 3, pixels, pixels), dtype=torch.uint8, generator=generator)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 1, 1]])
    found = model.encode(image, [View("pair", ids, ids != 1)])[0].pooled
    assert found is not None
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def learn(model: VisionLanguageModel, steps: int = 1) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        pooled(model).square().sum().backward()
        optimizer.step()


def test_the_first_blocks_and_the_embeddings_rest_and_all_else_learns(make: Callable[..., VisionLanguageModel]) -> None:
    model = make(frozen_blocks=2).train()
    encoder = encoder_of(model, make)
    before = copy.deepcopy(model.state_dict())
    learn(model)
    blocks = list(encoder.blocks)
    resting = {id(p) for block in blocks[:2] for p in block.parameters()}
    after = encoder.state_dict()
    still = {name for name in after if torch.equal(after[name], before[f"{kind_of(make)}.{name}"])}
    depths = depths_of(encoder, "vision")
    for name, parameter in encoder.named_parameters():
        embeddings = depths[name].number == 0
        if parameter.grad is not None or depths[name].number <= 2:  # not a norm that only timm's own head reads
            assert (name in still) == (embeddings or id(parameter) in resting), name
    assert any(depth.number == 0 for depth in depths.values())
    for _ in range(2):  # also after a validation
        assert [block.training for block in blocks[:3]] == [False, False, True]
        assert not any(m.training for block in blocks[:2] for m in block.modules())
        model.eval().train()


def test_a_resting_prefix_records_nothing_for_the_way_back(make: Callable[..., VisionLanguageModel]) -> None:
    model = make(frozen_blocks=2).train()
    seen: list[bool] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0]).requires_grad)

    for block in encoder_of(model, make).blocks:
        block.register_forward_hook(look)
    pooled(model)
    assert seen[-1] and not any(seen[:2])


def test_more_frozen_blocks_than_there_are_are_refused(make: Callable[..., VisionLanguageModel]) -> None:
    with pytest.raises(UserError, match=r"frozen_blocks: the encoder has \d+ blocks. Got 99"):
        make(frozen_blocks=99)


def test_an_encoder_without_blocks_says_that_it_has_none() -> None:
    with pytest.raises(UserError, match="VGG has no blocks"):
        ModelConfig(
            vision=TimmVisionConfig(name="vgg11.tv_in1k", pretrained=False, frozen_blocks=1),
            language=TINY_LANGUAGE,
            fusion=FUSION,
        ).build()


@pytest.mark.parametrize("asked", [{"frozen_blocks": 1}, {"lora": LORA}])
def test_a_frozen_encoder_has_nothing_left_to_adapt(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="leaves nothing to learn"):
        TinyVisionConfig(frozen=True, **asked)


def test_gradients_with_checkpointing_are_those_without(make: Callable[..., VisionLanguageModel]) -> None:
    found = []
    for checkpointing in (False, True):
        model = make(checkpointing=checkpointing).train()
        for module in encoder_of(model, make).modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.3
        for _ in range(2):  # the second time on gradients of the first
            torch.manual_seed(7)
            pooled(model).square().sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-6, rtol=1e-6, msg=name)


def kept_bytes(model: VisionLanguageModel) -> int:
    """Memory that the encoding keeps for the way back, weights left out."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pooled(model)
    return sum(kept.values())


def test_checkpointing_keeps_less(make: Callable[..., VisionLanguageModel]) -> None:
    assert kept_bytes(make(checkpointing=True).train()) < kept_bytes(make().train())


def test_a_copy_of_a_checkpointed_encoder_computes_with_its_own_weights() -> None:
    model = ModelConfig(
        vision=TINY_VISION.model_copy(update={"checkpointing": True}),
        language=TINY_LANGUAGE,
        fusion=FUSION,
    ).build()
    other = copy.deepcopy(model)
    before = pooled(model.eval())
    with torch.no_grad():
        for parameter in other.vision.parameters():
            parameter.zero_()
    torch.testing.assert_close(pooled(model), before)
    assert not torch.allclose(pooled(other.eval()), before)


def test_adapters_learn_and_nothing_else_of_the_encoder_does(make: Callable[..., VisionLanguageModel]) -> None:
    plain, model = make().eval(), make(lora=LORA).eval()
    torch.testing.assert_close(pooled(model), pooled(plain))  # they begin as nothing
    before = copy.deepcopy(model.state_dict())
    learn(model.train(), steps=2)  # of the first step A has no gradient, as B is zero
    encoder = encoder_of(model, make)
    for name, value in encoder.state_dict().items():
        changed = not torch.equal(value, before[f"{kind_of(make)}.{name}"])
        assert changed == (".lora_" in name), name
    adapters = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert 0 < adapters < sum(p.numel() for p in encoder.parameters()) / 2


def test_merged_weights_give_the_adapted_outputs(make: Callable[..., VisionLanguageModel]) -> None:
    model = make(lora=LORA)
    learn(model, steps=3)
    adapted, plain = pooled(model.eval()), make(seed=1).eval()
    assert not torch.allclose(adapted, pooled(make().eval()), atol=1e-3)
    plain.load_state_dict(fit_adapters(model.state_dict(), plain.state_dict()))
    torch.testing.assert_close(pooled(plain), adapted, atol=1e-5, rtol=1e-5)
    merge_adapters(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(pooled(model), adapted, atol=1e-5, rtol=1e-5)


def test_adapters_of_another_size_begin_anew_from_the_merged_weights() -> None:
    def build(lora: LoraConfig | None) -> VisionLanguageModel:
        vision = TINY_VISION.model_copy(update={"lora": lora})
        return ModelConfig(vision=vision, language=TINY_LANGUAGE, fusion=FUSION).build()

    model = build(LORA)
    learn(model, steps=3)
    expected = pooled(model.eval())
    for lora in (LORA, LoraConfig(rank=2), LoraConfig(rank=4, alpha=1), LoraConfig(layers=("query",)), None):
        other = build(lora).eval()
        other.load_state_dict(fit_adapters(model.state_dict(), other.state_dict()))
        torch.testing.assert_close(pooled(other), expected, atol=1e-5, rtol=1e-5)
        goes_on = any(bool(value.any()) for name, value in other.state_dict().items() if ".lora_B." in name)
        assert goes_on == (lora == LORA)
    plain = build(None).eval()  # and from an encoder that never had any
    other = build(LORA).eval()
    other.load_state_dict(fit_adapters(plain.state_dict(), other.state_dict()))
    torch.testing.assert_close(pooled(other), pooled(plain))


def test_adapters_stand_where_they_are_asked_for() -> None:
    vision = TimmVisionConfig(
        name=TIMM["vit"], pretrained=False, image_pixels=64, frozen_blocks=4, lora=LoraConfig(layers=("qkv",))
    )
    model = ModelConfig(vision=vision, language=TINY_LANGUAGE, fusion=FUSION).build()
    layers = {name.partition(".lora_")[0] for name, p in model.vision.named_parameters() if p.requires_grad}
    assert layers == {"model.blocks.4.attn.qkv", "model.blocks.5.attn.qkv"}
    with pytest.raises(
        UserError, match=r"no linear layer of the blocks fits \['query'\]. Their names end in: fc1, fc2"
    ):
        wrong = vision.model_copy(update={"lora": LoraConfig(layers=("query",))})
        ModelConfig(vision=wrong, language=TINY_LANGUAGE, fusion=FUSION).build()


def test_adapters_without_peft_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"model\.vision\.lora needs the extra `lora`"):
        ModelConfig(vision=TINY_VISION.model_copy(update={"lora": LORA}), language=TINY_LANGUAGE, fusion=FUSION).build()


def test_rates_of_a_vit_decay_by_the_rule_of_timm() -> None:
    library = timm.create_model(TIMM["vit"], num_classes=10)
    theirs = param_groups_layer_decay(library, 0.05, layer_decay=0.7)
    scales = {id(p): group["lr_scale"] for group in theirs for p in group["params"]}
    expected = {name: scales[id(p)] for name, p in library.named_parameters()}
    model = ModelConfig(
        vision=TimmVisionConfig(name=TIMM["vit"], pretrained=False), language=TINY_LANGUAGE, fusion=FUSION
    ).build()
    depths = {f"model.{name}": depth for name, depth in model.depths().items()}
    named = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    options = OptimizerConfig(learning_rate=1.0, layer_decay=0.7)
    groups = options.parameter_groups(named.items(), matrices(named.items()), depths)
    rates = {id(p): (group["lr"], group["name"]) for group in groups for p in group["params"]}
    assert len(rates) == len(named)
    ours = {name: rates[id(p)][0] for name, p in model.vision.model.named_parameters()}
    assert set(expected) - set(ours) == {"head.weight", "head.bias"}
    assert ours == pytest.approx({name: expected[name] for name in ours})
    assert rates[id(model.vision.model.pos_embed)] == (pytest.approx(0.7**7), "vision/00_embeddings")
    assert rates[id(model.language.norm.weight)] == (pytest.approx(0.7), "language/03_block/no_decay")
    assert rates[id(next(model.fusion.parameters()))][0] == 5


def test_rates_without_decay_are_grouped_as_ever() -> None:
    model = ModelConfig(vision=TINY_VISION, language=TINY_LANGUAGE, fusion=FUSION).build()
    named = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    depths = {name: Depth("vision", 1, 3) for name in named}
    groups = OptimizerConfig().parameter_groups(named.items(), matrices(named.items()), depths)
    assert [group["name"] for group in groups] == ["encoders/no_decay", "encoders", "fusion/no_decay", "fusion"]


def test_relative_positions_that_lie_behind_the_blocks_are_embeddings() -> None:
    config = transformers.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p"], position_buckets=8)
    encoder = nn.Module()
    encoder.model = transformers.DebertaV2Model(config)
    encoder.blocks = list(encoder.model.encoder.layer)
    depths = depths_of(encoder, "language")
    assert depths["model.encoder.rel_embeddings.weight"].number == 0
    assert depths["model.encoder.layer.2.output.dense.weight"].number == 3
