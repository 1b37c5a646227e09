"""Large JSON files record by record: a file of gigabytes in little memory, and each defect named by its record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO

from vlm.errors import UserError

CHUNK = 1 << 20  # characters read at a time
SPACES = re.compile(r"[ \t\n\r]*")
NEAR_END = 16  # characters: an error this close to the end of what was read may be a literal or escape that is cut

Kind = Literal["list", "object"]


def records(file: Path, kind: Kind, under: str | None = None, unique_keys: bool = False) -> Iterator[tuple[str, Any]]:
    """The place and content of each record of a JSON file, in order.

    A list gives ("record 1", content) and so on, an object (its key, content). `under`: the list or object that holds
    the records is the value of this key of the object at the top. `unique_keys`: look for keys that stand twice inside
    a record, too, which takes half as long again; among the keys of `kind` "object" they are always looked for. A file
    that is missing, cut off, not JSON or of another form is a `UserError` that names the last good record.
    """
    try:
        with file.open(encoding="utf-8-sig") as text:
            yield from _Reader(file, text, unique_keys).records(kind, under)
    except OSError as error:
        raise UserError(f"{file}: {unreadable(error)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start} of a block)") from None


def unreadable(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file. Give the path of the file as it was downloaded and unpacked"
    return f"cannot be read ({error.strerror})"


def shown(value: Any) -> str:
    """A value as an error quotes it: on one line, printable, and not long."""
    try:
        text = json.dumps(value, default=repr)
    except RecursionError:
        return "a value that is nested too deeply"
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Repeated(ValueError):
    """One key twice in one object."""


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Repeated(f"the key {shown(key)} stands twice in one object")
    return content


class _Reader:
    """Walks through one JSON text and keeps only the record that it is at."""

    def __init__(self, file: Path, text: TextIO, unique_keys: bool) -> None:
        self.file, self.text = file, text
        self.buffer, self.at, self.ended = "", 0, False
        self.decode = json.JSONDecoder(object_pairs_hook=_no_repeats if unique_keys else None).raw_decode
        self.place = "the start"  # what errors name

    def records(self, kind: Kind, under: str | None) -> Iterator[tuple[str, Any]]:
        if under is None:
            yield from self.sequence(kind, "the file")
        else:
            if self.peek() != "{":
                self.fail(f"expected an object with {shown(under)} at the top. Is it another file of the release?")
            found = False
            for key in self.keys("the file"):
                if key == under:
                    found = True
                    yield from self.sequence(kind, shown(under))
                else:
                    self.value()
                self.place = f"the entry {shown(key)}"
            if not found:
                self.fail(f"has no {shown(under)}. Is it another file of the release?", "")
        if self.peek():
            self.fail("more text after the end")

    def sequence(self, kind: Kind, what: str) -> Iterator[tuple[str, Any]]:
        opening, noun = ("[", "a list") if kind == "list" else ("{", "an object")
        if self.peek() != opening:
            if not self.peek():
                self.cut_off()
            self.fail(f"expected {what} to hold {noun} of records. Is it another file of the release?", "")
        if kind == "object":
            seen: set[str] = set()
            for key in self.keys(what):
                if key in seen:
                    self.fail(f"{shown(key)} stands twice", "")
                seen.add(key)
                yield key, self.value()
                self.place = f'record "{key}"'
            return
        self.take("[")
        number = 0
        while self.peek() != "]" or number:
            number += 1
            value = self.value()
            self.place = f"record {number}"
            yield self.place, value
            if self.peek() == "]":
                break
            self.take(",")
        self.take("]")

    def keys(self, what: str) -> Iterator[str]:
        """The keys of the object that begins here; whoever asks reads each value before the next key."""
        self.take("{")
        first = True
        while self.peek() != "}" or not first:
            first = False
            if self.peek() not in ('"', ""):
                self.fail(f"expected a key of {what}")
            key = self.value()
            self.take(":")
            yield key
            if self.peek() == "}":
                break
            self.take(",")
        self.take("}")

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self.at = SPACES.match(self.buffer, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if self.ended:
                return ""
            self.more()

    def take(self, character: str) -> None:
        found = self.peek()
        if not found:
            self.cut_off()
        if found != character:
            self.fail(f"expected {shown(character)}, got {shown(found)}")
        self.at += 1

    def value(self) -> Any:
        """The value that begins here. What was read is tried; only where it may be cut is more read."""
        if not self.peek():
            self.cut_off()
        chunk = CHUNK
        while True:
            try:
                value, end = self.decode(self.buffer, self.at)
                if end < len(self.buffer) or self.ended:
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.buffer) - NEAR_END or error.msg.startswith("Unterminated string")
                if cut and self.ended:
                    self.cut_off(f" ({error.msg})")
                if not cut:
                    self.fail(f"not valid JSON ({error.msg})")
            except (
                ValueError,
                RecursionError,
            ) as error:  # a repeated key, a number of thousands of digits, a deep nest
                self.fail(str(error))
            self.more(chunk)
            chunk *= 2

    def more(self, size: int = CHUNK) -> None:
        read = self.text.read(size)
        self.buffer, self.at, self.ended = self.buffer[self.at :] + read, 0, not read

    def cut_off(self, detail: str = "") -> NoReturn:
        self.fail(f"the file is cut off{detail}. Download or write it again")

    def fail(self, message: str, place: str | None = None) -> NoReturn:
        where = f"after {self.place}: " if place is None else place
        raise UserError(f"{self.file}: {where}{message}")
