"""The model's configuration. Modules live beside their configs and are imported only when built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from vlm.config import Config
from vlm.models.adaptation import adapt
from vlm.models.fusion import CoAttentionConfig, FusionConfig
from vlm.models.language import LanguageConfig, TransformersLanguageConfig
from vlm.models.vision import TimmVisionConfig, VisionConfig

if TYPE_CHECKING:
    from vlm.models.vision_language import VisionLanguageModel


class ModelConfig(Config):
    """Two encoders and what joins them. The defaults are the reference paper's encoders with METER's fusion."""

    vision: VisionConfig = TimmVisionConfig()
    language: LanguageConfig = TransformersLanguageConfig()
    fusion: FusionConfig = CoAttentionConfig()
    pooler: Literal["tanh", "none"] = "tanh"  # none: the fused CLS states as they are, as in the reference paper's code

    def build(self) -> VisionLanguageModel:
        """The model with fresh or pretrained encoders and a fresh fusion; `weights` of other runs are not yet in."""
        from vlm.models.vision_language import VisionLanguageModel

        frozen = frozenset(name for name in ("vision", "language") if getattr(self, name).frozen)
        model = VisionLanguageModel(
            self.vision.build(), self.language.build(), self.fusion.build(), frozen, self.pooler
        )
        # Last, so that the random weights of the rest are the same with adapters and without.
        model.resting += adapt(model.vision, self.vision, "vision")
        model.resting += adapt(model.language, self.language, "language")
        return model
