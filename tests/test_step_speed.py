"""The benchmark compares like with like, the shared step shares what it says, and the recorded figures stand."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """The experiment's folder on the path, as it is when its scripts run."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def step_speed(scripts: None) -> ModuleType:
    return importlib.import_module("step_speed")


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


@pytest.mark.parametrize("text_tokens", [0, 30], ids=["padded alike", "padded further"])
def test_both_plans_of_fine_tuning_have_the_same_loss_and_gradients(
    step_speed: ModuleType, built: tuple[Pretraining, Tokenizer], text_tokens: int
) -> None:
    module, tokenizer = built
    statements = step_speed.statements_of(make_batch(step_speed, module, tokenizer))
    finetuning = step_speed.build_finetuning(module).train()
    inputs = watch(module)
    shared = finetuning.loss_of(finetuning.logits_of(statements), statements.targets)[0]
    assert (inputs.sizes("vision"), inputs.sizes("language"), inputs.sizes("fusion")) == ([6], [3], [6])
    plain = step_speed.plain_answering_loss(finetuning, statements, text_tokens, tokenizer.pad_id)
    assert inputs.sizes("vision")[1:] == inputs.sizes("language")[1:] == inputs.sizes("fusion")[1:] == [3, 3]
    torch.testing.assert_close(plain, shared, rtol=1e-5, atol=1e-5)
    parameters = [value for name, value in finetuning.named_parameters()]
    gradients = [torch.autograd.grad(loss, parameters) for loss in (shared, plain)]
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_the_recorded_products_are_all_operations_of_the_step_whatever_kernel_attention_has(
    step_speed: ModuleType, built: tuple[Pretraining, Tokenizer]
) -> None:
    module, tokenizer = built
    plan = step_speed.make_plans(module, tokenizer, SIZE)["shared"]
    stepper = step_speed.Stepper(plan, torch.optim.SGD(module.parameters(), lr=0), torch.device("cpu"))
    counts = {}
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            products = step_speed.record_products(stepper)
        with FlopCounterMode(display=False) as counter:
            products.step()
        counts[backend] = counter.get_total_flops()
    with sdpa_kernel(SDPBackend.MATH):
        whole = step_speed.counts_of(stepper).flops
    assert counts[SDPBackend.MATH] == counts[SDPBackend.FLASH_ATTENTION] == whole


def test_the_libraries_models_have_the_projects_sizes_and_learn(
    step_speed: ModuleType, built_at_width_64: tuple[Pretraining, Tokenizer]
) -> None:
    module, tokenizer = built_at_width_64
    sizes = step_speed.sizes_of(module, tokenizer)
    assert (sizes.width, sizes.encoder_layers, sizes.fusion_layers, sizes.num_heads) == (64, 2, 2, 4)
    bridgetower, vilt = step_speed.BridgeTower(sizes), step_speed.Vilt(sizes, 4)
    shallow = step_speed.Vilt(sizes, 2, vilt)
    body, stack = bridgetower.masked.bridgetower, vilt.masked.vilt.encoder.layer
    assert len(body.text_model.encoder.layer) == len(body.vision_model.visual.transformer.resblocks) == 2
    assert len(body.cross_modal_image_layers) == len(body.cross_modal_text_layers) == 2
    assert len(stack) == 4 and [*shallow.masked.vilt.encoder.layer] == [*stack[:2]]
    batch = make_batch(step_speed, module, tokenizer)
    statements = step_speed.statements_of(batch)
    views = step_speed.plain_views(module, batch)
    pixels = step_speed.normalised(module, batch)
    text = View("pair", statements.text_ids, statements.text_mask)
    for model in (bridgetower, vilt, shallow):
        loss = model.pretraining_loss(pixels, views["masked_language"], views["matching"])
        (loss + model.answering_loss(pixels, text, statements.targets)).backward()
        without = {name for name, value in model.named_parameters() if value.grad is None}
        assert loss.isfinite()
        assert all("pooler" in name for name in without), without
        model.zero_grad()


@pytest.fixture
def built_at_width_64(step_speed: ModuleType) -> tuple[Pretraining, Tokenizer]:
    """BridgeTower's heads are 64 wide."""
    module, tokenizer = step_speed.build("tiny")
    return module.train(), tokenizer


def test_peak_memory_is_what_is_held_at_once(step_speed: ModuleType) -> None:
    mebi = 2**20
    with torch.profiler.profile(profile_memory=True) as profiler:
        first = torch.empty(3 * mebi, dtype=torch.uint8)
        del first
        held = [torch.empty(2 * mebi, dtype=torch.uint8), torch.empty(2 * mebi, dtype=torch.uint8)]
        held.clear()
    assert step_speed.highest(profiler) == pytest.approx(4 * mebi, rel=0.01)


