"""Image-text retrieval with the matching head, without fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from vlm.config import Config
from vlm.records import OfficialFile, Row, records
from vlm.tasks.task import unique
from vlm.types import Question


class RetrievalTask(Config):
    """Each text ranks all images of a set, and each image all texts, by the probability that they match.

    Sets lie under `<data root>/retrieval/`: `NAME.json`, a list of {id, text, image_key}, and the shards
    `NAME_images`. Every pair goes through the fusion, so n texts cost n * n pairs.
    """

    headline: ClassVar[str] = "recall_at_1"

    type: Literal["retrieval"] = "retrieval"
    sets: tuple[str, ...] = Field(("captions",), min_length=1)

    def read(self, root: Path, name: str) -> list[Question]:
        return unique(_read, OfficialFile.at(root / "retrieval" / f"{name}.json"))


def _read(file: OfficialFile) -> Iterator[Question]:
    for place, value in records(file, "list"):
        row = Row(file, place, value)
        yield Question(row.identifier("id"), row.text("text"), (row.text("image_key"),))


Rank = tuple[int, int]
"""How many items stand above a query's own, and how many level with it."""


def recall_at(ranks: Sequence[Rank], k: int) -> float:
    """Percent of queries whose own item is among the first k; of a tie, the share of its orders in which it is."""
    found = (min(max(k - above, 0) / (level + 1), 1.0) for above, level in ranks)
    return 100 * sum(found) / max(len(ranks), 1)


def retrieval_scores(ranks: Mapping[str, Sequence[Rank]]) -> dict[str, float]:
    """Recall at 1, 5 and 10 for each direction, and their means over the directions."""
    scores = {f"{direction}/recall_at_{k}": recall_at(r, k) for direction, r in ranks.items() for k in (1, 5, 10)}
    means = {f"recall_at_{k}": sum(recall_at(r, k) for r in ranks.values()) / max(len(ranks), 1) for k in (1, 5, 10)}
    return scores | means
