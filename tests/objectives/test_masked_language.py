from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlm.models import ModelConfig
from vlm.models.fusion import CoAttentionConfig
from vlm.models.language import TinyLanguageConfig
from vlm.models.language.tokenizer import Tokenizer
from vlm.models.vision import TinyVisionConfig
from vlm.models.vision_language import VisionLanguageModel
from vlm.objectives import MaskedLanguageConfig
from vlm.objectives.masked_language import MaskedLanguage, mask_tokens
from vlm.types import Batch, Encoded, View

MASK, VOCABULARY = 3, 1000
TEXTS = ("a red circle above a blue square", "star", "", "two yellow stars")
LANGUAGE = TinyLanguageConfig(width=16, depth=1, num_heads=2, vocabulary_size=32, max_tokens=16)


def make_ids(num_words: list[int]) -> tuple[Tensor, Tensor]:
    """Texts of so many words between CLS and SEP, padded, and their special mask. Words have ids from 10 on."""
    length = max(num_words) + 2
    ids, special = torch.zeros(len(num_words), length, dtype=torch.long), torch.ones(len(num_words), length).bool()
    for row, count in enumerate(num_words):
        ids[row, 0], ids[row, count + 1] = 1, 2
        ids[row, 1 : count + 1] = torch.randint(10, VOCABULARY, (count,))
        special[row, 1 : count + 1] = False
    return ids, special


