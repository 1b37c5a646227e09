"""Whole words, hard negatives, captions, teachers and weights that change do what they are said to."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from vlm.config import ConfigError, compose
from vlm.errors import UserError
from vlm.models import ModelConfig
from vlm.models.fusion import CoAttentionConfig
from vlm.models.language import TinyLanguageConfig
from vlm.models.language.tokenizer import Tokenizer
from vlm.models.vision import TinyVisionConfig
from vlm.objectives import (
    CaptioningConfig,
    ContrastiveConfig,
    DistillationConfig,
    MaskedLanguageConfig,
    MatchingConfig,
    WeightSchedule,
)
from vlm.objectives.captioning import Captioning
from vlm.objectives.masked_language import mask_tokens
from vlm.objectives.matching import draw
from vlm.run import RunConfig
from vlm.training.optimizer import OptimizerConfig
from vlm.training.pretraining import Pretraining
from vlm.types import Batch, Source

TEXTS = ("unbelievable fire trucks", "a woman", "trucks beside unbelievable women, trucks")


def word_pieces() -> Tokenizer:
    """As BERT has it."""
    pieces = [
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[UNK]",
        ",",
        "a",
        "un",
        "##believ",
        "##able",
        "fire",
        "truck",
        "##s",
    ]
    pieces += ["wom", "##an", "##en", "beside"]
    backend = tokenizers.Tokenizer(models.WordPiece({p: n for n, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return Tokenizer(backend, 32)


def byte_pairs() -> Tokenizer:
    """As RoBERTa has it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=266,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return Tokenizer(backend, 64)


# --- Whole words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [word_pieces, byte_pairs])
def test_a_word_is_hidden_with_all_its_tokens_or_not_at_all(make: Any) -> None:
    tokenizer = make()
    ids, mask, special, starts = tokenizer.with_words(TEXTS)
    assert all(torch.equal(one, other) for one, other in zip(tokenizer(TEXTS), (ids, mask, special), strict=True))
    words = [len(set(starts[row][~special[row]].tolist())) for row in range(len(TEXTS))]
    assert words == [3, 2, 6]  # the comma is one
    assert int((~special).sum()) > sum(words)  # some have several tokens
    torch.manual_seed(0)
    hidden, count, rounds = 0, int((~special).sum()), 400
    for _ in range(rounds):
        masked, predicted = mask_tokens(ids, special, 0.4, tokenizer.mask_id, tokenizer.vocabulary_size, starts)
        assert torch.equal(predicted, predicted.gather(1, starts))
        assert predicted.any(1).all() and not (predicted & special).any()
        assert torch.equal(masked[~predicted], ids[~predicted])
        hidden += int(predicted.sum())
    assert 0.38 < hidden / count / rounds < 0.5  # and at least one a text


# --- A small model ---------------------------------------------------------------------------------------------------


def build(
    objectives: dict[str, Any], weights: dict[str, Any] | None = None, distillation: DistillationConfig | None = None
) -> Pretraining:
    torch.manual_seed(0)
    model = ModelConfig(
        vision=TinyVisionConfig(width=16, depth=1, num_heads=2, patch_size=8, image_pixels=16),
        language=TinyLanguageConfig(width=16, depth=1, num_heads=2, vocabulary_size=32, max_tokens=16),
        fusion=CoAttentionConfig(width=16, depth=1, num_heads=2, dropout=0),
    ).build()
    parts = {name: config.build(model, word_pieces(), ()) for name, config in objectives.items()}
    weights = weights or dict.fromkeys(objectives, 1.0)
    return Pretraining(model, parts, weights, OptimizerConfig(), 10, 0, distillation=distillation)


