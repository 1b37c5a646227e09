"""What a downstream task is: official files in, predictions and official scores out."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from vlm.config import Config
from vlm.errors import UserError
from vlm.metrics.items import Items, make_items
from vlm.metrics.submission import check_submission
from vlm.records import OTHER_FILE, OfficialFile, Row, records, shown
from vlm.supervision.sources import key_random
from vlm.types import Question

MISSING_IMAGES, MANIFEST = "missing_images.json", "manifest.json"  # of a prepared folder


class Task(Config):
    """A task over questions about images. Members read the official layout under `<data root>/<type>/`."""

    images_per_text: ClassVar[int] = 1
    multi_label: ClassVar[bool] = False  # True: soft targets and binary cross-entropy
    headline: ClassVar[str] = "accuracy"  # the score that a curve shows
    splits: ClassVar[Mapping[str, str]] = {}  # name here -> name in the official files

    type: str
    train_fraction: float = Field(1.0, gt=0, le=1)  # of the training questions, nested and random by id
    evaluation_split: str = "test"  # where the final scores come from
    question_only: bool = False  # True: every image is grey, in training too: the baseline that may not look

    @property
    def images_in_turn(self) -> bool:
        """Whether each image meets the text as the image before it left it."""
        return False

    @abstractmethod
    def read(self, root: Path, split: str) -> list[Question]:
        """The questions of one split, in the order of the official file.

        A question whose answers are all outside the vocabulary is among them, and so is one whose image is missing.
        """

    def evaluation_questions(self, root: Path) -> list[Question]:
        """The questions whose answers make the final scores; those that do not count are answered all the same."""
        return self.read(root, self.evaluation_split)

    @property
    def evaluation_name(self) -> str:
        """What names the files of an evaluation."""
        return self.evaluation_split

    @abstractmethod
    def vocabulary(self, root: Path) -> tuple[str, ...]:
        """The answers that the classifier can give."""

    @abstractmethod
    def target(self, question: Question, answer_ids: Mapping[str, int]) -> dict[int, float]:
        """Answer index -> soft target in [0, 1]; empty where no answer is in the vocabulary."""

    @abstractmethod
    def score(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
        """Scores in percent, among them `headline`. Every question must have a prediction."""

    def value(self, question: Question, prediction: str) -> float | None:
        """What one answer scores, in [0, 1]. The headline is the mean over the questions that count, in percent.

        None: the headline is no such mean, and runs are compared by their scores alone.
        """
        return None

    def cluster(self, question: Question) -> str:
        """What a question is drawn together with when questions are resampled: its image."""
        return question.image_keys[0]

    def items(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> Items | None:
        """The score of each question that counts."""
        counted = [question for question in questions if question.counts]
        values = [self.value(question, predicted(question, predictions)) for question in counted]
        known = [value for value in values if value is not None]
        if not counted or len(known) < len(counted):
            return None
        return make_items([q.id for q in counted], known, [self.cluster(q) for q in counted])

    def official(self, question: Question, answer: str) -> dict[str, Any]:
        """One entry of the official results file."""
        return {"question_id": question.id, "answer": answer}

    def write_predictions(self, file: Path, questions: Sequence[Question], predictions: Mapping[str, str]) -> None:
        """Write the official results file. The predictions must be those of exactly these questions."""
        file.write_text(self.submission(file, questions, predictions))

    def submission(self, file: Path, questions: Sequence[Question], predictions: Mapping[str, str]) -> str:
        """The text of the official results file, which errors call `file`."""
        check_submission(file, (question.id for question in questions), predictions)
        return json.dumps([self.official(question, predictions[question.id]) for question in questions])

    def official_split(self, split: str) -> str:
        """What the official files call a split."""
        if split not in self.splits:
            raise UserError(f"{self.type}: unknown split {split!r}. Available: {', '.join(self.splits)}")
        return self.splits[split]

    def train_questions(self, root: Path) -> list[Question]:
        """The training split, or the chosen fraction of it, without the questions whose image is missing."""
        missing = read_missing_images(root / self.type)
        questions = [question for question in self.read(root, "train") if missing.isdisjoint(question.image_keys)]
        if self.train_fraction == 1:
            return questions
        shuffled = sorted(questions, key=lambda question: key_random(question.id, "train_fraction").random())
        return shuffled[: max(1, round(self.train_fraction * len(questions)))]

    def question_prior(
        self, train: Sequence[Question], questions: Sequence[Question], by_text: bool = True
    ) -> dict[str, str]:
        """The most frequent training answer to exactly this question, else to this question type, else of all.

        Training questions without an answer do not count. The type is never one that tells of the answer (yes/no,
        number), where the release has another.

        The best that can be done without a picture where questions repeat; a model cannot honestly be said to see
        until it beats this.
        """
        counts: dict[tuple[str, str], Counter[str]] = {}
        for question in train:
            for level in _levels(question, by_text):
                counts.setdefault(level, Counter()).update(question.answers)
        if not any(counts.values()):
            raise UserError(f"{self.type}: no training question has an answer, so none is the most frequent")
        best = {level: answers.most_common(1)[0][0] for level, answers in counts.items() if answers}
        return {
            question.id: next(best[level] for level in _levels(question, by_text) if level in best)
            for question in questions
        }


def _levels(question: Question, by_text: bool) -> tuple[tuple[str, str], ...]:
    """What a question has in common with others, the closest first."""
    text = (("text", question.text),) if by_text else ()
    return (*text, ("type", question.kind or question.group), ("all", ""))


def official_file(folder: Path, name: str) -> OfficialFile:
    """A file of a task's folder. Where a manifest says how long it was when it was prepared, it still must be."""
    path = folder / name
    file = OfficialFile.at(path)
    if path.is_file() and (folder / MANIFEST).is_file():
        manifest = OfficialFile.at(folder / MANIFEST)
        for key, value in ((key, value) for key, value in records(manifest, "object") if key == "files"):
            signed = Row(manifest, key, value).content.get(name)
            size = path.stat().st_size
            if signed is not None and Row(manifest, name, signed).whole("bytes") != size:
                raise file.error(f"has {size:,} bytes, but {signed['bytes']:,} when it was prepared")
    return file


