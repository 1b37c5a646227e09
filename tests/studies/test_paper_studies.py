"""The studies at full size: the published numbers stand where they should, and every cell runs on small data."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest

from vlm.config import compose, load_yaml
from vlm.models.fusion import FusionConfig
from vlm.objectives import MaskedLanguageConfig, MatchingConfig
from vlm.parameter_counts import as_large_as, fusion_parameters
from vlm.run import RESULT, RunConfig, count_parameters, train
from vlm.studies.outlook import one_seed
from vlm.studies.plan import Job, StudyConfig, distinct, plan
from vlm.studies.run import STUDY, experiments_folder

PAPER = "less_bimodal_supervision"
FULL_SIZE = [
    PAPER,
    "fusion_type",
    "frozen_encoders",
    "encoders_from_scratch",
    "clip_towers",
    "label_threshold",
    "fixed_passes_and_fixed_compute",
]
MILLION = 1e6


@cache
def study(name: str) -> StudyConfig:
    return load_yaml(experiments_folder() / name / STUDY, StudyConfig)


@cache
def jobs(name: str) -> tuple[Job, ...]:
    return tuple(distinct(plan(study(name), Path("runs") / name)))


def in_small(name: str, folder: Path) -> list[Job]:
    """One seed of the study with what its dry run changes, which may be what the study itself varies."""
    one = one_seed(study(name))
    return distinct(plan(one, folder, forced=one.dry_run.overrides))


def of(stage: str, **labels: str) -> list[Job]:
    return [
        job
        for job in jobs(PAPER)
        if job.stage == stage and all(job.labels[label] == value for label, value in labels.items())
    ]


PICTURES = ("released", "bilinear", "crop")


def test_the_configs_that_follow_the_released_code_are_those_of_the_study() -> None:
    study = of("pretrain", protocol="paper", point="5%")[0].config
    pretrain = compose("paper_pretrain", ["data=conceptual_captions", "supervision.fraction=0.05"], RunConfig)
    for part in ("model", "objectives", "supervision", "optimizer"):
        assert getattr(pretrain, part) == getattr(study, part)
    one = pretrain.data
    assert (one.augmentation, one.interpolation, one.fit) == PICTURES
    mine, theirs = pretrain.trainer, study.trainer
    for name in ("batch_size", "passes", "loss_weighting", "select"):
        assert getattr(mine, name) == getattr(theirs, name)
    finetune = compose("paper_finetune", ["data=tasks", "task=vqav2"], RunConfig)
    study = next(job for job in of("finetune_paper") if job.labels["task"] == "vqav2").config
    for part in ("model", "optimizer"):
        assert getattr(finetune, part) == getattr(study, part)
    assert (finetune.data.augmentation, finetune.data.interpolation, finetune.data.fit) == PICTURES


def test_the_paper_protocol_pretrains_with_the_published_numbers() -> None:
    found = of("pretrain", protocol="paper")
    fractions = {job.labels["point"]: job.config.supervision.fraction for job in found}
    assert fractions == {
        **{"none": 0, "1%": 0.01, "5%": 0.05, "10%": 0.1, "25%": 0.25, "50%": 0.5, "100%": 1},
        **{"labels": 1, "class names": 1},
    }
    for job in found:
        config = job.config
        assert (config.trainer.batch_size, config.trainer.passes, config.trainer.samples) == (3840, 10, None)
        assert config.trainer.micro_batch_size == 48
        optimizer = config.optimizer
        assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.9, 0.98), 0.01)
        assert (optimizer.warmup_fraction, optimizer.decay, optimizer.clip_norm) == (0.1, "linear", None)
        multipliers = optimizer.multipliers
        assert (multipliers.encoders, multipliers.fusion, multipliers.heads) == (1, 5, 5)
        assert (config.data.augmentation, config.data.interpolation, config.data.fit) == PICTURES
        masked, matching = config.objectives["masked_language"], config.objectives["matching"]
        assert isinstance(masked, MaskedLanguageConfig) and isinstance(matching, MatchingConfig)
        assert (masked.mask_fraction, masked.masking, masked.label_masking) == (0.15, "whole_label", "released")
        assert (matching.negatives, matching.negative_fraction, matching.text) == ("random", 0.5, "masked")
        assert_published_model(config)


def assert_published_model(config: RunConfig) -> None:
    model: Any = config.model
    assert (model.vision.name, model.language.name) == ("vit_base_patch16_224.orig_in21k", "roberta-base")
    fusion = model.fusion
    assert (fusion.type, fusion.depth, fusion.pre_norm, fusion.dropout) == ("coattention", 2, False, 0.1)
    assert model.pooler == "none" and model.language.max_tokens == 50
    assert not model.vision.frozen and not model.language.frozen


def test_the_paper_protocol_fine_tunes_with_the_published_numbers() -> None:
    published = {"vqav2": (2e-5, 96, True), "gqa": (1e-5, 96, False), "nlvr2": (1e-5, 48, False)}
    found = of("finetune_paper")
    assert {job.labels["task"] for job in found} == set(published)
    for job in found:
        config, task = job.config, job.config.task
        rate, batch, multi_label = published[job.labels["task"]]
        assert (config.optimizer.learning_rate, config.trainer.batch_size) == (rate, batch)
        assert (config.trainer.passes, config.trainer.samples, config.trainer.select) == (10, None, "best")
        multipliers = config.optimizer.multipliers
        assert (multipliers.encoders, multipliers.fusion, multipliers.heads) == (1, 10, 10)
        assert config.optimizer.betas == (0.9, 0.98) and config.optimizer.weight_decay == 0.01
        assert (config.data.augmentation, config.data.interpolation, config.data.fit) == PICTURES
        assert getattr(task, "multi_label") is multi_label  # noqa: B009  # binary cross-entropy, or plain
        assert getattr(task, "images_in_turn") is (job.labels["task"] == "nlvr2")  # noqa: B009
        assert job.upstream["start_from"].labels["protocol"] == "paper"
        assert_published_model(config)


def test_our_protocol_is_sound_where_the_paper_is_not_and_sees_as_much_at_every_point() -> None:
    for job in of("pretrain", protocol="ours"):
        masked, matching = job.config.objectives["masked_language"], job.config.objectives["matching"]
        assert isinstance(masked, MaskedLanguageConfig) and isinstance(matching, MatchingConfig)
        assert (masked.masking, masked.label_masking) == ("whole_label", "sound")
        assert (matching.negatives, matching.text) == ("in_batch", "whole")
        assert job.config.trainer.samples == 10 * 2_840_000
    assert all(not getattr(job.config.task, "images_in_turn") for job in of("finetune_ours"))  # noqa: B009


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_runs_fine_tune_the_model_that_they_pretrained(name: str) -> None:
    for job in jobs(name):
        if "start_from" in job.upstream:
            assert without_origin(job.config) == without_origin(job.upstream["start_from"].config), job.title


def without_origin(config: RunConfig) -> dict[str, Any]:
    """The model but for where its encoders' weights came from, which a run that continues another does not ask."""
    model = config.model.model_dump()
    for encoder in ("vision", "language"):
        model[encoder].pop("pretrained")
    return model


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_dry_run_changes_the_data_and_the_budget_and_no_size(name: str, tmp_path: Path) -> None:
    small = in_small(name, tmp_path)
    places = {(job.stage, *(f"{k}={v}" for k, v in job.labels.items() if k != "seed")) for job in small}
    for job in small:
        assert job.config.data.type == "world"
        assert job.config.trainer.samples == 4 and job.config.trainer.world_size == 1
        assert not getattr(job.config.model.vision, "pretrained", True)
        assert getattr(job.config.model.language, "tokenizer") == "words"  # noqa: B009
    full = {(job.stage, *(f"{k}={v}" for k, v in job.labels.items() if k != "seed")): job for job in jobs(name)}
    assert places <= set(full)
    for job in small[:1] if name == PAPER else ():  # the same model in all, which takes seconds to build
        there = full[job.stage, *(f"{k}={v}" for k, v in job.labels.items() if k != "seed")].config
        assert count_parameters(job.config) == count_parameters(there)
        assert count_parameters(job.config)["total"] > 200 * MILLION


