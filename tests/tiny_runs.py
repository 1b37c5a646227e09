"""Two runs of a few steps, each with what it was trained on."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlm.cli import main
from vlm.config import load_yaml
from vlm.run import CONFIG, RunConfig

ATTACK = "<img src=x onerror=\"document.title='taken'\"><svg onload=\"document.title='taken'\">"
COLORS = {ATTACK: "black", "red": "red", "blue": "blue"}  # an answer -> the color of its pictures
NUM_ROWS = 60

SMALL = [
    *("trainer.accelerator=cpu", "trainer.progress=false", "trainer.batch_size=16"),
    *(f"model.{part}.{key}" for part in ("vision", "language", "fusion") for key in ("width=32", "depth=1")),
]
SMALL_WORLD = [
    "data.world.num_pairs=16",
    "data.world.num_validation_pairs=8",
    "data.world.num_unimodal_images=8",
    "data.world.num_texts=200",
    "data.world.num_vqav2_train=48",
    "data.world.num_gqa_train=48",
    "data.world.num_nlvr2_train=32",
    "data.world.num_evaluation=32",
]


@dataclass(frozen=True)
class TinyRun:
    folder: Path
    root: Path  # of its data

    @property
    def config(self) -> RunConfig:
        return load_yaml(self.folder / CONFIG, RunConfig)


@dataclass(frozen=True)
class TableRun(TinyRun):
    table: Path
    images: Path


def trained(folder: Path, *arguments: str) -> TinyRun:
    assert main(["train", "finetune", f"folder={folder}", *SMALL, *arguments]) == 0
    return TinyRun(folder, load_yaml(folder / CONFIG, RunConfig).data.prepare(progress=False))


def table_command(table: Path, images: Path, run: Path) -> list[str]:
    data = ["data=csv", f"data.path={table}", f"data.images={images}", "data.validation_fraction=0.6"]
    length = ["trainer.samples=480", "optimizer.learning_rate=3e-3", "trainer.validation_pictures=0"]
    return ["train", "finetune", f"folder={run}", *SMALL, *data, *length]


def table_run(folder: Path) -> TableRun:
    """A model that tells three colors apart. Answers, types and names of images are an attack on a page."""
    written = io.StringIO()
    writer = csv.writer(written)
    writer.writerow(("image", "question", "answer", "type"))
    for number in range(NUM_ROWS):
        answer, color = list(COLORS.items())[number % len(COLORS)]
        name = f"{'more/' * (number % 2)}{number}<svg onload=alert(1)>.png"
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), color).save(folder / "images" / name)
        writer.writerow((name, f"what is it? {number}", answer, "<b>t</b>"))
    (folder / "table.csv").write_text(written.getvalue())
    command = table_command(folder / "table.csv", folder / "images", folder / "run")
    assert main(command) == 0
    root = load_yaml(folder / "run" / CONFIG, RunConfig).data.prepare(progress=False)
    return TableRun(folder / "run", root, folder / "table.csv", folder / "images")


def statement_run(folder: Path) -> TinyRun:
    """NLVR2 of a small world, whose root has the questions of VQAv2 and GQA too."""
    options = ["task=nlvr2", "task.evaluation_split=validation", "trainer.samples=32"]
    pictures = ["trainer.validate_every_steps=1", "trainer.validation_pictures=3"]
    return trained(folder, *SMALL_WORLD, *options, *pictures)
