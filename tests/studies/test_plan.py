from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm.config import ConfigError, load_yaml
from vlm.studies.plan import Job, StudyConfig, distinct, plan
from vlm.studies.run import STUDY, experiments_folder

STUDIES = sorted(file.parent.name for file in experiments_folder().glob(f"*/{STUDY}"))
TASKS = ["vqav2", "nlvr2"]


def content(**changes: Any) -> dict[str, Any]:
    """A study of one shared encoder, three amounts of supervision, two tasks and the question-only baseline."""
    return {
        "question": "How many pairs?",
        "overrides": ["data=world", "model=tiny"],
        "seeds": [0, 1],
        "stages": {
            "vision": {"config": "unimodal_vision", "seeds": [0]},
            "pretrain": {
                "config": "pretrain",
                "upstream": {"model.vision.weights": "vision"},
                "points": {
                    "none": {"supervision.fraction": 0},
                    "5%": {"supervision.fraction": 0.05},
                    "labels": {"supervision": "machine_labels"},
                },
            },
            "finetune": {"config": "finetune", "upstream": {"start_from": "pretrain"}, "grid": {"task": TASKS}},
            "blind": {
                "config": "finetune",
                "overrides": ["task.question_only=true"],
                "upstream": {"start_from": "pretrain"},
                "only": {"point": ["none"]},
                "grid": {"task": TASKS},
            },
        },
    } | changes


def study(folder: Path, **changes: Any) -> StudyConfig:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content(**changes), sort_keys=False))
    return load_yaml(file, StudyConfig)


def stages(**changes: Any) -> dict[str, Any]:
    """The stages of `content`, some with further keys."""
    return {name: stage | changes.get(name, {}) for name, stage in content()["stages"].items()}


def count(jobs: list[Job]) -> dict[str, int]:
    return {stage: sum(job.stage == stage for job in jobs) for stage in dict.fromkeys(job.stage for job in jobs)}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    folder = tmp_path_factory.mktemp("study")
    return plan(study(folder), folder)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_that_ships_expands(name: str, tmp_path: Path) -> None:
    planned = plan(load_yaml(experiments_folder() / name / STUDY, StudyConfig), tmp_path)
    shared = 3 if name == "paper_switches" else 0  # a switch of the fine-tuning alone has another's pretraining
    assert len({job.id for job in planned}) == len(planned) - shared
    assert {job.config.name for job in planned} == {job.stage for job in planned}


def test_a_stage_has_a_run_for_each_seed_point_task_and_upstream_run(jobs: list[Job]) -> None:
    assert count(jobs) == {"vision": 1, "pretrain": 2 * 3, "finetune": 2 * 3 * 2, "blind": 2 * 2}
    assert len(distinct(jobs)) == len(jobs)


def test_labels_tell_the_place_in_the_grid(jobs: list[Job]) -> None:
    finetunes = [job for job in jobs if job.stage == "finetune"]
    places = [(job.labels["point"], job.labels["task"], job.labels["seed"]) for job in finetunes]
    assert places[:3] == [("none", "vqav2", "0"), ("none", "nlvr2", "0"), ("5%", "vqav2", "0")]
    assert len(set(places)) == len(places)
    assert finetunes[2].title == "finetune 5% vqav2 seed=0"


def test_runs_hold_what_their_place_says(jobs: list[Job]) -> None:
    for job in jobs:
        assert str(job.config.seed) == job.labels["seed"]
        assert not job.config.trainer.progress
        if job.stage == "pretrain":
            supervision = job.config.supervision
            assert supervision.fraction == {"none": 0, "5%": 0.05, "labels": 1}[job.labels["point"]]
            is_labels = supervision.sources[0].type == "machine_labels"
            assert is_labels == (job.labels["point"] == "labels")
        if job.stage in ("finetune", "blind"):
            assert job.config.task is not None and job.config.task.type == job.labels["task"]
            assert getattr(job.config.task, "question_only") == (job.stage == "blind")  # noqa: B009


def test_a_run_starts_from_the_upstream_run_of_its_own_seed_and_point(jobs: list[Job]) -> None:
    vision = jobs[0]
    for job in jobs:
        if job.stage == "pretrain":
            assert job.upstream == {"model.vision.weights": vision}  # seed 0 serves both
            assert getattr(job.config.model.vision, "weights") == vision.folder  # noqa: B009
        if job.stage in ("finetune", "blind"):
            start = job.upstream["start_from"]
            assert job.config.start_from == start.folder
            assert all(start.labels[label] == job.labels[label] for label in ("seed", "point"))