def make_batch(keys: str = "abcdef", sources: tuple[Source, ...] = ()) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 17, (len(keys), 6), generator=generator)
    ids[:, 0], ids[:, -1] = 1, 2
    special = torch.zeros_like(ids).bool()
    special[:, [0, -1]] = True
    image = torch.randint(256, (len(keys), 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Batch(tuple(keys), image, ids, torch.ones_like(special), special, sources=sources)


# --- Hard negatives --------------------------------------------------------------------------------------------------


def test_a_draw_goes_by_the_softmax_of_what_is_allowed() -> None:
    logits, allowed = torch.tensor([[0.0, 1.0, 2.0, 9.0]]), torch.tensor([[True, True, True, False]])
    torch.manual_seed(0)
    drawn = torch.bincount(draw(logits.expand(20_000, -1), allowed.expand(20_000, -1)), minlength=4) / 20_000
    expected = torch.cat([logits[0, :3].softmax(-1), torch.zeros(1)])
    torch.testing.assert_close(drawn, expected, atol=0.01, rtol=0)


def test_hard_negatives_are_alike_and_never_the_example_itself() -> None:
    """At a low temperature each text meets the image that is most alike of those that are not its own."""
    module = build({"matching": MatchingConfig(negatives="hard"), "contrastive": ContrastiveConfig(temperature=0.0101)})
    keys, sources = "abacde", ("human", "human", "human", "none", "human", "human")
    batch = make_batch(keys, sources)  # type: ignore[arg-type]  # a tuple of literals
    views = module.views_of(batch)
    encoded = module.model.encode(batch.image, list(views.values()))
    view, contrast = views["matching"], views["contrastive"]
    assert view.text_index is not None and view.image_index is not None and contrast.similarity is not None
    texts, images, matched = view.text_index.tolist(), view.image_index.tolist(), view.targets["matched"].tolist()
    assert texts[:5] == images[:5] == [0, 1, 2, 4, 5] and matched == [True] * 5 + [False] * 10
    assert texts[5:10] == images[10:] == [0, 1, 2, 4, 5]
    assert all(keys[text] != keys[image] for text, image in zip(texts[5:], images[5:], strict=True))
    assert 3 not in texts  # an image without a text may be a negative image, but its text is none
    similarity = contrast.similarity(encoded[1]).detach()
    means = similarity.mean(1, keepdim=True)
    assert (similarity - means)[texts[5:10], images[5:10]].mean() > 0
    assert not similarity.requires_grad


def test_hard_negatives_train_while_the_contrast_weighs_nothing() -> None:
    objectives = {"matching": MatchingConfig(negatives="hard", text="masked"), "contrastive": ContrastiveConfig()}
    objectives["masked_language"] = MaskedLanguageConfig()
    weights = {"matching": 1.0, "contrastive": 0.0, "masked_language": 0.0}
    values = build(objectives, weights).losses_of(make_batch(), training=True)
    assert {name for name in values if name.endswith("/loss")} == {"matching/loss"}
    assert torch.isfinite(values["loss"])


def test_hard_negatives_need_a_contrast() -> None:
    with pytest.raises(ConfigError, match=r"objectives\.matching: negatives=hard needs a contrastive objective"):
        compose(None, ["objectives={matching: {type: matching, negatives: hard}}"], RunConfig)
    with pytest.raises(ConfigError, match="two pairs in three"):
        compose(None, ["objectives={m: {type: matching, negatives: hard, negative_fraction: 0.3}}"], RunConfig)
    with pytest.raises(UserError, match="needs a contrastive objective beside it"):
        build({"matching": MatchingConfig(negatives="hard")}).losses_of(make_batch())


# --- Captions --------------------------------------------------------------------------------------------------------


def test_a_caption_knows_its_image_and_the_words_before_and_nothing_of_those_behind() -> None:
    module = build({"captioning": CaptioningConfig()}).eval()
    objective: Any = module.objectives["captioning"]
    assert isinstance(objective, Captioning)
    nn.init.normal_(objective.word.weight)
    image = torch.randn(3, 5, 16)
    ids = torch.randint(5, 17, (3, 8))
    states = objective.decode(ids, image)
    for place in range(8):
        changed = ids.clone()
        changed[:, place:] = (ids[:, place:] - 4) % 12 + 5
        other = objective.decode(changed, image)
        assert torch.equal(other[:, :place], states[:, :place])
        assert (other[:, place:] - states[:, place:]).abs().amax(-1).min() > 1e-4
    assert (objective.decode(ids, image.flip(0))[0] - states[0]).abs().amax(-1).min() > 1e-4


def test_a_caption_is_asked_for_where_there_is_a_text_and_takes_nothing_from_the_language_encoder() -> None:
    module = build({"captioning": CaptioningConfig()})
    batch = make_batch(sources=("human", "none", "human", "human", "none", "human"))
    assert batch.text_mask is not None and batch.text_ids is not None
    batch.text_mask[0, 4:] = False
    module.losses_of(batch, training=True)["loss"].backward()
    with_gradient = {
        name.split(".")[1] for name, p in module.model.named_parameters(prefix="model") if p.grad is not None
    }
    assert with_gradient == {"vision", "vision_projection"}
    objective: Any = module.objectives["captioning"]
    view = objective.view(batch)
    assert objective.count(view) == 3 + 3 * 5  # of each text all tokens but the first
    assert torch.equal(view.targets["following"][:3], batch.text_ids[0, 1:4])


# --- Teachers --------------------------------------------------------------------------------------------------------

DISTILLED = {"masked_language": MaskedLanguageConfig(), "contrastive": ContrastiveConfig()}


def test_the_teacher_is_the_moving_average_of_the_weights() -> None:
    module = build(DISTILLED, distillation=DistillationConfig(momentum=0.75))
    teacher = module.teacher
    assert teacher is not None
    start = module.model.vision_projection.weight.detach().clone()
    with torch.no_grad():
        module.model.vision_projection.weight += 1
    teacher.follow(module.model, dict(module.objectives.items()))
    torch.testing.assert_close(teacher.model.vision_projection.weight, start + 0.25)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    module.train()
    assert not any(part.training for part in teacher.modules())


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_soft_targets_are_mixed_in_by_alpha_which_rises(loss: str) -> None:
    """Each loss is (1 - alpha) of the hard and alpha of the soft one, so three steps of a ramp lie on a line."""
    objectives = DISTILLED | {"contrastive": ContrastiveConfig(loss=loss)}  # type: ignore[arg-type]  # a parameter
    module = build(objectives, distillation=DistillationConfig(alpha=1.0, ramp_fraction=1.0))
    assert module.teacher is not None
    for parameter in module.teacher.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))

    def at(step: int) -> Tensor:
        torch.manual_seed(0)
        values = module.losses_of(make_batch(), training=True, step=step)
        return torch.stack([values["masked_language/loss"], values["contrastive/loss"]]).detach()

    first, middle, last = at(0), at(5), at(10)
    torch.manual_seed(0)
    plain = module.losses_of(make_batch())
    torch.testing.assert_close(first, torch.stack([plain["masked_language/loss"], plain["contrastive/loss"]]).detach())
    torch.testing.assert_close(middle, (first + last) / 2)
    assert (last - first).abs().min() > 1e-4


