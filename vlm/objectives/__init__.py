"""Pretraining objectives. Each says which views of a batch it wants encoded, and turns them into a loss.

The variants are listed here and nowhere else. Torch is imported only when one is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from vlm.config import Config, CustomConfig

if TYPE_CHECKING:
    from vlm.models.language.tokenizer import Tokenizer
    from vlm.models.vision_language import VisionLanguageModel
    from vlm.objectives.objective import Objective


class MaskedLanguageConfig(Config):
    """Predict masked tokens (`masked_language.py`) from the picture too, or from the text alone.

    `masking` of texts that are lists of labels: `token`, as in any text, or `whole_label`, which never leaves a part of
    a label to tell the rest. `label_masking`: `sound`, or `released` for how the reference paper's code did it.
    """

    type: Literal["masked_language"] = "masked_language"
    weight: NonNegativeFloat = 1.0
    mask_fraction: float = Field(0.15, gt=0, lt=1)
    with_image: bool = True
    masking: Literal["token", "whole_label"] = "token"
    label_masking: Literal["sound", "released"] = "sound"

    @model_validator(mode="after")
    def _labels_need_images(self) -> MaskedLanguageConfig:
        if self.masking == "whole_label" and not self.with_image:
            raise ValueError("masking=whole_label is for labels of images; unpaired texts are no lists of labels")
        if self.label_masking == "released" and self.masking == "token":
            raise ValueError("label_masking=released says how whole labels are masked. Give masking=whole_label too")
        return self

    def build(self, model: VisionLanguageModel, tokenizer: Tokenizer, classes: tuple[str, ...]) -> Objective:
        from vlm.objectives.masked_language import MaskedLanguage

        return MaskedLanguage(self, model, tokenizer)


class MatchingConfig(Config):
    """Tell matched from mismatched image-text pairs (`matching.py`).

    `negatives`: `in_batch` shuffles whose image goes with which text inside the batch; `random` draws another image
    of the data for each negative, as published, at the price of its pass through the vision encoder.
    `text`: the `whole` text, or the `masked` one that the run's masked_language objective sees, as in the reference
    paper's code, whose masking wrote over the ids of both.
    """

    type: Literal["matching"] = "matching"
    weight: NonNegativeFloat = 1.0
    negatives: Literal["in_batch", "random"] = "in_batch"
    negative_fraction: float = Field(0.5, gt=0, lt=1)
    text: Literal["whole", "masked"] = "whole"

    def build(self, model: VisionLanguageModel, tokenizer: Tokenizer, classes: tuple[str, ...]) -> Objective:
        from vlm.objectives.matching import Matching

        return Matching(self, model)


class ContrastiveConfig(Config):
    """Tell which text of the batch belongs to which image, before the fusion (`contrastive.py`)."""

    type: Literal["contrastive"] = "contrastive"
    weight: NonNegativeFloat = 1.0
    temperature: PositiveFloat = 0.07  # where the learnt temperature starts

    def build(self, model: VisionLanguageModel, tokenizer: Tokenizer, classes: tuple[str, ...]) -> Objective:
        from vlm.objectives.contrastive import Contrastive

        return Contrastive(self)


class ImageClassesConfig(Config):
    """Name the classes of an image (`image_classes.py`): supervised pretraining of the vision encoder alone."""

    type: Literal["image_classes"] = "image_classes"
    weight: NonNegativeFloat = 1.0

    def build(self, model: VisionLanguageModel, tokenizer: Tokenizer, classes: tuple[str, ...]) -> Objective:
        from vlm.objectives.image_classes import ImageClasses

        return ImageClasses(model, classes)


class CustomObjectiveConfig(CustomConfig):
    """A class from outside, built with (model, tokenizer, classes) and `options`."""

    weight: NonNegativeFloat = 1.0


ObjectiveConfig = Annotated[
    MaskedLanguageConfig | MatchingConfig | ContrastiveConfig | ImageClassesConfig | CustomObjectiveConfig,
    Field(discriminator="type"),
]
