"""`vlm label`: machine labels with scores for the images of a shard folder, as side shards.

labellers.py   models that give every label of a vocabulary a score
labelling.py   from a shard folder to side shards: what is done, resumed and counted
on_ray.py      the same work spread over a Ray cluster

The variants of labellers are listed here and nowhere else. Torch is imported only when one is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from vlm.config import Config, CustomConfig

if TYPE_CHECKING:
    from vlm.labelling.labellers import Labeller

Activation = Literal["softmax", "sigmoid"]
"""What makes scores of logits: softmax where one label is right, sigmoid where several may be."""


class TimmLabellerConfig(Config):
    """A timm classifier, head included. The vocabulary names its classes in the order of its outputs.

    `weights`: None for the hub, a file, or `package:IMPORT_NAME`.
    """

    type: Literal["timm"] = "timm"
    name: str
    weights: str | None = None
    activation: Activation = "softmax"  # sigmoid where several labels may be right

    def build(self, vocabulary: tuple[str, ...] | None) -> Labeller:
        from vlm.labelling.labellers import TimmLabeller

        return TimmLabeller(self.name, self.weights, self.activation, vocabulary)


class OpenClipLabellerConfig(Config):
    """A CLIP model of open_clip, "ARCHITECTURE/PRETRAINED"; any vocabulary, each label in the sentences of `templates`.

    `weights`: a file in place of the pretrained tag. Models that were trained with a sigmoid (SigLIP) want that here.
    """

    type: Literal["open_clip"] = "open_clip"
    name: str
    weights: Path | None = None
    activation: Activation = "softmax"  # sigmoid where several labels may be right
    templates: tuple[str, ...] = Field(("a photo of a {}.",), min_length=1)

    def build(self, vocabulary: tuple[str, ...] | None) -> Labeller:
        from vlm.labelling.labellers import OpenClipLabeller

        return OpenClipLabeller(self.name, self.weights, self.activation, self.templates, vocabulary)


LabellerConfig = Annotated[TimmLabellerConfig | OpenClipLabellerConfig | CustomConfig, Field(discriminator="type")]


class LabellingConfig(Config):
    """What decides the labels of an image. `damaged`: what an image that cannot be decoded does to the whole."""

    labeller: LabellerConfig
    vocabulary: Path | None = None  # one label a line; None: the labeller's own, where it has one
    min_score: float = Field(0.01, ge=0, le=1)  # labels below are not kept
    max_labels: PositiveInt = 15  # as many as the published machine labels of Conceptual Captions have at most
    batch_size: PositiveInt = 64  # images that the labeller sees at a time
    num_workers: NonNegativeInt = 0  # processes that decode
    damaged: Literal["stop", "skip"] = "stop"
