"""The official JSON lines of NLVR2."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from vlm.metrics.nlvr2 import IDENTIFIER
from vlm.records import OfficialFile, Row, json_lines, shown


def read_labels(path: Path, among: Collection[str] | None = None) -> dict[str, str]:
    """The label, True or False, of each identifier. `among`: the split that a subset must be of."""
    file = OfficialFile.given(path)
    labels: dict[str, str] = {}
    for place, content in json_lines(file):
        row = Row(file, place, content)
        key, label = row.raw_text("identifier"), row.raw_text("label")
        if IDENTIFIER.fullmatch(key) is None:
            raise row.wrong("identifier", "split-set-pair-sentence")
        if label.lower() not in ("true", "false"):
            raise row.wrong("label", "True or False")
        if key in labels:
            raise row.error(f"identifier {shown(key)} stands twice")
        if among is not None and key not in among:
            raise row.error(f"{shown(key)} is not in the split that is scored", "Give the subset of the same split")
        labels[key] = label
    if not labels:
        raise file.error("holds no pair")
    return labels
