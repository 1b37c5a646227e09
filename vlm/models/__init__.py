"""The model's configuration. Modules live beside their configs and are imported only when built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from vlm.config import Config
from vlm.models.adaptation import adapt
from vlm.models.fusion import CoAttentionConfig, FusionConfig
from vlm.models.language import LanguageConfig, TransformersLanguageConfig
from vlm.models.vision import TimmVisionConfig, VisionConfig

if TYPE_CHECKING:
    from vlm.models.vision_language import VisionLanguageModel


class ModelConfig(Config):
    """Two encoders and what joins them. The defaults are the reference paper's encoders with METER's fusion.

    `token_dropout`: this fraction of each image's tokens is hidden from fusion and contrast in each step of training,
    never the CLS token. It comes behind the vision encoder, so it suits a frozen one and its kept states too; where the
    encoder learns, `vision.patch_dropout` saves more. Words are not dropped: masked ones are wanted back at their
    places, and a text is a tenth of an image's length.
    """

    vision: VisionConfig = TimmVisionConfig()
    language: LanguageConfig = TransformersLanguageConfig()
    fusion: FusionConfig = CoAttentionConfig()
    pooler: Literal["tanh", "none"] = "tanh"  # none: the fused CLS states as they are, as in the reference paper's code
    token_dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _patches_are_dropped_while_learning(self) -> ModelConfig:
        vision = self.vision
        if getattr(vision, "patch_dropout", 0) and (vision.frozen or vision.frozen_blocks):
            raise ValueError("vision.patch_dropout: what is frozen never trains and drops nothing. Give token_dropout")
        return self

    def build(self) -> VisionLanguageModel:
        """The model with fresh or pretrained encoders and a fresh fusion; `weights` of other runs are not yet in."""
        from vlm.models.vision_language import VisionLanguageModel

        frozen = frozenset(name for name in ("vision", "language") if getattr(self, name).frozen)
        parts = self.vision.build(), self.language.build(), self.fusion.build()
        model = VisionLanguageModel(*parts, frozen, self.pooler, self.token_dropout)
        # Last, so that the random weights of the rest are the same with adapters and without.
        model.resting += adapt(model.vision, self.vision, "vision")
        model.resting += adapt(model.language, self.language, "language")
        return model
