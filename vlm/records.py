"""Official files record by record: gigabytes in little memory, and every defect one error with file and record."""

from __future__ import annotations

import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from vlm.errors import MissingFileError, UserError

CHUNK = 1 << 20  # characters read at a time
MAX_RECORD_CHARACTERS = 1 << 26  # the largest official records (scene graphs) stay below 1 MB
NEAR_END = 16  # characters: an error this close to the end of what was read may be a literal or escape that is cut
SPACES = re.compile(r"[ \t\n\r]*")
OTHER_FILE = "Is it another file?"

READING_ERRORS = (OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError)
"""What reading a file, or a member of a zip, can raise. RuntimeError: the member is encrypted."""

Kind = Literal["list", "object"]


@dataclass(frozen=True)
class OfficialFile:
    """A file in an official form, wherever it lies: in a folder or inside a zip."""

    name: str  # what errors call it
    open: Callable[[], io.BufferedIOBase]
    remedy: str = "Download or prepare it again"
    if_missing: str = "Prepare the task's data first"

    @classmethod
    def at(cls, path: Path) -> OfficialFile:
        return cls(str(path), lambda: path.open("rb"))

    @classmethod
    def given(cls, path: Path) -> OfficialFile:
        """A file that the user names, of a release or of their own making."""
        missing = "Give the path of the file as it was downloaded and unpacked"
        return cls(str(path), lambda: path.open("rb"), "Download or write it again", missing)

    def error(self, problem: str, remedy: str | None = None) -> UserError:
        return UserError(f"{self.name}: {problem}. {remedy or self.remedy}")

    @contextmanager
    def binary(self) -> Iterator[io.BufferedIOBase]:
        """The open file; whatever stops it from being read is one clear error."""
        try:
            with self.open() as binary:
                yield binary
        except FileNotFoundError:
            raise MissingFileError(f"{self.name}: no such file. {self.if_missing}") from None
        except UnicodeDecodeError as error:
            raise self.error(f"not UTF-8 text ({error.reason} at byte {error.start} of a block)") from None
        except READING_ERRORS as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise self.error(f"cannot be read ({reason})") from None

    @contextmanager
    def text(self) -> Iterator[io.TextIOWrapper]:
        """The open file as UTF-8, with or without a byte order mark; only line feeds part its lines."""
        with (
            self.binary() as binary,
            io.TextIOWrapper(cast(Any, binary), encoding="utf-8-sig", newline="\n") as text,
        ):
            yield text


def records(
    file: OfficialFile, kind: Kind, under: str | None = None, foreign: Mapping[str, Collection[str]] | None = None
) -> Iterator[tuple[str, Any]]:
    """The place and content of each record of a JSON file, in order; one is in memory at a time.

    A list gives ("record 1", content) and so on, an object (its key, content). `under`: the list or object that holds
    the records is the value of this key of the object at the top. `foreign`: further keys at the top, each with the
    values by which another file gives itself away. A file that is missing, cut off, not JSON, of another form or with
    a key twice in one object is a `UserError` that names the last good record.
    """
    with file.text() as text:
        yield from _Reader(file, text).records(kind, under, foreign or {})


def lines(file: OfficialFile) -> Iterator[tuple[str, str]]:
    """The place ("line 1" and so on) and the text of each line, without space around it. Only the end may be empty."""
    with file.text() as text:
        empty = 0
        for number, line in enumerate(text, start=1):
            if line := line.strip():
                if empty:
                    raise file.error(f"line {empty} is empty")
                yield f"line {number}", line
            else:
                empty = empty or number


def json_lines(file: OfficialFile) -> Iterator[tuple[str, Any]]:
    """The place and content of each line of a file with one JSON value a line."""
    for place, line in lines(file):
        try:
            yield place, json.loads(line, object_pairs_hook=_no_repeats)
        except (ValueError, RecursionError) as error:
            raise file.error(f"{place}: not valid JSON ({error}), or the file is cut off") from None


class Row:
    """One record of an official file, an object. A field that is missing or of another type is an error."""

    __slots__ = ("content", "file", "place")

    def __init__(self, file: OfficialFile, place: str, content: Any) -> None:
        self.file, self.place = file, place  # as errors name them
        if not isinstance(content, dict):
            raise self.error(f"must be an object. Got {shown(content)}")
        self.content: dict[str, Any] = content

    def error(self, problem: str, remedy: str | None = None) -> UserError:
        return self.file.error(f"{self.place}: {problem}", remedy)

    def wrong(self, name: str, expected: str) -> UserError:
        if name not in self.content:
            return self.error(f"has no {shown(name)}; expected {expected}")
        return self.error(f"{shown(name)} must be {expected}. Got {shown(self.content[name])}")

    def raw_text(self, name: str) -> str:
        """The text under `name` as it stands, be it with half a character, which JSON can hold and UTF-8 cannot."""
        value = self.content.get(name)
        if type(value) is not str:
            raise self.wrong(name, "text")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """The text under `name`; `default` where there is none, if one is given."""
        if default is not None and self.content.get(name) is None:
            return default
        value = self.raw_text(name)
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise self.error(f"{shown(name)} holds half a character. Got {shown(value)}") from None
        return value

    def whole(self, name: str, below: int | None = None) -> int:
        """The whole number under `name`; with `below` one that is at least 0."""
        value = self.content.get(name)
        if type(value) is not int or (below is not None and not 0 <= value < below):  # True is no number here
            raise self.wrong(name, "a whole number" if below is None else f"a whole number from 0 to below {below}")
        return value

    def number(self, name: str) -> float:
        """The number under `name`, of a size that a picture can have."""
        value = self.content.get(name)
        if type(value) not in (int, float) or not -1e9 < value < 1e9:  # type: ignore[operator]  # an int or a float
            raise self.wrong(name, "a number")
        return float(value)  # type: ignore[arg-type]  # an int or a float

    def identifier(self, name: str) -> str:
        """The text or whole number under `name`, as text."""
        value = self.content.get(name)
        return str(value) if type(value) is int else self.text(name)

    def list_of(self, name: str, kind: type, noun: str) -> Sequence[Any]:
        value = self.content.get(name)
        if type(value) is not list or not set(map(type, value)) <= {kind}:
            raise self.wrong(name, f"a list of {noun}")
        return value

    def inside(self, name: str) -> Row:
        """The object that a field holds."""
        value = self.content.get(name)
        if type(value) is not dict:
            raise self.wrong(name, "an object")
        return Row(self.file, f"{self.place}, {name}", value)


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
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # add gives None
        raise _Repeated(f"the key {shown(key)} stands twice in one object")
    return content


