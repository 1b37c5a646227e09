"""Whole labels are hidden, by their place in the text, with any tokenizer; or as the released code does it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch
from torch import Tensor

from vlm.config import ConfigError, compose
from vlm.models import ModelConfig
from vlm.models.fusion import CoAttentionConfig
from vlm.models.language import TinyLanguageConfig
from vlm.models.language.tokenizer import Tokenizer
from vlm.models.vision import TinyVisionConfig
from vlm.objectives import MaskedLanguageConfig
from vlm.objectives.masked_language import MaskedLanguage, mask_labels
from vlm.run import RunConfig, _label_matching
from vlm.supervision.sources import SEPARATOR, LabelMatching, label_spans
from vlm.types import Batch

LISTS = (
    ("woman", "man", "fire truck", "old man"),
    ("fire truck",),
    ("café", "woman"),
    ("traffic light", "man", "woman", "old man", "café", "fire truck", "man"),
)
TEXTS = [SEPARATOR.join(labels) for labels in LISTS]
LANGUAGE = TinyLanguageConfig(width=16, depth=1, num_heads=2, vocabulary_size=64, max_tokens=32)


def words(folder: Path) -> Tokenizer:
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    return LANGUAGE.build_tokenizer(folder / "texts.txt")


def word_pieces(folder: Path) -> Tokenizer:
    from tokenizers import models, normalizers, pre_tokenizers, processors

    pieces = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", ",", "wo", "##man", "man", "fire", "tr", "##uck", "old"]
    pieces += ["cafe", "traffic", "li", "##ght"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return Tokenizer(backend, 32)


def byte_pairs(folder: Path, trim_offsets: bool = True) -> Tokenizer:
    """As RoBERTa has it: bytes, and the space before a word belongs to the word."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=275, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=trim_offsets, add_prefix_space=False
    )
    return Tokenizer(backend, 64)


def untrimmed_byte_pairs(folder: Path) -> Tokenizer:
    """The space counts as a part of the word."""
    return byte_pairs(folder, trim_offsets=False)


