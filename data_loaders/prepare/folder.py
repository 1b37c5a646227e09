"""Any images with texts, tags or classes, so that a new pair of modalities needs no Python. Three layouts:

- `layout=table`: a CSV, TSV or JSON-lines file with a row an image; `table.image`, `table.text`, `table.tags`,
  `table.scores`, `table.classes`, `table.split` and `table.key` name its columns. Tags, scores and classes are lists in
  one cell, parted by `table.separator`, or JSON lists. Several rows may be about one image;
- `layout=sidecars`: each image has a text file of the same name, one text a line, in folders or in WebDataset tars;
- `layout=class_folders`: the folder that directly holds an image is named after its class; `_` in the name counts as a
  space. Any folder above it may name the split.

A path that begins with `train`, `val` or `validation` decides the split, and so does `table.split`; otherwise the hash
of the key keeps `validation_fraction` for validation. A key is made of the image's path, unless `table.key` gives one;
rows of one key must be about one image.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field

from data_loaders.decoding import ImageError
from data_loaders.prepare.image_text import Check, ImageTextConfig, Options, Plan, Scan, chunks, prepare_image_text
from data_loaders.prepare.originals import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    Listing,
    Originals,
    Problem,
    Report,
    groups,
    listings,
    stem_and_suffix,
)
from data_loaders.prepare.pieces import Location, Piece, Pieces, drawn_split
from data_loaders.shards import KEY_PATTERN
from vlm.config import Config
from vlm.errors import UserError
from vlm.records import OfficialFile, json_lines, shown

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
}
LAYOUTS = {
    "table": "the rows of table.file",
    "sidecars": "a text beside each image",
    "class_folders": "folders named after classes",
}
REMEDY = "Mend the file"
MAX_KEY_LENGTH = 95  # with a suffix it is a name in a tar, which holds 100 letters


class TableConfig(Config):
    """The file, seen from the release's folder, and its columns. A column that is not named is not read."""

    file: Path | None = None  # the table; None: another layout
    image: str = "image"  # a path seen from the table's folder
    text: str | None = None  # one text, or a JSON list of texts
    tags: str | None = None  # labels that a machine gave
    scores: str | None = None  # in [0, 1], one a tag
    classes: str | None = None  # true classes
    split: str | None = None  # train or validation
    key: str | None = None  # a name of the image; None: of its path
    separator: str = Field(",", min_length=1)  # inside a cell of tags, scores or classes


class FolderPreparerConfig(ImageTextConfig):
    """`auto` is a table if one is named, sidecars if an image and a text share a name, and class folders otherwise."""

    type: Literal["folder"] = "folder"
    layout: Literal["auto", "table", "sidecars", "class_folders"] = "auto"  # how the folder is read
    table: TableConfig = TableConfig()
    validation_fraction: float = Field(0.05, ge=0, lt=1)  # of the keys, by hash, where nothing else names a split
    part: Literal["auto", "pairs", "unimodal"] = "auto"  # auto: `unimodal` where classes are all there is
    licence: str = "not stated"  # for the manifest


