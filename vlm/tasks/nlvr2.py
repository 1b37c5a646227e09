"""NLVR2: is a statement true of two images?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from vlm.metrics.nlvr2 import IDENTIFIER, group_of
from vlm.metrics.submission import check_submission
from vlm.records import OfficialFile, Row, json_lines
from vlm.tasks.task import Task, mean_percent, official_file, predicted, unique
from vlm.types import Question


class NLVR2Task(Task):
    """Cross-entropy over True and False. Consistency: the share of statements that are right for all their pairs.

    `second_image` meets the statement alone, as the first does (`fresh_text`), or the states of the statement that come
    out of its fusion with the first image (`fused_text`), as in the reference paper's code.
    """

    images_per_text: ClassVar[int] = 2
    ANSWERS: ClassVar[tuple[str, str]] = ("False", "True")
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "validation": "dev", "test": "test1", "test2": "test2"}

    type: Literal["nlvr2"] = "nlvr2"
    evaluation_split: Literal["train", "validation", "test", "test2"] = "test"
    second_image: Literal["fresh_text", "fused_text"] = "fresh_text"

    @property
    def images_in_turn(self) -> bool:
        return self.second_image == "fused_text"

    def read(self, root: Path, split: str) -> list[Question]:
        return unique(read_questions, official_file(root / "nlvr2", f"{self.official_split(split)}.json"))

    def vocabulary(self, root: Path) -> tuple[str, ...]:
        return self.ANSWERS

    def target(self, question: Question, answer_ids: Mapping[str, int]) -> dict[int, float]:
        return {answer_ids[answer]: 1.0 for answer in question.answers}

    def score(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
        right = [self.value(question, predicted(question, predictions)) for question in questions]
        groups = defaultdict(list)
        for question, value in zip(questions, right, strict=True):
            groups[question.group].append(value)
        return {"accuracy": mean_percent(right), "consistency": mean_percent([min(group) for group in groups.values()])}

    def value(self, question: Question, prediction: str) -> float:
        return float(prediction in question.answers)

    def cluster(self, question: Question) -> str:
        return question.group

    def write_predictions(self, file: Path, questions: Sequence[Question], predictions: Mapping[str, str]) -> None:
        super().write_predictions(file.with_suffix(".csv"), questions, predictions)

    def submission(self, file: Path, questions: Sequence[Question], predictions: Mapping[str, str]) -> str:
        """The official CSV: identifier,prediction without a header."""
        check_submission(file, (question.id for question in questions), predictions, allowed=self.ANSWERS)
        return "".join(f"{question.id},{predictions[question.id]}\n" for question in questions)


def read_questions(file: OfficialFile) -> Iterator[Question]:
    """The statements of a file, one at a time."""
    for place, value in json_lines(file):
        row = Row(file, place, value)
        identifier, sentence, label = row.text("identifier"), row.text("sentence"), row.text("label")
        if IDENTIFIER.fullmatch(identifier) is None:
            raise row.wrong("identifier", "split-set-pair-sentence")
        if label not in ("True", "False"):
            raise row.wrong("label", "True or False")
        pair = identifier.rpartition("-")[0]
        yield Question(identifier, sentence, (f"{pair}-img0", f"{pair}-img1"), (label,), group_of(identifier))