class _Reader:
    """Walks through one JSON text and keeps only the record that it is at."""

    def __init__(self, file: OfficialFile, text: io.TextIOWrapper) -> None:
        self.file, self.text = file, text
        self.buffer, self.at, self.ended = "", 0, False
        self.decode = json.JSONDecoder(object_pairs_hook=_no_repeats).raw_decode
        self.place = "the start"  # what errors name

    def records(
        self, kind: Kind, under: str | None, foreign: Mapping[str, Collection[str]]
    ) -> Iterator[tuple[str, Any]]:
        if under is None:
            yield from self.sequence(kind, "the file")
        else:
            if self.peek() != "{":
                self.fail(f"expected an object with {shown(under)} at the top", OTHER_FILE)
            found = False
            for key in self.keys("the file"):
                if key in foreign:
                    value = self.value()
                    if isinstance(value, str) and value in foreign[key]:
                        raise self.file.error(f"{shown(key)} is {shown(value)}", OTHER_FILE)
                elif key != under:
                    self.skip()
                elif found:
                    raise self.file.error(f"{shown(key)} stands twice")
                else:
                    found = True
                    yield from self.sequence(kind, shown(under))
                self.place = f"the entry {shown(key)}"
            if not found:
                raise self.file.error(f"has no {shown(under)}", OTHER_FILE)
        if self.peek():
            self.fail("more text after the end")

    def sequence(self, kind: Kind, what: str) -> Iterator[tuple[str, Any]]:
        opening, noun = ("[", "a list") if kind == "list" else ("{", "an object")
        if self.peek() != opening:
            if not self.peek():
                self.cut_off()
            raise self.file.error(f"expected {what} to hold {noun} of records", OTHER_FILE)
        if kind == "object":
            seen: set[str] = set()
            for key in self.keys(what):
                if key in seen:
                    raise self.file.error(f"{shown(key)} stands twice")
                seen.add(key)
                yield key, self.value()
                self.place = f'record "{key[:80]}"'
            return
        for number, value in enumerate(self.elements(), start=1):
            self.place = f"record {number}"
            yield self.place, value

    def elements(self) -> Iterator[Any]:
        """The elements of the list that begins here."""
        self.take("[")
        if self.peek() != "]":
            yield self.value()
            while self.peek() != "]":
                self.take(",")
                if self.peek() == "]":
                    self.fail("a comma, and no value after it")
                yield self.value()
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
            self.at = SPACES.match(self.buffer, self.at).end()  # type: ignore[union-attr]  # it always matches
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
        while True:
            try:
                value, end = self.decode(self.buffer, self.at)
                # Of "10.5" a buffer may end behind "10.", and then 10 is not the number.
                is_whole = end + len("e+") < len(self.buffer) or self.buffer[end : end + 1] not in (*".eE", "")
                if is_whole or self.ended:
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.buffer) - NEAR_END or error.msg.startswith("Unterminated string")
                if cut and self.ended:
                    self.cut_off(f" ({error.msg})")
                if not cut or len(self.buffer) - self.at > MAX_RECORD_CHARACTERS:
                    self.fail(f"not valid JSON ({error.msg})")
            except (
                ValueError,
                RecursionError,
            ) as error:  # a repeated key, a number of thousands of digits, a deep nest
                self.fail(str(error))
            self.more()

    def skip(self) -> None:
        """Past the value that begins here; of a list, one element is in memory at a time."""
        if self.peek() != "[":
            self.value()
        else:
            for _ in self.elements():
                pass

    def more(self) -> None:
        """Read on: as much again as is left, so that a long value costs no more than twice its length."""
        left = self.buffer[self.at :]
        read = self.text.read(max(CHUNK, len(left)))
        self.buffer, self.at, self.ended = left + read, 0, not read

    def cut_off(self, detail: str = "") -> NoReturn:
        self.fail(f"the file is cut off{detail}")

    def fail(self, problem: str, remedy: str | None = None) -> NoReturn:
        raise self.file.error(f"after {self.place}: {problem}", remedy)
