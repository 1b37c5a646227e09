"""The one engine behind all preparers of images with texts: pieces of examples in, hash-ordered shards out.

A preparer names the files of a release as *scans*. The engine runs them over processes, each into sorted runs of pieces
(`pieces.py`); cuts the hash ring into ranges of about one shard; and writes each shard in one process, reading images
where they lie. Lists, counts and the index follow, and `<root>/<part>` appears whole:

    {train,validation}/               shards
    keys-{split}.txt.gz               the keys that were used, in the order of the hash ring
    lost-{split}.tsv.gz               every example that was listed and is not there: key, reason, name, detail
    unused.tsv.gz                     files and members that were passed over: reason, file, member
    manifest.json, report.json        what it was made of; the yield

Until then all work lies in `<root>/.<part>-preparing`, where each finished scan and shard appears whole. The same
command continues there after any interruption. Bytes depend on the release and the options, not on the processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import Field, PositiveInt
from rich.console import Console

from data_loaders.decoding import ImageError
from data_loaders.prepare.joining import join_shards
from data_loaders.prepare.originals import Originals, Problem, Report
from data_loaders.prepare.overlap import key_list, overlap
from data_loaders.prepare.pictures import Pictures
from data_loaders.prepare.pieces import KINDS, PARTITIONS, SPLITS, Piece, Pieces, RunWriter, Split, of_split
from data_loaders.prepare.release import REPORT
from data_loaders.prepare.workers import Workers, tick, workers
from data_loaders.prepare.yields import ImageTextReport, SplitCounts, concatenate, line_of
from data_loaders.progress import progress_bar
from data_loaders.shards import ring_hash, write_ordered_shards
from vlm.config import Config
from vlm.errors import UserError
from vlm.tasks.task import MANIFEST
from vlm.types import Record

FORMAT = 2  # raise it when equal releases and options give other bytes than before
MAX_SCANS = 256
Check = Callable[[Pieces, int, int], None]  # refuses what pieces of some partitions, first to before last, say together
PARTITIONS_AT_ONCE = 64  # that are checked in one go
KEYS_AHEAD = 256  # whose images are announced to the system before they are read
NUM_KEPT_PROBLEMS = 100  # for the printed report; the list has all
CONTINUE = "Run the same command again: what is finished is kept"


class ImageTextConfig(Config):
    """What all preparers of images with texts share."""

    short_side: PositiveInt | None = None  # None: images byte for byte; else JPEG of this short side, never enlarged
    quality: int = Field(90, ge=1, le=95)  # of re-encoded JPEG
    examples_per_shard: PositiveInt = 4096  # about; shards are ranges of the hash ring
    checksum_archives: bool = False  # SHA-256 of the tars too: they are read whole once more


@runtime_checkable
class Scan(Protocol):
    """A part of a release that one process reads in one go; pickled on its way there."""

    @property
    def inputs(self) -> Sequence[Path]:
        """Files and folders that begin the preparation anew when they change; a folder with any file in it."""
        ...

    def pieces(self, report: Report, scratch: Path) -> Iterator[Piece]:
        """In a fixed order. `scratch` is an empty folder, gone afterwards."""
        ...


@dataclass(frozen=True)
class Options:
    """What a user decides of any preparation. `max_missing`: the fraction of the listed examples that may be lost."""

    source: Path
    root: Path
    max_missing: float
    workers: int = 0  # 0: one a core
    progress: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.max_missing <= 1:
            raise UserError(f"--max-missing must be a fraction from 0 to 1. Got {self.max_missing}")
        if self.workers < 0:
            raise UserError(f"--workers must be at least 1. Got {self.workers}")
        if not self.source.is_dir():
            raise UserError(f"{self.source}: no such folder. --from names the folder with the files as downloaded")

    @property
    def num_workers(self) -> int:
        if self.workers or not hasattr(os, "sched_getaffinity"):
            return self.workers or os.cpu_count() or 1
        return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Plan:
    """What a preparer has decided."""

    preparer: str
    part: Literal["pairs", "unimodal"]
    config: ImageTextConfig
    scans: Sequence[Scan]
    licences: Mapping[str, str]
    tables: Sequence[str]  # files of the release whose SHA-256 the manifest states; paths inside it
    archives: Sequence[str] = ()  # the same, if `checksum_archives`; else their sizes alone
    expected: str = ""  # what an error says where no image is found
    validation: str = "add its images to the release"  # how to get that split, where there is none
    balanced: int | None = None  # images a class of train; 0, and in validation: as many as the smallest class has
    details: Mapping[str, Any] | None = None  # for the manifest
    chosen: str = ""  # what the preparer made of the folder; an error says it where too many images are lost
    check: Check | None = None  # before any image is read


def chunks(things: Sequence[Any], number: int = MAX_SCANS) -> Iterator[Sequence[Any]]:
    """Adjacent parts, at most `number`, of nearly one size."""
    number = min(number, len(things))
    for part in range(number):
        yield things[part * len(things) // number : (part + 1) * len(things) // number]


def prepare_image_text(plan: Plan, options: Options) -> None:
    """Write `<root>/<part>`; continue where an earlier call of the same plan was interrupted."""
    console = Console()
    target, work = options.root / plan.part, options.root / f".{plan.part}-preparing"
    identity = _identity(plan, options)
    if _is_there(target, plan, identity, options.max_missing):
        shutil.rmtree(work, ignore_errors=True)
        console.print(f"{target} is there already, of the same files and options: nothing to do", soft_wrap=True)
        return
    try:
        with _claimed(work, identity, console), workers(options.num_workers) as pool:
            _Preparation(plan, options, work, console, pool, identity).run(target)
        shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if error.filename and Path(os.fsdecode(error.filename)).is_relative_to(options.source):
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}). {CONTINUE}") from None
        raise UserError(f"{options.root}: cannot be written ({error}). Make room there. {CONTINUE}") from None
    console.print(f"prepared {target} (the whole report: {target / REPORT})", soft_wrap=True)


class _Preparation:
    """One plan on its way. Each stage leaves out what an interrupted call has finished."""

    def __init__(
        self,
        plan: Plan,
        options: Options,
        work: Path,
        console: Console,
        pool: Workers,
        identity: dict[str, str],
    ) -> None:
        self.plan, self.options, self.work, self.console = plan, options, work, console
        self.pool, self.identity = pool, identity

    def run(self, target: Path) -> None:
        scans = self.scan()
        buckets = self.cut(scans)
        self.check(scans)
        self.write(buckets)
        report = self.report(scans, buckets)
        self.refuse_too_many_lost(report, target, buckets, scans)
        self.publish(report, target, buckets, scans)
        report.show(self.console)
        if "validation" not in report.splits or not report.splits["validation"].used:
            self.console.print(
                f"no validation split was written, and training needs one: {self.plan.validation}", soft_wrap=True
            )

    def scan(self) -> list[Path]:
        """The folders of pieces, one a scan."""
        folders = [self.work / "scans" / f"{number:05d}" for number in range(len(self.plan.scans))]
        todo = [(scan, folder) for scan, folder in zip(self.plan.scans, folders, strict=True) if not folder.is_dir()]
        with progress_bar(self.options.progress, "entries") as bar:
            shown = bar.add_task("reading lists", total=None)
            self.pool.run(_scan, todo, lambda count: bar.advance(shown, count))
        return folders

    def cut(self, scans: list[Path]) -> list[_Bucket]:
        """The ranges of the hash ring that become shards."""
        counts = np.zeros((len(KINDS), PARTITIONS), dtype=np.int64)
        for folder in scans:
            counts += np.load(folder / "counts.npy", allow_pickle=False)
        wanted, images_here = int(counts[3:].sum()), int(counts[:3].sum())
        if not wanted or not images_here:
            lack = f"none of the {wanted:,} examples has an image here" if wanted else "no examples found"
            raise UserError(f"{self.options.source}: {lack}. {self.plan.expected}")
        pieces = Pieces.of(scans)
        config = self.plan.config
        pictures = Pictures(config.short_side, config.quality)
        buckets: list[_Bucket] = []
        for number, split in enumerate(SPLITS):
            listed, images = counts[3 + number], counts[0] + counts[1 + number]
            if not listed.sum():
                continue
            limits = (
                None
                if self.plan.balanced is None
                else class_limits(pieces, split, self.plan.balanced if split == "train" else 0)
            )
            for first, last in _ranges(np.minimum(listed, images), config.examples_per_shard):
                folder = self.work / "shards" / f"{len(buckets):05d}"
                expected = int(listed[first:last].sum())
                source, names_unlisted = self.options.source, not buckets or buckets[0].split == split
                buckets.append(
                    _Bucket(split, first, last, expected, pieces, source, folder, pictures, limits, names_unlisted)
                )
        return buckets

    def check(self, scans: list[Path]) -> None:
        """Once more after an interruption: it takes little beside the images."""
        if self.plan.check is None:
            return
        pieces = Pieces.of(scans)
        todo = [
            (self.plan.check, pieces, first, first + PARTITIONS_AT_ONCE)
            for first in range(0, PARTITIONS, PARTITIONS_AT_ONCE)
        ]
        with progress_bar(self.options.progress, "parts") as bar:
            shown = bar.add_task("checking", total=len(todo))
            self.pool.run(_check, todo, lambda count: bar.advance(shown, count))

    def write(self, buckets: list[_Bucket]) -> None:
        for leftover in (self.work / "shards").glob(".*"):  # of a call that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        todo = [bucket for bucket in buckets if not bucket.folder.is_dir()]
        with progress_bar(self.options.progress, "images") as bar:
            total = sum(bucket.expected for bucket in buckets)
            done = total - sum(bucket.expected for bucket in todo)
            shown = bar.add_task("images", total=total, completed=done)
            self.pool.run(_write, todo, lambda count: bar.advance(shown, count))
            bar.update(shown, completed=total)  # rows about one image were counted apart

    def report(self, scans: list[Path], buckets: list[_Bucket]) -> ImageTextReport:
        splits: dict[str, SplitCounts] = {}
        for bucket in buckets:
            counts = json.loads(bucket.beside(".json").read_text(encoding="utf-8"))
            splits.setdefault(bucket.split, SplitCounts()).add(SplitCounts.of(counts))
        problems: Counter[str] = Counter()
        named: list[Problem] = []
        for file in _unused(scans, buckets):
            with file.open(encoding="utf-8", newline="\n") as lines:
                for line in lines:
                    reason, path, member = line.rstrip("\n").split("\t")
                    problems[reason] += 1
                    if len(named) < NUM_KEPT_PROBLEMS:
                        named.append(Problem(path, member, reason))
        return ImageTextReport(self.plan.preparer, splits, problems, named)

    def refuse_too_many_lost(
        self, report: ImageTextReport, target: Path, buckets: list[_Bucket], scans: list[Path]
    ) -> None:
        """The shards stay in the work folder: a call that allows more losses continues there."""
        kept = target.with_name(f"{target.name}-refused")
        shutil.rmtree(kept, ignore_errors=True)
        share = report.lost_fraction
        none_used = not any(counts.used for counts in report.splits.values())
        if share <= self.options.max_missing and not none_used:
            return
        kept.mkdir()
        self.write_lists(report, kept, buckets, scans)
        report.show(self.console)
        if none_used:
            tables = f" that {', '.join(self.plan.tables)} list" if self.plan.tables else ""
            raise UserError(
                f"{self.options.source}: none of the {report.listed:,} examples{tables} can be used; {kept} says why. "
                f"Are the images those of this release? {self.plan.expected}"
            )
        chosen = f". {self.plan.chosen}" * bool(self.plan.chosen)
        raise UserError(
            f"{self.options.source}: {report.lost:,} of {report.listed:,} images are missing or unreadable "
            f"({share:.4%}); --max-missing {self.options.max_missing:g} allows fewer. {kept} names them all. Download "
            f"them again, or raise it; the shards are kept, and the same command continues{chosen}"
        )

    def write_lists(self, report: ImageTextReport, folder: Path, buckets: list[_Bucket], scans: list[Path]) -> None:
        for split in report.splits:
            mine = [bucket for bucket in buckets if bucket.split == split]
            header = line_of("key", "reason", "name", "detail")
            concatenate((b.beside(".lost") for b in mine), folder / f"lost-{split}.tsv.gz", header)
        concatenate(_unused(scans, buckets), folder / "unused.tsv.gz", line_of("reason", "file", "member"))
        _write_json(folder / REPORT, report.as_json())

    def publish(self, report: ImageTextReport, target: Path, buckets: list[_Bucket], scans: list[Path]) -> None:
        """Put everything in its place and then the whole folder in the place of a former one."""
        out, former = self.work / "out", self.work / "former"
        out.mkdir(exist_ok=True)
        splits: dict[str, Any] = {}
        for split in report.splits:
            mine = [bucket for bucket in buckets if bucket.split == split]
            header = join_shards([bucket.folder for bucket in mine], out / split)
            digest = concatenate((b.beside(".keys") for b in mine), out / f"keys-{split}.txt.gz")
            splits[split] = {
                "examples": header["examples"],
                "keys_sha256": digest,
                "shards": [shard["sha256"] for shard in header["shards"]],
            }
        self.write_lists(report, out, buckets, scans)
        lists = [key_list(out / f"keys-{split}.txt.gz", split) for split in report.splits]
        in_both = overlap(lists).common if len(lists) == 2 else 0
        if in_both:
            self.console.print(f"{in_both:,} examples are in train and in validation: the release lists them twice")
        manifest = {
            "format": FORMAT,
            "preparer": self.plan.preparer,
            "config": self.plan.config.model_dump(mode="json"),
            "identity": self.identity,
            "licences": dict(self.plan.licences),
            "sources": self.checksums(),
            "splits": splits,
            "in_both_splits": in_both,
            "lost": report.lost,
            "lost_fraction": report.lost_fraction,
            "max_missing": self.options.max_missing,
        } | dict(self.plan.details or {})
        _write_json(out / MANIFEST, manifest)
        if target.exists():
            shutil.rmtree(former, ignore_errors=True)
            os.replace(target, former)
        os.replace(out, target)

    def checksums(self) -> dict[str, dict[str, Any]]:
        """Size and, of tables at least, SHA-256 of the files of the release."""
        sources: dict[str, dict[str, Any]] = {}
        with progress_bar(self.options.progress, "MB") as bar:
            for file in (*self.plan.tables, *self.plan.archives):
                path = self.options.source / file
                sources[file] = entry = {"bytes": path.stat().st_size}
                if file in self.plan.tables or self.plan.config.checksum_archives:
                    shown = bar.add_task(f"checksum of {file}", total=entry["bytes"] / 10**6)
                    digest = hashlib.sha256()
                    with path.open("rb") as content:
                        while chunk := content.read(1 << 20):
                            digest.update(chunk)
                            bar.advance(shown, len(chunk) / 10**6)
                    sources[file] = entry | {"sha256": digest.hexdigest()}
        return sources


# --- In the worker processes -----------------------------------------------------------------------------------------


def _scan(task: tuple[Scan, Path]) -> None:
    """Write one scan's pieces into its folder, which appears whole."""
    scan, folder = task
    making = folder.with_name(f".{folder.name}")
    shutil.rmtree(making, ignore_errors=True)
    scratch = making / "scratch"
    scratch.mkdir(parents=True)
    runs = RunWriter(making)
    with (making / "unused.tsv").open("w", encoding="utf-8", newline="\n") as unused:
        for piece in scan.pieces(lambda p: _ignore(unused.write(line_of(p.reason, p.file, p.member))), scratch):
            runs.add(piece)
            tick()
        runs.finish()
    shutil.rmtree(scratch)
    os.replace(making, folder)


