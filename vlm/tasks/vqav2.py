"""VQAv2: open questions, ten human answers each, soft targets."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from vlm.errors import UserError
from vlm.metrics.vqav2 import official_accuracy, vqa_accuracy
from vlm.tasks.task import Split, Task, mean_percent, predicted, read_json
from vlm.types import Question

SPLITS: dict[Split, str] = {"train": "train2014", "validation": "val2014", "test": "test2015"}


class VQAv2Task(Task):
    """Soft target of an answer: its VQA accuracy against the ten. Loss: binary cross-entropy times classes."""

    multi_label: ClassVar[bool] = True

    type: Literal["vqav2"] = "vqav2"
    min_occurrences: PositiveInt = 9  # an answer enters the vocabulary if it is a training majority this often

    def read(self, root: Path, split: Split) -> list[Question]:
        folder, name = root / "vqav2", SPLITS[split]
        questions = read_json(folder / f"v2_OpenEnded_mscoco_{name}_questions.json")["questions"]
        annotations = folder / f"v2_mscoco_{name}_annotations.json"
        rows = {row["question_id"]: row for row in read_json(annotations)["annotations"]}
        missing = next((row["question_id"] for row in questions if row["question_id"] not in rows), None)
        if missing is not None:
            raise UserError(f"{annotations}: question {missing} has no annotation; the two files are of other releases")
        return [self._question(row, rows[row["question_id"]], name) for row in questions]

    def vocabulary(self, root: Path) -> tuple[str, ...]:
        counts = Counter(Counter(question.answers).most_common(1)[0][0] for question in self.read(root, "train"))
        return tuple(sorted(answer for answer, count in counts.items() if count >= self.min_occurrences))

    def target(self, question: Question, answer_ids: Mapping[str, int]) -> dict[int, float]:
        return {
            answer_ids[answer]: vqa_accuracy(answer, question.answers)
            for answer in set(question.answers)
            if answer in answer_ids
        }

    def score(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
        by_type = defaultdict(list)
        for question in questions:
            by_type[question.group].append(official_accuracy(predicted(question, predictions), question.answers))
        scores = {"accuracy": mean_percent([value for values in by_type.values() for value in values])}
        return scores | {f"accuracy/{name}": mean_percent(values) for name, values in sorted(by_type.items()) if name}

    def official(self, question: Question, answer: str) -> dict[str, Any]:
        return {"question_id": int(question.id), "answer": answer}

    @staticmethod
    def _question(row: dict[str, Any], annotation: dict[str, Any], split: str) -> Question:
        key = f"COCO_{split}_{row['image_id']:012d}"
        answers = tuple(answer["answer"] for answer in annotation["answers"])
        return Question(str(row["question_id"]), row["question"], (key,), answers, annotation.get("answer_type", ""))
