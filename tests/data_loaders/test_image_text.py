"""The engine of the image-text preparers: equal bytes for any number of processes and after any kill; nothing that was
written is lost, and whatever is wrong with a release is named."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import webdataset
from image_text import (
    TRAIN,
    URL,
    VALIDATION,
    captions_tables,
    download,
    download_members,
    files_of,
    options,
    picture,
    records,
    report_of,
    tar,
    unpacked,
    write,
)
from PIL import Image
from safetensors.numpy import save_file

from data_loaders.decoding import ImageError, check_image, decode_image
from data_loaders.prepare import pieces
from data_loaders.prepare.captions_table import url_key
from data_loaders.prepare.conceptual_captions import ConceptualCaptionsPreparerConfig, prepare_conceptual_captions
from data_loaders.prepare.image_text import Options
from data_loaders.prepare.originals import Originals
from data_loaders.prepare.overlap import key_list, overlap
from data_loaders.prepare.pictures import Pictures
from data_loaders.prepare.pieces import Location
from data_loaders.shards import ShardReader, open_index, ring_hash, write_shards
from vlm.cli import main
from vlm.errors import UserError
from vlm.types import Record

SMALL = ConceptualCaptionsPreparerConfig(examples_per_shard=20)


def release(folder: Path, number: int = 120) -> Path:
    """Many rows, three in four of whose links are alive."""
    alive = [n for n in range(number) if n % 4]
    return write(folder, captions_tables(number) | download([*alive, 1000, 1001]))


def prepare(given: Options, config: ConceptualCaptionsPreparerConfig = SMALL) -> Path:
    prepare_conceptual_captions(config, given)
    return given.root / "pairs"


# --- The same bytes --------------------------------------------------------------------------------------------------


def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path) -> None:
    source = release(tmp_path / "release")
    one = files_of(prepare(options(source, tmp_path / "one")))
    assert files_of(prepare(options(source, tmp_path / "three", workers=3))) == one
    assert sum(name.endswith(".tar") for name in one) >= 5


def test_the_shards_are_those_that_one_writer_would_have_written(tmp_path: Path) -> None:
    source = release(tmp_path / "release")
    folder = prepare(options(source, tmp_path / "root")) / "train"
    index = open_index(folder)
    expected = [Record(url_key(URL(n)), picture(n), (f'a " {n} " in the rain .',)) for n in range(120) if n % 4]
    assert list(ShardReader(index)) == sorted(expected, key=lambda record: ring_hash(record.key))
    assert [file.name for file in sorted(folder.glob("*.tar"))] == [shard["file"] for shard in index.shards]
    assert [shard["examples"] for shard in index.shards] == np.bincount(index.shard).tolist()
    names = ("hashes", "shard", "image_offset", "image_size", "json_offset", "json_size")
    save_file({name: getattr(index, name) for name in names}, tmp_path / "written")
    assert (folder / "index.safetensors").read_bytes() == (tmp_path / "written").read_bytes()
    at_once = write_shards(expected, tmp_path / "at_once")
    assert (index.classes, index.complete) == (at_once.classes, at_once.complete) == ((), ("captions",))


def test_tars_are_to_the_byte_what_webdataset_writes(tmp_path: Path) -> None:
    keys = [f"key-{n}" for n in range(8)] + ["long" * 50]  # a name that needs a second header
    pictures = [picture(n, ("JPEG", "PNG")[n % 2]) for n in range(len(keys))]
    found = sorted([Record(key, image, ("é",)) for key, image in zip(keys, pictures, strict=True)], key=_place)
    write_shards(found, tmp_path / "shards")
    with webdataset.TarWriter(str(tmp_path / "w.tar"), encoder=False, mtime=0, user="", group="") as writer:
        for record in found:
            suffix = "png" if record.image[:4] == b"\x89PNG" else "jpg"
            about = json.dumps({"key": record.key, "captions": ["é"]}, ensure_ascii=False).encode()
            writer.write({"__key__": record.key, suffix: record.image, "json": about})
    assert (tmp_path / "shards" / "00000.tar").read_bytes() == (tmp_path / "w.tar").read_bytes()
    assert list(ShardReader(open_index(tmp_path / "shards"))) == found


def _place(record: Record) -> int:
    return ring_hash(record.key)


def test_a_join_in_small_steps_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little is joined at a time: the memory of a preparation is that of a step, not that of a shard."""
    source = release(tmp_path / "release")
    whole = files_of(prepare(options(source, tmp_path / "whole")))
    monkeypatch.setattr(pieces, "STEP_BYTES", 1)
    monkeypatch.setattr(pieces, "RUN_BYTES", 2000)
    assert files_of(prepare(options(source, tmp_path / "steps"))) == whole


