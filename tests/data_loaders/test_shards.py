"""Shards give back what was written, in hash order, and a damaged or hostile folder is one clear error."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import pickle
import random
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from safetensors.numpy import load_file, save_file

from data_loaders.shards import (
    Contents,
    DamagedError,
    Index,
    ShardError,
    ShardReader,
    open_index,
    ring_hash,
    write_ordered_shards,
    write_shards,
)
from vlm.types import Record

COUNT = 10


def encoded(kind: str, color: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(data, kind)
    return data.getvalue()


def make_records() -> list[Record]:
    """Photos and drawings, with much and with nothing known about them."""
    rich = Record(
        key="rich_1-A",
        image=encoded("JPEG", "red"),
        captions=("a “red” café", "two\nlines, and a comma"),
        labels=("red", "café"),
        scores=(0.75, 0.125),
        classes=("color",),
    )
    plain = [Record(f"plain-{n}", encoded("PNG", "blue")) for n in range(COUNT - 2)]
    return [rich, *plain, Record("empty")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(make_records(), tmp_path / "shards", examples_per_shard=4)
    return tmp_path / "shards"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# --- Round trip ------------------------------------------------------------------------------------------------------


def test_records_come_back_as_they_were_in_hash_order(folder: Path) -> None:
    expected = sorted(make_records(), key=lambda record: ring_hash(record.key))
    reader = ShardReader(open_index(folder))
    assert list(reader) == expected
    assert len(reader) == COUNT
    assert [reader[number] for number in (9, 0, 5)] == [expected[number] for number in (9, 0, 5)]


def test_colleagues_may_read_all_of_a_folder(folder: Path) -> None:
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_the_index_says_where_each_key_lies(folder: Path) -> None:
    reader = ShardReader(open_index(folder))
    assert [reader.position(record.key) for record in reader] == list(range(COUNT))
    for stranger in ("stranger", "zebra", "plain-99"):
        with pytest.raises(KeyError, match=stranger):
            reader.position(stranger)


def test_hashes_ascend_and_the_index_describes_each_shard(folder: Path) -> None:
    index = open_index(folder)
    assert (np.diff(index.hashes) > 0).all()
    assert [shard["examples"] for shard in index.shards] == [4, 4, 2]
    for number, shard in enumerate(index.shards):
        mine = index.hashes[index.shard == number]
        assert (shard["first_hash"], shard["last_hash"]) == (mine[0], mine[-1])
        assert shard["bytes"] == (folder / shard["file"]).stat().st_size


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_webdataset_reads_the_shards(folder: Path) -> None:
    files = [str(file) for file in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(files, shardshuffle=False, empty_check=False))
    gc.collect()
    records = {record.key: record for record in make_records()}
    assert [sample["__key__"] for sample in samples] == sorted(records, key=ring_hash)
    for sample in samples:
        record = records[sample["__key__"]]
        assert sample.get("png" if record.key.startswith("plain") else "jpg", b"") == record.image
        assert tuple(json.loads(sample["json"]).get("captions", ())) == record.captions


def test_side_shards_hold_texts_alone_and_say_who_made_them(tmp_path: Path) -> None:
    records = [
        Record(f"key-{n}", labels=("red", "round"), scores=(0.5, 0.25), captions=(f"no. {n}",)) for n in range(9)
    ]
    made_by = {"model": "timm:resnet18.a1_in1k", "seen": {"pairs": 0, "labelled_images": None}}
    write_shards(records, tmp_path / "side", examples_per_shard=4, made_by=made_by)
    index = open_index(tmp_path / "side")
    assert index.made_by == made_by
    assert not index.image_size.any()
    reader = ShardReader(index)
    assert [reader.text(reader.position(record.key)) for record in records] == records
    members = []
    for file in (tmp_path / "side").glob("*.tar"):
        with tarfile.open(file) as tar:
            members += tar.getnames()
    assert sorted(members) == sorted(f"{record.key}.json" for record in records)
    assert open_index(tmp_path / "side").fingerprint == write_shards(records, tmp_path / "again", 4).fingerprint
    assert open_index(tmp_path / "again").made_by == {}


def test_the_index_says_which_classes_occur_and_what_no_example_lacks(tmp_path: Path) -> None:
    records = [Record(f"key-{n}", captions=("a text",), labels=("x",), classes=(f"no. {n % 3}",)) for n in range(9)]
    reader = ShardReader(write_shards(records, tmp_path / "all", 4))
    assert reader.index.classes == ("no. 0", "no. 1", "no. 2")
    assert reader.index.complete == ("captions", "classes", "labels")
    changed = {"captions": ("a text", " "), "labels": ("x",), "scores": (-0.5,)}
    index = write_shards([*records, Record("more", **changed)], tmp_path / "less")  # type: ignore[arg-type]  # a dict of several kinds
    assert (index.classes, index.complete) == (reader.index.classes, ())


def test_a_folder_that_is_joined_of_parts_says_what_all_of_them_say() -> None:
    contents = Contents()
    contents.join({"classes": ["b", "a"], "complete": ["captions", "labels"]})
    contents.join({"classes": ["b", "c"], "complete": ["captions"]})
    assert contents.header() == {"classes": ["a", "b", "c"], "complete": ["captions"]}
    contents.join({})  # written before parts said anything
    assert contents.header() == {"complete": []}


def test_classes_of_an_index_that_does_not_list_them_are_read_from_the_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [Record(f"key-{n}", classes=(f"no. {n}",)) for n in range(9)]
    fingerprint = write_shards(records, tmp_path / "old", 4).fingerprint
    change_header(tmp_path / "old", lambda header: [header.pop(name) for name in ("classes", "complete")])
    index = open_index(tmp_path / "old")
    assert (index.classes, index.complete, index.fingerprint) == (None, (), fingerprint)
    assert ShardReader(index).classes() == {f"no. {n}" for n in range(9)}
    monkeypatch.setattr("data_loaders.shards.MAX_CLASSES", 8)
    assert write_shards(records, tmp_path / "many").classes is None  # an index stays small
    assert write_shards(records[1:], tmp_path / "fewer").classes is not None


def test_a_shard_folder_may_be_empty(tmp_path: Path) -> None:
    reader = ShardReader(write_shards([], tmp_path / "shards"))
    assert list(reader) == []
    with pytest.raises(KeyError):
        reader.position("any")


def test_a_reader_with_open_files_can_be_handed_to_a_worker(folder: Path) -> None:
    reader = ShardReader(open_index(folder))
    records = list(reader)
    assert list(pickle.loads(pickle.dumps(reader))) == records == list(reader)


# --- Writing ---------------------------------------------------------------------------------------------------------


def test_the_same_records_in_any_order_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    shuffled = make_records()
    random.Random(0).shuffle(shuffled)
    again = write_shards(iter(shuffled), tmp_path / "again", examples_per_shard=4)
    assert contents(tmp_path / "again") == contents(folder)
    assert again.fingerprint == open_index(folder).fingerprint


def test_other_content_has_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    records = make_records()
    records[3] = dataclasses.replace(records[3], image=encoded("PNG", "navy"))
    other = write_shards(records, tmp_path / "other", examples_per_shard=4)
    assert other.fingerprint != open_index(folder).fingerprint


@pytest.mark.parametrize("key", ["a.b", "a/b", "../a", "/a", "", "a b", "a\n", "é", "a\0", "x" * 201])
def test_unsafe_keys_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ShardError, match="must be letters, digits"):
        write_shards([Record("good"), Record(key)], tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="keys 'same' and 'same' collide"):
        write_shards([Record("same", b"1"), Record("other"), Record("same", b"2")], tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_ordered_records_are_written_one_by_one(folder: Path, tmp_path: Path) -> None:
    """The same bytes as from a list; a whole data set never lies in memory."""
    streamed = tmp_path / "streamed"

    def stream() -> Iterator[Record]:
        for number, record in enumerate(sorted(make_records(), key=lambda record: ring_hash(record.key))):
            (partial,) = tmp_path.glob(".streamed-*")
            assert len(list(partial.glob("*.tar"))) == -(-number // 4)  # what came before is on disk already
            yield record

    write_ordered_shards(stream(), streamed, examples_per_shard=4)
    assert contents(streamed) == contents(folder)


def test_records_out_of_the_rings_order_are_refused(tmp_path: Path) -> None:
    records = sorted(make_records(), key=lambda record: -ring_hash(record.key))
    with pytest.raises(ValueError, match="lies before it on the hash ring"):
        write_ordered_shards(records, tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def interrupted() -> Iterator[Record]:
    yield Record("first")
    raise KeyboardInterrupt


def unwritable() -> Iterator[Record]:
    yield from (Record(f"key-{number}") for number in range(5))
    yield Record("broken", captions=("\ud800",))  # no text that UTF-8 can hold


@pytest.mark.parametrize("records", [interrupted, unwritable])
def test_a_folder_is_written_whole_or_not_at_all(
    folder: Path, tmp_path: Path, records: Callable[[], Iterator[Record]]
) -> None:
    before = contents(folder)
    for target in (folder, tmp_path / "new"):
        with pytest.raises((KeyboardInterrupt, UnicodeEncodeError)):
            write_shards(records(), target, examples_per_shard=2)
    assert contents(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_is_replaced_by_a_new_one(folder: Path, tmp_path: Path) -> None:
    write_shards([Record("only")], folder)
    assert [record.key for record in ShardReader(open_index(folder))] == ["only"]
    assert list(tmp_path.iterdir()) == [folder]


# --- Damage and hostility --------------------------------------------------------------------------------------------


def change_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header = json.loads((folder / "index.json").read_text())
    change(header)
    (folder / "index.json").write_text(json.dumps(header))


def change_arrays(folder: Path, **changes: Callable[[np.ndarray], np.ndarray]) -> None:
    arrays = load_file(folder / "index.safetensors")
    save_file(
        {name: changes.get(name, lambda a: a)(array) for name, array in arrays.items()}, folder / "index.safetensors"
    )


def filled(value: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.full_like(array, value)


HEADER_DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing": lambda folder: (folder / "index.json").unlink(),
    "no JSON": lambda folder: (folder / "index.json").write_text("{"),
    "no text": lambda folder: (folder / "index.json").write_bytes(b"\xff\xfe\x00"),
    "a list": lambda folder: (folder / "index.json").write_text("[]"),
    "another format": lambda folder: change_header(folder, lambda header: header.update(format=2)),
    "no format": lambda folder: change_header(folder, lambda header: header.pop("format")),
    "no shards": lambda folder: change_header(folder, lambda header: header.pop("shards")),
    "no count": lambda folder: change_header(folder, lambda header: header.pop("examples")),
    "classes that are no list": lambda folder: change_header(folder, lambda header: header.update(classes="x")),
    "classes that are no texts": lambda folder: change_header(folder, lambda header: header.update(classes=["x", 3])),
    "shards without a name": lambda folder: change_header(folder, lambda header: header["shards"][0].pop("file")),
}
ARRAY_DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing": lambda folder: (folder / "index.safetensors").unlink(),
    "truncated": lambda folder: (folder / "index.safetensors").write_bytes(
        (folder / "index.safetensors").read_bytes()[:-9]
    ),
    "garbage": lambda folder: (folder / "index.safetensors").write_bytes(b"\xff" * 64),
    "too short": lambda folder: change_arrays(folder, hashes=lambda array: array[:-1].copy()),
    "an unknown shard": lambda folder: change_arrays(folder, shard=filled(3)),
    "a negative shard": lambda folder: change_arrays(folder, shard=filled(-1)),
    "a negative size": lambda folder: change_arrays(folder, image_size=filled(-1)),
    "a negative offset": lambda folder: change_arrays(folder, json_offset=filled(-8)),
    "a huge size": lambda folder: change_arrays(folder, image_size=filled(2**31 - 1)),
    "places beyond the shard": lambda folder: change_arrays(folder, json_offset=filled(2**40)),
    "unordered": lambda folder: change_arrays(folder, hashes=lambda array: array[::-1].copy()),
}


@pytest.mark.parametrize("damage", HEADER_DAMAGE.values(), ids=HEADER_DAMAGE.keys())
def test_a_damaged_header_is_an_error_that_names_it(folder: Path, damage: Callable[[Path], Any]) -> None:
    damage(folder)
    with pytest.raises(ShardError, match=rf"^{re.escape(str(folder))}.*index\.json.*Prepare"):
        open_index(folder)


@pytest.mark.parametrize("damage", ARRAY_DAMAGE.values(), ids=ARRAY_DAMAGE.keys())
def test_damaged_arrays_are_an_error_that_names_them(folder: Path, damage: Callable[[Path], Any]) -> None:
    damage(folder)
    with pytest.raises(ShardError, match=rf"^{re.escape(str(folder))}.*index\.safetensors.*Prepare"):
        open_index(folder)


@pytest.mark.parametrize("name", ["index.json", "index.safetensors", "00001.tar"])
def test_a_file_that_cannot_be_read_is_one_error_that_names_it(folder: Path, name: str) -> None:
    """A folder in its place: what permissions forbid, the root of a machine may read all the same."""
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ShardError, match=rf"^{re.escape(str(folder / name))}: cannot be read \(.*Look at its permi"):
        list(ShardReader(open_index(folder)))


def test_a_folder_that_cannot_be_looked_into_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match=r"no shards here \(index\.json is missing\)"):
        open_index(tmp_path / "file")
    with pytest.raises(ShardError, match=r"cannot be read \(File name too long\)"):
        open_index(tmp_path / ("x" * 300))


@pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "..", "0.tar/../../x.tar", "00000.tar\n", "00000.zip", ""])
def test_hostile_shard_names_are_refused(folder: Path, name: str) -> None:
    change_header(folder, lambda header: header["shards"][1].update(file=name))
    with pytest.raises(ShardError, match=r"index\.json: shard name .* is not NUMBER\.tar"):
        open_index(folder)


def read_all(index: Index) -> list[Record]:
    return list(ShardReader(index))


@pytest.mark.parametrize("keep", [0, 100, 2000])
def test_a_truncated_shard_is_an_error_that_names_it(folder: Path, keep: int) -> None:
    file = folder / "00001.tar"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ShardError, match=rf"^{re.escape(str(file))}: example \d.* ends early: the shard is truncated"):
        read_all(open_index(folder))


def test_a_missing_shard_is_an_error_that_names_it(folder: Path) -> None:
    (folder / "00002.tar").unlink()
    with pytest.raises(ShardError, match=r"00002\.tar: the index names this shard, but it is missing"):
        read_all(open_index(folder))


@pytest.mark.parametrize("metadata", [b"{", b"\xff", b"[]", b"7", b"null", b"{}", b'{"key": "a", "captions": 3}'])
def test_damaged_metadata_is_an_error_that_names_its_shard(folder: Path, metadata: bytes) -> None:
    index = open_index(folder)
    file = folder / "00000.tar"
    data = bytearray(file.read_bytes())
    start, size = int(index.json_offset[0]), int(index.json_size[0])
    data[start : start + size] = b" " * size
    data[start : start + min(size, len(metadata))] = metadata[:size]
    file.write_bytes(bytes(data))
    with pytest.raises(ShardError, match=r"00000\.tar: example 0, member '.*\.json', is damaged"):
        ShardReader(index)[0]


def shifted(by: int) -> Callable[[np.ndarray], np.ndarray]:
    """All places but those of a shard's first and last example, which are checked when the index is opened."""

    def change(array: np.ndarray) -> np.ndarray:
        array[1:3] += by
        return array

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {"image_offset": shifted(512)},
        {"image_offset": shifted(-7)},
        {"image_offset": lambda array: np.where(np.arange(len(array)) == 1, 3, array)},
        {"image_size": shifted(-1)},
        {"image_size": shifted(1)},
        {name: lambda array: array[[0, 2, 1, *range(3, len(array))]] for name in ("image_offset", "image_size")},
        {name: lambda array: array[[0, 3, 2, 3, *range(4, len(array))]] for name in ("image_offset", "image_size")},
    ],
    ids=["a block on", "seven bytes back", "at the beginning", "too short", "too long", "swapped", "repeated"],
)
@pytest.mark.parametrize("prefix", ["key", "k" * 89, "k" * 93, "k" * 94, "k" * 95, "k" * 190])
def test_an_image_is_that_of_its_example_or_an_error(tmp_path: Path, prefix: str, changes: dict[str, Any]) -> None:
    """Names of 100 bytes and over have a header of another form, whose field for the name holds their beginning."""
    image = encoded("PNG", "blue")
    records = [Record(f"{prefix}-{n}", image + bytes(n)) for n in range(COUNT)]
    write_shards(records, tmp_path, 5)
    reader = ShardReader(open_index(tmp_path))
    assert {record.key: record.image for record in reader} == {record.key: record.image for record in records}
    change_arrays(tmp_path, **changes)
    reader = ShardReader(open_index(tmp_path))
    with pytest.raises(DamagedError, match=rf"^{re.escape(str(tmp_path))}/00000\.tar: example 1.* is not its image"):
        reader.image(1)
    assert reader.image(0) == next(
        record.image for record in records if ring_hash(record.key) == reader.index.hashes[0]
    )
