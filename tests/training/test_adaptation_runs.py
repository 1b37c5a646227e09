"""Runs whose encoders learn in part: they resume, hand on what they learnt, and load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vlm
from vlm.run import LAST, RESULT, RunConfig, count_parameters, read_checkpoint, train
from vlm.training.module import TrainingModule
from vlm.types import View

MakeConfig = Callable[..., RunConfig]
ADAPTED = (
    "model.vision.depth=2",
    "model.vision.frozen_blocks=1",
    "model.vision.checkpointing=true",
    "model.vision.lora={rank: 2}",
    "model.language.lora.rank=4",
    "model.language.lora.alpha=4",
    "optimizer.layer_decay=0.5",
    "trainer.select=last",
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    states: dict[str, torch.Tensor] = read_checkpoint(folder, LAST)["state_dict"]
    return states


def test_a_run_with_adapters_that_is_resumed_ends_with_the_same_weights(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*ADAPTED, "trainer.checkpoint_every_steps=3", "trainer.samples=96")
    whole, stopped = (make_config("pretrain", *options, folder=name) for name in ("whole", "stopped"))
    begin = TrainingModule.on_train_batch_start

    def stop_at_the_fifth(module: Any, batch: Any, number: int) -> None:
        if number == 4:
            raise RuntimeError("stopped")
        begin(module, batch, number)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(TrainingModule, "on_train_batch_start", stop_at_the_fifth)
        train(stopped)
    assert read_checkpoint(stopped.run_folder, LAST)["global_step"] == 3
    first, second = weights(train(whole)), weights(train(stopped))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rates_in_tensorboard_are_named_by_depth(make_config: MakeConfig) -> None:
    folder = train(make_config("pretrain", *ADAPTED, "trainer.samples=32", "trainer.log_every_steps=1"))
    events = EventAccumulator(str(folder))
    events.Reload()
    rates = sorted(tag.removeprefix("learning_rate/") for tag in events.Tags()["scalars"] if "learning_rate/" in tag)
    assert rates == ["fusion", "heads", "language/01_block", "vision/02_block"]


def test_adapters_go_from_a_pretraining_to_a_finetuning_and_a_loaded_model(make_config: MakeConfig) -> None:
    pretrained = train(make_config("pretrain", *ADAPTED, "trainer.samples=64", folder="pretrained"))
    options = (f"start_from={pretrained}", "task=nlvr2", "trainer.samples=32", "trainer.select=last")
    going_on = make_config("finetune", *ADAPTED, *options, folder="going-on")
    plain = make_config("finetune", "model.vision.depth=2", *options, folder="plain")
    for config in (going_on, plain):
        assert json.loads((train(config) / RESULT).read_text())["steps"] == 2
        loaded = vlm.load(config.run_folder).model
        assert count_parameters(config)["total"] == sum(parameter.numel() for parameter in loaded.parameters())
    assert any(".lora_A." in name for name in weights(going_on.run_folder))
    assert not any("lora" in name or "base_layer" in name for name in weights(plain.run_folder))


def test_a_run_without_adapters_begins_where_the_adapted_one_ended(make_config: MakeConfig) -> None:
    pretrained = train(make_config("pretrain", *ADAPTED, "trainer.samples=64", folder="pretrained"))
    none = ("supervision.fraction=0", "model.vision.depth=2", f"start_from={pretrained}")
    merged = train(make_config("pretrain", *none, folder="merged"))
    image = torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8)
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])
    pooled = []
    for folder in (pretrained, merged):
        with torch.no_grad():
            pooled.append(vlm.load(folder).model.encode(image, [View("pair", ids, ids > 0)])[0].pooled)
    torch.testing.assert_close(pooled[0], pooled[1], atol=1e-5, rtol=1e-5)
