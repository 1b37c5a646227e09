"""Supervision: which examples of the data may be seen in pretraining, and what text stands beside each image.

`fraction` picks a window of the hash ring (`subset.py`); `sources` turn a record into an example. Both depend on
the key alone, never on rank, worker or epoch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from vlm.config import Config, CustomConfig


class CaptionsConfig(Config):
    """Captions that people wrote: true image-text pairs."""

    type: Literal["captions"] = "captions"
    weight: NonNegativeFloat = 1.0


class MachineLabelsConfig(Config):
    """Labels that a machine gave the image, joined by commas in an order shuffled by the key."""

    type: Literal["machine_labels"] = "machine_labels"
    weight: NonNegativeFloat = 1.0
    min_score: float = Field(0.0, ge=0, le=1)
    max_labels: PositiveInt = 15


class ClassNamesConfig(Config):
    """Names of the classes that an image belongs to."""

    type: Literal["class_names"] = "class_names"
    weight: NonNegativeFloat = 1.0


SourceConfig = Annotated[
    CaptionsConfig | MachineLabelsConfig | ClassNamesConfig | CustomConfig, Field(discriminator="type")
]


class SupervisionConfig(Config):
    """The independent variable of the science."""

    fraction: float = Field(1.0, ge=0, le=1)
    subset_seed: int = Field(0, ge=0)  # moves the window along the ring
    sources: tuple[SourceConfig, ...] = Field((CaptionsConfig(),), min_length=1)
