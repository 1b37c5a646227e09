"""Any images with texts, tags or classes become shards, by configuration alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from image_text import options, picture, records, report_of, tar, write

from data_loaders.prepare import pieces
from data_loaders.prepare.folder import FolderPreparerConfig, path_key, prepare_folder
from data_loaders.shards import KEY_PATTERN
from vlm.cli import main
from vlm.errors import UserError
from vlm.types import Record


def prepare(source: Path, root: Path, max_missing: float = 0.0, part: str = "pairs", **config: object) -> Path:
    chosen = FolderPreparerConfig.model_validate({"validation_fraction": 0} | config)
    prepare_folder(chosen, options(source, root, max_missing))
    return root / part


IMAGES: dict[str, bytes | str] = {f"images/{n}.jpg": picture(n) for n in range(3)}
EXPECTED = {
    path_key("images/0.jpg"): Record(
        path_key("images/0.jpg"), picture(0), ("a cat, asleep", "another"), ("cat", "sofa"), (0.9, 0.5), ("animal",)
    ),
    path_key("images/1.jpg"): Record(path_key("images/1.jpg"), picture(1), ("a “dog”",), ("dog",), (0.8,), ("animal",)),
    path_key("images/2.jpg"): Record(path_key("images/2.jpg"), picture(2), ("nothing",)),
}
ROWS = [
    ("images/0.jpg", "a cat, asleep", "sofa;cat", "0.5;0.9", "animal"),
    ("images/1.jpg", "a “dog”", "dog", "0.8", "animal"),
    ("./images/../images/2.jpg", "nothing", "", "", ""),
    ("images/0.jpg", "another", "", "", "animal"),
]
HEADER = ("path", "caption", "tags", "confidences", "class")
COLUMNS = dict(zip(("image", "text", "tags", "scores", "classes"), HEADER, strict=True)) | {"separator": ";"}


def csv_text(delimiter: str) -> str:
    quoted = [[f'"{cell}"' if delimiter in cell else cell for cell in row] for row in (HEADER, *ROWS)]
    return "".join(delimiter.join(row) + "\n" for row in quoted)


def json_text() -> str:
    """The same with lists in place of separators, and a number where a score stands."""
    rows = []
    for path, text, tags, scores, classes in ROWS:
        lists = {"tags": [*filter(None, tags.split(";"))], "confidences": [float(s) for s in scores.split(";") if s]}
        rows.append({"path": path, "caption": [text], "class": [classes] if classes else [], **lists})
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "text"), [("t.csv", csv_text(",")), ("t.tsv", csv_text("\t")), ("t.jsonl", json_text())]
)
def test_a_table_of_any_form_gives_the_same_records(tmp_path: Path, name: str, text: str) -> None:
    source = write(tmp_path / "release", IMAGES | {name: text})
    found = prepare(source, tmp_path / "root", table=COLUMNS | {"file": name})
    assert records(found / "train") == EXPECTED


def test_the_command_line_names_the_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "release", IMAGES | {"pairs.csv": csv_text(",")})
    command = ["prepare", "folder", "--from", str(source), "--to", str(tmp_path / "root"), "--workers", "1"]
    columns = ["table.file=pairs.csv", "table.image=path", "table.text=caption", "table.tags=tags"]
    more = ["table.scores=confidences", "table.classes=class", 'table.separator=";"', "validation_fraction=0"]
    assert main([*command, *columns, *more]) == 0
    assert records(tmp_path / "root" / "pairs" / "train") == EXPECTED
    capsys.readouterr()
    assert main([*command, *columns, "table.txt=x"]) == 2
    assert "table.txt: unknown key. Did you mean table.text?" in capsys.readouterr().err


def test_a_table_may_give_keys_and_splits(tmp_path: Path) -> None:
    rows = "id,image,text,part\na-1,images/0.jpg,zero,train\na-2,images/1.jpg,one,val\na-3,images/2.jpg,two,Train\n"
    source = write(tmp_path / "release", IMAGES | {"t.csv": rows})
    table = {"file": "t.csv", "text": "text", "key": "id", "split": "part"}
    found = prepare(source, tmp_path / "root", table=table)
    assert set(records(found / "train")) == {"a-1", "a-3"} and set(records(found / "validation")) == {"a-2"}


@pytest.mark.parametrize("parts", [("train", "train"), ("train", "val")])
@pytest.mark.parametrize("apart", [0, 300])
def test_one_key_for_two_images_is_refused_wherever_its_rows_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[str, str], apart: int
) -> None:
    monkeypatch.setattr(pieces, "RUN_BYTES", 10_000)  # far rows lie in different runs
    between = "".join(f"other-{number},images/2.jpg,two,train\n" for number in range(apart))
    rows = f"id,image,text,part\nx-1,images/0.jpg,zero,{parts[0]}\n{between}x-1,images/1.jpg,one,{parts[1]}\n"
    source = write(tmp_path / "release", IMAGES | {"t.csv": rows})
    table = {"file": "t.csv", "text": "text", "key": "id", "split": "part"}
    expected = (
        rf't\.csv: line 2 \(images/0\.jpg\) and line {apart + 3} \(images/1\.jpg\) have one id, "x-1", but different '
        "images. Give each image a key of its own, or leave table.key out"
    )
    with pytest.raises(UserError, match=expected):
        prepare(source, tmp_path / "root", table=table)
    assert not (tmp_path / "root" / "pairs").exists()
    assert not any((tmp_path / "root" / ".pairs-preparing" / "shards").iterdir())
    write(source, {"t.csv": rows.replace("x-1,images/1", "x-2,images/1")})
    found = prepare(source, tmp_path / "root", table=table)
    assert len(records(found / "train")) + ("val" in parts and len(records(found / "validation"))) == apart + 2


def test_worker_processes_refuse_one_key_for_two_images_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "id,image,text\na,images/0.jpg,zero\nb,images/1.jpg,one\na,images/2.jpg,two\n"
    source = write(tmp_path / "release", IMAGES | {"t.csv": rows})
    command = ["prepare", "folder", "--from", str(source), "--to", str(tmp_path / "root"), "--workers", "2"]
    assert main([*command, "table.file=t.csv", "table.text=text", "table.key=id"]) == 2
    assert "line 2 (images/0.jpg) and line 4 (images/2.jpg) have one id" in capsys.readouterr().err


def test_several_rows_of_one_key_and_image_are_one_example(tmp_path: Path) -> None:
    rows = "id,image,text\na,images/0.jpg,zero\na,./images/0.jpg,nought\n"
    source = write(tmp_path / "release", IMAGES | {"t.csv": rows})
    found = prepare(source, tmp_path / "root", table={"file": "t.csv", "text": "text", "key": "id"})
    assert {key: record.captions for key, record in records(found / "train").items()} == {"a": ("zero", "nought")}


def test_people_who_tag_give_no_scores_and_each_tag_counts_fully(tmp_path: Path) -> None:
    source = write(tmp_path / "release", IMAGES | {"t.csv": "image,tags\nimages/0.jpg,cat|dog|cat\n"})
    found = prepare(source, tmp_path / "root", table={"file": "t.csv", "tags": "tags", "separator": "|"})
    (record,) = records(found / "train").values()
    assert (record.labels, record.scores, record.captions) == (("cat", "dog"), (1.0, 1.0), ())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("image,text\n../secret.jpg,x\n", r"t\.csv: line 2: image leads out of the folder"),
        ("image,text\n/etc/passwd,x\n", r"line 2: image leads out of the folder"),
        ("image,text\nimages/0.jpg\n", r"line 2: has not as many cells"),
        ("image,text\nimages/0.jpg,a,b\n", r"line 2: has not as many cells"),
        ("picture,text\nimages/0.jpg,a\n", r"line 2: has no column 'image'\. It has picture, text"),
        ("image,text\n,a\n", r"line 2: image must be text"),
        ('image,text\n"images/0.jpg,a\n', r"line \d: .*(quote|end of data)"),
    ],
)
def test_a_malformed_row_is_one_line_that_names_it(tmp_path: Path, text: str, problem: str) -> None:
    source = write(tmp_path / "release", IMAGES | {"t.csv": text})
    with pytest.raises(UserError, match=problem):
        prepare(source, tmp_path / "root", table={"file": "t.csv", "text": "text"})


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"tags": ["a"], "s": [0.5, 0.4]}, "1 tags, but 2 scores"),
        ({"tags": ["a"], "s": [7]}, "a score must be from 0 to 1"),
        ({"tags": {"a": 1}, "s": []}, "tags must be a list of texts"),
        ({"tags": [], "s": [], "part": "somewhere"}, "unknown split 'somewhere'. Known: train"),
        ({"tags": [], "s": [], "id": "a/b"}, "a key must be letters"),
    ],
)
def test_a_malformed_value_is_one_line_that_names_it(tmp_path: Path, row: dict[str, object], problem: str) -> None:
    whole = {"image": "images/0.jpg", "part": "train", "id": "a"} | row
    source = write(tmp_path / "release", IMAGES | {"t.jsonl": json.dumps(whole) + "\n"})
    table = {"file": "t.jsonl", "tags": "tags", "scores": "s", "split": "part", "key": "id"}
    with pytest.raises(UserError, match=rf"t\.jsonl: line 1: {problem}"):
        prepare(source, tmp_path / "root", table=table)


def test_images_that_a_table_names_but_lacks_are_missing(tmp_path: Path) -> None:
    source = write(tmp_path / "release", IMAGES | {"t.csv": "image,text\nimages/0.jpg,a\nimages/9.jpg,b\n"})
    table = {"file": "t.csv", "text": "text"}
    with pytest.raises(UserError, match="1 of 2 images are missing"):
        prepare(source, tmp_path / "root", table=table)
    found = prepare(source, tmp_path / "root", 0.5, table=table)
    assert report_of(found)["splits"]["train"]["lost_by_reason"] == {"missing": 1}
    write(source, {"images/9.jpg": picture(9)})  # found later: the same command takes it up
    assert len(records(prepare(source, tmp_path / "root", table=table) / "train")) == 2


@pytest.mark.parametrize(
    ("files", "config", "chosen"),
    [
        ({"a/0.txt": "zero"}, {}, "layout=auto chose sidecars (a text beside each image); layout=table or "),
        ({"a/0.txt": "zero"}, {"layout": "sidecars"}, "The layout is sidecars (a text beside each image); "),
        ({}, {}, "layout=auto chose class_folders (folders named after classes); layout=table or layout=sidecars "),
        (
            {"t.csv": "image,text\na/0.jpg,zero\na/1.jpg,one\n"},
            {"table": {"file": "t.csv", "text": "text"}},
            "layout=auto chose table (the rows of table.file); layout=sidecars or layout=class_folders chooses another",
        ),
    ],
)
def test_a_refusal_of_losses_names_the_layout_and_how_to_choose_another(
    tmp_path: Path, files: dict[str, bytes | str], config: dict[str, object], chosen: str
) -> None:
    images: dict[str, bytes | str] = {"a/0.jpg": picture(0), "a/1.jpg": b"torn", "b/2.jpg": picture(2)}
    source = write(tmp_path / "release", images | files)
    with pytest.raises(UserError, match=r"images are missing or unreadable.*" + re.escape(chosen)):
        prepare(source, tmp_path / "root", **config)


def test_texts_beside_images_in_folders_and_tars(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "train/a.jpg": picture(0),
        "train/a.txt": "one\n\n two \n",
        "val/b.png": picture(1),
    }
    files |= {"val/b.txt": "three", "more.tar": tar({"x.jpg": picture(2), "x.txt": "vier ü".encode()})}
    found = prepare(write(tmp_path / "release", files), tmp_path / "root")
    train = {record.captions: record.image for record in records(found / "train").values()}
    assert train == {("one", "two"): picture(0), ("vier ü",): picture(2)}
    assert [record.captions for record in records(found / "validation").values()] == [("three",)]
    write(tmp_path / "release", {"train/c.jpg": picture(3)})
    found = prepare(tmp_path / "release", tmp_path / "root", 0.5)
    assert report_of(found)["splits"]["train"]["lost_by_reason"] == {"no text": 1}


def test_folders_named_after_classes_are_images_without_texts(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"train/deep/red_fox/{n}.jpg": picture(n) for n in range(3)}
    files |= {"val/cat/1.jpg": picture(9), "stray.jpg": picture(4)}
    found = prepare(write(tmp_path / "release", files), tmp_path / "root", part="unimodal")
    assert {record.classes for record in records(found / "train").values()} == {("red fox",)}
    assert {record.classes for record in records(found / "validation").values()} == {("cat",)}
    assert report_of(found)["unused_files"] == {"in no folder of a class": 1}
    assert not (tmp_path / "root" / "pairs").exists()


def test_the_validation_part_is_drawn_by_the_key_alone(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"{('cat', 'dog')[n % 2]}/{n}.jpg": picture(n) for n in range(200)}
    source = write(tmp_path / "release", files)
    few = records(prepare(source, tmp_path / "few", part="unimodal", validation_fraction=0.1) / "validation")
    many = records(prepare(source, tmp_path / "many", part="unimodal", validation_fraction=0.3) / "validation")
    assert 5 < len(few) < 40 < len(many) < 90 and few.keys() < many.keys()


def test_keys_of_paths_are_safe_and_differ() -> None:
    paths = ["a/b.jpg", "a-b.jpg", "a/b.png", "é" * 300 + ".jpg", "../x.jpg", "x" * 300 + ".jpg", "\udce9.jpg"]
    keys = [path_key(path) for path in paths]
    assert len(set(keys)) == len(paths)
    assert all(KEY_PATTERN.fullmatch(key) and len(key) <= 95 for key in keys)
    assert path_key("a/b.jpg").startswith("a-b-")


def test_a_folder_that_holds_nothing_to_learn_from_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no examples found\. Expected folders .* Zips are not read: unpack them"):
        prepare(write(tmp_path / "zips", {"a.zip": b""}), tmp_path / "root")
    source = write(tmp_path / "release", IMAGES | {"t.csv": "image\n"})
    for table, problem in (({}, "table.file: required"), ({"file": "t.csv"}, "name at least one column")):
        with pytest.raises(UserError, match=problem):
            prepare(source, tmp_path / "root", layout="table", table=table)
    with pytest.raises(UserError, match=r"nowhere\.csv: no such file"):
        prepare(source, tmp_path / "root", table={"file": "nowhere.csv", "text": "text"})


def test_a_file_that_was_mended_in_place_is_noticed(tmp_path: Path) -> None:
    pictures: dict[str, bytes | str] = {"a/0.jpg": picture(0), "a/1.jpg": b"torn", "a/2.jpg": picture(2)}
    source = write(tmp_path / "release", pictures | {"a/0.txt": "zero", "a/1.txt": "one", "a/2.txt": "two"})
    with pytest.raises(UserError, match="1 of 3 images are missing or unreadable"):
        prepare(source, tmp_path / "root")
    write(source, {"a/1.jpg": picture(1)})
    found = prepare(source, tmp_path / "root")
    assert len(records(found / "train")) == 3
    write(source, {"a/2.txt": "three"})
    assert ("three",) in {record.captions for record in records(prepare(source, tmp_path / "root") / "train").values()}
    (source / "a" / "9.txt").symlink_to("nowhere")  # a link to nothing is no error
    prepare(source, tmp_path / "root")


def test_an_image_of_a_table_that_was_mended_in_place_is_noticed(tmp_path: Path) -> None:
    source = write(tmp_path / "release", IMAGES | {"images/0.jpg": b"torn", "t.csv": "image,text\nimages/0.jpg,a\n"})
    table = {"file": "t.csv", "text": "text"}
    with pytest.raises(UserError, match="none of the 1 examples"):
        prepare(source, tmp_path / "root", table=table)
    write(source, IMAGES)
    assert len(records(prepare(source, tmp_path / "root", table=table) / "train")) == 1


def test_a_class_is_the_folder_that_holds_the_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files: dict[str, bytes | str] = {f"animals/{name}/0.jpg": picture(n) for n, name in enumerate(("cats", "dogs"))}
    source = write(tmp_path / "release", files | {"animals/cats/licence.txt": "free"})  # no sidecar
    found = prepare(source, tmp_path / "root", part="unimodal")
    assert {record.classes for record in records(found / "train").values()} == {("cats",), ("dogs",)}
    assert "no validation split was written, and training needs one: set validation_fraction" in capsys.readouterr().out
    write(source, {"animals/val/cats/1.jpg": picture(3)})
    assert len(records(prepare(source, tmp_path / "root", part="unimodal") / "validation")) == 1
    with pytest.raises(UserError, match="all images are of one class, 'cats'"):
        prepare(write(tmp_path / "one", {"cats/0.jpg": picture(0)}), tmp_path / "other")
