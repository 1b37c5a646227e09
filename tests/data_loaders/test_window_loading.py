"""A window of the shards: what is read of it, in which order, with how much memory, and what its damage does."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_loaders.collate import ImageBatches
from data_loaders.damage import OnDamage
from data_loaders.images import DecodedImages, EncodedImages
from data_loaders.loader import TrainOrder, step_seed, train_loader
from data_loaders.shards import DamagedError, ShardError, ShardReader, open_index, ring_hash, write_shards
from data_loaders.transforms import ImageTransform
from vlm.errors import UserError
from vlm.supervision.subset import Window, window
from vlm.types import Batch, Record

COUNT, IN_SHARD = 800, 8
FRACTIONS = (0.01, 0.05, 0.25, 1.0)


def jpeg(number: int, size: tuple[int, int] = (12, 10)) -> bytes:
    data = io.BytesIO()
    color = (number % 256, number // 256 * 40, 90)
    Image.new("RGB", size, color).save(data, "JPEG", comment=b"a" * (number % 50))
    return data.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards((Record(f"key-{n}", jpeg(n), classes=(str(n % 3),)) for n in range(COUNT)), folder, IN_SHARD)
    return folder


def source_over(
    folder: Path, fraction: float = 1.0, damaged: OnDamage = "stop", subset_seed: int = 0, seed: int = 0
) -> ImageBatches:
    reader = ShardReader(open_index(folder))
    chosen = window(reader.index.hashes, fraction, subset_seed)
    images = DecodedImages(reader, ImageTransform(4))
    return ImageBatches(reader, chosen, ("0", "1", "2"), images, damaged, seed)


def keys_of(batches: Sequence[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


# --- What is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset_seed", [0, 7])
def test_windows_are_nested_and_exact_and_each_example_appears_once_a_pass_on_any_ranks(
    made: Path, subset_seed: int
) -> None:
    sets = []
    for fraction in FRACTIONS:
        source = source_over(made, fraction, subset_seed=subset_seed)
        size = next(size for size in (8, 5, 4, 2, 1) if len(source) % (4 * size) == 0)
        passes = {
            world: [
                list(train_loader(source, size, 3, len(source) // size // world, 0, rank, world, shuffle_shards=4))
                for rank in range(world)
            ]
            for world in (1, 4)
        }
        alone = passes[1][0]
        together = [batch for step in zip(*passes[4], strict=True) for batch in step]
        assert [batch.keys for batch in together] == [batch.keys for batch in alone]
        assert all(torch.equal(one.image, other.image) for one, other in zip(together, alone, strict=True))
        keys = keys_of(alone)
        assert len(keys) == len(set(keys)) == round(fraction * COUNT)
        sets.append(set(keys))
    assert all(small < large for small, large in itertools.pairwise(sets))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes")
def test_eight_workers_give_the_batches_of_one(made: Path, tmp_path: Path) -> None:
    """With damage too, which each worker finds for itself."""
    folder = tmp_path / "shards"
    shutil.copytree(made, folder)
    for key in ("key-3", "key-50", "key-700"):
        overwrite(folder, key, "image", b"")
    one, eight = (
        list(train_loader(source_over(folder, 1.0, "skip"), 20, 3, 40, num_workers=number, shuffle_shards=4))
        for number in (1, 8)
    )
    assert [(batch.keys, batch.damages) for batch in one] == [(batch.keys, batch.damages) for batch in eight]
    assert all(torch.equal(left.image, right.image) for left, right in zip(one, eight, strict=True))
    assert len({damage for batch in one for damage in batch.damages}) == 3


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_a_window_reads_its_share_of_the_bytes(made: Path, fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Counter[str]()
    pread = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        read[os.readlink(f"/proc/self/fd/{descriptor}")] += size
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    source = source_over(made, fraction)
    assert len(keys_of(list(train_loader(source, 4, 0, len(source) // 4, shuffle_shards=4)))) == len(source)
    index = source.window.reader.index
    useful = int(index.image_size.sum() + index.json_size.sum()) + 512 * COUNT  # with the header that names the image
    assert 0.9 * fraction < sum(read.values()) / useful < 1.1 * fraction
    assert len(read) <= -(-len(source) // IN_SHARD) + 1  # no other shard is opened


def test_no_more_files_are_open_than_the_reader_allows(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_loaders.shards.MAX_OPEN_SHARDS", 3)
    reader = ShardReader(open_index(made))
    before = len(os.listdir("/proc/self/fd"))
    assert [reader.text(position).key for position in range(0, COUNT, 40)] == [
        reader[position].key for position in range(0, COUNT, 40)
    ]
    assert len(os.listdir("/proc/self/fd")) <= before + 3


# --- Order -----------------------------------------------------------------------------------------------------------


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(step_seed(seed, epoch, "order"))
    return torch.randperm(count, generator=generator).tolist()


@pytest.mark.parametrize("cuts", [(), (10, 20), tuple(range(10, 80, 10))])
def test_a_subset_within_one_group_keeps_the_order_of_one_permutation(cuts: tuple[int, ...]) -> None:
    """So that what was recorded with it stays true."""
    order = TrainOrder(80, 7, 3, cuts, shuffle_shards=8)
    whole = [place for number in range(23) for place in order.positions(number)]
    assert whole[:160] == permutation(80, 3, 0) + permutation(80, 3, 1)


def test_a_pass_goes_through_groups_of_shards() -> None:
    cuts = tuple(range(4, 100, 10))  # 11 shards, the first and the last one shorter
    order = TrainOrder(100, 9, 5, cuts, shuffle_shards=3)
    whole = [place for number in range(34) for place in order.positions(number)]
    for epoch in (0, 1, 2):
        one_pass = whole[100 * epoch : 100 * (epoch + 1)]
        assert sorted(one_pass) == list(range(100))
        met = list(dict.fromkeys(int(np.searchsorted(cuts, place, side="right")) for place in one_pass))
        for first in range(0, 11, 3):
            group = met[first : first + 3]
            places = [n for n, place in enumerate(one_pass) if np.searchsorted(cuts, place, side="right") in group]
            assert places == list(range(places[0], places[-1] + 1))  # and leaves none of them before it is through
    assert len({tuple(whole[100 * epoch : 100 * (epoch + 1)]) for epoch in range(3)}) == 3
    assert order.positions(20) == whole[180:189]  # by index, without what came before


def test_cuts_are_where_another_shard_begins(made: Path) -> None:
    index = open_index(made)
    for positions in (Window(0, COUNT, COUNT), Window(3, 50, COUNT), Window(COUNT - 5, 30, COUNT)):
        shards = index.shard[np.asarray(positions)]
        expected = (np.flatnonzero(np.diff(shards)) + 1).tolist()
        assert list(index.cuts(positions)) == expected
    chosen = np.arange(1, COUNT, 3)
    assert list(index.cuts(chosen)) == (np.flatnonzero(np.diff(index.shard[chosen])) + 1).tolist()
    assert index.cuts(chosen[::-1]) == ()
    assert index.cuts(np.arange(0)) == ()


# --- Memory ----------------------------------------------------------------------------------------------------------


def test_another_process_gets_the_name_of_an_index_and_opens_it(made: Path) -> None:
    source = source_over(made)
    data = pickle.dumps(source)
    assert len(data) < 2000  # not its 800 examples, whose index has 36 bytes each
    again = pickle.loads(data)
    assert again.batch([5, 6]).keys == source.batch([5, 6]).keys


def test_an_index_that_was_replaced_is_not_opened_for_the_former_one(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    data = pickle.dumps(write_shards([Record("one", jpeg(1))], folder))
    write_shards([Record("one", jpeg(2))], folder)
    with pytest.raises(ShardError, match="replaced while they were read"):
        pickle.loads(data)


# --- Damage ----------------------------------------------------------------------------------------------------------


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def overwrite(folder: Path, key: str, part: str, data: bytes) -> None:
    """Put other bytes in the place of a part of an example."""
    reader = ShardReader(open_index(folder))
    at, index = reader.position(key), reader.index
    offsets, sizes = (index.image_offset, index.image_size) if part == "image" else (index.json_offset, index.json_size)
    with (folder / index.shards[int(index.shard[at])]["file"]).open("r+b") as tar:
        tar.seek(int(offsets[at]))
        tar.write(data[: int(sizes[at])].ljust(int(sizes[at]), b" " if part == "json" else b"\0"))


def truncate(folder: Path, key: str) -> None:
    reader = ShardReader(open_index(folder))
    at, index = reader.position(key), reader.index
    os.truncate(folder / index.shards[int(index.shard[at])]["file"], int(index.image_offset[at]) + 9)


def rename_member(folder: Path, key: str) -> None:
    """The tar calls the text of a broken example by a name that would leave the folder, were it ever extracted."""
    overwrite(folder, key, "json", b'{"key": "../../x"}')
    reader = ShardReader(open_index(folder))
    at, index = reader.position(key), reader.index
    with (folder / index.shards[int(index.shard[at])]["file"]).open("r+b") as tar:
        tar.seek(int(index.json_offset[at]) - 512)
        header = bytearray(tar.read(512))
        header[:100] = b"../../x".ljust(100, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        tar.seek(int(index.json_offset[at]) - 512)
        tar.write(header)


def misplace(folder: Path, key: str) -> None:
    """An index that sends the reader outside of the shard."""
    from safetensors.numpy import load_file, save_file

    at = ShardReader(open_index(folder)).position(key)
    arrays = load_file(folder / "index.safetensors")
    arrays["json_offset"][at] = 2**40
    save_file(arrays, folder / "index.safetensors")


def swap_images(folder: Path, key: str) -> None:
    """An index that gives an example and the one before it in the shard each other's image."""
    from safetensors.numpy import load_file, save_file

    at = ShardReader(open_index(folder)).position(key)
    arrays = load_file(folder / "index.safetensors")
    for name in ("image_offset", "image_size"):
        arrays[name][[at - 1, at]] = arrays[name][[at, at - 1]]
    save_file(arrays, folder / "index.safetensors")


