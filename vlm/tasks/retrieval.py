"""Image-text retrieval with the matching head, without fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from vlm.config import Config
from vlm.tasks.official import OfficialFile, Row, read_list
from vlm.tasks.task import unique
from vlm.types import Question


class RetrievalTask(Config):
    """Each text ranks all images of a set, and each image all texts, by the probability that they match.

    Sets lie under `<data root>/retrieval/`: `NAME.json`, a list of {id, text, image_key}, and the shards
    `NAME_images`. Every pair goes through the fusion, so n texts cost n * n pairs.
    """

    headline: ClassVar[str] = "recall_at_1"

    type: Literal["retrieval"] = "retrieval"
    sets: tuple[str, ...] = ("captions",)

    def read(self, root: Path, name: str) -> list[Question]:
        file = OfficialFile.at(root / "retrieval" / f"{name}.json")
        return unique((_question(Row(file, f"row {n}", row)) for n, row in enumerate(read_list(file), 1)), file)


def _question(row: Row) -> Question:
    key = row.get("id")
    number = str(key) if isinstance(key, int) and not isinstance(key, bool) else row.text("id")
    return Question(number, row.text("text"), (row.text("image_key"),))


def recall_at(ranks: Sequence[float], k: int) -> float:
    """Share in percent of queries whose right item is among the first k (rank 0 is first)."""
    return 100 * sum(rank < k for rank in ranks) / max(len(ranks), 1)


def retrieval_scores(ranks: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Recall at 1, 5 and 10 for each direction, and their means over the directions."""
    scores = {f"{direction}/recall_at_{k}": recall_at(r, k) for direction, r in ranks.items() for k in (1, 5, 10)}
    means = {f"recall_at_{k}": sum(recall_at(r, k) for r in ranks.values()) / max(len(ranks), 1) for k in (1, 5, 10)}
    return scores | means
