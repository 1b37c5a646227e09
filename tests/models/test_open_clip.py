"""CLIP's towers give the states that open_clip itself computes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import register
from safetensors.torch import save_file

from vlm.errors import UserError
from vlm.models.language import OpenClipLanguageConfig
from vlm.models.language.open_clip import OpenClipLanguage, load_tokenizer
from vlm.models.language.tokenizer import Tokenizer
from vlm.models.vision import OpenClipVisionConfig
from vlm.models.vision.open_clip import OpenClipVision
from vlm.weights import fill

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module", autouse=True)
def _known(tmp_path_factory: pytest.TempPathFactory) -> None:
    register(tmp_path_factory.mktemp("clip"))


def _saved(name: str, folder: Path, **options: Any) -> tuple[Any, Path]:
    """The library's model with weights that are no first values, and their file."""
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained_text=False, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "weights.safetensors")
    return model, folder / "weights.safetensors"


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-clipa", "tiny-siglip"])
@torch.no_grad()
def test_the_first_image_state_is_what_clip_projects(name: str, tmp_path: Path) -> None:
    model, file = _saved(name, tmp_path)
    encoder = OpenClipVision(name, True, weights=file).eval()
    image = torch.randn(2, 3, encoder.image_pixels, encoder.image_pixels)
    projection = getattr(model.visual, "proj", None)
    pooled = encoder(image)[:, 0]
    _close(pooled if projection is None else pooled @ projection, model.encode_image(image))


@torch.no_grad()
def test_image_states_are_the_librarys_tokens(tmp_path: Path) -> None:
    model, file = _saved("tiny-clip", tmp_path)
    encoder = OpenClipVision("tiny-clip", True, weights=file).eval()
    image = torch.randn(2, 3, 32, 32)
    model.visual.output_tokens = True
    states = encoder(image)
    assert states.shape == (2, 1 + 16, 32)
    _close(states[:, 1:], model.visual(image)[1])
    found = model.visual.forward_intermediates(image, indices=2, output_fmt="NLC", output_extra_tokens=True)
    expected = torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1)
    first, last = encoder.layers(image, 2)
    _close(first, model.visual.ln_post(expected))
    _close(last, states)


@torch.no_grad()
def test_cocas_image_states_are_what_its_pooler_reads(tmp_path: Path) -> None:
    model, file = _saved("tiny-coca", tmp_path)
    encoder = OpenClipVision("tiny-coca", True, weights=file).eval()
    image, read = torch.randn(2, 3, 32, 32), []
    model.visual.attn_pool.ln_k.register_forward_hook(lambda module, args, output: read.append(output))
    model.visual(image)
    _close(encoder(image), read[0])


@torch.no_grad()
def test_a_resnets_image_states_are_its_last_feature_map(tmp_path: Path) -> None:
    model, file = _saved("tiny-resnet", tmp_path)
    for pixels in (None, 96):
        encoder = OpenClipVision("tiny-resnet", True, pixels, file).eval()
        image = torch.randn(2, 3, encoder.image_pixels, encoder.image_pixels)
        features = model.visual.layer4(
            model.visual.layer3(model.visual.layer2(model.visual.layer1(model.visual.stem(image))))
        )
        _close(encoder(image)[:, 1:], features.flatten(2).transpose(1, 2))


@torch.no_grad()
def test_another_image_size_resamples_positions_as_the_library_does(tmp_path: Path) -> None:
    _, file = _saved("tiny-clip", tmp_path)
    library = open_clip.create_model("tiny-clip", pretrained=str(file), force_image_size=48).eval()
    encoder = OpenClipVision("tiny-clip", True, 48, file).eval()
    image = torch.randn(2, 3, 48, 48)
    _close(encoder(image)[:, 0] @ library.visual.proj, library.encode_image(image))
    other = OpenClipVision("tiny-clip", False, 64)
    fill(other, encoder.state_dict(), "", Path("run"))  # a run at another size
    assert other(torch.randn(1, 3, 64, 64)).shape == (1, 65, 32)


