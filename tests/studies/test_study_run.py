"""The whole way from a study.yaml to its curve, with a stand-in for training."""

from __future__ import annotations

import csv
import json
import multiprocessing
from pathlib import Path

import pytest

from vlm.config import load_yaml
from vlm.errors import UserError
from vlm.locks import only_process
from vlm.run import CONFIG, RESULT, RunConfig
from vlm.studies.run import Place, default_folder, find_study, run_study

STUDY = """
question: How many pairs?
overrides: ["data={{type:folder,root:'{root}'}}"]
stages:
  pretrain:
    config: pretrain
    points: {{none: {{supervision.fraction: 0}}, all: {{supervision.fraction: 1}}}}
  finetune: {{config: finetune, upstream: {{start_from: pretrain}}, grid: {{task: [gqa, nlvr2]}}}}
"""


def guess(folder: Path) -> None:
    """Gives NLVR2 50 without pairs and 70 with all; NLVR2 fails where the data root holds a file `broken`."""
    config = load_yaml(folder / CONFIG, RunConfig)
    scores = {}
    if config.task is not None:
        if config.task.type == "nlvr2" and (config.data.root / "broken").exists():
            raise UserError("nlvr2/test1.json: no such file")
        assert config.start_from is not None
        fraction = load_yaml(config.start_from / CONFIG, RunConfig).supervision.fraction
        scores = {"accuracy": 50 + 20 * fraction, "question_prior": 50}
    (folder / RESULT).write_text(json.dumps({"scores": scores, "seconds": 1.0, "examples": 8}))


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "root").mkdir()
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "study.yaml").write_text(STUDY.format(root=tmp_path / "root"))
    return folder


def test_a_study_ends_with_its_table_figure_and_curve(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_study(str(study), work=guess)
    out = Path("runs/mine")
    with (out / "results.csv").open() as file:
        rows = [(row["point"], row["task"], row["score"]) for row in csv.DictReader(file)]
    assert rows[4:] == [("none", "", ""), ("all", "", "")]  # the pretrainings
    assert rows[:4] == [
        ("none", "gqa", "50.0"),
        ("none", "nlvr2", "50.0"),
        ("all", "gqa", "70.0"),
        ("all", "nlvr2", "70.0"),
    ]
    assert "| all | 70.0 | 70.0 |" in (out / "table.md").read_text()
    assert (out / "curve.png").stat().st_size > 10_000
    assert any((out / "tensorboard").rglob("events.out.tfevents*"))
    printed = capsys.readouterr().out
    assert "How many pairs?" in printed and "tensorboard --logdir runs/mine/tensorboard" in printed
    report = (out / "report.md").read_text()
    assert report.startswith("# How many pairs?\n\n6 runs, one seed. **One seed supports no claim**")
    assert f"vlm compare {study}" in report


def test_a_failed_run_costs_only_its_own_scores_and_is_tried_again_when_asked(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = study.parent / "root" / "broken"
    broken.touch()
    with pytest.raises(SystemExit) as ended:
        run_study(str(study / "study.yaml"), Path("out"), Place(at_once=2), work=guess)
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "2 failed, 0 interrupted, 0 skipped" in printed and "error: nlvr2/test1.json: no such file" in printed
    assert "NLVR2" not in Path("out/table.md").read_text()
    assert "| all | 70.0 |" in Path("out/table.md").read_text()
    broken.unlink()
    with pytest.raises(SystemExit):
        run_study(str(study), Path("out"), Place(at_once=2), work=guess)
    assert "2 failed before and are left alone; --retry-failed" in capsys.readouterr().out
    run_study(str(study), Path("out"), Place(at_once=2), retry_failed=True, work=guess)
    assert "4 of 6 runs are finished already" in capsys.readouterr().out
    assert "| all | 70.0 | 70.0 |" in Path("out/table.md").read_text()


def test_missing_data_is_told_before_any_run_starts(study: Path) -> None:
    (study.parent / "root").rmdir()
    with pytest.raises(UserError, match="is no folder"):
        run_study(str(study), work=guess)
    assert not list(Path("runs").rglob(CONFIG))
    assert not multiprocessing.active_children()


def test_a_folder_that_cannot_be_written_is_told_before_any_run_starts(study: Path) -> None:
    (study.parent / "file").touch()
    with pytest.raises(UserError, match="file/out: cannot be written to"):
        run_study(str(study), study.parent / "file" / "out", work=guess)
    (study.parent / "out").mkdir()
    (study.parent / "out" / "runs").touch()
    with pytest.raises(UserError, match="out/runs: cannot be written to"):
        run_study(str(study), study.parent / "out", work=guess)
    assert not multiprocessing.active_children()


def test_a_study_of_the_current_folder_is_named_after_it(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(study.parent)
    assert default_folder(Path("study.yaml")) == default_folder(study.parent / "study.yaml")


def test_two_processes_never_work_on_one_study(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.locks.only_process.__wrapped__.__defaults__", (0.1,))
    Path("out").mkdir()
    with only_process(Path("out"), "study"), pytest.raises(UserError, match="another process works on this study"):
        run_study(str(study), Path("out"), work=guess)
    run_study(str(study), Path("out"), work=guess)


def test_an_unknown_study_is_told_with_the_near_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiments" / "quickstart").mkdir(parents=True)
    (tmp_path / "experiments" / "quickstart" / "study.yaml").touch()
    monkeypatch.setattr("vlm.studies.run.experiments_folder", lambda: tmp_path / "experiments")
    with pytest.raises(UserError, match=r"unknown study 'quikstart', and no such file\. Did you mean 'quickstart'"):
        find_study("quikstart")
    assert find_study("quickstart") == tmp_path / "experiments" / "quickstart" / "study.yaml"