TOKENIZERS = {
    "words": words,
    "word pieces": word_pieces,
    "byte pairs": byte_pairs,
    "untrimmed byte pairs": untrimmed_byte_pairs,
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return TOKENIZERS[request.param](tmp_path)


def encoded(tokenizer: Tokenizer, matching: LabelMatching = "position") -> tuple[Tensor, Tensor, Tensor]:
    """(ids, special, label tokens) of `LISTS`"""
    ids, _, special, tokens = tokenizer.with_spans(TEXTS, [label_spans(labels, matching) for labels in LISTS])
    return ids, special, tokens


# --- Tokens of labels ------------------------------------------------------------------------------------------------


def test_the_tokens_of_a_label_spell_the_label_and_nothing_else(tokenizer: Tokenizer) -> None:
    ids, special, tokens = encoded(tokenizer)
    plain = tokenizer(TEXTS)
    assert torch.equal(plain[0], ids) and torch.equal(plain[2], special)
    for row, labels in enumerate(LISTS):
        for place, label in enumerate(labels):
            spelt = tokenizer.decode(ids[row][tokens[row, place]].tolist()).replace(" ##", "").replace("##", "")
            assert spelt.strip().replace("é", "e") == label.replace("é", "e")
        assert not tokens[row, len(labels) :].any()
        assert (tokens[row].sum(0) <= 1).all()  # no token belongs to two
    assert not (tokens & special[:, None]).any()


def test_a_label_behind_the_cut_has_no_tokens(tmp_path: Path) -> None:
    cut = Tokenizer(words(tmp_path).backend, 8)
    *_, tokens = encoded(cut)
    assert tokens[3].any(-1).tolist() == [True, True, True, False, False, False, False]


# --- Sound masks -----------------------------------------------------------------------------------------------------


def hidden(tokens: Tensor, predicted: Tensor) -> list[list[int]]:
    """Of each row the labels that are predicted; each is so with all of its tokens or with none."""
    found = []
    for row in range(len(tokens)):
        of_row = []
        for label in range(tokens.shape[1]):
            mine = predicted[row][tokens[row, label]]
            assert mine.all() or not mine.any()
            of_row += [label] if len(mine) and mine.all() else []
        found.append(of_row)
    return found


@pytest.mark.parametrize(("fraction", "expected"), [(0.05, [1, 1, 1, 1]), (0.3, [1, 1, 1, 2]), (0.5, [2, 1, 1, 4])])
def test_the_rounded_fraction_of_the_labels_is_hidden_and_at_least_one(
    tokenizer: Tokenizer, fraction: float, expected: list[int]
) -> None:
    ids, special, tokens = encoded(tokenizer)
    for seed in range(10):
        torch.manual_seed(seed)
        _, predicted = mask_labels(ids, tokens, fraction, tokenizer.mask_id, tokenizer.vocabulary_size)
        assert [len(labels) for labels in hidden(tokens, predicted)] == expected
        assert not (predicted & special).any()
        assert not (predicted & ~tokens.any(1)).any()  # no comma


def test_every_label_is_hidden_equally_often(tmp_path: Path) -> None:
    ids, _, tokens = encoded(words(tmp_path))
    counts = torch.zeros(7)
    for seed in range(700):
        torch.manual_seed(seed)
        (label,) = hidden(tokens, mask_labels(ids, tokens, 0.15, 3, 64)[1])[3]
        counts[label] += 1
    assert counts.min() > 65 and counts.max() < 140


def test_a_hidden_label_is_masked_replaced_or_kept_as_a_whole(tmp_path: Path) -> None:
    tokenizer = words(tmp_path)
    ids, _, tokens = encoded(tokenizer)
    kinds = torch.zeros(3)
    for seed in range(500):
        torch.manual_seed(seed)
        masked, predicted = mask_labels(ids, tokens, 0.1, tokenizer.mask_id, 10_000)
        assert torch.equal(masked[~predicted], ids[~predicted])
        before, after = ids[1][predicted[1]], masked[1][predicted[1]]  # "fire truck": two tokens
        assert len(before) == 2
        is_masked, is_kept = after == tokenizer.mask_id, after == before
        assert is_masked.all() or is_kept.all() or not (is_masked | is_kept).any()
        kinds[0 if is_masked.all() else 1 if is_kept.all() else 2] += 1
    torch.testing.assert_close(kinds / 500, torch.tensor([0.8, 0.1, 0.1]), atol=0.05, rtol=0)


def test_texts_without_any_label_are_left_to_others() -> None:
    ids = torch.tensor([[1, 7, 8, 2]])
    masked, predicted = mask_labels(ids, torch.zeros(1, 0, 4, dtype=torch.bool), 0.15, 3, 64)
    assert torch.equal(masked, ids) and not predicted.any()


# --- As released -----------------------------------------------------------------------------------------------------


def make_tokens(counts: list[int]) -> tuple[Tensor, Tensor]:
    """Texts of so many labels, one token each."""
    ids = torch.arange(10, 10 + max(counts) + 2).repeat(len(counts), 1)
    tokens = torch.zeros(len(counts), max(counts), ids.shape[1], dtype=torch.bool)
    for row, count in enumerate(counts):
        for label in range(count):
            tokens[row, label, label + 1] = True
    return ids, tokens


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([8, 4, 12], [2, 1, 4]),  # 2.4, 1.2 and 3.6: none is without
        ([8, 1, 12, 1, 8], [2, 0, 1, 1, 1]),  # after the first without, one each
        ([1, 8], [0, 1]),
        ([8, 0, 12], [2, 0, 4]),  # a text that is no list changes nothing
        ([5], [2]),  # 1.5 rounds half to even
    ],
)
def test_in_the_released_form_one_text_without_a_label_leaves_one_for_all_behind_it(
    counts: list[int], expected: list[int]
) -> None:
    ids, tokens = make_tokens(counts)
    for seed in range(5):
        torch.manual_seed(seed)
        _, predicted = mask_labels(ids, tokens, 0.3, 3, 64, released=True)
        assert predicted.sum(1).tolist() == expected


