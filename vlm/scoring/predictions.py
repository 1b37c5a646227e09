"""Prediction files in the official forms, and whether they answer the questions of the split."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from vlm.errors import UserError
from vlm.metrics.nlvr2 import IDENTIFIER
from vlm.records import OfficialFile, Row, lines, records, shown

Id = TypeVar("Id", bound=Hashable)


def read_vqav2_results(path: Path) -> dict[int, str]:
    """The results format of VQAv2: a list of {"question_id": whole number, "answer": text}."""
    predictions: dict[int, str] = {}
    for row in _rows(path):
        _add(row, predictions, row.whole("question_id"), row.raw_text("answer"))
    return predictions


def read_gqa_predictions(path: Path) -> dict[str, str]:
    """The predictions format of GQA: a list of {"questionId": text, "prediction": text}."""
    predictions: dict[str, str] = {}
    for row in _rows(path):
        _add(row, predictions, row.raw_text("questionId"), row.raw_text("prediction"))
    return predictions


def read_nlvr2_predictions(path: Path) -> dict[str, str]:
    """The predictions format of NLVR2: lines of identifier,prediction without a header; True or False in any case."""
    file = OfficialFile.given(path)
    predictions: dict[str, str] = {}
    for place, line in lines(file):
        row = Row(file, place, {})
        parts = line.split(",")
        if len(parts) != 2:
            raise row.error(f"expected identifier,prediction. Got {shown(line)}")
        if IDENTIFIER.fullmatch(parts[0]) is None:
            raise row.error(
                f"the identifier must be split-set-pair-sentence, without a header above. Got {shown(parts[0])}"
            )
        if parts[1].lower() not in ("true", "false"):
            problem = "the prediction must be True or False, and the file has no header"
            raise row.error(f"{problem}. Got {shown(parts[1])}")
        _add(row, predictions, *parts)
    return predictions


def complete(
    file: Path,
    predictions: Mapping[Id, str],
    needed: Collection[Id],
    known: Collection[Id],
    questions_file: Path,
    allow_missing: bool,
) -> tuple[dict[Id, str | None], int]:
    """The predictions with None for each missing one, and how many those are.

    `needed` are the ids that must be answered, `known` those that may be, both in the order of `questions_file`. An
    unknown id is an error, and without `allow_missing` a missing one too.
    """
    unknown = [key for key in predictions if key not in known]
    if unknown and len(unknown) == len(predictions):
        raise UserError(
            f"{file}: question {shown(unknown[0])} and all others are not in {questions_file}: "
            "the files are of different splits, or of balanced and of all questions"
        )
    if unknown:
        raise UserError(
            f"{file}: question {shown(unknown[0])} is not in {questions_file} (nor are {len(unknown) - 1} others). "
            "Give the questions that were predicted: of the same split, and all of them where all were (GQA: "
            "--all-questions)"
        )
    missing = [key for key in needed if key not in predictions]
    if missing and not allow_missing:
        raise UserError(
            f"{file}: no prediction for question {shown(missing[0])} of {questions_file} "
            f"({len(missing)} of {len(needed)} missing). Predict them, or score them as wrong with --allow-missing"
        )
    whole: dict[Id, str | None] = dict(predictions)
    whole.update(dict.fromkeys(missing))
    return whole, len(missing)


def _rows(path: Path) -> Iterator[Row]:
    file = OfficialFile.given(path)
    return (Row(file, place, content) for place, content in records(file, "list"))


def _add(row: Row, predictions: dict[Id, str], key: Id, answer: str) -> None:
    if key in predictions:
        raise row.error(f"a second prediction for question {shown(key)}", "Keep one for each question")
    predictions[key] = answer
