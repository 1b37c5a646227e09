"""ImageNet (ILSVRC 2012, or any part of it) with the names of its classes.

Expected under the release's folder: `LOC_synset_mapping.txt` (a wnid, a space, its synonyms; another name by `synsets`)
and images in any of these forms, in any folders:

- folders named by wnid, `train/n01440764/n01440764_10026.JPEG`; below a folder called `val` they are of validation;
- tars of classes, `n01440764.tar`, and `ILSVRC2012_img_train.tar`, the tar of all of them, which is not unpacked;
- `ILSVRC2012_val_00000001.JPEG` in one folder or `ILSVRC2012_img_val.tar`, with `LOC_val_solution.csv`, or with
  `imagenet_2012_validation_synset_labels.txt` (one wnid a line).

Two pairs of the 1,000 classes share a name: two things are called crane, and two kinds of swimsuit maillot. The
reference paper takes classes of one name for one (`homonyms=collapse`); `homonyms=distinguish` gives each its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field, PositiveInt

from data_loaders.prepare.image_text import ImageTextConfig, Options, Plan, Scan, chunks, prepare_image_text
from data_loaders.prepare.originals import IMAGE_SUFFIXES, Problem, Report, folder_groups, listings, tar_members
from data_loaders.prepare.pieces import Location, Piece
from vlm.errors import UserError
from vlm.records import OfficialFile, lines

MAPPING, SOLUTION = "LOC_synset_mapping.txt", "LOC_val_solution.csv"
WNIDS_OF_VALIDATION = "imagenet_2012_validation_synset_labels.txt"
IDS_OF_VALIDATION = "ILSVRC2012_validation_ground_truth.txt"
WNID = re.compile(r"n[0-9]{8}")
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_([0-9]{8})")
REMEDY = "Download it again"
LICENCES = {
    "names": "WordNet licence",
    "images": "from the web, owned by others; for research that is not commercial, under ImageNet's terms of access",
}
RENAMED = {"n02012849": "crane bird", "n03126707": "construction crane"}
EXPECTED = "Expected folders or tars named by wnid (n01440764), or ILSVRC2012_val_*.JPEG with " + SOLUTION


class ImageNetPreparerConfig(ImageTextConfig):
    """`renamed` names classes by hand, by wnid; `distinguish` uses it where no synonym tells two classes apart."""

    type: Literal["imagenet"] = "imagenet"
    synsets: Path | None = None  # the file of the classes' names; None: LOC_synset_mapping.txt, wherever it is
    names: Literal["first", "all"] = "first"  # the first synonym, or all of them
    homonyms: Literal["collapse", "distinguish"] = "collapse"  # collapse: classes of one name are one
    renamed: dict[str, str] = Field(RENAMED)
    balanced: bool = False  # as many images of each class, taken by hash, after the collapse
    images_per_class: PositiveInt | None = None  # of train, with `balanced`; None: as many as the smallest class has
    part: Literal["unimodal", "pairs"] = "unimodal"  # `pairs`: to pretrain on class names in place of captions


def prepare_imagenet(config: ImageNetPreparerConfig, options: Options) -> None:
    """Write `<root>/unimodal`: images with the names of their classes."""
    if config.images_per_class and not config.balanced:
        raise UserError("images_per_class: has no effect without balanced=true")
    options.root.mkdir(parents=True, exist_ok=True)  # before times of folders are taken: it may lie inside
    folders = list(listings(options.source, options.root))

    def find(name: str) -> str:
        return next((f.inside(name) for f in folders if (options.source / f.inside(name)).is_file()), "")

    mapping = config.synsets.as_posix() if config.synsets else find(MAPPING)
    if not mapping:
        raise UserError(f"{options.source}: {MAPPING}, which names the classes, is not here. Put it there")
    synonyms = read_synsets(OfficialFile.given(options.source / mapping))
    names = class_names(synonyms, config)
    solution = find(SOLUTION) or find(WNIDS_OF_VALIDATION)
    if not solution and (ids := find(IDS_OF_VALIDATION)):
        raise UserError(
            f"{options.source / ids}: holds numbers that only the development kit's meta.mat explains. Put {SOLUTION} "
            f"or {WNIDS_OF_VALIDATION} beside it, or sort the images into folders by wnid"
        )
    classes = tuple(sorted(names.items()))
    tars = [folder.inside(name) for folder in folders for name in folder.tars]
    scans: list[Scan] = [
        ImageNetScan(options.source, tuple(part), (), classes, solution)
        for part in chunks([folder.path for folder in folders if folder.images])
    ]
    scans += [ImageNetScan(options.source, (), tuple(part), classes, solution) for part in chunks(tars)]
    tables = [mapping, *([solution] if solution else [])]
    balanced = (config.images_per_class or 0) if config.balanced else None
    shared = Counter(names.values())
    details = {"classes": len(shared), "collapsed": sorted(", ".join(n) for n, count in shared.items() if count > 1)}
    plan = Plan(
        "imagenet", config.part, config, scans, LICENCES, tables, tars, EXPECTED, balanced=balanced, details=details
    )
    prepare_image_text(plan, options)


def read_synsets(file: OfficialFile) -> dict[str, tuple[str, ...]]:
    """The synonyms of each wnid."""
    found: dict[str, tuple[str, ...]] = {}
    for place, line in lines(file):
        wnid, _, text = line.partition(" ")
        synonyms = tuple(name for part in text.split(",") if (name := part.strip()))
        if not WNID.fullmatch(wnid) or not synonyms:
            raise file.error(f"{place}: expected a wnid, a space and its names. Got {line[:80]!r}", REMEDY)
        if wnid in found:
            raise file.error(f"{place}: {wnid} stands twice", REMEDY)
        found[wnid] = synonyms
    return found


def class_names(synonyms: Mapping[str, tuple[str, ...]], config: ImageNetPreparerConfig) -> dict[str, tuple[str, ...]]:
    """What each wnid is called: one name, or all its synonyms with the name first.

    Collapsed, classes whose first synonyms are equal are called alike in everything: all their synonyms, joined. Told
    apart, a class whose first synonym another one shares takes the first synonym that no other class has, or else what
    `renamed` says.
    """
    unknown = set(config.renamed) - set(synonyms)
    if unknown and "renamed" in config.model_fields_set:
        raise UserError(f"renamed: {min(unknown)} is no class of the mapping")
    groups: dict[str, list[str]] = {}
    for wnid, names in synonyms.items():
        groups.setdefault(names[0], []).append(wnid)
    if config.homonyms == "collapse":
        joined = {
            first: tuple(dict.fromkeys(name for wnid in wnids for name in synonyms[wnid]))
            for first, wnids in groups.items()
        }
        called = {wnid: joined[names[0]] for wnid, names in synonyms.items()}
    else:
        called = _told_apart(synonyms, groups, config.renamed)
    return {wnid: names if config.names == "all" else names[:1] for wnid, names in called.items()}


def _told_apart(
    synonyms: Mapping[str, tuple[str, ...]], groups: Mapping[str, list[str]], renamed: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    owners = Counter(name for names in synonyms.values() for name in set(names))
    called = {}
    for wnid, names in synonyms.items():
        own = [name for name in names if owners[name] == 1]
        if len(groups[names[0]]) == 1:
            called[wnid] = names
        elif wnid in renamed or own:
            name = renamed.get(wnid) or own[0]
            called[wnid] = (name, *(other for other in own if other != name))
        else:
            called[wnid] = names  # the others of its name have another one now
    shared = [name for name, count in Counter(names[0] for names in called.values()).items() if count > 1]
    if shared:
        wnids = [wnid for wnid, names in called.items() if names[0] == shared[0]]
        raise UserError(
            f"homonyms=distinguish: {' and '.join(wnids)} are both called {shared[0]!r} and have no synonym of their "
            f"own. Name one, such as renamed.{wnids[0]}='...', or choose homonyms=collapse"
        )
    return called


@dataclass(frozen=True)
class ImageNetScan:
    """Some folders and tars, whose images are told by the wnid in their folder, their tar or their own name."""

    source: Path
    folders: tuple[str, ...]
    tars: tuple[str, ...]
    classes: tuple[tuple[str, tuple[str, ...]], ...]
    solution: str  # the classes of validation images whose path holds no wnid; empty: not there

    @property
    def inputs(self) -> Sequence[Path]:
        found = [self.source / name for name in (*self.folders, *self.tars)]
        return [*found, self.source / self.solution] if self.solution else found

    @cached_property
    def names(self) -> dict[str, tuple[str, ...]]:
        return dict(self.classes)

    @cached_property
    def validation(self) -> dict[str, str]:
        return read_solution(OfficialFile.given(self.source / self.solution)) if self.solution else {}

    def pieces(self, report: Report, scratch: Path) -> Iterator[Piece]:
        for folder in self.folders:
            for _, group in folder_groups(self.source, folder, report):
                for suffix, place in group.items():
                    if suffix in IMAGE_SUFFIXES:
                        yield from self.piece(place, PurePosixPath(place.file).parts, report)
        for file in self.tars:
            parts = PurePosixPath(file).with_suffix("").parts
            for place in tar_members(self.source, file, report):
                name = PurePosixPath(place.member)
                if name.suffix.lower() == ".tar":
                    for inner in tar_members(self.source, file, report, place):
                        yield from self.piece(inner, (*parts, name.stem, inner.member.rpartition(": ")[2]), report)
                elif name.suffix.lower() in IMAGE_SUFFIXES:
                    yield from self.piece(place, (*parts, *name.parts), report)

    def piece(self, place: Location, parts: Sequence[str], report: Report) -> Iterator[Piece]:
        *folders, name = parts
        stem = PurePosixPath(name).stem
        if stem.startswith("ILSVRC2012_test_"):  # its authors keep its classes
            return
        wnid = next((part for part in reversed(folders) if WNID.fullmatch(part)), "")
        prefix = stem.partition("_")[0]
        if not wnid:
            wnid = prefix if WNID.fullmatch(prefix) else self.validation.get(stem, "")
        if wnid not in self.names:
            report(Problem(place.file, place.member, f"of class {wnid}, which has no name" if wnid else "of no class"))
            return
        of_validation = bool(VALIDATION_NAME.fullmatch(stem)) or bool({"val", "validation"} & set(folders))
        split = "validation" if of_validation else "train"
        yield Piece(key_of(stem), split, True, place.name, place, classes=self.names[wnid])


def key_of(stem: str) -> str:
    """The name of an image, which is the same for everyone, in the letters that keys have."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", stem)[:95]


def read_solution(file: OfficialFile) -> dict[str, str]:
    """The wnid of each validation image, from `LOC_val_solution.csv` or from a list of wnids in the images' order."""
    found: dict[str, str] = {}
    for number, (place, line) in enumerate(lines(file), start=1):
        image, comma, prediction = line.partition(",")
        if number == 1 and image == "ImageId":
            continue
        wnid = prediction.split(" ")[0] if comma else line
        if not WNID.fullmatch(wnid):
            raise file.error(f"{place}: expected a wnid. Got {line[:80]!r}", REMEDY)
        found[image if comma else f"ILSVRC2012_val_{number:08d}"] = wnid
    return found
