"""Runs give the same numbers again: same seed, killed and resumed, two ranks or one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vlm
from data_loaders import FolderData
from vlm.config import compose, dump_yaml, fingerprint
from vlm.errors import UserError
from vlm.run import BEST, CONFIG, LAST, RESULT, RunConfig, read_checkpoint, train
from vlm.scoring.nlvr2 import read_labels
from vlm.scoring.score import score_nlvr2

MakeConfig = Callable[..., RunConfig]


def logged(folder: Path, name: str) -> list[float]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [event.value for event in events.Scalars(name)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    states: dict[str, torch.Tensor] = read_checkpoint(folder, LAST)["state_dict"]
    return states


def assert_same_weights(first: Path, second: Path, tolerance: float = 0.0) -> None:
    left, right = weights(first), weights(second)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance, msg=name)


def test_same_seed_twice_gives_identical_losses(make_config: MakeConfig) -> None:
    options = ("trainer.samples=160", "trainer.log_every_steps=1", "data.augmentation=randaugment")
    folders = [train(make_config("pretrain", *options, folder=name)) for name in ("first", "second")]
    losses = [logged(folder, "train/loss") for folder in folders]
    assert len(losses[0]) == 10
    assert losses[0] == losses[1]


def test_another_seed_gives_other_losses(make_config: MakeConfig) -> None:
    options = ("trainer.samples=32", "trainer.log_every_steps=1")
    folders = [train(make_config("pretrain", *options, f"seed={seed}", folder=f"seed-{seed}")) for seed in (0, 1)]
    assert logged(folders[0], "train/loss") != logged(folders[1], "train/loss")


def start_in_subprocess(config: RunConfig) -> subprocess.Popen[bytes]:
    folder = config.run_folder
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(dump_yaml(config))
    command = [sys.executable, "-m", "vlm.cli", "train", str(folder)]
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def killed_after_its_first_checkpoint(config: RunConfig) -> None:
    process = start_in_subprocess(config)
    last = config.run_folder / LAST
    deadline = time.monotonic() + 120
    while not last.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.is_file(), (config.run_folder / "log.txt").read_text()
    assert 0 < read_checkpoint(config.run_folder, LAST)["global_step"] < 60


TAUGHT = ("objectives=albef", "objectives.matching.weight={initial: 0, final: 1}", "distillation={momentum: 0.9}")


@pytest.mark.parametrize(
    ("name", "more"), [("pretrain", ()), ("pretrain", TAUGHT), ("finetune", ())], ids=["pretrain", "taught", "finetune"]
)
def test_a_run_killed_in_the_middle_of_a_pass_ends_with_the_same_weights(
    make_config: MakeConfig, name: str, more: tuple[str, ...]
) -> None:
    """Pass length: 4 steps of 16; the checkpoint that the run resumes from lies inside one."""
    options = ("trainer.samples=960", "trainer.checkpoint_every_steps=7", "trainer.select=last", *more)
    whole = train(make_config(name, *options, folder="whole"))
    config = make_config(name, *options, folder="killed")
    killed_after_its_first_checkpoint(config)
    train(config)
    assert_same_weights(whole, config.run_folder)


def test_a_run_killed_at_a_validation_hands_on_the_same_best_weights(make_config: MakeConfig) -> None:
    """Every checkpoint falls on a validation; the one that is resumed from must know how it went."""
    options = ("trainer.samples=192", "trainer.checkpoint_every_steps=3", "trainer.validate_every_steps=3")
    rate = "optimizer.learning_rate=3e-3"  # so high that the best step is seldom the last
    whole = train(make_config("finetune", *options, rate, folder="whole"))
    config = make_config("finetune", *options, rate, folder="killed")
    killed_after_its_first_checkpoint(config)
    train(config)
    results = [json.loads((folder / RESULT).read_text()) for folder in (whole, config.run_folder)]
    assert results[0]["scores"] == results[1]["scores"]
    best = [read_checkpoint(folder, BEST) for folder in (whole, config.run_folder)]
    assert best[0]["global_step"] == best[1]["global_step"]
    for name, value in best[0]["state_dict"].items():
        assert torch.equal(value, best[1]["state_dict"][name]), name


def test_a_finished_run_is_left_alone(make_config: MakeConfig) -> None:
    config = make_config("pretrain", "trainer.samples=16")
    folder = train(config)
    before = (folder / LAST).stat().st_mtime_ns
    assert train(config) == folder
    assert (folder / LAST).stat().st_mtime_ns == before


def test_two_ranks_equal_one_with_twice_the_accumulation(make_config: MakeConfig) -> None:
    options = ("trainer.samples=96", "trainer.select=last")
    alone = train(make_config("pretrain", *options, "trainer.accumulate=2", folder="alone"))
    two = make_config("pretrain", *options, "trainer.devices=2", "trainer.strategy=ddp", folder="two")
    process = start_in_subprocess(two)
    assert process.wait(timeout=240) == 0, (two.run_folder / "log.txt").read_text()
    assert_same_weights(alone, two.run_folder, tolerance=1e-5)


def test_two_ranks_answer_each_question_once_and_score_them_together(make_config: MakeConfig) -> None:
    """Statements of one group are spread over the ranks. The scores are those of the file that is left."""
    options = ("task=nlvr2", "trainer.samples=32", "trainer.devices=2", "trainer.strategy=ddp")
    config = make_config("finetune", *options)
    process = start_in_subprocess(config)
    assert process.wait(timeout=240) == 0, (config.run_folder / "log.txt").read_text()
    root = config.data.prepare(progress=False)
    predictions = config.run_folder / "predictions-nlvr2-test.csv"
    labels = read_labels(root / "nlvr2" / "test1.json")
    answered = [line.split(",")[0] for line in predictions.read_text().splitlines()]
    assert sorted(answered) == sorted(labels) and len(answered) == len(set(answered))
    (scored,) = score_nlvr2([predictions], root / "nlvr2" / "test1.json").files
    result = json.loads((config.run_folder / RESULT).read_text())["scores"]
    assert result["accuracy"] == pytest.approx(100 * scored.tally.value(("accuracy",)))
    assert result["consistency"] == pytest.approx(100 * scored.tally.value(("consistency",)))


def test_ranks_meet_where_a_part_of_the_model_is_not_used(make_config: MakeConfig) -> None:
    config = make_config("unimodal_vision", "trainer.samples=32", "trainer.devices=2", "trainer.strategy=ddp")
    process = start_in_subprocess(config)
    assert process.wait(timeout=240) == 0, (config.run_folder / "log.txt").read_text()


def test_gradients_are_clipped_under_mixed_precision_too(make_config: MakeConfig) -> None:
    options = ("trainer.samples=32", "trainer.precision=bf16-mixed", "optimizer.clip_norm=1")
    assert (train(make_config("pretrain", *options)) / RESULT).is_file()


def test_a_run_is_not_resumed_on_other_data(make_config: MakeConfig, tmp_path: Path) -> None:
    root = tmp_path / "root"
    config = make_config("pretrain", "trainer.samples=16")
    shutil.copytree(config.data.prepare(progress=False), root)
    config = config.model_copy(update={"data": FolderData(root=root)})
    (train(config) / RESULT).unlink()
    shutil.rmtree(root / "pairs" / "train")
    shutil.copytree(root / "pairs" / "validation", root / "pairs" / "train")
    with pytest.raises(UserError, match=r"began on other data \(pairs/train\)"):
        train(config)


def test_a_root_without_unpaired_texts_is_one_line_that_says_what_they_are_for(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    shutil.copytree(make_config("pretrain").data.prepare(progress=False), tmp_path / "root")
    shutil.rmtree(tmp_path / "root" / "texts")
    data = ("data=folder", f"data.root={tmp_path / 'root'}", "trainer.accelerator=cpu", "trainer.progress=false")
    for name, message in (
        ("pretrain", r"texts/train\.txt: no such file\. The tiny language encoder takes its words from .*model=base"),
        ("unimodal_language", r"texts/train\.txt: no such file\. data\.part=texts learns from texts/train\.txt and"),
    ):
        config = compose(name, data, RunConfig).model_copy(update={"folder": tmp_path / name})
        with pytest.raises(UserError, match=message):
            train(config)
    (tmp_path / "root" / "texts").mkdir()
    (tmp_path / "root" / "texts" / "train.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"texts/train\.txt: cannot be read as UTF-8"):
        train(config)


def test_a_task_from_outside_is_trained_and_scored(make_config: MakeConfig) -> None:
    """GQA's own class under the name of a stranger's."""
    outside = "{type: custom, target: 'vlm.tasks.gqa:GQATask', options: {train_fraction: 0.5}}"
    folder = train(make_config("finetune", f"task={outside}", "trainer.samples=32"))
    assert "accuracy" in json.loads((folder / RESULT).read_text())["scores"]
    with pytest.raises(UserError, match=r"is no vlm\.tasks\.task\.Task\. Got Fraction"):
        train(make_config("finetune", "task={type: custom, target: 'fractions:Fraction'}", folder="other"))


def test_a_folder_holds_one_run(make_config: MakeConfig) -> None:
    train(make_config("pretrain", "trainer.samples=16"))
    with pytest.raises(UserError, match="Choose another folder"):
        train(make_config("pretrain", "trainer.samples=16", "seed=1"))


def test_a_loaded_run_executes_no_code_that_its_config_names(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = train(make_config("pretrain", "trainer.samples=16"))
    tree = yaml.safe_load((folder / CONFIG).read_text())
    tree["model"]["fusion"] = {"type": "custom", "target": "os:mkdir", "options": {"path": str(tmp_path / "made")}}
    (folder / CONFIG).write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"runs outside code \(os:mkdir\)"):
        vlm.load(folder)
    assert not (tmp_path / "made").exists()


def test_a_fraction_of_zero_hands_on_the_initial_model(make_config: MakeConfig) -> None:
    folders = [
        train(make_config("pretrain", "trainer.samples=32", f"supervision.fraction={fraction}", folder=str(fraction)))
        for fraction in (0, 1)
    ]
    assert read_checkpoint(folders[0], LAST)["global_step"] == 0
    name = "model.fusion.text_norm.weight"
    assert torch.equal(weights(folders[0])[name], torch.ones(32))
    assert not torch.equal(weights(folders[1])[name], torch.ones(32))


AS_RELEASED = ("task.second_image=fused_text", "model.pooler=none", "model.fusion.pre_norm=false")


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("vqav2", ()),
        ("gqa", ("model.fusion.type=merged", "model.fusion.num_heads=4")),
        ("nlvr2", ()),
        ("nlvr2", AS_RELEASED),
    ],
)
def test_a_finetuned_run_loads_and_answers_as_it_was_scored(
    make_config: MakeConfig, task: str, options: tuple[str, ...]
) -> None:
    from vlm.metrics.items import read_items
    from vlm.tasks.task import Task

    config = make_config("finetune", f"task={task}", "trainer.samples=64", *options)
    folder = train(config)
    result = json.loads((folder / "result.json").read_text())
    loaded = vlm.load(folder)
    assert isinstance(config.task, Task)
    root = config.data.prepare(progress=False)
    questions = config.task.read(root, "test")
    from data_loaders.shards import ShardReader, open_index

    reader = ShardReader(open_index(root / task / "images"))
    images = [[reader[reader.position(key)].image for key in question.image_keys] for question in questions]
    flat = images if task == "nlvr2" else [group[0] for group in images]
    answers = loaded.answer(flat, [question.text for question in questions])
    predictions = {question.id: next(iter(answer)) for question, answer in zip(questions, answers, strict=True)}
    assert config.task.score(questions, predictions)["accuracy"] == pytest.approx(result["scores"]["accuracy"])
    items = read_items(folder / f"items-{task}-test.safetensors")
    assert items.percent == pytest.approx(result["scores"]["accuracy"], abs=1e-4)
    assert all(list(answer.values()) == sorted(answer.values(), reverse=True) for answer in answers)


def test_a_loaded_model_encodes_pictures_with_texts(make_config: MakeConfig) -> None:
    from PIL import Image

    loaded = vlm.load(train(make_config("pretrain", "trainer.samples=16")))
    encoded = loaded.encode([Image.new("RGB", (80, 60), "red")], ["a red circle"])
    assert encoded.text is not None and encoded.image is not None and encoded.pooled is not None
    assert encoded.text.shape == (1, 5, 32)
    assert encoded.image.shape == (1, 10, 32)
    assert encoded.pooled.shape == (1, 64)
    again = loaded.encode([Image.new("RGB", (80, 60), "red")], ["a red circle"])
    assert again.pooled is not None
    assert torch.equal(encoded.pooled, again.pooled)


def test_a_number_of_samples_replaces_the_passes_of_the_config_file(make_config: MakeConfig) -> None:
    config = make_config("pretrain", "trainer.samples=48")
    assert (config.trainer.passes, config.trainer.num_steps(1000)) == (None, 3)
    assert make_config("pretrain", "trainer.passes=0.5").trainer.num_steps(1000) == 32
    assert make_config("pretrain", "trainer.samples=48", "trainer.passes=0.5").trainer.num_steps(1000) == 32
    with pytest.raises(UserError, match="no budget"):
        train(make_config("pretrain", "trainer.passes=null"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.part=texts", "objectives.masked_language .* needs data.part=pairs"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate"),
        ("optimizer.betas=[0.9,1.5]", "optimizer.betas"),
        ("supervision.sources=[]", "supervision.sources"),
    ],
)
def test_what_cannot_work_is_refused_in_the_config(make_config: MakeConfig, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config("pretrain", override)


@pytest.mark.parametrize("override", ["model.vision.width=65", "model.fusion.num_heads=5", "trainer.accelerator=gpuu"])
def test_sizes_and_devices_that_do_not_exist_are_one_line(make_config: MakeConfig, override: str) -> None:
    with pytest.raises(UserError, match=r"model: |trainer: "):
        train(make_config("pretrain", "trainer.samples=16", override))


@pytest.mark.parametrize("encoder", ["vision", "language"])
def test_weights_that_are_no_run_are_refused_before_training(make_config: MakeConfig, encoder: str) -> None:
    config = make_config("pretrain", "trainer.samples=16", f"model.{encoder}.weights=runs/misspelt")
    with pytest.raises(UserError, match="misspelt"):
        train(config)


@pytest.mark.parametrize(("name", "options"), [("pretrain", ()), ("finetune", ("task=nlvr2",))])
def test_states_of_a_frozen_encoder_give_the_weights_that_its_pixels_give(
    make_config: MakeConfig, name: str, options: tuple[str, ...]
) -> None:
    frozen = ("model.vision.frozen=true", "trainer.samples=160", "trainer.select=last", *options)
    folders = [train(make_config(name, *frozen, f"trainer.frozen_states_gib={gib}", folder=f"{gib}")) for gib in (0, 1)]
    assert_same_weights(*folders, tolerance=1e-5)


@pytest.mark.parametrize(("name", "options"), [("pretrain", ()), ("finetune", ("task=nlvr2",))])
def test_states_on_disk_give_the_losses_that_pixels_give_and_later_runs_find_them(
    make_config: MakeConfig, name: str, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = ("model.vision.frozen=true", "trainer.samples=160", "trainer.select=last", *options)
    frozen = (*frozen, "trainer.frozen_states_gib=0", "trainer.log_every_steps=1")
    pixels = train(make_config(name, *frozen, folder="pixels"))
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    files: list[set[str]] = []
    for folder in ("first", "again"):
        cached = make_config(name, *frozen, "trainer.frozen_states_disk_gib=1", folder=folder)
        assert fingerprint(cached) == fingerprint(make_config(name, *frozen))
        train(cached)
        files.append({str(file) for file in (tmp_path / "cache" / "states").rglob("*.safetensors")})
        torch.testing.assert_close(
            torch.tensor(logged(cached.run_folder, "train/loss")),
            torch.tensor(logged(pixels, "train/loss")),
            atol=1e-5,
            rtol=1e-5,
        )
    assert files[0] == files[1] != set()
    assert_same_weights(tmp_path / "first", tmp_path / "again")


def test_states_of_several_layers_are_kept_apart_from_those_of_the_last(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    kept = ("model.vision.frozen=true", "model.vision.depth=2", "model.language.depth=2", "trainer.samples=64")
    kept = (*kept, "trainer.select=last", "trainer.log_every_steps=1", "trainer.frozen_states_disk_gib=1")
    bridges = ("model.fusion.type=bridges", "model.fusion.depth=2", "model.fusion.num_heads=4")
    pixels = train(make_config("pretrain", *kept[:-1], *bridges, "trainer.frozen_states_gib=0", folder="pixels"))
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    train(make_config("pretrain", *kept, folder="last layer"))
    states = train(make_config("pretrain", *kept, *bridges, folder="several layers"))
    assert len(list((tmp_path / "cache" / "states").iterdir())) == 2
    assert_same_weights(pixels, states, tolerance=1e-5)
    loaded, picture = vlm.load(states), Image.new("RGB", (80, 60), "red")
    assert loaded.encode_image([picture]).shape == (1, 10, 32)  # of the last layer, as of any model
    assert loaded.encode_text(["a red circle"])[0].shape == (1, 5, 32)
    assert loaded.encode([picture], ["a red circle"]).pooled is not None
