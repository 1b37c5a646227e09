"""The size and the noise of the procedural world."""

from __future__ import annotations

from pydantic import Field, model_validator

from vlm.config import Config

FORMAT = 3  # raise it, and `vlm.config.FINGERPRINT_FORMAT`, when equal configs give other bytes than before


class WorldConfig(Config):
    """One procedural world. Equal configs give equal bytes; each part depends only on `seed` and its own fields."""

    seed: int = Field(0, ge=0)
    grid: int = Field(3, ge=2, le=8)  # cells a side
    cell_pixels: int = Field(16, ge=8, le=64)  # of a cell's side
    min_objects: int = Field(1, ge=1)  # of a scene
    max_objects: int = Field(4, ge=2, le=9)  # `scenes.NUMBERS` has words for as many
    palette_fraction: float = Field(0.2, ge=0, le=1)  # scenes that draw from two shapes and two colors only
    near_miss_fraction: float = Field(0.2, ge=0, le=1)  # questions asked of images that nearly show what is asked for
    num_pairs: int = Field(10_000, ge=1)  # images with captions and machine labels
    num_validation_pairs: int = Field(1_000, ge=1)  # the unimodal images and the texts hold out as many
    num_unimodal_images: int = Field(10_000, ge=1)  # images with classes, for the vision encoder alone
    num_texts: int = Field(10_000, ge=1)  # unpaired, for the language encoder alone
    num_vqav2_train: int = Field(12_000, ge=1)  # questions
    num_gqa_train: int = Field(12_000, ge=1)  # questions
    num_nlvr2_train: int = Field(4_000, ge=4, multiple_of=4)  # statements with two images, four a sentence
    num_evaluation: int = Field(1_000, ge=4, multiple_of=4)  # questions of each evaluation split of each task
    label_noise: float = Field(0.1, ge=0, le=1)  # rate at which a machine label is missed, confused or made up
    annotator_noise: float = Field(0.05, ge=0, le=1)  # rate at which one VQAv2 annotator departs from the truth

    @model_validator(mode="after")
    def _objects_fit(self) -> WorldConfig:
        if not self.min_objects <= self.max_objects <= self.grid**2:
            raise ValueError(
                f"min_objects <= max_objects <= grid * grid must hold. "
                f"Got {self.min_objects}, {self.max_objects} and {self.grid} * {self.grid}"
            )
        return self
