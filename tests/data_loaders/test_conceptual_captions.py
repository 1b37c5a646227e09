"""Conceptual Captions in every layout that users have, whichever links were alive."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import pytest
from image_text import (
    DATA,
    LABELS,
    TRAIN,
    URL,
    VALIDATION,
    captions_tables,
    download,
    download_members,
    files_of,
    labels_table,
    options,
    picture,
    records,
    report_of,
    unpacked,
    write,
)

from data_loaders.prepare.captions_table import url_key
from data_loaders.prepare.conceptual_captions import (
    ConceptualCaptionsPreparerConfig,
    MachineLabelsPreparerConfig,
    prepare_conceptual_captions,
    prepare_machine_labels,
)
from data_loaders.shards import ring_hash
from vlm.errors import UserError

SAMPLES = DATA / "conceptual_captions"
ALIVE = [*range(0, 30, 2), 1000, 1002]


def prepare(source: Path, root: Path, **config: object) -> Path:
    prepare_conceptual_captions(ConceptualCaptionsPreparerConfig(**config), options(source, root))
    return root / "pairs"


# --- Layouts ---------------------------------------------------------------------------------------------------------


def numbered(name: str, numbers: list[int]) -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {}
    for number in numbers:
        split, row = ("train", number) if number < 1000 else ("val", number - 1000)
        crc = zlib.crc32(URL(number).encode())
        files[name.format(split=split, row=row, thousand=row // 10, crc=crc)] = picture(number)
    return files


LAYOUTS = {
    "img2dataset tars": download(ALIVE),
    "img2dataset files": {f"images/00000/{name}": data for name, data in download_members(ALIVE).items()},
    "folders of rows without suffix": numbered("images_{split}/{thousand:04d}/{row:07d}", ALIVE),
    "flat folders of rows": numbered("{split}/{row}.jpg", ALIVE),
    "rows with checksums": numbered("{split}ing/{row}_{crc}", ALIVE),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_shards(tmp_path: Path, layout: str) -> None:
    files = captions_tables()
    expected = prepare(write(tmp_path / "tars", files | LAYOUTS["img2dataset tars"]), tmp_path / "expected")
    found = prepare(write(tmp_path / "release", files | LAYOUTS[layout]), tmp_path / "found")
    for split in ("train", "validation"):
        assert files_of(found / split) == files_of(expected / split)
    train = records(found / "train")
    assert len(train) == 15 and len(records(found / "validation")) == 2
    record = train[url_key(URL(4))]
    assert (record.image, record.captions) == (picture(4), ('a " 4 " in the rain .',))


def test_rows_that_begin_with_one_are_a_setting_and_not_a_guess(tmp_path: Path) -> None:
    files = captions_tables(train=3) | {f"train/{row}.jpg": picture(row) for row in (1, 2, 3)}
    files.pop(VALIDATION)
    source = write(tmp_path / "release", files)
    with pytest.raises(UserError, match=r"train/3.jpg: its number is beyond the 3 rows .* \(first_row=1\)"):
        prepare(source, tmp_path / "root")
    train = records(prepare(source, tmp_path / "root", first_row=1) / "train")
    assert train[url_key(URL(0))].image == picture(1)


def test_an_image_named_after_another_url_is_not_used(tmp_path: Path) -> None:
    crc = zlib.crc32(URL(1).encode())
    files = captions_tables() | {f"train/0_{crc}": picture(0), f"train/1_{crc}": picture(1)}
    found = prepare(write(tmp_path / "release", files | numbered("{split}/{row}", [1000])), tmp_path / "root")
    assert set(records(found / "train")) == {url_key(URL(1))}
    assert report_of(found)["unused_files"] == {"named after another url than its row has": 1}


def test_numbered_images_of_an_unknown_split_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "release", captions_tables() | {"pictures/0.jpg": picture(0)})
    with pytest.raises(UserError, match=r"pictures: .* of which table\? Put them into a folder called train or val"):
        prepare(source, tmp_path / "root")


# --- Rows ------------------------------------------------------------------------------------------------------------


def test_one_url_in_several_rows_is_one_example_with_several_captions(tmp_path: Path) -> None:
    files = captions_tables(train=5)
    files[TRAIN] = str(files[TRAIN]) + f"another caption\t{URL(2)}\nanother caption\t{URL(2)}\n"
    found = prepare(write(tmp_path / "release", files | download([*range(5), 1000])), tmp_path / "root")
    assert records(found / "train")[url_key(URL(2))].captions == ('a " 2 " in the rain .', "another caption")
    counts = report_of(found)["splits"]["train"]
    assert (counts["listed"], counts["used"], counts["captions"]) == (5, 5, 6)


def test_every_lost_example_is_named_with_its_reason(tmp_path: Path) -> None:
    members = download_members([0, 1, 2, 3, 4, 1000])
    members["000000001.jpg"] = b""
    members["000000002.jpg"] = b"<html>404 Not Found</html>"
    members["000000003.jpg"] = members["000000003.jpg"][:200]
    files = captions_tables(train=6) | {f"d/{name}": data for name, data in members.items()}
    found = prepare(write(tmp_path / "release", files), tmp_path / "root")
    lost = {row[2]: row[1] for row in unpacked(found / "lost-train.tsv.gz")[1:]}
    assert lost == {URL(1): "empty file", URL(2): "no image", URL(3): "damaged", URL(5): "missing"}
    counts = report_of(found)["splits"]["train"]
    assert counts["listed"] == counts["used"] + counts["lost"] == 6
    assert counts["lost_by_reason"] == {"damaged": 1, "empty file": 1, "missing": 1, "no image": 1}


def test_images_that_no_table_lists_are_named_once(tmp_path: Path) -> None:
    files = captions_tables() | download([0, 1, 2000, 1000, 2001]) | {LABELS: labels_table([0, 2001])}
    source = write(tmp_path / "release", files)
    found = prepare(source, tmp_path / "root", labels=True)  # labels list no examples
    expected = [["of no listed example", "images/00000.tar", f"{place:09d}.jpg"] for place in (2, 4)]
    assert sorted(unpacked(found / "unused.tsv.gz")[1:]) == expected
    assert report_of(found)["unused_files"] == {"of no listed example": 2}
    (source / TRAIN).unlink()
    names = [row[2] for row in unpacked(prepare(source, tmp_path / "validation") / "unused.tsv.gz")[1:]]
    assert sorted(names) == [f"{place:09d}.jpg" for place in (0, 1, 2, 4)]


def test_a_second_copy_stands_in_for_a_damaged_one(tmp_path: Path) -> None:
    first = download_members([0, 1000])
    first["000000000.jpg"] = b"torn"
    files = captions_tables(train=1) | {f"a/{name}": data for name, data in first.items()}
    files |= {f"b/{name}": data for name, data in download_members([0]).items()}
    found = prepare(write(tmp_path / "release", files), tmp_path / "root")
    assert records(found / "train")[url_key(URL(0))].image == picture(0)
    assert report_of(found)["splits"]["train"]["further_copies"] == 1


def test_a_header_that_was_added_for_a_download_is_no_row(tmp_path: Path) -> None:
    files = captions_tables(train=3)
    files[TRAIN] = "caption\turl\n" + str(files[TRAIN])
    found = prepare(write(tmp_path / "release", files | numbered("{split}/{row}.jpg", [0, 1, 2, 1000])), tmp_path / "r")
    assert {key: record.image for key, record in records(found / "train").items()} == {
        url_key(URL(n)): picture(n) for n in range(3)
    }


@pytest.mark.parametrize(
    ("table", "text", "problem"),
    [
        (TRAIN, f"one\t{URL(1)}\ntwo\n", r"training\.tsv: line 2: expected caption TAB url\. Got 1 columns.* Download"),
        (TRAIN, f"one\t{URL(1)}\n\nthree\t{URL(3)}\n", r"training\.tsv: line 2: expected caption TAB url"),
        (TRAIN, "one\t\n", r"training\.tsv: line 1: has no url"),
        (LABELS, f"a\t{URL(1)}\tcat,dog\t/m/1,/m/2\t0.5\n", r"line 1: .* as many\. Got 2 labels, 2 MIDs, 1 scores"),
        (LABELS, f"a\t{URL(1)}\tcat\t/m/1\thigh\n", r"line 1: a label needs a name and a score from 0 to 1.*high"),
        (LABELS, f"a\t{URL(1)}\tcat\t/m/1\t1.5\n", r"line 1: a label needs .*1\.5"),
        (LABELS, f"a\t{URL(1)}\n", r"line 1: expected caption TAB url TAB labels TAB MIDs TAB scores\. Got 2"),
    ],
)
def test_a_malformed_row_is_one_line_that_names_it(tmp_path: Path, table: str, text: str, problem: str) -> None:
    files = captions_tables() | {LABELS: labels_table([1])} | download(ALIVE) | {table: text}
    with pytest.raises(UserError, match=problem):
        prepare(write(tmp_path / "release", files), tmp_path / "root", labels=True)
    assert not (tmp_path / "root" / "pairs").exists()


def test_what_is_not_utf_8_is_named(tmp_path: Path) -> None:
    files = captions_tables() | download(ALIVE) | {TRAIN: b"caf\xe9\thttps://example.com/1.jpg\n"}
    with pytest.raises(UserError, match=r"Train_GCC-training\.tsv: not UTF-8"):
        prepare(write(tmp_path / "release", files), tmp_path / "root")


def test_a_release_without_tables_or_images_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither Train_GCC\*\.tsv nor Validation_GCC\*\.tsv is here"):
        prepare(write(tmp_path / "empty", {"a.txt": ""}), tmp_path / "root")
    with pytest.raises(UserError, match=r"none of the 33 examples has an image here\. Expected tars"):
        prepare(write(tmp_path / "tables", captions_tables()), tmp_path / "root")
    with pytest.raises(UserError, match=r"Image_Labels_Subset_Train_GCC\*\.tsv is not here"):
        prepare(write(tmp_path / "more", captions_tables() | download(ALIVE)), tmp_path / "root", labels=True)


# --- Machine labels --------------------------------------------------------------------------------------------------


def test_labels_join_by_url_and_leave_captions_and_mids_alone(tmp_path: Path) -> None:
    files = captions_tables() | download(ALIVE) | {LABELS: labels_table([0, 1, 2])}
    source = write(tmp_path / "release", files)
    found = prepare(source, tmp_path / "root", labels=True)
    train = records(found / "train")
    joined = train[url_key(URL(2))]
    assert (joined.captions, joined.labels, joined.scores) == (
        ('a " 2 " in the rain .',),
        ("cat 2", "animal"),
        (0.9, 0.25),
    )
    assert train[url_key(URL(4))].labels == ()
    assert report_of(found)["splits"]["train"]["labelled"] == 2
    without = prepare(source, tmp_path / "without")
    assert all(record.labels == () for record in records(without / "train").values())


def test_machine_labels_keep_their_rows_and_a_part_for_validation(tmp_path: Path) -> None:
    files = {LABELS: labels_table(range(60))} | download(range(60))
    source = write(tmp_path / "release", files)
    config = MachineLabelsPreparerConfig(validation_fraction=0.25)
    prepare_machine_labels(config, options(source, tmp_path / "root"))
    train, validation = (records(tmp_path / "root" / "pairs" / split) for split in ("train", "validation"))
    assert train.keys() | validation.keys() == {url_key(URL(n)) for n in range(60)}
    assert not train.keys() & validation.keys() and 5 <= len(validation) <= 25
    assert all(record.labels[1] == "animal" and record.captions for record in (train | validation).values())


def test_machine_labels_find_images_by_the_rows_of_the_whole_table(tmp_path: Path) -> None:
    files = captions_tables() | {LABELS: labels_table([7, 3])} | numbered("{split}/{row}.jpg", [3, 7, 9])
    prepare_machine_labels(
        MachineLabelsPreparerConfig(validation_fraction=0), options(write(tmp_path / "r", files), tmp_path / "root")
    )
    train = records(tmp_path / "root" / "pairs" / "train")
    assert {key: record.image for key, record in train.items()} == {url_key(URL(n)): picture(n) for n in (3, 7)}
    assert train[url_key(URL(3))].captions == ("caption 3",)


def test_labels_are_distinct_and_best_first(tmp_path: Path) -> None:
    files = {LABELS: f"a\t{URL(0)}\ttree,cat,tree\t/m/1,/m/2,/m/3\t0.2,0.5,0.9\n"} | download([0])
    config = MachineLabelsPreparerConfig(validation_fraction=0)
    prepare_machine_labels(config, options(write(tmp_path / "release", files), tmp_path / "root"))
    (record,) = records(tmp_path / "root" / "pairs" / "train").values()
    assert (record.labels, record.scores) == (("tree", "cat"), (0.9, 0.5))


# --- Real files ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"samples of Conceptual Captions are not at {SAMPLES}")
def test_the_real_layout_of_the_tables_is_read(tmp_path: Path) -> None:
    source = tmp_path / "release"
    shutil.copytree(SAMPLES, source)
    (train,), (labels,) = source.glob("Train*"), source.glob("Image_Labels*")
    urls = [line.split("\t")[1] for file in (train, labels) for line in file.read_text().splitlines()]
    members = {}
    for number, url in enumerate(urls):
        members[f"d/{number:09d}.jpg"] = picture(number)
        members[f"d/{number:09d}.json"] = json.dumps({"url": url}).encode()
    write(source, members)
    found = prepare(source, tmp_path / "captions", labels=True)
    records_of_train = records(found / "train")
    assert len(records_of_train) == 7
    assert records_of_train[url_key("https://example.com/b.jpg")].captions == ('the " best " day of the year',)
    assert records_of_train[url_key("https://example.com/a.jpg")].labels == ("bicycle",)
    assert records_of_train[url_key(urls[0])].scores == (0.97, 0.81)
    prepare_machine_labels(MachineLabelsPreparerConfig(validation_fraction=0), options(source, tmp_path / "labels"))
    labelled = records(tmp_path / "labels" / "pairs" / "train")
    assert sorted(len(record.labels) for record in labelled.values()) == [0, 1, 2, 15]
    assert not any(label.startswith("/m/") for record in labelled.values() for label in record.labels)
    assert [*labelled] == sorted(labelled, key=ring_hash)


def test_images_of_another_table_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "release", captions_tables() | download([500, 501]))
    with pytest.raises(UserError, match=r"none of the 33 examples that Train_GCC.* can be used; .*pairs-refused"):
        prepare(source, tmp_path / "root")
    assert not (tmp_path / "root" / "pairs").exists()
