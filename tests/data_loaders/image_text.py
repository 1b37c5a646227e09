"""Small releases of images with texts, laid out as the real ones."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_loaders.prepare.image_text import Options
from data_loaders.shards import ShardReader, open_index
from vlm.types import Record

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def picture(number: int, kind: str = "JPEG", width: int = 12, height: int = 9) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def write(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def tar(members: Mapping[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def options(source: Path, root: Path, max_missing: float = 1.0, workers: int = 1) -> Options:
    return Options(source, root, max_missing, workers, progress=False)


def records(folder: Path) -> dict[str, Record]:
    return {record.key: record for record in ShardReader(open_index(folder))}


def report_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return value


def unpacked(file: Path) -> list[list[str]]:
    """The rows of a compressed table, the header among them."""
    return [line.split("\t") for line in gzip.decompress(file.read_bytes()).decode().splitlines()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# --- Conceptual Captions ---------------------------------------------------------------------------------------------

URL = "https://example.com/{}.jpg".format
TRAIN, VALIDATION = "Train_GCC-training.tsv", "Validation_GCC-1.1.0-Validation.tsv"
LABELS = "Image_Labels_Subset_Train_GCC-Labels-training.tsv"


def captions_tables(train: int = 30, validation: int = 3) -> dict[str, bytes | str]:
    return {
        TRAIN: "".join(f'a " {n} " in the rain .\t{URL(n)}\n' for n in range(train)),
        VALIDATION: "".join(f"validation {n}\t{URL(1000 + n)}\n" for n in range(validation)),
    }


def labels_table(rows: Sequence[int]) -> str:
    return "".join(f"caption {n}\t{URL(n)}\tcat {n},animal\t/m/1,/m/0jbk\t0.9,0.25\n" for n in rows)


def download_members(numbers: Sequence[int]) -> dict[str, bytes]:
    """What img2dataset writes for the images at some urls."""
    members = {}
    for place, number in enumerate(numbers):
        about = {"url": URL(number), "caption": "mangled", "key": f"{place:09d}", "status": "success"}
        members |= {
            f"{place:09d}.jpg": picture(number),
            f"{place:09d}.txt": b"mangled",
            f"{place:09d}.json": json.dumps(about).encode(),
        }
    return members


def download(numbers: Sequence[int], images_per_tar: int = 10) -> dict[str, bytes | str]:
    """The tars that img2dataset writes."""
    parts = [numbers[start : start + images_per_tar] for start in range(0, len(numbers), images_per_tar)]
    return {f"images/{number:05d}.tar": tar(download_members(part)) for number, part in enumerate(parts)}
