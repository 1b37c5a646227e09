"""What lies beside the data and speaks of its examples by their keys: labels, captions, scores, lists of keys.

Side shards, JSON lines, .csv and .tsv files, and Parquet for scores. Of a file of captions only an index is in memory,
24 bytes a line.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib
import io
import json
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data_loaders.shards import ShardReader, open_index, ring_hash
from vlm.errors import UserError
from vlm.supervision import BestByScoreConfig, SourceConfig, SupervisionConfig
from vlm.supervision.selection import best_by_score
from vlm.supervision.sources import Beside, beside_path
from vlm.supervision.subset import Positions, window
from vlm.types import Record

Split = Literal["train", "validation"]
TABLES = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
BATCH_ROWS = 65_536  # of a Parquet file in memory at a time


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the system refuses inside is one error that names this path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _is_folder(path: Path) -> bool:
    with _readable(path):
        return path.is_dir()


def _is_shards(folder: Path) -> bool:
    with _readable(folder):
        return (folder / "index.json").exists()


class SideShards:
    """Records without images from a shard folder, by key."""

    def __init__(self, folder: Path) -> None:
        self.reader = ShardReader(open_index(folder))

    @property
    def hashes(self) -> NDArray[np.int64]:
        return self.reader.index.hashes

    def __call__(self, key: str) -> Record | None:
        try:
            return self.reader.text(self.reader.position(key))
        except KeyError:
            return None


class CaptionFile:
    """Captions by key from JSON lines, .csv or .tsv. Lines are read when they are asked for; open files stay here."""

    def __init__(self, file: Path) -> None:
        self.file = file
        hashes, offsets, sizes = array("q"), array("q"), array("q")
        for row in rows(file):
            _captions(row)
            hashes.append(ring_hash(row.key))
            offsets.append(row.offset)
            sizes.append(row.size)
        order = np.argsort(np.frombuffer(hashes, dtype=np.int64), kind="stable") if hashes else np.zeros(0, np.int64)
        self.hashes, self.offsets, self.sizes = (
            np.array(values, dtype=np.int64)[order] for values in (hashes, offsets, sizes)
        )
        self.columns = _columns(file) if file.suffix in TABLES else None
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]  # not None here

    def __call__(self, key: str) -> Record | None:
        place = ring_hash(key)
        first, end = (int(np.searchsorted(self.hashes, place, side)) for side in ("left", "right"))
        captions = tuple(caption for at in range(first, end) for caption in _captions(self._row(at, key)))
        return Record(key, captions=captions) if first < end else None

    def _row(self, at: int, key: str) -> Row:
        offset, size = int(self.offsets[at]), int(self.sizes[at])
        with _readable(self.file):
            if self._descriptor is None:
                self._descriptor = os.open(self.file, os.O_RDONLY)
            data = os.pread(self._descriptor, size, offset)
        found = next(_parsed(self.file, io.BytesIO(data), self.columns), None)
        if found is None or found.key != key:
            raise UserError(f"{self.file}: changed while it was read (byte {offset}). Start the run again")
        return found


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a file, with what it says by name."""

    file: Path
    number: int  # from 1, the header of a table left out
    key: str
    values: dict[str, Any]
    offset: int = 0  # where its bytes begin
    size: int = 0

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.file}: record {self.number} ({self.key}): {problem}")


def rows(file: Path) -> Iterator[Row]:
    """The records of JSON lines, .csv or .tsv, one in memory at a time. Each has a text under `key`."""
    if file.suffix not in (*JSON_LINES, *TABLES):
        known = ", ".join((*JSON_LINES, *TABLES))
        raise UserError(f"{file}: expected side shards (a folder with index.json), or a file that ends in {known}")
    with _readable(file), file.open("rb") as content:
        yield from _parsed(file, content, None)


def _parsed(file: Path, content: io.BufferedIOBase, columns: Sequence[str] | None) -> Iterator[Row]:
    """The records from here on. `columns` of a table; None: its first line names them."""
    number, parts = 0, _json_lines(content) if file.suffix in JSON_LINES else _cells(content, TABLES[file.suffix])
    while True:
        where = f"{file}: record {number + 1}"
        try:
            offset, size, said = next(parts)
        except StopIteration:
            return
        except (ValueError, RecursionError, csv.Error) as error:
            raise UserError(f"{where}: cannot be read ({error}), or the file is cut off") from None
        if not said:  # an empty line
            continue
        if isinstance(said, list):
            if columns is None:
                columns = _checked_header(file, said)
                continue
            if len(said) != len(columns):
                raise UserError(f"{where}: has {len(said)} columns, and the header {len(columns)}")
            said = dict(zip(columns, said, strict=True))
        number += 1
        key = said.get("key") if isinstance(said, dict) else None
        if not isinstance(key, str) or not key:
            raise UserError(f"{where}: has no text under 'key'")
        yield Row(file, number, key, said, offset, size)