def read_missing_images(folder: Path) -> frozenset[str]:
    """The keys of the images that the release lacked when the task's folder was prepared."""
    file = folder / MISSING_IMAGES
    return frozenset(read_texts(file)) if file.is_file() else frozenset()


def read_texts(path: Path) -> tuple[str, ...]:
    """A JSON list of distinct texts, such as an answer vocabulary in the order of its labels."""
    file = OfficialFile.at(path)
    texts: dict[str, None] = {}
    for place, text in records(file, "list"):
        if not isinstance(text, str):
            raise file.error(f"{place} must be text. Got {shown(text)}")
        if text in texts:
            raise file.error(f"holds {shown(text)} twice")
        texts[text] = None
    return tuple(texts)


def unique(read: Callable[[OfficialFile], Iterable[Question]], *files: OfficialFile) -> list[Question]:
    """The questions of all files, in order. An id that occurs twice is an error, and so is no question at all."""
    by_id: dict[str, Question] = {}
    for file in files:
        for question in read(file):
            if question.id in by_id:
                where = "stands in an earlier chunk too" if file is not files[0] else "occurs twice"
                raise file.error(f"question {question.id} {where}")
            by_id[question.id] = question
    if not by_id:
        raise files[0].error("holds no question", OTHER_FILE)
    return list(by_id.values())


def predicted(question: Question, predictions: Mapping[str, str]) -> str:
    """The prediction of a question. A missing one is an error, never a wrong answer in silence."""
    try:
        return predictions[question.id]
    except KeyError:
        raise UserError(f"question {question.id}: no prediction among {len(predictions)}") from None


def accuracy_by_group(questions: Sequence[Question], values: Sequence[float]) -> dict[str, float]:
    """The mean of the questions' accuracies, in percent, over all and over each group that has a name."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for question, value in zip(questions, values, strict=True):
        groups[question.group].append(value)
    scores = {"accuracy": mean_percent([value for group in groups.values() for value in group])}
    return scores | {f"accuracy/{name}": mean_percent(group) for name, group in sorted(groups.items()) if name}


def mean_percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / max(len(values), 1)
