"""Fusion modules: what lets image and text states, projected to one width, read each other.

All are called as `fusion(image, text, text_mask)` with states [b p d] and [b l d], CLS first, and return both. The text
keeps its length; of the image as many tokens come back as the fusion has to give. Heads read token 0 of each.

A fusion whose `num_encoder_layers` is k > 0 takes the states of the encoders' last k layers, [b k p d] and [b k l d],
the last one last. The variants are listed here and nowhere else; torch is imported only when one is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from vlm.config import Config, CustomConfig

if TYPE_CHECKING:
    from torch import nn


class LayersConfig(Config):
    """What the fusions with attention layers have in common."""

    type: str
    width: PositiveInt = 768
    depth: PositiveInt = 2
    num_heads: PositiveInt = 12
    pre_norm: bool = True
    dropout: float = Field(0.1, ge=0, lt=1)


class CoAttentionConfig(LayersConfig):
    """METER's co-attention (`coattention.py`); depth counts the layers of each stream."""

    type: Literal["coattention"] = "coattention"

    def build(self) -> nn.Module:
        from vlm.models.fusion.coattention import CoAttention

        return CoAttention(self.width, self.depth, self.num_heads, self.pre_norm, self.dropout)


class MergedConfig(LayersConfig):
    """Merged attention (`merged.py`): one stack of self-attention over the tokens of both."""

    type: Literal["merged"] = "merged"

    def build(self) -> nn.Module:
        from vlm.models.fusion.merged import Merged

        return Merged(self.width, self.depth, self.num_heads, self.pre_norm, self.dropout)


class CrossAttentionConfig(LayersConfig):
    """The text reads the image (`cross_attention.py`), whose states pass through."""

    type: Literal["cross_attention"] = "cross_attention"

    def build(self) -> nn.Module:
        from vlm.models.fusion.cross_attention import CrossAttention

        return CrossAttention(self.width, self.depth, self.num_heads, self.pre_norm, self.dropout)


class BridgesConfig(LayersConfig):
    """BridgeTower (`bridges.py`): co-attention whose layers are joined to the encoders' last `depth` layers."""

    type: Literal["bridges"] = "bridges"

    def build(self) -> nn.Module:
        from vlm.models.fusion.bridges import Bridges

        return Bridges(self.width, self.depth, self.num_heads, self.pre_norm, self.dropout)


class QFormerConfig(LayersConfig):
    """Learned queries that read the image and then meet the text (`qformer.py`).

    In the first layer no query has met the text yet, so the text needs a second one to learn of the image.
    """

    type: Literal["qformer"] = "qformer"
    depth: int = Field(2, ge=2)
    num_queries: PositiveInt = 32  # BLIP-2's, arXiv 2301.12597, section 3.1
    read_image_every: PositiveInt = 2  # layers; BLIP-2 reads it in every other one, the first among them

    def build(self) -> nn.Module:
        from vlm.models.fusion.qformer import QFormer

        sizes = self.width, self.depth, self.num_heads, self.pre_norm, self.dropout
        return QFormer(*sizes, self.num_queries, self.read_image_every)


class PerceiverConfig(LayersConfig):
    """Flamingo's resampler (`perceiver.py`) before `depth` layers of another fusion, which sees latents for an image.

    `pre_norm` is of those layers; the resampler's are pre-norm, as published.
    """

    type: Literal["perceiver"] = "perceiver"
    num_latents: PositiveInt = 64  # Flamingo's, arXiv 2204.14198
    resampler_depth: PositiveInt = 2
    reader: Literal["cross_attention", "merged"] = "cross_attention"

    def build(self) -> nn.Module:
        from vlm.models.fusion.cross_attention import CrossAttention
        from vlm.models.fusion.merged import Merged
        from vlm.models.fusion.perceiver import Perceiver, Resampler

        reader = CrossAttention if self.reader == "cross_attention" else Merged
        return Perceiver(
            Resampler(self.width, self.resampler_depth, self.num_heads, self.num_latents, self.dropout),
            reader(self.width, self.depth, self.num_heads, self.pre_norm, self.dropout),
        )


class LateConfig(Config):
    """Late fusion (`late.py`): no token reads another; the two CLS states meet in `depth` perceptrons."""

    type: Literal["late"] = "late"
    width: PositiveInt = 768
    depth: PositiveInt = 2
    pre_norm: bool = True
    dropout: float = Field(0.1, ge=0, lt=1)

    def build(self) -> nn.Module:
        from vlm.models.fusion.late import Late

        return Late(self.width, self.depth, self.pre_norm, self.dropout)


class NoFusionConfig(Config):
    """No fusion (`none.py`): the projected states as they are, for contrast, linear probes and retrieval."""

    type: Literal["none"] = "none"
    width: PositiveInt = 768

    def build(self) -> nn.Module:
        from vlm.models.fusion.none import NoFusion

        return NoFusion(self.width)


FusionConfig = Annotated[
    CoAttentionConfig
    | MergedConfig
    | CrossAttentionConfig
    | BridgesConfig
    | QFormerConfig
    | PerceiverConfig
    | LateConfig
    | NoFusionConfig
    | CustomConfig,
    Field(discriminator="type"),
]
