"""Releases as they are downloaded become data roots that the tasks read; what is lost is counted and named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_loaders.images import DecodedImages
from data_loaders.prepare.gqa import GQAPreparerConfig, prepare_gqa
from data_loaders.prepare.nlvr2 import NLVR2PreparerConfig, prepare_nlvr2
from data_loaders.prepare.preparation import Options, ordered_map
from data_loaders.prepare.vqav2 import VQAv2PreparerConfig, prepare_vqav2
from data_loaders.shards import ShardReader, open_index
from data_loaders.transforms import ImageTransform
from vlm.cli import main
from vlm.errors import UserError
from vlm.tasks.gqa import GQATask
from vlm.tasks.nlvr2 import NLVR2Task
from vlm.tasks.vqav2 import VQAv2Task

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FIXTURES = DATA / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"official example files are not at {FIXTURES}")
needs_nlvr2 = pytest.mark.skipif(
    not (DATA / "nlvr2" / "dev.json").is_file(), reason=f"the NLVR2 dev set is not at {DATA / 'nlvr2'}"
)


def picture(number: int, kind: str = "JPEG") -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (9, 12 + number, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def write(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def zipped(folder: Path, files: Mapping[str, bytes | str], name: str = "release.zip") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in files.items():
            archive.writestr(member, content)
    return folder


def options(source: Path, root: Path, max_missing: float = 0.0) -> Options:
    return Options(source, root, max_missing, progress=False)


def report_of(root: Path, task: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((root / task / "report.json").read_text())
    return value


def manifest_of(root: Path, task: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((root / task / "manifest.json").read_text())
    return value


# --- Small releases, laid out as the real ones -----------------------------------------------------------------------


def vqav2_files(images: Sequence[int] = (1, 2, 3)) -> dict[str, bytes | str]:
    """Two questions an image in each split; test-dev2015 asks about the first image of test2015."""
    files: dict[str, bytes | str] = {}
    for split, first in (("train2014", 0), ("val2014", 10_000), ("test2015", 20_000), ("test-dev2015", 20_000)):
        asked = images[:1] if split == "test-dev2015" else images
        rows = [
            {"question_id": first + i * 1000 + n, "image_id": i, "question": f"what is {n}?"}
            for i in asked
            for n in (0, 1)
        ]
        files[f"v2_OpenEnded_mscoco_{split}_questions.json"] = json.dumps({"info": {}, "questions": rows})
        if not split.startswith("test"):
            said = [
                {
                    "question_id": row["question_id"],
                    "image_id": row["image_id"],
                    "answers": [{"answer": "The Red", "answer_id": n} for n in range(10)],
                    "multiple_choice_answer": "The Red",
                    "answer_type": "other",
                    "question_type": "what is",
                }
                for row in rows
            ]
            files[f"v2_mscoco_{split}_annotations.json"] = json.dumps({"annotations": said})
        if split != "test-dev2015":
            for number in images:
                files[f"{split}/COCO_{split}_{number:012d}.jpg"] = picture(number)
    return files


def gqa_files() -> dict[str, bytes | str]:
    def rows(prefix: str, number: int, labelled: bool = True, first: int = 0) -> str:
        row = {"question": "what?", "types": {"structural": "query"}} | ({"answer": "red"} if labelled else {})
        return json.dumps({f"{prefix}{n}": row | {"imageId": f"n{n % 4}"} for n in range(first, first + number)})

    files: dict[str, bytes | str] = {
        f"{name}_balanced_questions.json": rows(name, 3) for name in ("train", "val", "testdev")
    }
    files |= {f"train_all_questions/train_all_questions_{n}.json": rows("train", 4, first=4 * n) for n in range(10)}
    files |= {"val_all_questions.json": rows("val", 4), "submission_all_questions.json": rows("s", 2, labelled=False)}
    box = {"x": 1, "y": 2, "w": 3, "h": 4.5, "name": "dog"}
    scene = {"width": 9, "height": 9, "objects": {"7": box}}
    files["train_sceneGraphs.json"] = json.dumps({f"n{n}": scene for n in range(4)})
    files["val_choices.json"] = json.dumps({f"val{n}": {"valid": ["red"], "plausible": []} for n in range(4)})
    return files | {f"images/n{n}.jpg": picture(n) for n in range(4)}


def nlvr2_files() -> dict[str, bytes | str]:
    def rows(split: str, pairs: Sequence[int]) -> str:
        return "".join(
            json.dumps({"identifier": f"{split}-7-{pair}-{s}", "sentence": f"{s} dogs", "label": str(s == 0)}) + "\n"
            for pair in pairs
            for s in (0, 1)
        )

    files: dict[str, bytes | str] = {
        f"data/{split}.json": rows(split, (0, 1)) for split in ("train", "dev", "test1", "test2")
    }
    files |= {
        "data/balanced/balanced_dev.json": rows("dev", (1,)),
        "data/unbalanced/unbalanced_dev.json": rows("dev", (0,)),
    }
    for split in ("train", "dev", "test1", "test2"):
        folder = f"images/{split}/42" if split == "train" else split
        for pair in (0, 1):
            for image in (0, 1):  # .png names; half of them hold JPEG data
                content = picture(pair, ("PNG", "JPEG")[image])
                files[f"{folder}/{split}-7-{pair}-img{image}.png"] = content
    return files


Prepare = Callable[[Options], None]
RELEASES: dict[str, tuple[Callable[[], dict[str, bytes | str]], Prepare]] = {
    "vqav2": (vqav2_files, lambda given: prepare_vqav2(VQAv2PreparerConfig(), given)),
    "gqa": (gqa_files, lambda given: prepare_gqa(GQAPreparerConfig(), given)),
    "nlvr2": (nlvr2_files, lambda given: prepare_nlvr2(NLVR2PreparerConfig(), given)),
}
each_release = pytest.mark.parametrize("task", RELEASES)


# --- What is written -------------------------------------------------------------------------------------------------


@each_release
def test_zipped_and_unpacked_releases_give_the_same_data(tmp_path: Path, task: str) -> None:
    make, prepare = RELEASES[task]
    files = make()
    prepare(options(write(tmp_path / "files", files), tmp_path / "from-files"))
    prepare(options(zipped(tmp_path / "zips", files), tmp_path / "from-zips"))
    left, right = (tmp_path / name / task for name in ("from-files", "from-zips"))
    names = sorted(str(file.relative_to(left)) for file in left.rglob("*") if file.is_file())
    assert names == sorted(str(file.relative_to(right)) for file in right.rglob("*") if file.is_file())
    for name in names:
        if name not in ("manifest.json", "report.json"):  # they name the sources
            assert (left / name).read_bytes() == (right / name).read_bytes()
    assert report_of(tmp_path / "from-files", task)["splits"] == report_of(tmp_path / "from-zips", task)["splits"]


@each_release
def test_images_and_official_files_are_kept_byte_for_byte(tmp_path: Path, task: str) -> None:
    make, prepare = RELEASES[task]
    files = make()
    prepare(options(zipped(tmp_path / "zips", files), tmp_path / "root"))
    originals = {Path(name).stem: content for name, content in files.items()}
    reader = ShardReader(open_index(tmp_path / "root" / task / "images"))
    assert len(reader) == sum(name.endswith((".jpg", ".png")) for name in files)
    assert all(record.image == originals[record.key] for record in reader)
    manifest = manifest_of(tmp_path / "root", task)
    for name, entry in manifest["files"].items():
        content = (tmp_path / "root" / task / name).read_bytes()
        assert content.decode() == originals[Path(name).stem]
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["source"].startswith("release.zip: ")
    archive = (tmp_path / "zips" / "release.zip").read_bytes()
    assert manifest["archives"]["release.zip"]["sha256"] == hashlib.sha256(archive).hexdigest()
    assert manifest["images"]["examples"] == len(reader)
    assert "CC-BY-4.0" in str(manifest["licences"])


def test_the_tasks_read_what_was_prepared(tmp_path: Path) -> None:
    """All three into one root, as a study over tasks wants them."""
    for task, (make, prepare) in RELEASES.items():
        prepare(options(write(tmp_path / task, make()), tmp_path / "root"))
    root = tmp_path / "root"
    vqav2, gqa, nlvr2 = VQAv2Task(min_occurrences=6), GQATask(), NLVR2Task()
    assert [len(vqav2.read(root, split)) for split in vqav2.splits] == [6, 6, 6, 2]
    assert all(question.answers == () for split in ("test", "test_dev") for question in vqav2.read(root, split))
    assert vqav2.vocabulary(root) == ("red",)  # normalised
    assert vqav2.target(vqav2.read(root, "train")[0], {"red": 0}) == {0: 1.0}
    assert [len(gqa.read(root, split)) for split in gqa.splits] == [3, 3, 3, 2]
    assert len(GQATask(train_on="all").read(root, "train")) == 40
    assert GQATask(train_on="all").vocabulary(root) == ("red",)
    assert [len(nlvr2.read(root, split)) for split in nlvr2.splits] == [4, 4, 4, 4]
    for any_task in (vqav2, gqa, nlvr2):
        images = DecodedImages(ShardReader(open_index(root / any_task.type / "images")), ImageTransform(4))
        for split in any_task.splits:
            for question in any_task.read(root, split):
                assert images(question.image_keys).shape == (any_task.images_per_text, 3, 4, 4)
    kept = {str(file.relative_to(root)) for file in root.rglob("*.json")}
    assert {"gqa/val_all_questions.json", "gqa/train_sceneGraphs.json", "gqa/val_choices.json"} <= kept
    assert {"nlvr2/balanced/balanced_dev.json", "nlvr2/unbalanced/unbalanced_dev.json"} <= kept


def test_the_report_counts_questions_images_and_absent_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: content for name, content in gqa_files().items() if "submission" not in name}
    prepare_gqa(GQAPreparerConfig(), options(write(tmp_path / "files", files), tmp_path / "root"))
    report = report_of(tmp_path / "root", "gqa")
    assert {name: (entry["questions"], entry["images"]) for name, entry in report["splits"].items()} == {
        "train": (3, 3),
        "train, all questions": (40, 4),
        "validation": (3, 3),
        "validation, all questions": (4, 4),
        "test": (3, 3),
    }
    assert report["images"]["asked_for"] == report["images"]["found"] == 4
    assert report["files"]["submission_all_questions.json"] == "absent"
    assert report["files"]["val_sceneGraphs.json"] == "absent"
    assert "absent: " in capsys.readouterr().out


def test_only_the_chosen_splits_are_prepared(tmp_path: Path) -> None:
    source = write(tmp_path / "files", vqav2_files())
    prepare_vqav2(VQAv2PreparerConfig(splits=("validation",)), options(source, tmp_path / "root"))
    assert list(report_of(tmp_path / "root", "vqav2")["splits"]) == ["validation"]
    assert len(open_index(tmp_path / "root" / "vqav2" / "images")) == 3
    (source / "v2_OpenEnded_mscoco_test2015_questions.json").unlink()
    with pytest.raises(
        UserError, match=r"v2_OpenEnded_mscoco_test2015_questions\.json, which split test needs, is not"
    ):
        prepare_vqav2(VQAv2PreparerConfig(splits=("test",)), options(source, tmp_path / "root"))


# --- Lost images -----------------------------------------------------------------------------------------------------


def damaged(files: dict[str, bytes | str]) -> dict[str, bytes | str]:
    """Five of nine images are lost, each for another reason; one is there twice, and only the second copy decodes."""
    train = "train2014/COCO_train2014_{:012d}.jpg".format
    val = "val2014/COCO_val2014_{:012d}.jpg".format
    del files[train(1)]
    files[train(2)] = b""
    files[val(1)] = b"<html>404 Not Found</html>"
    whole = files[val(2)]
    assert isinstance(whole, bytes)
    files[val(2)] = whole[: len(whole) // 2]
    large = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(large, "PNG")
    files[val(3)] = large.getvalue()
    files["a/" + Path(train(3)).name] = b"\xff\xd8 torn"
    return files


def test_lost_images_are_an_error_that_counts_and_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "files", damaged(vqav2_files()))
    for allowed in (0, 0.3, 0.99):
        with pytest.raises(UserError, match=r"such as COCO_train2014_000000000001; --max-missing .* allows fewer"):
            prepare_vqav2(VQAv2PreparerConfig(), options(source, tmp_path / "root", allowed))
        (report,) = (tmp_path / "root").iterdir()  # the data is there whole or not at all, the report always
        assert report.name == "vqav2-report.json"
        lost = json.loads(report.read_text())
        assert lost["missing"] == ["COCO_train2014_000000000001"]
        assert ("found" in lost["images"]) is lost["images"]["opened"] is (allowed == 0.99)
        assert len(lost["unreadable"]) == (4 if allowed == 0.99 else 0)  # else the missing ones alone are too many
        assert "COCO_train2014_000000000001" in capsys.readouterr().out
    prepare_vqav2(VQAv2PreparerConfig(), options(source, tmp_path / "root", 1.0))
    assert [file.name for file in (tmp_path / "root").iterdir()] == ["vqav2"]


def test_lost_images_up_to_the_threshold_are_named_by_reason(tmp_path: Path) -> None:
    source = write(tmp_path / "files", damaged(vqav2_files()))
    prepare_vqav2(VQAv2PreparerConfig(), options(source, tmp_path / "root", 1.0))
    report = report_of(tmp_path / "root", "vqav2")
    assert report["missing"] == ["COCO_train2014_000000000001"]
    assert report["unreadable"] == {
        "COCO_train2014_000000000002": "empty file",
        "COCO_val2014_000000000001": "no image",
        "COCO_val2014_000000000002": "damaged",
        "COCO_val2014_000000000003": "too many pixels",
    }
    assert report["images"]["lost_by_reason"] == {
        "missing": 1,
        "damaged": 1,
        "empty file": 1,
        "no image": 1,
        "too many pixels": 1,
    }
    assert report["images"]["duplicates"] == 1
    assert report["images"]["differing_duplicates"] == ["COCO_train2014_000000000003"]
    train, validation = report["splits"]["train"], report["splits"]["validation"]
    assert (train["missing"], train["unreadable"], train["questions_without_image"]) == (1, 1, 4)
    assert (validation["missing"], validation["unreadable"], validation["questions_without_image"]) == (0, 3, 6)
    assert report["splits"]["test"]["questions_without_image"] == 0


def test_questions_about_lost_images_leave_training_and_stay_in_evaluation(tmp_path: Path) -> None:
    source = write(tmp_path / "files", damaged(vqav2_files()))
    prepare_vqav2(VQAv2PreparerConfig(), options(source, tmp_path / "root", 1.0))
    task, root = VQAv2Task(), tmp_path / "root"
    assert [question.id for question in task.train_questions(root)] == ["3000", "3001"]
    assert len(task.read(root, "train")) == len(task.read(root, "validation")) == 6
    from vlm.run import task_images

    images = task_images(task, root, ImageTransform(4))
    pixels = images(["COCO_val2014_000000000001", "COCO_train2014_000000000003"])
    assert pixels[0].unique().tolist() == [127] and len(pixels[1].unique()) > 5
    with pytest.raises(UserError, match="'COCO_val2014_000000000099' is asked for, but it is not here"):
        images(["COCO_val2014_000000000099"])  # an image that nobody said was lost


def test_either_image_of_a_pair_counts(tmp_path: Path) -> None:
    files = nlvr2_files()
    del files["images/train/42/train-7-1-img1.png"]
    prepare_nlvr2(NLVR2PreparerConfig(), options(write(tmp_path / "files", files), tmp_path / "root", 0.25))
    assert [question.id for question in NLVR2Task().train_questions(tmp_path / "root")] == [
        "train-7-0-0",
        "train-7-0-1",
    ]
    assert report_of(tmp_path / "root", "nlvr2")["splits"]["train"]["questions_without_image"] == 2


def test_each_split_may_lose_its_share_and_no_more(tmp_path: Path) -> None:
    """A hundred training images do not outweigh the one image that the test split asks about."""
    files = gqa_files()
    rows = {f"train{n}": {"question": "?", "imageId": f"t{n}", "answer": "red"} for n in range(99)}
    files = {"train_balanced_questions.json": json.dumps(rows)} | {f"t{n}.jpg": picture(n % 4) for n in range(99)}
    files["testdev_balanced_questions.json"] = '{"a": {"question": "?", "imageId": "lost", "answer": "red"}}'
    source = write(tmp_path / "files", files)
    with pytest.raises(
        UserError, match=r"1 of the 1 images of test are missing \(100\.0000%\), 1 of 100 in all, such as lost"
    ):
        prepare_gqa(GQAPreparerConfig(), options(source, tmp_path / "root", 0.5))


@pytest.mark.parametrize(
    ("task", "first", "second"),
    [
        ("gqa", "train_balanced_questions.json", "testdev_balanced_questions.json"),
        ("vqav2", "v2_OpenEnded_mscoco_train2014_questions.json", "v2_OpenEnded_mscoco_test2015_questions.json"),
    ],
)
def test_one_question_in_two_splits_is_refused(tmp_path: Path, task: str, first: str, second: str) -> None:
    make, prepare = RELEASES[task]
    files = make()
    files[second] = files[first]
    with pytest.raises(UserError, match=rf"{second}: question .* is one of .*{first} too"):
        prepare(options(write(tmp_path / "files", files), tmp_path / "root"))


def test_choices_may_come_in_chunks(tmp_path: Path) -> None:
    files = gqa_files()
    chunk = '{{"val{}": {{"valid": ["red"], "plausible": []}}}}'.format
    del files["val_choices.json"]
    files |= {f"val_choices/val_choices_{n}.json": chunk(n) for n in range(3)}
    source = write(tmp_path / "files", files)
    prepare_gqa(GQAPreparerConfig(), options(source, tmp_path / "root"))
    assert len(list((tmp_path / "root" / "gqa" / "val_choices").glob("*.json"))) == 3
    (source / "val_choices" / "val_choices_1.json").unlink()
    with pytest.raises(UserError, match=r"val_choices has 2 chunks; the release lacks val_choices_1\.json"):
        prepare_gqa(GQAPreparerConfig(), options(source, tmp_path / "root"))


@each_release
def test_a_prepared_file_that_has_changed_is_no_longer_read(tmp_path: Path, task: str) -> None:
    """A file of lines that is cut between two of them is a shorter file in good order."""
    make, prepare = RELEASES[task]
    prepare(options(write(tmp_path / "files", make()), tmp_path / "root"))
    reader = {"vqav2": VQAv2Task(), "gqa": GQATask(), "nlvr2": NLVR2Task()}[task]
    name = reader.official_split("validation")
    (file,) = (
        file
        for file in (tmp_path / "root" / task).glob(f"*{name}*.json")
        if "choices" not in file.name and "all" not in file.name and "annotations" not in file.name
    )
    assert reader.read(tmp_path / "root", "validation")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) if task == "nlvr2" else lines[0] + "\n")
    with pytest.raises(UserError, match=rf"{file.name}: has [0-9]+ bytes, but [0-9]+ when it was prepared"):
        reader.read(tmp_path / "root", "validation")


# --- What is refused -------------------------------------------------------------------------------------------------


def test_a_folder_that_was_not_prepared_is_never_replaced(tmp_path: Path) -> None:
    files = vqav2_files()
    source = write(tmp_path / "vqav2", files)
    with pytest.raises(UserError, match=r"vqav2: is there, but was not prepared"):
        prepare_vqav2(VQAv2PreparerConfig(), options(source, tmp_path))
    assert len([file for file in source.rglob("*") if file.is_file()]) == len(files)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_loaders.shards.save_file", full)
    with pytest.raises(UserError, match=r"root/vqav2: cannot be written \(.*No space left on device"):
        prepare_vqav2(VQAv2PreparerConfig(), options(write(tmp_path / "files", vqav2_files()), tmp_path / "root"))
    assert list((tmp_path / "root").iterdir()) == []


def test_a_prepared_folder_is_replaced_and_its_neighbours_stay(tmp_path: Path) -> None:
    source = write(tmp_path / "files", vqav2_files())
    (tmp_path / "root" / "gqa").mkdir(parents=True)
    for splits in (("train",), ("validation",)):
        prepare_vqav2(VQAv2PreparerConfig(splits=splits), options(source, tmp_path / "root"))  # type: ignore[arg-type]  # names of splits
    assert list(report_of(tmp_path / "root", "vqav2")["splits"]) == ["validation"]
    assert sorted(file.name for file in (tmp_path / "root").iterdir()) == ["gqa", "vqav2"]


@pytest.mark.parametrize("member", ["../val.json", "/etc/val.json", "a/../../b.jpg", "..\\b.jpg", "C:/b.jpg"])
def test_zips_whose_members_escape_are_refused(tmp_path: Path, member: str) -> None:
    zipped(tmp_path / "zips", {member: b"x"} | vqav2_files())
    with pytest.raises(UserError, match=r"release\.zip: member .* lies outside the archive"):
        prepare_vqav2(VQAv2PreparerConfig(), options(tmp_path / "zips", tmp_path / "root"))
    assert not (tmp_path / "root").exists() and not (tmp_path / "val.json").exists()


def test_a_zip_that_was_not_downloaded_to_its_end_is_named(tmp_path: Path) -> None:
    source = zipped(tmp_path / "zips", vqav2_files())
    content = (source / "release.zip").read_bytes()
    (source / "release.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"release\.zip: not a zip that can be read .* Download it again"):
        prepare_vqav2(VQAv2PreparerConfig(), options(source, tmp_path / "root"))


def test_copies_of_a_file_must_agree(tmp_path: Path) -> None:
    files = vqav2_files()
    name = "v2_OpenEnded_mscoco_val2014_questions.json"
    source = zipped(write(tmp_path / "files", files), {name: files[name]})
    prepare_vqav2(VQAv2PreparerConfig(), options(source, tmp_path / "root"))
    zipped(source, {name: "{}"})
    with pytest.raises(UserError, match=rf"{name} .*{name} have one name, but differ"):
        prepare_vqav2(VQAv2PreparerConfig(), options(source, tmp_path / "root"))


@pytest.mark.parametrize(
    ("task", "change", "problem"),
    [
        ("vqav2", {"v2_mscoco_val2014_annotations.json": None}, "annotations.json, which split validation needs"),
        ("vqav2", {"v2_mscoco_val2014_annotations.json": '{"annotations": []}'}, "question 11000 has no annotation"),
        ("gqa", {"train_all_questions/train_all_questions_4.json": None}, "lacks train_all_questions_4.json"),
        ("gqa", {"train_all_questions/train_all_questions_10.json": "{}"}, "holds train_all_questions_10.json besides"),
        ("gqa", {"train_sceneGraphs.json": '{"n1": 7}'}, 'train_sceneGraphs.json: image "n1": must be an object'),
        (
            "gqa",
            {"train_sceneGraphs.json": '{"n1": {"width": 9, "height": 0, "objects": {}}}'},
            'train_sceneGraphs.json: image "n1": "height" must be a number above 0. Got 0',
        ),
        (
            "gqa",
            {"train_sceneGraphs.json": '{"n1": {"width": 9, "height": 9, "objects": {"7": {"x": 1, "y": 1, "w": 1}}}}'},
            'train_sceneGraphs.json: image "n1", objects, 7: has no "h"; expected a number',
        ),
        (
            "gqa",
            {"train_sceneGraphs.json": '{"n1": {"width": 9, "height": 9, "objects": {}}}'},
            "train_sceneGraphs.json: has nothing on n0, nor on 1 others of train_balanced_questions.json",
        ),
        (
            "gqa",
            {"val_choices.json": '{"val1": {"valid": ["red"], "plausible": "red"}}'},
            'val_choices.json: question "val1": "plausible" must be a list of texts. Got "red"',
        ),
        (
            "gqa",
            {"val_choices.json": '{"train1": {"valid": ["red"], "plausible": ["red"]}}'},
            "val_choices.json: has nothing on val0, nor on 2 others of val_balanced_questions.json",
        ),
        (
            "gqa",
            {
                f"train_all_questions/train_all_questions_{n}.json": json.dumps(
                    {f"train{q}": {"question": "?", "imageId": "n1", "answer": "red"} for q in (n, n + (n == 6))}
                )
                for n in range(10)
            },
            "train_all_questions_7.json: question train7 stands in",
        ),
        (
            "gqa",
            {"val_all_questions.json": '{"val0": {"question": "?", "imageId": "n1", "answer": "red"}}'},
            "val_all_questions.json: has no question val1 of val_balanced_questions.json",
        ),
        (
            "gqa",
            {"testdev_balanced_questions.json": '{"a": {"imageId": "n1", "answer": "a", "answer": ""}}'},
            'testdev_balanced_questions.json: after the start: the key "answer" stands twice in one object',
        ),
        (
            "vqav2",
            {"v2_OpenEnded_mscoco_val2014_questions.json": '{"data_subtype": "train2014", "questions": []}'},
            'val2014_questions.json: "data_subtype" is "train2014". Is it another file?',
        ),
        (
            "vqav2",
            {"v2_mscoco_train2014_annotations.json": '{"annotations": [], "data_subtype": "val2014"}'},
            'train2014_annotations.json: "data_subtype" is "val2014"',
        ),
        (
            "gqa",
            {"val_choices.json": '{"val1": {"valid": [], "plausible": []}'},
            'choices.json: after record "val1": the file is cut off. Download it again',
        ),
        ("nlvr2", {"data/dev.json": '{"identifier": 7}'}, 'dev.json: line 1: "identifier" must be text. Got 7'),
        (
            "nlvr2",
            {"data/balanced/balanced_dev.json": '{"identifier": "dev-9-9-9", "sentence": "", "label": "True"}'},
            "balanced_dev.json: identifier dev-9-9-9 is not in dev.json",
        ),
    ],
)
def test_releases_that_are_not_whole_are_refused(
    tmp_path: Path, task: str, change: dict[str, str | None], problem: str
) -> None:
    make, prepare = RELEASES[task]
    files: dict[str, Any] = make() | change
    source = write(tmp_path / "files", {name: content for name, content in files.items() if content is not None})
    with pytest.raises(UserError) as error:
        prepare(options(source, tmp_path / "root"))
    assert problem in str(error.value)
    assert list((tmp_path / "root").iterdir()) == []


@each_release
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_release_with_any_damaged_file_is_prepared_or_named(tmp_path: Path, task: str, data: st.DataObject) -> None:
    """One file is cut short or holds something else. With every image allowed to be lost, only the official files can
    stop a preparation, and then the damaged one is named."""
    make, prepare = RELEASES[task]
    files = make()
    name = data.draw(st.sampled_from(sorted(files)))
    whole = files[name] if isinstance(files[name], bytes) else str(files[name]).encode()
    assert isinstance(whole, bytes)
    files[name] = data.draw(st.binary(max_size=30) | st.integers(0, len(whole) - 1).map(lambda end: whole[:end]))
    shutil.rmtree(tmp_path / "files", ignore_errors=True)
    shutil.rmtree(tmp_path / "root", ignore_errors=True)
    source = write(tmp_path / "files", files)
    try:
        prepare(options(source, tmp_path / "root", 1.0))
    except UserError as error:
        named = Path(name).name
        # Of two files that do not fit each other, either may be named.
        partner = {"questions": "annotations", "all": "balanced", "choices": "balanced", "balanced": "dev.json"}
        assert named in str(error) or any(a in named and b in str(error) for a, b in partner.items())
    else:
        report = report_of(tmp_path / "root", task)
        if name.endswith((".jpg", ".png")):
            assert set(report["unreadable"]) <= {Path(name).stem}
        assert sum(entry["questions"] for entry in report["splits"].values()) == num_questions(tmp_path / "root", task)


def num_questions(root: Path, task: str) -> int:
    """The questions of all splits, counted without our readers."""
    count = 0
    for name in manifest_of(root, task)["files"]:
        text = (root / task / name).read_text()
        if task == "nlvr2" and "/" not in name:
            count += sum(bool(line.strip()) for line in text.splitlines())
        elif "_questions" in name:
            count += len(json.loads(text).get("questions", ()) if task == "vqav2" else json.loads(text))
    return count


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_zip_with_damaged_bytes_is_prepared_or_named(tmp_path: Path, data: st.DataObject) -> None:
    """What comes through is what was put in: a zip has a checksum of each member."""
    files = nlvr2_files()
    for name in ("zips", "root"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    archive = zipped(tmp_path / "zips", files) / "release.zip"
    content = bytearray(archive.read_bytes())
    start = content.index(b"PK\x01\x02") if data.draw(st.booleans()) else 0  # the directory, or anywhere
    for at in data.draw(st.lists(st.integers(start, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    archive.write_bytes(content)
    try:
        prepare_nlvr2(NLVR2PreparerConfig(), options(tmp_path / "zips", tmp_path / "root", 1.0))
    except UserError as error:
        assert "release.zip" in str(error) or "is here" in str(error) or "is not in" in str(error)
    else:
        originals = {Path(name).stem: content for name, content in files.items()}
        reader = ShardReader(open_index(tmp_path / "root" / "nlvr2" / "images"))
        assert all(record.image == originals[record.key] for record in reader)
        for split in ("train", "dev"):
            copy = tmp_path / "root" / "nlvr2" / f"{split}.json"
            assert not copy.exists() or copy.read_text() == originals[split]


def test_a_clone_of_the_authors_repository_is_a_release(tmp_path: Path) -> None:
    """It holds the files of NLVR2's predecessor as well, under the same names."""
    files: dict[str, bytes | str] = {f"clone/nlvr2/{name}": content for name, content in nlvr2_files().items()}
    source = write(tmp_path / "nlvr2", files | {"clone/nlvr/dev/dev.json": '{"identifier": "1-0"}'})
    prepare_nlvr2(NLVR2PreparerConfig(), options(source, tmp_path / "root"))
    assert manifest_of(tmp_path / "root", "nlvr2")["files"]["dev.json"]["source"] == "clone/nlvr2/data/dev.json"


