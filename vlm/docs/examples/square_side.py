"""A task from outside: on which side is the square? With what writes its folder of a data root.

`python square_side.py PICTURES ROOT` makes `ROOT/square_side` of the folder that `draw_squares.py` drew.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from data_loaders.shards import write_shards
from vlm.records import OfficialFile, Row, records
from vlm.tasks.task import Task, accuracy_by_group, official_file, predicted, unique
from vlm.types import Question, Record

SPLITS = {"train": 40, "validation": 50, "test": 60}  # up to which picture


class SquareSide(Task):
    """Its fields, those of `Task` among them, are set as `options`."""

    type: Literal["square_side"] = "square_side"  # the folder of the data root

    def read(self, root: Path, split: str) -> list[Question]:
        return unique(_questions, official_file(root / self.type, f"{split}.json"))

    def vocabulary(self, root: Path) -> tuple[str, ...]:
        return "left", "right"

    def target(self, question: Question, answer_ids: Mapping[str, int]) -> dict[int, float]:
        return {answer_ids[answer]: 1.0 for answer in question.answers}

    def score(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
        """Percent. "accuracy" is what a curve shows (`headline`); one more for each group that has a name."""
        return accuracy_by_group(questions, [self.value(one, predicted(one, predictions)) for one in questions])

    def value(self, question: Question, prediction: str) -> float:
        """What one answer scores; with it, runs are compared question by question."""
        return float(prediction in question.answers)


def _questions(file: OfficialFile) -> Iterator[Question]:
    for place, value in records(file, "list"):
        row = Row(file, place, value)  # names file and record where a field is missing or wrong
        colour, answer = row.text("colour"), row.text("answer")
        text = f"on which side is the {colour} square ?"
        yield Question(row.identifier("id"), text, (row.text("picture"),), (answer,), group=colour)


def write(pictures: Path, root: Path) -> None:
    folder = root / "square_side"
    with (pictures / "captions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    entries = []
    for number, row in enumerate(rows):
        _, colour, _, _, _, side = row["caption"].split()
        entries.append({"id": str(number), "colour": colour, "answer": side, "picture": f"square-{number}"})
    names = [(entry["picture"], pictures / row["picture"]) for entry, row in zip(entries, rows, strict=True)]
    write_shards((Record(name, file.read_bytes()) for name, file in names), folder / "images")
    begin = 0
    for split, end in SPLITS.items():
        (folder / f"{split}.json").write_text(json.dumps(entries[begin:end]))
        begin = end


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