def break_hash(folder: Path, key: str) -> None:
    """An index in which an example lies before all others, so that a search for its neighbours goes astray."""
    from safetensors.numpy import load_file, save_file

    at = ShardReader(open_index(folder)).position(key)
    arrays = load_file(folder / "index.safetensors")
    arrays["hashes"][at] = 2**63 - 1 if at < len(arrays["hashes"]) // 2 else 0
    save_file(arrays, folder / "index.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "a truncated tar": (truncate, r"\.tar: example \d+(, member 'VICTIM\.jpg',)? ends early: the shard is truncated"),
    "a corrupt JPEG": (
        lambda folder, key: overwrite(folder, key, "image", jpeg(1)[:60] + b"\xff\xd9" * 40),
        r"\.tar: example \d+, member 'VICTIM\.jpg', is damaged \(VICTIM: the image cannot be decoded",
    ),
    "a PNG of 168 megapixels": (
        lambda folder, key: overwrite(folder, key, "image", png_claiming(14_000, 12_000)),
        r"member 'VICTIM\.jpg', is damaged \(VICTIM: 14000 x 12000 pixels is over the limit of 64,000,000\)",
    ),
    "the text of another": (
        lambda folder, key: overwrite(folder, key, "json", b'{"key": "key-0"}'),
        r"member 'VICTIM\.json', is damaged \(the key 'key-0' does not belong here\)",
    ),
    "a member that leaves the folder": (
        rename_member,
        r"member '\.\./\.\./x', is damaged \(the key '\.\./\.\./x' does not belong here\)",
    ),
    "an index that swaps two images": (
        swap_images,
        r"\.tar: example \d+, member 'key-\d+\.jpg', is not its image: the index does not match the shard",
    ),
    "a broken hash": (break_hash, r"member 'VICTIM\.json', is damaged \(the key 'VICTIM' does not belong here\)"),
    "an index that points outside": (misplace, r"index\.safetensors: example \d+ lies outside its shard"),
}


