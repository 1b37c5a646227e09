"""Anyone's questions: a table of (image, question, answer), or of (image, image, statement, truth)."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

from pydantic import PositiveInt

from vlm.metrics.submission import check_submission
from vlm.records import OfficialFile, Row, json_lines, shown
from vlm.tasks.task import Task, accuracy_by_group, official_file, predicted, unique
from vlm.types import Question

REMEDY = "Correct it there"
IMAGES = (("image",), ("image1", "image2"), ("image", "image"), ("image", "image2"), ("left", "right"))
TEXTS, ANSWERS = ("question", "statement"), ("answer", "truth")
TRUTHS = {"true": "True", "1": "True", "yes": "True", "false": "False", "0": "False", "no": "False"}


class CSVTask(Task):
    """Cross-entropy over the answers of the training rows. Answers are compared exactly; statements are true or not.

    `num_images=2` for a table whose rows have two images.
    """

    splits: ClassVar[Mapping[str, str]] = {"train": "train", "validation": "validation", "test": "test"}

    type: Literal["csv"] = "csv"
    evaluation_split: Literal["train", "validation", "test"] = "validation"
    num_images: Literal[1, 2] = 1
    min_occurrences: PositiveInt = 1  # rows of train that must give an answer before the model can

    @property
    def images_per_text(self) -> int:  # type: ignore[override]  # of the family, this one alone is of both kinds
        return self.num_images

    def read(self, root: Path, split: str) -> list[Question]:
        return unique(_prepared, official_file(root / "csv", f"{self.official_split(split)}.jsonl"))

    def vocabulary(self, root: Path) -> tuple[str, ...]:
        counts = Counter(answer for question in self.read(root, "train") for answer in question.answers)
        return tuple(sorted(answer for answer, count in counts.items() if count >= self.min_occurrences))

    def target(self, question: Question, answer_ids: Mapping[str, int]) -> dict[int, float]:
        return {answer_ids[answer]: 1.0 for answer in question.answers if answer in answer_ids}

    def score(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
        return accuracy_by_group(questions, [self.value(q, predicted(q, predictions)) for q in questions])

    def value(self, question: Question, prediction: str) -> float:
        return float(prediction in question.answers)

    def write_predictions(self, file: Path, questions: Sequence[Question], predictions: Mapping[str, str]) -> None:
        super().write_predictions(file.with_suffix(".csv"), questions, predictions)

    def submission(self, file: Path, questions: Sequence[Question], predictions: Mapping[str, str]) -> str:
        """A table of id and prediction; the id is that of the row, by default its number in the user's table."""
        check_submission(file, (question.id for question in questions), predictions)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("id", "prediction"))
        writer.writerows((question.id, predictions[question.id]) for question in questions)
        return text.getvalue()


def read_table(file: OfficialFile, images_per_text: int | None = None, labelled: bool = True) -> Iterator[Question]:
    """The rows of a user's table: UTF-8 with a header, parted by commas, semicolons or tabs.

    Columns, in any order: `image`, `question`, `answer`; or two images (`image1`, `image2`, or `image` twice),
    `statement`, `truth` (true or false, yes or no, 1 or 0). Where there are an `id` and a `type`, they are kept; others
    are passed over. An id is otherwise the number of the row as a spreadsheet shows it: the header is row 1.
    `image_keys` are paths below a folder, which they must not leave.
    """
    file = replace(file, remedy="Save it again, as CSV in UTF-8", if_missing="Give the path of the table")
    with file.text() as text:
        header = text.readline()
        if not header.strip():
            raise file.error("has no header")
        if "\r" in header.rstrip("\r\n"):
            raise file.error("its lines end in carriage returns alone")
        delimiter = max(",;\t", key=header.count)
        row = 0
        try:
            names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter, strict=True))]
            row = 1
            places, answer_name = _columns(file, names, images_per_text, labelled)
            for row, cells in enumerate(csv.reader(text, delimiter=delimiter, strict=True), start=2):
                if any(cell.strip() for cell in cells):
                    yield _question(file, row, [cell.strip() for cell in cells], names, places, answer_name)
        except csv.Error as error:
            raise file.error(f"row {row + 1}: cannot be read ({error})", REMEDY) from None


def _columns(
    file: OfficialFile, names: Sequence[str], images_per_text: int | None, labelled: bool
) -> tuple[dict[str, list[int]], str | None]:
    """Where the images, the text and the answer stand, and what the column of answers is called."""
    found = sorted(name for name in names if name in {one for form in IMAGES for one in form})
    images = next((form for form in IMAGES if sorted(form) == found), None)
    text = [name for name in names if name in TEXTS]
    answer = [name for name in names if name in ANSWERS]
    got = f"Got {', '.join(map(shown, names))}"
    if images is None or len(text) != 1 or len(answer) > 1 or (labelled and not answer):
        wanted = "image, question and answer, or image1, image2, statement and truth"
        raise file.error(f"row 1: the header must name {wanted}. {got}", REMEDY)
    if images_per_text is not None and len(images) != images_per_text:
        remedy = f"Give task.num_images={len(images)}, and a model that was not fine-tuned otherwise"
        raise file.error(f"row 1: {len(images)} image column(s), but {images_per_text} are asked for. {got}", remedy)
    taken = [number for name in dict.fromkeys(images) for number, one in enumerate(names) if one == name]
    places = {"images": taken, "text": [names.index(text[0])]}
    if answer:
        places["answer"] = [names.index(answer[0])]
    return places, answer[0] if answer else None


def _question(
    file: OfficialFile,
    row: int,
    cells: Sequence[str],
    names: Sequence[str],
    places: Mapping[str, Sequence[int]],
    answer_name: str | None,
) -> Question:
    def wrong(problem: str) -> Exception:
        return file.error(f"row {row}: {problem}", REMEDY)

    if len(cells) != len(names):
        raise wrong(f"{len(cells)} cells under {len(names)} names: a separator too many, or a quote missing")
    for name, numbers in places.items():
        for number in numbers:
            if not cells[number]:
                raise wrong(f"{names[number]} is empty" + (" (no answer to learn from)" * (name == "answer")))
    images = []
    for image in (cells[number] for number in places["images"]):
        parts = PurePosixPath(image.replace("\\", "/"))
        images.append(parts.as_posix())  # one image has one name: ./0.png is 0.png
        if not parts.parts or parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0] or "\0" in image:
            raise wrong(f"{shown(image)} leads out of the folder of images; it must be a path below it")
    answers: tuple[str, ...] = ()
    if answer_name is not None:
        answer = cells[places["answer"][0]]
        if answer_name == "truth" and answer.lower() not in TRUTHS:
            raise wrong(f"truth must be true or false. Got {shown(answer)}")
        answers = (TRUTHS[answer.lower()] if answer_name == "truth" else answer,)
    own = dict(zip(names, cells, strict=True))
    return Question(own.get("id") or str(row), cells[places["text"][0]], tuple(images), answers, own.get("type", ""))


def _prepared(file: OfficialFile) -> Iterator[Question]:
    """The rows as preparation writes them: JSON lines."""
    for place, value in json_lines(file):
        row = Row(file, place, value)
        images = row.list_of("images", str, "texts")
        answers = row.list_of("answers", str, "texts")
        yield Question(row.text("id"), row.text("text"), tuple(images), tuple(answers), row.text("type", default=""))
