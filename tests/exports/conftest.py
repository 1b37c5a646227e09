"""One small pretrained run and one fine-tuned one, with their exports, for all tests of a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm.config import compose
from vlm.exporting import export
from vlm.run import RunConfig, train

SMALL = [
    "data.world.num_pairs=64",
    "data.world.num_validation_pairs=16",
    "data.world.num_unimodal_images=32",
    "data.world.num_texts=200",
    "data.world.num_vqav2_train=64",
    "data.world.num_gqa_train=64",
    "data.world.num_nlvr2_train=32",
    "data.world.num_evaluation=32",
    "model.vision.width=16",
    "model.vision.depth=1",
    "model.language.width=16",
    "model.language.depth=1",
    "model.language.vocabulary_size=64",
    "model.fusion.width=16",
    "model.fusion.depth=1",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "trainer.batch_size=16",
]


def small_run(name: str, folder: Path, *overrides: str) -> Path:
    """A run of a few steps."""
    config = compose(name, [*SMALL, "trainer.samples=32", *overrides], RunConfig)
    return train(config.model_copy(update={"folder": folder}))


@pytest.fixture(scope="session")
def pretrained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run("pretrain", tmp_path_factory.mktemp("pretrained") / "run")


@pytest.fixture(scope="session")
def finetuned_run(pretrained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetuned") / "run"
    return small_run("finetune", folder, "task=vqav2", f"start_from={pretrained_run}")


@pytest.fixture(scope="session")
def pretrained_export(pretrained_run: Path) -> Path:
    return export(pretrained_run, pretrained_run.parent / "exported")


@pytest.fixture(scope="session")
def finetuned_export(finetuned_run: Path) -> Path:
    return export(finetuned_run, finetuned_run.parent / "exported")