@pytest.fixture
def damaged_folder(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A folder of five shards, one of its examples damaged, and what an error says of it."""
    folder = tmp_path / "shards"
    write_shards((Record(f"key-{n}", jpeg(n), classes=(str(n % 3),)) for n in range(40)), folder, IN_SHARD)
    damage, pattern = DAMAGE[request.param]
    victim = middle_of_a_shard(folder)
    damage(folder, victim)
    return folder, pattern.replace("VICTIM", victim)


def middle_of_a_shard(folder: Path) -> str:
    """The last but one example of the third shard: what a truncation loses with it is one more."""
    reader = ShardReader(open_index(folder))
    return reader.text(3 * IN_SHARD - 2).key


@pytest.mark.parametrize("damaged_folder", DAMAGE, indirect=True)
def test_a_damaged_example_stops_the_run_with_one_line_that_names_shard_and_member(
    damaged_folder: tuple[Path, str], tmp_path: Path
) -> None:
    folder, pattern = damaged_folder
    with pytest.raises(UserError, match=pattern) as caught:
        list(train_loader(source_over(folder), 10, 0, num_batches=4))
    assert "data.damaged=skip" in str(caught.value) and "Prepare it again" in str(caught.value)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path.parent / "x").exists()


@pytest.mark.parametrize("damaged_folder", DAMAGE, indirect=True)
def test_a_skipped_example_is_replaced_by_another_of_the_window_and_named(damaged_folder: tuple[Path, str]) -> None:
    folder, pattern = damaged_folder
    source = source_over(folder, damaged="skip")
    batches = list(train_loader(source, 10, 0, num_batches=12))  # three passes
    named = [damage for batch in batches for damage in batch.damages]
    assert {type(batch.image) for batch in batches} == {torch.Tensor}
    assert all(len(batch.keys) == 10 for batch in batches)
    num_lost = len(set(named))
    assert num_lost == (2 if "truncated" in pattern or "not its image" in pattern else 1)
    assert Counter(damage.position for damage in named).most_common(1)[0][1] >= 3  # once a pass at least
    lost = {ShardReader(open_index(folder)).index.hashes[damage.position] for damage in named}
    keys = keys_of(batches)
    assert not lost & {ring_hash(key) for key in keys}
    counts = Counter(keys)
    assert len(counts) == 40 - num_lost and min(counts.values()) == 3


@pytest.mark.parametrize("damaged_folder", ["a truncated tar"], indirect=True)
def test_stand_ins_are_the_same_on_any_rank_or_restart(damaged_folder: tuple[Path, str]) -> None:
    source = source_over(damaged_folder[0], damaged="skip", seed=4)
    whole = list(train_loader(source, 5, 0, num_batches=16))

    def fresh() -> ImageBatches:
        return source_over(damaged_folder[0], damaged="skip", seed=4)

    resumed = list(train_loader(fresh(), 5, 0, num_batches=16, first_batch=9))
    ranks = [list(train_loader(fresh(), 5, 0, num_batches=8, rank=rank, world_size=2)) for rank in (0, 1)]
    for others in (whole[:9] + resumed, list(itertools.chain(*zip(*ranks, strict=True)))):
        for one, other in zip(whole, others, strict=True):
            assert one.keys == other.keys and one.damages == other.damages
            assert torch.equal(one.image, other.image)
    other_seed = source_over(damaged_folder[0], damaged="skip", seed=5)
    assert keys_of(list(train_loader(other_seed, 5, 0, num_batches=16))) != keys_of(whole)


@pytest.mark.parametrize("damaged_folder", ["a corrupt JPEG"], indirect=True)
def test_an_error_in_a_worker_is_the_same_one_line(damaged_folder: tuple[Path, str]) -> None:
    with pytest.raises(UserError, match=rf"^{damaged_folder[0]}.*{damaged_folder[1]}"):
        list(train_loader(source_over(damaged_folder[0]), 10, 0, num_batches=4, num_workers=1))


@pytest.mark.parametrize("damaged_folder", ["a corrupt JPEG", "a broken hash"], indirect=True)
def test_states_of_a_frozen_encoder_leave_damaged_images_out(damaged_folder: tuple[Path, str]) -> None:
    source = source_over(damaged_folder[0], damaged="skip")
    keys = source.window.keys()

    def encoder(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean((2, 3))[:, None]

    if len(keys) == 40:
        with pytest.raises(DamagedError):
            EncodedImages.encode(source.window.images, keys, encoder, 10**6)
    pixels = [source.batch([place]).keys for place in range(40)]
    source.window.images = EncodedImages.encode(source.window.images, keys, encoder, 10**6, 7, skip_damaged=True)
    again = source_over(damaged_folder[0], damaged="skip")
    again.window.images = source.window.images
    assert [again.batch([place]).keys for place in range(40)] == pixels
    assert sum(len(again.batch([place]).damages) for place in range(40)) == 1


def test_a_window_that_is_damaged_throughout_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards([Record(f"key-{n}", b"no picture") for n in range(5)], folder)
    with pytest.raises(UserError, match="100 damaged examples in a row"):
        source_over(folder, damaged="skip").batch([0])


def test_a_missing_shard_stops_the_run_even_where_damage_is_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards([Record(f"key-{n}", jpeg(n)) for n in range(12)], folder, 4)
    (folder / "00001.tar").unlink()
    with pytest.raises(UserError, match=r"00001\.tar: the index names this shard, but it is missing"):
        list(train_loader(source_over(folder, damaged="skip"), 6, 0, num_batches=2))


@pytest.mark.parametrize("damaged", ["stop", "skip"])
@pytest.mark.parametrize("kind", ["a loop of links", "a folder", "no permission"])
def test_a_shard_that_cannot_be_read_is_one_line_that_names_it(tmp_path: Path, kind: str, damaged: OnDamage) -> None:
    folder = tmp_path / "shards"
    write_shards([Record(f"key-{n}", jpeg(n)) for n in range(12)], folder, 4)
    file = folder / "00001.tar"
    if kind == "no permission":
        file.chmod(0)
        if os.access(file, os.R_OK):
            pytest.skip("this user may read everything")
    else:
        file.unlink()
        file.mkdir() if kind == "a folder" else file.symlink_to(file.name)
    with pytest.raises(ShardError, match=r"00001\.tar: cannot be read \(.+\)\. Look at its permissions"):
        source_over(folder, damaged=damaged).batch(range(12))


def test_an_index_that_names_a_tar_elsewhere_is_refused(made: Path, tmp_path: Path) -> None:
    header = json.loads((made / "index.json").read_text())
    header["shards"][1]["file"] = "../../x.tar"
    (tmp_path / "index.json").write_text(json.dumps(header))
    (tmp_path / "index.safetensors").symlink_to(made / "index.safetensors")
    with pytest.raises(ShardError, match=r"index\.json: shard name '\.\./\.\./x\.tar' is not NUMBER\.tar"):
        open_index(tmp_path)
