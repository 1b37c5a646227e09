"""The official questions and annotations of VQAv2."""

from __future__ import annotations

from pathlib import Path
from sys import intern

from vlm.errors import UserError
from vlm.metrics.vqav2 import Annotation
from vlm.scoring.fields import Presence, Record
from vlm.scoring.records import records, shown


def read_annotations(annotations: Path, questions: Path) -> tuple[dict[int, Annotation], dict[str, str]]:
    """The annotated questions of a split, and what cannot be scored because the release lacks a field.

    The two files must hold the same questions. Images are those of the questions file; annotations may leave them out.
    """
    images: dict[int, int] = {}
    for place, content in records(questions, "list", "questions"):
        record = Record(questions, place, content)
        key = record.whole("question_id")
        if key in images:
            record.refuse(f"question_id {key} stands twice")
        images[key] = record.whole("image_id")
    read: dict[int, Annotation] = {}
    presence = Presence(annotations)
    for place, content in records(annotations, "list", "annotations"):
        record = Record(annotations, place, content)
        key = record.whole("question_id")
        if key in read:
            record.refuse(f"question_id {key} stands twice")
        if key not in images:
            record.refuse(f"question {key} is not in {questions}: the files are of different splits")
        if "image_id" in content and content["image_id"] != images[key]:
            record.refuse(
                f"image_id is {shown(content['image_id'])}, but {images[key]} for question {key} of {questions}"
            )
        try:
            answers = tuple([intern(answer["answer"]) for answer in content["answers"]])
        except (KeyError, TypeError):
            answers = ()
        if not answers:
            record.wrong("answers", 'a list of {"answer": text}, with at least one')
        types = [
            intern(record.text(name)) if presence.of(name, place, record.content, name) else None
            for name in ("question_type", "answer_type")
        ]
        read[key] = Annotation(images[key], answers, *types)
    missing = next((key for key in images if key not in read), None)
    if missing is not None:
        raise UserError(f"{annotations}: no annotation for question {missing} of {questions}. Give both of one split")
    if not read:
        raise UserError(f"{annotations}: holds no annotation. Download it again")
    lacking = {
        f"per_{name}": f"the annotations carry no {name}"
        for name in ("answer_type", "question_type")
        if presence.lacks(name)
    }
    return read, lacking
