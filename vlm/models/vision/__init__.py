"""Vision encoders: uint8 pixels normalised by the model's own mean and std -> token states, CLS first.

The variants are listed here and nowhere else. Torch is imported only when one is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from vlm.config import CustomConfig, RunReference
from vlm.models.adaptation import EncoderConfig

if TYPE_CHECKING:
    from torch import nn


Dropped = Annotated[float, Field(ge=0, lt=1)]
"""A fraction of each image's patches that no step of training sees, drawn anew in each: FLIP, arXiv 2212.00794.

They are dropped before the blocks, which is what saves time. Of plain ViTs only, and of encoders that learn.
"""


class TinyVisionConfig(EncoderConfig):
    """Our own small ViT (`tiny.py`), trained from nothing or from another run's `weights`."""

    type: Literal["tiny"] = "tiny"
    width: PositiveInt = 128
    depth: PositiveInt = 3
    num_heads: PositiveInt = 4
    patch_size: PositiveInt = 16
    image_pixels: PositiveInt = 48
    patch_dropout: Dropped = 0.0
    weights: RunReference | None = None  # a run folder whose vision encoder is taken

    def build(self) -> nn.Module:
        from vlm.models.vision.tiny import TinyVision

        sizes = self.width, self.depth, self.num_heads, self.patch_size, self.image_pixels
        return TinyVision(*sizes, self.patch_dropout)


class TimmVisionConfig(EncoderConfig):
    """Any timm model with features (`timm.py`). `weights`: a file, a run folder, or `package:IMPORT_NAME`."""

    type: Literal["timm"] = "timm"
    name: str = "vit_base_patch16_224.augreg_in21k"
    pretrained: bool = True
    weights: RunReference | None = None
    image_pixels: PositiveInt | None = None  # None: the size the model was pretrained at
    patch_dropout: Dropped = 0.0

    def build(self) -> nn.Module:
        from vlm.models.vision.timm import TimmVision

        return TimmVision(self.name, self.pretrained, self.image_pixels, self.weights, self.patch_dropout)


class OpenClipVisionConfig(EncoderConfig):
    """The vision tower of a CLIP model of open_clip (`open_clip.py`): ARCHITECTURE/TAG.

    Without a tag, `weights` names a file (`.safetensors`, `.pt`) or a run folder, or `pretrained=false` builds random
    weights.
    """

    type: Literal["open_clip"] = "open_clip"
    name: str = "ViT-B-32/openai"
    pretrained: bool = True
    weights: RunReference | None = None
    image_pixels: PositiveInt | None = None  # None: the size the model was pretrained at

    def build(self) -> nn.Module:
        from vlm.models.vision.open_clip import OpenClipVision

        return OpenClipVision(self.name, self.pretrained, self.image_pixels, self.weights)


class CustomVisionConfig(CustomConfig, EncoderConfig):
    """A class from outside. What adapts an encoder asks it for `blocks`."""


VisionConfig = Annotated[
    TinyVisionConfig | TimmVisionConfig | OpenClipVisionConfig | CustomVisionConfig, Field(discriminator="type")
]
