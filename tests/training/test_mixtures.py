"""Mixtures of sources in whole runs: what is logged, what an absent text costs, what a run is resumed on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_loaders.shards import ShardReader, open_index, write_shards
from vlm.cli import main
from vlm.errors import UserError
from vlm.run import LAST, RESULT, RunConfig, read_checkpoint, train
from vlm.types import Record

MakeConfig = Callable[..., RunConfig]
MIXTURE = "supervision.sources=[{type: captions}, {type: machine_labels}, {type: none}]"
EVERY_STEP = ("trainer.samples=64", "trainer.log_every_steps=1")


def scalars(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_mixture_logs_each_source_apart(make_config: MakeConfig) -> None:
    found = scalars(train(make_config("pretrain", MIXTURE, *EVERY_STEP)))
    shares = {name.removeprefix("train/share/"): values for name, values in found.items() if "/share/" in name}
    assert all(sum(step) == pytest.approx(1) for step in zip(*shares.values(), strict=True))
    assert min(sum(shares[source]) for source in ("human", "machine", "none")) > 0
    assert sum(shares["generated"]) == 0
    for objective in ("masked_language", "matching"):
        for figure in ("loss", "accuracy"):
            assert len(found[f"train/{objective}/{figure}/machine"]) == 4
            assert f"train/{objective}/{figure}/none" not in found
    human, machine, every = (found[f"train/matching/loss{name}"] for name in ("/human", "/machine", ""))
    for step, (one, other, loss) in enumerate(zip(human, machine, every, strict=True)):
        weights = shares["human"][step], shares["machine"][step]
        assert loss == pytest.approx((one * weights[0] + other * weights[1]) / sum(weights), rel=1e-4)


def test_labels_of_a_model_train_a_run_whose_ledger_knows_the_model(make_config: MakeConfig, tmp_path: Path) -> None:
    """From `vlm label` with an untrained classifier to a pretraining on its labels."""
    root = make_config("pretrain").data.prepare(progress=False)
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    for split in ("train", "validation"):
        shards, to = root / "pairs" / split, tmp_path / "labels" / split
        settings = [f"labeller.weights={weights}", "min_score=0", "max_labels=3"]
        assert main(["label", str(shards), "--with", "timm:test_resnet.r160_in1k", "--to", str(to), *settings]) == 0
    labels = f"supervision.sources=[{{type: machine_labels, labels_from: '{tmp_path / 'labels'}'}}]"
    folder = train(make_config("pretrain", labels, "trainer.samples=64"))
    ledger = json.loads((folder / "ledger.json").read_text())
    assert ledger["distinct"]["fusion"]["pairs"] == 0
    assert ledger["distinct"]["fusion"]["labelled_images"] == 64
    assert ledger["distinct"]["labeller"]["pairs"] is None  # anyone's weights: its architecture's name tells nothing


def test_one_source_logs_what_it_always_did(make_config: MakeConfig) -> None:
    found = scalars(train(make_config("pretrain", *EVERY_STEP)))
    assert not any("/loss/" in name or "/accuracy/" in name for name in found)
    assert found["train/share/human"] == [1] * 4


def test_validation_does_not_depend_on_how_images_without_a_text_are_batched(make_config: MakeConfig) -> None:
    """Matching draws its negatives inside a batch; what has no text weighs nothing in any."""
    options = ("supervision.sources=[{type: captions}, {type: none, weight: 9}]", "trainer.samples=16")
    config = make_config("pretrain", *options, "trainer.evaluation_batch_size=1")
    found = scalars(train(config))["validation/masked_language/loss"][-1]
    assert 2 < found < 10  # of an untrained model, over the texts alone; over all images it would be a tenth
    alone = make_config("pretrain", "supervision.sources=[{type: none}]", "trainer.samples=16", folder="none")
    assert "validation/loss" not in json.loads((train(alone) / RESULT).read_text())["metrics"]


def test_images_without_texts_teach_nothing(make_config: MakeConfig) -> None:
    still = ("optimizer.weight_decay=0", "objectives=aligned", "trainer.select=last")
    before = train(make_config("pretrain", *still, "supervision.fraction=0", *EVERY_STEP, folder="before"))
    sources = "supervision.sources=[{type: none}]"
    after = train(make_config("pretrain", *still, sources, *EVERY_STEP, folder="after"))
    assert all(value == 0 for value in scalars(after)["train/loss"])
    assert json.loads((after / RESULT).read_text())["steps"] == 4
    first, last = (read_checkpoint(folder, LAST)["state_dict"] for folder in (before, after))
    for name, value in first.items():
        assert torch.equal(value, last[name]), name


def test_whole_labels_are_masked_in_a_run(make_config: MakeConfig) -> None:
    options = ("supervision=machine_labels", *EVERY_STEP)
    losses = []
    for number, masking in enumerate(("token", "whole_label")):
        override = f"objectives.masked_language.masking={masking}"
        losses.append(scalars(train(make_config("pretrain", *options, override, folder=str(number))))["train/loss"])
    assert losses[0] != losses[1]
    assert all(map(math.isfinite, losses[1]))


def test_labels_beside_the_data_train_a_run_and_belong_to_its_inputs(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("pretrain")
    root = config.data.prepare(progress=False)

    def label(word: str) -> None:
        for split in ("train", "validation"):
            reader = ShardReader(open_index(root / "pairs" / split))
            records = [Record(record.key, labels=(word,), scores=(0.5,)) for record in reader]
            write_shards(records, tmp_path / "labels" / split)

    label("circle")
    sources = f"supervision.sources=[{{type: machine_labels, labels_from: '{tmp_path / 'labels'}'}}]"
    config = make_config("pretrain", sources, "trainer.samples=16")
    folder = train(config)
    assert str(tmp_path / "labels") in json.loads((folder / "inputs.json").read_text())
    (folder / RESULT).unlink()
    label("square")
    with pytest.raises(UserError, match=r"began on other data \(.*labels\)"):
        train(config)


def test_generated_captions_of_the_best_by_score_train_a_run(make_config: MakeConfig, tmp_path: Path) -> None:
    root = make_config("pretrain").data.prepare(progress=False)
    lines = []
    for split in ("train", "validation"):
        for number, record in enumerate(ShardReader(open_index(root / "pairs" / split))):
            lines.append(json.dumps({"key": record.key, "caption": record.captions[0], "score": number}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    file = tmp_path / "captions.jsonl"
    options = (
        f"supervision.sources=[{{type: generated_captions, file: '{file}'}}]",
        f"supervision.selection={{type: best_by_score, file: '{file}'}}",
        "supervision.fraction=0.5",
        "trainer.samples=32",
    )
    result = json.loads((train(make_config("pretrain", *options)) / RESULT).read_text())
    assert result["examples"] == 32
