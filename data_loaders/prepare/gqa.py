"""GQA from its release: questions, scene graphs, choices and images.

Expected anywhere under the release's folder, unpacked or in zips: `{split}_balanced_questions.json` of train, val and
testdev, `submission_all_questions.json`, and the images by their ids. Kept where they are there: the files of all
questions (`{split}_all_questions.json`; those of train also as ten chunks), which consistency is counted over and
which `task.train_on=all` trains on; `{split}_sceneGraphs.json` and `{split}_choices.json`, which other scores need.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from data_loaders.prepare.preparation import Options, Preparation, preparation
from vlm.config import Config
from vlm.errors import UserError
from vlm.records import OfficialFile, Row, records
from vlm.tasks.gqa import GQATask, read_questions

NUM_CHUNKS = 10  # of the official train_all_questions
LICENCES = {
    "questions and scene graphs": "CC-BY-4.0",
    "images": "Visual Genome, CC-BY-4.0; from COCO and YFCC100M, each under its own Flickr licence",
}


class GQAPreparerConfig(Config):
    """Which splits to prepare (None: those that are there), and whether to keep the files of all questions."""

    type: Literal["gqa"] = "gqa"
    splits: tuple[Literal["train", "validation", "test", "submission"], ...] | None = None
    all_questions: bool = True


def prepare_gqa(config: GQAPreparerConfig, options: Options) -> None:
    """Write `<root>/gqa`: the official files as they are, the images as shards, report and manifest."""
    with preparation("gqa", options, LICENCES) as work:
        find = work.release.find
        files = {split: f"{name}_{_kind(name)}_questions.json" for split, name in GQATask.splits.items()}
        for split in work.splits(config.splits, files, find):
            name, file = GQATask.splits[split], files[split]
            copy = work.copy(find(file), file)
            work.ask(split, read_questions(copy, labelled=name != "submission"), training=split == "train")
            if name == "submission":
                continue
            if config.all_questions:
                _keep_all_questions(work, split, name)
            for kind in ("sceneGraphs", "choices"):
                _keep(work, f"{name}_{kind}.json", wanted=not (kind == "sceneGraphs" and name == "testdev"))


def _kind(name: str) -> str:
    return "all" if name == "submission" else "balanced"


def _keep_all_questions(work: Preparation, split: str, name: str) -> None:
    """The file of all questions of a split, or its chunks, of which there must be all ten."""
    stem = f"{name}_all_questions"
    chunks = {n: f"{stem}_{n}.json" for n in range(NUM_CHUNKS)}
    here = [number for number, file in chunks.items() if work.release.find(file)]
    if not here:
        if not work.release.find(f"{stem}.json"):
            return work.absent(f"{stem}.json")
        places = {f"{stem}.json": f"{stem}.json"}
    else:
        lacking = [file for number, file in chunks.items() if number not in here]
        beyond = [file for file in work.release.names if re.fullmatch(rf"{stem}_[0-9]+\.json", file)]
        unknown = sorted(set(beyond) - set(chunks.values()))
        if lacking or unknown:
            problem = f"lacks {lacking[0]}" if lacking else f"holds {unknown[0]} besides"
            raise UserError(f"{work.release.folder}: {stem} has {NUM_CHUNKS} chunks; the release {problem}")
        places = {file: f"{stem}/{file}" for file in chunks.values()}
    for file, to in places.items():
        copy = work.copy(work.release.find(file), to)
        if name == "train":
            work.ask(f"{split}, all questions", read_questions(copy), training=True)
        else:
            work.check(to, read_questions(copy))


def _keep(work: Preparation, name: str, wanted: bool) -> None:
    """A file that scores need, checked to be one object of objects."""
    if found := work.release.find(name):
        work.check(name, _objects(work.copy(found, name)))
    elif wanted:
        work.absent(name)


def _objects(file: OfficialFile) -> Iterator[str]:
    for key, value in records(file, "object"):
        Row(file, f'record "{key}"', value)
        yield key