def prepare_folder(config: FolderPreparerConfig, options: Options) -> None:
    """Write `<root>/pairs`, or `<root>/unimodal` for images with classes only."""
    options.root.mkdir(parents=True, exist_ok=True)  # before times of folders are taken: it may lie inside
    found = list(listings(options.source, options.root))
    layout = config.layout
    if layout == "auto":
        beside = any(folder.tars or _has_sidecar(options.source, folder) for folder in found)
        layout = "table" if config.table.file else "sidecars" if beside else "class_folders"
    tars: list[str] = []
    tables: list[str] = []
    scans: list[Scan]
    check: Check | None = None
    if layout == "table":
        table = config.table
        if table.file is None:
            raise UserError("table.file: required where layout=table: the name of the CSV, TSV or JSON-lines file")
        if not (options.source / table.file).is_file():
            raise UserError(f"{options.source / table.file}: no such file. Its path is seen from --from")
        if not (table.text or table.tags or table.classes):
            raise UserError("table.text, table.tags, table.classes: name at least one column of what to learn from")
        tables = [table.file.as_posix()]
        folders = tuple(folder.path for folder in found)
        scan = TableScan(options.source, table, config.validation_fraction, folders)
        scans, check = [scan], scan.refuse_two_images_of_one_key if table.key else None
    else:
        scans = [_scan(layout, options, part, (), config) for part in chunks([f.path for f in found if f.images])]
        if layout == "sidecars":
            tars = [folder.inside(name) for folder in found for name in folder.tars]
            scans += [_scan(layout, options, (), part, config) for part in chunks(tars)]
    only_classes = layout == "class_folders" or (layout == "table" and not (config.table.text or config.table.tags))
    part = config.part if config.part != "auto" else "unimodal" if only_classes else "pairs"
    chosen = _chosen(config.layout, layout)
    expected = f"{_expected(layout, found)} {chosen}"
    if layout == "class_folders":
        classes = {name for folder in found if folder.images and (name := _class_and_split(folder.parts)[0])}
        if len(classes) == 1:
            raise UserError(
                f"{options.source}: all images are of one class, {min(classes)!r}, the folder that holds "
                "them. Expected a folder for each of several classes, or another layout="
            )
    validation = "set validation_fraction above 0, or name it in table.split or in folders called val"
    licences = {"images and texts": config.licence}
    plan = Plan("folder", part, config, scans, licences, tables, tars, expected, validation, chosen=chosen, check=check)
    prepare_image_text(plan, options)


def _scan(
    layout: str, options: Options, folders: Sequence[str], tars: Sequence[str], config: FolderPreparerConfig
) -> FolderScan:
    return FolderScan(options.source, tuple(folders), tuple(tars), layout == "sidecars", config.validation_fraction)


def _expected(layout: str, found: Sequence[Listing]) -> str:
    zips = " Zips are not read: unpack them." * any(folder.zips for folder in found)
    forms = {
        "table": "Its column table.image must hold paths seen from the table's folder",
        "sidecars": "Expected images with a text file of the same name",
        "class_folders": "Expected folders that are named after classes, with images in them",
    }
    return f"{forms[layout]}.{zips}"


def _chosen(asked: str, layout: str) -> str:
    """How the folder was read, and how to have it read otherwise; for refusals."""
    by = "layout=auto chose" if asked == "auto" else "The layout is"
    others = " or ".join(f"layout={name}" for name in LAYOUTS if name != layout)
    return f"{by} {layout} ({LAYOUTS[layout]}); {others} chooses another"


def _has_sidecar(source: Path, folder: Listing) -> bool:
    """Whether an image and a text of the folder share a name."""
    if not (folder.images and folder.texts):
        return False
    with os.scandir(source / folder.path) as entries:
        texts = {name[0] for entry in entries if (name := stem_and_suffix(entry.name))[1] == ".txt"}
    with os.scandir(source / folder.path) as entries:
        names = (stem_and_suffix(entry.name) for entry in entries)
        return any(suffix in IMAGE_SUFFIXES and stem in texts for stem, suffix in names)


def _class_and_split(folders: Sequence[str]) -> tuple[str, str]:
    """What the folders of an image say; empty where they say nothing."""
    if not folders or folders[-1].lower() in SPLIT_NAMES:
        return "", ""
    split = next((SPLIT_NAMES[name.lower()] for name in folders[:-1] if name.lower() in SPLIT_NAMES), "")
    return folders[-1].replace("_", " "), split