@pytest.mark.parametrize("released", [False, True])
def test_the_tokens_of_a_label_are_replaced_alike_but_in_the_released_form(released: bool) -> None:
    ids = torch.full((50, 20), 9)
    tokens = torch.ones(50, 1, 20, dtype=torch.bool)
    torch.manual_seed(0)
    masked, predicted = mask_labels(ids, tokens, 0.9, 3, 64, released=released)
    assert predicted.all()
    hidden = (masked == 3).float().mean(1)
    in_part = ((hidden > 0.3) & (hidden < 1)).sum()
    assert in_part > 40 if released else in_part == 0


def test_in_the_released_form_a_label_takes_the_words_along_that_contain_it(tmp_path: Path) -> None:
    tokenizer = words(tmp_path)
    ids, _, tokens = encoded(tokenizer, "substring")
    of_man = tokenizer.decode(ids[0][tokens[0, 1]].tolist())
    assert of_man == "woman man man"
    assert tokenizer.decode(ids[0][encoded(tokenizer)[2][0, 1]].tolist()) == "man"


# --- The objective ---------------------------------------------------------------------------------------------------


def objective_of(tokenizer: Tokenizer, **options: object) -> MaskedLanguage:
    vision = TinyVisionConfig(width=16, depth=1, num_heads=2, patch_size=8, image_pixels=16)
    fusion = CoAttentionConfig(width=24, depth=1, num_heads=2, dropout=0)
    model = ModelConfig(vision=vision, language=LANGUAGE, fusion=fusion).build()
    return MaskedLanguage(MaskedLanguageConfig.model_validate(options), model, tokenizer)


def test_captions_of_a_mixture_lose_tokens_and_lists_lose_labels(tmp_path: Path) -> None:
    tokenizer = words(tmp_path)
    texts = ["woman man fire truck old traffic light café woman man", TEXTS[3], ""]
    spans = [[], label_spans(LISTS[3], "position"), []]
    ids, mask, special, tokens = tokenizer.with_spans(texts, spans)
    batch = Batch(("a", "b", "c"), text_ids=ids, text_mask=mask, special_mask=special, label_tokens=tokens)
    plain = Batch(("a", "b", "c"), text_ids=ids, text_mask=mask, special_mask=special)
    objective = objective_of(tokenizer, masking="whole_label", mask_fraction=0.3)
    counts = set()
    for seed in range(40):
        torch.manual_seed(seed)
        predicted = objective.view(batch).targets["predicted"]
        torch.manual_seed(seed)
        as_tokens = objective_of(tokenizer, mask_fraction=0.3) if seed == 0 else as_tokens
        torch.manual_seed(seed)
        expected = as_tokens.view(plain).targets["predicted"]
        assert torch.equal(predicted[0], expected[0])
        assert len(hidden(tokens, predicted)[1]) == 2
        assert not predicted[2].any()
        counts.add(int(predicted[0].sum()))
    assert len(counts) > 3  # tokens are drawn one by one


def test_the_batch_says_where_labels_lie_only_if_an_objective_asks() -> None:
    def matching(*overrides: str) -> LabelMatching | None:
        return _label_matching(compose("pretrain", ["supervision=machine_labels", *overrides], RunConfig))

    whole = "objectives.masked_language.masking=whole_label"
    assert matching() is None
    assert matching(whole) == "position"
    assert matching(whole, "objectives.masked_language.label_masking=released") == "substring"
    with pytest.raises(ConfigError, match="unpaired texts are no lists of labels"):
        matching(whole, "objectives.masked_language.with_image=false")
