"""WebDataset tar shards in hash order, with an index that finds any example by its place on the hash ring.

A shard folder holds `00000.tar`, `00001.tar`, ... and `index.json` + `index.safetensors`. Each example is two
adjacent members, `<key>.jpg` (or `.png`) and `<key>.json`; without an image it is `<key>.json` alone. Examples are
sorted by a hash of their key over the whole folder, so a random subset is a contiguous window and costs only its own
bytes (`vlm/supervision/subset.py`).

*Side shards* are such folders without images: what somebody made of the images of another folder, under the same keys
(machine labels with scores, generated captions). `made_by` in their `index.json` says who that was (`Index.made_by`).
What all examples hold together stands in `index.json` too (`Contents`), so that nobody reads every shard to learn it.
The tars are plain WebDataset tars: `webdataset.WebDataset(...)` reads them too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import mmap
import os
import re
import shutil
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from data_loaders.remote import RemoteFolder
from vlm.errors import UserError
from vlm.sharing import share
from vlm.supervision.subset import Positions, Window
from vlm.types import Damage, Record

FORMAT = 1
METADATA = ("captions", "labels", "scores", "classes")
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_-]{0,199}")  # no dots: WebDataset splits names at the first one


MAX_CLASSES = 100_000  # of a folder, in its index; classes in such numbers are nobody's targets, and memory is bounded
MAX_OPEN_SHARDS = 64  # a process may hold 1,024 files as a rule, and a large data set has more shards

NAME_BYTES = 100  # of the name in a tar header; of a longer one it holds the beginning
SIZE_FIELD = slice(124, 135)  # octal digits

Part = Literal["image", "json"]


class ShardError(UserError):
    """A shard folder that is missing, damaged or unsafe. The message names the file and the remedy."""


class DamagedError(ShardError):
    """Examples that cannot be read although their shard is there; by key, or by position where the key is unread."""

    def __init__(self, damages: dict[str | int, Damage]) -> None:
        first = next(iter(damages.values()))
        more = f" ({len(damages) - 1} more of this batch are damaged)" if len(damages) > 1 else ""
        super().__init__(f"{first}{more}. Prepare it again")
        self.damages = damages


def ring_hash(key: str | bytes) -> int:
    """The place of a key on the hash ring: the first 63 bits of its SHA-256."""
    data = key.encode() if isinstance(key, str) else key
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Index:
    """What `index.json` and `index.safetensors` say of a shard folder; arrays have one entry an example.

    The arrays are mapped, not read, and another process gets the folder's name in place of them: memory does not grow
    with the number of examples.
    """

    folder: Path
    remote: RemoteFolder | None  # where the shards are fetched from, if they do not lie in the folder
    shards: tuple[dict[str, Any], ...]  # file, examples, bytes, first_hash, last_hash, sha256
    hashes: np.ndarray  # int64 [n], ascending
    shard: np.ndarray  # int32 [n]
    image_offset: np.ndarray  # int64 [n]: where the image's bytes begin in the tar
    image_size: np.ndarray  # int32 [n]; 0 where there is no image
    json_offset: np.ndarray  # int64 [n]
    json_size: np.ndarray  # int32 [n]
    made_by: dict[str, Any] = field(default_factory=dict)
    """Who made the labels or captions; free in form, and empty where nobody wrote it. The ledger reads `model` (such as
    "open_clip:ViT-B-32/openai") and `seen`, counts by kind ({"pairs": 400000000, "labelled_images": null}; null:
    unknown). A labeller also writes `vocabulary`, and `of`, the fingerprint of the shards that it labelled."""
    classes: tuple[str, ...] | None = None  # see `Contents`; None: not written down
    complete: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def fingerprint(self) -> str:
        """12 hex digits that stand for the content of every shard."""
        return hashlib.sha256("".join(s["sha256"] for s in self.shards).encode()).hexdigest()[:12]

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (self.folder, self.remote, self.fingerprint)

    def cuts(self, positions: Positions) -> tuple[int, ...]:
        """The places in `positions` at which another shard begins; none if they do not ascend along the ring."""
        starts = np.cumsum([0, *(int(shard["examples"]) for shard in self.shards)])[:-1]
        if isinstance(positions, Window):
            cuts = (starts - positions.first) % max(len(self), 1)
        else:
            array = np.asarray(positions)
            cuts = np.searchsorted(array, starts) if (array[1:] > array[:-1]).all() else starts[:0]
        return tuple(np.unique(cuts[(cuts > 0) & (cuts < len(positions))]).tolist())


def _opened_again(folder: Path, remote: RemoteFolder | None, fingerprint: str) -> Index:
    index = open_index(folder, remote)
    if index.fingerprint != fingerprint:
        raise ShardError(f"{folder}: the shards were replaced while they were read. Start again")
    return index


ARRAYS = {
    "hashes": np.int64,
    "shard": np.int32,
    "image_offset": np.int64,
    "image_size": np.int32,
    "json_offset": np.int64,
    "json_size": np.int32,
}


@dataclass
class Contents:
    """What the examples of a folder hold together: `classes`, all that occur, and `complete`, what no example lacks.

    Complete are the `captions`, `labels` or `classes` of which every example has at least one, none of them blank and
    none with a negative score. The classes are None where they are more than `MAX_CLASSES`, or a part does not say.
    """

    classes: set[str] | None = field(default_factory=set)
    complete: set[str] = field(default_factory=lambda: {"captions", "labels", "classes"})

    def add(self, record: Record) -> None:
        self._join(record.classes)
        lacking = {name for name in self.complete if not _says_something(getattr(record, name))}
        self.complete -= lacking if min(record.scores, default=0) >= 0 else {*lacking, "labels"}

    def join(self, header: Mapping[str, Any]) -> None:
        """Add the examples of another folder, by its `index.json`."""
        self._join(header.get("classes"))
        self.complete &= set(header.get("complete", ()))

    def header(self) -> dict[str, Any]:
        """For `index.json`."""
        classes = {} if self.classes is None else {"classes": sorted(self.classes)}
        return classes | {"complete": sorted(self.complete)}

    def _join(self, classes: Iterable[str] | None) -> None:
        if self.classes is not None and classes is not None:
            self.classes.update(classes)
        if classes is None or len(self.classes or ()) > MAX_CLASSES:
            self.classes = None


def _says_something(texts: Sequence[str]) -> bool:
    """Whether there are texts and none of them is blank: then the one that a key picks is none."""
    return bool(texts) and all(text.strip() for text in texts)


def write_shards(
    records: Iterable[Record], folder: Path, examples_per_shard: int = 4096, made_by: Mapping[str, Any] | None = None
) -> Index:
    """Sort records by the hash of their key and write them as shards with an index.

    The folder appears whole or not at all. Keys must be unique and of letters, digits, `_` and `-`. All records are in
    memory at once; `write_ordered_shards` takes them one by one.
    """
    ordered = sorted(records, key=lambda record: ring_hash(record.key))
    return write_ordered_shards(ordered, folder, examples_per_shard, made_by)


def write_ordered_shards(
    records: Iterable[Record], folder: Path, examples_per_shard: int = 4096, made_by: Mapping[str, Any] | None = None
) -> Index:
    """Write records that come in the order of `ring_hash(record.key)`; one is in memory at a time, the rest on disk.

    The folder appears whole or not at all. `made_by`: see `Index`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        writer = _ShardWriter(partial, examples_per_shard)
        with contextlib.closing(writer):
            for record in _checked(records, folder):
                writer.add(record)
            writer.finish(made_by)
        partial.chmod(0o755)
        former = partial.with_name(f"{partial.name}-former")
        if folder.exists():
            os.replace(folder, former)
        os.replace(partial, folder)
        shutil.rmtree(former, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_index(folder)


class _ShardWriter:
    """Fills one tar after the other and remembers where each example lies."""

    def __init__(self, folder: Path, examples_per_shard: int) -> None:
        self.folder, self.examples_per_shard = folder, examples_per_shard
        self.shards: list[dict[str, Any]] = []
        self.contents = Contents()
        self.hashes: list[int] = []
        self.places: list[tuple[int, ...]] = []
        self._tar: Any = None
        self._keys: list[str] = []  # of the open tar

    def add(self, record: Record) -> None:
        if len(self._keys) == self.examples_per_shard:
            self._seal()
        if self._tar is None:
            self._open()
        places = {False: (0, 0)}  # of an image that is not there
        for name, data in _members(record):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o444
            self._tar.addfile(member, io.BytesIO(data))
            padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            places[name.endswith(".json")] = (self._tar.offset - padded, len(data))  # a header's length varies
            self._tar.members.clear()  # it would remember them all
        self.places.append((len(self.shards), *places[False], *places[True]))
        self._keys.append(record.key)
        self.contents.add(record)
        self.hashes.append(ring_hash(record.key))

    def finish(self, made_by: Mapping[str, Any] | None = None) -> None:
        """Close the last tar and write the index; an empty folder has one empty tar."""
        if not self.shards and self._tar is None:
            self._open()
        if self._tar is not None:
            self._seal()
        columns = np.array(self.places, dtype=np.int64).reshape(len(self.places), 5)
        arrays: dict[str, np.ndarray] = {
            "hashes": np.array(self.hashes, dtype=np.int64),
            "shard": columns[:, 0].astype(np.int32),
            "image_offset": columns[:, 1].copy(),
            "image_size": columns[:, 2].astype(np.int32),
            "json_offset": columns[:, 3].copy(),
            "json_size": columns[:, 4].astype(np.int32),
        }
        save_file(arrays, self.folder / "index.safetensors")
        share(self.folder / "index.safetensors")
        header: dict[str, Any] = {"format": FORMAT, "examples": len(self.hashes), "shards": self.shards}
        header |= self.contents.header()
        if made_by:
            header["made_by"] = dict(made_by)
        (self.folder / "index.json").write_text(json.dumps(header, indent=1))

    def close(self) -> None:
        """Let go of a tar that was left open by an error."""
        if self._tar is not None:
            self._tar.close()

    @property
    def _file(self) -> Path:
        return self.folder / f"{len(self.shards):05d}.tar"

    def _open(self) -> None:
        # The bytes are those of `webdataset.TarWriter`, whose import brings torch: half a gigabyte in each process.
        self._tar = tarfile.open(self._file, "w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def _seal(self) -> None:
        self._tar.close()
        keys, file = self._keys, self._file
        with file.open("rb") as content:
            checksum = hashlib.file_digest(content, "sha256").hexdigest()
        self.shards.append(
            {
                "file": file.name,
                "examples": len(keys),
                "bytes": file.stat().st_size,
                "first_hash": ring_hash(keys[0]) if keys else 0,
                "last_hash": ring_hash(keys[-1]) if keys else 0,
                "sha256": checksum,
            }
        )
        self._tar, self._keys = None, []


def open_index(folder: Path, remote: RemoteFolder | None = None) -> Index:
    """The index of a shard folder, checked as far as costs nothing; a place is checked again when it is read.

    With `remote` the folder holds the index alone, and the shards are fetched when they are asked for.
    """
    header_file, array_file = folder / "index.json", folder / "index.safetensors"
    for file in (header_file, array_file):
        try:
            os.stat(file)
        except (FileNotFoundError, NotADirectoryError):
            raise ShardError(f"{folder}: no shards here ({file.name} is missing). Prepare them first") from None
        except OSError as error:
            raise _unreadable(file, error) from None
    try:
        header = json.loads(header_file.read_text(encoding="utf-8"))
        version = header.get("format")
        shards = tuple(header["shards"]) if version == FORMAT else ()
        names = [str(shard["file"]) for shard in shards]
        numbers = np.array([[int(shard[name]) for name in NUMBERS] for shard in shards], dtype=np.int64)
        num_examples = int(header["examples"]) if version == FORMAT else 0
        made_by = dict(header.get("made_by", {}))
        _ = ["" + shard["sha256"] for shard in shards]
        classes, complete = (_texts(header, name) for name in ("classes", "complete"))
    except OSError as error:
        raise _unreadable(header_file, error) from None
    except Exception as error:
        raise ShardError(f"{header_file}: cannot be read ({error!r}). Prepare the shards again") from None
    if version != FORMAT:
        raise ShardError(f"{header_file}: format {version} is not {FORMAT}. Prepare the shards again")
    for name in names:
        if not re.fullmatch(r"[0-9]+\.tar", name):
            raise ShardError(f"{header_file}: shard name {name!r} is not NUMBER.tar")
    try:
        arrays = _mapped(array_file)
    except OSError as error:
        raise _unreadable(array_file, error) from None
    except Exception as error:
        raise ShardError(f"{array_file}: cannot be read ({error}). Prepare the shards again") from None
    if not _agree(arrays, num_examples, numbers.reshape(-1, len(NUMBERS)).T):
        raise ShardError(f"{array_file}: does not match index.json. Prepare the shards again")
    return Index(folder, remote, shards, **arrays, made_by=made_by, classes=classes, complete=complete or ())


def _texts(header: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    """An optional list of texts."""
    texts = header.get(name)
    if texts is None:
        return None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is no list of texts")
    return tuple(texts)


def _unreadable(file: Path | str, error: OSError) -> ShardError:
    at = f" at {error.filename}" if error.filename and str(error.filename) != str(file) else ""
    return ShardError(f"{file}: cannot be read ({error.strerror or error}{at}). Look at its permissions and its disk")


NUMBERS = ("examples", "bytes", "first_hash", "last_hash")


def _mapped(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file as they lie on disk; only what is used is read."""
    with safe_open(file, framework="numpy"):
        pass  # the library checks the header against the file's size
    with file.open("rb") as content:
        header_size = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(header_size))
        data = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind = np.dtype({"I64": np.int64, "I32": np.int32}[entry["dtype"]])
        count, start = int(np.prod(entry["shape"])), 8 + header_size + entry["data_offsets"][0]
        flat = np.frombuffer(data, kind, count, start) if count else np.empty(0, kind)
        arrays[name] = flat.reshape(entry["shape"])
    return arrays


def _agree(arrays: dict[str, np.ndarray], num_examples: int, numbers: np.ndarray) -> bool:
    """Whether the arrays have an entry an example, and the first and last example of each shard are where it says.

    What lies between is checked when it is read: a pass over all arrays would cost what mapping them saves.
    """
    if {name: array.dtype for name, array in arrays.items()} != ARRAYS:
        return False
    if any(array.shape != (num_examples,) for array in arrays.values()):
        return False
    counts, sizes, first_hash, last_hash = numbers
    ends = np.cumsum(counts)
    if (counts < 0).any() or (ends[-1] if len(ends) else 0) != num_examples:
        return False
    full = np.flatnonzero(counts)
    first, last = ends[full] - counts[full], ends[full] - 1
    hashes, shard = arrays["hashes"], arrays["shard"]
    agree = (hashes[first] == first_hash[full]) & (hashes[last] == last_hash[full]) & (first_hash <= last_hash)[full]
    agree &= (shard[first] == full) & (shard[last] == full)
    for row in (first, last):
        for part in ("image", "json"):
            offset, size = arrays[f"{part}_offset"][row], arrays[f"{part}_size"][row]
            agree &= (offset >= 0) & (size >= 0) & (offset <= sizes[full] - size)
    return bool(agree.all()) and bool((last_hash[full][:-1] < first_hash[full][1:]).all())


class ShardReader:
    """Random access to the examples of a shard folder by their position on the hash ring.

    Opens a tar when its first example is asked for and reads only the bytes of that example: places come from the
    index, and names inside a tar are never followed. Safe to hand to worker processes: open files are not carried over.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> file descriptor, least recently used first

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def __getitem__(self, position: int) -> Record:
        return self._record(position, self.image(position))

    def text(self, position: int) -> Record:
        """The example without its image, whose bytes are not read."""
        return self._record(position, b"")

    def texts(self, skip_damaged: bool = False) -> Iterator[Record]:
        """All examples without their images."""
        for position in range(len(self)):
            try:
                yield self.text(position)
            except DamagedError:
                if not skip_damaged:
                    raise

    def classes(self, skip_damaged: bool = False) -> set[str]:
        """All classes that occur; where the index does not list them, every example is read."""
        if self.index.classes is not None:
            return set(self.index.classes)
        return {name for record in self.texts(skip_damaged) for name in record.classes}

    def image(self, position: int) -> bytes:
        """The encoded image of the example, empty if it has none.

        The header that lies before it in the tar comes with the same read, so that an index that leads to the image of
        another example is an error and no wrong pair.
        """
        number, offset, size = self._place(position, "image")
        if not size:
            return b""
        start = max(offset - tarfile.BLOCKSIZE, 0)
        data = self._pread(number, size + offset - start, start, position, "image")
        if offset - start != tarfile.BLOCKSIZE or not self._is_header_of(position, number, data, offset, size):
            raise self._damaged(position, "image", "is not its image: the index does not match the shard")
        return data[tarfile.BLOCKSIZE :]

    def _is_header_of(self, position: int, number: int, header: bytes, offset: int, size: int) -> bool:
        """Whether this header in front of an image is that of the example at `position`.

        By the hash of the name, which the index holds for every example: it takes no key, and a microsecond.
        """
        name, written_size = header[:NAME_BYTES], header[SIZE_FIELD]
        if not written_size.isdigit() or int(written_size, 8) != size:
            return False
        if b"\0" not in name:  # cut off: the whole name stands in the block before, as a record of the PAX form
            former = self._pread(number, tarfile.BLOCKSIZE, max(offset - 2 * tarfile.BLOCKSIZE, 0), position, "image")
            record = re.match(rb"[0-9]+ path=([^\n\0]+)\n", former)
            if record is not None and record[1].startswith(name):
                name = record[1]
        key, _, suffix = name.rstrip(b"\0").partition(b".")
        return suffix in (b"jpg", b"png") and ring_hash(key) == int(self.index.hashes[position])

    def _record(self, position: int, image: bytes) -> Record:
        metadata = self._read(position, "json")
        try:
            values = json.loads(metadata)
            record = Record(values["key"], image, **{name: tuple(values.get(name, ())) for name in METADATA})
            place = ring_hash(record.key)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(position, "json", f"is damaged ({error})") from None
        if place != int(self.index.hashes[position]):
            raise self._damaged(position, "json", f"is damaged (the key {record.key[:80]!r} does not belong here)")
        return record

    def __iter__(self) -> Iterator[Record]:
        return (self[position] for position in range(len(self)))

    def position(self, key: str) -> int:
        """Where the example of this key lies; KeyError if it is not here."""
        place = ring_hash(key)
        at = int(np.searchsorted(self.index.hashes, place))
        if at < len(self) and int(self.index.hashes[at]) == place:
            return at
        raise KeyError(key)

    def damage(self, position: int, part: Part, reason: str) -> Damage:
        """What is wrong with a part of an example, with the shard and the member that hold it."""
        shard = self.index.shards[int(self.index.shard[position])]["file"]
        return Damage(str(self._location(shard)), position, self._member(position, part), reason)

    def read_ahead(self, positions: Sequence[int]) -> None:
        """Begin to fetch the shards of these positions, where they are remote."""
        if self.index.remote is not None:
            numbers = dict.fromkeys(self.index.shard[np.asarray(positions)].tolist())
            shards = self.index.shards
            self.index.remote.read_ahead([shards[number] for number in numbers if 0 <= number < len(shards)])

    def _damaged(self, position: int, part: Part, reason: str) -> DamagedError:
        return DamagedError({position: self.damage(position, part, reason)})

    def _location(self, shard: str) -> str | Path:
        return self.index.folder / shard if self.index.remote is None else self.index.remote.url(shard)

    def _member(self, position: int, part: Part) -> str:
        """What the tar calls a part of an example; empty where the tar cannot be asked."""
        try:
            number, offset, _ = self._place(position, part)
            header = os.pread(self._open(number), tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
            return tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace").name[:300]
        except (ShardError, OSError, tarfile.HeaderError):
            return ""

    def _place(self, position: int, part: Part) -> tuple[int, int, int]:
        """Shard number, offset and size, once they are known to lie inside the shard."""
        index = self.index
        offsets, sizes = (
            (index.image_offset, index.image_size) if part == "image" else (index.json_offset, index.json_size)
        )
        number, offset, size = int(index.shard[position]), int(offsets[position]), int(sizes[position])
        if not (
            0 <= number < len(index.shards) and offset >= 0 and 0 <= size <= index.shards[number]["bytes"] - offset
        ):
            file = index.folder / "index.safetensors"
            raise DamagedError({position: Damage(str(file), position, "", "lies outside its shard")})
        return number, offset, size

    def _read(self, position: int, part: Part) -> bytes:
        number, offset, size = self._place(position, part)
        return self._pread(number, size, offset, position, part)

    def _pread(self, number: int, size: int, offset: int, position: int, part: Part) -> bytes:
        try:
            data = os.pread(self._open(number), size, offset)
        except OSError as error:
            if error.errno == errno.EIO:  # these bytes of the disk; anything else concerns the whole shard
                raise self._damaged(position, part, f"cannot be read ({error.strerror})") from None
            raise self._unreadable(number, error) from None
        if len(data) != size:
            raise self._damaged(position, part, "ends early: the shard is truncated")
        return data

    def _open(self, number: int) -> int:
        """The file descriptor of a shard."""
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        shard, remote = self.index.shards[number], self.index.remote
        while len(self._files) >= MAX_OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        if remote is not None:
            self._files[number] = remote.open_shard(shard)
        else:
            file = self.index.folder / str(shard["file"])
            try:
                self._files[number] = os.open(file, os.O_RDONLY)
            except FileNotFoundError:
                raise ShardError(f"{file}: the index names this shard, but it is missing") from None
            except OSError as error:
                raise self._unreadable(number, error) from None
        return self._files[number]

    def _unreadable(self, number: int, error: OSError) -> ShardError:
        return _unreadable(self._location(self.index.shards[number]["file"]), error)


def _checked(records: Iterable[Record], folder: Path) -> Iterator[Record]:
    """The records, once their keys are known to be safe, unique and in the ring's order."""
    former, place = "", -1
    for record in records:
        if not KEY_PATTERN.fullmatch(record.key):
            raise ShardError(f"{folder}: key {record.key!r} must be letters, digits, '_' or '-', 200 at most")
        if ring_hash(record.key) == place:
            raise ShardError(f"{folder}: keys {former!r} and {record.key!r} collide; keys must be unique")
        if ring_hash(record.key) < place:
            raise ValueError(f"{record.key!r} comes after {former!r}, but lies before it on the hash ring")
        former, place = record.key, ring_hash(record.key)
        yield record


def _members(record: Record) -> list[tuple[str, bytes]]:
    """(name, content) of what stands in the tar for a record: its image, if it has one, and the rest as JSON."""
    suffix = "png" if record.image[:4] == b"\x89PNG" else "jpg"
    image = [(f"{record.key}.{suffix}", record.image)] if record.image else []
    metadata = {"key": record.key} | {name: list(getattr(record, name)) for name in METADATA if getattr(record, name)}
    return sorted([*image, (f"{record.key}.json", json.dumps(metadata, ensure_ascii=False).encode())])