def path_key(path: str) -> str:
    """A key made of a path inside the release: readable at the front, and unlike that of any other path."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.splitext(path)[0]).strip("-")[-70:]
    return f"{readable}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"


def split_of_path(parts: Sequence[str], key: str, validation_fraction: float) -> str:
    named = SPLIT_NAMES.get(parts[0].lower()) if len(parts) > 1 else None
    return named or drawn_split(key, validation_fraction)


@dataclass(frozen=True)
class FolderScan:
    """Folders and tars of images, each with texts beside it or with the class that its folder is named after."""

    source: Path
    folders: tuple[str, ...]
    tars: tuple[str, ...]
    sidecars: bool
    validation_fraction: float

    @property
    def inputs(self) -> Sequence[Path]:
        return [self.source / name for name in (*self.folders, *self.tars)]

    def pieces(self, report: Report, scratch: Path) -> Iterator[Piece]:
        with closing(Originals(self.source)) as originals:
            for group in groups(self.source, self.folders, self.tars, report):
                yield from self.group(group, originals, report)

    def group(self, group: Mapping[str, Location], originals: Originals, report: Report) -> Iterator[Piece]:
        images = [place for suffix, place in group.items() if suffix in IMAGE_SUFFIXES]
        if not images:
            return
        if self.sidecars:  # one example, whatever the image's format
            place = images[0]
            yield self.piece(place, captions=_texts(group.get(".txt"), originals, report))
            return
        for place in images:
            name, split = _class_and_split(PurePosixPath(place.file).parts[:-1])
            if name:
                yield self.piece(place, classes=(name,), split=split)
            else:
                report(Problem(place.file, "", "in no folder of a class"))

    def piece(
        self, place: Location, captions: tuple[str, ...] = (), classes: tuple[str, ...] = (), split: str = ""
    ) -> Piece:
        path = f"{place.file}/{place.member}" if place.member else place.file
        key = path_key(path)
        split = split or split_of_path(PurePosixPath(path).parts, key, self.validation_fraction)
        return Piece(key, split, True, place.name, place, captions, classes=classes)


def _texts(place: Location | None, originals: Originals, report: Report) -> tuple[str, ...]:
    """The lines of a text beside an image; none, and reported, where it cannot be read."""
    if place is None:
        return ()
    try:
        content = originals.read(place, MAX_TEXT_BYTES).decode("utf-8-sig")
    except (ImageError, UnicodeDecodeError):
        report(Problem(place.file, place.member, "no text of UTF-8"))
        return ()
    return tuple(dict.fromkeys(text for line in content.split("\n") if (text := line.strip())))


# --- Tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableScan:
    """One table of images."""

    source: Path
    table: TableConfig
    validation_fraction: float
    folders: tuple[str, ...]  # where images lie: one that changes there begins the work anew

    @property
    def path(self) -> Path:
        assert self.table.file is not None
        return self.source / self.table.file

    @property
    def inputs(self) -> Sequence[Path]:
        return [self.path, *(self.source / folder for folder in self.folders)]

    def pieces(self, report: Report, scratch: Path) -> Iterator[Piece]:
        table = self.table
        for cell, image, key in self._rows():
            split = cell.split(table.split) or split_of_path(PurePosixPath(image).parts, key, self.validation_fraction)
            labels, scores = cell.tags(table.tags, table.scores)
            captions = cell.texts(table.text)
            yield Piece(key, split, True, image, Location(image), captions, labels, scores, cell.many(table.classes))

    def refuse_two_images_of_one_key(self, pieces: Pieces, first: int, last: int) -> None:
        """One of the images would be lost, and its texts would stand beside the other."""
        if (found := pieces.two_images(first, last)) is None:
            return
        key, *images = found
        places = {image.file: "" for image in images}
        for cell, image, its_key in self._rows():
            if its_key == key and places.get(image) == "":
                places[image] = cell.place
        one, other = (f"{place} ({image})" for image, place in places.items())
        raise OfficialFile.given(self.path).error(
            f"{one} and {other} have one {self.table.key}, {shown(key)}, but different images",
            "Give each image a key of its own, or leave table.key out: keys are then made of the images' paths",
        )

    def _rows(self) -> Iterator[tuple[_Cells, str, str]]:
        """The cells of each row, the path of its image inside the release, and its key."""
        table, file = self.table, OfficialFile.given(self.path)
        folder = os.path.relpath(self.path.parent, self.source)
        for place, row in table_rows(file):
            cell = _Cells(file, place, row, table.separator)
            image = os.path.normpath(os.path.join(folder, cell.one(table.image)))
            if os.path.isabs(image) or image == ".." or image.startswith("../"):
                raise file.error(f"{place}: {table.image} leads out of the folder. Got {shown(image)}", REMEDY)
            key = cell.one(table.key) if table.key else path_key(image)
            if not KEY_PATTERN.fullmatch(key) or len(key) > MAX_KEY_LENGTH:
                problem = f"a key must be letters, digits, '_' or '-', {MAX_KEY_LENGTH} at most. Got {shown(key)}"
                raise file.error(f"{place}: {problem}", REMEDY)
            yield cell, image, key


def table_rows(file: OfficialFile) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The place and the columns of each row of a CSV, TSV (by its suffix) or JSON-lines file."""
    if file.name.lower().endswith((".jsonl", ".json")):
        for place, row in json_lines(file):
            if not isinstance(row, dict):
                raise file.error(f"{place}: must be an object. Got {shown(row)}", REMEDY)
            yield place, row
        return
    delimiter = "\t" if file.name.lower().endswith(".tsv") else ","
    with file.text() as text:
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise file.error(f"line {reader.line_num}: has not as many cells as the first line", REMEDY)
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise file.error(f"line {reader.line_num}: {error}", REMEDY) from None