def _json_lines(content: io.BufferedIOBase) -> Iterator[tuple[int, int, Any]]:
    """Where each line begins, its length in bytes, and its value; one that is no object has no key."""
    at = 0
    for line in iter(content.readline, b""):
        value = json.loads(line.decode("utf-8-sig")) if line.strip() else None
        yield at, len(line), {"": value} if isinstance(value, list) else value
        at += len(line)


def _cells(content: io.BufferedIOBase, delimiter: str) -> Iterator[tuple[int, int, list[str]]]:
    """Where each record of a table begins, its length in bytes, and its cells, which may hold quoted line feeds."""
    begin = end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        for line in iter(content.readline, b""):
            end += len(line)
            yield line.decode("utf-8-sig" if end == len(line) else "utf-8")

    for cells in csv.reader(lines(), delimiter=delimiter, strict=True):  # takes no line before it needs it
        yield begin, end - begin, cells
        begin = end


def _columns(file: Path) -> list[str]:
    with _readable(file), file.open("rb") as content:
        return next((cells for _, _, cells in _cells(content, TABLES[file.suffix])), [])


def _checked_header(file: Path, columns: list[str]) -> list[str]:
    if "key" not in columns or len(set(columns)) != len(columns):
        raise UserError(f"{file}: its first line must name the columns, each once, key among them. Got {columns}")
    return columns


def _captions(row: Row) -> tuple[str, ...]:
    """The captions of one record."""
    if "captions" in row.values:
        captions = row.values["captions"]
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise row.error("'captions' must be a list of texts")
        return tuple(caption for caption in captions if caption.strip())
    caption = row.values.get("caption")
    if not isinstance(caption, str):
        raise row.error("expected a text under 'caption', or a list of texts under 'captions'")
    return (caption,) if caption.strip() else ()


# --- Sources ---------------------------------------------------------------------------------------------------------


def of_split(path: Path, split: Split) -> Path:
    """The part of a path that speaks of this split: the folder `path/split` where there is one, else all of it."""
    inside = path / split
    if not _is_folder(path) or _is_shards(path):
        return path
    if not _is_folder(inside):
        raise UserError(f"{path}: holds no side shards, and no folder {split} of them. Write them to {inside}")
    return inside


def open_beside(
    sources: Sequence[SourceConfig], split: Split, reader: ShardReader, positions: Positions
) -> dict[Path, Beside]:
    """What the sources read beside the data, opened. An example that it lacks is found here, before the first step."""
    opened: dict[Path, Beside] = {}
    for source in sources:
        path = beside_path(source)
        if path is None:
            continue
        place = of_split(path, split)
        if path not in opened:
            opened[path] = SideShards(place) if _is_folder(place) else CaptionFile(place)
        if getattr(source, "missing", "none") == "error":
            found: Any = opened[path]
            at = np.asarray(positions)
            _require(np.isin(reader.index.hashes[at], found.hashes), reader, at, place, "missing=none")
    return opened


def _require(
    found: NDArray[np.bool_], reader: ShardReader, positions: NDArray[np.int64], path: Path, remedy: str
) -> None:
    lacking = positions[~found]
    if len(lacking):
        first, folder = reader.text(int(lacking[0])).key, reader.index.folder
        counts = f"{len(lacking):,} of {len(positions):,} examples of {folder}, {first!r} the first"
        raise UserError(
            f"{path}: says nothing of {counts}. Complete it (side shards of both splits lie in folders train and "
            f"validation), or set {remedy}"
        )


def content_fingerprint(path: Path) -> str:
    """12 hex digits that stand for the content of a file, or of all shards at or right under a folder."""
    if _is_folder(path):
        with _readable(path):
            os.scandir(path).close()  # what the system refuses, the search below passes over in silence
        for split in get_args(Split):
            _is_shards(path / split)
        folders = [path] if _is_shards(path) else sorted(f.parent for f in path.glob("*/index.json"))
        if not folders:
            raise UserError(f"{path}: holds no side shards, neither itself nor in folders train and validation")
        return hashlib.sha256("".join(open_index(f).fingerprint for f in folders).encode()).hexdigest()[:12]
    with _readable(path), path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:12]


def beside_paths(supervision: SupervisionConfig) -> list[Path]:
    """Every file and folder beside the data that decides what is seen."""
    selection = supervision.selection
    chosen = selection.file if isinstance(selection, BestByScoreConfig) else None
    paths = [*(beside_path(source) for source in supervision.drawn), chosen, supervision.keys]
    return list(dict.fromkeys(path for path in paths if path is not None))


# --- Selection -------------------------------------------------------------------------------------------------------


