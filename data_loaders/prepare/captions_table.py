"""The tables of Conceptual Captions, and the images that users have downloaded by them.

A table has one row an image: `caption TAB url`, and in the Image Labels subset `TAB labels TAB MIDs TAB scores`, comma
lists with the best first. Quotes are literal and there is no header, but one that `img2dataset` was given
(`caption TAB url`) is passed over. An example's key is a hash of its url, so that it is the same for everyone who
downloads, whichever links were alive; captions of one url in several rows belong to one example.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_loaders.decoding import ImageError
from data_loaders.prepare.originals import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    Originals,
    Problem,
    Report,
    groups,
    numbered_images,
)
from data_loaders.prepare.pieces import Location, Piece, drawn_split
from vlm.errors import UserError
from vlm.records import OfficialFile, shown

MAX_LINE_CHARACTERS = 1 << 20
ROWS_AT_ONCE = 1 << 16  # whose images are in memory together
REMEDY = "Download the file again; its lines must be as its authors wrote them"
LABELLED_COLUMNS = ("caption", "url", "labels", "MIDs", "scores")


def url_key(url: str) -> str:
    """The key of the image at a url: 128 bits of its SHA-256, as hexadecimal digits."""
    return hashlib.sha256(url.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class TableRow:
    number: int  # from 0, a header not counted
    caption: str
    url: str
    labels: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()


def table_rows(file: OfficialFile, labelled: bool) -> Iterator[TableRow]:
    """The rows of a table, one in memory at a time. A malformed one is an error that names its line."""
    columns = LABELLED_COLUMNS if labelled else LABELLED_COLUMNS[:2]
    number = -1
    with file.text() as text:
        line_number = 0
        while line := text.readline(MAX_LINE_CHARACTERS):
            line_number += 1
            place = f"line {line_number}"
            if not line.endswith("\n") and len(line) == MAX_LINE_CHARACTERS:
                raise file.error(f"{place}: longer than {MAX_LINE_CHARACTERS:,} characters", REMEDY)
            values = line.rstrip("\r\n").split("\t")
            if line_number == 1 and tuple(values[:2]) == ("caption", "url"):
                continue
            if len(values) != len(columns):
                expected = " TAB ".join(columns)
                raise file.error(
                    f"{place}: expected {expected}. Got {len(values)} columns: {shown(line[:200])}", REMEDY
                )
            caption, url = values[0].strip(), values[1].strip()
            if not url:
                raise file.error(f"{place}: has no url", REMEDY)
            number += 1
            labels, scores = _labels(file, place, *values[2:]) if labelled else ((), ())
            yield TableRow(number, caption, url, labels, scores)


def _labels(
    file: OfficialFile, place: str, names: str, mids: str, scores: str
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Distinct labels with their scores, best first. MIDs (Google's names of things) are checked and left out."""
    parts = [[entry.strip() for entry in text.split(",")] if text.strip() else [] for text in (names, mids, scores)]
    if len({len(part) for part in parts}) != 1:
        lengths = ", ".join(f"{len(part)} {name}" for part, name in zip(parts, LABELLED_COLUMNS[2:], strict=True))
        raise file.error(f"{place}: labels, MIDs and scores must be as many. Got {lengths}", REMEDY)
    best: dict[str, float] = {}
    for name, score in zip(parts[0], parts[2], strict=True):
        try:
            value = float(score)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1 or not name:
            raise file.error(
                f"{place}: a label needs a name and a score from 0 to 1. Got {shown([name, score])}", REMEDY
            )
        best[name] = max(value, best.get(name, 0.0))
    ordered = sorted(best.items(), key=lambda entry: -entry[1])  # stable, and they are sorted already as a rule
    return tuple(name for name, _ in ordered), tuple(value for _, value in ordered)


# --- Scans -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableScan:
    """One table: its rows as pieces, with the images of numbered folders that were downloaded by it.

    `listed`: the rows are the examples that are wanted; otherwise they add to those that another table lists.
    """

    source: Path
    file: str
    split: str
    labelled: bool = False
    listed: bool = True
    captions: bool = True
    numbered: tuple[str, ...] = ()  # folders whose images are named after the rows of this table
    first_row: int = 0  # the number of its first row in those names
    validation_fraction: float = 0.0  # of the examples, by the hash of their key, that go to validation instead

    @property
    def inputs(self) -> Sequence[Path]:
        return [self.source / name for name in (self.file, *self.numbered)]

    def pieces(self, report: Report, scratch: Path) -> Iterator[Piece]:
        file = OfficialFile(str(self.source / self.file), lambda: (self.source / self.file).open("rb"), REMEDY)
        images = _NumberedImages(self, report, scratch)
        number = -1
        for row in table_rows(file, self.labelled):
            number = row.number
            places = images.of(row)
            captions = (row.caption,) if row.caption and self.captions else ()
            first = places[0] if places else None
            key = url_key(row.url)
            split = drawn_split(key, self.validation_fraction, self.split) if self.listed else ""
            yield Piece(key, split, self.listed, row.url, first, captions, row.labels, row.scores)
            yield from (Piece(key, split, image=place) for place in places[1:])
        images.refuse_those_beyond(number + 1)