def test_fusions_are_compared_at_matched_parameter_counts() -> None:
    kinds = {job.labels["fusion"]: job.config.model.fusion for job in jobs("fusion_type")}
    reference = kinds["coattention"]
    own = fusion_parameters(reference)
    for name, fusion in kinds.items():
        if name != "merged":  # which has as many layers instead
            assert fusion_parameters(fusion) == pytest.approx(own, rel=0.07), name
            assert as_large_as(fusion, reference) == fusion, name
    assert {fusion.type for fusion in kinds.values()} == {
        member.model_fields["type"].default for member in get_args(get_args(FusionConfig)[0])
    } - {"none", "custom"}


@pytest.mark.slow
def test_a_full_size_cell_of_the_paper_runs_on_small_data(tmp_path: Path) -> None:
    """ViT-B/16 and RoBERTa-base with the paper's pretraining and NLVR2, some steps each; 4 GB of memory, 7 of disk."""
    chosen = [
        job
        for job in in_small(PAPER, tmp_path)
        if job.title in ("pretrain labels protocol=paper seed=0", "finetune_paper labels nlvr2 protocol=paper seed=0")
    ]
    assert [job.stage for job in chosen] == ["pretrain", "finetune_paper"]
    for job in chosen:
        train(job.config)
        assert (job.folder / RESULT).is_file()
