"""How long does a step take, and how much memory? Turn about, against the plain plan and other libraries' models.

shared        The project's own step (`Pretraining.losses_of`): each image through the vision encoder once, masked and
              whole texts through the language encoder in one call, negatives from within the batch, vocabulary logits
              at masked positions. In fine-tuning each text is encoded once for its two images.
plain         What published code does (METER, arXiv 2111.02387, on which arXiv 2211.00262 builds): a complete pass of
              encoders and fusion for each objective, or each image of NLVR2, a fresh image for each negative,
              vocabulary logits at all positions.
plain_padded  The same with texts padded to the model's maximum (50 tokens, as METER's loader does) and not to the
              longest of the batch.
bridgetower, vilt, vilt_shallow   Models of the transformers library (`libraries.py`).
products      The matrix products of the shared step alone (`products.py`): the limit.

The first three step the same modules with the same optimizer. All have the same images, texts and masks. The README has
command and result.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import math
import os
import platform
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

import tokenizers
import torch
import transformers
from libraries import BridgeTower, Sizes, Vilt
from products import MatrixProducts
from rich.console import Console
from rich.table import Table
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vlm.config import compose
from vlm.models.language.tokenizer import CLS, MASK, PAD, SEP, SPELLINGS, Tokenizer
from vlm.objectives.masked_language import MaskedLanguage
from vlm.objectives.matching import Matching
from vlm.objectives.objective import Objective
from vlm.run import RunConfig, build_model, without_weights
from vlm.training.finetuning import Finetuning
from vlm.training.module import TrainingModule
from vlm.training.pretraining import Pretraining
from vlm.types import Batch, Encoded, View

CAPTION_TOKENS = NormalDist(10.3, 4.5)  # Conceptual Captions' mean and deviation, from its release notes
TASKS = ("pretraining", "nlvr2")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Plan = Callable[[], Tensor]
"""The loss of one step, ready for its backward pass."""

# Where a step's time goes: a group for each operator of torch by what its name holds, the first that fits.
GROUPS = {
    "matrix products": ("addmm", "aten::mm", "bmm", "convolution"),
    "attention": ("scaled_dot_product", "softmax"),
    "norms": ("layer_norm",),
    "GELU": ("gelu", "sigmoid"),
    "dropout": ("bernoulli", "dropout"),
    "embedding": ("embedding", "fill_", "zero_"),  # its dense gradient begins as zeros
    "optimizer": ("adamw", "Optimizer"),
    "vocabulary loss": ("nll_loss", "log_softmax"),
    "copies": ("copy_", "cat", "aten::clone", "index"),
    "additions and factors": ("aten::add", "aten::mul", "aten::sum", "aten::div", "aten::sub"),
}


@dataclass(frozen=True, slots=True)
class Stepper:
    """One who takes part: a plan and the optimizer of what it trains, or products to do alone."""

    plan: Plan
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: torch.dtype = torch.float32

    def step(self) -> float:
        """Forward, backward and optimizer; the moment at which the optimizer began."""
        self.learn()
        backward_end = now(self.device)
        self.update()
        return backward_end

    def learn(self) -> None:
        with self._autocast():
            loss = self.plan()
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.precision)


@dataclass(frozen=True, slots=True)
class Products:
    """The matrix products of a step, in a stepper's place."""

    replay: Callable[[], None]
    device: torch.device

    def step(self) -> float:
        self.replay()
        return now(self.device)


@dataclass(frozen=True, slots=True)
class Turn:
    """One step of one plan."""

    round: int
    plan: str
    seconds: float  # forward, backward and optimizer, by `now`
    optimizer_seconds: float  # of these, what no plan can change
    wall_seconds: float


@dataclass(frozen=True, slots=True)
class Counts:
    """What a step needs, timed by nobody."""

    flops: int  # floating-point operations, forward and backward
    peak_bytes: int  # weights, gradients, the optimizer's and the step's own tensors where they are most


# --- What is stepped -------------------------------------------------------------------------------------------------