def test_what_was_prepared_before_is_no_part_of_the_release(tmp_path: Path) -> None:
    files = vqav2_files()
    source = write(tmp_path / "files", files)
    prepare_vqav2(VQAv2PreparerConfig(), options(source, source / "root"))
    name = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    content = json.loads(files[name])
    assert len(content["questions"]) > 1
    write(source, {name: json.dumps(content | {"questions": content["questions"][:1]})})  # a newer one
    prepare_vqav2(VQAv2PreparerConfig(), options(source, source / "root"))
    assert report_of(source / "root", "vqav2")["splits"]["test_dev"]["questions"] == 1
    write(source, {name: json.dumps(content | {"questions": []})})
    with pytest.raises(UserError, match="split test_dev holds no question"):
        prepare_vqav2(VQAv2PreparerConfig(), options(source, source / "root"))


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    files = vqav2_files()
    write(tmp_path / "elsewhere", {name: content for name, content in files.items() if name.startswith("train2014/")})
    source = write(tmp_path / "files", {name: content for name, content in files.items() if "/" not in name})
    os.symlink(tmp_path / "elsewhere" / "train2014", source / "train2014")
    os.symlink(source, source / "loop")
    prepare_vqav2(VQAv2PreparerConfig(splits=("train",)), options(source, tmp_path / "root"))
    assert report_of(tmp_path / "root", "vqav2")["images"]["duplicates"] == 0


