from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlm.config import ConfigError, compose
from vlm.models import ModelConfig
from vlm.models.fusion import CoAttentionConfig
from vlm.models.language import TinyLanguageConfig
from vlm.models.vision import TinyVisionConfig
from vlm.objectives import MatchingConfig
from vlm.objectives.matching import Matching
from vlm.run import RunConfig
from vlm.types import Batch, Encoded, View

DISTINCT = tuple(f"key-{number}" for number in range(12))


def build(**options: object) -> Matching:
    torch.manual_seed(0)
    model = ModelConfig(
        vision=TinyVisionConfig(width=16, depth=1, num_heads=2, patch_size=8, image_pixels=16),
        language=TinyLanguageConfig(width=16, depth=1, num_heads=2, vocabulary_size=16, max_tokens=8),
        fusion=CoAttentionConfig(width=16, depth=1, num_heads=2, dropout=0),
    ).build()
    return Matching(MatchingConfig.model_validate(options), model)


def make_batch(keys: tuple[str, ...], num_texts: int) -> Batch:
    return Batch(
        keys=keys,
        image=torch.zeros(len(keys), 3, 16, 16, dtype=torch.uint8),
        text_ids=torch.ones(num_texts, 4, dtype=torch.long),
        text_mask=torch.ones(num_texts, 4, dtype=torch.bool),
    )


def pairs(view: View) -> tuple[Tensor, Tensor]:
    """(image of each text, is it matched)"""
    assert view.image_index is not None
    matched = view.targets["matched"]
    assert matched.shape == view.image_index.shape
    assert matched.dtype == torch.bool
    return view.image_index, matched


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_the_negative_fraction_is_exact(fraction: float) -> None:
    objective, batch = build(negative_fraction=fraction), make_batch(DISTINCT, 12)
    for seed in range(20):
        torch.manual_seed(seed)
        _, matched = pairs(objective.view(batch))
        assert int((~matched).sum()) == 12 * fraction


def test_in_batch_negatives_are_images_of_other_examples() -> None:
    objective, batch = build(), make_batch(DISTINCT, 12)
    own = torch.arange(12)
    drawn = set()
    for seed in range(60):
        torch.manual_seed(seed)
        image_index, matched = pairs(objective.view(batch))
        assert torch.equal(matched, image_index == own)
        assert set(image_index.tolist()) <= set(range(12))
        drawn |= set(zip(own[~matched].tolist(), image_index[~matched].tolist(), strict=True))
    assert len(drawn) > 0.8 * 12 * 11  # any other image may come, not a fixed shift


def test_labels_agree_with_keys_where_an_example_comes_twice() -> None:
    keys = ("a", "b", "a", "c", "b", "a")
    objective, batch = build(negative_fraction=0.8), make_batch(keys, 6)
    met_own = 0
    for seed in range(60):
        torch.manual_seed(seed)
        image_index, matched = pairs(objective.view(batch))
        for text, (image, label) in enumerate(zip(image_index.tolist(), matched.tolist(), strict=True)):
            assert label == (keys[image] == keys[text])
            met_own += label and image != text
    assert met_own > 0


def test_random_negatives_are_the_extra_images_each_once() -> None:
    extra = ("x", "y", "z", "key-0")
    objective, batch = build(negatives="random"), make_batch((*DISTINCT[:8], *extra), 8)
    met_own = 0
    for seed in range(40):
        torch.manual_seed(seed)
        image_index, matched = pairs(objective.view(batch))
        assert sorted(image_index[image_index >= 8].tolist()) == [8, 9, 10, 11]
        for text, (image, label) in enumerate(zip(image_index.tolist(), matched.tolist(), strict=True)):
            assert image == text or image >= 8
            assert label == (image == text or batch.keys[image] == batch.keys[text])
            met_own += label and image != text  # the draw may meet the text's own image
    assert met_own > 0


