"""ImageNet in the layouts that users have; names, homonyms and balance."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from image_text import DATA, files_of, options, picture, records, report_of, tar, write

from data_loaders.prepare.imagenet import ImageNetPreparerConfig, class_names, prepare_imagenet, read_synsets
from data_loaders.shards import open_index
from vlm.errors import UserError
from vlm.records import OfficialFile

MAPPING = """\
n01440764 tench, Tinca tinca
n02012849 crane
n03126707 crane
n03710637 maillot
n03710721 maillot, tank suit
"""
WNIDS = [line.split(" ")[0] for line in MAPPING.splitlines()]
COUNTS = dict(zip(WNIDS, (7, 3, 5, 4, 6), strict=True))
REAL = DATA / "imagenet" / "LOC_synset_mapping.txt"


def images(wnid: str) -> dict[str, bytes]:
    return {f"{wnid}_{n}.JPEG": picture(WNIDS.index(wnid) * 100 + n) for n in range(COUNTS[wnid])}


def validation() -> dict[str, tuple[str, bytes]]:
    """Name -> class and image."""
    return {f"ILSVRC2012_val_{n:08d}.JPEG": (WNIDS[n % 5], picture(1000 + n)) for n in range(1, 11)}


def folders() -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {"LOC_synset_mapping.txt": MAPPING}
    for wnid in WNIDS:
        files |= {f"ILSVRC/train/{wnid}/{name}": data for name, data in images(wnid).items()}
    return files | {f"ILSVRC/val/{wnid}/{name}": data for name, (wnid, data) in validation().items()}


def tars() -> dict[str, bytes | str]:
    """As ImageNet is downloaded, and the solutions as its competition gives them."""
    classes = {f"{wnid}.tar": tar(images(wnid)) for wnid in WNIDS}
    rows = "".join(f"{name[:-5]},{wnid} 1 2 3 4 \n" for name, (wnid, _) in reversed(validation().items()))
    return {
        "LOC_synset_mapping.txt": MAPPING,
        "LOC_val_solution.csv": "ImageId,PredictionString\n" + rows,
        "ILSVRC2012_img_train.tar": tar(classes),
        "ILSVRC2012_img_val.tar": tar({name: data for name, (_, data) in validation().items()}),
    }


def flat() -> dict[str, bytes | str]:
    """A tar a class, validation in one folder, and a list of its classes in order."""
    files: dict[str, bytes | str] = {"LOC_synset_mapping.txt": MAPPING}
    files |= {f"train/{wnid}.tar": tar(images(wnid)) for wnid in WNIDS}
    files |= {f"val/{name}": data for name, (_, data) in validation().items()}
    wnids = "".join(f"{wnid}\n" for _, (wnid, _) in validation().items())
    return files | {"imagenet_2012_validation_synset_labels.txt": wnids}


def prepare(source: Path, root: Path, **config: object) -> Path:
    prepare_imagenet(ImageNetPreparerConfig(**config), options(source, root, max_missing=0))
    return root / "unimodal"


@pytest.mark.parametrize("layout", [tars, flat])
def test_folders_and_tars_give_the_same_shards(tmp_path: Path, layout: object) -> None:
    expected = prepare(write(tmp_path / "folders", folders()), tmp_path / "expected")
    found = prepare(write(tmp_path / "tars", layout()), tmp_path / "found")  # type: ignore[operator]  # one of two functions
    for split in ("train", "validation"):
        assert files_of(found / split) == files_of(expected / split)
    train, held_out = records(found / "train"), records(found / "validation")
    assert (len(train), len(held_out)) == (25, 10)
    assert (train["n01440764_3"].image, train["n01440764_3"].classes) == (picture(3), ("tench",))
    assert held_out["ILSVRC2012_val_00000001"].classes == ("crane",)
    index = open_index(found / "train")
    assert index.classes == tuple(sorted({name for record in train.values() for name in record.classes}))
    assert index.complete == ("classes",)
    assert not (found.parent / "pairs").exists()


def test_classes_of_one_name_are_one_class_or_two(tmp_path: Path) -> None:
    source = write(tmp_path / "release", folders())
    together = records(prepare(source, tmp_path / "together") / "train")
    assert Counter(record.classes for record in together.values()) == {("tench",): 7, ("crane",): 8, ("maillot",): 10}
    manifest = json.loads((tmp_path / "together" / "unimodal" / "manifest.json").read_text())
    assert (manifest["classes"], manifest["collapsed"]) == (3, ["crane", "maillot"])
    apart = records(prepare(source, tmp_path / "apart", homonyms="distinguish") / "train")
    assert Counter(record.classes for record in apart.values()) == {
        ("tench",): 7,
        ("crane bird",): 3,
        ("construction crane",): 5,
        ("maillot",): 4,
        ("tank suit",): 6,
    }


def test_all_synonyms_may_be_kept(tmp_path: Path) -> None:
    names = class_names(_synsets(tmp_path, MAPPING), ImageNetPreparerConfig(names="all"))
    assert names["n01440764"] == ("tench", "Tinca tinca")
    assert names["n03710637"] == names["n03710721"] == ("maillot", "tank suit")
    apart = class_names(_synsets(tmp_path, MAPPING), ImageNetPreparerConfig(names="all", homonyms="distinguish"))
    assert (apart["n03710637"], apart["n03710721"]) == (("maillot",), ("tank suit",))


def test_homonyms_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    synsets = _synsets(tmp_path, "n00000001 bank\nn00000002 bank\n")
    with pytest.raises(UserError, match=r"n00000001 and n00000002 are both called 'bank' .* renamed\.n00000001"):
        class_names(synsets, ImageNetPreparerConfig(homonyms="distinguish"))
    named = ImageNetPreparerConfig(homonyms="distinguish", renamed={"n00000001": "river bank"})
    assert class_names(synsets, named) == {"n00000001": ("river bank",), "n00000002": ("bank",)}
    with pytest.raises(UserError, match="renamed: n00000003 is no class"):
        class_names(synsets, ImageNetPreparerConfig(renamed={"n00000003": "x"}))


def test_balance_takes_as_many_of_each_class_after_the_collapse(tmp_path: Path) -> None:
    source = write(tmp_path / "release", folders())
    found = prepare(source, tmp_path / "balanced", balanced=True)
    balanced = records(found / "train")
    assert Counter(record.classes for record in balanced.values()) == {("tench",): 7, ("crane",): 7, ("maillot",): 7}
    assert report_of(found)["splits"]["train"]["left_out"] == 4
    fewer = records(prepare(source, tmp_path / "fewer", balanced=True, images_per_class=2) / "train")
    assert set(Counter(record.classes for record in fewer.values()).values()) == {2}
    assert fewer.keys() < balanced.keys()  # by hash: nested, and the same for everyone
    with pytest.raises(UserError, match=r"images_per_class=8: 1 classes of train have fewer, such as tench"):
        prepare(source, tmp_path / "more", balanced=True, images_per_class=8)
    with pytest.raises(UserError, match="has no effect without balanced=true"):
        prepare(source, tmp_path / "more", images_per_class=8)


def test_images_of_no_known_class_are_named(tmp_path: Path) -> None:
    files = folders() | {"ILSVRC/train/n99999999/n99999999_1.JPEG": picture(1), "ILSVRC/logo.jpg": picture(2)}
    files |= {"ILSVRC/test/ILSVRC2012_test_00000001.JPEG": picture(3)}
    found = prepare(write(tmp_path / "release", files), tmp_path / "root")
    assert report_of(found)["unused_files"] == {"of class n99999999, which has no name": 1, "of no class": 1}


def test_what_the_release_lacks_is_named(tmp_path: Path) -> None:
    files = flat()
    del files["imagenet_2012_validation_synset_labels.txt"]
    files["ILSVRC2012_validation_ground_truth.txt"] = "490\n361\n"
    with pytest.raises(UserError, match=r"ground_truth\.txt: holds numbers that only .* Put LOC_val_solution\.csv"):
        prepare(write(tmp_path / "numbers", files), tmp_path / "root")
    del files["LOC_synset_mapping.txt"]
    with pytest.raises(UserError, match=r"LOC_synset_mapping\.txt, which names the classes, is not here"):
        prepare(write(tmp_path / "nameless", {"a/n01440764/1.jpg": picture(1)}), tmp_path / "root")
    for line, problem in (("tench", "line 1: expected a wnid"), ("n01440764 a\nn01440764 b", "stands twice")):
        with pytest.raises(UserError, match=problem):
            _synsets(tmp_path, line)


def test_a_damaged_image_is_more_than_the_default_allows(tmp_path: Path) -> None:
    files = folders()
    files["ILSVRC/train/n01440764/n01440764_0.JPEG"] = b"\xff\xd8 torn"
    with pytest.raises(UserError, match="1 of 35 images are missing or unreadable"):
        prepare(write(tmp_path / "release", files), tmp_path / "root")


def test_class_names_may_be_written_where_pretraining_looks_for_pairs(tmp_path: Path) -> None:
    source = write(tmp_path / "release", folders())
    prepare_imagenet(ImageNetPreparerConfig(part="pairs"), options(source, tmp_path / "root"))
    assert len(records(tmp_path / "root" / "pairs" / "train")) == 25


def _synsets(folder: Path, text: str) -> dict[str, tuple[str, ...]]:
    (folder / "mapping.txt").write_text(text)
    return read_synsets(OfficialFile.given(folder / "mapping.txt"))


@pytest.mark.skipif(not REAL.is_file(), reason=f"the names of ImageNet's classes are not at {REAL}")
def test_the_real_names_have_two_homonyms() -> None:
    synsets = read_synsets(OfficialFile.given(REAL))
    assert len(synsets) == 1000
    together = class_names(synsets, ImageNetPreparerConfig())
    assert len(set(together.values())) == 998
    apart = class_names(synsets, ImageNetPreparerConfig(homonyms="distinguish"))
    assert len(set(apart.values())) == 1000
    changed = {wnid: names for wnid, names in apart.items() if names != together[wnid]}
    assert changed == {
        "n02012849": ("crane bird",),
        "n03126707": ("construction crane",),
        "n03710721": ("tank suit",),
    }
    assert together["n01484850"] == ("great white shark",)
    every = class_names(synsets, ImageNetPreparerConfig(names="all"))
    assert every["n01484850"][1] == "white shark"
