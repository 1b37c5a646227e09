"""NLVR2: is a statement true of two images?"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from vlm.errors import UserError
from vlm.metrics.submission import check_submission
from vlm.tasks.task import Split, Task, mean_percent, predicted
from vlm.types import Question

SPLITS: dict[Split, str] = {"train": "train", "validation": "dev", "test": "test1"}


class NLVR2Task(Task):
    """Cross-entropy over True and False. Consistency: the share of statements that are right for all their pairs."""

    images_per_text: ClassVar[int] = 2
    ANSWERS: ClassVar[tuple[str, str]] = ("False", "True")

    type: Literal["nlvr2"] = "nlvr2"

    def read(self, root: Path, split: Split) -> list[Question]:
        file = root / "nlvr2" / f"{SPLITS[split]}.json"
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise UserError(f"{file}: no such file. Prepare the task's data first") from None
        return [self._question(file, number, line) for number, line in enumerate(lines, start=1)]

    def vocabulary(self, root: Path) -> tuple[str, ...]:
        return self.ANSWERS

    def target(self, question: Question, answer_ids: Mapping[str, int]) -> dict[int, float]:
        return {answer_ids[answer]: 1.0 for answer in question.answers}

    def score(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
        right = [float(predicted(question, predictions) in question.answers) for question in questions]
        groups = defaultdict(list)
        for question, value in zip(questions, right, strict=True):
            groups[question.group].append(value)
        return {"accuracy": mean_percent(right), "consistency": mean_percent([min(group) for group in groups.values()])}

    def write_predictions(self, file: Path, questions: Sequence[Question], predictions: Mapping[str, str]) -> None:
        """The official CSV: identifier,prediction without a header."""
        file = file.with_suffix(".csv")
        check_submission(file, (question.id for question in questions), predictions, allowed=self.ANSWERS)
        file.write_text("".join(f"{question.id},{predictions[question.id]}\n" for question in questions))

    @staticmethod
    def _question(file: Path, number: int, line: str) -> Question:
        try:
            row = json.loads(line)
            first, second, third, fourth = row["identifier"].split("-")
            keys = tuple(f"{first}-{second}-{third}-img{image}" for image in (0, 1))
            return Question(row["identifier"], row["sentence"], keys, (row["label"],), f"{first}-{second}-{fourth}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: line {number} is not an NLVR2 row ({type(error).__name__}: {error})") from None