def test_every_operator_is_in_one_group(step_speed: ModuleType) -> None:
    groups = {
        "aten::addmm": "matrix products",
        "aten::add_": "additions and factors",
        "aten::native_layer_norm_backward": "norms",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "aten::_fused_adamw_": "optimizer",
        "aten::empty": "other",
    }
    assert {name: step_speed.group_of(name) for name in groups} == groups


def test_a_straight_line_is_found_and_a_parabola_is_not_one() -> None:
    linear_cost = importlib.import_module("linear_cost")
    line = linear_cost.fit({x: 3 + 2.0 * x for x in (1, 2, 4, 8)})
    assert (line.intercept, line.slope, line.r_squared) == pytest.approx((3, 2, 1))
    assert line.largest_deviation == pytest.approx(0, abs=1e-9)
    assert linear_cost.fit({x: 1.0 * x * x for x in (1, 2, 4, 8)}).largest_deviation > 0.3


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
    turns = [step_speed.Turn(at, plan, values[at], 0.1, 9.0) for plan, values in seconds.items() for at in (1, 0)]
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
    plans = ["shared", "plain", "plain_padded", "bridgetower", "vilt", "vilt_shallow", "products"]
    for task, samples in {"pretraining": 2, "nlvr2": 1}.items():
        figures = result["tasks"][task]
        assert [turn["plan"] for turn in figures["turns"]] == [*plans, *plans[::-1]]
        assert figures["samples_a_step"] == samples
        assert figures["summary"]["plain"]["flops_ratio"] > 1
        assert figures["times_the_products"]["median"] > 1
        assert sum(figures["shares_of_the_step"].values()) == pytest.approx(1, abs=0.01)
        weights = 4 * result["sizes"]["parameters"] / 2**30  # of which the optimizer holds two copies more
        assert all(row["peak_gib"] > weights for name, row in figures["summary"].items() if name != "products")
    assert result["command"].startswith("python experiments/step_speed/step_speed.py --model tiny ")


def test_the_cost_script_writes_figures_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear_cost = importlib.import_module("linear_cost")
    monkeypatch.setattr(linear_cost, "PAIRS", (1, 2))
    monkeypatch.setattr(linear_cost, "TOKENS", (8, 16))
    threads = torch.get_num_threads()
    file = tmp_path / "cost.json"
    try:
        linear_cost.main(["--model", "tiny", "--repeats", "1", "--threads", "1", "--results", str(file)])
    finally:
        torch.set_num_threads(threads)
    result = json.loads(file.read_text())
    assert list(result["pairs"]["seconds"]) == ["1", "2"] and list(result["tokens"]["seconds"]) == ["8", "16"]
    assert result["tokens"]["gflops"]["16"] > result["tokens"]["gflops"]["8"]
    assert file.with_suffix(".png").stat().st_size > 10_000


def test_the_recorded_step_is_near_its_limit_ahead_of_its_like_and_the_readme_says_so() -> None:
    result = json.loads((FOLDER / "results.json").read_text())
    readme = (FOLDER / "README.md").read_text()
    assert result["sizes"]["model"] == "base"
    assert f"\n{result['command']}\n" in readme
    for task in ("pretraining", "nlvr2"):
        figures = result["tasks"][task]
        for plan in ("plain", "plain_padded", "bridgetower"):
            assert figures["summary"][plan]["ratio_median"] > 1
        assert figures["times_the_products"]["median"] <= 1.3
        assert f"{figures['times_the_products']['median']:.2f}" in readme
        for plan, row in figures["summary"].items():
            assert f"{row['ratio_median']:.2f}" in readme or plan == "products"
            assert f"{row['seconds_a_sample_median']:.2f}" in readme
    assert result["tasks"]["pretraining"]["summary"]["plain"]["ratio_median"] >= 1.5
    assert result["tasks"]["pretraining"]["summary"]["vilt"]["ratio_median"] > 1  # on NLVR2 it is level


def test_the_recorded_cost_is_a_straight_line_and_the_readme_says_so() -> None:
    result = json.loads((FOLDER / "linear_cost.json").read_text())
    readme = (FOLDER / "README.md").read_text()
    assert f"\n{result['command']}\n" in readme
    for axis in ("pairs", "tokens"):
        assert result[axis]["line"]["r_squared"] > 0.97
        assert f"{result[axis]['line']['slope']:.3f}" in readme
        assert f"{result[axis]['line']['r_squared']:.3f}" in readme
