"""Pretraining objectives. Each says which views of a batch it wants encoded, and turns them into a loss.

The variants are listed here and nowhere else. Torch is imported only when one is built.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, Tag, model_validator

from vlm.config import Config, CustomConfig

if TYPE_CHECKING:
    from vlm.models.language.tokenizer import Tokenizer
    from vlm.models.vision_language import VisionLanguageModel
    from vlm.objectives.objective import Objective


class WeightSchedule(Config):
    """A weight that goes from `initial` to `final` while training goes from one share of its steps to another.

    Before and after it stays as it is. While it is 0, the objective's work is left out. Validation weighs by `final`.
    """

    shape: Literal["linear", "cosine"] = "linear"  # of the way between the two
    initial: NonNegativeFloat  # the weight until `from_fraction`
    final: NonNegativeFloat  # the weight from `to_fraction` on
    from_fraction: float = Field(0.0, ge=0, le=1)  # share of the steps after which it begins to change
    to_fraction: float = Field(1.0, ge=0, le=1)  # share of the steps after which it changes no more

    @model_validator(mode="after")
    def _forward(self) -> WeightSchedule:
        if self.from_fraction > self.to_fraction:
            raise ValueError(f"from_fraction must be at most to_fraction. Got {self.from_fraction}, {self.to_fraction}")
        return self

    def at(self, fraction: float) -> float:
        """The weight once this share of the steps is done."""
        if fraction >= self.to_fraction:
            return self.final
        passed = max(0.0, fraction - self.from_fraction) / max(self.to_fraction - self.from_fraction, 1e-12)
        if self.shape == "cosine":
            passed = (1 - math.cos(math.pi * passed)) / 2
        return self.initial + (self.final - self.initial) * passed


def _form_of_weight(given: Any) -> str:
    """Which of the two an error is to speak of."""
    return WeightSchedule.__name__ if isinstance(given, dict | WeightSchedule) else "number"


Weight = Annotated[
    Annotated[NonNegativeFloat, Tag("number")] | Annotated[WeightSchedule, Tag(WeightSchedule.__name__)],
    Discriminator(_form_of_weight),
]
"""Of a loss in the sum of losses: a number, or a schedule."""


def weight_at(weight: float | WeightSchedule, fraction: float) -> float:
    """The weight once this share of the steps is done."""
    return weight.at(fraction) if isinstance(weight, WeightSchedule) else weight


def greatest_weight(weight: float | WeightSchedule) -> float:
    """The greatest weight of a training."""
    return max(weight.initial, weight.final) if isinstance(weight, WeightSchedule) else weight


class MaskedLanguageConfig(Config):
    """Predict masked tokens (`masked_language.py`) from the picture too, or from the text alone.

    `masking`: single tokens (`token`); all tokens of a word (`whole_word`, arXiv 1906.08101), which matters where words
    have many; or `whole_label`, which in texts that are lists of labels leaves no part of a label to tell the rest.
    `label_masking`: `sound`, or `released` for how the reference paper's code did it.
    """

    type: Literal["masked_language"] = "masked_language"
    weight: Weight = 1.0
    mask_fraction: float = Field(0.15, gt=0, lt=1)
    with_image: bool = True
    masking: Literal["token", "whole_word", "whole_label"] = "token"
    label_masking: Literal["sound", "released"] = "sound"

    @model_validator(mode="after")
    def _labels_need_images(self) -> MaskedLanguageConfig:
        if self.masking == "whole_label" and not self.with_image:
            raise ValueError("masking=whole_label is for labels of images; unpaired texts are no lists of labels")
        if self.label_masking == "released" and self.masking != "whole_label":
            raise ValueError("label_masking=released says how whole labels are masked. Give masking=whole_label too")
        return self

    def build(self, model: VisionLanguageModel, tokenizer: Tokenizer, classes: tuple[str, ...]) -> Objective:
        from vlm.objectives.masked_language import MaskedLanguage

        return MaskedLanguage(self, model, tokenizer)


class MatchingConfig(Config):
    """Tell matched from mismatched image-text pairs (`matching.py`).

    `negatives`: `in_batch` shuffles whose image goes with which text inside the batch; `random` draws another image
    of the data for each negative, as published, at the price of its pass through the vision encoder; `hard` takes what
    the contrastive objective beside it finds alike, for each text and for each image (arXiv 2107.07651): three pairs a
    text go through the fusion, two of them mismatched, and `negative_fraction` has no say.
    `text`: the `whole` text, or the `masked` one that the run's masked_language objective sees, as in the reference
    paper's code, whose masking wrote over the ids of both.
    """

    type: Literal["matching"] = "matching"
    weight: Weight = 1.0
    negatives: Literal["in_batch", "random", "hard"] = "in_batch"
    negative_fraction: float = Field(0.5, gt=0, lt=1)
    text: Literal["whole", "masked"] = "whole"

    @model_validator(mode="after")
    def _hard_ones_are_two_in_three(self) -> MatchingConfig:
        if self.negatives == "hard" and self.negative_fraction != 0.5:
            raise ValueError("negatives=hard mismatches two pairs in three; leave negative_fraction away")
        return self

    def build(self, model: VisionLanguageModel, tokenizer: Tokenizer, classes: tuple[str, ...]) -> Objective:
        from vlm.objectives.matching import Matching

        return Matching(self, model)


class ContrastiveConfig(Config):
    """Tell which text of the batch belongs to which image, before the fusion (`contrastive.py`).

    `loss`: CLIP's softmax over the batch, or SigLIP's sigmoid of each pair, which starts at a temperature of 0.1 and a
    bias of -10 in its paper (arXiv 2303.15343). `across_ranks` compares with the examples of all ranks, so that a run
    on several ranks no longer equals one that accumulates on a single one.
    """

    type: Literal["contrastive"] = "contrastive"
    weight: Weight = 1.0
    loss: Literal["clip", "siglip"] = "clip"
    temperature: PositiveFloat = 0.07  # where the learnt temperature starts
    bias: float = -10.0  # where the learnt bias of siglip starts
    across_ranks: bool = False

    def build(self, model: VisionLanguageModel, tokenizer: Tokenizer, classes: tuple[str, ...]) -> Objective:
        from vlm.objectives.contrastive import Contrastive

        return Contrastive(self)


class CaptioningConfig(Config):
    """Write the text from the image, with a causal decoder that later runs do not need (`captioning.py`)."""

    type: Literal["captioning"] = "captioning"
    weight: Weight = 1.0
    depth: PositiveInt = 2  # blocks of the decoder
    dropout: float = Field(0.1, ge=0, lt=1)  # in the decoder

    def build(self, model: VisionLanguageModel, tokenizer: Tokenizer, classes: tuple[str, ...]) -> Objective:
        from vlm.objectives.captioning import Captioning

        return Captioning(self, model, tokenizer)


class ImageClassesConfig(Config):
    """Name the classes of an image (`image_classes.py`): supervised pretraining of the vision encoder alone."""

    type: Literal["image_classes"] = "image_classes"
    weight: Weight = 1.0

    def build(self, model: VisionLanguageModel, tokenizer: Tokenizer, classes: tuple[str, ...]) -> Objective:
        from vlm.objectives.image_classes import ImageClasses

        return ImageClasses(model, classes)


class CustomObjectiveConfig(CustomConfig):
    """A class from outside, built with (model, tokenizer, classes) and `options`."""

    weight: Weight = 1.0


ObjectiveConfig = Annotated[
    MaskedLanguageConfig
    | MatchingConfig
    | ContrastiveConfig
    | CaptioningConfig
    | ImageClassesConfig
    | CustomObjectiveConfig,
    Field(discriminator="type"),
]


class DistillationConfig(Config):
    """Soft targets for masked language and contrast from a slow copy of the model (`distillation.py`).

    Defaults: ALBEF, arXiv 2107.07651, section 3.5; its weight of soft targets rises during the first of 30 epochs.
    """

    momentum: float = Field(0.995, ge=0, lt=1)  # of the copy, a step
    alpha: float = Field(0.4, gt=0, le=1)  # the weight of soft targets
    ramp_fraction: float = Field(0.033, ge=0, le=1)  # share of the steps over which it rises from 0