def test_in_batch_negatives_leave_the_images_alone_that_another_objective_drew() -> None:
    extra = ("x", "y", "z", "w")
    objective, batch = build(), make_batch((*DISTINCT[:8], *extra), 8)
    for seed in range(20):
        torch.manual_seed(seed)
        image_index, _ = pairs(objective.view(batch))
        assert int(image_index.max()) < 8


def test_a_single_pair_has_no_negative() -> None:
    image_index, matched = pairs(build().view(make_batch(("a",), 1)))
    assert image_index.tolist() == [0]
    assert matched.tolist() == [True]


def test_the_text_is_whole() -> None:
    batch = make_batch(DISTINCT, 12)
    assert build().view(batch).text_ids is batch.text_ids


def test_the_loss_is_the_cross_entropy_of_match_or_no_match() -> None:
    objective = build()
    view = objective.view(make_batch(DISTINCT, 12))
    pooled = torch.randn(12, 32)
    loss = objective.loss(view, Encoded(pooled=pooled))
    probabilities = F.softmax(objective.head(pooled), dim=-1)
    matched = view.targets["matched"]
    expected = -torch.where(matched, probabilities[:, 1], probabilities[:, 0]).log().mean()
    torch.testing.assert_close(loss.value, expected)
    right = (probabilities[:, 1] > 0.5) == matched
    assert float(loss.figures["accuracy"]) == pytest.approx(float(right.float().mean()))
    assert loss.count == 12


@pytest.mark.parametrize("negatives", ["in_batch", "random"])
def test_an_image_without_a_text_is_neither_matched_nor_mismatched(negatives: str) -> None:
    objective, batch = build(negatives=negatives), make_batch(DISTINCT, 8)
    for seed in range(10):
        batch.sources = ()
        torch.manual_seed(seed)
        every = objective.view(batch)
        batch.sources = ("machine", "none", "human", "none", *["machine"] * 4)  # type: ignore[assignment]  # * widens literals
        torch.manual_seed(seed)
        view = objective.view(batch)
        kept = [0, 2, 4, 5, 6, 7]
        assert view.text_index is not None and view.text_index.tolist() == kept
        assert every.image_index is not None and view.image_index is not None
        assert torch.equal(view.image_index, every.image_index[kept])  # the same draws
        assert torch.equal(view.targets["matched"], every.targets["matched"][kept])
        loss = objective.loss(view, Encoded(pooled=torch.randn(6, 32)))
        assert loss.count == 6 and loss.items is not None
        items = loss.items()
        assert items.row.tolist() == kept
        torch.testing.assert_close(items.loss.mean(), loss.value.detach())


def test_a_batch_without_any_text_costs_nothing() -> None:
    objective, batch = build(), make_batch(DISTINCT[:4], 4)
    batch.sources = ("none",) * 4
    view = objective.view(batch)
    loss = objective.loss(view, Encoded(pooled=torch.zeros(0, 32)))
    assert (float(loss.value.detach()), loss.count) == (0.0, 0)
    loss.value.backward()
    assert not any(parameter.grad is None or parameter.grad.any() for parameter in objective.parameters())


def test_the_masked_text_is_the_one_that_masked_language_sees() -> None:
    batch, masked = make_batch(DISTINCT, 12), torch.full((12, 4), 7)
    others = {
        "alone": View("text", masked + 1, batch.text_mask, targets={"predicted": masked > 0}),
        "masked_language": View("pair", masked, batch.text_mask, targets={"predicted": masked > 0}),
    }
    for text, seen in (("whole", batch.text_ids), ("masked", masked)):
        objective = build(text=text)
        torch.manual_seed(0)
        own = objective.view(batch)
        view = objective.beside(own, {"matching": own} | others)
        assert view.text_ids is seen  # the very tensor, so that the text is encoded once
        assert torch.equal(pairs(view)[0], pairs(own)[0]) and torch.equal(pairs(view)[1], pairs(own)[1])


def test_a_masked_text_needs_an_objective_that_masks_it() -> None:
    with pytest.raises(ConfigError, match="text=masked needs a masked_language objective"):
        compose(None, ["objectives={matching: {type: matching, text: masked}}"], RunConfig)