def _check(task: tuple[Check, Pieces, int, int]) -> None:
    check, pieces, first, last = task
    check(pieces, first, last)
    tick()


def _ignore(_: object) -> None:
    pass


@dataclass(frozen=True)
class _Bucket:
    """One shard to be: the examples of one split in a range of partitions."""

    split: Split
    first: int
    last: int
    expected: int  # listed examples, those that are listed twice counted twice
    pieces: Pieces
    source: Path
    folder: Path
    pictures: Pictures
    limits: Mapping[tuple[str, ...], int] | None  # class -> last hash that is taken
    names_unlisted: bool  # images that neither split lists, here and not in the other split's bucket

    def beside(self, suffix: str) -> Path:
        return self.folder.with_suffix(suffix)


def _unused(scans: Sequence[Path], buckets: Sequence[_Bucket]) -> list[Path]:
    return [*(scan / "unused.tsv" for scan in scans), *(bucket.beside(".unused") for bucket in buckets)]


def _write(bucket: _Bucket) -> None:
    """Write one bucket as a shard folder of one tar, which appears whole, with its lists beside it."""
    with closing(Originals(bucket.source)) as originals:
        write_ordered_shards(_records(bucket, originals), bucket.folder, examples_per_shard=1 << 62)


def _records(bucket: _Bucket, originals: Originals) -> Iterator[Record]:
    """The bucket's examples, once their image is there and decodes. The lists are written before the last is done:
    the folder appears after them."""
    counts = SplitCounts()
    with (
        bucket.beside(".keys").open("w") as keys,
        bucket.beside(".lost").open("w", encoding="utf-8", newline="\n") as lost,
        bucket.beside(".unused").open("w", encoding="utf-8", newline="\n") as unused,
    ):
        for key, of_both_splits, pieces in _read_ahead(bucket, originals):
            if not pieces:
                if bucket.names_unlisted and not any(piece.listed for piece in of_both_splits):
                    places = [piece.image for piece in of_both_splits if piece.image is not None]
                    unused.writelines(line_of("of no listed example", place.file, place.member) for place in places)
                continue
            tick()
            counts.listed += 1
            classes = _distinct(piece.classes for piece in pieces)
            if bucket.limits is not None and ring_hash(key) > bucket.limits.get(classes, -1):
                counts.left_out += 1
                continue
            labelled = next((piece for piece in pieces if piece.labels), None)
            captions = _distinct(piece.captions for piece in pieces)
            image, reason, detail = _image(pieces, originals, bucket.pictures)
            if not reason and not (captions or labelled or classes):
                reason = "no text"
            if reason:
                counts.lost_by_reason[reason] += 1
                name = next((piece.name for piece in pieces if piece.name), "")
                lost.write(line_of(key, reason, name, detail))
                continue
            counts.used += 1
            counts.captions += len(captions)
            counts.labelled += labelled is not None
            counts.with_classes += bool(classes)
            counts.further_copies += sum(piece.image is not None for piece in pieces) - 1
            keys.write(key + "\n")
            labels, scores = (labelled.labels, labelled.scores) if labelled else ((), ())
            yield Record(key, image, captions, labels, scores, classes)
    _write_json(bucket.beside(".json"), counts.as_json())


