"""VQAv2: open questions, ten human answers each, soft targets."""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from vlm.errors import UserError
from vlm.metrics.vqav2 import normalise_answer, official_accuracy, vqa_accuracy
from vlm.records import OfficialFile, Row, records, shown
from vlm.supervision.sources import key_random
from vlm.tasks.task import Task, accuracy_by_group, official_file, predicted, read_texts, unique
from vlm.types import Question

MINIVAL_IMAGES = 5000  # as many as the published minival has


class VQAv2Task(Task):
    """Soft target of an answer: its VQA accuracy against the ten. Loss: binary cross-entropy times classes.

    With `validation=minival`, 5,000 images of val2014 are held out and the questions about all others train as well:
    the split of LXMERT and its successors. Which images was published as a list, not as a rule, so `minival` names
    that list: a file of question ids or image ids, or objects that hold one (`question_id`, `image_id`, `img_id`).
    Without a list the images are those with the lowest hash, a rule of our own: its scores do not compare.
    """

    multi_label: ClassVar[bool] = True
    splits: ClassVar[Mapping[str, str]] = {
        "train": "train2014",
        "validation": "val2014",
        "test": "test2015",
        "test_dev": "test-dev2015",
    }

    type: Literal["vqav2"] = "vqav2"
    evaluation_split: Literal["train", "validation", "test", "test_dev"] = "test"
    validation: Literal["val2014", "minival"] = "val2014"
    minival: Path | None = None  # a list of ids, where validation is "minival"
    answer_vocabulary: Path | None = None  # a JSON list of answers in the order of their labels; None: built
    vocabulary_from: Literal["train", "train_and_validation"] = "train"
    min_occurrences: PositiveInt = 9  # an answer enters the vocabulary if it is a majority this often

    def read(self, root: Path, split: str) -> list[Question]:
        if self.validation == "minival" and split in ("train", "validation"):
            held_out = self._release_split(root, "validation")
            chosen = self._minival(held_out, root)
            if split == "validation":
                return [question for question in held_out if question.id in chosen]
            return self._release_split(root, "train") + [q for q in held_out if q.id not in chosen]
        return self._release_split(root, split)

    def vocabulary(self, root: Path) -> tuple[str, ...]:
        """Answers after the official normalisation, as the field counts them.

        Source: the `multiple_choice_answer` of each question, at least 9 times; arXiv 1708.02711.
        """
        if self.answer_vocabulary is not None:
            return read_texts(self.answer_vocabulary)
        splits = ("train", "validation") if self.vocabulary_from == "train_and_validation" else ("train",)
        counts: Counter[str] = Counter()
        for split in splits:
            file = official_file(root / "vqav2", annotations_name(self.official_split(split)))
            counts.update(normalised(annotation.majority) for annotation in read_annotations(file))
        return tuple(sorted(answer for answer, count in counts.items() if count >= self.min_occurrences))

    def target(self, question: Question, answer_ids: Mapping[str, int]) -> dict[int, float]:
        answers = [normalised(answer) for answer in question.answers]
        return {
            answer_ids[answer]: vqa_accuracy(answer, answers)
            for answer in dict.fromkeys(answers)
            if answer in answer_ids
        }

    def score(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
        return accuracy_by_group(questions, [self.value(q, predicted(q, predictions)) for q in questions])

    def value(self, question: Question, prediction: str) -> float:
        return official_accuracy(prediction, question.answers)

    def official(self, question: Question, answer: str) -> dict[str, Any]:
        return {"question_id": int(question.id), "answer": answer}

    def _release_split(self, root: Path, split: str) -> list[Question]:
        """All questions of an official split; the test splits come without annotations."""
        name = self.official_split(split)
        folder = root / "vqav2"
        annotations: OfficialFile | None = official_file(folder, annotations_name(name))
        if name.startswith("test") and not (folder / annotations_name(name)).is_file():
            annotations = None
        return unique(lambda file: read_questions(file, annotations), official_file(folder, questions_name(name)))

    def _minival(self, held_out: Sequence[Question], root: Path) -> set[str]:
        """The ids of the questions of val2014 that validate."""
        if self.minival is not None:
            return read_minival(OfficialFile.at(self.minival), held_out)
        images = sorted(
            {question.image_keys[0] for question in held_out}, key=lambda k: key_random(k, "minival").random()
        )
        if len(images) <= MINIVAL_IMAGES:
            raise UserError(
                f"{root / 'vqav2'}: val2014 has {len(images)} images here, and {MINIVAL_IMAGES} would be held out. "
                "Name the held-out ids with task.minival"
            )
        chosen = set(images[:MINIVAL_IMAGES])
        return {question.id for question in held_out if question.image_keys[0] in chosen}


def questions_name(split: str) -> str:
    return f"v2_OpenEnded_mscoco_{split}_questions.json"


def annotations_name(split: str) -> str:
    return f"v2_mscoco_{split}_annotations.json"


def image_key(split: str | None, image_id: int) -> str:
    """The name of a COCO image without its ending; test-dev2015 asks about images of test2015.

    Without a split the number alone, as COCO names its images since 2017.
    """
    if split is None:
        return f"{image_id:012d}"
    return f"COCO_{'test2015' if split == 'test-dev2015' else split}_{image_id:012d}"


@dataclass(frozen=True, slots=True)
class Annotation:
    """What the annotators said of one question."""

    question_id: int
    image_id: int | None  # None where the file does not say
    answers: tuple[str, ...]
    majority: str
    answer_type: str
    question_type: str


def read_annotations(file: OfficialFile) -> Iterator[Annotation]:
    """The annotations of a file, one at a time."""
    for place, value in records(file, "list", "annotations", _other_splits(file)):
        question_id = Row(file, place, value).whole("question_id", below=10**15)
        row = Row(file, f"question {question_id}", value)
        answers = []
        for number, entry in enumerate(row.list_of("answers", dict, "objects"), start=1):
            answer = entry.get("answer")
            if not isinstance(answer, str) or not answer.isascii():  # of ten answers a question, few need a closer look
                answer = Row(file, f"question {question_id}, answer {number}", entry).text("answer")
            answers.append(sys.intern(answer))
        if not answers:
            raise row.error("has no answer")
        yield Annotation(
            question_id,
            row.whole("image_id", below=10**12) if row.content.get("image_id") is not None else None,
            tuple(answers),
            row.text("multiple_choice_answer", default="") or Counter(answers).most_common(1)[0][0],
            row.text("answer_type", default=""),
            row.text("question_type", default=""),
        )


def read_questions(file: OfficialFile, annotations: OfficialFile | None) -> Iterator[Question]:
    """The questions of a file joined to their annotations, which must be exactly theirs."""
    known: dict[int, Annotation] = {}
    for annotation in read_annotations(annotations) if annotations is not None else ():
        if annotation.question_id in known:
            raise annotations.error(f"question {annotation.question_id} is annotated twice")  # type: ignore[union-attr]  # not None here
        known[annotation.question_id] = annotation
    seen: set[int] = set()
    split = _split_of(file)
    for place, value in records(file, "list", "questions", _other_splits(file)):
        question_id = Row(file, place, value).whole("question_id", below=10**15)
        row = Row(file, f"question {question_id}", value)
        if question_id in seen:
            raise row.error("occurs twice")
        seen.add(question_id)
        image_id, text = row.whole("image_id", below=10**12), row.text("question")
        keys = (image_key(split, image_id),)
        if annotations is None:
            yield Question(str(question_id), text, keys)
            continue
        if question_id not in known:
            raise annotations.error(f"question {question_id} has no annotation; the two files are of other releases")
        found = known[question_id]
        if found.image_id not in (None, image_id):
            raise annotations.error(f"question {question_id} is about image {found.image_id}, not {image_id}")
        yield Question(str(question_id), text, keys, found.answers, found.answer_type, found.question_type)
    stranger = next((question_id for question_id in known if question_id not in seen), None)
    if annotations is not None and stranger is not None:
        raise annotations.error(f"question {stranger} is annotated, but not asked; the two files are of other releases")


def read_minival(file: OfficialFile, held_out: Sequence[Question]) -> set[str]:
    """The ids of the held-out questions that a list names, by question or by image. Every id must be known."""
    listed: set[int] = set()
    for place, entry in records(file, "list"):
        if isinstance(entry, dict):
            entry = next((entry[name] for name in ("question_id", "image_id", "img_id") if name in entry), None)
        text = str(entry).rpartition("_")[2]  # COCO_val2014_000000000042
        if isinstance(entry, bool) or not isinstance(entry, int | str) or not re.fullmatch("[0-9]{1,18}", text):
            raise file.error(f"{place} is no question id and no image id, but {shown(entry)}")
        listed.add(int(text))
    if not listed:
        raise file.error("names no question")
    by_image: defaultdict[int, set[str]] = defaultdict(set)
    for question in held_out:
        by_image[int(question.image_keys[0].rpartition("_")[2])].add(question.id)
    ids = {int(question.id) for question in held_out}
    if listed <= ids:
        return {str(number) for number in listed}
    if listed <= by_image.keys():
        return {question_id for number in listed for question_id in by_image[number]}
    unknown = min(listed - ids, key=lambda number: (number in by_image, number))
    raise file.error(f"{unknown} is no question and no image of val2014 here")


def _split_of(file: OfficialFile) -> str | None:
    """The split that a file is named after; None of a file with a name of its own."""
    names = VQAv2Task.splits.values()
    return next((name for name in names if file.name.endswith((questions_name(name), annotations_name(name)))), None)


def _other_splits(file: OfficialFile) -> dict[str, set[str]]:
    """What the head of a file says if its content is another split's. test-dev2015 is a part of test2015."""
    split = _split_of(file)
    if split is None:
        return {}
    own = {split, split.replace("test-dev", "test")}
    return {"data_subtype": set(VQAv2Task.splits.values()) - own}


@lru_cache(maxsize=1 << 20)
def normalised(answer: str) -> str:
    """An answer as the official script compares it."""
    return normalise_answer(answer)
