"""WebDataset tar shards in hash order, with an index that finds any example by its place on the hash ring.

A shard folder holds `00000.tar`, `00001.tar`, ... and `index.json` + `index.safetensors`. Each example is two
adjacent members, `<key>.jpg` (or `.png`) and `<key>.json`; without an image it is `<key>.json` alone. Examples are
sorted by a hash of their key over the whole folder, so a random subset is a contiguous window and costs only its own
bytes (`vlm/supervision/subset.py`).

*Side shards* are such folders without images: what somebody made of the images of another folder, under the same keys
(machine labels with scores, generated captions). `made_by` in their `index.json` says who that was (`Index.made_by`).
The tars are plain WebDataset tars: `webdataset.WebDataset(...)` reads them too.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from vlm.errors import UserError
from vlm.types import Record

FORMAT = 1
METADATA = ("captions", "labels", "scores", "classes")
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_-]{0,199}")  # no dots: WebDataset splits names at the first one


class ShardError(UserError):
    """A shard folder that is missing, damaged or unsafe. The message names the file and the remedy."""


def ring_hash(key: str) -> int:
    """The place of a key on the hash ring: the first 63 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Index:
    """What `index.json` and `index.safetensors` say of a shard folder; arrays have one entry an example."""

    folder: Path
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

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def fingerprint(self) -> str:
        """12 hex digits that stand for the content of every shard."""
        return hashlib.sha256("".join(s["sha256"] for s in self.shards).encode()).hexdigest()[:12]


ARRAYS = ("hashes", "shard", "image_offset", "image_size", "json_offset", "json_size")


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
        header: dict[str, Any] = {"format": FORMAT, "examples": len(self.hashes), "shards": self.shards}
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


def open_index(folder: Path) -> Index:
    """Read a shard folder's index; the tars themselves are not opened."""
    header_file, array_file = folder / "index.json", folder / "index.safetensors"
    for file in (header_file, array_file):
        if not file.is_file():
            raise ShardError(f"{folder}: no shards here ({file.name} is missing). Prepare them first")
    try:
        header = json.loads(header_file.read_text(encoding="utf-8"))
        version = header.get("format")
        shards = tuple(header["shards"]) if version == FORMAT else ()
        names, sizes = [str(shard["file"]) for shard in shards], [int(shard["bytes"]) for shard in shards]
        num_examples = int(header["examples"]) if version == FORMAT else 0
        made_by = dict(header.get("made_by", {}))
    except Exception as error:
        raise ShardError(f"{header_file}: cannot be read ({error!r}). Prepare the shards again") from None
    if version != FORMAT:
        raise ShardError(f"{header_file}: format {version} is not {FORMAT}. Prepare the shards again")
    for name in names:
        if not re.fullmatch(r"[0-9]+\.tar", name):
            raise ShardError(f"{header_file}: shard name {name!r} is not NUMBER.tar")
    try:
        arrays = load_file(array_file)
    except Exception as error:
        raise ShardError(f"{array_file}: cannot be read ({error}). Prepare the shards again") from None
    if not _agree(arrays, num_examples, np.array(sizes, dtype=np.int64)):
        raise ShardError(f"{array_file}: does not match index.json. Prepare the shards again")
    return Index(folder, shards, **arrays, made_by=made_by)


def _agree(arrays: dict[str, np.ndarray], num_examples: int, shard_bytes: np.ndarray) -> bool:
    """Whether the arrays have an entry an example, in the ring's order, and every place lies inside its shard."""
    if set(arrays) != set(ARRAYS):
        return False
    if any(array.shape != (num_examples,) or array.dtype.kind != "i" for array in arrays.values()):
        return False
    shard = arrays["shard"]
    if any((array < 0).any() for array in arrays.values()) or (shard >= len(shard_bytes)).any():
        return False
    ends = shard_bytes[shard]
    inside = [(arrays[f"{part}_offset"] <= ends - arrays[f"{part}_size"]).all() for part in ("image", "json")]
    return all(inside) and bool((np.diff(arrays["hashes"]) > 0).all())


class ShardReader:
    """Random access to the examples of a shard folder by their position on the hash ring.

    Opens a tar when its first example is asked for and reads only the bytes of that example. Safe to hand to
    worker processes: open files are not carried over.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._files: dict[int, int] = {}  # shard number -> file descriptor

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "_files": {}}

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def __getitem__(self, position: int) -> Record:
        return self._record(position, self.image(position))

    def text(self, position: int) -> Record:
        """The example without its image, whose bytes are not read."""
        return self._record(position, b"")

    def image(self, position: int) -> bytes:
        """The encoded image of the example, and nothing else."""
        index = self.index
        return self._read(position, int(index.image_offset[position]), int(index.image_size[position]))

    def _record(self, position: int, image: bytes) -> Record:
        index = self.index
        metadata = self._read(position, int(index.json_offset[position]), int(index.json_size[position]))
        try:
            values = json.loads(metadata)
            return Record(values["key"], image, **{name: tuple(values.get(name, ())) for name in METADATA})
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{self._file(position)}: example {position} is damaged ({error})") from None

    def __iter__(self) -> Iterator[Record]:
        return (self[position] for position in range(len(self)))

    def position(self, key: str) -> int:
        """Where the example of this key lies; KeyError if it is not here."""
        place = ring_hash(key)
        at = int(np.searchsorted(self.index.hashes, place))
        if at < len(self) and int(self.index.hashes[at]) == place:
            return at
        raise KeyError(key)

    def _file(self, position: int) -> Path:
        return self.index.folder / str(self.index.shards[int(self.index.shard[position])]["file"])

    def _read(self, position: int, offset: int, size: int) -> bytes:
        number = int(self.index.shard[position])
        if number not in self._files:
            try:
                self._files[number] = os.open(self._file(position), os.O_RDONLY)
            except FileNotFoundError:
                raise ShardError(f"{self._file(position)}: the index names this shard, but it is missing") from None
        data = os.pread(self._files[number], size, offset)
        if len(data) != size:
            raise ShardError(f"{self._file(position)}: truncated, example {position} ends early. Prepare it again")
        return data


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