def _read_ahead(bucket: _Bucket, originals: Originals) -> Iterator[tuple[str, list[Piece], list[Piece]]]:
    """Each key of the bucket with its pieces, those of both splits and those of its own.

    Hash order jumps about in the archives. A disk that knows of many places at once takes a fraction of the time of one
    after the other.
    """
    coming: deque[tuple[str, list[Piece], list[Piece]]] = deque()
    for key, of_both_splits in bucket.pieces.joined(bucket.first, bucket.last):
        pieces = of_split(of_both_splits, bucket.split)
        for piece in pieces:
            if piece.image is not None:
                originals.expect(piece.image)
        coming.append((key, of_both_splits, pieces))
        if len(coming) > KEYS_AHEAD:
            yield coming.popleft()
    yield from coming


def _image(pieces: Sequence[Piece], originals: Originals, pictures: Pictures) -> tuple[bytes, str, str]:
    """The bytes of the first image that decodes, or the reason why the first of all does not, and where it lies."""
    problem = ("missing", "")
    for piece in pieces:
        if piece.image is not None:
            try:
                return pictures(originals.image(piece.image), piece.image.name), "", ""
            except ImageError as error:
                if not problem[1]:
                    problem = error.reason, piece.image.name
    return b"", *problem


def _distinct(texts: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for some in texts for text in some))


