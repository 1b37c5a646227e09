"""From anyone's question file and a folder of images to a results file: `vlm predict`, as functions."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from data_loaders.decoding import ImageError
from data_loaders.images import grey
from data_loaders.prepare.preparation import MAX_IMAGE_BYTES, ordered_map
from data_loaders.prepare.release import IMAGE_SUFFIXES, Entry, Release
from data_loaders.progress import progress_bar
from vlm.errors import UserError
from vlm.hub import LoadedModel, load
from vlm.models.answering import answer_logits
from vlm.records import READING_ERRORS, OfficialFile
from vlm.run import task_of, write_atomically
from vlm.tasks.csv import CSVTask, read_table
from vlm.tasks.gqa import GQATask
from vlm.tasks.gqa import read_questions as read_gqa
from vlm.tasks.nlvr2 import NLVR2Task
from vlm.tasks.nlvr2 import read_questions as read_nlvr2
from vlm.tasks.task import Task, unique
from vlm.tasks.vqav2 import VQAv2Task
from vlm.tasks.vqav2 import read_questions as read_vqav2
from vlm.types import Batch, Question

TASKS: Mapping[str, Callable[[], Task]] = {"vqav2": VQAv2Task, "gqa": GQATask, "nlvr2": NLVR2Task, "csv": CSVTask}


def predict(
    checkpoint: str | Path,
    task_name: str | None,
    questions_file: Path,
    images: Path,
    out: Path,
    allow_missing: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    trust_code: bool = False,
) -> None:
    """Answer every question of an official file, and write the official results file to `out`.

    With `allow_missing` an even grey stands in for an image that is not there or does not decode, as in `vlm prepare`:
    the file stays complete, which the official servers insist on, and the console says how many.
    """
    console = Console(stderr=True)
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder for {out.name}. Make it first")
    if out.resolve() == questions_file.resolve() or out.is_dir():
        raise UserError(f"{out}: --out would replace the questions, or is a folder. Choose another file")
    if not images.is_dir():
        raise UserError(f"{images}: no such folder of images")
    model = _loaded(checkpoint, device, trust_code)
    task, questions = _asked(model, task_name, questions_file)
    with Release(images) as release:
        pictures: NamedPictures = NumberedPictures(release) if isinstance(task, VQAv2Task) else NamedPictures(release)
        if isinstance(task, CSVTask):
            pictures = PicturesByPath(release)
        missing = _missing(questions, pictures, images, allow_missing)
        lost: set[str] = set(missing)

        def pixels(key: str) -> Tensor:
            try:
                if key not in missing:
                    return model.transform(*pictures.read(key))
            except ImageError as error:
                if not allow_missing:
                    raise UserError(f"{error}. Replace it, or answer with a grey image: --allow-missing") from None
                lost.add(key)
            return grey(model.transform.image_pixels)

        with progress_bar(console.is_terminal, "questions") as bar:
            shown = bar.add_task(f"answering {task.type}", total=len(questions))
            answers = answer_all(model, questions, pixels, batch_size, partial(bar.advance, shown))
    write_atomically(out, task.submission(out, questions, answers))
    if lost:
        about = sum(not lost.isdisjoint(question.image_keys) for question in questions)
        console.print(
            f"{len(lost):,} images are missing or unreadable, such as {min(lost)}: {about:,} of {len(questions):,} "
            "questions were answered with a grey image",
            highlight=False,
            soft_wrap=True,
        )
    print(f"{len(questions):,} answers: {out}")


def answers_to(
    checkpoint: str | Path, images: Sequence[Path], question: str, device: str | None = None, trust_code: bool = False
) -> tuple[dict[str, float], bool]:
    """All answers to one question with their probabilities, the most likely first, and whether these sum to 1."""
    model = _loaded(checkpoint, device, trust_code)
    task: Any = task_of(model.config)
    wanted = getattr(task, "images_per_text", 1)
    if model.head is not None and len(images) != wanted:
        raise UserError(f"the model answers about {wanted} image(s), but {len(images)} are given before the question")
    picture: Any = images[0] if wanted == 1 else list(images)
    answers = model.answer([picture], [question])[0]
    return answers, not task.multi_label


def _loaded(checkpoint: str | Path, device: str | None, trust_code: bool) -> LoadedModel:
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return load(checkpoint, trust_code=trust_code).to(torch.device(name))
    except (RuntimeError, AssertionError) as error:  # torch's own words for a device that is not there
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def answer_all(
    model: LoadedModel,
    questions: Sequence[Question],
    pixels: Callable[[str], Tensor],
    batch_size: int = 64,
    advance: Callable[[int], object] = lambda done: None,
) -> dict[str, str]:
    """The most likely answer to each question. Each image is decoded and encoded once.

    Its states stay until the last question about it is answered, so memory grows with the images that are asked about
    together: those of a batch or two where each question has its own, or a pair has its own two.
    """
    task: Any = task_of(model.config)
    place: dict[str, int] = {}
    for question in questions:
        for key in question.image_keys:
            place.setdefault(key, len(place))
    ordered = sorted(questions, key=lambda question: max(place[key] for key in question.image_keys))
    left = Counter(key for question in questions for key in set(question.image_keys))
    answers: dict[str, str] = {}
    states: dict[str, Tensor] = {}
    encoded = _encoded(model, list(place), pixels, batch_size)
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        while not all(key in states for key in batch[-1].image_keys):
            states |= next(encoded)
        numbers = _logits(model, task, batch, states).argmax(-1).tolist()
        answers |= {question.id: model.answers[number] for question, number in zip(batch, numbers, strict=True)}
        for question in batch:
            for key in set(question.image_keys):
                left[key] -= 1
                if not left[key]:
                    del states[key]
        advance(len(batch))
    return answers


def _encoded(
    model: LoadedModel, keys: Sequence[str], pixels: Callable[[str], Tensor], batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """States of the images in order, a batch at a time; the next ones are decoded meanwhile."""
    decoded = ordered_map(pixels, keys, num_workers=min(8, os.cpu_count() or 1))
    for start in range(0, len(keys), batch_size):
        part = keys[start : start + batch_size]
        rows = torch.stack([next(decoded) for _ in part])
        with torch.inference_mode():
            yield dict(zip(part, model.model.encode_image(rows.to(model.device)), strict=True))


@torch.inference_mode()
def _logits(model: LoadedModel, task: Task, questions: Sequence[Question], states: Mapping[str, Tensor]) -> Tensor:
    ids, mask, _ = model.tokenizer([question.text for question in questions])
    images = [states[question.image_keys[n]] for n in range(task.images_per_text) for question in questions]
    batch = Batch(
        keys=tuple(question.id for question in questions),
        image=torch.stack(images),
        text_ids=ids.to(model.device),
        text_mask=mask.to(model.device),
        images_per_text=task.images_per_text,
    )
    head = model.head
    assert isinstance(head, nn.Module)
    return answer_logits(model.model, head, batch, task.images_in_turn)


def _asked(model: LoadedModel, name: str | None, file: Path) -> tuple[Task, list[Question]]:
    """The task that the answers are for, and its questions; the model must be able to answer them."""
    own = task_of(model.config)
    if model.head is None or not isinstance(own, Task):
        raise UserError(f"run {model.config.name!r} was not fine-tuned on a task with answers; give one that was")
    name = name or own.type
    if name not in TASKS:
        raise UserError(f"the model's own task is {name}, whose questions have no official form. Give --task")
    task = CSVTask(num_images=2 if own.images_per_text == 2 else 1) if name == "csv" else TASKS[name]()
    if task.images_per_text != own.images_per_text:
        raise UserError(
            f"--task {name}: a question is about {task.images_per_text} image(s), but the model was fine-tuned on "
            f"{own.type}, where it is about {own.images_per_text}"
        )
    if isinstance(task, NLVR2Task) and not set(model.answers) <= set(task.ANSWERS):
        raise UserError(f"--task nlvr2: answers are True and False, but the model's are {', '.join(model.answers[:5])}")
    read: Callable[[OfficialFile], Iterator[Question]]
    if name == "vqav2":
        read = partial(read_vqav2, annotations=None)
    elif name == "gqa":
        read = partial(read_gqa, labelled=False)
    elif name == "csv":
        read = partial(read_table, images_per_text=own.images_per_text, labelled=False)
    else:
        read = read_nlvr2
    return task, unique(read, OfficialFile.given(file))


class NamedPictures:
    """Images by their names without ending, in any subfolder or zip."""

    def __init__(self, release: Release) -> None:
        self.release = release
        self.entries: defaultdict[str, list[Entry]] = defaultdict(list)
        for name in release.names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                self.entries[self.key_of(stem)] += release.find(name)

    def key_of(self, stem: str) -> str:
        return stem

    def __contains__(self, key: str) -> bool:
        return self.key_of(key) in self.entries

    def read(self, key: str) -> tuple[bytes, str]:
        """The encoded image, and what errors call it."""
        entry = self.release.only(self.entries[self.key_of(key)])
        if entry.size > MAX_IMAGE_BYTES:
            raise ImageError(f"{entry.name}: over {MAX_IMAGE_BYTES:,} bytes", "too many bytes")
        try:
            with self.release.open(entry) as content:
                return content.read(), entry.name
        except READING_ERRORS as error:
            raise ImageError(f"{entry.name}: cannot be read ({error})", "cannot be read") from None


class NumberedPictures(NamedPictures):
    """COCO's images by their number, be they named COCO_val2014_000000000042 or, as since 2017, 000000000042."""

    def key_of(self, stem: str) -> str:
        number = stem.rpartition("_")[2]
        return str(int(number)) if number.isascii() and number.isdigit() else stem


class PicturesByPath(NamedPictures):
    """Images by their paths below the folder."""

    def __init__(self, release: Release) -> None:
        super().__init__(release)
        named = [entry for entries in self.entries.values() for entry in entries if not entry.member]
        self.entries.clear()
        for entry in named:
            self.entries[release.relative(entry.path)].append(entry)


def _missing(questions: Sequence[Question], pictures: NamedPictures, folder: Path, allow: bool) -> frozenset[str]:
    """The keys of images that are not there; without `allow` there must be none."""
    first: dict[str, str] = {}
    for question in questions:
        for key in question.image_keys:
            first.setdefault(key, question.id)
    missing = frozenset(key for key in first if key not in pictures)
    if missing and not allow:
        key = next(key for key in first if key in missing)
        raise UserError(
            f"{folder}: {len(missing):,} of the {len(first):,} images are not here, such as {key} of question "
            f"{first[key]}. Give the folder that holds them (subfolders and zips will do), or answer with a grey "
            "image in their place: --allow-missing"
        )
    if len(missing) == len(first):
        raise UserError(f"{folder}: none of the {len(first):,} images is here, such as {min(missing)}")
    return missing