def build(model: str, overrides: Sequence[str] = ()) -> tuple[Pretraining, Tokenizer]:
    """The training module of `configs/pretrain.yaml` with random weights, and a tokenizer with its vocabulary."""
    config = compose("pretrain", [f"model={model}", *overrides], RunConfig)
    config = config.model_copy(update={"model": without_weights(config.model)})
    network = build_model(config)
    language: Any = network.language
    tokenizer = made_up_tokenizer(language.vocabulary_size, config.model.language.max_tokens)
    objectives = {name: objective.build(network, tokenizer, ()) for name, objective in config.objectives.items()}
    weights = {name: objective.weight for name, objective in config.objectives.items()}
    return Pretraining(network, objectives, weights, config.optimizer, num_steps=1000, seed=config.seed), tokenizer


def build_finetuning(pretraining: Pretraining) -> Finetuning:
    """Fine-tuning on NLVR2 of the model that was pretrained."""
    model, options = pretraining.model, pretraining.optimizer_config
    return Finetuning(model, ["False", "True"], 2, multi_label=False, optimizer=options, num_steps=1000, seed=0)


def sizes_of(module: Pretraining, tokenizer: Tokenizer) -> Sizes:
    vision: Any = module.model.vision
    fusion: Any = module.model.fusion
    with torch.no_grad():
        patches = vision(torch.zeros(1, 3, vision.image_pixels, vision.image_pixels, device=module.device)).shape[1] - 1
    return Sizes(
        vocabulary=tokenizer.vocabulary_size,
        text_tokens=tokenizer.max_tokens,
        pad_id=tokenizer.pad_id,
        image_pixels=vision.image_pixels,
        patch_pixels=vision.image_pixels // math.isqrt(patches),
        width=module.model.width,
        num_heads=fusion.image_layers[0].self_attention.branch.num_heads,
        encoder_layers=len(vision.blocks),
        fusion_layers=len(fusion.image_layers),
    )


