"""Images and texts where a user has them: folders of files and tars, listed and read in place. Nothing is unpacked."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from data_loaders.decoding import ImageError
from data_loaders.prepare.pieces import Location
from data_loaders.prepare.release import REPORT, escapes
from vlm.tasks.task import MANIFEST

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
TABLE_SUFFIXES = (".tsv", ".csv", ".jsonl")
MAX_IMAGE_BYTES = 1 << 28  # 256 MB
MAX_TEXT_BYTES = 1 << 24  # of a text beside an image
MAX_OPEN_FILES = 64
MAX_BYTES_AHEAD = 1 << 20  # of one image
CUT_OFF = "cut off or damaged"


@dataclass(frozen=True, slots=True)
class Problem:
    """A file, or a member of an archive, that is not used."""

    file: str
    member: str
    reason: str


Report = Callable[[Problem], None]


@dataclass
class Listing:
    """One folder of a release: what lies directly in it, as far as a preparer asks. Names of images are not kept."""

    path: str  # seen from the release's folder; "" is the folder itself
    folders: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    zips: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    images: bool = False
    texts: bool = False
    json: bool = False
    bare: bool = False  # files without a suffix
    prepared: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.path.split("/")) if self.path else ()

    def inside(self, name: str) -> str:
        return f"{self.path}/{name}" if self.path else name


def listings(source: Path, exclude: Path) -> Iterator[Listing]:
    """A folder and all below it, in the order of their names, without `exclude` and what was prepared before.

    Links to folders are followed, each folder once.
    """
    yield from _below(source, "", {os.path.realpath(exclude)})


def _below(source: Path, folder: str, seen: set[str]) -> Iterator[Listing]:
    real = os.path.realpath(source / folder)
    if folder and real in seen:
        return
    seen.add(real)
    found = _listing(source, folder)
    if not found.prepared:
        yield found
        for name in sorted(found.folders):
            yield from _below(source, found.inside(name), seen)


def _listing(source: Path, folder: str) -> Listing:
    found, own = Listing(folder), set()
    with os.scandir(source / folder) as entries:
        for entry in entries:
            name = entry.name
            suffix = os.path.splitext(name)[1].lower()
            if entry.is_dir():
                if not name.startswith("."):
                    found.folders.append(name)
            elif suffix in IMAGE_SUFFIXES:
                found.images = True
            elif suffix == ".json":
                found.json = True
                own |= {name} & {MANIFEST, REPORT}
            elif suffix == ".tar":
                found.tars.append(name)
            elif suffix == ".zip":
                found.zips.append(name)
            elif suffix == ".txt":
                found.texts = True
            elif suffix in TABLE_SUFFIXES:
                found.tables.append(name)
            elif not suffix:
                found.bare = True
    found.prepared = own == {MANIFEST, REPORT}
    found.tars.sort()
    found.tables.sort()
    return found


def stem_and_suffix(name: str) -> tuple[str, str]:
    stem, suffix = os.path.splitext(name)
    return stem, suffix.lower()


def groups(source: Path, folders: Sequence[str], tars: Sequence[str], report: Report) -> Iterator[dict[str, Location]]:
    """Files and members that share a stem (suffix -> place), of all the folders and then of all the tars."""
    for read, names in ((folder_groups, folders), (tar_groups, tars)):
        for name in names:
            for _, group in read(source, name, report):
                yield group


def folder_groups(source: Path, folder: str, report: Report) -> Iterator[tuple[str, dict[str, Location]]]:
    """The files of one folder by the stem of their names: (stem, suffix -> file), in the order of the names."""
    groups: dict[str, dict[str, Location]] = {}
    with os.scandir(source / folder) as entries:
        for entry in entries:
            if entry.is_file() and not entry.name.startswith("."):
                stem, suffix = stem_and_suffix(entry.name)
                groups.setdefault(stem, {})[suffix] = Location(f"{folder}/{entry.name}" if folder else entry.name)
    for stem in sorted(groups):
        yield stem, dict(sorted(groups[stem].items()))


def tar_groups(source: Path, file: str, report: Report) -> Iterator[tuple[str, dict[str, Location]]]:
    """Adjacent members of one tar that share a stem, as WebDataset writes them: (stem, suffix -> member)."""
    current, group = "", dict[str, Location]()
    for place in tar_members(source, file, report):
        stem, suffix = stem_and_suffix(place.member)
        if stem != current and group:
            yield current, group
            group = {}
        current = stem
        group.setdefault(suffix, place)
    if group:
        yield current, group


def tar_members(source: Path, file: str, report: Report, inside: Location | None = None) -> Iterator[Location]:
    """The plain files in a tar, as places in it, or in a tar that is itself a member of one (`inside`).

    A member whose name would lie outside the archive, a link, and an archive that is cut off or damaged are reported;
    the members before the damage are given.
    """
    prefix, start = (f"{inside.member}: ", inside.offset) if inside else ("", 0)
    number = 0
    try:
        with open(source / file, "rb") as content:
            window = io.BufferedReader(_Window(content, start, inside.size)) if inside else content
            with tarfile.open(fileobj=window, mode="r:", errorlevel=1) as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # a large tar's list of members would grow
                    number += 1
                    name = prefix + member.name
                    if escapes(member.name):
                        report(Problem(file, name, "the member's name lies outside the archive"))
                    elif member.isreg() and not member.issparse():
                        yield Location(file, start + member.offset_data, member.size, name)
                    elif not member.isdir():
                        report(Problem(file, name, "a link" if member.islnk() or member.issym() else "no plain file"))
                # `tarfile` takes a damaged header, or none at all, for the end; two empty blocks are the end.
                window.seek(tar.offset)
                if window.read(512) != bytes(512):
                    report(Problem(file, f"{prefix}after member {number}", CUT_OFF))
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        report(Problem(file, f"{prefix}after member {number} ({error})", CUT_OFF))


class _Window(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, size: int) -> None:
        self.file, self.start, self.size, self.at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # a view is all that is passed
        data = os.pread(self.file.fileno(), max(0, min(len(buffer), self.size - self.at)), self.start + self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


class Originals:
    """Reads what `Location`s name. Some files stay open, those that were asked for last."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self._open: OrderedDict[str, int] = OrderedDict()

    def image(self, location: Location) -> bytes:
        """The encoded image; `ImageError` where it cannot be had."""
        return self.read(location, MAX_IMAGE_BYTES)

    def expect(self, location: Location) -> None:
        """Tell the system of a place in an archive that will be read soon."""
        if location.size > 0 and hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # whoever reads it gets the error
                size = min(location.size, MAX_BYTES_AHEAD)
                os.posix_fadvise(self._descriptor(location.file), location.offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, location: Location, max_bytes: int) -> bytes:
        name, size = location.name, location.size
        try:
            if size < 0:
                with open(self.source / location.file, "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    self._refuse(name, size, max_bytes)
                    return file.read()
            self._refuse(name, size, max_bytes)
            data = os.pread(self._descriptor(location.file), size, location.offset)
        except FileNotFoundError:
            raise ImageError(f"{name}: no such file", "missing") from None
        except OSError as error:
            raise ImageError(f"{name}: cannot be read ({error.strerror})", "cannot be read") from None
        if len(data) != size:
            raise ImageError(f"{name}: the archive is cut off", "cut off with its archive")
        return data

    def _refuse(self, name: str, size: int, max_bytes: int) -> None:
        if size == 0:
            raise ImageError(f"{name}: an empty file", "empty file")
        if size > max_bytes:
            raise ImageError(f"{name}: {size:,} bytes are over the limit of {max_bytes:,}", "too many bytes")

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            while len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[file] = os.open(self.source / file, os.O_RDONLY)
        self._open.move_to_end(file)
        return self._open[file]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


NUMBERED = re.compile(r"([0-9]{1,9})(?:_([0-9]{1,10}))?")


def numbered_images(source: Path, folder: str, report: Report) -> Iterator[tuple[int, str, str]]:
    """The images of one folder that are named after a row: (number, CRC-32 of the url or "", file), in any order.

    `0000123.jpg`, the same without a suffix, and `123_2405722` (row and checksum) are such names.
    """
    with os.scandir(source / folder) as entries:
        for entry in entries:
            if entry.is_dir() or entry.name.startswith("."):
                continue
            stem, suffix = stem_and_suffix(entry.name)
            file = f"{folder}/{entry.name}" if folder else entry.name
            match = NUMBERED.fullmatch(stem)
            if match and (suffix in IMAGE_SUFFIXES or not suffix):
                yield int(match[1]), match[2] or "", file
            elif suffix in IMAGE_SUFFIXES:
                report(Problem(file, "", "not named after a row"))
