"""Official files, read record by record: whatever is wrong with one is an error that names the file and the record."""

from __future__ import annotations

import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from vlm.errors import UserError

CHUNK_CHARACTERS = 1 << 20
MAX_RECORD_CHARACTERS = 1 << 26  # the largest official records (scene graphs) stay below 1 MB

READING_ERRORS = (OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError)
"""What reading a file, or a member of a zip, can raise. RuntimeError: the member is encrypted."""


class OfficialFileError(UserError):
    """An official file that is missing, broken or of another form. The message names it and the remedy."""


@dataclass(frozen=True)
class OfficialFile:
    """A file of a release, wherever it lies: in a folder or inside a zip."""

    name: str  # what errors call it
    open: Callable[[], io.BufferedIOBase]
    remedy: str = "Download or prepare it again"

    @classmethod
    def at(cls, path: Path) -> OfficialFile:
        return cls(str(path), lambda: path.open("rb"))

    def error(self, problem: str) -> OfficialFileError:
        return OfficialFileError(f"{self.name}: {problem}. {self.remedy}")

    @contextmanager
    def binary(self) -> Iterator[io.BufferedIOBase]:
        """The open file; whatever stops it from being read is one clear error."""
        try:
            with self.open() as binary:
                yield binary
        except FileNotFoundError:
            raise OfficialFileError(f"{self.name}: no such file. Prepare the task's data first") from None
        except UnicodeDecodeError as error:
            raise self.error(f"not UTF-8 text ({error})") from None
        except READING_ERRORS as error:
            raise self.error(f"cannot be read ({type(error).__name__}: {error})") from None

    @contextmanager
    def text(self) -> Iterator[io.TextIOWrapper]:
        """The open file as UTF-8."""
        with self.binary() as binary, io.TextIOWrapper(cast(Any, binary), encoding="utf-8") as text:
            yield text


def items(file: OfficialFile, name: str) -> Iterator[tuple[int, Any]]:
    """The items of the list under `name` in the file's one object, numbered from 1. One is in memory at a time."""
    with file.text() as text:
        scanner = _Scanner(file, text)
        found = False
        for key in scanner.names():
            if key != name:
                scanner.value()
                continue
            if found:
                raise file.error(f"holds {name!r} twice")
            found = True
            yield from enumerate(scanner.elements(name), start=1)
        scanner.finish()
        if not found:
            raise file.error(f"holds no list {name!r}")


def entries(file: OfficialFile) -> Iterator[tuple[str, Any]]:
    """The entries of the file's one object. One is in memory at a time; a name that occurs twice is an error."""
    seen = set()
    with file.text() as text:
        scanner = _Scanner(file, text)
        for key in scanner.names():
            if key in seen:
                raise file.error(f"holds {key!r} twice")
            seen.add(key)
            yield key, scanner.value()
        scanner.finish()


def lines(file: OfficialFile) -> Iterator[tuple[int, Any]]:
    """The values of a file with one JSON value a line, numbered from 1. Empty lines at the end are no values."""
    with file.text() as text:
        empty: int | None = None
        for number, line in enumerate(text, start=1):
            if not line.strip():
                empty = empty or number
                continue
            if empty is not None:
                raise file.error(f"line {empty} is empty")
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise file.error(f"line {number} is not valid JSON ({_short(error)})") from None


def read_list(file: OfficialFile) -> list[Any]:
    """The file's one list."""
    with file.text() as text:
        try:
            value = json.load(text)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise file.error(f"not valid JSON ({_short(error)})") from None
    if not isinstance(value, list):
        raise file.error(f"must be a list. Got {kind_of(value)}")
    return value


@dataclass(frozen=True, slots=True)
class Row:
    """One record of an official file. A field that is missing or of another type is an error that names the record."""

    file: OfficialFile
    record: str  # what errors call it
    fields: Any

    def error(self, problem: str) -> OfficialFileError:
        return self.file.error(f"{self.record}: {problem}")

    def get(self, name: str) -> Any:
        if not isinstance(self.fields, dict):
            raise self.error(f"must be an object. Got {kind_of(self.fields)}")
        return self.fields.get(name)

    def text(self, name: str, default: str | None = None) -> str:
        """The text under `name`; `default` where there is none, if one is given."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(f"{name!r} must be text. Got {kind_of(value)}")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise self.error(f"{name!r} holds half a character: {value!r}") from None
        return value

    def number(self, name: str, below: int) -> int:
        """The whole number under `name`, at least 0."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
            shown = value if isinstance(value, int) and abs(value) < 10**30 else kind_of(value)
            raise self.error(f"{name!r} must be a whole number from 0 to below {below}. Got {shown}")
        return value

    def list(self, name: str) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list):
            raise self.error(f"{name!r} must be a list. Got {kind_of(value)}")
        return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "nothing"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


class _Scanner:
    """Reads one JSON object from a stream, value by value; what was handed out is let go."""

    decode = json.JSONDecoder().raw_decode

    def __init__(self, file: OfficialFile, text: io.TextIOWrapper) -> None:
        self.file, self.stream = file, text
        self.buffer, self.at, self.ended = "", 0, False

    def names(self) -> Iterator[str]:
        """The names of the top-level object; after each, its value must be taken."""
        self._expect("{", "must hold one object")
        if self._peek() == "}":
            self.at += 1
            return
        while True:
            key = self.value()
            if not isinstance(key, str):
                raise self.file.error(f"not valid JSON (a name must be text. Got {kind_of(key)})")
            self._expect(":", f"not valid JSON (no ':' after {key[:40]!r})")
            yield key
            if self._separator("}"):
                return

    def elements(self, name: str) -> Iterator[Any]:
        """The elements of the list that begins here."""
        self._expect("[", f"{name!r} must be a list")
        if self._peek() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self._separator("]"):
                return

    def value(self) -> Any:
        """The value that begins here."""
        self._peek()
        while True:
            try:
                value, end = self.decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                left = len(self.buffer) - self.at
                # An error well before the end of what was read does not go away with more of it.
                final = error.pos < len(self.buffer) - 16 and not error.msg.startswith("Unterminated string")
                if self.ended or final or left > MAX_RECORD_CHARACTERS:
                    raise self.file.error(f"not valid JSON, or cut short ({error.msg})") from None
                self._more()
            except (ValueError, RecursionError) as error:
                raise self.file.error(f"not valid JSON ({_short(error)})") from None
            else:
                if end < len(self.buffer) or self.ended:  # a number may go on behind the buffer's end
                    self.at = end
                    return value
                self._more()

    def finish(self) -> None:
        if self._peek():
            raise self.file.error("goes on after its end")

    def _separator(self, closing: str) -> bool:
        """Past the comma, or past the end; True at the end."""
        character = self._peek()
        if character not in (",", closing) or not character:
            raise self.file.error("cut short" if not character else f"not valid JSON ({character!r} is out of place)")
        self.at += 1
        return character == closing

    def _expect(self, character: str, problem: str) -> None:
        if self._peek() != character:
            raise self.file.error(problem)
        self.at += 1

    def _peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in " \t\n\r":
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if self.ended:
                return ""
            self._more()

    def _more(self) -> None:
        """Read on: as much again as is left, so that a long value costs no more than twice its length."""
        left = self.buffer[self.at :]
        more = self.stream.read(max(CHUNK_CHARACTERS, len(left)))
        self.buffer, self.at, self.ended = left + more, 0, not more


def _short(error: BaseException) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