def test_examples_that_a_release_lists_in_both_splits_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = captions_tables(20, 1) | download([*range(20), 1000])
    files[VALIDATION] = str(files[VALIDATION]) + f"again\t{URL(3)}\n"
    folder = prepare(options(write(tmp_path / "release", files), tmp_path / "root"))
    assert json.loads((folder / "manifest.json").read_text())["in_both_splits"] == 1
    assert "1 examples are in train and in validation" in capsys.readouterr().out


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    source = release(tmp_path / "release")
    expected = records(prepare(options(source, tmp_path / "expected")) / "train")
    for name, to in (("a", "."), ("images/up", ".."), ("b", "images")):
        os.symlink(to, source / name)
    folder = prepare(options(source, tmp_path / "root"))
    assert records(folder / "train") == expected
    assert report_of(folder)["splits"]["train"]["further_copies"] == 0


def test_a_release_without_any_survivor_in_a_split_leaves_an_empty_split(tmp_path: Path) -> None:
    members = download_members([0, 1000])
    torn = members | {"000000001.jpg": b"torn"}
    for name, given in (("absent", download_members([0])), ("torn", torn)):
        files = captions_tables(1, 1) | {f"d/{member}": data for member, data in given.items()}
        folder = prepare(options(write(tmp_path / name, files), tmp_path / f"root-{name}"))
        assert (len(open_index(folder / "train")), len(open_index(folder / "validation"))) == (1, 0)


# --- Killed and continued --------------------------------------------------------------------------------------------

KILLED = """
import sys
from pathlib import Path
from data_loaders.prepare.conceptual_captions import ConceptualCaptionsPreparerConfig, prepare_conceptual_captions
from data_loaders.prepare.image_text import Options
if __name__ == "__main__":
    config = ConceptualCaptionsPreparerConfig(examples_per_shard=20, short_side=8)
    prepare_conceptual_captions(config, Options(Path(sys.argv[1]), Path(sys.argv[2]), 1.0, int(sys.argv[3]), False))
"""


def test_a_preparation_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = release(tmp_path / "release", 400)
    config = ConceptualCaptionsPreparerConfig(examples_per_shard=20, short_side=8)
    whole = files_of(prepare(options(source, tmp_path / "whole"), config))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    root, work = tmp_path / "root", tmp_path / "root" / ".pairs-preparing"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done: list[int] = []
    for attempt in range(2):
        command = [sys.executable, str(script), str(source), str(root), "2"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(work.glob("shards/[0-9]*/index.json"))) <= 3 * attempt:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # and not at its end already
        time.sleep(0.3)  # its workers end by themselves
        done.append(len(list(work.glob("shards/[0-9]*/index.json"))))
    finished = {file: file.stat().st_mtime_ns for file in work.glob("shards/[0-9]*/00000.tar")}
    assert done == sorted(done) and done[-1] > 0
    assert files_of(prepare(options(source, root, workers=2), config)) == whole
    assert not work.exists()
    kept = {file.stat().st_mtime_ns for file in (root / "pairs").glob("*/*.tar")}
    assert {time for time in finished.values()} <= kept  # moved, not written again