def test_only_keeps_the_upstream_runs_that_it_names(jobs: list[Job]) -> None:
    assert {job.labels["point"] for job in jobs if job.stage == "blind"} == {"none"}


def test_identity_stays_when_the_folder_moves(tmp_path: Path, jobs: list[Job]) -> None:
    elsewhere = plan(study(tmp_path), tmp_path / "it's a (strange) folder\\")
    assert [job.id for job in elsewhere] == [job.id for job in jobs]
    assert elsewhere[-1].config.start_from == elsewhere[-1].upstream["start_from"].folder
    assert all(job.folder == tmp_path / "it's a (strange) folder\\" / "runs" / job.id for job in elsewhere)


def test_a_changed_knob_renames_only_what_it_touches(tmp_path: Path, jobs: list[Job]) -> None:
    def kept(overrides: list[str]) -> set[str]:
        now = {job.id for job in plan(study(tmp_path, seeds=[0]), tmp_path, overrides)}
        return {job.stage for job in jobs if job.id in now}

    assert kept(["finetune:optimizer.learning_rate=0.5"]) == {"vision", "pretrain", "blind"}
    assert kept(["pretrain:optimizer.learning_rate=0.5"]) == {"vision"}
    assert kept(["vision:optimizer.learning_rate=0.5"]) == set()  # identity goes down the chain
    assert kept(["optimizer.learning_rate=0.5"]) == set()
    assert kept(["trainer.log_every_steps=7"]) == {"vision", "pretrain", "finetune", "blind"}


def test_equal_runs_of_two_points_are_one_run(tmp_path: Path) -> None:
    points = {"all": {"supervision.fraction": 1}, "same": {"supervision.subset_seed": 0}}
    planned = plan(study(tmp_path, stages=stages(pretrain={"points": points}, blind={"only": {}})), tmp_path)
    assert count(distinct(planned)) == {"vision": 1, "pretrain": 2, "finetune": 4, "blind": 4}
    assert count(planned)["finetune"] == 8


def test_grids_label_runs_by_their_keys(tmp_path: Path) -> None:
    depths = {"grid": {"model.fusion.depth": [1, 2]}}
    planned = plan(study(tmp_path, seeds=[0], stages=stages(pretrain=depths, finetune=depths)), tmp_path)
    last = next(job for job in reversed(planned) if job.stage == "finetune")
    assert last.labels["model.fusion.depth"] == "2"  # of the pretraining
    assert last.labels["finetune.model.fusion.depth"] == "2"


def test_an_axis_of_a_grid_may_have_named_sets_of_overrides(tmp_path: Path) -> None:
    rates = {"paper": {"optimizer.learning_rate": 1e-4, "trainer.passes": 10}, "ours": {"trainer.passes": 2}}
    planned = plan(study(tmp_path, seeds=[0], stages=stages(pretrain={"grid": {"protocol": rates}})), tmp_path)
    assert count(planned)["pretrain"] == 6
    for job in planned:
        if job.stage == "pretrain":
            assert job.config.trainer.passes == {"paper": 10, "ours": 2}[job.labels["protocol"]]
    assert planned[-1].labels["protocol"] == "ours"
    with pytest.raises(ConfigError, match="the study sets"):
        plan(study(tmp_path, stages=stages(pretrain={"grid": {"protocol": rates}})), tmp_path, ["trainer.passes=1"])


def test_excluded_places_have_no_run_and_feed_none(tmp_path: Path) -> None:
    depths = {"model.fusion.depth": [1, 2]}
    excluded = [{"point": ["none", "labels"], "model.fusion.depth": 2}]
    planned = plan(study(tmp_path, stages=stages(pretrain={"grid": depths, "exclude": excluded})), tmp_path)
    places = {(job.labels["point"], job.labels["model.fusion.depth"]) for job in planned if job.stage == "pretrain"}
    assert places == {("none", "1"), ("5%", "1"), ("5%", "2"), ("labels", "1")}
    assert count(planned) == {"vision": 1, "pretrain": 2 * 4, "finetune": 2 * 4 * 2, "blind": 2 * 2}


