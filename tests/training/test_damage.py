"""A run that skips damaged examples names each of them once, counts them, and ends the same however it was cut up."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_loaders import FolderData
from data_loaders.damage import OnDamage
from data_loaders.shards import ShardReader, open_index
from vlm.errors import UserError
from vlm.run import RunConfig, train


@pytest.fixture
def damaged_root(make_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """The small world with a truncated training shard, whose last few examples are lost."""
    root = tmp_path / "root"
    shutil.copytree(make_config("pretrain").data.prepare(progress=False), root)
    index = open_index(root / "pairs" / "train")
    os.truncate(root / "pairs" / "train" / "00000.tar", int(index.image_offset[-3]))
    return root


@pytest.fixture
def make(make_config: Callable[..., RunConfig], damaged_root: Path) -> Callable[..., RunConfig]:
    """A small pretraining over the damaged data, two passes long."""

    def made(damaged: OnDamage, *overrides: str, folder: str = "run") -> RunConfig:
        config = make_config("pretrain", "trainer.samples=128", *overrides, folder=folder)
        return config.model_copy(update={"data": FolderData(root=damaged_root, damaged=damaged)})

    return made


def test_a_damaged_example_stops_a_run_unless_it_is_told_to_skip(
    make: Callable[..., RunConfig],
) -> None:
    with pytest.raises(UserError, match=r"00000\.tar: example \d+.*truncated.*or give data\.damaged=skip"):
        train(make("stop"))


def test_skipped_examples_are_listed_once_and_counted(
    make: Callable[..., RunConfig], damaged_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make("skip", "trainer.log_every_steps=1")
    run = train(config)
    listed = [json.loads(line) for line in (run / "damaged.jsonl").read_text().splitlines()]
    lost = len(ShardReader(open_index(damaged_root / "pairs" / "train"))) - 3
    assert sorted(entry["position"] for entry in listed) == [lost, lost + 1, lost + 2]
    assert {entry["shard"] for entry in listed} == {str(damaged_root / "pairs" / "train" / "00000.tar")}
    assert all("truncated" in entry["reason"] for entry in listed)
    events = EventAccumulator(str(run))
    events.Reload()
    counts = [int(event.value) for event in events.Scalars("train/damaged")]
    assert counts == sorted(counts) and counts[-1] >= 6  # two passes
    assert f"3 examples are damaged. Others stood in for them {counts[-1]} times" in capsys.readouterr().err


def test_a_run_that_skips_ends_the_same_after_a_restart(
    make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("skip", "trainer.checkpoint_every_steps=3")
    whole = train(make(*options, folder="whole"))

    class Killed(Exception):
        pass

    from vlm.training.pretraining import Pretraining

    step = Pretraining.training_step

    def killed(self: Pretraining, batch: object, batch_idx: int) -> torch.Tensor:
        if batch_idx == 5:
            raise Killed
        return step(self, batch, batch_idx)  # type: ignore[arg-type]  # handed on as it comes

    config = make(*options, folder="cut")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Pretraining, "training_step", killed)
        train(config)
    cut = train(config)
    for name in ("last.ckpt",):
        one, other = (torch.load(run / name, weights_only=True) for run in (whole, cut))
        assert all(torch.equal(one["state_dict"][key], other["state_dict"][key]) for key in one["state_dict"])
        counts = [run["callbacks"]["DamagedExamples"]["num_replaced"] for run in (one, other)]
        assert counts[0] == counts[1] >= 6
    lists = [sorted((run / "damaged.jsonl").read_text().splitlines()) for run in (whole, cut)]
    assert lists[0] == lists[1] and len(lists[0]) == 3
