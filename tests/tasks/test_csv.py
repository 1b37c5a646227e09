"""Fine-tuning on a user's own table, from the file to a model that is used."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import COLORS, NUM_ROWS, TableRun, table_command

import vlm
from vlm.cli import main
from vlm.config import compose
from vlm.errors import UserError
from vlm.records import OfficialFile
from vlm.run import RunConfig
from vlm.tasks.csv import read_table


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for number in range(24):
        name = f"{'more/' * (number % 2)}{number}.png"
        Image.new("RGB", (20, 20), ("red", "green", "blue", "black")[number % 4]).save(folder / name)
    return folder


def table(folder: Path, text: str, name: str = "mine.csv") -> Path:
    file = folder / name
    file.write_bytes(text.encode(errors="surrogateescape"))
    return file


def test_a_table_becomes_a_model_that_answers_predicts_and_is_evaluated(
    table_run: TableRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(table_run.folder, tmp_path / "run"))
    predictions = run / "predictions-csv-validation.csv"
    before = predictions.read_text()
    assert main(["evaluate", str(run)]) == 0 and predictions.read_text() == before
    assert vlm.load(run).answers == tuple(sorted(COLORS))
    capsys.readouterr()
    picture = next(iter(sorted(table_run.images.glob("*.png"))))  # 0: black
    assert main(["answer", str(run), str(picture), "what is it?", "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(COLORS)
    out = tmp_path / "out.csv"
    asked = ["--questions", str(table_run.table), "--images", str(table_run.images), "--out", str(out)]
    assert main(["predict", str(run), *asked, "--device", "cpu"]) == 0
    header, *rows = csv.reader(out.read_text().splitlines())
    assert header == ["id", "prediction"] and [number for number, _ in rows] == [str(n + 2) for n in range(NUM_ROWS)]
    evaluated = list(csv.reader(before.splitlines()))[1:]
    assert all(row in rows for row in evaluated) and 0 < len(evaluated) < NUM_ROWS


def test_a_run_refuses_a_table_that_changed(
    table_run: TableRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(table_run.folder, tmp_path / "run"))
    before = table_run.table.read_text()
    table_run.table.write_text(before.replace("red", "crimson"))
    try:
        assert main(table_command(table_run.table, table_run.images, run)) == 2
    finally:
        table_run.table.write_text(before)
    assert "other data (csv/train.jsonl)" in capsys.readouterr().err


def test_statements_about_two_images_have_a_truth(pictures: Path, tmp_path: Path) -> None:
    rows = [f"./{n}.png;.\\{n + 2}.png;both are red;{'TRUE' if n % 4 else 'no'}" for n in range(0, 20, 2)]
    file = table(tmp_path, "\ufeffimage;image;statement;truth\n" + "\n".join(rows))
    read = list(read_table(OfficialFile.given(file), 2))
    assert {answer for question in read for answer in question.answers} == {"True", "False"}
    assert read[0].image_keys == ("0.png", "2.png") and read[0].id == "2"
    options = [f"data.path={file}", f"data.images={pictures}", "data.validation_fraction=0.4", "task.num_images=2"]
    config = compose("finetune", ["data=csv", *options], RunConfig)
    assert config.task is not None and config.task.type == "csv"
    root = config.data.prepare(progress=False)
    held_out = {q.image_keys[0] for q in config.task.read(root, "validation")}
    assert held_out and held_out.isdisjoint(q.image_keys[0] for q in config.task.read(root, "train"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,question\n0.png,what?\n", "row 1: the header must name"),
        ("image,question,answer\n0.png,what?,red\n2.png,what?\n", "row 3: 2 cells under 3 names"),
        ("image,question,answer\n0.png,what?,\n", "row 2: answer is empty"),
        ("image,question,answer\n../secret.png,what?,red\n", 'row 2: "../secret.png" leads out'),
        ("image,question,answer\n/etc/passwd,what?,red\n", 'row 2: "/etc/passwd" leads out'),
        ("image1,image2,statement,truth\n0.png,2.png,red,maybe\n", "row 2: truth must be true or false"),
        ("image,question,answer\n.,what?,red\n", 'row 2: "." leads out'),
        ('image,question,answer\n0.png,"what?,red\n', "row 2: cannot be read"),
        ('image,"question,answer\n0.png,what?,red\n', "row 1: cannot be read"),
        ("image,question,answer\r0.png,what?,red\r", "lines end in carriage returns"),
        (f"image,question,answer\n0.png,{'x' * 200_000},red\n", "row 2: cannot be read (field larger"),
        ("image,question,answer\n0.png,what?,caf\udce9\n", "not UTF-8 text"),
        ("image,question,answer\n", "holds no question"),
        ("id,image,question,answer\na,0.png,what?,red\na,0.png,who?,red\n", "question a occurs twice"),
        ("image,question,answer\n0.png,what?,red\nnone.png,what?,red\n", "row 3: image 'none.png' is not in"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_row(text: str, said: str, pictures: Path, tmp_path: Path) -> None:
    file = table(tmp_path, text)
    options = [
        "data=csv",
        f"data.path={file}",
        f"data.images={pictures}",
        f"data.validation={questions_apart(tmp_path)}",
    ]
    with pytest.raises(UserError) as error:
        compose("finetune", options, RunConfig).data.prepare(progress=False)
    assert said in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def questions_apart(folder: Path) -> Path:
    return table(folder, "image,question,answer\n0.png,what?,red\n", "validation.csv")
