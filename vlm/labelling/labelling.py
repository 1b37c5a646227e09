"""From a shard folder to side shards with machine labels: what is done, what is left, what was damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_loaders.decoding import ImageError, decode_image
from data_loaders.progress import progress_bar
from data_loaders.shards import DamagedError, Index, ShardReader, open_index, write_ordered_shards
from vlm.errors import UserError
from vlm.labelling import LabellingConfig
from vlm.labelling.labellers import Labeller, read_vocabulary
from vlm.models.vision.timm import PACKAGE
from vlm.run import write_atomically
from vlm.types import Record

FORMAT = 1
JOB = "job.json"
DIGITS = 4  # of a score: what differs further back is the order of sums, not the image
NUM_SHOWN = 10  # labels in the closing table

Outcome = tuple[int, str]
"""A shard's number, and its labels as JSON lines."""
Launch = Callable[["Job", Sequence[int]], Iterator[Outcome]]
"""Labels the shards of these numbers, here or elsewhere; in any order."""


@dataclass(frozen=True)
class Job:
    """The shards to label and how. What is made depends on nothing else."""

    shards: Path
    config: LabellingConfig

    def worker(self) -> Worker:
        return Worker(self)


@dataclass
class Totals:
    """What the closing table tells."""

    images: int = 0
    without_label: int = 0
    damaged: list[str] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    scores: Counter[str] = field(default_factory=Counter)


def label_shards(job: Job, to: Path, launch: Launch, console: Console, progress: bool = True) -> Path:
    """Label every image of `job.shards` and write the side shards `to`, which appear whole or not at all.

    Finished shards wait beside `to`, in `.NAME-partial`: the same command continues after any interruption. What was
    begun with other images, weights, labels or settings is neither continued nor removed.
    """
    index = open_index(job.shards)
    config = _with_vocabulary(job.config)
    made_by = _made_by(job, index)
    if to.exists():
        if open_index(to).made_by == made_by:
            console.print(f"{to}: is there already, made of the same images in the same way", soft_wrap=True)
            return to
        raise UserError(f"{to}: is there, and was made in another way. Give another folder with --to, or remove it")
    partial = to.with_name(f".{to.name}-partial")
    if not partial.is_dir():
        partial.mkdir(parents=True)
        write_atomically(partial / JOB, json.dumps(made_by))
    elif not _continues(partial, made_by):
        raise UserError(
            f"{partial}: was begun with other images, weights, labels or settings. Give another folder with --to, or "
            "remove it to begin anew"
        )
    numbers = [number for number, shard in enumerate(index.shards) if shard["examples"]]
    missing = [number for number in numbers if not _part(partial, number).is_file()]
    sizes = {number: int(index.shards[number]["examples"]) for number in numbers}
    with progress_bar(progress) as bar:
        shown = bar.add_task("labelling", total=len(index), completed=len(index) - sum(sizes[n] for n in missing))
        for number, text in launch(Job(job.shards, config), missing) if missing else ():
            write_atomically(_part(partial, number), text)
            bar.advance(shown, sizes[number])
    totals = Totals()
    write_ordered_shards(_records(partial, numbers, totals), to, made_by=made_by)
    shutil.rmtree(partial)
    _show(console, totals, to)
    return to


def locally(job: Job, numbers: Sequence[int]) -> Iterator[Outcome]:
    """One shard after the other in this process, on its GPU where it has one."""
    return job.worker().label(numbers)


