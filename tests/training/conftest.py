"""A world of a few scenes, and runs of a few steps, shared by the tests of a process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.config import compose
from vlm.run import RunConfig

SMALL_WORLD = [
    "data.world.num_pairs=64",
    "data.world.num_validation_pairs=16",
    "data.world.num_unimodal_images=32",
    "data.world.num_texts=200",
    "data.world.num_vqav2_train=64",
    "data.world.num_gqa_train=64",
    "data.world.num_nlvr2_train=32",
    "data.world.num_evaluation=32",
]
SMALL_MODEL = [
    "model.vision.width=32",
    "model.vision.depth=1",
    "model.language.width=32",
    "model.language.depth=1",
    "model.fusion.width=32",
    "model.fusion.depth=1",
    "model.fusion.dropout=0.1",
]
QUICK = ["trainer.accelerator=cpu", "trainer.progress=false", "trainer.batch_size=16"]


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One prepared world for all tests of this process."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VLM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """`make_config("pretrain", "seed=1", folder="first")`: a small run under the test's own folder."""

    def make(name: str, *overrides: str, folder: str = "run") -> RunConfig:
        config = compose(name, [*SMALL_WORLD, *SMALL_MODEL, *QUICK, *overrides], RunConfig)
        return config.model_copy(update={"folder": tmp_path / folder})

    return make