# --- Cutting the ring ------------------------------------------------------------------------------------------------


def _ranges(expected: np.ndarray, examples_per_shard: int) -> Iterator[tuple[int, int]]:
    """Ranges of partitions that hold about `examples_per_shard` each, and cover the ring."""
    num = max(1, round(int(expected.sum()) / examples_per_shard))
    ends = np.searchsorted(np.cumsum(expected), expected.sum() * np.arange(1, num) / num, side="left") + 1
    edges = sorted({0, *(int(end) for end in ends), PARTITIONS})
    yield from itertools.pairwise(edges)


def class_limits(pieces: Pieces, split: Split, per_class: int) -> dict[tuple[str, ...], int]:
    """For each class the hash of the last image that is taken, so that all have `per_class`; 0: as the smallest has."""

    def members(wanted: Callable[[tuple[str, ...], int], None]) -> None:
        for key, mine in pieces.by_key(0, PARTITIONS, split):
            wanted(_distinct(piece.classes for piece in mine), ring_hash(key))

    counts: Counter[tuple[str, ...]] = Counter()
    members(lambda classes, place: counts.update((classes,)))
    number = per_class or min(counts.values())
    short = [", ".join(classes) for classes, count in counts.items() if count < number]
    if short:
        raise UserError(f"images_per_class={number}: {len(short)} classes of {split} have fewer, such as {min(short)}")
    taken: Counter[tuple[str, ...]] = Counter()
    limits: dict[tuple[str, ...], int] = {}

    def take(classes: tuple[str, ...], place: int) -> None:
        if taken[classes] < number:
            taken[classes] += 1
            limits[classes] = place

    members(take)
    return limits


