"""Conceptual Captions from its tables and the images that a user has downloaded; with people's captions, or with the
machine labels of its Image Labels subset as well.

Expected under the release's folder: `Train_GCC-training.tsv`, `Validation_GCC-1.1.0-Validation.tsv`, for machine labels
`Image_Labels_Subset_Train_GCC-Labels-training.tsv` (other names by `train_table`, `validation_table`, `label_table`),
and images in any of these forms, in any folders:

- tars of `img2dataset` (`output_format=webdataset`) or its folders (`files`): each image has a json with its url;
- numbered folders: images named after the row of their table, from `first_row` on, with or without leading zeros and
  suffix, flat or in any folders below one whose name holds `train` or `val`: `images_train/0003/0003141`,
  `train/3141.jpg`, or `training/3141_2405722` with the CRC-32 of the url.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt

from data_loaders.prepare.captions_table import DownloadScan, TableScan, split_of_folder
from data_loaders.prepare.image_text import ImageTextConfig, Options, Plan, Scan, chunks, prepare_image_text
from data_loaders.prepare.originals import listings
from data_loaders.prepare.pieces import SPLITS
from vlm.errors import UserError

TRAIN, VALIDATION, LABELS = "Train_GCC*.tsv", "Validation_GCC*.tsv", "Image_Labels_Subset_Train_GCC*.tsv"
LICENCES = {
    "tables": "Conceptual Captions, Google LLC: may be used freely for any purpose, with attribution appreciated",
    "images": "from the web, owned by others; the tables grant no right to them",
}
EXPECTED = (
    "Expected tars or folders of img2dataset with a json beside each image, or images named after their rows in a "
    "folder called train or val"
)


class ConceptualCaptionsPreparerConfig(ImageTextConfig):
    """Tables are found by their official names unless given. Paths are seen from the release's folder."""

    type: Literal["conceptual_captions"] = "conceptual_captions"
    train_table: Path | None = None  # captions of the training images
    validation_table: Path | None = None  # captions of the validation images
    labels: bool = False  # machine labels too, where the Image Labels subset has the url
    label_table: Path | None = None  # the Image Labels subset
    first_row: NonNegativeInt = 0  # how numbered folders call the first row of a table


class MachineLabelsPreparerConfig(ImageTextConfig):
    """The examples are the rows of the Image Labels subset; a part of them, drawn by hash, is kept for validation."""

    type: Literal["machine_labels"] = "machine_labels"
    label_table: Path | None = None  # the Image Labels subset
    train_table: Path | None = None  # only numbered folders need it: their numbers are rows of this table
    validation_fraction: float = Field(0.01, ge=0, lt=1)  # of the rows, by the hash of their urls
    first_row: NonNegativeInt = 0  # how numbered folders call the first row of a table


def prepare_conceptual_captions(config: ConceptualCaptionsPreparerConfig, options: Options) -> None:
    """Write `<root>/pairs` of the rows of both tables."""
    release = _Release(options)
    tables = {
        "train": release.table(config.train_table, TRAIN),
        "validation": release.table(config.validation_table, VALIDATION),
    }
    present = [split for split in SPLITS if tables[split]]
    if not present:
        raise UserError(f"{options.source}: neither {TRAIN} nor {VALIDATION} is here. Download them, unpacked, into it")
    scans: list[Scan] = []
    for split in present:
        numbered = release.numbered(split, alone=len(present) == 1)
        scans.append(TableScan(options.source, tables[split], split, numbered=numbered, first_row=config.first_row))
    labels = release.required(config.label_table, LABELS) if config.labels else ""
    if labels:
        scans.append(TableScan(options.source, labels, "", labelled=True, listed=False, captions=False))
    release.run("conceptual_captions", config, [*scans, *release.downloads()], [*filter(None, tables.values()), labels])


def prepare_machine_labels(config: MachineLabelsPreparerConfig, options: Options) -> None:
    """Write `<root>/pairs` of the rows of the Image Labels subset, captions and labels."""
    release = _Release(options)
    labels = release.required(config.label_table, LABELS)
    train = release.table(config.train_table, TRAIN)
    numbered = release.numbered("train", alone=True)
    scans: list[Scan] = [
        TableScan(
            options.source,
            labels,
            "train",
            labelled=True,
            numbered=() if train else numbered,
            first_row=config.first_row,
            validation_fraction=config.validation_fraction,
        )
    ]
    if train and numbered:
        scans.append(
            TableScan(
                options.source, train, "", listed=False, captions=False, numbered=numbered, first_row=config.first_row
            )
        )
    release.run(
        "machine_labels", config, [*scans, *release.downloads()], [labels, *([train] if train and numbered else [])]
    )


class _Release:
    """What lies in the release's folder."""

    def __init__(self, options: Options) -> None:
        self.options = options
        options.root.mkdir(parents=True, exist_ok=True)  # before times of folders are taken: it may lie inside
        self.folders = list(listings(options.source, options.root))

    def table(self, given: Path | None, pattern: str) -> str:
        """The one table of this name; empty where there is none."""
        if given is not None:
            if not (self.options.source / given).is_file():
                raise UserError(f"{self.options.source / given}: no such file")
            return given.as_posix()
        found = [f.inside(name) for f in self.folders for name in f.tables if fnmatch.fnmatch(name, pattern)]
        if len(found) > 1:
            raise UserError(f"{self.options.source}: {found[0]} and {found[1]} both match {pattern}. Move one away")
        return found[0] if found else ""

    def required(self, given: Path | None, pattern: str) -> str:
        found = self.table(given, pattern)
        if not found:
            raise UserError(f"{self.options.source}: {pattern} is not here. Download it, unpacked, into this folder")
        return found

    def numbered(self, split: str, alone: bool) -> tuple[str, ...]:
        """The folders with images of this split that have no json beside them. `alone`: there is no other split."""
        found = []
        for folder in self.folders:
            if (folder.images or folder.bare) and not folder.json and folder.path:
                named = split_of_folder(folder.parts)
                if not named and not alone and folder.images:
                    raise UserError(
                        f"{self.options.source / folder.path}: its images are named after rows, but of which table? "
                        "Put them into a folder called train or val"
                    )
                if named == split or (alone and not named and folder.images):
                    found.append(folder.path)
        return tuple(found)

    def downloads(self) -> list[Scan]:
        """Scans of what `img2dataset` wrote."""
        tars = [folder.inside(name) for folder in self.folders for name in folder.tars]
        folders = [folder.path for folder in self.folders if folder.images and folder.json]
        scans: list[Scan] = [DownloadScan(self.options.source, tars=tuple(part)) for part in chunks(tars)]
        return scans + [DownloadScan(self.options.source, folders=tuple(part)) for part in chunks(folders)]

    def run(self, preparer: str, config: ImageTextConfig, scans: Sequence[Scan], tables: Sequence[str]) -> None:
        tars = [folder.inside(name) for folder in self.folders for name in folder.tars]
        used = [table for table in tables if table]
        validation = "set validation_fraction above 0"
        if preparer == "conceptual_captions":
            validation = f"put {VALIDATION} and its images beside the others"
        plan = Plan(preparer, "pairs", config, scans, LICENCES, used, tars, EXPECTED, validation)
        prepare_image_text(plan, self.options)