class _NumberedImages:
    """The images of numbered folders by row, a range of rows in memory at a time."""

    def __init__(self, scan: TableScan, report: Report, scratch: Path) -> None:
        self.scan, self.report, self.scratch = scan, report, scratch
        self.range, self.images = -1, dict[int, list[tuple[str, str]]]()
        self.largest, self.example = -1, ""
        waiting: dict[int, list[str]] = {}
        count = 0
        for folder in scan.numbered:
            for number, checksum, file in numbered_images(scan.source, folder, report):
                row = number - scan.first_row
                if row > self.largest:
                    self.largest, self.example = row, file
                if row < 0:
                    report(Problem(file, "", "numbered below the first row"))
                    continue
                waiting.setdefault(row // ROWS_AT_ONCE, []).append(json.dumps([row, checksum, file]) + "\n")
                count += 1
                if count % (1 << 17) == 0:
                    self._spill(waiting)
        self._spill(waiting)

    def _spill(self, waiting: dict[int, list[str]]) -> None:
        for number, lines in waiting.items():
            with (self.scratch / f"rows-{number}").open("a") as file:
                file.writelines(lines)
        waiting.clear()

    def of(self, row: TableRow) -> list[Location]:
        """The images of a row; one whose name holds the checksum of another url is not."""
        if not self.scan.numbered:
            return []
        number = row.number // ROWS_AT_ONCE
        if number != self.range:
            self.range, self.images = number, {}
            file = self.scratch / f"rows-{number}"
            if file.exists():
                with file.open() as lines:
                    for line in lines:
                        found, checksum, name = json.loads(line)
                        self.images.setdefault(found, []).append((checksum, name))
        places = []
        for checksum, name in sorted(self.images.get(row.number, []), key=lambda entry: entry[1]):
            if checksum and int(checksum) != zlib.crc32(row.url.encode()):
                self.report(Problem(name, "", "named after another url than its row has"))
            else:
                places.append(Location(name))
        return places

    def refuse_those_beyond(self, rows: int) -> None:
        if self.largest >= rows:
            raise UserError(
                f"{self.scan.source / self.example}: its number is beyond the {rows:,} rows of {self.scan.file}, which "
                f"are numbered from {self.scan.first_row}. Is the folder of another split, or do the numbers begin "
                "with 1 (first_row=1)?"
            )


@dataclass(frozen=True)
class DownloadScan:
    """Images that `img2dataset` has downloaded, in its folders or tars; the json beside each one says its url."""

    source: Path
    folders: tuple[str, ...] = ()
    tars: tuple[str, ...] = ()

    @property
    def inputs(self) -> Sequence[Path]:
        return [self.source / name for name in (*self.folders, *self.tars)]

    def pieces(self, report: Report, scratch: Path) -> Iterator[Piece]:
        with closing(Originals(self.source)) as originals:
            for group in groups(self.source, self.folders, self.tars, report):
                image = next((place for suffix, place in group.items() if suffix in IMAGE_SUFFIXES), None)
                if image is not None and (url := _url(group.get(".json"), image, originals, report)):
                    yield Piece(url_key(url), image=image)


def _url(place: Location | None, image: Location, originals: Originals, report: Report) -> str:
    """The url in a file that `img2dataset` writes beside each image; empty, and reported, where there is none."""
    if place is None:
        report(Problem(image.file, image.member, "no json with its url beside it"))
        return ""
    try:
        value: Any = json.loads(originals.read(place, MAX_TEXT_BYTES))
        url = value["url"]
        if type(url) is str and url:
            return url.strip()
    except (ImageError, ValueError, KeyError, TypeError, RecursionError):
        pass
    report(Problem(place.file, place.member, "no url in it"))
    return ""


SPLIT_NAME = re.compile(r"(train)|(val)", re.IGNORECASE)


def split_of_folder(parts: Sequence[str]) -> str:
    """`train` or `validation` as the topmost folder that names one says; empty where none does."""
    found = next((match for part in parts if (match := SPLIT_NAME.search(part))), None)
    return "" if found is None else "train" if found[1] else "validation"