def test_a_place_may_be_excluded_for_one_seed_and_upstream_label(tmp_path: Path) -> None:
    excluded = [{"point": "5%", "task": "nlvr2", "seed": 1}]
    planned = plan(study(tmp_path, stages=stages(finetune={"exclude": excluded})), tmp_path)
    assert count(planned)["finetune"] == 11


def test_runs_that_start_from_two_stages_join_where_their_labels_agree(tmp_path: Path) -> None:
    pair = {"config": "pretrain", "points": {"a": {"optimizer.learning_rate": 0.1}, "b": {"supervision.fraction": 1}}}
    both = {"config": "pretrain", "upstream": {"model.vision.weights": "one", "model.language.weights": "two"}}
    planned = plan(study(tmp_path, stages={"one": pair, "two": pair, "both": both}, seeds=[0]), tmp_path)
    assert [job.labels["point"] for job in planned if job.stage == "both"] == ["a", "b"]


def broken(**changes: dict[str, Any]) -> dict[str, Any]:
    return {"stages": stages(**changes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (broken(finetune={"girds": {}}), "stages.finetune.girds: unknown key. Did you mean stages.finetune.grid?"),
        ({"sedes": [1]}, "sedes: unknown key. Did you mean seeds?"),
        (broken(finetune={"upstream": {"start_from": "pretrian"}}), "unknown earlier stage 'pretrian'. Did you mean"),
        (
            broken(finetune={"upstream": {"start_form": "pretrain"}}),
            "start_form: unknown key. Did you mean start_from?",
        ),
        (broken(vision={"upstream": {"start_from": "pretraim"}}), "No stage stands before this one"),
        (broken(blind={"only": {"point": ["nine"]}}), "no upstream run has 'nine'. Did you mean 'none'?"),
        (broken(blind={"only": {"pont": ["none"]}}), "stages.blind.only.pont: unknown label. Did you mean 'point'?"),
        (broken(finetune={"grid": {"task": ["gqaa"]}}), "task: unknown option 'gqaa'. Did you mean 'gqa'?"),
        (broken(pretrain={"points": {"5%": {"supervision.fraction": 5}}}), "(point 5%, seed 0): supervision.fraction"),
        (broken(pretrain={"config": "pretrian"}), "unknown config 'pretrian'. Did you mean 'pretrain'?"),
        (broken(blind={"only": {"seed": [0]}}), "stages.blind.only.seed: unknown label. Available: point"),
        (broken(finetune={"grid": {"task": []}}), "grid.task: no values"),
        (broken(finetune={"exclude": [{}]}), "exclude.0: names no label"),
        (broken(finetune={"exclude": [{"pont": "5%"}]}), "exclude.0.pont: unknown label. Did you mean 'point'?"),
        (broken(finetune={"exclude": [{"task": "gqa"}]}), "exclude.0.task: no run has 'gqa'. Available: vqav2, nlvr2"),
        (broken(finetune={"exclude": [{"task": TASKS}]}), "all places are excluded"),
        (
            broken(vision={"upstream": {"start_from": "finetune"}}),
            "stage 'finetune' does not stand before 'vision'",
        ),
        ({"seeds": []}, "seeds: needs at least 1 entries"),
        ({"seeds": [0, 1, 0]}, "seeds: 0 stands there twice"),
        (broken(vision={"seeds": [3, 3]}), "stages.vision: seeds: 3 stands there twice"),
        (broken(finetune={"grid": {"task": ["gqa", "gqa"]}}), "stages.finetune: grid.task: gqa stands there twice"),
        (broken(finetune={"grid": {"task": "gqa"}}), "stages.finetune.grid: task: expected a list of values"),
        (broken(finetune={"grid": {"rate": {"slow": 1}}}), "stages.finetune.grid: rate.slow: expected overrides"),
        (
            {"figure": {"panels": [{"task": "nvlr2"}]}},
            "figure.panels.0.task: no run has 'nvlr2'. Did you mean 'nlvr2'?",
        ),
    ],
)
def test_a_wrong_study_is_refused_before_anything_starts(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        plan(study(tmp_path, **changes), tmp_path / "runs")
    assert message in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("override", ["seed=3", "supervision.fraction=0.5", "finetune:task=gqa", "start_from=x"])
def test_overrides_of_what_the_study_varies_are_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the study sets"):
        plan(study(tmp_path), tmp_path, [override])


def test_an_override_for_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown stage\. Did you mean 'pretrain'"):
        plan(study(tmp_path), tmp_path, ["pretrian:trainer.passes=1"])
