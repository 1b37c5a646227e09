"""Fields that a release may lack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.errors import UserError


class Presence:
    """Fields that a release may lack altogether, but not in some records only: then a score would be over a part."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.first: dict[str, tuple[str, bool]] = {}  # field -> the first record and whether it has the field

    def of(self, field: str, place: str, holder: Mapping[str, Any], name: str) -> bool:
        """Whether this record has the field; an error where another one differs."""
        there = name in holder
        first = self.first.get(field)
        if first is None:
            self.first[field] = place, there
        elif first[1] is not there:
            lacking, having = (place, first[0]) if first[1] else (first[0], place)
            raise UserError(f"{self.file}: {lacking}: has no {field!r}, while {having} has one. Complete the file")
        return there

    def lacks(self, field: str) -> bool:
        return not self.first.get(field, ("", False))[1]
