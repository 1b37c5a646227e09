"""What a downstream task is: official files in, predictions and official scores out."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from vlm.config import Config
from vlm.errors import UserError
from vlm.metrics.submission import check_submission
from vlm.supervision.sources import key_random
from vlm.types import Question

Split = Literal["train", "validation", "test"]


class Task(Config):
    """A task over questions about images. Members read the official layout under `<data root>/<type>/`."""

    images_per_text: ClassVar[int] = 1
    multi_label: ClassVar[bool] = False  # True: soft targets and binary cross-entropy
    headline: ClassVar[str] = "accuracy"  # the score that a curve shows

    type: str
    train_fraction: float = Field(1.0, gt=0, le=1)  # of the training questions, nested and random by id
    evaluation_split: Split = "test"  # where the final scores come from
    question_only: bool = False  # True: every image is grey, in training too: the baseline that may not look

    @abstractmethod
    def read(self, root: Path, split: Split) -> list[Question]:
        """The questions of one split, in the order of the official file."""

    @abstractmethod
    def vocabulary(self, root: Path) -> tuple[str, ...]:
        """The answers that the classifier can give."""

    @abstractmethod
    def target(self, question: Question, answer_ids: Mapping[str, int]) -> dict[int, float]:
        """Answer index -> soft target in [0, 1]; empty where no answer is in the vocabulary."""

    @abstractmethod
    def score(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
        """Scores in percent, among them `headline`. Every question must have a prediction."""

    def official(self, question: Question, answer: str) -> dict[str, Any]:
        """One entry of the official results file."""
        return {"question_id": question.id, "answer": answer}

    def write_predictions(self, file: Path, questions: Sequence[Question], predictions: Mapping[str, str]) -> None:
        """Write the official results file. The predictions must be those of exactly these questions."""
        check_submission(file, (question.id for question in questions), predictions)
        entries = [self.official(question, predictions[question.id]) for question in questions]
        file.write_text(json.dumps(entries))

    def train_questions(self, root: Path) -> list[Question]:
        """The training split, or the chosen fraction of it."""
        questions = self.read(root, "train")
        if self.train_fraction == 1:
            return questions
        shuffled = sorted(questions, key=lambda question: key_random(question.id, "train_fraction").random())
        return shuffled[: max(1, round(self.train_fraction * len(questions)))]

    def question_prior(self, train: Sequence[Question], questions: Sequence[Question]) -> dict[str, str]:
        """The most frequent training answer to exactly this question, else to this question type, else of all.

        The best that can be done without a picture where questions repeat; a model cannot honestly be said to see
        until it beats this.
        """
        counts: dict[tuple[str, str], Counter[str]] = {}
        for question in train:
            for level in (("text", question.text), ("group", question.group), ("all", "")):
                counts.setdefault(level, Counter()).update(question.answers)
        return {
            question.id: next(
                counts[level].most_common(1)[0][0]
                for level in (("text", question.text), ("group", question.group), ("all", ""))
                if level in counts
            )
            for question in questions
        }


def read_json(file: Path) -> Any:
    """The content of an official file; one clear error if it is missing or broken."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file. Prepare the task's data first") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}). Download or prepare it again") from None


def predicted(question: Question, predictions: Mapping[str, str]) -> str:
    """The prediction of a question. A missing one is an error, never a wrong answer in silence."""
    try:
        return predictions[question.id]
    except KeyError:
        raise UserError(f"question {question.id}: no prediction among {len(predictions)}") from None


def mean_percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / max(len(values), 1)
