"""A release as it was downloaded: a folder of files and zips, which are read where they lie."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import cast

from vlm.errors import UserError
from vlm.records import READING_ERRORS, OfficialFile
from vlm.tasks.task import MANIFEST

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
REMEDY = "Download it again"
REPORT = "report.json"


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One file of a release: on disk, or a member of a zip. Files on disk come first where both are there."""

    member: str  # empty: a file on disk
    path: str  # the file, or the zip that holds the member
    size: int

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"{self.path}: {self.member}" if self.member else self.path


class Release:
    """All files under a folder, those inside zips among them, by their names. Nothing is unpacked."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder. --from names the folder with the files as downloaded")
        self.folder = folder
        self._zips: dict[str, zipfile.ZipFile] = {}
        self._by_name: defaultdict[str, list[Entry]] = defaultdict(list)
        try:
            for path in _files(folder):
                if path.suffix.lower() == ".zip":
                    self._add_zip(path)
                else:
                    self._by_name[path.name].append(Entry("", str(path), path.stat().st_size))
        except BaseException:
            self.close()
            raise
        for entries in self._by_name.values():
            entries.sort()

    def __enter__(self) -> Release:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for archive in self._zips.values():
            archive.close()

    @property
    def names(self) -> Collection[str]:
        """The names of all files, without their folders."""
        return self._by_name.keys()

    @property
    def archives(self) -> Collection[str]:
        """The paths of all zips."""
        return self._zips.keys()

    def find(self, name: str) -> list[Entry]:
        """The files of this name, those on disk first."""
        return self._by_name.get(name, [])

    def images(self, keys: Collection[str]) -> dict[str, list[Entry]]:
        """For each key with an image here, the files that are named after it."""
        found: dict[str, list[Entry]] = {}
        for name, entries in self._by_name.items():
            key, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES and key in keys:
                found[key] = sorted(found.get(key, []) + entries)
        return found

    def open(self, entry: Entry) -> io.BufferedIOBase:
        if not entry.member:
            return open(entry.path, "rb")
        try:
            return cast(zipfile.ZipExtFile, self._zips[entry.path].open(entry.member))
        except (ValueError, OverflowError, struct.error) as error:  # a directory that points nowhere
            raise zipfile.BadZipFile(str(error)) from None

    def only(self, entries: list[Entry]) -> Entry:
        """The one file among copies of it; copies that differ are an error."""
        if len({self.checksum(entry) for entry in entries} if len(entries) > 1 else {""}) > 1:
            names = " and ".join(entry.name for entry in entries[:2])
            raise UserError(f"{names} have one name, but differ. Move one of them out of {self.folder}")
        return entries[0]

    def checksum(self, entry: Entry) -> str:
        digest = hashlib.sha256()
        with self.official(entry).binary() as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def official(self, entry: Entry) -> OfficialFile:
        return OfficialFile(entry.name, lambda: self.open(entry), REMEDY)

    def parts(self, entry: Entry) -> tuple[str, ...]:
        """The names of the folders inside the release that a file lies in, zips among them, and its own."""
        return (*PurePosixPath(self.relative(entry.path)).parts, *PurePosixPath(entry.member).parts)

    def relative(self, path: str) -> str:
        """A file's path seen from the release's folder."""
        return Path(path).relative_to(self.folder).as_posix()

    def _add_zip(self, path: Path) -> None:
        try:
            archive = zipfile.ZipFile(path)
        except (*READING_ERRORS, ValueError, OverflowError, struct.error) as error:
            raise UserError(f"{path}: not a zip that can be read ({error}). {REMEDY}, or move it away") from None
        self._zips[str(path)] = archive
        for member in archive.infolist():
            if escapes(member.filename):
                raise UserError(f"{path}: member {member.filename!r} lies outside the archive. The file is not used")
            if not member.filename.endswith("/"):
                name = PurePosixPath(member.filename).name
                self._by_name[name].append(Entry(member.filename, str(path), member.file_size))


def _files(folder: Path) -> Iterator[Path]:
    """All plain files under a folder, without what was prepared there. Links to folders are followed, each once."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen or {MANIFEST, REPORT} <= set(names):
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (path for path in (Path(root, name) for name in sorted(names)) if path.is_file())


def escapes(member: str) -> bool:
    """Whether a member's name points outside the folder that the zip would be unpacked into, or nowhere."""
    return (
        not member
        or member.startswith("/")
        or "\\" in member
        or ":" in member[:2]
        or ".." in PurePosixPath(member).parts
    )
