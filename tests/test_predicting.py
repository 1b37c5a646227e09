"""`vlm predict` and `vlm answer`: official files and a folder of images in, official results out."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import TableRun, TinyRun

import vlm
from data_loaders.shards import ShardReader, open_index
from vlm.cli import main
from vlm.predicting import answer_all
from vlm.scoring.predictions import read_gqa_predictions, read_nlvr2_predictions, read_vqav2_results
from vlm.tasks.gqa import GQATask
from vlm.tasks.nlvr2 import NLVR2Task
from vlm.tasks.task import Task
from vlm.tasks.vqav2 import VQAv2Task

READERS = {"vqav2": read_vqav2_results, "gqa": read_gqa_predictions, "nlvr2": read_nlvr2_predictions}
FILES = {
    "vqav2": "v2_OpenEnded_mscoco_val2014_questions.json",
    "gqa": "val_balanced_questions.json",
    "nlvr2": "dev.json",
}
TASKS: dict[str, Task] = {
    "vqav2": VQAv2Task(evaluation_split="validation"),
    "gqa": GQATask(evaluation_split="validation"),
    "nlvr2": NLVR2Task(evaluation_split="validation"),
}


@pytest.fixture
def release(statement_run: TinyRun, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Of a task, the validation questions under their official name, and the images as files in subfolders."""

    def unpacked(name: str) -> tuple[Path, Path]:
        shutil.copy(statement_run.root / name / FILES[name], tmp_path / FILES[name])
        reader = ShardReader(open_index(statement_run.root / name / "images"))
        for key in {key for one in TASKS[name].evaluation_questions(statement_run.root) for key in one.image_keys}:
            file = tmp_path / "images" / key[:6] / f"{key}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(reader.image(reader.position(key)))
        return tmp_path / FILES[name], tmp_path / "images"

    return unpacked


Release = Callable[[str], tuple[Path, Path]]


def predict(run: TinyRun, asked: tuple[Path, Path], out: Path, *options: str) -> int:
    questions, images = asked
    command = ["predict", str(run.folder), "--questions", str(questions), "--images", str(images), "--out", str(out)]
    return main([*command, "--device", "cpu", *options])


def test_predict_answers_as_the_evaluation_did(statement_run: TinyRun, release: Release, tmp_path: Path) -> None:
    assert predict(statement_run, release("nlvr2"), tmp_path / "out.csv", "--batch-size", "7") == 0
    before = read_nlvr2_predictions(statement_run.folder / "predictions-nlvr2-validation.csv")
    assert read_nlvr2_predictions(tmp_path / "out.csv") == before


@pytest.mark.parametrize("name", ["vqav2", "gqa"])
def test_predict_answers_each_question_as_if_it_were_asked_alone(
    name: str, table_run: TableRun, statement_run: TinyRun, release: Release, tmp_path: Path
) -> None:
    asked = release(name)
    files = {file.stem: file for file in sorted(asked[1].rglob("*.png"))}
    for number, file in enumerate(files.values()):  # of the colors that the model tells apart
        Image.new("RGB", (64, 48), ("black", "red", "blue")[number % 3]).save(file)
    pictures = {stem: file.read_bytes() for stem, file in files.items()}
    if name == "vqav2":  # as the images are named since 2017; and any name of the questions will do
        for file in files.values():
            os.rename(file, file.with_name(f"{file.stem.rpartition('_')[2]}.png"))
        asked = asked[0].rename(tmp_path / "mine.json"), asked[1]
    assert predict(table_run, asked, tmp_path / "out.json", "--task", name, "--batch-size", "7") == 0
    found = {str(number): answer for number, answer in READERS[name](tmp_path / "out.json").items()}
    questions = TASKS[name].evaluation_questions(statement_run.root)
    model = vlm.load(table_run.folder)
    alone = [model.answer([pictures[one.image_keys[0]]], [one.text], top=1)[0] for one in questions]
    assert found == {question.id: next(iter(one)) for question, one in zip(questions, alone, strict=True)}
    assert len(set(found.values())) > 1


def test_each_image_is_decoded_once_whatever_the_order(table_run: TableRun, statement_run: TinyRun) -> None:
    model = vlm.load(table_run.folder)
    questions = TASKS["gqa"].evaluation_questions(statement_run.root)[::-1]
    read: Counter[str] = Counter()
    side = model.transform.image_pixels

    def pixels(key: str) -> torch.Tensor:
        read[key] += 1
        return torch.randint(0, 256, (3, side, side), generator=torch.Generator().manual_seed(len(key))).byte()

    answers = answer_all(model, questions, pixels, batch_size=3)
    assert answers.keys() == {question.id for question in questions}
    assert set(read.values()) == {1}


def test_a_missing_image_is_one_error_or_grey(
    table_run: TableRun, release: Release, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = release("vqav2")
    first, second, *_ = sorted(asked[1].rglob("*.png"))
    first.unlink()
    second.write_bytes(b"no image")
    out = tmp_path / "out.json"
    assert predict(table_run, asked, out, "--task", "vqav2") == 2
    error = capsys.readouterr().err
    assert first.stem in error and "--allow-missing" in error and error.count("\n") == 1 and not out.exists()
    assert predict(table_run, asked, out, "--task", "vqav2", "--allow-missing") == 0
    assert "2 images are missing or unreadable" in capsys.readouterr().err
    assert len(json.loads(out.read_text())) == len(json.loads(asked[0].read_text())["questions"])


def test_questions_that_the_model_cannot_answer_are_refused(
    table_run: TableRun, release: Release, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(table_run, release("nlvr2"), tmp_path / "x.csv", "--task", "nlvr2") == 2
    assert "2 image(s)" in capsys.readouterr().err


def test_answer_prints_the_most_likely_answers(
    statement_run: TinyRun, release: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    left, right, *_ = sorted(str(file) for file in release("nlvr2")[1].rglob("*.png"))
    command = ["answer", str(statement_run.folder), left, right, "there is a circle", "--device", "cpu"]
    assert main(command) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {answer for _, answer in lines} == {"True", "False"}
    assert sum(float(probability) for probability, _ in lines) == pytest.approx(1, abs=1e-3)
    assert float(lines[0][0]) >= float(lines[1][0])
    assert main(["answer", str(statement_run.folder), left, "there is a circle", "--device", "cpu"]) == 2
    assert "2 image(s)" in capsys.readouterr().err