def test_a_stop_at_any_stage_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends before each rename in turn: the moments at which something becomes visible."""
    source = release(tmp_path / "release", 60)
    whole = files_of(prepare(options(source, tmp_path / "whole")))
    real = os.replace

    class Killed(BaseException):
        pass

    stops = 0
    while True:
        left = [stops]

        def replace(old: object, new: object, left: list[int] = left) -> None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            real(old, new)  # type: ignore[arg-type]  # handed on as they come

        monkeypatch.setattr(os, "replace", replace)
        try:
            prepare(options(source, tmp_path / str(stops)))
            break
        except Killed:
            pass
        monkeypatch.setattr(os, "replace", real)
        assert files_of(prepare(options(source, tmp_path / str(stops)))) == whole
        stops += 1
    assert stops >= 20


def test_other_files_or_options_begin_anew_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = release(tmp_path / "release")
    with pytest.raises(UserError, match="allows fewer"):
        prepare(options(source, tmp_path / "root", max_missing=0.1))
    capsys.readouterr()
    other = ConceptualCaptionsPreparerConfig(examples_per_shard=30)
    with pytest.raises(UserError, match="allows fewer"):
        prepare(options(source, tmp_path / "root", max_missing=0.1), other)
    assert "the options have changed since; the work begun there starts anew" in capsys.readouterr().out
    write(source, {"images/00099.tar": tar(download_members([0, 4]))})
    folder = prepare(options(source, tmp_path / "root"), other)
    assert "the files have changed since" in capsys.readouterr().out
    assert len(records(folder / "train")) == 92
    assert files_of(folder) == files_of(prepare(options(source, tmp_path / "again"), other))


def test_what_is_there_already_is_not_made_again_and_other_data_is_never_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = release(tmp_path / "release")
    folder = prepare(options(source, tmp_path / "root"))
    before = {name: (folder / name).stat().st_mtime_ns for name in files_of(folder)}
    prepare(options(source, tmp_path / "root"))
    assert "nothing to do" in capsys.readouterr().out
    assert {name: (folder / name).stat().st_mtime_ns for name in files_of(folder)} == before
    prepare(options(source, tmp_path / "root"), ConceptualCaptionsPreparerConfig())
    assert len(open_index(folder / "train").shards) == 1  # replaced, as the same preparer made it
    write(tmp_path / "strange", {"pairs/notes.txt": "mine"})
    with pytest.raises(UserError, match=r"pairs: is there, but was not prepared"):
        prepare(options(source, tmp_path / "strange"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"preparer": "folder"}))
    with pytest.raises(UserError, match="holds folder"):
        prepare(options(source, tmp_path / "root"))


def test_a_root_inside_the_release_is_no_part_of_it(tmp_path: Path) -> None:
    source = release(tmp_path / "release")
    inside = prepare(options(source, source / "out"))
    prepare(options(source, source / "out"), ConceptualCaptionsPreparerConfig())
    assert report_of(inside)["splits"]["train"]["further_copies"] == 0
    assert len(records(inside / "train")) == 90


def test_two_commands_do_not_write_one_folder(tmp_path: Path) -> None:
    import fcntl

    source = release(tmp_path / "release")
    work = tmp_path / "root" / ".pairs-preparing"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another command is preparing this"):
            prepare(options(source, tmp_path / "root"))


# --- Losses ----------------------------------------------------------------------------------------------------------


def test_too_many_losses_are_refused_with_their_report_and_continued_when_allowed(tmp_path: Path) -> None:
    source = release(tmp_path / "release")
    with pytest.raises(UserError, match=r"31 of 123 images .* --max-missing 0\.2 allows fewer\. .*pairs-refused names"):
        prepare(options(source, tmp_path / "root", max_missing=0.2))
    refused = tmp_path / "root" / "pairs-refused"
    assert len(unpacked(refused / "lost-train.tsv.gz")) == 31  # the header among them
    assert report_of(refused)["splits"]["train"]["lost_by_reason"] == {"missing": 30}
    assert not (tmp_path / "root" / "pairs").exists()
    tars = list((tmp_path / "root" / ".pairs-preparing" / "shards").glob("*/00000.tar"))
    times = {file.stat().st_mtime_ns for file in tars}
    folder = prepare(options(source, tmp_path / "root", max_missing=0.3))
    assert times == {file.stat().st_mtime_ns for file in folder.glob("*/*.tar")}
    assert not refused.exists()
    with pytest.raises(UserError, match=r"is there already, .* lacks 25\.2033% of its examples"):
        prepare(options(source, tmp_path / "root", max_missing=0.2))


def test_tars_that_are_cut_off_keep_what_lies_before_the_cut(tmp_path: Path) -> None:
    for cut, lost in ((0.5, True), (0.999, False)):
        files = captions_tables(40, 1) | download([*range(40), 1000], images_per_tar=41)
        whole = files["images/00000.tar"]
        assert isinstance(whole, bytes)
        end = len(whole.rstrip(b"\0"))
        files["images/00000.tar"] = whole[: int(end * cut)] if lost else whole[: -(-end // 512) * 512]
        files["images/00001.tar"] = tar(download_members([1000]))
        name = f"release-{cut}"
        folder = prepare(options(write(tmp_path / name, files), tmp_path / f"root-{cut}"))
        report = report_of(folder)
        assert report["unused_files"]["cut off or damaged"] == 1
        assert any(row[1] == "images/00000.tar" for row in unpacked(folder / "unused.tsv.gz"))
        assert 10 < report["splits"]["train"]["used"] < 30 if lost else report["splits"]["train"]["used"] == 40


def hostile_tar() -> bytes:
    """Members that point elsewhere, between two that are sound."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for stem, number in (("first", 1), ("../../x", 2), ("/etc/x", 3), ("last", 4)):
            for suffix, content in (("jpg", picture(number)), ("json", json.dumps({"url": URL(number)}).encode())):
                info = tarfile.TarInfo(f"{stem}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        for kind, name in (
            (tarfile.SYMTYPE, "soft.jpg"),
            (tarfile.LNKTYPE, "hard.jpg"),
            (tarfile.FIFOTYPE, "pipe.jpg"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return data.getvalue()


def test_announcing_an_image_does_not_hide_that_it_is_gone(tmp_path: Path) -> None:
    write(tmp_path, {"a.tar": tar({"x.jpg": picture(0)})})
    with closing(Originals(tmp_path)) as originals:
        there, gone = Location("a.tar", 512, len(picture(0)), "x.jpg"), Location("b.tar", 512, 9, "y.jpg")
        for place in (there, gone):
            originals.expect(place)
        assert originals.image(there) == picture(0)
        with pytest.raises(ImageError, match=r"b\.tar: y\.jpg: no such file"):
            originals.image(gone)


def test_members_that_point_elsewhere_are_named_and_not_used(tmp_path: Path) -> None:
    files = captions_tables(6, 1) | {"d/0.tar": hostile_tar(), "d/1.tar": tar(download_members([0, 1000]))}
    folder = prepare(options(write(tmp_path / "release", files), tmp_path / "root"))
    assert set(records(folder / "train")) == {url_key(URL(n)) for n in (0, 1, 4)}
    assert report_of(folder)["unused_files"] == {
        "a link": 2,
        "no plain file": 1,
        "the member's name lies outside the archive": 4,
    }
    assert ["the member's name lies outside the archive", "d/0.tar", "../../x.jpg"] in unpacked(
        folder / "unused.tsv.gz"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release", "root"]


def test_a_picture_that_would_fill_the_memory_is_lost_by_name(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (14_000, 12_000)).save(bomb, "PNG")  # 168 megapixels in 20 kB
    members = download_members([0, 1, 1000])
    members["000000001.jpg"] = bomb.getvalue()
    files = captions_tables(2, 1) | {"d/0.tar": tar(members)}
    folder = prepare(options(write(tmp_path / "release", files), tmp_path / "root"))
    (_, lost) = unpacked(folder / "lost-train.tsv.gz")
    assert lost == [url_key(URL(1)), "too many pixels", URL(1), "d/0.tar: 000000001.jpg"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_named_and_the_same_command_continues(tmp_path: Path, workers: int) -> None:
    """No file may grow beyond a limit, which is what a full disk does to some writer in the middle of its work."""
    members = {}
    for n in range(40):
        members |= {f"{n}.jpg": picture(n, "JPEG", 200, 200), f"{n}.json": json.dumps({"url": URL(n)}).encode()}
    source = write(tmp_path / "release", captions_tables(40, 0) | {"d/0.tar": tar(members)})
    config = ConceptualCaptionsPreparerConfig(examples_per_shard=20)
    given = options(source, tmp_path / "root", workers=workers)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"root: cannot be written .*File too large.* what is finished is kept"):
            prepare(given, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    work = tmp_path / "root" / ".pairs-preparing"
    assert len(list((work / "scans").glob("[0-9]*"))) == 3  # what was read before stays
    assert len(records(prepare(given, config) / "train")) == 40


# --- Pictures --------------------------------------------------------------------------------------------------------


def test_images_are_kept_byte_for_byte_or_made_smaller_and_never_larger(tmp_path: Path) -> None:
    large, small = picture(1, "JPEG", 90, 60), picture(2, "PNG", 9, 12)
    for keep in (Pictures(), Pictures(short_side=60)):
        assert keep(large, "large") == large and keep(small, "small") == small
    shrunk = Pictures(short_side=10, quality=80)
    assert Image.open(io.BytesIO(shrunk(large, "large"))).size == (15, 10)
    assert Image.open(io.BytesIO(shrunk(large, "large"))).format == "JPEG"
    assert shrunk(large, "large") == shrunk(large, "large") != Pictures(10, 90)(large, "large")
    assert shrunk(picture(3, "PNG", 20, 40), "tall")[:2] == b"\xff\xd8"
    assert Image.open(io.BytesIO(Pictures(1)(picture(4, "PNG", 500, 2), "wide"))).size == (250, 1)


def test_a_smaller_picture_shows_the_same() -> None:
    ramp = np.tile(np.linspace(0, 255, 800, dtype=np.uint8)[None, :, None], (600, 1, 3))
    data = io.BytesIO()
    Image.fromarray(ramp).save(data, "JPEG", quality=95)
    shrunk = np.asarray(Image.open(io.BytesIO(Pictures(60)(data.getvalue(), "ramp"))), dtype=float)
    assert np.abs(shrunk.mean(axis=(0, 2)) - np.linspace(0, 255, 80)).max() < 6


def test_the_fast_check_of_an_image_agrees_with_decoding_it() -> None:
    draw = random.Random(0)

    def verdict(check: object, data: bytes) -> str:
        try:
            check(data, "image")  # type: ignore[operator]  # one of two checks
        except ImageError as error:
            return error.reason
        return ""

    verdicts = set()
    for number in range(300):
        data = bytearray(picture(number, ("JPEG", "PNG")[number % 2], 40, 30))
        for _ in range(draw.randrange(4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        del data[len(data) - draw.choice((0, 0, 1, 50, 500)) :]
        found = verdict(decode_image, bytes(data))
        assert verdict(check_image, bytes(data)) == found
        verdicts.add(found)
    assert verdicts >= {"", "damaged"}


# --- Who used what ---------------------------------------------------------------------------------------------------


def test_the_overlap_of_two_users_is_what_both_found_alive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alive = {"mine": set(range(0, 60, 2)), "yours": set(range(0, 60, 3))}
    for name, numbers in alive.items():
        files = captions_tables(60, 1) | download([*sorted(numbers), 1000])
        prepare(options(write(tmp_path / f"release-{name}", files), tmp_path / name))
    common = tmp_path / "common.txt"
    assert main(["overlap", str(tmp_path / "mine"), str(tmp_path / "yours" / "pairs"), "--to", str(common)]) == 0
    both = alive["mine"] & alive["yours"]
    assert set(common.read_text().split()) == {url_key(URL(n)) for n in both}
    assert f"{len(both)} examples are in all 2, of {len(alive['mine'] | alive['yours'])}" in capsys.readouterr().out
    found = overlap([key_list(tmp_path / name, "train") for name in alive])
    assert found.sizes == (30, 20)
    assert (found.common, found.union, found.pairwise) == (10, 40, ((30, 10), (10, 20)))
    # The list is one to compare again, and a manifest travels as one small file.
    shutil.copy(tmp_path / "mine" / "pairs" / "keys-train.txt.gz", tmp_path / "sent.txt.gz")
    third = overlap([key_list(common, "train"), key_list(tmp_path / "sent.txt.gz", "train")])
    assert (third.sizes, third.common) == ((10, 30), 10)


def test_an_overlap_of_what_cannot_be_compared_is_doubted_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(options(release(tmp_path / "a"), tmp_path / "one"))
    changed = captions_tables(120)
    changed[TRAIN] = str(changed[TRAIN]).replace("rain", "snow")
    source = write(tmp_path / "b", changed | download([1, 2, 1000]))
    prepare(options(source, tmp_path / "two"), ConceptualCaptionsPreparerConfig(short_side=8))
    assert main(["overlap", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    said = capsys.readouterr().out
    assert "were prepared from different files called Train_GCC-training.tsv" in said
    assert "short_side is None in" in said
    (tmp_path / "keys.txt").write_text("not a key\n")
    for arguments, problem in (
        ([str(tmp_path / "one")], "give at least two"),
        ([str(tmp_path / "one"), str(tmp_path)], "holds no keys-train.txt.gz"),
        ([str(tmp_path / "one"), str(tmp_path / "keys.txt")], "keys.txt: line 1 is no key"),
    ):
        assert main(["overlap", *arguments]) == 2
        assert problem in capsys.readouterr().err


def test_the_keys_are_listed_in_the_order_of_the_shards(tmp_path: Path) -> None:
    folder = prepare(options(release(tmp_path / "release"), tmp_path / "root"))
    keys = gzip.decompress((folder / "keys-train.txt.gz").read_bytes()).decode().split()
    assert keys == [record.key for record in ShardReader(open_index(folder / "train"))]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["splits"]["train"]["examples"] == len(keys) == 90
    assert manifest["sources"][TRAIN]["sha256"] and "sha256" not in manifest["sources"]["images/00000.tar"]
    assert "owned by others" in manifest["licences"]["images"]


# --- The command -----------------------------------------------------------------------------------------------------


def test_the_command_prepares_and_explains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = release(tmp_path / "release")
    command = ["prepare", "conceptual_captions", "--from", str(source), "--to", str(tmp_path / "root"), "--workers"]
    assert main([*command, "1", "short_side=8"]) == 0
    assert "conceptual_captions: yield" in capsys.readouterr().out
    for wrong, problem in (
        (["0"], "--workers must be at least 1"),
        (["1", "short_sied=8"], "short_sied: unknown key. Did you mean short_side?"),
        (["1", "--max-missing", "2"], "--max-missing must be a fraction"),
    ):
        assert main([*command, *wrong]) == 2
        assert problem in capsys.readouterr().err
    assert main(["prepare", "gqa", "--from", str(source), "--to", str(tmp_path), "--workers", "2"]) == 2
    assert "takes no --workers" in capsys.readouterr().err
