"""Typed access to the fields of a record. A field that is missing or of another type is one error that names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.scoring.records import shown


class Record:
    """One record of an official file, and where it stands."""

    __slots__ = ("content", "file", "place")

    def __init__(self, file: Path, place: str, content: Any) -> None:
        self.file, self.place = file, place
        if not isinstance(content, dict):
            self.refuse(f"expected an object, got {shown(content)}")
        self.content: dict[str, Any] = content

    def refuse(self, message: str) -> None:
        raise UserError(f"{self.file}: {self.place}: {message}")

    def text(self, name: str) -> str:
        value = self.content.get(name)
        if type(value) is not str:
            self.wrong(name, "text")
        return value  # type: ignore[return-value]

    def whole(self, name: str) -> int:
        value = self.content.get(name)
        if type(value) is not int:  # True is no number here
            self.wrong(name, "a whole number")
        return value  # type: ignore[return-value]

    def list_of(self, name: str, kind: type, noun: str) -> Sequence[Any]:
        value = self.content.get(name)
        if type(value) is not list or not set(map(type, value)) <= {kind}:
            self.wrong(name, f"a list of {noun}")
        return value  # type: ignore[return-value]

    def inside(self, name: str) -> Record:
        """The object that a field holds."""
        value = self.content.get(name)
        if type(value) is not dict:
            self.wrong(name, "an object")
        return Record(self.file, f"{self.place}, {name}", value)

    def wrong(self, name: str, expected: str) -> None:
        if name not in self.content:
            self.refuse(f"has no {shown(name)}; expected {expected}")
        self.refuse(f"{shown(name)} must be {expected}. Got {shown(self.content[name])}")


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
