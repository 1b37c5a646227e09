"""The official JSON lines of NLVR2."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from vlm.errors import UserError
from vlm.scoring.fields import Record
from vlm.scoring.predictions import read_lines
from vlm.scoring.records import shown


def read_labels(file: Path, among: Collection[str] | None = None) -> dict[str, str]:
    """The label, True or False, of each identifier. `among`: the split that a subset must be of."""
    labels: dict[str, str] = {}
    for number, line in enumerate(read_lines(file), start=1):
        place = f"line {number}"
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file}: {place}: not valid JSON ({error}). Each line is one pair; is the file cut off?"
            ) from None
        record = Record(file, place, content)
        key, label = record.text("identifier"), record.text("label")
        if len(key.split("-")) != 4:
            record.refuse(f"the identifier must be split-set-pair-sentence. Got {shown(key)}")
        if label.lower() not in ("true", "false"):
            record.wrong("label", "True or False")
        if key in labels:
            record.refuse(f"identifier {shown(key)} stands twice")
        if among is not None and key not in among:
            record.refuse(f"{shown(key)} is not in the split that is scored. Give the subset of the same split")
        labels[key] = label
    if not labels:
        raise UserError(f"{file}: holds no pair. Download it again")
    return labels
