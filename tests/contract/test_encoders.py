"""What every vision and language encoder keeps, whichever library it comes from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from clip_models import register
from torch import Tensor, nn

from vlm.errors import UserError
from vlm.models.language import (
    CustomLanguageConfig,
    LanguageConfig,
    OpenClipLanguageConfig,
    TinyLanguageConfig,
    TransformersLanguageConfig,
)
from vlm.models.vision import CustomVisionConfig, OpenClipVisionConfig, TimmVisionConfig, TinyVisionConfig, VisionConfig
from vlm.weights import fill


class MeanColours(nn.Module):
    """A vision encoder from outside: the pixels of a coarse grid, projected."""

    mean, std, interpolation, width, image_pixels = (0.5,) * 3, (0.5,) * 3, "bilinear", 8, 16

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 8)])

    def forward(self, image: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(image, 2).flatten(2).transpose(1, 2)
        x = self.blocks[0](x)
        return torch.cat([x.mean(1, keepdim=True), x], dim=1)


class Words(nn.Module):
    """A language encoder from outside: words alone."""

    width = vocabulary_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Embedding(100, 8)])

    def forward(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        states: Tensor = self.blocks[0](text_ids)
        return states


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}
DISTANCES = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
ARCHITECTURES = {
    "bert": transformers.BertConfig(**SMALL),  # MiniLM is a BERT
    "roberta": transformers.RobertaConfig(**SMALL, pad_token_id=1),
    "deberta": transformers.DebertaConfig(**SMALL, **DISTANCES),
    "deberta_v2": transformers.DebertaV2Config(**SMALL, **DISTANCES, position_biased_input=False, share_att_key=True),
    "electra": transformers.ElectraConfig(**SMALL, embedding_size=16),
    "distilbert": transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=100),
    "albert": transformers.AlbertConfig(**SMALL, embedding_size=16),
    "mpnet": transformers.MPNetConfig(**SMALL, pad_token_id=1),
    "modernbert": transformers.ModernBertConfig(
        **SMALL, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2
    ),
    "squeezebert": transformers.SqueezeBertConfig(**SMALL, embedding_size=32),
}

VISION: dict[str, tuple[Any, int]] = {  # with image pixels that each runs at, some not the published ones
    "tiny": (TinyVisionConfig(width=32, depth=2, patch_size=8, image_pixels=24), 24),
    "timm-vit": (TimmVisionConfig(name="test_vit.r160_in1k", pretrained=False, image_pixels=48), 48),
    "timm-registers": (TimmVisionConfig(name="test_vit2.r160_in1k", pretrained=False, image_pixels=48), 48),
    "timm-pooling": (TimmVisionConfig(name="vit_pe_core_tiny_patch16_384", pretrained=False, image_pixels=64), 64),
    "timm-convnext": (TimmVisionConfig(name="test_convnext.r160_in1k", pretrained=False, image_pixels=96), 96),
    "timm-resnet": (TimmVisionConfig(name="test_resnet.r160_in1k", pretrained=False, image_pixels=96), 96),
    "open_clip-clip": (OpenClipVisionConfig(name="tiny-clip", pretrained=False, image_pixels=24), 24),
    "open_clip-clipa": (OpenClipVisionConfig(name="tiny-clipa", pretrained=False), 32),
    "open_clip-coca": (OpenClipVisionConfig(name="tiny-coca", pretrained=False), 32),
    "open_clip-siglip": (OpenClipVisionConfig(name="tiny-siglip", pretrained=False, image_pixels=64), 64),
    "open_clip-resnet": (OpenClipVisionConfig(name="tiny-resnet", pretrained=False, image_pixels=96), 96),
    "custom": (CustomVisionConfig(target="test_encoders:MeanColours"), 16),
}
CLIP_TEXTS = ("clip", "clipa", "coca", "siglip", "roberta")
LANGUAGE: dict[str, Any] = {
    "tiny": TinyLanguageConfig(width=32, depth=2, max_tokens=16),
    **{f"transformers-{name}": None for name in ARCHITECTURES},  # their folders are written below
    **{
        f"open_clip-{name}": OpenClipLanguageConfig(name=f"tiny-{name}", pretrained=False, max_tokens=17)
        for name in CLIP_TEXTS
    },
    "custom": CustomLanguageConfig(target="test_encoders:Words"),
}


@pytest.fixture(scope="module", autouse=True)
def _models(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("open_clip")
    register(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def vision() -> Callable[[str], Any]:
    def build(name: str) -> Any:
        torch.manual_seed(0)
        return VISION[name][0].build()

    return build


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    folder = tmp_path_factory.mktemp("language")
    save_architectures(folder)

    def build(name: str) -> Any:
        torch.manual_seed(0)
        return build_language(name, folder)

    return build


def save_architectures(folder: Path) -> None:
    for name, config in ARCHITECTURES.items():
        config.save_pretrained(folder / f"transformers-{name}")


def build_language(name: str, folder: Path) -> Any:
    config = LANGUAGE[name] or TransformersLanguageConfig(name=name, pretrained=False, weights=folder / name)
    return config.build()


def _image(name: str, count: int = 2) -> Tensor:
    return torch.randn(count, 3, VISION[name][1], VISION[name][1])


def _texts(count: int = 3, length: int = 7) -> tuple[Tensor, Tensor]:
    """Ids that no tokenizer takes for padding, of as many lengths as texts."""
    torch.manual_seed(1)
    mask = torch.arange(length) < (length - 2 * torch.arange(count)).clamp(min=2)[:, None]
    return torch.where(mask, torch.randint(5, 100, (count, length)), 1), mask


def _close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("union", "covered"), [(VisionConfig, VISION), (LanguageConfig, LANGUAGE)])
def test_every_member_of_the_union_is_covered(union: Any, covered: dict[str, Any]) -> None:
    members = {member.model_fields["type"].default for member in get_args(get_args(union)[0])}
    assert members == {name.partition("-")[0] for name in covered}


# --- Vision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_an_image_has_the_same_states_alone_and_in_a_batch(name: str, vision: Callable[[str], Any]) -> None:
    encoder, image = vision(name).eval(), _image(name, 3)
    states = encoder(image)
    assert states.shape[0] == 3 and states.shape[1] > 1 and states.shape[2] == encoder.width
    assert encoder.image_pixels == VISION[name][1] and len(encoder.mean) == len(encoder.std) == 3
    _close(encoder(image[1:2]), states[1:2], 1e-4)
    assert torch.equal(encoder(image), states)  # nothing is drawn in evaluation mode


@pytest.mark.parametrize("name", VISION)
def test_gradients_reach_all_that_an_image_encoder_trains(name: str, vision: Callable[[str], Any]) -> None:
    encoder = vision(name)
    (encoder(_image(name)) * torch.randn(encoder.width)).square().sum().backward()
    lacking = [own for own, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []
    inside = {id(p) for block in encoder.blocks for p in block.parameters()}
    assert inside and inside <= {id(p) for p in encoder.parameters()}


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_an_image_encoder_is_its_states(name: str, vision: Callable[[str], Any]) -> None:
    encoder, image = vision(name).eval(), _image(name)
    torch.manual_seed(7)
    other = VISION[name][0].build().eval()
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(image), encoder(image))


@pytest.mark.parametrize("name", ["tiny", "timm-vit", "timm-pooling", "open_clip-clip", "open_clip-siglip"])
@torch.no_grad()
def test_weights_of_a_run_at_another_image_size_are_taken(name: str, vision: Callable[[str], Any]) -> None:
    encoder, config, pixels = vision(name), VISION[name][0], 2 * VISION[name][1]
    larger = config.model_copy(update={"image_pixels": pixels}).build()
    fill(larger, encoder.state_dict(), "", Path("run"))
    assert torch.equal(next(larger.blocks[0].parameters()), next(encoder.blocks[0].parameters()))
    assert larger(torch.randn(1, 3, pixels, pixels)).shape[1] > encoder(_image(name)).shape[1]


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_an_image_encoder_is_finite_under_autocast(name: str, vision: Callable[[str], Any]) -> None:
    encoder, image = vision(name).eval(), _image(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = encoder(image)
    assert bool(states.isfinite().all())


@pytest.mark.parametrize("name", [name for name in VISION if name.startswith("open_clip")])
@torch.no_grad()
def test_the_last_of_a_clip_towers_image_layers_is_its_output(name: str, vision: Callable[[str], Any]) -> None:
    encoder, image = vision(name).eval(), _image(name)
    if name == "open_clip-resnet":
        with pytest.raises(UserError, match="differ in width"):
            encoder.layers(image, 2)
        return
    layers = encoder.layers(image, 2)
    assert len(layers) == 2 and layers[0].shape == layers[1].shape
    _close(layers[1], encoder(image))


# --- Language ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LANGUAGE)
@torch.no_grad()
def test_padding_changes_no_state_of_a_text(name: str, language: Callable[[str], Any]) -> None:
    encoder = language(name).eval()
    ids, mask = _texts()
    states = encoder(ids, mask)
    assert states.shape == (3, 7, encoder.width)
    for row, length in enumerate(mask.sum(1).tolist()):
        _close(states[row, :length], encoder(ids[row : row + 1, :length], mask[row : row + 1, :length])[0])
    assert torch.equal(encoder(ids, mask)[mask], states[mask])  # nothing is drawn in evaluation mode


@pytest.mark.parametrize("name", LANGUAGE)
def test_gradients_reach_all_that_a_text_encoder_trains(name: str, language: Callable[[str], Any]) -> None:
    encoder = language(name)
    (encoder(*_texts()) * torch.randn(encoder.width)).square().sum().backward()
    lacking = [own for own, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []
    inside = {id(p) for block in encoder.blocks for p in block.parameters()}
    assert inside and inside <= {id(p) for p in encoder.parameters()}


@pytest.mark.parametrize("name", LANGUAGE)
@torch.no_grad()
def test_a_text_encoder_is_its_states(name: str, language: Callable[[str], Any]) -> None:
    encoder, other = language(name).eval(), language(name).eval()
    for parameter in other.parameters():
        parameter.add_(torch.randn_like(parameter))
    other.load_state_dict(encoder.state_dict())
    ids, mask = _texts()
    assert torch.equal(other(ids, mask)[mask], encoder(ids, mask)[mask])


@pytest.mark.parametrize("name", LANGUAGE)
@torch.no_grad()
def test_a_text_encoder_is_finite_under_autocast(name: str, language: Callable[[str], Any]) -> None:
    encoder = language(name).eval()
    ids, mask = _texts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bool(encoder(ids, mask)[mask].isfinite().all())


@pytest.mark.parametrize("name", [name for name in LANGUAGE if name.startswith("open_clip")])
@torch.no_grad()
def test_the_last_of_a_clip_towers_text_layers_is_its_output(name: str, language: Callable[[str], Any]) -> None:
    encoder = language(name).eval()
    layers = encoder.layers(*_texts(), 2)
    assert len(layers) == 2 and layers[0].shape == layers[1].shape
    _close(layers[1], encoder(*_texts()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(vocab_size=100, d_model=32, num_layers=1, num_heads=2, d_ff=64), "t5 is no encoder"),
        (transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2), "gpt2 is no encoder"),
        (transformers.FNetConfig(hidden_size=32, num_hidden_layers=1, vocab_size=100), "fnet mixes padding"),
    ],
)
def test_what_breaks_the_contract_is_refused_by_name(config: Any, message: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        TransformersLanguageConfig(name="other", pretrained=False, weights=tmp_path).build()


# --- Compilation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare_compiled(kind: str, folder: Path) -> None:
    """Every encoder of one `type`, compiled and as it is. For a process without the type checks of the tests."""
    register(folder)
    for name in [name for name in VISION if name.partition("-")[0] == kind]:
        encoder, image = VISION[name][0].build().eval(), _image(name)
        torch.compiler.reset()
        _close(torch.compile(encoder)(image), encoder(image), 1e-4)
        print("vision", name, flush=True)
    save_architectures(folder)
    for name in [name for name in LANGUAGE if name.partition("-")[0] == kind]:
        encoder = build_language(name, folder).eval()
        ids, mask = _texts()
        torch.compiler.reset()
        _close(torch.compile(encoder)(ids, mask)[mask], encoder(ids, mask)[mask], 1e-4)
        print("language", name, flush=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("kind", ["tiny", "timm", "transformers", "open_clip", "custom"])
def test_compiled_encoders_equal_the_plain_ones(kind: str, tmp_path: Path) -> None:
    code = f"import pathlib, test_encoders as tests; tests.compare_compiled({kind!r}, pathlib.Path({str(tmp_path)!r}))"
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    wanted = [name for name in (*VISION, *LANGUAGE) if name.partition("-")[0] == kind]
    assert [line.split()[-1] for line in done.stdout.decode().splitlines()] == wanted