# --- Beginning and continuing ----------------------------------------------------------------------------------------


def _identity(plan: Plan, options: Options) -> dict[str, str]:
    """What decides the bytes: the options, and the release by names, sizes and times."""
    chosen = {"format": FORMAT, "preparer": plan.preparer, "part": plan.part}
    chosen |= {"config": plan.config.model_dump(mode="json"), "balanced": plan.balanced}
    found = []
    for scan in plan.scans:
        state = [(os.path.relpath(path, options.source), *_state(path)) for path in scan.inputs]
        found.append((type(scan).__name__, state))
    return {"options": _digest(chosen), "files": _digest(found)}


def _state(path: Path) -> tuple[int, int]:
    """Size and time of a file. Of a folder the number of its files, and a digest of their names, sizes and times.

    A folder's own time does not tell of a file that was written in place. Folders in it count where they are scanned.
    """
    if not path.is_dir():
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    number = total = 0
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir():
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:  # a link to nothing
                status = entry.stat(follow_symlinks=False)
            state = f"{status.st_size} {status.st_mtime_ns} ".encode() + os.fsencode(entry.name)
            number += 1
            total += int.from_bytes(hashlib.sha256(state).digest()[:16], "big")  # a sum: entries come in any order
    return number, total % 2**128


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)  # escaped to ASCII, as names of files need not be UTF-8
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_there(target: Path, plan: Plan, identity: dict[str, str], max_missing: float) -> bool:
    """Whether the folder was made of this plan. One that was not prepared, or by another preparer, is refused."""
    if not target.exists():
        return False
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        preparer, former, lost = manifest["preparer"], manifest["identity"], manifest["lost_fraction"]
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(
            f"{target}: is there, but was not prepared (no {MANIFEST}). Move it away, or choose another --to"
        ) from None
    if preparer != plan.preparer:
        raise UserError(f"{target}: holds {preparer}. Move it away, or choose another --to")
    if former == identity and lost > max_missing:
        raise UserError(
            f"{target}: is there already, of the same files and options, and lacks {lost:.4%} of its examples; "
            f"--max-missing {max_missing:g} allows fewer. Remove it, or raise it"
        )
    return bool(former == identity)


@contextmanager
def _claimed(work: Path, identity: dict[str, str], console: Console) -> Iterator[None]:
    """The work folder, for this process alone, emptied if it is of other files or options."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{work}: another command is preparing this. Wait for it") from None
        file = work / "identity.json"
        try:
            former = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            former = None
        if former is not None and former != identity:
            changed = " and ".join(name for name in identity if former.get(name) != identity[name])
            console.print(f"{work}: the {changed} have changed since; the work begun there starts anew", soft_wrap=True)
        if former != identity:
            for name in ("scans", "shards", "out"):
                shutil.rmtree(work / name, ignore_errors=True)
            _write_json(file, identity)
        elif (work / "scans").is_dir():
            done = sum(1 for _ in (work / "shards").glob("[0-9]*/index.json"))
            console.print(f"continuing: {done:,} shards are finished", soft_wrap=True)
        for name in ("scans", "shards"):
            (work / name).mkdir(exist_ok=True)
        yield


def _write_json(file: Path, value: Any) -> None:
    """The file appears whole."""
    making = file.with_name(f".{file.name}")
    making.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(making, file)
