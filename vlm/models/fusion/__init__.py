"""Fusion modules: image and text states of one width -> the same shapes, each informed by the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from vlm.config import Config, CustomConfig

if TYPE_CHECKING:
    from torch import nn


class CoAttentionConfig(Config):
    """METER's co-attention (`coattention.py`); depth counts the layers of each stream."""

    type: Literal["coattention"] = "coattention"
    width: PositiveInt = 768
    depth: PositiveInt = 2
    num_heads: PositiveInt = 12
    pre_norm: bool = True
    dropout: float = Field(0.1, ge=0, lt=1)

    def build(self) -> nn.Module:
        from vlm.models.fusion.coattention import CoAttention

        return CoAttention(self.width, self.depth, self.num_heads, self.pre_norm, self.dropout)


class MergedConfig(Config):
    """Merged attention (`merged.py`): one stack of self-attention over the tokens of both."""

    type: Literal["merged"] = "merged"
    width: PositiveInt = 768
    depth: PositiveInt = 2
    num_heads: PositiveInt = 12
    pre_norm: bool = True
    dropout: float = Field(0.1, ge=0, lt=1)

    def build(self) -> nn.Module:
        from vlm.models.fusion.merged import Merged

        return Merged(self.width, self.depth, self.num_heads, self.pre_norm, self.dropout)


FusionConfig = Annotated[CoAttentionConfig | MergedConfig | CustomConfig, Field(discriminator="type")]
