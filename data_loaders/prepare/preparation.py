"""What all tasks' preparers share: copy the official files, write the images as shards, report and sign for it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from data_loaders.decoding import ImageError, decode_image
from data_loaders.prepare.release import REMEDY, REPORT, Entry, Release
from data_loaders.prepare.report import SplitYield, YieldReport
from data_loaders.progress import progress_bar
from data_loaders.shards import ring_hash, write_ordered_shards
from vlm.errors import UserError
from vlm.records import READING_ERRORS, OfficialFile, shown
from vlm.tasks.task import MANIFEST, MISSING_IMAGES
from vlm.types import Question, Record

FORMAT = 1
MAX_IMAGE_BYTES = 1 << 28  # 256 MB; the largest photographs of these releases are below 50 MB
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Options:
    """What a user decides of any preparation. `max_missing`: the fraction of each split's images that may be lost."""

    source: Path
    root: Path
    max_missing: float = 0.0
    progress: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.max_missing <= 1:
            raise UserError(f"--max-missing must be a fraction from 0 to 1. Got {self.max_missing}")


class Preparation:
    """One task's release on its way to `<root>/<task>`, which appears whole or not at all.

    Lost images (missing, or not to be decoded) up to `max_missing` are named in `missing_images.json`: questions about
    them are left out of training, but stay in every evaluation, where a grey image stands in. To drop them there
    would make the score one of an easier set under the same name.
    """

    def __init__(self, task: str, options: Options, release: Release, folder: Path, console: Console) -> None:
        self.options, self.release, self.folder, self.console = options, release, folder, console
        self.report = YieldReport(task)
        self.copied: dict[str, dict[str, Any]] = {}  # official name -> source, bytes, sha256, records
        self.asked: dict[str, Counter[tuple[str, ...]]] = {}  # split -> images of a question -> questions
        self.owners: dict[str, str] = {}  # question -> the file of the one split that has it

    @property
    def refusal(self) -> Path:
        """Where the report of a preparation lies that lost too many images, beside the folder that it did not make."""
        return self.options.root / f"{self.report.task}-{REPORT}"

    def copy(self, entries: list[Entry], to: str) -> OfficialFile:
        """Copy a file byte for byte to `to`; what is returned reads the copy under the name of its source."""
        entry = self.release.only(entries)
        target = self.folder / to
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        official = self.release.official(entry)
        with official.binary() as source, target.open("wb") as copy, self._bar("MB") as bar:
            shown = bar.add_task(target.name, total=entry.size / 10**6)
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                try:
                    copy.write(chunk)
                except OSError as error:  # not the source's fault
                    raise UserError(f"{target}: cannot be written ({error.strerror})") from None
                bar.advance(shown, len(chunk) / 10**6)
        source_name = self.release.relative(entry.path) + (f": {entry.member}" if entry.member else "")
        self.report.files[to] = source_name
        self.copied[to] = {"source": source_name, "bytes": entry.size, "sha256": digest.hexdigest()}
        return OfficialFile(entry.name, lambda: io.BufferedReader(_ShownFile(target, self._bar("MB"))), REMEDY)

    def splits(
        self, asked: Sequence[str] | None, files: Mapping[str, str], find: Callable[[str], list[Entry]]
    ) -> Iterator[str]:
        """The splits to prepare: those that are asked for, else those whose file is there. The others' are absent.

        `files` says which file a split needs.
        """
        here = self.release.folder
        present = [split for split, file in files.items() if find(file)]
        for split in asked or ():
            if split not in present:
                raise UserError(f"{here}: {files[split]}, which split {split} needs, is not here")
        if not present:
            raise UserError(f"{here}: none of {', '.join(files.values())} is here, unpacked or in a zip")
        for split, file in files.items():
            if split in (asked or present):
                yield split
            else:
                self.absent(file)

    def absent(self, name: str) -> None:
        self.report.files[name] = "absent"

    def check(self, to: str, records: Iterable[Any]) -> None:
        """Read a copied file to its end, and remember how many records it holds."""
        self.copied[to]["records"] = sum(1 for _ in records)

    def ask(self, split: str, questions: Iterable[Question], training: bool = False) -> None:
        """Read a split's questions to their end; their images are wanted."""
        wanted = self.asked.setdefault(split, Counter())
        entry = self.report.splits.setdefault(split, SplitYield(training))
        before = entry.questions
        for question in questions:
            wanted[question.image_keys] += 1
            entry.questions += 1
        if entry.questions == before:
            raise UserError(f"{self.options.source}: split {split} holds no question. Download its file again")

    def apart(self, file: OfficialFile, questions: Iterable[Question]) -> Iterator[Question]:
        """The questions of a split that shares none with another; else what is learnt would be what is scored."""
        for question in questions:
            owner = self.owners.setdefault(question.id, file.name)
            if owner != file.name:
                raise file.error(f"question {shown(question.id)} is one of {owner} too; one of them is another split's")
            yield question

    def write_images(self) -> None:
        """Write all wanted images as shards, in the order of the hash ring, each once it is known to decode."""
        keys = sorted({key for questions in self.asked.values() for pair in questions for key in pair}, key=ring_hash)
        found = self.release.images(set(keys))
        self.report.images = len(keys)
        self.report.missing = sorted(key for key in keys if key not in found)
        self._refuse_too_many_lost()  # before hours are spent on the others
        for key, entries in found.items():
            self.report.duplicates += len(entries) - 1
            if any(entry.size != entries[0].size for entry in entries):
                self.report.differing_duplicates.append(key)
        present = [key for key in keys if key in found]
        with self._bar("images") as bar:
            shown = bar.add_task("images", total=len(present))

            def records() -> Iterator[Record]:
                loaded = ordered_map(
                    lambda key: self._load(found[key]), present, num_workers=min(8, os.cpu_count() or 1)
                )
                for key, (data, reason) in zip(present, loaded, strict=True):
                    bar.advance(shown)
                    if reason:
                        self.report.unreadable[key] = reason
                    else:
                        yield Record(key, data)

            index = write_ordered_shards(records(), self.folder / "images")
        self.report.opened = True
        self._refuse_too_many_lost()
        self.images = {"examples": len(index), "fingerprint": index.fingerprint, "shards": list(index.shards)}

    def finish(self, licences: dict[str, str]) -> None:
        """Write the list of lost images, the report and the manifest."""
        manifest = {
            "format": FORMAT,
            "task": self.report.task,
            "licences": licences,
            "questions": {name: entry.questions for name, entry in self.report.splits.items()},
            "files": self.copied,
            "archives": self._archives(),
            "images": self.images,
            "lost_images": len(self.report.lost),
            "max_missing": self.options.max_missing,
        }
        for name, content in (
            (MISSING_IMAGES, sorted(self.report.lost)),
            (REPORT, self.report.as_json()),
            (MANIFEST, manifest),
        ):
            (self.folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")

    def _load(self, entries: list[Entry]) -> tuple[bytes, str]:
        """The bytes of the first of these files that decodes; otherwise the reason why the first does not."""
        reasons = []
        for entry in entries:
            data, reason = self._checked(entry)
            if not reason:
                return data, ""
            reasons.append(reason)
        return b"", reasons[0]

    def _checked(self, entry: Entry) -> tuple[bytes, str]:
        if entry.size == 0:
            return b"", "empty file"
        if entry.size > MAX_IMAGE_BYTES:
            return b"", "too many bytes"
        try:
            with self.release.open(entry) as content:
                data = content.read()
        except READING_ERRORS:
            return b"", "cannot be read"
        try:
            decode_image(data, entry.name)
        except ImageError as error:
            return b"", error.reason
        return data, ""

    def _refuse_too_many_lost(self) -> None:
        report = self.report
        report.count(self.asked)
        worst = max(report.splits, key=lambda split: report.splits[split].lost_fraction)
        entry = report.splits[worst]
        if entry.lost_fraction <= self.options.max_missing:
            return
        report.show(self.console)
        self.refusal.write_text(json.dumps(report.as_json(), indent=1, ensure_ascii=False), encoding="utf-8")
        lost = "missing or unreadable" if report.opened else "missing"
        told = "names them all" if report.opened else "names them; the others were not opened yet"
        raise UserError(
            f"{self.options.source}: {entry.lost:,} of the {entry.images:,} images of {worst} are {lost} "
            f"({entry.lost_fraction:.4%}), {len(report.lost):,} of {report.images:,} in all, such as "
            f"{min(report.lost)}; --max-missing {self.options.max_missing:g} allows fewer. {self.refusal} {told}. "
            "Download them again, or allow more"
        )

    def _archives(self) -> dict[str, dict[str, Any]]:
        """Size and checksum of every zip of the release."""
        archives = {}
        for path in self.release.archives:
            size = os.path.getsize(path)
            with open(path, "rb") as content, self._bar("MB") as bar:
                shown = bar.add_task(f"checksum of {os.path.basename(path)}", total=size / 10**6)
                digest = hashlib.sha256()
                while chunk := content.read(1 << 20):
                    digest.update(chunk)
                    bar.advance(shown, len(chunk) / 10**6)
            archives[self.release.relative(path)] = {"bytes": size, "sha256": digest.hexdigest()}
        return archives

    def _bar(self, unit: str) -> Progress:
        return progress_bar(self.options.progress, unit)


class _ShownFile(io.FileIO):
    """A file that shows how much of it was read."""

    def __init__(self, path: Path, bar: Progress) -> None:
        super().__init__(path)
        self.bar = bar
        self.shown = bar.add_task(f"checking {path.name}", total=path.stat().st_size / 10**6)
        bar.start()

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        self.bar.advance(self.shown, count / 10**6)
        return count

    def close(self) -> None:
        self.bar.stop()
        super().close()


@contextmanager
def preparation(task: str, options: Options, licences: dict[str, str]) -> Iterator[Preparation]:
    """A preparation of `<root>/<task>`: the body copies and asks; then the images and reports are written.

    A folder that is there already is replaced only if it was prepared before.
    """
    target = options.root / task
    if target.exists() and not (target / MANIFEST).is_file():
        raise UserError(
            f"{target}: is there, but was not prepared (no {MANIFEST}). Move it away, or choose another --to"
        )
    if target.resolve() in (options.source.resolve(), *options.source.resolve().parents):
        raise UserError(f"{target}: would replace the release in {options.source}. Choose another --to")
    console = Console()
    with Release(options.source) as release:
        try:
            options.root.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{task}-", dir=options.root))
        except OSError as error:
            raise UserError(f"{options.root}: cannot be written ({error.strerror}). Choose another --to") from None
        try:
            work = Preparation(task, options, release, partial, console)
            yield work
            work.write_images()
            work.finish(licences)
            partial.chmod(0o755)
            former = partial.with_name(f"{partial.name}-former")
            if target.exists():
                os.replace(target, former)
            os.replace(partial, target)
            shutil.rmtree(former, ignore_errors=True)
            work.refusal.unlink(missing_ok=True)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):  # the release's own faults are named as such before
                raise UserError(f"{target}: cannot be written ({error})") from None
            raise
    work.report.show(console)
    console.print(f"prepared {target} (the whole report: {target / REPORT})", soft_wrap=True)


def ordered_map(work: Callable[[T], U], things: Iterable[T], num_workers: int) -> Iterator[U]:
    """`map` on threads, in order; at most two results a worker wait."""
    with ThreadPoolExecutor(num_workers) as pool:
        waiting: deque[Future[U]] = deque()
        try:
            for thing in things:
                waiting.append(pool.submit(work, thing))
                if len(waiting) >= 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
