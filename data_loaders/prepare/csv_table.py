"""A user's own table of questions, with its images in a folder, to a data root of the task `csv`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from data_loaders.decoding import ImageError, check_image
from data_loaders.prepare.folder import path_key
from data_loaders.prepare.preparation import MAX_IMAGE_BYTES, ordered_map
from data_loaders.progress import progress_bar
from data_loaders.shards import ring_hash, write_ordered_shards
from vlm.errors import UserError
from vlm.records import OfficialFile
from vlm.supervision.sources import key_random
from vlm.tasks.csv import REMEDY, read_table
from vlm.tasks.task import unique
from vlm.types import Question, Record

FORMAT = 1  # of what is written; raise it when that changes


class CSVRoot:
    """What a table and its images become: `csv/{train,validation,test}.jsonl`, and `csv/images` as shards.

    Without a table of its own, validation is about `validation_fraction` of the images, chosen by a hash of the name of
    a row's first image: no row of train is about one of them, and further rows move no image to the other side.
    """

    def __init__(
        self, path: Path, images: Path, validation: Path | None, test: Path | None, validation_fraction: float
    ) -> None:
        self.images, self.validation_fraction = images, validation_fraction
        tables = {"train": path, "validation": validation, "test": test}
        self.tables = {split: table for split, table in tables.items() if table is not None}
        if not images.is_dir():
            raise UserError(f"data.images: {images} is no folder. It must hold the images that {path} names")

    def name(self) -> str:
        """Another one for other tables or other images, by the sizes and times of all files of the folder."""
        digest = hashlib.sha256(f"{FORMAT} {self.validation_fraction} {sorted(self.tables)}".encode())
        for table in self.tables.values():
            with OfficialFile.given(table).binary() as content:
                digest.update(hashlib.sha256(content.read()).digest())
        for folder, folders, names in os.walk(self.images):
            folders.sort()
            for name in sorted(names):
                file = Path(folder, name)
                try:
                    stat = file.stat()
                except OSError:  # a link that leads nowhere
                    continue
                digest.update(os.fsencode(f"{file.relative_to(self.images)} {stat.st_size} {stat.st_mtime_ns}\n"))
        return digest.hexdigest()[:16]

    def write(self, root: Path, progress: bool) -> None:
        """Write the data root, which appears whole or not at all."""
        splits = self._splits()
        root.parent.mkdir(parents=True, exist_ok=True)
        partial_root = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        try:
            (partial_root / "csv").mkdir()
            for split, questions in splits.items():
                lines = [_line(replace(q, image_keys=tuple(map(path_key, q.image_keys)))) for q in questions]
                (partial_root / "csv" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            (partial_root / "texts").mkdir()  # for a language encoder that makes its vocabulary of the data
            for split in ("train", "validation"):
                texts = "".join(f"{' '.join(question.text.split())}\n" for question in splits[split])
                (partial_root / "texts" / f"{split}.txt").write_text(texts, encoding="utf-8")
            self._write_images(splits, partial_root / "csv" / "images", progress)
            partial_root.chmod(0o755)
            if not root.is_dir():  # else another process was as fast
                os.replace(partial_root, root)
        finally:
            shutil.rmtree(partial_root, ignore_errors=True)

    def _splits(self) -> dict[str, list[Question]]:
        files = {split: OfficialFile.given(table) for split, table in self.tables.items()}
        read = {split: unique(read_table, file) for split, file in files.items()}
        widths = {split: len(questions[0].image_keys) for split, questions in read.items()}
        other = next((split for split in widths if widths[split] != widths["train"]), None)
        if other is not None:
            raise files[other].error(
                f"its rows have {widths[other]} image(s), those of train {widths['train']}", REMEDY
            )
        if "validation" in read:
            return read
        images = dict.fromkeys(question.image_keys[0] for question in read["train"])
        draws = {image: key_random(image, "csv_validation").random() for image in images}
        held_out = {image for image, draw in draws.items() if draw < self.validation_fraction}
        if not held_out or len(held_out) == len(images):
            raise files["train"].error(
                f"{len(images)} images are too few to hold out {self.validation_fraction:g} of them by their hash",
                "Give a table for it with data.validation=FILE, or another data.validation_fraction",
            )
        rows = read.pop("train")
        return {
            "train": [question for question in rows if question.image_keys[0] not in held_out],
            "validation": [question for question in rows if question.image_keys[0] in held_out],
            **read,
        }

    def _write_images(self, splits: Mapping[str, Sequence[Question]], folder: Path, progress: bool) -> None:
        """Every image once, checked to decode; a fault names the first row that is about it."""
        asked: dict[str, str] = {}
        for split, questions in splits.items():
            table = self.tables.get(split, self.tables["train"])
            for question in questions:
                for image in question.image_keys:
                    asked.setdefault(image, f"{table}: row {question.id}")
        ordered = sorted(asked, key=lambda image: ring_hash(path_key(image)))
        load = partial(_load, self.images, asked)
        with progress_bar(progress) as bar:
            shown = bar.add_task("images", total=len(ordered))

            def records() -> Iterator[Record]:
                for record in ordered_map(load, ordered, num_workers=min(8, os.cpu_count() or 1)):
                    bar.advance(shown)
                    yield record

            write_ordered_shards(records(), folder)


def _load(folder: Path, asked: Mapping[str, str], image: str) -> Record:
    file, row = folder / image, asked[image]
    try:
        if not file.is_file():
            raise UserError(f"{row}: image {image!r} is not in {folder}. Put it there, or take the row out")
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{row}: image {image!r} is a link that leads out of {folder}")
        if file.stat().st_size > MAX_IMAGE_BYTES:
            raise UserError(f"{row}: image {image!r} has over {MAX_IMAGE_BYTES:,} bytes")
        data = file.read_bytes()
        check_image(data, str(file))
    except ImageError as error:
        raise UserError(f"{row}: {error}. Replace it, or take the row out") from None
    except OSError as error:
        raise UserError(f"{row}: {file} cannot be read ({error.strerror})") from None
    return Record(path_key(image), data)


def _line(question: Question) -> str:
    row = {"id": question.id, "text": question.text, "images": question.image_keys, "answers": question.answers}
    return json.dumps(row | ({"type": question.group} if question.group else {}), ensure_ascii=False) + "\n"
