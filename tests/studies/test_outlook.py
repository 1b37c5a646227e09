"""What is left of a study, and its dry run."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from made_up_study import STUDY, Finished, finish_study
from rich.console import Console

from vlm.config import ConfigError, load_yaml
from vlm.run import CONFIG, RESULT, RunConfig
from vlm.studies.driver import FAILURE
from vlm.studies.outlook import Outlook, Probe, axes, dry_run
from vlm.studies.plan import StudyConfig, plan

CELLS = "cells.txt"


def shown(outlook: Outlook, at_once: int = 1) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(outlook.table(at_once))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, stage: str) -> list[str]:
    return next(line for line in text.splitlines() if line.strip().startswith(stage)).split()


def test_a_finished_study_has_nothing_left(finished: Finished) -> None:
    text = shown(Outlook.of(finished.jobs))
    assert row(text, "pretrain") == ["pretrain", "12", "12", "0", "12", "0", "0", "0:02", "0:00"]
    assert "All runs are finished" in text
    assert axes(finished.jobs) == ["point: none, 5%, 100%, labels", "seed: 0, 1, 2", "task: gqa, nlvr2"]


def test_the_cost_of_what_is_left_is_that_of_its_siblings(tmp_path: Path) -> None:
    made = finish_study(tmp_path)
    nlvr2 = [job for job in made.jobs if job.stage == "finetune" and job.labels["task"] == "nlvr2"]
    first = [job for job in nlvr2 if job.labels["point"] == "none"]
    for job, seconds in zip(first, (10, 20, 0), strict=True):
        (job.folder / RESULT).write_text(json.dumps({"scores": {}, "seconds": seconds, "examples": 1}))
    (first[2].folder / RESULT).unlink()
    (first[2].folder / FAILURE).write_text("{}")
    outlook = Outlook.of(made.jobs)
    assert outlook.costs()[first[2].id] == 15  # of the same place with other seeds
    assert row(shown(outlook), "finetune")[1:7] == ["24", "24", "0", "23", "1", "1"]
    assert "about 0:08 with 2 at once" in shown(outlook, 2)


def test_without_a_finished_run_the_cost_is_unknown_until_it_is_probed(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    planned = plan(load_yaml(file, StudyConfig), tmp_path, ["pretrain:trainer.samples=6400"])
    outlook = Outlook.of(planned)
    assert "--probe measures it" in shown(outlook)
    outlook.probes = {("pretrain", ""): Probe(5.0, 100.0, 20_000, 1.0)}
    assert outlook.costs()[planned[1].id] == 5 + 64
    whole = next(job for job in planned if job.stage == "finetune")
    passes = Probe(0.0, 10.0, 480, 1.0).seconds(whole)
    assert whole.config.trainer.passes == 10 and passes == 10 * 480 / 10


def test_a_probe_of_all_pairs_tells_the_cost_of_a_part_of_them(finished: Finished) -> None:
    by_point = {job.labels["point"]: job for job in finished.jobs if job.stage == "pretrain"}
    probe = Probe(1.0, 64.0, 20_000, 1.0)
    seconds = {point: probe.seconds(job) for point, job in by_point.items()}
    assert seconds["none"] == 1.0
    assert seconds["5%"] == pytest.approx(1 + 10 * 1000 / 64, abs=1)
    assert seconds["100%"] == pytest.approx(1 + 10 * 20_000 / 64, abs=1)


def leave_a_checkpoint(folder: Path) -> None:
    """Tells the cell that ran, and how many checkpoints lay there."""
    config = load_yaml(folder / CONFIG, RunConfig)
    if config.start_from is not None:
        assert (config.start_from / "last.ckpt").is_file()
    (folder / "last.ckpt").touch()
    number = len(list(folder.parent.glob("*/last.ckpt")))
    with Path(CELLS).open("a") as file:
        file.write(f"{config.name} {config.seed} {config.trainer.batch_size} {number}\n")
    (folder / RESULT).write_text("{}")


def test_a_dry_run_does_every_kind_of_run_once_and_keeps_few_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    small = "data.world={num_pairs:4,num_validation_pairs:2,num_unimodal_images:2,num_texts:20,"
    small += "num_vqav2_train:4,num_gqa_train:4,num_nlvr2_train:4,num_evaluation:4}"
    file = tmp_path / "study.yaml"
    file.write_text(STUDY + f"dry_run: {{overrides: ['pretrain:trainer.batch_size=2', '{small}']}}\n")
    dry_run(load_yaml(file, StudyConfig), work=leave_a_checkpoint)
    lines = [line.split() for line in Path(CELLS).read_text().splitlines()]
    assert len(lines) == 4 + 2 + 1 + 1 and {seed for _, seed, _, _ in lines} == {"0"}
    assert {batch for name, _, batch, _ in lines if name == "pretrain"} == {"2"}
    assert max(int(number) for *_, number in lines) <= 3  # a pretraining and some of what starts from it
    assert "8 kinds of runs stand for 14 cells" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_dry_run_with_overrides_of_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY + "dry_run: {overrides: ['pretrian:trainer.batch_size=2']}\n")
    with pytest.raises(ConfigError, match=r"unknown stage\. Did you mean 'pretrain'"):
        dry_run(load_yaml(file, StudyConfig))
    shutil.rmtree(tmp_path)
