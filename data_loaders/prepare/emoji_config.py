"""How the emoji are drawn and split; apart from what draws them, which every command would have to import."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from vlm.config import Config

Style = Literal["noto", "twemoji", "openmoji"]


class EmojiConfig(Config):
    """How the emoji are drawn and split. Fractions count concepts: one concept is one caption in every style."""

    type: Literal["emoji"] = "emoji"
    image_pixels: PositiveInt = 128
    training_styles: tuple[Style, ...] = Field(("noto", "twemoji"), min_length=1)  # in pairs and unimodal images
    held_out_style: Style = "openmoji"  # in the retrieval set of a new style
    held_out_fraction: float = Field(0.15, gt=0, lt=1)  # for retrieval alone
    validation_fraction: float = Field(0.05, gt=0, lt=1)  # of pairs and unimodal images
    exclude_groups: tuple[str, ...] = ("component", "flags")  # skin tones and hair; flags, which Noto does not draw
    num_class_names: int = Field(5, ge=0, le=1000)  # best classes of the image classifier; 0: none, it is not run

    @model_validator(mode="after")
    def _splits_leave_something_to_train_on(self) -> EmojiConfig:
        if self.held_out_fraction + self.validation_fraction >= 1:
            raise ValueError("held_out_fraction + validation_fraction must be below 1")
        if self.held_out_style in self.training_styles:
            raise ValueError(f"held_out_style {self.held_out_style!r} must not be a training style")
        return self

    @property
    def styles(self) -> tuple[Style, ...]:
        return (*self.training_styles, self.held_out_style)