def made_up_tokenizer(vocabulary_size: int, max_tokens: int) -> Tokenizer:
    """Words `w4`, `w5`, ... with RoBERTa's special tokens at RoBERTa's places: the published one needs a network."""
    cls, pad, sep, mask = (SPELLINGS[name][1] for name in (CLS, PAD, SEP, MASK))  # RoBERTa's
    tokens = [cls, pad, sep, "<unk>", *(f"w{number}" for number in range(4, vocabulary_size - 1)), mask]
    backend = tokenizers.Tokenizer(models.WordLevel({token: at for at, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing((sep, tokens.index(sep)), (cls, tokens.index(cls)))
    return Tokenizer(backend, max_tokens)


def make_batch(tokenizer: Tokenizer, batch_size: int, image_pixels: int, num_fresh: int = 0) -> Batch:
    """Noise images with made-up captions as long as real ones, and `num_fresh` images more for the negatives."""
    generator = torch.Generator().manual_seed(0)
    quantiles = [CAPTION_TOKENS.inv_cdf((row + 0.5) / batch_size) for row in range(batch_size)]
    words = [
        torch.randint(4, tokenizer.vocabulary_size - 1, (max(1, round(q)),), generator=generator) for q in quantiles
    ]
    ids, mask, special = tokenizer([" ".join(f"w{word}" for word in caption.tolist()) for caption in words])
    count = batch_size + num_fresh
    images = torch.randint(256, (count, 3, image_pixels, image_pixels), generator=generator, dtype=torch.uint8)
    return Batch(tuple(str(number) for number in range(count)), images, ids, mask, special)


# --- The plain plan --------------------------------------------------------------------------------------------------


def plain_losses(module: Pretraining, batch: Batch, text_tokens: int = 0, pad_id: int = 0) -> dict[str, Tensor]:
    """What `Pretraining.losses_of` returns, each objective by a complete pass of its own.

    Images that the batch holds beyond its texts are the fresh negatives. Texts are padded to `text_tokens`.
    """
    objectives: list[tuple[str, Objective]] = list(module.objectives.items())  # type: ignore[arg-type]  # ModuleDict forgets the class
    views = plain_views(module, batch)
    values: dict[str, Tensor] = {}
    for name, objective in objectives:
        view = padded(views[name], text_tokens, pad_id)
        assert batch.image is not None and view.text_ids is not None
        images = batch.image[: len(view.text_ids)] if view.image_index is None else batch.image[view.image_index]
        (encoded,) = module.model.encode(images, [replace(view, image_index=None)])
        if isinstance(objective, MaskedLanguage):
            values[f"{name}/loss"], values[f"{name}/accuracy"] = loss_over_all_positions(objective, view, encoded)
        else:
            loss = objective.loss(view, encoded)
            values[f"{name}/loss"] = loss.value
            values |= {f"{name}/{figure}": value for figure, value in loss.figures.items()}
    total = torch.stack([module.weights[name] * values[f"{name}/loss"] for name in views]).sum()
    return values | {"loss": total}


def plain_answering_loss(module: Finetuning, batch: Batch, text_tokens: int = 0, pad_id: int = 0) -> Tensor:
    """The loss of fine-tuning with a complete pass of its own, text included, for each image of a statement."""
    assert batch.image is not None and batch.targets is not None
    view = padded(View("pair", batch.text_ids, batch.text_mask), text_tokens, pad_id)
    passes = [module.model.encode(images, [replace(view)])[0] for images in batch.image.chunk(batch.images_per_text)]
    logits = module.head(torch.cat([encoded.pooled for encoded in passes if encoded.pooled is not None], dim=-1))
    return module.loss_of(logits, batch.targets)[0]


def plain_views(module: Pretraining, batch: Batch) -> dict[str, View]:
    """The views of the objectives; matching takes the images beyond the texts, where there are any, as negatives."""
    assert batch.image is not None and batch.text_ids is not None
    views = {}
    for name, objective in module.objectives.items():
        if isinstance(objective, Matching) and len(batch.image) > len(batch.text_ids):
            objective = copy.copy(objective)  # the same head
            objective.config = objective.config.model_copy(update={"negatives": "random"})
        views[name] = objective.view(batch)  # type: ignore[operator]  # ModuleDict forgets the class
    return views


def loss_over_all_positions(objective: MaskedLanguage, view: View, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """Masked language modelling's loss and accuracy, with logits for every token that the loss then ignores."""
    predicted = view.targets["predicted"]
    labels = torch.full(predicted.shape, -100, device=predicted.device)
    labels[predicted] = view.targets["ids"]
    logits = objective.head(encoded.text)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
    return loss, (logits.argmax(-1) == labels)[predicted].float().mean()


def padded(view: View, text_tokens: int, pad_id: int) -> View:
    """The view with its texts padded to `text_tokens`, where they are shorter."""
    assert view.text_ids is not None and view.text_mask is not None
    extra = (0, max(0, text_tokens - view.text_ids.shape[1]))
    targets = dict(view.targets)
    if "predicted" in targets:
        targets["predicted"] = F.pad(targets["predicted"], extra, value=False)
    text_ids, text_mask = F.pad(view.text_ids, extra, value=pad_id), F.pad(view.text_mask, extra, value=False)
    return replace(view, text_ids=text_ids, text_mask=text_mask, targets=targets)


# --- The measurement -------------------------------------------------------------------------------------------------


def make_plans(module: Pretraining, tokenizer: Tokenizer, batch_size: int) -> dict[str, Plan]:
    """The three plans over the same pairs; the plain ones get a fresh image for each negative."""
    pairs, batch = make_batches(module, tokenizer, batch_size)
    return {
        "shared": lambda: module.losses_of(pairs)["loss"],
        "plain": lambda: plain_losses(module, batch)["loss"],
        "plain_padded": lambda: plain_losses(module, batch, tokenizer.max_tokens, tokenizer.pad_id)["loss"],
    }


def make_batches(module: Pretraining, tokenizer: Tokenizer, batch_size: int) -> tuple[Batch, Batch]:
    """The batch, and the same with a further image for each negative."""
    vision: Any = module.model.vision
    matching: Any = module.objectives["matching"]
    num_fresh = round(matching.config.negative_fraction * batch_size)
    batch = make_batch(tokenizer, batch_size, vision.image_pixels, num_fresh)
    module.transfer_batch_to_device(batch, module.device, 0)
    assert batch.image is not None
    return replace(batch, keys=batch.keys[:batch_size], image=batch.image[:batch_size]), batch


def statements_of(pairs: Batch) -> Batch:
    """NLVR2's form of the batch: the first half of its texts, each with one image of either half."""
    assert pairs.text_ids is not None and pairs.text_mask is not None
    count = len(pairs.text_ids) // 2
    targets = torch.arange(count, device=pairs.text_ids.device) % 2
    texts = {"text_ids": pairs.text_ids[-count:], "text_mask": pairs.text_mask[-count:]}
    return replace(pairs, keys=pairs.keys[-count:], targets=targets, images_per_text=2, **texts)


def make_answering_plans(module: Finetuning, tokenizer: Tokenizer, batch: Batch) -> dict[str, Plan]:
    targets = batch.targets
    assert targets is not None
    return {
        "shared": lambda: module.loss_of(module.logits_of(batch), targets)[0],
        "plain": lambda: plain_answering_loss(module, batch),
        "plain_padded": lambda: plain_answering_loss(module, batch, tokenizer.max_tokens, tokenizer.pad_id),
    }


def make_steppers(
    task: str, module: Pretraining, tokenizer: Tokenizer, batch_size: int, device: torch.device, precision: torch.dtype
) -> dict[str, Stepper]:
    """All who take part in a task, by the name of their plan."""
    module.to(device).train()
    pairs, _ = make_batches(module, tokenizer, batch_size)
    sizes = sizes_of(module, tokenizer)
    bridgetower = BridgeTower(sizes)
    vilt = Vilt(sizes, sizes.encoder_layers + sizes.fusion_layers)
    others = {"bridgetower": bridgetower, "vilt": vilt, "vilt_shallow": Vilt(sizes, sizes.encoder_layers, vilt)}
    for other in others.values():
        other.to(device).train()
    pixels = normalised(module, pairs)
    own: TrainingModule
    if task == "pretraining":
        own, plans = module, make_plans(module, tokenizer, batch_size)

        def plan_of(other: Any) -> Plan:
            def loss() -> Tensor:
                views = plain_views(module, pairs)
                return other.pretraining_loss(pixels, views["masked_language"], views["matching"])

            return loss
    else:
        statements = statements_of(pairs)
        own = finetuning = build_finetuning(module).to(device).train()
        plans = make_answering_plans(finetuning, tokenizer, statements)
        view = View("pair", statements.text_ids, statements.text_mask)

        def plan_of(other: Any) -> Plan:
            return lambda: other.answering_loss(pixels, view, statements.targets)

    optimizer = own.configure_optimizers()["optimizer"]
    steppers = {name: Stepper(plan, optimizer, device, precision) for name, plan in plans.items()}
    optimizers = {name: torch.optim.AdamW(other.parameters(), 1e-5, fused=True) for name, other in others.items()}
    optimizers["vilt_shallow"] = optimizers["vilt"]  # of the same weights; those without a gradient rest
    for name, other in others.items():
        steppers[name] = Stepper(plan_of(other), optimizers[name], device, precision)
    return steppers


def normalised(module: Pretraining, pairs: Batch) -> Tensor:
    """The pixels as the libraries' processors hand them out; this project's model does it in its step."""
    model = module.model
    assert isinstance(pairs.image, Tensor)
    assert isinstance(model.pixel_mean, Tensor) and isinstance(model.pixel_std, Tensor)
    return (pairs.image - model.pixel_mean) / model.pixel_std


def count_flops(module: Pretraining, plan: Plan) -> dict[str, int]:
    """Floating-point operations of the forward pass by component. The counter cannot tell those of backward apart."""
    model, head = module.model, module.objectives["masked_language"].head
    parts = {"vision": model.vision, "language": model.language, "fusion": model.fusion, "vocabulary_head": head}
    torch.manual_seed(0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plan()
    counts = counter.get_flop_counts()
    flops = {name: sum(counts[type(part).__name__].values()) for name, part in parts.items()}
    return flops | {"other": counter.get_total_flops() - sum(flops.values())}


def counts_of(stepper: Stepper) -> Counts:
    """Of a step that is taken and warms up. The memory is that of later steps, when the optimizer has its state."""
    on_gpu = stepper.device.type == "cuda"
    torch.manual_seed(0)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(stepper.device)
    before = torch.cuda.memory_allocated(stepper.device) if on_gpu else 0
    with torch.profiler.profile(profile_memory=not on_gpu) as profiler, FlopCounterMode(display=False) as counter:
        stepper.learn()
        now(stepper.device)
    peak = torch.cuda.max_memory_allocated(stepper.device) - before if on_gpu else highest(profiler)
    stepper.update()
    return Counts(counter.get_total_flops(), peak + resident(stepper.optimizer))


def record_products(stepper: Stepper) -> Products:
    torch.manual_seed(0)
    recorded = MatrixProducts()
    with recorded:
        stepper.step()
    return Products(recorded.replay(stepper.device), stepper.device)


def take_turns(steppers: Mapping[str, Stepper | Products], rounds: int, progress: Callable[[Turn], None]) -> list[Turn]:
    """Steps in turn, the order reversed every other round so that a drift of the machine favours none."""
    turns = []
    for number in range(1, rounds + 1):
        gc.collect()
        for name in list(steppers)[:: 1 if number % 2 else -1]:
            stepper = steppers[name]
            torch.manual_seed(number)  # each plan draws the same masks
            wall_start, start = time.perf_counter(), now(stepper.device)
            backward_end = stepper.step()
            end, wall_end = now(stepper.device), time.perf_counter()
            seconds = end - start, end - backward_end, wall_end - wall_start
            turn = Turn(number, name, *(round(value, 4) for value in seconds))
            progress(turn)
            turns.append(turn)
    return turns


def shares_of(stepper: Stepper) -> dict[str, float]:
    """Where a step's time goes: the part of each group of operators, the largest first. The optimizer has its state."""
    torch.manual_seed(0)
    with torch.profiler.profile() as profiler:
        stepper.step()
        now(stepper.device)
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        on_gpu = stepper.device.type == "cuda"
        times[group_of(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    whole = sum(times.values())
    return {group: round(value / whole, 4) for group, value in sorted(times.items(), key=lambda item: -item[1])}


def resident(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what the optimizer trains, if it had a gradient so far, and of the state for it."""
    trained = [weight for weight, state in optimizer.state.items() if state]
    state = [value for weight in trained for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*trained, *state))


def highest(profiler: torch.profiler.profile) -> int:
    """The most bytes that tensors of the profiled step held at once, beyond those that were there before it."""
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def group_of(operator: str) -> str:
    return next((group for group, parts in GROUPS.items() if any(part in operator for part in parts)), "other")


def now(device: torch.device) -> float:
    """Seconds. With one thread on a CPU they are the process's own, in which it does not wait for a core that others
    use; else the clock's, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def ratios(turns: Sequence[Turn], plan: str) -> list[float]:
    """How many times longer than `shared` the plan took, round by round."""
    seconds = {(turn.round, turn.plan): turn.seconds for turn in turns}
    return [seconds[number, plan] / seconds[number, "shared"] for number in sorted({turn.round for turn in turns})]


# --- The report ------------------------------------------------------------------------------------------------------


def summarise(samples: int, counts: Mapping[str, Counts], turns: Sequence[Turn]) -> dict[str, dict[str, Any]]:
    """Figures of each plan: seconds, memory, operations, and how many times those of `shared`."""
    summary: dict[str, dict[str, Any]] = {}
    for plan in dict.fromkeys(turn.plan for turn in turns):
        own, against = [turn for turn in turns if turn.plan == plan], ratios(turns, plan)
        summary[plan] = {
            "seconds_a_sample_median": round(median(turn.seconds for turn in own) / samples, 4),
            "seconds_a_sample_min": round(min(turn.seconds for turn in own) / samples, 4),
            "seconds_a_sample_max": round(max(turn.seconds for turn in own) / samples, 4),
            "optimizer_seconds_median": median(turn.optimizer_seconds for turn in own),
            "wall_seconds_a_sample_median": round(median(turn.wall_seconds for turn in own) / samples, 4),
            "ratio_median": round(median(against), 3),
            "ratio_min": round(min(against), 3),
            "ratio_max": round(max(against), 3),
        }
        if plan in counts:
            flops = counts[plan].flops
            summary[plan]["gflops_a_sample"] = round(flops / samples / 1e9, 3)
            summary[plan]["flops_ratio"] = round(flops / counts["shared"].flops, 3)
            summary[plan]["peak_gib"] = round(counts[plan].peak_bytes / 2**30, 3)
    summary["products"]["gflops_a_sample"] = summary["shared"]["gflops_a_sample"]
    return summary


def times_the_products(turns: Sequence[Turn]) -> dict[str, float]:
    """How many times as long as its own matrix products the shared step takes, round by round."""
    times = [1 / ratio for ratio in ratios(turns, "products")]
    return {"median": round(median(times), 3), "min": round(min(times), 3), "max": round(max(times), 3)}


def as_table(summary: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("plan", "seconds a sample", "times shared (range)", "GFLOP a sample", "peak GiB")
    for plan, row in summary.items():
        table.add_row(
            plan,
            f"{row['seconds_a_sample_median']:.3f}",
            f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
            f"{row['gflops_a_sample']:.1f}",
            f"{row['peak_gib']:.2f}" if "peak_gib" in row else "",
        )
    return table


def describe_machine(device: torch.device) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "load_average": [round(load, 1) for load in os.getloadavg()],  # beyond 1 a thread: others had the cores too
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def measure(task: str, options: argparse.Namespace, device: torch.device, console: Console) -> dict[str, Any]:
    """One task's figures."""
    module, tokenizer = build(options.model)
    precision = PRECISIONS[options.precision]
    steppers = make_steppers(task, module, tokenizer, options.batch_size, device, precision)
    counts = {name: counts_of(stepper) for name, stepper in steppers.items()}
    shares = shares_of(steppers["shared"])
    products = record_products(steppers["shared"])
    products.step()
    turns = take_turns(
        {**steppers, "products": products},
        options.repeats,
        lambda turn: console.print(f"{task}, round {turn.round}: {turn.plan:12} {turn.seconds:8.3f} s", style="dim"),
    )
    samples = options.batch_size if task == "pretraining" else options.batch_size // 2
    summary = summarise(samples, counts, turns)
    console.print(as_table(summary))
    result = {
        "samples_a_step": samples,
        "summary": summary,
        "times_the_products": times_the_products(turns),
        "shares_of_the_step": shares,
        "turns": [asdict(turn) for turn in turns],
    }
    if task == "pretraining":
        plans = make_plans(module, tokenizer, options.batch_size)
        result["gflops_forward"] = {
            name: {part: round(flops / 1e9, 3) for part, flops in count_flops(module, plan).items()}
            for name, plan in plans.items()
        }
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Time and memory of a step: this project, plain plans, libraries.")
    parser.add_argument("--model", choices=("base", "tiny"), default="base", help="a config of configs/model")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all")
    parser.add_argument("--batch-size", type=int, default=4, help="images of a step; NLVR2 has half as many statements")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, after those that count and warm up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one for each core")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="float32", help="bfloat16: autocast")
    parser.add_argument("--results", type=Path, default=here / "results.json", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.batch_size < 2 or options.batch_size % 2:
        parser.error("--batch-size must be even: a statement of NLVR2 has two images")
    given = sys.argv[1:] if arguments is None else list(arguments)
    torch.set_num_threads(options.threads)
    console, device = Console(), torch.device(options.device)

    tasks = {}
    for task in options.task or TASKS:
        tasks[task] = measure(task, options, device, console)
        gc.collect()  # the models of one task are gone before the next builds its own
    module, tokenizer = build(options.model)
    batch = make_batches(module, tokenizer, options.batch_size)[0]
    vision: Any = module.model.vision
    assert batch.text_ids is not None
    result = {
        "command": shlex.join(["python", "experiments/step_speed/step_speed.py", *given]),
        "machine": describe_machine(device),
        "sizes": {
            "model": options.model,
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "batch_size": options.batch_size,
            "image_pixels": vision.image_pixels,
            "text_tokens": batch.text_ids.shape[1],
            "text_tokens_padded": tokenizer.max_tokens,
            "vocabulary": tokenizer.vocabulary_size,
            "precision": options.precision,
        },
        "tasks": tasks,
    }
    options.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
