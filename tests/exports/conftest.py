"""One small pretrained run and one fine-tuned one, with their exports, for all tests of a process."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import small_run

from vlm.exporting import export


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