def test_work_on_threads_keeps_its_order() -> None:
    assert list(ordered_map(lambda number: number * 2, range(50), num_workers=3)) == list(range(0, 100, 2))


# --- The command -----------------------------------------------------------------------------------------------------


def test_the_command_prepares_a_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = zipped(tmp_path / "zips", nlvr2_files())
    arguments = ["prepare", "nlvr2", "--from", str(source), "--to", str(tmp_path / "root"), "--max-missing", "0.1"]
    assert main([*arguments, "splits=[train,validation]"]) == 0
    assert "nlvr2: yield" in capsys.readouterr().out
    assert list(report_of(tmp_path / "root", "nlvr2")["splits"]) == ["train", "validation"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["gqa", "--to", "x"], "--from DIR must name"),
        (["gqa", "--from", "nowhere", "--to", "x"], "nowhere: no such folder"),
        (["gqa", "--from", ".", "--to", "x", "--max-missing", "2"], "must be a fraction from 0 to 1"),
        (["world", "--from", ".", "--to", "x"], "takes neither --from nor --max-missing"),
        (["nlvr2", "--from", ".", "--to", "x", "split=[train]"], "split: unknown key. Did you mean splits?"),
    ],
)
def test_the_command_explains_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *arguments]) == 2
    assert problem in capsys.readouterr().err


