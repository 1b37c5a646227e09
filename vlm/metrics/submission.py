"""What must hold before predictions are scored or leave the house: one of the right type for each id, no other."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from vlm.errors import UserError

Id = TypeVar("Id", bound=Hashable)
Answer = TypeVar("Answer")


def check_submission(
    file: Path, ids: Iterable[str], predictions: Mapping[str, object], allowed: Collection[str] | None = None
) -> None:
    """Refuse to write `file` unless the predictions are texts, one for each id of the split, each id once.

    `allowed`: the only answers that there are.
    """
    expected: set[str] = set()
    for key in ids:
        if key in expected:
            raise UserError(f"{file}: not written: question {key} stands twice in its split")
        expected.add(key)
        if key not in predictions:
            raise UserError(f"{file}: not written: question {key}: no prediction among {len(predictions)}")
        answer = predictions[key]
        if not isinstance(answer, str):
            raise UserError(f"{file}: not written: question {key}: the answer must be text. Got {answer!r}")
        if allowed is not None and answer not in allowed:
            raise UserError(f"{file}: not written: {key}: must be one of {', '.join(allowed)}. Got {answer!r}")
    if not expected:
        raise UserError(f"{file}: not written: the split holds no question")
    unknown = next((key for key in predictions if key not in expected), None)
    if unknown is not None:
        raise UserError(f"{file}: not written: question {unknown} is not one of the {len(expected)} of its split")


def merge_predictions(parts: Iterable[Mapping[Id, Answer] | None]) -> dict[Id, Answer]:
    """The predictions of all ranks as one; an id that several ranks answered alike counts once.

    Two different answers to one question are an error: whichever was scored, the number would depend on the ranks.
    """
    merged: dict[Id, Answer] = {}
    for rank, part in enumerate(parts):
        for key, answer in (part or {}).items():
            if merged.setdefault(key, answer) != answer:
                raise UserError(
                    f"question {key}: rank {rank} predicts {answer!r}, an earlier rank {merged[key]!r}. "
                    "Each question belongs to one rank, or all ranks must compute alike"
                )
    return merged
