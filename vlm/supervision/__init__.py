"""Supervision: which examples of the data may be seen in pretraining, and what text stands beside each image.

`fraction` picks a window of the hash ring (`subset.py`), or the best by a score (`selection.py`); `sources` turn a
record into an example (`sources.py`). All depend on the key alone, never on rank, worker or epoch. `ledger.py` keeps
the books on which model has seen which pair.

A path to what lies beside the data is a folder of side shards, or one that holds such folders as `train` and
`validation`, or a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from vlm.config import Config, CustomConfig


class CaptionsConfig(Config):
    """Captions that people wrote: true image-text pairs."""

    type: Literal["captions"] = "captions"
    weight: NonNegativeFloat = 1.0


class MachineLabelsConfig(Config):
    """Labels that a machine gave the image, joined by commas: the best `max_labels` with a score of `min_score`.

    `order`: `shuffled` by the key, or `by_score` with the best first. `labels_from`: side shards whose labels stand in
    place of the record's own.
    """

    type: Literal["machine_labels"] = "machine_labels"
    weight: NonNegativeFloat = 1.0
    min_score: float = Field(0.0, ge=0, le=1)
    max_labels: PositiveInt = 15
    order: Literal["shuffled", "by_score"] = "shuffled"
    labels_from: Path | None = None
    missing: Literal["error", "none"] = "error"  # a key that `labels_from` lacks; "none": an image without a text


class ClassNamesConfig(Config):
    """Names of the classes that an image belongs to."""

    type: Literal["class_names"] = "class_names"
    weight: NonNegativeFloat = 1.0


class GeneratedCaptionsConfig(Config):
    """Captions that a model wrote: the one of its several that the key decides.

    `file`: side shards with captions; or JSON lines of {"key": ..., "caption": ...} or {"key": ..., "captions": [...]};
    or a .csv or .tsv with the columns key and caption. A key may stand on several lines.
    """

    type: Literal["generated_captions"] = "generated_captions"
    weight: NonNegativeFloat = 1.0
    file: Path
    missing: Literal["error", "none"] = "error"  # a key that the file lacks; "none": an image without a text


class NoneConfig(Config):
    """No text: the image alone. Objectives that learn from a text leave such an example out."""

    type: Literal["none"] = "none"
    weight: NonNegativeFloat = 1.0


SourceConfig = Annotated[
    CaptionsConfig | MachineLabelsConfig | ClassNamesConfig | GeneratedCaptionsConfig | NoneConfig | CustomConfig,
    Field(discriminator="type"),
]


class RandomConfig(Config):
    """A window of the hash ring."""

    type: Literal["random"] = "random"


class BestByScoreConfig(Config):
    """The examples with the best scores, as many as the window would hold; ties go by the ring.

    `file`: JSON lines, .csv, .tsv or .parquet with `key` and a number in `column`; or side shards, whose best label's
    score counts. Without a file it is the score of the record's own best label.
    """

    type: Literal["best_by_score"] = "best_by_score"
    file: Path | None = None
    column: str = "score"
    direction: Literal["highest", "lowest"] = "highest"
    missing: Literal["error", "exclude"] = "error"  # examples without a score


SelectionConfig = Annotated[RandomConfig | BestByScoreConfig, Field(discriminator="type")]


class SupervisionConfig(Config):
    """The independent variable of the science.

    `keys`: only these may be seen, and `fraction` is of them: a text file with a key a line, a file as for scores, or
    shards. So users whose downloads differ can all keep to what they have in common.
    """

    fraction: float = Field(1.0, ge=0, le=1)
    subset_seed: int = Field(0, ge=0)  # moves the window along the ring
    selection: SelectionConfig = RandomConfig()
    keys: Path | None = None
    sources: tuple[SourceConfig, ...] = Field((CaptionsConfig(),), min_length=1)

    @property
    def drawn(self) -> tuple[SourceConfig, ...]:
        """The sources that examples are drawn from: those with a weight."""
        return tuple(source for source in self.sources if source_weight(source) > 0)


def source_weight(source: SourceConfig) -> float:
    """A source from outside has the weight 1."""
    return 1.0 if isinstance(source, CustomConfig) else source.weight
