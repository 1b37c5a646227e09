"""Averages of weights, shared trunks, bad losses and compiled blocks: whole runs, killed ones among them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_runs import assert_same_weights, killed_after_its_first_checkpoint, start_in_subprocess, weights
from torch import Tensor

from vlm.config import fingerprint
from vlm.errors import UserError
from vlm.objectives import MaskedLanguageConfig
from vlm.objectives.masked_language import MaskedLanguage
from vlm.run import BEST, LAST, RunConfig, build_model, read_checkpoint, train
from vlm.training.optimizer import OptimizerConfig
from vlm.types import Encoded, Loss, View

MakeConfig = Callable[..., RunConfig]
LAST_ONE = "trainer.select=last"


def scalars(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


class SometimesNone(MaskedLanguage):
    """Masked language modelling whose loss is no number, or a hundred times too high, whenever torch draws so."""

    def __init__(self, model: Any, tokenizer: Any, classes: tuple[str, ...], factor: float = float("nan")) -> None:
        super().__init__(MaskedLanguageConfig(), model, tokenizer)
        self.factor = factor

    def loss(self, view: View, encoded: Encoded) -> Loss:
        loss = super().loss(view, encoded)
        factor = torch.where(torch.rand(()) < 0.15, self.factor, 1.0)
        return Loss(loss.value * factor, loss.count, loss.figures, loss.items)


def sometimes(factor: float | None = None) -> str:
    options = "" if factor is None else f", options: {{factor: {factor}}}"
    return f"objectives.masked_language={{type: custom, target: 'test_finishing:SometimesNone'{options}}}"


# --- Averages --------------------------------------------------------------------------------------------------------


def test_the_moving_average_is_what_is_handed_on(make_config: MakeConfig) -> None:
    """Over two steps: decay * first + (1 - decay) * second, as plain runs of one and of two steps left them."""
    constant = (LAST_ONE, "optimizer.warmup_fraction=0", "optimizer.decay=none")
    first, second = (
        weights(train(make_config("pretrain", *constant, f"trainer.samples={16 * steps}", folder=f"plain-{steps}")))
        for steps in (1, 2)
    )
    folder = train(make_config("pretrain", *constant, "trainer.samples=32", "trainer.ema_decay=0.75", folder="ema"))
    checkpoint = read_checkpoint(folder, LAST)
    for name, value in weights(folder).items():
        torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * second[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(checkpoint["current_model_state"][name], second[name])
    handed_on = build_model(make_config("finetune", f"start_from={folder}"))
    state = handed_on.state_dict()
    assert all(torch.equal(value, weights(folder)[f"model.{name}"]) for name, value in state.items())


def test_a_soup_is_the_mean_of_the_last_weights(make_config: MakeConfig) -> None:
    options = (LAST_ONE, "trainer.samples=112", "trainer.keep_every_steps=1")
    plain = train(make_config("pretrain", *options, folder="plain"))
    soup = (*options, "trainer.average_last=3", "trainer.average_every_steps=2")
    mixed = train(make_config("pretrain", *soup, folder="soup"))
    parts = [read_checkpoint(plain, f"step-{step:08}.ckpt")["state_dict"] for step in (3, 5, 7)]
    for name, value in weights(mixed).items():
        mean = torch.stack([part[name] for part in parts]).mean(0)
        torch.testing.assert_close(value, mean, rtol=1e-5, atol=1e-7)


def test_the_best_checkpoint_holds_the_average_that_was_validated(make_config: MakeConfig) -> None:
    options = ("task=gqa", "trainer.samples=64", "trainer.ema_decay=0.9")
    folder = train(make_config("finetune", *options))
    best, last = (read_checkpoint(folder, name)["state_dict"] for name in (BEST, LAST))
    assert all(torch.equal(best[name], last[name]) for name in last)


# --- Killed and resumed ----------------------------------------------------------------------------------------------


def test_a_killed_run_ends_with_the_same_average_and_the_same_skipped_steps(make_config: MakeConfig) -> None:
    average = ("trainer.ema_decay=0.9", "trainer.on_bad_loss=skip", "trainer.log_every_steps=1", sometimes())
    options = (LAST_ONE, "trainer.samples=960", "trainer.checkpoint_every_steps=7", *average)
    whole = train(make_config("pretrain", *options, folder="whole"))
    config = make_config("pretrain", *options, folder="killed")
    environment = pytest.MonkeyPatch()
    environment.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path.cwd()}")
    killed_after_its_first_checkpoint(config)
    environment.undo()
    train(config)
    assert_same_weights(whole, config.run_folder)
    states = [read_checkpoint(folder, LAST) for folder in (whole, config.run_folder)]
    for name, value in states[0]["current_model_state"].items():
        assert torch.equal(value, states[1]["current_model_state"][name]), name
    told = [(folder / "bad_steps.jsonl").read_text() for folder in (whole, config.run_folder)]
    assert told[0] == told[1]
    skipped = scalars(whole)["train/skipped_steps"]
    assert skipped[-1] == len(told[0].splitlines()) == scalars(config.run_folder)["train/skipped_steps"][-1] > 0
    assert all(value.isfinite().all() for value in weights(whole).values())


# --- One trunk for many budgets --------------------------------------------------------------------------------------

COOLDOWN = (LAST_ONE, "optimizer.decay=cooldown", "optimizer.cooldown_fraction=0.5", "optimizer.warmup_steps=2")


def test_a_trunk_and_its_cooldowns_equal_runs_that_were_never_interrupted(make_config: MakeConfig) -> None:
    """The trunk has a budget of 10 steps; its branches cool down at 3 of 6 and at 5 of 10."""
    options = (LAST_ONE, "optimizer.decay=none", "optimizer.warmup_steps=2", "trainer.keep_every_steps=2")
    trunk = train(make_config("pretrain", *options, "trainer.samples=160", folder="trunk"))
    for steps in (6, 10):
        budget = (*COOLDOWN, f"trainer.samples={16 * steps}")
        whole = train(make_config("pretrain", *budget, folder=f"whole-{steps}"))
        branched = make_config("pretrain", *budget, f"continue_from={trunk}", folder=f"branch-{steps}")
        assert fingerprint(branched) == fingerprint(make_config("pretrain", *budget))
        train(branched)
        assert_same_weights(whole, branched.run_folder)
        counts = [len(scalars(folder).get("validation/loss", [])) for folder in (whole, branched.run_folder)]
        assert counts == [1, 1]
        moments = [read_checkpoint(f, LAST)["optimizer_states"][0]["state"] for f in (whole, branched.run_folder)]
        assert all(torch.equal(moments[0][n]["exp_avg"], moments[1][n]["exp_avg"]) for n in moments[0])


def test_what_did_not_begin_alike_is_not_continued(make_config: MakeConfig, tmp_path: Path) -> None:
    options = (LAST_ONE, "optimizer.decay=none", "optimizer.warmup_steps=2", "trainer.keep_every_steps=4")
    trunk = train(make_config("pretrain", *options, "trainer.samples=64", folder="trunk"))
    budget = (*COOLDOWN, "trainer.samples=64", f"continue_from={trunk}")
    for override, message in (
        ("seed=1", "differs in more than schedule and budget: in seed"),
        ("optimizer.learning_rate=1e-3", "differs in more than schedule and budget: in optimizer"),
        ("trainer.batch_size=32", "differs in more than schedule and budget: in trainer"),
        ("optimizer.cooldown_fraction=0.5", r"agree up to step 2, .* \(the first one is of step 4\)"),
        ("optimizer.warmup_steps=3", "agree up to step 0"),
        (f"continue_from={tmp_path}", "is no run"),
    ):
        shutil.rmtree(tmp_path / "branch", ignore_errors=True)
        with pytest.raises(UserError, match=message):
            train(make_config("pretrain", *budget, override, folder="branch"))
    with pytest.raises(UserError, match="continue_from: what belongs to a whole run"):
        make_config("pretrain", f"continue_from={trunk}", "trainer.select=best")


@pytest.mark.parametrize("decay", ["linear", "cosine", "cooldown"])
def test_rates_warm_up_and_fall_to_nothing(decay: Any) -> None:
    factor = OptimizerConfig(decay=decay, warmup_steps=10, cooldown_fraction=0.3).rate_factor(100)
    rates = [factor(step) for step in range(101)]
    assert rates[:10] == sorted(rates[:10]) and rates[0] == 1 / 11
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[10] == 1 and rates[100] == 0
    assert (rates[69] == 1) == (decay == "cooldown")
    assert rates[85] == pytest.approx({"linear": 1 / 6, "cosine": 0.0669873, "cooldown": 1 - 0.5**0.5}[decay])


# --- Bad losses ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_with_its_examples(make_config: MakeConfig) -> None:
    config = make_config("pretrain", sometimes(), "trainer.samples=640", LAST_ONE)
    with pytest.raises(
        UserError, match=r"step \d+: the loss is nan\. Its examples: .* and 8 more \(.*bad_steps"
    ) as stop:
        train(config)
    (row,) = map(json.loads, (config.run_folder / "bad_steps.jsonl").read_text().splitlines())
    assert len(row["keys"]) == 16 and all(key in str(stop.value) for key in row["keys"][:8])


def test_a_skipped_step_leaves_weights_and_moments_as_they_are(make_config: MakeConfig) -> None:
    """Every step is bad: the weights stay those that the model began with, until ten in a row are too many."""
    always = "objectives.masked_language={type: custom, target: 'test_finishing:AlwaysNone'}"
    config = make_config("pretrain", always, "trainer.samples=160", LAST_ONE, "trainer.on_bad_loss=skip")
    folder = train(config)
    initial = build_model(config).state_dict()
    assert all(torch.equal(value, weights(folder)[f"model.{name}"]) for name, value in initial.items())
    assert not any(read_checkpoint(folder, LAST)["optimizer_states"][0]["state"].values())
    with pytest.raises(UserError, match=r"10 steps before it were skipped in a row"):
        train(make_config("pretrain", always, "trainer.samples=176", "trainer.on_bad_loss=skip", folder="longer"))


class AlwaysNone(SometimesNone):
    def loss(self, view: View, encoded: Encoded) -> Loss:
        loss = MaskedLanguage.loss(self, view, encoded)
        return Loss(loss.value * self.factor, loss.count)


def test_a_spike_is_a_bad_loss_where_it_is_asked_for(make_config: MakeConfig) -> None:
    options = (sometimes(100.0), "trainer.samples=640", LAST_ONE, "trainer.on_bad_loss=skip")
    folder = train(make_config("pretrain", *options, "trainer.spike_factor=5", folder="asked"))
    rows = list(map(json.loads, (folder / "bad_steps.jsonl").read_text().splitlines()))
    assert rows and all(row["step"] >= 20 and float(row["loss"]) > 50 for row in rows)
    assert not (train(make_config("pretrain", *options, folder="unasked")) / "bad_steps.jsonl").exists()


def test_ranks_skip_together_and_list_the_examples_of_all(make_config: MakeConfig) -> None:
    """A loss that is no number on one rank is left out on both, and the weights equal those of one process."""
    options = (sometimes(), "trainer.samples=96", LAST_ONE, "trainer.on_bad_loss=skip")
    alone = train(make_config("pretrain", *options, "trainer.accumulate=2", folder="alone"))
    two = make_config("pretrain", *options, "trainer.devices=2", "trainer.strategy=ddp", folder="two")
    environment = pytest.MonkeyPatch()
    environment.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path.cwd()}")
    process = start_in_subprocess(two)
    environment.undo()
    assert process.wait(timeout=240) == 0, (two.run_folder / "log.txt").read_text()
    assert_same_weights(alone, two.run_folder, tolerance=1e-5)
    listed = [(folder / "bad_steps.jsonl").read_text() for folder in (alone, two.run_folder)]
    assert listed[0] == listed[1] and json.loads(listed[0].splitlines()[0])["keys"]


# --- Speed -----------------------------------------------------------------------------------------------------------


def test_bf16_clips_as_float32_does_and_stays_finite(make_config: MakeConfig) -> None:
    options = (LAST_ONE, "trainer.samples=32", "optimizer.clip_norm=0.01", "model.fusion.dropout=0")
    full = weights(train(make_config("pretrain", *options, folder="full")))
    half = weights(train(make_config("pretrain", *options, "trainer.precision=bf16-mixed", folder="half")))
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in half.values())
    name = "model.fusion.text_norm.weight"
    torch.testing.assert_close(half[name], full[name], rtol=0, atol=2e-3)


def test_a_run_logs_how_fast_it_goes(make_config: MakeConfig) -> None:
    options = ("trainer.samples=96", "trainer.log_every_steps=2", "trainer.peak_flops=1e9")
    found = scalars(train(make_config("pretrain", *options)))
    for name in ("images_per_second", "tokens_per_second", "padding_fraction", "model_flop_utilisation"):
        assert len(found[f"throughput/{name}"]) == 3 and min(found[f"throughput/{name}"]) > 0
    assert 0.05 < found["memory/peak_gib"][-1] < 16
    assert max(found["throughput/padding_fraction"]) < 1


@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_weights_under_the_same_names(make_config: MakeConfig) -> None:
    """With dropout, whose draws are those of the uncompiled run. The identity of the run is the same.

    In a process without the type checks and the strict warnings of the tests, which the compiler trips over.
    """
    options = (LAST_ONE, "trainer.samples=32")
    configs = [make_config("pretrain", *options, f"trainer.compile={on}", folder=on) for on in ("false", "true")]
    assert len(set(map(fingerprint, configs))) == 1
    process = start_in_subprocess(configs[1])
    log = configs[1].run_folder / "log.txt"
    assert process.wait(timeout=900) == 0 and "uncompiled" not in log.read_text(), log.read_text()
    assert_same_weights(train(configs[0]), configs[1].run_folder, tolerance=2e-4)


def test_what_cannot_be_compiled_runs_as_it_is_and_one_line_says_so() -> None:
    from torch._inductor import config as inductor

    from vlm.training.compiling import compile_blocks

    model: Any = torch.nn.Module()
    model.vision, model.fusion = torch.nn.Module(), torch.nn.Module()
    model.vision.blocks = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.GELU()])
    model.fusion.layers = torch.nn.ModuleList([torch.nn.Tanh()])
    x = torch.rand(2, 3)
    blocks = (*model.vision.blocks, *model.fusion.layers)
    expected: list[Tensor] = [block(x) for block in blocks]
    lines: list[str] = []
    names = list(model.state_dict())
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        assert compile_blocks(model, lines.append) == 3
        for block, output in zip(blocks, expected, strict=True):
            assert torch.equal(block(x), output)
    assert list(model.state_dict()) == names
    assert len(lines) == 1 and lines[0].startswith("trainer.compile: blocks run uncompiled (")


def test_averages_are_not_sharded_and_only_one_kind_is_taken(make_config: MakeConfig) -> None:
    for options, message in (
        (("trainer.ema_decay=0.9", "trainer.average_last=2"), "ema_decay or average_last, not both"),
        (("trainer.ema_decay=0.9", "trainer.strategy=fsdp"), "cannot be averaged"),
    ):
        with pytest.raises(UserError, match=message):
            make_config("pretrain", *options)