# --- Real files ------------------------------------------------------------------------------------------------------


@needs_fixtures
def test_the_real_vqav2_sample_is_prepared(tmp_path: Path) -> None:
    source = tmp_path / "files"
    source.mkdir()
    for theirs, ours in (
        ("questions", "v2_OpenEnded_mscoco_train2014_questions"),
        ("annotations", "v2_mscoco_train2014_annotations"),
    ):
        shutil.copy(FIXTURES / "vqav2" / f"{theirs}.json", source / f"{ours}.json")
    os.symlink(FIXTURES / "images", source / "images")
    prepare_vqav2(VQAv2PreparerConfig(), options(source, tmp_path / "root"))
    questions = VQAv2Task().read(tmp_path / "root", "train")
    assert [question.image_keys for question in questions] == [("COCO_train2014_000000458752",)] * 3
    original = (FIXTURES / "images" / "vqav2" / "COCO_train2014_000000458752.jpg").read_bytes()
    assert ShardReader(open_index(tmp_path / "root" / "vqav2" / "images"))[0].image == original
    assert VQAv2Task(min_occurrences=1).vocabulary(tmp_path / "root") == ("net", "orange", "pitcher")


@needs_fixtures
def test_the_real_gqa_sample_is_prepared(tmp_path: Path) -> None:
    source = tmp_path / "files"
    source.mkdir()
    shutil.copy(FIXTURES / "gqa" / "questions.json", source / "testdev_balanced_questions.json")
    os.symlink(FIXTURES / "images", source / "images")
    prepare_gqa(GQAPreparerConfig(), options(source, tmp_path / "root"))
    (question,) = GQATask().read(tmp_path / "root", "test")
    assert ShardReader(open_index(tmp_path / "root" / "gqa" / "images"))[0].key == question.image_keys[0] == "n578564"