CAPTIONS = [
    "a photo of a cat",
    "Two dogs, it's 10 o\u2019clock!",
    "a  \u201cred\u201d\tcircle and a blue square left of it and more",
]


def test_a_tokenizer_of_transformers_keeps_its_tokens_behind_ours() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors

    from vlm.models.language.open_clip import _with_front

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4}
    backend = Backend(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<pad>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = Tokenizer(_with_front(backend), 5)
    ids, _, special = tokenizer(["a cat a cat", "cat"])
    assert ids.tolist() == [[5, 3, 4, 3, 1], [5, 4, 1, 0, 0]]  # cut with its end kept
    assert special.tolist() == [[True, False, False, False, True], [True, False, True, True, True]]
    assert (tokenizer.cls_id, tokenizer.mask_id, tokenizer.pad_id, tokenizer.sep_id) == (5, 6, 0, 1)


@torch.no_grad()
def test_the_first_text_state_is_what_clip_projects_and_the_others_are_its_tokens(tmp_path: Path) -> None:
    model, file = _saved("tiny-clip", tmp_path)
    encoder = OpenClipLanguage("tiny-clip", True, file, 17).eval()
    tokenizer = Tokenizer(load_tokenizer("tiny-clip"), 17)
    ids, mask, special = tokenizer(CAPTIONS)
    theirs = open_clip.get_tokenizer("tiny-clip")(CAPTIONS)
    width = ids.shape[1] - 1
    assert torch.equal(torch.where(mask, ids, 0)[:, 1:], theirs[:, :width])
    states = encoder(ids, mask)
    _close(states[:, 0] @ model.text_projection, model.encode_text(theirs))
    x = model.token_embedding(theirs) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    _close(states[:, 1:][mask[:, 1:]], x[:, :width][mask[:, 1:]])
    assert special[:, :2].all() and not special[:, 2:4].any()
    assert tokenizer.vocabulary_size == encoder.vocabulary_size == 49408 + 3
    assert tokenizer.sep_id == 49407 and tokenizer.mask_id >= 49408
    assert tokenizer.decode(ids[0].tolist()).split() == ["a", "photo", "of", "a", "cat"]


@pytest.mark.parametrize("name", ["tiny-clipa", "tiny-coca", "tiny-siglip"])
@torch.no_grad()
def test_towers_that_read_padding_pool_as_the_library_does(name: str, tmp_path: Path) -> None:
    model, file = _saved(name, tmp_path, force_custom_text=True)
    encoder = OpenClipLanguage(name, True, file).eval()
    theirs = torch.zeros(2, 16, dtype=torch.long)
    theirs[0, :5], theirs[1, :2] = torch.tensor([7, 8, 9, 10, 3]), torch.tensor([7, 3])
    ids = torch.cat([torch.full((2, 1), 120), theirs[:, :5]], dim=1)  # as few places as the longest text needs
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    projected = encoder(ids, mask)[:, 0]
    projection = model.text.text_projection
    projected = projection(projected) if isinstance(projection, torch.nn.Linear) else projected @ projection
    _close(projected, model.text(theirs)[0] if name == "tiny-coca" else model.text(theirs))


@torch.no_grad()
def test_text_towers_of_transformers_are_the_librarys(tmp_path: Path) -> None:
    model, file = _saved("tiny-roberta", tmp_path)
    encoder = OpenClipLanguage("tiny-roberta", True, file).eval()
    ids = torch.tensor([[0, 0, 7, 8, 9, 2], [0, 0, 7, 2, 1, 1]])
    states = encoder(ids, ids.ne(1))
    _close(model.text.proj(states[:, 0]), model.encode_text(ids[:, 1:]))
    earlier, last = encoder.layers(ids, ids.ne(1), 2)
    hidden = model.text.transformer(ids[:, 1:], attention_mask=ids[:, 1:].ne(1).long(), output_hidden_states=True)
    _close(earlier[:, 1:], hidden.hidden_states[-2])
    _close(last, states)
    assert len(encoder.blocks) == 2


def test_the_mask_token_starts_as_the_mean_of_all_words() -> None:
    encoder = OpenClipLanguage("tiny-clip", pretrained=False)
    table = encoder.text.token_embedding.weight
    torch.testing.assert_close(table[-1], table[:-3].mean(0))


@torch.no_grad()
def test_a_later_word_changes_no_earlier_state_but_the_first() -> None:
    encoder = OpenClipLanguage("tiny-clip", pretrained=False).eval()
    ids = torch.tensor([[49408, 49406, 5, 6, 7, 49407], [49408, 49406, 5, 6, 9, 49407]])
    one, other = encoder(ids, torch.ones_like(ids, dtype=torch.bool))
    _close(one[1:4], other[1:4])
    assert not torch.allclose(one[0], other[0]) and not torch.allclose(one[4], other[4])


def test_openais_weights_bring_their_activation_even_where_the_name_does_not_say_so(tmp_path: Path) -> None:
    with torch.device("meta"):
        towers = {name: OpenClipVision(name, pretrained=False) for name in ("ViT-B-32/openai", "ViT-B-32/laion2b_e16")}
    kinds = {name: type(tower.tower.visual.transformer.resblocks[0].mlp.gelu) for name, tower in towers.items()}
    assert [kind.__name__ for kind in kinds.values()] == ["QuickGELU", "GELU"]


def test_a_siglip_tag_brings_its_pixels() -> None:
    with torch.device("meta"):
        encoder = OpenClipVision("ViT-B-16-SigLIP/webli", pretrained=False)
    assert (encoder.mean, encoder.std, encoder.image_pixels, encoder.width) == ((0.5,) * 3, (0.5,) * 3, 224, 768)


def test_words_of_the_data_serve_an_encoder_that_starts_from_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a red circle\na blue square\n")
    config = OpenClipLanguageConfig(name="tiny-siglip", pretrained=False, tokenizer="words", max_tokens=17)
    encoder, tokenizer = config.build(), config.build_tokenizer(tmp_path / "train.txt")
    ids, mask, _ = tokenizer(["a red square", "circle"])
    assert encoder(ids, mask).shape == (2, 5, 32) and tokenizer.vocabulary_size == 123
    with pytest.raises(ValueError, match="Give pretrained=false too"):
        OpenClipLanguageConfig(tokenizer="words")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ViT-B-33"}, r"open_clip has no model 'ViT-B-33'\. Did you mean 'ViT-B-32"),
        ({"name": "ViT-B-32/openia"}, r"no weights 'openia' of ViT-B-32\. Did you mean 'openai'"),
        ({"name": "ViT-B-32"}, r"give ARCHITECTURE/TAG, with one of: openai, .*model.vision.weights=FILE"),
        ({"name": "tiny-clip", "weights": "nowhere.pt"}, r"nowhere\.pt: no such weights file"),
    ],
)
def test_what_cannot_be_found_is_named_with_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OpenClipVisionConfig(**options).build()


def test_weights_of_another_model_or_with_code_are_refused(tmp_path: Path) -> None:
    _, file = _saved("tiny-clip", tmp_path)
    with pytest.raises(UserError, match=r"weights\.safetensors: not the weights of 'tiny-coca'"):
        OpenClipVision("tiny-coca", True, weights=file)
    torch.save({"weight": Path("code")}, tmp_path / "code.pt")
    with pytest.raises(UserError, match=r"code\.pt: not the weights of"):
        OpenClipVision("tiny-clip", True, weights=tmp_path / "code.pt")


def test_without_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"model.vision.weights=FILE, or set model.vision.pretrained=false"):
        OpenClipVision("ViT-B-32/laion2b_e16", pretrained=True)


def test_more_tokens_than_the_tower_reads_are_refused() -> None:
    with pytest.raises(UserError, match=r"tiny-clip reads 16 tokens and our \[CLS\]\. Got 50"):
        OpenClipLanguageConfig(name="tiny-clip", pretrained=False).build()


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"pip install 'vlm-less-supervision\[clip\]'"):
        OpenClipVisionConfig().build()
