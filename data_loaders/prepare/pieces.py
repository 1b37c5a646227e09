"""What is known of examples, piece by piece, on disk in hash order: a join of millions of rows in little memory.

A caption stands in one file, the image in another and the labels in a third. Each file is scanned once; what it says of
an example becomes a `Piece` under the example's key. Pieces are sorted by the hash of their key in runs of a bounded
size, and whoever writes one shard reads from every run only the slice of its own range of the hash ring.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from data_loaders.shards import ring_hash

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
PARTITIONS = 4096  # equal parts of the hash ring; a shard is some adjacent ones
RUN_BYTES = 1 << 24  # of lines that wait to be sorted
STEP_BYTES = 1 << 22  # of lines that are joined together
KINDS = ("images", "images of train", "images of validation", "listed in train", "listed in validation")


@dataclass(frozen=True, slots=True)
class Location:
    """Where an image's bytes lie in the release. Nothing is opened by the name of an archive's member."""

    file: str  # seen from the release's folder
    offset: int = 0
    size: int = -1  # -1: the whole file
    member: str = ""  # of an archive; only errors use it

    @property
    def name(self) -> str:
        return f"{self.file}: {self.member}" if self.member else self.file


@dataclass(frozen=True, slots=True)
class Piece:
    """What one file says of one example."""

    key: str
    split: str = ""  # empty: of whichever split lists the key
    listed: bool = False  # the example is wanted; it is missing if no piece has its image
    name: str = ""  # what a lost example is called: its url or path
    image: Location | None = None
    captions: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()

    def line(self) -> bytes:
        place = self.image and [self.image.file, self.image.offset, self.image.size, self.image.member]
        texts = [self.captions, self.labels, self.scores, self.classes]
        # Escaped to ASCII: the name of a file need not be UTF-8.
        return json.dumps([self.key, self.split, self.listed, self.name, place, *texts]).encode() + b"\n"

    @classmethod
    def of(cls, line: bytes) -> Piece:
        key, split, listed, name, place, *texts = json.loads(line)
        return cls(key, split, listed, name, Location(*place) if place else None, *(tuple(text) for text in texts))


def drawn_split(key: str, validation_fraction: float, otherwise: str = "train") -> str:
    """`validation` for that fraction of the keys. Another hash than the ring's: the split is no arc of it."""
    return "validation" if ring_hash(f"validation {key}") < validation_fraction * 2**63 else otherwise


def of_split(pieces: list[Piece], split: Split) -> list[Piece]:
    """The pieces of one key that count in a split; none where the split does not list the key."""
    mine = [piece for piece in pieces if piece.split in ("", split)]
    return mine if any(piece.listed for piece in mine) else []


def partition(place: int) -> int:
    """The part of the ring that a hash lies in."""
    return place >> 51  # 63 bits in 2 ** 12 parts


class RunWriter:
    """Writes pieces as sorted runs into a folder, with counts of what they hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts = np.zeros((len(KINDS), PARTITIONS), dtype=np.int64)
        self._lines: list[tuple[int, bytes]] = []
        self._bytes = 0
        self._runs = 0

    def add(self, piece: Piece) -> None:
        place, line = ring_hash(piece.key), piece.line()
        part = partition(place)
        if piece.image is not None:
            self.counts[("", *SPLITS).index(piece.split), part] += 1
        if piece.listed:
            self.counts[3 + SPLITS.index(piece.split), part] += 1
        self._lines.append((place, line))
        self._bytes += len(line) + 150  # what the objects themselves take
        if self._bytes > RUN_BYTES:
            self._flush()

    def finish(self) -> None:
        self._flush()
        np.save(self.folder / "counts.npy", self.counts)

    def _flush(self) -> None:
        if not self._lines:
            return
        self._lines.sort(key=lambda entry: entry[0])  # stable: pieces of one key stay in the order of their file
        sizes = np.zeros(PARTITIONS + 1, dtype=np.int64)
        with (self.folder / f"{self._runs:05d}.run").open("wb") as run:
            for place, line in self._lines:
                run.write(line)
                sizes[partition(place) + 1] += len(line)
        np.save(self.folder / f"{self._runs:05d}.npy", np.cumsum(sizes))
        self._runs += 1
        self._lines, self._bytes = [], 0


@dataclass(frozen=True)
class Pieces:
    """The runs of all scans, in the scans' order."""

    runs: tuple[Path, ...]

    @classmethod
    def of(cls, folders: list[Path]) -> Pieces:
        return cls(tuple(run for folder in folders for run in sorted(folder.glob("*.run"))))

    def between(self, first: int, last: int) -> Iterator[Piece]:
        """The pieces in the partitions from `first` to before `last`; those of one key in the order of the scans."""
        for run in self.runs:
            offsets = _offsets(run)
            start, end = int(offsets[first]), int(offsets[last])
            if start == end:
                continue
            with run.open("rb") as file:
                file.seek(start)
                while file.tell() < end:
                    yield Piece.of(file.readline())

    def by_key(self, first: int, last: int, split: Split) -> Iterator[tuple[str, list[Piece]]]:
        """The pieces of each key that the split lists, in the order of the hash ring."""
        for key, pieces in self.joined(first, last):
            if mine := of_split(pieces, split):
                yield key, mine

    def joined(self, first: int, last: int) -> Iterator[tuple[str, list[Piece]]]:
        """The pieces of every key, in the order of the hash ring; a few of them in memory."""
        for start, end in self._steps(first, last):
            keys: dict[str, list[Piece]] = {}
            for piece in self.between(start, end):
                keys.setdefault(piece.key, []).append(piece)
            for key in sorted(keys, key=ring_hash):
                yield key, keys[key]

    def two_images(self, first: int, last: int) -> tuple[str, Location, Location] | None:
        """A key that pieces give to different images, of whichever split, and the first two of them."""
        for start, end in self._steps(first, last):
            images: dict[str, Location] = {}
            for piece in self.between(start, end):
                if piece.image is not None and (former := images.setdefault(piece.key, piece.image)) != piece.image:
                    return piece.key, former, piece.image
        return None

    def _steps(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Parts of a range that hold no more than `STEP_BYTES` of lines each, or are one partition."""
        before = np.zeros(PARTITIONS + 1, dtype=np.int64)
        for run in self.runs:
            before += _offsets(run)
        while first < last:
            end = int(np.searchsorted(before, before[first] + STEP_BYTES, side="right")) - 1
            end = min(max(end, first + 1), last)
            yield first, end
            first = end


def _offsets(run: Path) -> np.ndarray:
    file = run.with_suffix(".npy")
    status = file.stat()
    return _loaded(os.fspath(file), status.st_ino, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _loaded(file: str, inode: int, time: int) -> np.ndarray:
    """The array of a file; a file that was written anew under its name is read anew."""
    array: np.ndarray = np.load(file, allow_pickle=False)
    return array