def masked(num_words: list[int], fraction: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, special, masked ids, predicted)"""
    torch.manual_seed(seed)
    ids, special = make_ids(num_words)
    return ids, special, *mask_tokens(ids, special, fraction, MASK, VOCABULARY)


# --- Masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.1, 0.15, 0.4])
def test_the_fraction_of_words_is_predicted(fraction: float) -> None:
    _, special, _, predicted = masked([60, 100] * 200, fraction)
    assert float(predicted.sum() / (~special).sum()) == pytest.approx(fraction, abs=0.01)


def test_special_tokens_are_never_predicted_nor_changed() -> None:
    for seed in range(20):
        ids, special, changed, predicted = masked([0, 1, 2, 7, 30], 0.9, seed)
        assert not (predicted & special).any()
        assert torch.equal(changed[special], ids[special])


def test_only_predicted_tokens_change() -> None:
    ids, _, changed, predicted = masked([20] * 50, 0.3)
    assert torch.equal(changed[~predicted], ids[~predicted])


def test_every_text_with_a_word_has_something_to_predict() -> None:
    for seed in range(20):
        _, _, _, predicted = masked([1, 2, 3, 1, 5], 0.05, seed)
        assert predicted.any(dim=1).all()


def test_a_text_without_words_has_nothing_to_predict() -> None:
    _, _, _, predicted = masked([0, 4], 0.5)
    assert predicted.any(dim=1).tolist() == [False, True]


def test_of_the_predicted_80_percent_are_masked_10_random_and_10_kept() -> None:
    ids, _, changed, predicted = masked([100] * 300, 0.5)
    before, after = ids[predicted], changed[predicted]
    count = len(before)
    assert float((after == MASK).sum() / count) == pytest.approx(0.8, abs=0.015)
    assert float((after == before).sum() / count) == pytest.approx(0.1, abs=0.015)
    random = after[(after != MASK) & (after != before)]
    assert float(len(random) / count) == pytest.approx(0.1, abs=0.015)
    assert float(random.float().mean()) == pytest.approx(VOCABULARY / 2, rel=0.05)  # from the whole vocabulary


def test_the_seed_decides_the_mask() -> None:
    first, again, other = (masked([30] * 4, 0.3, seed)[2:] for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


# --- The objective ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file: Path = tmp_path_factory.mktemp("texts") / "train.txt"
    file.write_text("\n".join(TEXTS))
    return LANGUAGE.build_tokenizer(file)


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    vision = TinyVisionConfig(width=16, depth=1, num_heads=2, patch_size=8, image_pixels=16)
    fusion = CoAttentionConfig(width=24, depth=1, num_heads=2, dropout=0)
    return ModelConfig(vision=vision, language=LANGUAGE, fusion=fusion).build()


def make_batch(tokenizer: Tokenizer, texts: tuple[str, ...] = TEXTS) -> Batch:
    ids, mask, special = tokenizer(texts)
    image = torch.randint(256, (len(texts), 3, 16, 16), dtype=torch.uint8)
    return Batch(keys=tuple("abcd"[: len(texts)]), image=image, text_ids=ids, text_mask=mask, special_mask=special)


def encoded_for(
    objective: MaskedLanguage, model: VisionLanguageModel, batch: Batch, seed: int = 0
) -> tuple[View, Encoded]:
    torch.manual_seed(seed)
    view = objective.view(batch)
    return view, model.encode(batch.image, [view])[0]


@pytest.mark.parametrize("with_image", [True, False])
def test_the_vocabulary_head_sees_exactly_the_masked_positions(
    model: VisionLanguageModel, tokenizer: Tokenizer, with_image: bool
) -> None:
    objective = MaskedLanguage(MaskedLanguageConfig(with_image=with_image, mask_fraction=0.4), model, tokenizer)
    batch = make_batch(tokenizer)
    seen: list[Tensor] = []
    objective.head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    view, encoded = encoded_for(objective, model, batch)
    loss = objective.loss(view, encoded)
    assert encoded.text is not None and batch.text_ids is not None and batch.special_mask is not None
    predicted = view.targets["predicted"]
    assert predicted.shape == batch.text_ids.shape
    assert torch.equal(seen[0], encoded.text[predicted])
    assert torch.equal(view.targets["ids"], batch.text_ids[predicted])  # the words as they were
    assert not (predicted & batch.special_mask).any()
    assert loss.count == int(predicted.sum()) == len(seen[0])
    assert view.kind == ("pair" if with_image else "text")
    assert encoded.text.shape[-1] == (24 if with_image else 16)


def test_loss_and_accuracy_are_those_of_the_true_words(model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
    objective = MaskedLanguage(MaskedLanguageConfig(mask_fraction=0.9), model, tokenizer)
    view, encoded = encoded_for(objective, model, make_batch(tokenizer))
    assert encoded.text is not None
    logits = objective.head(encoded.text[view.targets["predicted"]])
    ids = view.targets["ids"]
    expected = -torch.stack([F.log_softmax(row, -1)[word] for row, word in zip(logits, ids, strict=True)]).mean()
    loss = objective.loss(view, encoded)
    torch.testing.assert_close(loss.value, expected)
    assert float(loss.figures["accuracy"]) == pytest.approx(float((logits.argmax(-1) == ids).float().mean()))


def test_the_picture_informs_only_the_form_with_an_image(model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
    batch = make_batch(tokenizer)
    assert batch.image is not None
    other = Batch(batch.keys, 255 - batch.image, batch.text_ids, batch.text_mask, batch.special_mask)
    for with_image in (True, False):
        objective = MaskedLanguage(MaskedLanguageConfig(with_image=with_image), model, tokenizer)
        losses = [objective.loss(*encoded_for(objective, model, each)).value for each in (batch, other)]
        assert torch.equal(*losses) != with_image


def test_images_beyond_the_texts_are_ignored(model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
    """They are another objective's negatives."""
    objective = MaskedLanguage(MaskedLanguageConfig(), model, tokenizer)
    batch = make_batch(tokenizer)
    assert batch.image is not None
    image = torch.cat([batch.image, batch.image[:2]])
    extended = Batch((*batch.keys, "x", "y"), image, batch.text_ids, batch.text_mask, batch.special_mask)
    losses = [objective.loss(*encoded_for(objective, model, each)).value for each in (batch, extended)]
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("with_image", [True, False])
def test_a_batch_without_words_costs_nothing(
    model: VisionLanguageModel, tokenizer: Tokenizer, with_image: bool
) -> None:
    """Weak labels leave some images without a text; a batch of only those must not poison the weights."""
    objective = MaskedLanguage(MaskedLanguageConfig(with_image=with_image), model, tokenizer)
    loss = objective.loss(*encoded_for(objective, model, make_batch(tokenizer, ("", ""))))
    assert (float(loss.value.detach()), loss.count) == (0.0, 0)
    assert all(torch.isfinite(figure) for figure in loss.figures.values())
    loss.value.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in objective.parameters())