def select(supervision: SupervisionConfig, reader: ShardReader) -> Positions:
    """Positions of the examples that may be seen: exactly `round(fraction * n)` of the n that `keys` allows.

    Depends on keys, scores and configuration alone; a smaller fraction is inside a larger one. A window of
    all is three numbers, anything else arrays of n.
    """
    hashes, selection = reader.index.hashes, supervision.selection
    allowed = None if supervision.keys is None else positions_of_keys(supervision.keys, reader)
    if not isinstance(selection, BestByScoreConfig):
        if allowed is None:
            return window(hashes, supervision.fraction, supervision.subset_seed)
        chosen: NDArray[np.int64] = np.asarray(window(hashes[allowed], supervision.fraction, supervision.subset_seed))
        return allowed[chosen]
    if allowed is None:
        allowed = np.arange(len(hashes), dtype=np.int64)
    count = round(supervision.fraction * len(allowed))
    scores = scores_of(selection, reader)[allowed]
    found = ~np.isnan(scores)
    file = selection.file or reader.index.folder
    if selection.missing == "error":
        _require(found, reader, allowed, file, "supervision.selection.missing=exclude")
    if count > found.sum():
        raise UserError(
            f"{file}: {int(found.sum()):,} examples have a score, but supervision.fraction={supervision.fraction} of "
            f"{len(allowed):,} wants {count:,}"
        )
    return allowed[best_by_score(hashes[allowed], scores, count, selection.direction)]


def positions_of_keys(path: Path, reader: ShardReader) -> NDArray[np.int64]:
    """Where the examples of these keys lie, ascending. Every key must be there, or two users would not see the same."""
    if _is_folder(path):
        wanted = open_index(path).hashes
    else:
        listed = array("q", (ring_hash(key) for key in _keys(path)))
        wanted = np.array(listed, dtype=np.int64)
    wanted = np.unique(wanted)
    strange = ~np.isin(wanted, reader.index.hashes)
    if strange.any():
        name = ""
        if not _is_folder(path):
            known = set(wanted[strange].tolist())
            name = f", {next(key for key in _keys(path) if ring_hash(key) in known)!r} the first"
        counts = f"{int(strange.sum()):,} of {len(wanted):,} keys"
        raise UserError(f"{path}: {counts} are not in {reader.index.folder}{name}. Is it a list of other data?")
    return np.searchsorted(reader.index.hashes, wanted).astype(np.int64)


def _keys(path: Path) -> Iterator[str]:
    if path.suffix in (*JSON_LINES, *TABLES):
        yield from (row.key for row in rows(path))
    elif path.suffix == ".parquet":
        yield from (key for key, _ in _parquet(path, None))
    else:
        try:
            with path.open(encoding="utf-8-sig") as file:
                yield from (line.strip() for line in file if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as a list of keys ({error})") from None


def scores_of(selection: BestByScoreConfig, reader: ShardReader) -> NDArray[np.float64]:
    """The score of each example in the ring's order; NaN where there is none."""
    path = selection.file
    scores = np.full(len(reader), np.nan)
    if path is None:
        for position in range(len(reader)):
            scores[position] = _confidence(reader.text(position))
        return scores
    hashes, values = array("q"), array("d")
    place = of_split(path, "train")
    if _is_folder(place):
        side = SideShards(place)
        for record in (side.reader.text(position) for position in range(len(side.reader))):
            hashes.append(ring_hash(record.key))
            values.append(_confidence(record))
    else:
        for key, value in _scored(place, selection.column):
            hashes.append(ring_hash(key))
            values.append(value)
    given, numbers = np.array(hashes, dtype=np.int64), np.array(values)
    order = np.argsort(given, kind="stable")
    again = np.flatnonzero(np.diff(given[order]) == 0)
    if len(again):
        first, second = (int(order[again[0] + step]) + 1 for step in (0, 1))
        raise UserError(f"{path}: records {first} and {second} have the same key. Leave one score a key")
    at = np.searchsorted(reader.index.hashes, given)
    inside = at < len(reader)
    inside[inside] = reader.index.hashes[at[inside]] == given[inside]
    scores[at[inside]] = numbers[inside]
    return scores


def _confidence(record: Record) -> float:
    """The score of the best label; NaN without one."""
    return max(record.scores, default=math.nan)


def _scored(file: Path, column: str) -> Iterator[tuple[str, float]]:
    if file.suffix == ".parquet":
        yield from _parquet(file, column)
        return
    for row in rows(file):
        given = row.values.get(column)
        try:
            value = math.nan if given is None or isinstance(given, bool) else float(given)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise row.error(f"expected a number under {column!r}. Got {given!r}")
        yield row.key, value


def _parquet(file: Path, column: str | None) -> Iterator[tuple[str, float]]:
    """Keys and numbers of a Parquet file, a batch in memory at a time."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"{file}: Parquet files need pyarrow: pip install pyarrow. Or write a .csv or .jsonl") from None
    columns = ["key"] if column is None else ["key", column]
    try:
        batches = parquet.ParquetFile(file).iter_batches(BATCH_ROWS, columns=columns)
        number = 0
        for batch in batches:
            keys = batch.column(0).to_pylist()
            values = [0.0] * len(keys) if column is None else batch.column(1).to_pylist()
            for key, value in zip(keys, values, strict=True):
                number += 1
                is_number = isinstance(value, int | float) and math.isfinite(value)
                if not isinstance(key, str) or not is_number:
                    raise UserError(f"{file}: record {number}: expected a text and a number. Got {key!r} and {value!r}")
                yield key, float(value)
    except UserError:
        raise
    except Exception as error:  # the library's own kinds
        raise UserError(f"{file}: cannot be read as Parquet with the columns {', '.join(columns)} ({error})") from None
