"""`vlm predict` and `vlm answer`: official files and a folder of images in, official results out."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

import vlm
from data_loaders.shards import ShardReader, open_index
from vlm.cli import main
from vlm.config import compose
from vlm.predicting import answer_all
from vlm.run import RunConfig, task_of, train
from vlm.scoring.predictions import read_gqa_predictions, read_nlvr2_predictions, read_vqav2_results
from vlm.tasks.task import Task

READERS = {"vqav2": read_vqav2_results, "gqa": read_gqa_predictions, "nlvr2": read_nlvr2_predictions}


NAMES = {
    "vqav2": "v2_OpenEnded_mscoco_val2014_questions.json",
    "gqa": "val_balanced_questions.json",
    "nlvr2": "dev.json",
}


def release(config: RunConfig, folder: Path) -> tuple[Path, Path]:
    """The validation questions under their official name, and the images as files in subfolders."""
    task = task_of(config)
    assert isinstance(task, Task)
    root = config.data.prepare() / task.type
    name = {
        "vqav2": "v2_OpenEnded_mscoco_val2014_questions.json",
        "gqa": "val_balanced_questions.json",
        "nlvr2": "dev.json",
    }[task.type]
    shutil.copy(root / name, folder / name)
    reader = ShardReader(open_index(root / "images"))
    for key in {key for question in task.evaluation_questions(root.parent) for key in question.image_keys}:
        file = folder / "images" / key[:6] / f"{key}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(reader.image(reader.position(key)))
    return folder / name, folder / "images"


@pytest.mark.parametrize("name", READERS)
def test_predict_answers_as_the_evaluation_did(name: str, runs: dict[str, RunConfig], tmp_path: Path) -> None:
    questions, images = release(runs[name], tmp_path)
    out = tmp_path / "answers.txt"
    command = ["predict", str(runs[name].folder), "--task", name, "--questions", str(questions)]
    assert main([*command, "--images", str(images), "--out", str(out), "--device", "cpu", "--batch-size", "7"]) == 0
    suffix = "csv" if name == "nlvr2" else "json"
    before = runs[name].run_folder / f"predictions-{name}-validation.{suffix}"
    assert READERS[name](out) == READERS[name](before)


def test_each_image_is_decoded_once_whatever_the_order(runs: dict[str, RunConfig]) -> None:
    model = vlm.load(runs["gqa"].run_folder)
    task = task_of(runs["gqa"])
    assert isinstance(task, Task)
    questions = task.evaluation_questions(runs["gqa"].data.prepare())[::-1]
    read: Counter[str] = Counter()
    side = model.transform.image_pixels

    def pixels(key: str) -> torch.Tensor:
        read[key] += 1
        return torch.randint(0, 256, (3, side, side), generator=torch.Generator().manual_seed(len(key))).byte()

    answers = answer_all(model, questions, pixels, batch_size=3)
    assert answers.keys() == {question.id for question in questions}
    assert set(read.values()) == {1}


def test_a_missing_image_is_one_error_or_grey(
    runs: dict[str, RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, images = release(runs["vqav2"], tmp_path)
    first, second, *_ = sorted(images.rglob("*.png"))
    first.unlink()
    second.write_bytes(b"no image")
    out = tmp_path / "out.json"
    command = ["predict", str(runs["vqav2"].folder), "--questions", str(questions), "--images", str(images)]
    command += ["--out", str(out), "--device", "cpu"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert first.stem in error and "--allow-missing" in error and error.count("\n") == 1 and not out.exists()
    assert main([*command, "--allow-missing"]) == 0
    assert "2 images are missing or unreadable" in capsys.readouterr().err
    assert len(json.loads(out.read_text())) == len(json.loads(questions.read_text())["questions"])


def test_cocos_later_names_and_questions_of_ones_own_name_will_do(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    questions, images = release(runs["vqav2"], tmp_path)
    for file in images.rglob("*.png"):
        os.rename(file, file.with_name(f"{file.stem.rpartition('_')[2]}.png"))
    mine = questions.rename(tmp_path / "mine.json")
    out = tmp_path / "out.json"
    command = ["predict", str(runs["vqav2"].folder), "--questions", str(mine), "--images", str(images)]
    assert main([*command, "--out", str(out), "--device", "cpu"]) == 0
    assert read_vqav2_results(out) == read_vqav2_results(runs["vqav2"].run_folder / "predictions-vqav2-validation.json")


def test_questions_that_the_model_cannot_answer_are_refused(
    runs: dict[str, RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, images = release(runs["nlvr2"], tmp_path)
    command = ["predict", str(runs["gqa"].folder), "--task", "nlvr2", "--questions", str(questions)]
    assert main([*command, "--images", str(images), "--out", str(tmp_path / "x.csv"), "--device", "cpu"]) == 2
    assert "2 image(s)" in capsys.readouterr().err


def test_answer_prints_the_most_likely_answers(
    runs: dict[str, RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, images = release(runs["nlvr2"], tmp_path)
    left, right, *_ = sorted(str(file) for file in images.rglob("*.png"))
    command = ["answer", str(runs["nlvr2"].folder), left, right, "there is a circle", "--device", "cpu"]
    assert main(command) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {answer for _, answer in lines} == {"True", "False"}
    assert sum(float(probability) for probability, _ in lines) == pytest.approx(1, abs=1e-3)
    assert float(lines[0][0]) >= float(lines[1][0])
    assert main(["answer", str(runs["nlvr2"].folder), left, "there is a circle", "--device", "cpu"]) == 2
    assert "2 image(s)" in capsys.readouterr().err
