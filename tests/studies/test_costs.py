"""What a step costs is what its products cost, and a study costs what its runs do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from vlm.cli import main
from vlm.config import compose, load_yaml
from vlm.run import RunConfig
from vlm.studies import costs
from vlm.studies.costs import Hardware, budget, markdown_table, measure_step, num_examples, study_cost
from vlm.studies.plan import StudyConfig, plan

WIDTH, TOKENS, DEPTH, VOCABULARY = 64, 32, 2, 500
TINY = [
    *("model.vision.width=64", "model.vision.depth=2", "model.vision.frozen=false"),
    *("model.language.width=64", "model.language.depth=2", f"model.language.vocabulary_size={VOCABULARY}"),
    f"model.language.max_tokens={TOKENS}",
]


def block(tokens: int, width: int = WIDTH) -> int:
    """A transformer block by hand, forwards: twice its weights a token, and two products of all tokens with all."""
    return 2 * 12 * width**2 * tokens + 2 * 2 * tokens**2 * width


def test_a_language_encoders_step_is_three_times_its_forward_pass_by_hand() -> None:
    step = measure_step(compose("unimodal_language", TINY, RunConfig))
    masked = 0.15 * (TOKENS - 2)  # on average
    head = masked * 2 * (WIDTH**2 + WIDTH * VOCABULARY)
    assert step.flops == pytest.approx(3 * (DEPTH * block(TOKENS) + head), rel=0.03)


def test_fine_tuning_counts_both_images_and_the_text_once() -> None:
    one, two = (
        measure_step(compose("finetune", [*TINY, f"task={task}"], RunConfig)).flops for task in ("gqa", "nlvr2")
    )
    vision, language = 3 * DEPTH * block(9), 3 * DEPTH * block(TOKENS)  # 48 pixels in patches of 16
    assert one > vision + language
    assert two < 2 * one - language  # the statement is encoded once


def test_a_frozen_encoder_counts_forwards_only_and_keeps_nothing() -> None:
    free, frozen = (
        measure_step(compose("pretrain", [*TINY, f"model.language.frozen={value}"], RunConfig))
        for value in (False, True)
    )
    texts = 2  # masked, and whole
    scores = 2 * TOKENS**2 * WIDTH  # computed again on the way back, by fused attention
    projection = 2 * WIDTH**2 * TOKENS  # its gradient by its input is not needed either
    assert free.flops - frozen.flops == texts * (DEPTH * (2 * block(TOKENS) + scores) + projection)
    assert frozen.frozen > 0 and frozen.learning + frozen.frozen == free.learning
    assert frozen.activation_bytes < free.activation_bytes and frozen.state_bytes < free.state_bytes


def test_random_negatives_cost_their_pass_through_the_vision_encoder() -> None:
    in_batch, extra = (
        measure_step(compose("pretrain", [*TINY, f"objectives.matching.negatives={kind}"], RunConfig)).flops
        for kind in ("in_batch", "random")
    )
    of_one_image = 3 * DEPTH * block(9)
    # For half of the examples. The stem comes on top, which costs about as much as the blocks do.
    assert 0.5 * of_one_image < extra - in_batch < 1.5 * of_one_image


def test_a_text_that_two_objectives_share_counts_once() -> None:
    whole, masked = (
        measure_step(compose("pretrain", [*TINY, f"objectives.matching.text={text}"], RunConfig)).flops
        for text in ("whole", "masked")
    )
    assert whole - masked == pytest.approx(3 * DEPTH * block(TOKENS), rel=0.1)  # and its projection


@pytest.mark.parametrize(("name", "options"), [("pretrain", ["objectives=aligned"]), ("finetune", ["task=nlvr2"])])
def test_products_that_are_not_computed_are_counted_as_if_they_were(name: str, options: list[str]) -> None:
    config = compose(name, [*TINY, *options], RunConfig)
    module, batch = costs._module_and_batch(config, config.model.language.max_tokens)
    module.train()
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        costs._loss(module, batch).backward()
    assert measure_step(config).flops * costs.NUM_MEASURED == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_budgets_are_whole_batches_of_what_the_data_holds_or_is_expected_to() -> None:
    folder = ["data=conceptual_captions", "trainer.batch_size=100"]
    assert num_examples(compose("pretrain", [*folder, "supervision.fraction=0.05"], RunConfig)) == 142_000
    assert budget(compose("pretrain", [*folder, "trainer.passes=10"], RunConfig)) == 28_400_000
    assert budget(compose("pretrain", [*folder, "trainer.samples=1050"], RunConfig)) == 1100
    assert budget(compose("pretrain", [*folder, "trainer.samples=1050", "supervision.fraction=0"], RunConfig)) == 0
    assert budget(compose("pretrain", ["data=folder", "data.root=nowhere"], RunConfig)) is None
    assert budget(compose("finetune", ["data=tasks", "task=nlvr2", "trainer.passes=1"], RunConfig)) == 86_400
    retrieval = compose("finetune", ["task=retrieval"], RunConfig)  # which trains nothing
    assert budget(retrieval) == measure_step(retrieval).flops == 0
    world = ["data.world.num_pairs=640", "trainer.passes=2", "trainer.batch_size=64"]
    assert budget(compose("pretrain", world, RunConfig)) == 1280


def test_a_study_costs_what_its_runs_do_and_says_at_which_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "question": "?",
        "seeds": [0, 1],
        "overrides": ["data=conceptual_captions", "model=tiny"],
        "stages": {
            "pretrain": {
                "config": "pretrain",
                "points": {"5%": {"supervision.fraction": 0.05}, "all": {"supervision.fraction": 1}},
            },
            "finetune": {
                "config": "finetune",
                "overrides": ["data=tasks"],
                "upstream": {"start_from": "pretrain"},
                "grid": {"task": ["gqa", "nlvr2"]},
            },
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    found = study_cost(plan(load_yaml(tmp_path / "study.yaml", StudyConfig), tmp_path))
    places = [(cost.stage, cost.cell, cost.num_runs) for cost in found]
    assert places == [
        ("pretrain", "5%", 2),
        ("pretrain", "all", 2),
        ("finetune", "5%/all, gqa", 4),  # the same whatever it starts from
        ("finetune", "5%/all, nlvr2", 4),
    ]
    assert found[1].step is found[0].step and found[1].flops / found[0].flops == pytest.approx(20, rel=1e-3)  # type: ignore[operator]
    hardware = Hardware("device", 1e12, 0.5)
    assert found[0].hours(hardware) == pytest.approx(2 * found[0].examples * found[0].step.flops / 0.5e12 / 3600)  # type: ignore[operator]
    table = markdown_table(found, hardware)
    assert "device at 0 TFLOP/s (50% of 1)" in table and "assumption" in table
    assert main(["plan", str(tmp_path), "--folder", str(tmp_path), "--flops", "--rate", "5e11"]) == 0
    assert table.splitlines()[3] in capsys.readouterr().out
    assert main(["plan", str(tmp_path), "--rate", "5e11"]) == 2
