"""The official questions and annotations of VQAv2."""

from __future__ import annotations

from pathlib import Path
from sys import intern

from vlm.metrics.vqav2 import Annotation
from vlm.records import OfficialFile, Row, records, shown
from vlm.scoring.fields import Presence

SAME_SPLIT = "Give both files of one split"


def read_annotations(annotations: Path, questions: Path) -> tuple[dict[int, Annotation], dict[str, str]]:
    """The annotated questions of a split, and what cannot be scored because the release lacks a field.

    The two files must hold the same questions. Images are those of the questions file; annotations may leave them out.
    """
    asked, annotated = OfficialFile.given(questions), OfficialFile.given(annotations)
    images: dict[int, int] = {}
    for place, content in records(asked, "list", "questions"):
        row = Row(asked, place, content)
        key = row.whole("question_id")
        if key in images:
            raise row.error(f"question_id {key} stands twice")
        images[key] = row.whole("image_id")
    read: dict[int, Annotation] = {}
    presence = Presence(annotations)
    for place, content in records(annotated, "list", "annotations"):
        row = Row(annotated, place, content)
        key = row.whole("question_id")
        if key in read:
            raise row.error(f"question_id {key} stands twice")
        if key not in images:
            raise row.error(f"question {key} is not in {questions}", SAME_SPLIT)
        if "image_id" in content and content["image_id"] != images[key]:
            image = shown(content["image_id"])
            raise row.error(f"image_id is {image}, but {images[key]} for question {key} of {questions}", SAME_SPLIT)
        try:
            answers = tuple([intern(answer["answer"]) for answer in content["answers"]])
        except (KeyError, TypeError):
            answers = ()
        if not answers:
            raise row.wrong("answers", 'a list of {"answer": text}, with at least one')
        types = [
            intern(row.raw_text(name)) if presence.of(name, place, content, name) else None
            for name in ("question_type", "answer_type")
        ]
        read[key] = Annotation(images[key], answers, *types)
    missing = next((key for key in images if key not in read), None)
    if missing is not None:
        raise annotated.error(f"no annotation for question {missing} of {questions}", SAME_SPLIT)
    if not read:
        raise annotated.error("holds no annotation")
    lacking = {
        f"per_{name}": f"the annotations carry no {name}"
        for name in ("answer_type", "question_type")
        if presence.lacks(name)
    }
    return read, lacking