class Worker:
    """A labeller in memory, ready for any shard. Batches are cut inside each shard, so no shard depends on another."""

    def __init__(self, job: Job) -> None:
        self.config = job.config
        self.index = open_index(job.shards)
        vocabulary = read_vocabulary(job.config.vocabulary) if job.config.vocabulary is not None else None
        self.labeller: Labeller = job.config.labeller.build(vocabulary)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.labeller.model.to(self.device)
        numbers: dict[str, int] = {}
        self.columns = torch.tensor([numbers.setdefault(label, len(numbers)) for label in self.labeller.labels])
        self.names = list(numbers)

    def label(self, numbers: Sequence[int]) -> Iterator[Outcome]:
        """Each shard's labels, best first, of every image; none for an image that is damaged, if that is allowed."""
        batches = _Batches(self.index, numbers, self.labeller.transform, self.config)
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=self.config.num_workers,
            multiprocessing_context="spawn" if self.config.num_workers else None,
        )
        lines: list[str] = []
        for place, (images, pixels) in enumerate(loader):
            labelled = iter(self._labelled(pixels) if pixels is not None else ())
            for key, problem in images:
                row = {"key": key} | (next(labelled) if problem is None else {"damaged": problem})
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            if place in batches.last_of_shard:
                yield batches.last_of_shard[place], "".join(lines)
                lines = []

    @torch.inference_mode()
    def _scores(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        """A score for each distinct label. Classes of one name are one: shares add up, of other scores the best counts.

        ImageNet has two classes `crane`, a bird and a machine.
        """
        scores = self.labeller.scores(pixels.to(self.device)).cpu()
        if len(self.names) == scores.shape[1]:
            return scores
        shares = getattr(self.config.labeller, "activation", "softmax") == "softmax"
        merged = torch.zeros(len(scores), len(self.names))
        return (
            merged.index_add(1, self.columns, scores)
            if shares
            else merged.index_reduce(1, self.columns, scores, "amax")
        )

    def _labelled(self, pixels: Float[Tensor, "b 3 h w"]) -> Iterator[dict[str, Any]]:
        """The best labels of each image with their scores; of equal ones the first of the vocabulary."""
        scores = self._scores(pixels)
        num_labels = scores.shape[1]
        units = (scores.clamp(0, 1).double() * 10**DIGITS).round().long()
        ranks = units * num_labels + torch.arange(num_labels - 1, -1, -1)  # no two alike
        for row in ranks.topk(min(self.config.max_labels, num_labels)).values.tolist():
            best = [(num_labels - 1 - rank % num_labels, rank // num_labels / 10**DIGITS) for rank in row]
            best = [(at, score) for at, score in best if score >= self.config.min_score]
            yield {"labels": [self.names[at] for at, _ in best], "scores": [score for _, score in best]}


Decoded = tuple[list[tuple[str | None, str | None]], Tensor | None]
"""The key of each image and what is wrong with it, if anything is; and the pixels of those with which nothing is."""


class _Batches(Dataset[Decoded]):
    """The images of some shards, decoded batch by batch."""

    def __init__(
        self, index: Index, numbers: Sequence[int], transform: Callable[[Any], Tensor], config: LabellingConfig
    ) -> None:
        self.reader, self.transform, self.config = ShardReader(index), transform, config
        self.batches: list[range] = []  # positions of each
        self.last_of_shard: dict[int, int] = {}  # batch -> the shard that it completes
        for number in numbers:
            first, end = np.searchsorted(index.shard, (number, number + 1)).tolist()
            cuts = range(first, end, config.batch_size)
            self.batches += [range(cut, min(cut + config.batch_size, end)) for cut in cuts]
            self.last_of_shard[len(self.batches) - 1] = number

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Decoded:
        images: list[tuple[str | None, str | None]] = []
        pixels = []
        for position in self.batches[number]:
            key, problem = None, None
            try:
                key = self.reader.text(position).key
                pixels.append(self.transform(decode_image(self.reader.image(position), self._place(position, key))))
            except (ImageError, DamagedError) as error:
                problem = str(error)
                if self.config.damaged == "stop":
                    raise UserError(f"{problem}. Prepare it again, or go on without it: damaged=skip") from None
            images.append((key, problem))
        return images, torch.stack(pixels) if pixels else None

    def _place(self, position: int, key: str) -> str:
        index = self.reader.index
        return f"{index.folder / index.shards[int(index.shard[position])]['file']}: {key}"


def _with_vocabulary(config: LabellingConfig) -> LabellingConfig:
    """The same, once the vocabulary is known to be readable, by a path that holds anywhere."""
    if config.vocabulary is None:
        return config
    read_vocabulary(config.vocabulary)
    return config.model_copy(update={"vocabulary": config.vocabulary.resolve()})


def _made_by(job: Job, index: Index) -> dict[str, Any]:
    """Who made the labels, of what and how: what `Index.made_by` of the side shards holds.

    Whatever changes a label is in it, the content of weights and vocabulary too; what only changes the work is not.
    """
    labeller = job.config.labeller
    name = getattr(labeller, "name", None) or getattr(labeller, "target", "")
    model, content = f"{labeller.type}:{name}", None
    weights = getattr(labeller, "weights", None)
    if weights is not None and not str(weights).startswith(PACKAGE):
        content = _digest(Path(weights))
        model = f"file:{content} ({model})"  # what a file has seen, its architecture's name does not tell
    elif weights is not None:
        model = str(weights)
    vocabulary = read_vocabulary(job.config.vocabulary) if job.config.vocabulary is not None else None
    digest = hashlib.sha256("\n".join(vocabulary).encode()).hexdigest()[:12] if vocabulary else None
    settings = job.config.model_dump(mode="json", exclude={"vocabulary", "num_workers", "damaged", "batch_size"})
    if content is not None:
        settings["labeller"]["weights"] = content
    return {
        "format": FORMAT,
        "model": model,
        "vocabulary": {"labels": len(vocabulary), "sha256": digest} if vocabulary else None,
        "of": index.fingerprint,
        "settings": settings,
    }


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()[:12]
    except OSError as error:
        raise UserError(f"{file}: no such weights file ({error.strerror})") from None


def _continues(partial: Path, made_by: dict[str, Any]) -> bool:
    try:
        return bool(json.loads((partial / JOB).read_text()) == made_by)
    except (OSError, ValueError):
        return False


def _part(partial: Path, number: int) -> Path:
    return partial / f"{number:05d}.jsonl"


def _records(partial: Path, numbers: Iterable[int], totals: Totals) -> Iterator[Record]:
    """The labels of all shards in order, counted as they pass."""
    for number in numbers:
        with _part(partial, number).open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                labels, scores = tuple(row.get("labels", ())), tuple(row.get("scores", ()))
                if "damaged" in row:
                    totals.damaged.append(row["damaged"])
                if row["key"] is None:  # not even that can be read
                    continue
                totals.images += 1
                totals.without_label += not labels
                totals.labels.update(labels)
                for label, score in zip(labels, scores, strict=True):
                    totals.scores[label] += score
                yield Record(row["key"], labels=labels, scores=scores)


def _show(console: Console, totals: Totals, to: Path) -> None:
    table = Table(
        "label", title=f"{sum(totals.labels.values()):,} labels of {totals.images:,} images", title_justify="left"
    )
    for heading in ("images", "mean score"):
        table.add_column(heading, justify="right")
    for label, count in totals.labels.most_common(NUM_SHOWN):
        table.add_row(label, f"{count:,}", f"{totals.scores[label] / count:.2f}")
    if len(totals.labels) > NUM_SHOWN:
        table.add_row(f"and {len(totals.labels) - NUM_SHOWN:,} more", "", "", style="dim")
    console.print(table)
    if totals.without_label:
        console.print(f"{totals.without_label:,} images without a label")
    if totals.damaged:
        console.print(f"{len(totals.damaged):,} images that cannot be read:", style="bold")
        for problem in totals.damaged:
            console.print(problem, markup=False, highlight=False, soft_wrap=True)
    console.print(f"labels  {to}", highlight=False, soft_wrap=True)
