"""GQA: compositional questions with one answer each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from vlm.records import OfficialFile, Row, records, shown
from vlm.tasks.task import Task, accuracy_by_group, official_file, predicted, read_texts, unique
from vlm.types import Question

IMAGE_ID = re.compile(r"[A-Za-z0-9_-]{1,200}")


class GQATask(Task):
    """Cross-entropy over the answers of train and validation. Answers are compared exactly.

    With `evaluate_on=all` the unbalanced questions of the evaluation split are answered as well. Accuracy stays over
    the balanced ones, as the authors have it; consistency (`vlm score gqa --all-questions`) needs the answers to all.
    """

    splits: ClassVar[Mapping[str, str]] = {
        "train": "train",
        "validation": "val",
        "test": "testdev",
        "submission": "submission",
    }

    type: Literal["gqa"] = "gqa"
    evaluation_split: Literal["train", "validation", "test", "submission"] = "test"
    train_on: Literal["balanced", "all"] = "balanced"  # 943,000 or 14,305,356 questions
    evaluate_on: Literal["balanced", "all"] = "balanced"
    answer_vocabulary: Path | None = None  # a JSON list of answers in the order of their labels; None: built

    def read(self, root: Path, split: str) -> list[Question]:
        name = self.official_split(split)
        return self._read(root, name, self.train_on if name == "train" else "balanced")

    def evaluation_questions(self, root: Path) -> list[Question]:
        return self._read(root, self.official_split(self.evaluation_split), self.evaluate_on)

    @property
    def evaluation_name(self) -> str:
        return self.evaluation_split + "-all" * (self.evaluate_on == "all")

    def vocabulary(self, root: Path) -> tuple[str, ...]:
        """The answers of balanced train and validation, whatever is trained on."""
        if self.answer_vocabulary is not None:
            return read_texts(self.answer_vocabulary)
        questions = self._read(root, "train", "balanced") + self._read(root, "val", "balanced")
        return tuple(sorted({answer for question in questions for answer in question.answers}))

    def target(self, question: Question, answer_ids: Mapping[str, int]) -> dict[int, float]:
        return {answer_ids[answer]: 1.0 for answer in question.answers if answer in answer_ids}

    def score(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
        counted = [question for question in questions if question.counts]
        return accuracy_by_group(counted, [self.value(q, predicted(q, predictions)) for q in counted])

    def value(self, question: Question, prediction: str) -> float:
        return float(prediction in question.answers)

    def official(self, question: Question, answer: str) -> dict[str, Any]:
        return {"questionId": question.id, "prediction": answer}

    def _read(self, root: Path, name: str, kind: str) -> list[Question]:
        """The questions of one official file, or of its chunks. Submission has but one, of all."""
        labelled = name != "submission"
        folder, stem = root / "gqa", f"{name}_{kind if labelled else 'all'}_questions"
        chunks = sorted((folder / stem).glob(f"{stem}_*.json"))
        return unique(
            partial(read_questions, labelled=labelled),
            *(official_file(folder, name) for name in [f"{stem}/{chunk.name}" for chunk in chunks] or [f"{stem}.json"]),
        )


def read_questions(file: OfficialFile, labelled: bool = True) -> Iterator[Question]:
    """The questions of a file, one at a time; those of the submission split carry no answer."""
    for question_id, value in records(file, "object"):
        row = Row(file, f"question {shown(question_id)}", value)
        key = row.identifier("imageId")
        if not IMAGE_ID.fullmatch(key):
            raise row.wrong("imageId", "letters, digits, '_' or '-'")
        answers = (row.text("answer"),) if labelled else ()
        has_types = row.content.get("types") is not None
        group = row.inside("types").text("structural", default="") if has_types else ""
        balanced = row.content.get("isBalanced", True)
        if not isinstance(balanced, bool):
            raise row.wrong("isBalanced", "true or false")
        yield Question(question_id, row.text("question"), (key,), answers, group, counts=balanced)