def test_a_frozen_encoder_is_shared_with_the_teacher() -> None:
    module = build(DISTILLED)
    module.model.frozen = frozenset({"vision"})
    from vlm.objectives.distillation import MomentumTeacher

    teacher = MomentumTeacher(DistillationConfig(), module.model, dict(module._named()), 10)
    assert teacher.model.vision is module.model.vision
    assert teacher.model.language is not module.model.language


# --- Weights ---------------------------------------------------------------------------------------------------------


def test_a_schedule_goes_from_one_weight_to_the_other() -> None:
    linear = WeightSchedule(initial=2, final=1, from_fraction=0.2, to_fraction=0.6)
    assert [linear.at(share) for share in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([2, 2, 1.5, 1, 1])
    cosine = WeightSchedule(shape="cosine", initial=0, final=1)
    assert [cosine.at(share) for share in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0, 0.1464466, 0.5, 1])
    assert WeightSchedule(initial=1, final=0, from_fraction=0.5, to_fraction=0.5).at(0.5) == 0
    weight = "objectives.matching.weight={shape: cosine, initial: 1, final: 0, to_fraction: 0.5}"
    config = compose("pretrain", [weight], RunConfig)
    assert config.objectives["matching"].weight == WeightSchedule(shape="cosine", initial=1, final=0, to_fraction=0.5)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("-1", "weight: must be at least 0, got -1"),
        ("high", "weight: expected a number, got 'high'"),
        ("{initial: 1}", "weight.final: required, but not given"),
        ("{initial: 1, final: 0, to: 3}", "weight.to: unknown key. Did you mean .*to_fraction"),
        ("{initial: 0, final: 1, from_fraction: 0.5, to_fraction: 0.1}", "weight: from_fraction must be at most"),
    ],
)
def test_a_wrong_weight_is_one_line_at_its_key(weight: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^objectives\.matching\.{message}"):
        compose("pretrain", [f"objectives.matching.weight={weight}"], RunConfig)


def test_an_objective_that_weighs_nothing_is_not_encoded_and_the_others_go_on() -> None:
    schedule = WeightSchedule(initial=0, final=3, from_fraction=0.5, to_fraction=0.5)
    module = build({"matching": MatchingConfig(), "masked_language": MaskedLanguageConfig(with_image=False)})
    module.weights = {"matching": schedule, "masked_language": 1.0}
    calls: list[Any] = []
    module.model.vision.register_forward_hook(lambda *_: calls.append(1))
    early = module.losses_of(make_batch(), training=True, step=4)
    assert calls == [] and "matching/loss" not in early and float(early["matching/weight"]) == 0
    late = module.losses_of(make_batch(), training=True, step=5)
    assert calls == [1] and float(late["matching/weight"]) == 3
    torch.testing.assert_close(late["loss"], 3 * late["matching/loss"] + late["masked_language/loss"])
    nothing = build({"matching": MatchingConfig()}, {"matching": schedule}).losses_of(
        make_batch(), training=True, step=0
    )
    nothing["loss"].backward()  # a step that changes nothing
