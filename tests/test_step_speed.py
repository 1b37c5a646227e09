"""The benchmark compares like with like, the shared step shares what it says, and the recorded figures stand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlm.models.language.tokenizer import Tokenizer
from vlm.objectives.objective import Objective
from vlm.training.pretraining import Pretraining
from vlm.types import Batch, View

FOLDER = Path(__file__).parent.parent / "experiments" / "step_speed"
SIZE = 6  # pairs of a batch
SMALL = (
    "model.vision.width=32",
    "model.vision.depth=1",
    "model.language.width=32",
    "model.language.depth=1",
    "model.fusion.width=32",
    "model.fusion.depth=1",
    "model.fusion.dropout=0",
)


@pytest.fixture(scope="module")
def step_speed() -> ModuleType:
    """The script, imported from where it lies."""
    spec = importlib.util.spec_from_file_location("step_speed", FOLDER / "step_speed.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["step_speed"] = script  # its dataclasses look their module up
    spec.loader.exec_module(script)
    return script


@pytest.fixture
def built(step_speed: ModuleType) -> tuple[Pretraining, Tokenizer]:
    module, tokenizer = step_speed.build("tiny", SMALL)
    return module.train(), tokenizer


def make_batch(step_speed: ModuleType, module: Pretraining, tokenizer: Tokenizer, num_fresh: int = 0) -> Batch:
    vision: Any = module.model.vision
    batch: Batch = step_speed.make_batch(tokenizer, SIZE, vision.image_pixels, num_fresh)
    return batch


def views_of(module: Pretraining, batch: Batch, seed: int) -> dict[str, View]:
    """The views that a step of this seed draws."""
    objectives: list[tuple[str, Objective]] = list(module.objectives.items())  # type: ignore[arg-type]  # ModuleDict forgets the class
    torch.manual_seed(seed)
    return {name: objective.view(batch) for name, objective in objectives}


class Inputs:
    """What went into each module, call by call."""

    def __init__(self, **modules: nn.Module) -> None:
        self.calls: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in modules}
        for name, module in modules.items():
            module.register_forward_pre_hook(lambda _, inputs, name=name: self.calls[name].append(inputs))

    def sizes(self, name: str) -> list[int]:
        return [len(inputs[0]) for inputs in self.calls[name]]


def watch(module: Pretraining) -> Inputs:
    model, head = module.model, module.objectives["masked_language"].head
    assert isinstance(head, nn.Module)
    return Inputs(vision=model.vision, language=model.language, fusion=model.fusion, vocabulary=head)


@pytest.mark.parametrize("text_tokens", [0, 30], ids=["padded alike", "padded further"])
def test_both_plans_have_the_same_losses_and_gradients(
    step_speed: ModuleType, built: tuple[Pretraining, Tokenizer], text_tokens: int
) -> None:
    """Given the same masks and the same in-batch negatives, without dropout."""
    module, tokenizer = built
    batch = make_batch(step_speed, module, tokenizer)
    torch.manual_seed(1)
    shared = module.losses_of(batch)
    torch.manual_seed(1)
    plain = step_speed.plain_losses(module, batch, text_tokens, tokenizer.pad_id)
    assert shared.keys() == plain.keys()
    for name, value in shared.items():
        torch.testing.assert_close(plain[name], value, rtol=1e-5, atol=1e-5, msg=name)
    parameters = dict(module.named_parameters())
    gradients = [torch.autograd.grad(losses["loss"], list(parameters.values())) for losses in (shared, plain)]
    for name, left, right in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5, msg=name)


def test_the_shared_step_encodes_each_image_once_and_each_distinct_text_once(
    step_speed: ModuleType, built: tuple[Pretraining, Tokenizer]
) -> None:
    module, tokenizer = built
    batch = make_batch(step_speed, module, tokenizer)
    inputs = watch(module)
    torch.manual_seed(2)
    module.losses_of(batch)
    masked = views_of(module, batch, seed=2)["masked_language"].text_ids
    assert masked is not None and batch.text_ids is not None and not torch.equal(masked, batch.text_ids)
    assert inputs.sizes("vision") == [SIZE]
    assert inputs.sizes("language") == [2 * SIZE]
    assert torch.equal(inputs.calls["language"][0][0], torch.cat([masked, batch.text_ids]))
    assert inputs.sizes("fusion") == [2 * SIZE]


def test_the_shared_step_computes_vocabulary_logits_at_exactly_the_masked_positions(
    step_speed: ModuleType, built: tuple[Pretraining, Tokenizer]
) -> None:
    module, tokenizer = built
    batch = make_batch(step_speed, module, tokenizer)
    inputs = watch(module)
    fused: list[Tensor] = []
    module.model.fusion.register_forward_hook(lambda *states: fused.append(states[-1][1]))
    torch.manual_seed(3)
    module.losses_of(batch)
    predicted = views_of(module, batch, seed=3)["masked_language"].targets["predicted"]
    assert 0 < predicted.sum() < predicted.numel() / 2
    assert torch.equal(inputs.calls["vocabulary"][0][0], fused[0][:SIZE][predicted])
    assert len(inputs.calls["vocabulary"]) == 1


def test_the_plain_step_encodes_everything_again_with_fresh_negatives_and_logits_everywhere(
    step_speed: ModuleType, built: tuple[Pretraining, Tokenizer]
) -> None:
    module, tokenizer = built
    batch = make_batch(step_speed, module, tokenizer, num_fresh=SIZE // 2)
    inputs = watch(module)
    torch.manual_seed(4)
    step_speed.plain_losses(module, batch)
    torch.manual_seed(4)
    index = step_speed.plain_views(module, batch)["matching"].image_index
    assert index is not None and (index >= SIZE).sum() == SIZE // 2
    assert inputs.sizes("vision") == inputs.sizes("language") == inputs.sizes("fusion") == [SIZE, SIZE]
    first, second = (images for (images,) in inputs.calls["vision"])
    fresh = [row for row in range(SIZE) if not (second[row] == first).flatten(1).all(1).any()]
    assert fresh == (index >= SIZE).nonzero().flatten().tolist()
    assert batch.text_ids is not None
    assert [tuple(states.shape[:2]) for (states,) in inputs.calls["vocabulary"]] == [batch.text_ids.shape]


def test_operations_are_counted_by_component(step_speed: ModuleType, built: tuple[Pretraining, Tokenizer]) -> None:
    module, tokenizer = built
    plans = step_speed.make_plans(module, tokenizer, SIZE)
    shared, plain, padded = (
        step_speed.count_flops(module, plans[name]) for name in ("shared", "plain", "plain_padded")
    )
    batch = make_batch(step_speed, module, tokenizer)
    assert batch.text_ids is not None
    torch.manual_seed(0)
    masked = int(views_of(module, batch, seed=0)["masked_language"].targets["predicted"].sum())
    a_position = 2 * 32 * 32 + 2 * 32 * tokenizer.vocabulary_size
    assert plain["vision"] == 2 * shared["vision"]
    assert plain["language"] == shared["language"] < padded["language"]
    assert plain["fusion"] == shared["fusion"] < padded["fusion"]
    assert shared["vocabulary_head"] == a_position * masked
    assert plain["vocabulary_head"] == a_position * batch.text_ids.numel()
    assert all(count >= 0 for flops in (shared, plain, padded) for count in flops.values())


def test_ratios_pair_the_turns_of_a_round(step_speed: ModuleType) -> None:
    seconds = {"shared": (1.0, 4.0), "plain": (2.0, 6.0)}
    turns = [step_speed.Turn(at, plan, values[at], 0.1) for plan, values in seconds.items() for at in (1, 0)]
    assert step_speed.ratios(turns, "plain") == [2.0, 1.5]


def test_the_command_writes_its_figures(step_speed: ModuleType, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    file = tmp_path / "results.json"
    try:
        step_speed.main(
            ["--model", "tiny", "--batch-size", "2", "--repeats", "2", "--threads", "1", "--results", str(file)]
        )
    finally:
        torch.set_num_threads(threads)
    result = json.loads(file.read_text())
    assert [turn["round"] for turn in result["turns"]] == [1, 1, 1, 2, 2, 2]
    assert [turn["plan"] for turn in result["turns"]][:4] == ["shared", "plain", "plain_padded", "plain_padded"]
    assert result["summary"]["plain"]["flops_ratio"] > 1
    assert result["command"].startswith("python experiments/step_speed/step_speed.py --model tiny ")


def test_the_recorded_step_is_at_least_one_and_a_half_times_faster_and_the_readme_says_so() -> None:
    result = json.loads((FOLDER / "results.json").read_text())
    readme = (FOLDER / "README.md").read_text()
    assert result["sizes"]["model"] == "base"
    assert result["summary"]["plain"]["ratio_median"] >= 1.5
    assert f"\n{result['command']}\n" in readme
    for row in result["summary"].values():
        assert f"{row['ratio_median']:.2f}" in readme
        assert f"{row['flops_ratio']:.2f}" in readme
