"""The predictions of a run's evaluation beside the questions, what is right, and their images."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_loaders.shards import DamagedError, ShardReader, open_index
from vlm.config import apply_overrides, load_yaml
from vlm.errors import UserError
from vlm.records import OfficialFile
from vlm.run import CONFIG, EXPORT, RunConfig, task_of
from vlm.scoring.predictions import read_gqa_predictions, read_nlvr2_predictions, read_vqav2_results
from vlm.tasks.task import Task
from vlm.types import Question

RIGHT = 0.5  # a score from here on counts as right: of VQAv2's, what two or more of ten annotators say (0.6)


@dataclass(frozen=True)
class Answered:
    """One question with the predictions of one run, or of two."""

    question: Question
    predictions: tuple[str, ...]
    values: tuple[float | None, ...]  # in [0, 1]; None where nobody published what is right
    kind: str = ""  # of the question, where its task tells kinds apart

    def is_right(self, run: int = 0) -> bool | None:
        value = self.values[run]
        return None if value is None else value >= RIGHT


class Evaluated:
    """The evaluation of one run, or of two on the same questions."""

    def __init__(self, names: Sequence[str], questions: Sequence[Answered], reader: ShardReader | None) -> None:
        self.names, self.questions, self.reader = tuple(names), tuple(questions), reader
        self.keys = frozenset(key for one in self.questions for key in one.question.image_keys)

    @property
    def kinds(self) -> list[str]:
        return sorted({one.kind for one in self.questions} - {""})

    def image(self, key: str) -> bytes | None:
        """The encoded image of a question; None of anything else, or where it is lost or damaged."""
        if self.reader is None or key not in self.keys:
            return None
        try:
            return self.reader.image(self.reader.position(key))
        except (KeyError, DamagedError):
            return None

    def select(self, show: str = "all", kind: str = "", search: str = "") -> list[int]:
        """The numbers of the questions that a filter leaves. `show`: all, right, wrong, differ, better or worse."""
        words = search.casefold().split()
        return [number for number, one in enumerate(self.questions) if _shown(one, show, kind, words)]

    @property
    def percent(self) -> list[float | None]:
        """The mean score of each run."""
        means: list[float | None] = []
        for run in range(len(self.names)):
            values = [v for one in self.questions if one.question.counts and (v := one.values[run]) is not None]
            means.append(100 * sum(values) / len(values) if values else None)
        return means


def _shown(one: Answered, show: str, kind: str, words: Sequence[str]) -> bool:
    if kind and one.kind != kind:
        return False
    if show in ("right", "wrong") and one.is_right() is not (show == "right"):
        return False
    if show in ("differ", "better", "worse"):
        if len(one.predictions) < 2 or one.predictions[0] == one.predictions[1]:
            return False
        first, second = (-1.0 if value is None else value for value in one.values)
        if (show == "better" and second <= first) or (show == "worse" and second >= first):
            return False
    text = " ".join((one.question.text, *one.predictions, *one.question.answers, one.question.id)).casefold()
    return all(word in text for word in words)


def evaluated(runs: Sequence[Path], overrides: Sequence[str] = ()) -> Evaluated:
    """What these runs predicted on the split that their configs, or `overrides`, name; the runs share the questions."""
    found: list[tuple[RunConfig, Task, dict[str, str]]] = []
    for run in runs:
        if (run / EXPORT).is_file() or not (run / CONFIG).is_file():
            raise UserError(f"{run}: no run's folder, and only that holds predictions to compare")
        config = apply_overrides(load_yaml(run / CONFIG, RunConfig), overrides)
        task = task_of(config)
        if not isinstance(task, Task):
            raise UserError(f"{run}: was not fine-tuned on a task with answers, so it has no predictions to look at")
        found.append((config, task, _predictions(run, task, overrides)))
    config, task, predictions = found[0]
    root = config.data.prepare()
    questions = [question for question in task.evaluation_questions(root) if question.id in predictions]
    if not questions:
        raise UserError(f"{runs[0]}: its predictions are of other questions than its data holds. Evaluate it again")
    for run, (_, other, theirs) in zip(runs[1:], found[1:], strict=True):
        if other.type != task.type or any(question.id not in theirs for question in questions):
            raise UserError(f"{run}: answered other questions than {runs[0]}. Evaluate both on one split of one task")
    rows = []
    for question in questions:
        said = tuple(theirs[question.id] for _, _, theirs in found)
        values = tuple(task.value(question, one) if question.answers else None for one in said)
        rows.append(Answered(question, said, values, _kind(task, question)))
    folder = root / task.type / "images"
    return Evaluated([run.name for run in runs], rows, ShardReader(open_index(folder)) if folder.is_dir() else None)


def _kind(task: Task, question: Question) -> str:
    # NLVR2's groups are those that consistency is counted over, and no kinds.
    return "" if task.type == "nlvr2" else question.kind or question.group


def _predictions(run: Path, task: Task, overrides: Sequence[str]) -> dict[str, str]:
    readers: Mapping[str, Any] = {
        "vqav2": read_vqav2_results,
        "gqa": read_gqa_predictions,
        "nlvr2": read_nlvr2_predictions,
        "csv": _read_csv,
    }
    if task.type not in readers:
        raise UserError(f"{run}: predictions of task {task.type!r} have a form that is not known here")
    suffix = "csv" if task.type in ("nlvr2", "csv") else "json"
    file = run / f"predictions-{task.type}-{task.evaluation_name}.{suffix}"
    if not file.is_file():
        raise UserError(
            f"{file}: no such predictions. Write them first: {' '.join(('vlm evaluate', str(run), *overrides))}"
        )
    return {str(number): answer for number, answer in readers[task.type](file).items()}


def _read_csv(path: Path) -> dict[str, str]:
    file = OfficialFile.given(path)
    with file.text() as text:
        try:
            header, *rows = list(csv.reader(text, strict=True))
            if header != ["id", "prediction"] or any(len(row) != 2 for row in rows):
                raise file.error("expected the columns id and prediction")
        except (csv.Error, ValueError) as error:
            raise file.error(f"cannot be read ({error})") from None
    return dict(rows)