@needs_fixtures
def test_real_nlvr2_pictures_are_jpeg_under_png_names(tmp_path: Path) -> None:
    source = tmp_path / "files"
    source.mkdir()
    shutil.copy(FIXTURES / "nlvr2" / "tiny-dev.json", source / "dev.json")
    os.symlink(FIXTURES / "images", source / "images")
    prepare_nlvr2(NLVR2PreparerConfig(), options(source, tmp_path / "root"))
    reader = ShardReader(open_index(tmp_path / "root" / "nlvr2" / "images"))
    assert len(reader) == len({key for q in NLVR2Task().read(tmp_path / "root", "validation") for key in q.image_keys})
    assert {record.image[:2] for record in reader} == {b"\xff\xd8"}
    assert torch.equal(ImageTransform(8)(reader[0].image), ImageTransform(8)(reader[0].image))


@needs_fixtures
@needs_nlvr2
def test_the_whole_real_nlvr2_dev_set_counts_its_missing_images(tmp_path: Path) -> None:
    """6,982 real rows, 8 of whose images are here."""
    source = tmp_path / "files"
    source.mkdir()
    shutil.copy(DATA / "nlvr2" / "dev.json", source / "dev.json")
    os.symlink(FIXTURES / "images", source / "images")
    with pytest.raises(
        UserError, match=r"8,094 of the 8,102 images of validation are missing \(99.*the others were not opened"
    ):
        prepare_nlvr2(NLVR2PreparerConfig(), options(source, tmp_path / "root", 0.9))
    prepare_nlvr2(NLVR2PreparerConfig(), options(source, tmp_path / "root", 1.0))
    report = report_of(tmp_path / "root", "nlvr2")
    assert report["splits"]["validation"]["questions"] == 6982
    assert report["images"]["found"] == 8
    assert len(NLVR2Task().read(tmp_path / "root", "validation")) == 6982  # an evaluation keeps them all


def test_a_file_of_another_split_is_refused(tmp_path: Path) -> None:
    files = nlvr2_files()
    files["data/test1.json"] = files["data/dev.json"]
    with pytest.raises(UserError, match=r"test1\.json: identifier dev-\S+ is not of test1"):
        prepare_nlvr2(NLVR2PreparerConfig(), options(write(tmp_path / "files", files), tmp_path / "root"))


def test_a_root_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare_nlvr2(NLVR2PreparerConfig(), options(write(tmp_path / "files", nlvr2_files()), tmp_path / "file"))