@dataclass(frozen=True)
class _Cells:
    """One row of a table, with errors that name it."""

    file: OfficialFile
    place: str
    row: Mapping[str, Any]
    separator: str

    def value(self, column: str) -> Any:
        if column not in self.row:
            near = ", ".join(str(name) for name in self.row)
            raise self.file.error(f"{self.place}: has no column {column!r}. It has {near}", "Name another one")
        return self.row[column]

    def one(self, column: str) -> str:
        value = self.value(column)
        text = str(value) if type(value) is int else value
        if type(text) is not str or not text.strip():
            raise self.file.error(f"{self.place}: {column} must be text. Got {shown(value)}", REMEDY)
        return text.strip()

    def texts(self, column: str | None) -> tuple[str, ...]:
        """One text, or a JSON list of them; a cell may be empty."""
        value = self.value(column) if column else None
        if isinstance(value, list):
            return self.many(column)
        return (self.one(column),) if column and value else ()

    def many(self, column: str | None) -> tuple[str, ...]:
        value = self.value(column) if column else None
        parts = value.split(self.separator) if isinstance(value, str) else value or []
        if not isinstance(parts, list) or any(type(part) not in (str, int, float) for part in parts):
            raise self.file.error(f"{self.place}: {column} must be a list of texts. Got {shown(value)}", REMEDY)
        return tuple(text for part in parts if (text := str(part).strip()))

    def tags(self, names: str | None, scores: str | None) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Distinct tags with their scores, best first; people's tags have no score, and each counts fully."""
        tags, values = self.many(names), self.many(scores)
        if not scores:
            tags = tuple(dict.fromkeys(tags))
            return tags, (1.0,) * len(tags)
        if len(tags) != len(values):
            raise self.file.error(f"{self.place}: {len(tags)} tags, but {len(values)} scores", REMEDY)
        best: dict[str, float] = {}
        for tag, text in zip(tags, values, strict=True):
            try:
                score = float(text)
            except ValueError:
                score = math.nan
            if not 0 <= score <= 1:
                raise self.file.error(f"{self.place}: a score must be from 0 to 1. Got {shown(text)}", REMEDY)
            best[tag] = max(score, best.get(tag, 0.0))
        ordered = sorted(best.items(), key=lambda entry: -entry[1])
        return tuple(tag for tag, _ in ordered), tuple(score for _, score in ordered)

    def split(self, column: str | None) -> str:
        if not column:
            return ""
        name = self.one(column)
        if name.lower() not in SPLIT_NAMES:
            known = ", ".join(SPLIT_NAMES)
            raise self.file.error(f"{self.place}: unknown split {name!r}. Known: {known}", REMEDY)
        return SPLIT_NAMES[name.lower()]
