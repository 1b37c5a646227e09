"""GQA from its release: questions, scene graphs, choices and images.

Expected anywhere under the release's folder, unpacked or in zips: `{split}_balanced_questions.json` of train, val and
testdev, `submission_all_questions.json`, and the images by their ids. Kept where they are there: the files of all
questions (`{split}_all_questions.json`; those of train also as ten chunks), which consistency is counted over
(`task.evaluate_on=all`) and which `task.train_on=all` trains on; `{split}_sceneGraphs.json` and
`{split}_choices.json`, which other scores need. Those may come in chunks, too.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_loaders.prepare.preparation import Options, Preparation, preparation
from data_loaders.shards import ring_hash
from vlm.config import Config
from vlm.errors import UserError
from vlm.records import OfficialFile, Row, records
from vlm.tasks.gqa import GQATask, read_questions
from vlm.types import Question

NUM_CHUNKS = 10  # of the official train_all_questions
LICENCES = {
    "questions and scene graphs": "CC-BY-4.0",
    "images": "Visual Genome, CC-BY-4.0; from COCO and YFCC100M, each under its own Flickr licence",
}


class GQAPreparerConfig(Config):
    """Which splits to prepare (None: those that are there), and whether to keep the files of all questions."""

    type: Literal["gqa"] = "gqa"
    splits: tuple[Literal["train", "validation", "test", "submission"], ...] | None = None
    all_questions: bool = True  # keep the files of all questions too, for scoring and `task.train_on=all`


def prepare_gqa(config: GQAPreparerConfig, options: Options) -> None:
    """Write `<root>/gqa`: the official files as they are, the images as shards, report and manifest."""
    with preparation("gqa", options, LICENCES) as work:
        find = work.release.find
        files = {split: f"{name}_{_kind(name)}_questions.json" for split, name in GQATask.splits.items()}
        for split in work.splits(config.splits, files, find):
            name, file = GQATask.splits[split], files[split]
            labelled, training = name != "submission", split == "train"
            asked = Asked()
            copy = work.copy(find(file), file)
            if not labelled:  # it may ask what the others ask: its answers are not here
                work.ask(split, read_questions(copy, labelled))
                continue
            work.ask(split, work.apart(copy, asked.noted(read_questions(copy))), training)
            if config.all_questions:
                _keep_all_questions(work, split, name, asked)
            _keep(work, f"{name}_choices", _choices, asked.questions)
            _keep(work, f"{name}_sceneGraphs", _scene_graphs, asked.images, wanted=name != "testdev")


class Asked:
    """The ids of a split's balanced questions and of their images."""

    def __init__(self) -> None:
        self.questions: set[str] = set()
        self.images: set[str] = set()

    def noted(self, questions: Iterable[Question]) -> Iterator[Question]:
        for question in questions:
            self.questions.add(question.id)
            self.images.update(question.image_keys)
            yield question


def _kind(name: str) -> str:
    return "all" if name == "submission" else "balanced"


def _keep_all_questions(work: Preparation, split: str, name: str, asked: Asked) -> None:
    """The file of all questions of a split, or its chunks, of which there must be all ten. Their images are wanted."""
    copies = _copies(work, f"{name}_all_questions", num_chunks=NUM_CHUNKS)
    if not copies:
        return work.absent(f"{name}_all_questions.json")
    missing = set(asked.questions)
    hashes = array("q")

    def noted(questions: Iterable[Question]) -> Iterator[Question]:
        for question in questions:
            missing.discard(question.id)
            hashes.append(ring_hash(question.id))
            yield question

    for copy in copies.values():
        work.ask(f"{split}, all questions", noted(read_questions(copy)), training=name == "train")
    _refuse_repeated(list(copies.values()), np.frombuffer(hashes, dtype=np.int64))
    if missing:
        raise next(iter(copies.values())).error(
            f"has no question {min(missing)} of {name}_balanced_questions.json"
            f"{'' if len(copies) == 1 else ', nor has another chunk'}; the two are of different splits"
        )


def _copies(work: Preparation, stem: str, num_chunks: int | None = None) -> dict[str, OfficialFile]:
    """A file, or the chunks that a large one comes in, numbered from 0; by the place that each was copied to."""
    numbered = {name: re.fullmatch(rf"{stem}_([0-9]+)\.json", name) for name in work.release.names}
    here = {name: int(match[1]) for name, match in numbered.items() if match}
    if not here:
        entries = work.release.find(f"{stem}.json")
        return {f"{stem}.json": work.copy(entries, f"{stem}.json")} if entries else {}
    wanted = {f"{stem}_{number}.json": number for number in range(num_chunks or len(here))}
    lacking, beyond = (min(a.keys() - b.keys(), default=None) for a, b in ((wanted, here), (here, wanted)))
    if lacking or beyond:
        problem = f"lacks {lacking}" if lacking else f"holds {beyond} besides"
        raise UserError(f"{work.release.folder}: {stem} has {len(wanted)} chunks; the release {problem}")
    return {f"{stem}/{name}": work.copy(work.release.find(name), f"{stem}/{name}") for name in wanted}


def _refuse_repeated(chunks: Sequence[OfficialFile], hashes: NDArray[np.int64]) -> None:
    """A question in two chunks is an error. 14 million ids are compared by hash, and only if two agree by name."""
    ordered = np.sort(hashes)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not suspects:
        return
    seen: dict[str, OfficialFile] = {}
    for chunk in chunks:
        for key, _ in records(chunk, "object"):
            if ring_hash(key) in suspects and seen.setdefault(key, chunk) is not chunk:
                raise chunk.error(f"question {key} stands in {seen[key].name} too")


Check = Callable[[OfficialFile], Iterator[str]]


def _keep(work: Preparation, stem: str, check: Check, of: Collection[str], wanted: bool = True) -> None:
    """A file that scores need. Each record must be in order, and there must be one for all `of` the split."""
    copies, missing = _copies(work, stem), set(of)
    if not copies:
        if wanted:
            work.absent(f"{stem}.json")
        return

    def noted(keys: Iterable[str]) -> Iterator[str]:
        for key in keys:
            missing.discard(key)
            yield key

    for to, copy in copies.items():
        work.check(to, noted(check(copy)))
    if missing:
        raise next(iter(copies.values())).error(
            f"has nothing on {min(missing)}, nor on {len(missing) - 1:,} others of {stem.split('_')[0]}_balanced_"
            "questions.json; it is another split's, or not whole"
        )


def _choices(file: OfficialFile) -> Iterator[str]:
    """The questions of a file of choices."""
    for key, value in records(file, "object"):
        row = Row(file, f'question "{key}"', value)
        for name in ("valid", "plausible"):
            row.list_of(name, str, "texts")
        yield key


def _scene_graphs(file: OfficialFile) -> Iterator[str]:
    """The images of a file of scene graphs."""
    for key, value in records(file, "object"):
        scene = Row(file, f'image "{key}"', value)
        for side in ("width", "height"):
            if scene.number(side) <= 0:
                raise scene.wrong(side, "a number above 0")
        objects = scene.inside("objects")
        for name in objects.content:
            for side in "xywh":
                objects.inside(name).number(side)
        yield key
