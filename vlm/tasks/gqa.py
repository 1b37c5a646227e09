"""GQA: compositional questions with one answer each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vlm.tasks.task import Split, Task, mean_percent, predicted, read_json
from vlm.types import Question

SPLITS: dict[Split, str] = {"train": "train", "validation": "val", "test": "testdev"}


class GQATask(Task):
    """Cross-entropy over the answers of train and validation. Answers are compared exactly."""

    type: Literal["gqa"] = "gqa"

    def read(self, root: Path, split: Split) -> list[Question]:
        rows = read_json(root / "gqa" / f"{SPLITS[split]}_balanced_questions.json")
        return [
            Question(str(number), row["question"], (str(row["imageId"]),), (row["answer"],), row["types"]["structural"])
            for number, row in rows.items()
        ]

    def vocabulary(self, root: Path) -> tuple[str, ...]:
        questions = self.read(root, "train") + self.read(root, "validation")
        return tuple(sorted({answer for question in questions for answer in question.answers}))

    def target(self, question: Question, answer_ids: Mapping[str, int]) -> dict[int, float]:
        return {answer_ids[answer]: 1.0 for answer in question.answers if answer in answer_ids}

    def score(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
        by_type = defaultdict(list)
        for question in questions:
            by_type[question.group].append(float(predicted(question, predictions) in question.answers))
        scores = {"accuracy": mean_percent([value for values in by_type.values() for value in values])}
        return scores | {f"accuracy/{name}": mean_percent(values) for name, values in sorted(by_type.items())}

    def official(self, question: Question, answer: str) -> dict[str, Any]:
        return {"questionId": question.id, "prediction": answer}
