"""How the micro-batches of a step weigh: with `items` as in one large batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.config import fingerprint
from vlm.objectives import MaskedLanguageConfig
from vlm.objectives.masked_language import MaskedLanguage
from vlm.run import RunConfig, _fit, build_finetuning, build_model, build_pretraining, build_tokenizer
from vlm.types import Batch, View

MakeConfig = Callable[..., RunConfig]
KNOWN_MASKS = "objectives.masked_language={type: custom, target: 'test_weighting:KnownMasks'}"
MASKS_ALONE = (KNOWN_MASKS, "~objectives.matching")
UNEQUAL = ("supervision.sources=[{type: captions}, {type: none}]", "model.fusion.dropout=0", "trainer.samples=16")


class KnownMasks(MaskedLanguage):
    """Masks every word of an odd id, so that the same texts lose the same words in batches of any size."""

    def __init__(self, model: Any, tokenizer: Any, classes: tuple[str, ...]) -> None:
        super().__init__(MaskedLanguageConfig(), model, tokenizer)

    def view(self, batch: Batch) -> View:
        assert batch.text_ids is not None and batch.special_mask is not None
        predicted = ~batch.special_mask & (batch.text_ids % 2 == 1)
        masked = torch.where(predicted, self.mask_id, batch.text_ids)
        return View("pair", masked, batch.text_mask, targets={"predicted": predicted, "ids": batch.text_ids[predicted]})


def first_gradient(config: RunConfig) -> dict[str, Tensor]:
    """Of the first optimizer step, as the optimizer meets it."""
    config.run_folder.mkdir()
    root = config.data.prepare(progress=False)
    tokenizer, model = build_tokenizer(config, root), build_model(config)
    build = build_pretraining if config.task is None else build_finetuning
    module, train, validation = build(config, root, model, tokenizer)
    found: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        named = ((name, parameter.grad) for name, parameter in module.named_parameters())
        found.update({name: gradient.clone() for name, gradient in named if gradient is not None and not found})

    module.on_before_optimizer_step = keep  # type: ignore[method-assign]
    _fit(config, module, train, validation)
    return found


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_unequal_micro_batches_give_the_gradient_of_one_large_batch(make_config: MakeConfig, accumulate: int) -> None:
    """Texts differ in how many words they lose, and images without a text lose none."""
    options = (*UNEQUAL, *MASKS_ALONE)
    large = first_gradient(make_config("pretrain", *options, folder="large"))
    several = (*options, f"trainer.accumulate={accumulate}")
    by_items = first_gradient(make_config("pretrain", *several, folder="items"))
    assert largest_difference(large, by_items) < 1e-6
    weighting = "trainer.loss_weighting=micro_batches"
    by_micro_batch = first_gradient(make_config("pretrain", *several, weighting, folder="micro_batches"))
    assert largest_difference(large, by_micro_batch) > 1e-4


def test_each_objective_weighs_by_its_own_items(make_config: MakeConfig) -> None:
    options = (*UNEQUAL, KNOWN_MASKS, "trainer.accumulate=4")
    both = first_gradient(make_config("pretrain", *options, folder="both"))
    alone = first_gradient(make_config("pretrain", *options, "~objectives.matching", folder="alone"))
    name = "objectives.masked_language.head.3.weight"  # which matching has no part in
    torch.testing.assert_close(both[name], alone[name], rtol=0, atol=1e-6)


def test_questions_weigh_alike_in_any_micro_batches(make_config: MakeConfig) -> None:
    options = ("task=nlvr2", "model.fusion.dropout=0", "trainer.samples=16")
    large = first_gradient(make_config("finetune", *options, folder="large"))
    parts = first_gradient(make_config("finetune", *options, "trainer.accumulate=4", folder="parts"))
    assert largest_difference(large, parts) < 1e-6


def test_the_weighting_is_part_of_what_a_run_is_only_where_a_step_has_several_micro_batches(
    make_config: MakeConfig,
) -> None:
    one, two = make_config("pretrain"), make_config("pretrain", "trainer.accumulate=2")
    assert (one.trainer.loss_weighting, two.trainer.loss_weighting) == (None, "items")
    as_before = make_config("pretrain", "trainer.accumulate=2", "trainer.loss_weighting=micro_batches")
    assert len({fingerprint(config) for config in (one, two, as_before)}) == 3


def test_an_objective_that_counts_wrongly_stops_the_run(make_config: MakeConfig) -> None:
    wrong = "objectives.masked_language={type: custom, target: 'test_weighting:CountsWrongly'}"
    with pytest.raises(ValueError, match=r"masked_language: a loss over \d+ items, of which count\(\) had said"):
        first_gradient(make_config("pretrain", wrong, "trainer.samples=16", "trainer.accumulate=2"))


class CountsWrongly(KnownMasks):
    def count(self, view: View) -> int:
        return super().count(view) + 1
