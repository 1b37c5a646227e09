"""NLVR2 from its release: JSON lines of statements, and the images.

Expected anywhere under the release's folder, unpacked or in zips: `train.json`, `dev.json`, `test1.json` and
`test2.json` (in a clone of the authors' repository those under `nlvr2/`), the subsets `balanced_{split}.json` and
`unbalanced_{split}.json` where they are there, and the images `{split}-{set}-{pair}-img{0,1}.png`, in any folders.
Many `.png` names hold JPEG data: what counts is that it decodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from data_loaders.prepare.preparation import Options, Preparation, preparation
from data_loaders.prepare.release import Entry, Release
from vlm.config import Config
from vlm.records import OfficialFile
from vlm.tasks.nlvr2 import NLVR2Task, read_questions
from vlm.types import Question

SUBSETS = ("balanced", "unbalanced")
LICENCES = {
    "sentences and labels": "CC-BY-4.0",
    "images": "from the web, owned by others; for research, under the terms that the authors ask for",
}


class NLVR2PreparerConfig(Config):
    """Which splits to prepare; None: those that are there."""

    type: Literal["nlvr2"] = "nlvr2"
    splits: tuple[Literal["train", "validation", "test", "test2"], ...] | None = None


def prepare_nlvr2(config: NLVR2PreparerConfig, options: Options) -> None:
    """Write `<root>/nlvr2`: the official files as they are, the images as shards, report and manifest."""
    with preparation("nlvr2", options, LICENCES) as work:
        release = work.release
        files = {split: f"{name}.json" for split, name in NLVR2Task.splits.items()}
        for split in work.splits(config.splits, files, lambda file: whole(release, file)):
            identifiers: set[str] = set()
            copy = work.copy(whole(release, files[split]), files[split])
            work.ask(split, remembered(copy, identifiers, NLVR2Task.splits[split]), training=split == "train")
            if split != "train":  # the subsets were made of the others alone
                for subset in SUBSETS:
                    keep_subset(work, subset, NLVR2Task.splits[split], identifiers)


def whole(release: Release, name: str) -> list[Entry]:
    """The files of this name that hold a whole split, those of NLVR2 before those of its predecessor."""
    entries = [entry for entry in release.find(name) if not set(SUBSETS) & set(release.parts(entry))]
    return [entry for entry in entries if "nlvr2" in release.parts(entry)] or entries


def remembered(file: OfficialFile, identifiers: set[str], name: str) -> Iterator[Question]:
    """The statements of split `name`; one of another split, or an identifier that occurs twice, is an error."""
    for question in read_questions(file):
        if question.id.split("-")[0] != name:
            raise file.error(f"identifier {question.id} is not of {name}", "The file is another split's; exchange it")
        if question.id in identifiers:
            raise file.error(f"identifier {question.id} occurs twice")
        identifiers.add(question.id)
        yield question


def keep_subset(work: Preparation, subset: str, name: str, identifiers: set[str]) -> None:
    """A subset of a split under its folder; each of its statements must be one of the split's."""
    file = f"{subset}_{name}.json"
    release = work.release
    entries = release.find(file) or [e for e in release.find(f"{name}.json") if subset in release.parts(e)[-2:-1]]
    to = f"{subset}/{file}"
    if not entries:
        return work.absent(to)
    copy = work.copy(entries, to)
    seen: set[str] = set()
    work.check(to, remembered(copy, seen, name))
    stranger = min(seen - identifiers, default=None)
    if stranger is not None:
        raise copy.error(f"identifier {stranger} is not in {name}.json")
