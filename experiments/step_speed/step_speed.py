"""How much faster is a pretraining step that shares its encodings? Turn about, against the plain plan.

shared        The project's own step (`Pretraining.losses_of`): each image through the vision encoder once, masked and
              whole texts through the language encoder in one call, negatives from within the batch, vocabulary logits
              at masked positions.
plain         What published code does (METER, arXiv 2111.02387, on which arXiv 2211.00262 builds): a complete pass of
              encoders and fusion for each objective, a fresh image for each negative, vocabulary logits at all
              positions.
plain_padded  The same with texts padded to the model's maximum (50 tokens, as METER's loader does) and not to the
              longest of the batch.

All three step the same modules, with the same optimizer, images, texts and masks. The README has command and result.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

import tokenizers
import torch
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
from vlm.training.pretraining import Pretraining
from vlm.types import Batch, Encoded, View

CAPTION_TOKENS = NormalDist(10.3, 4.5)  # Conceptual Captions' mean and deviation, from its release notes

Plan = Callable[[], Tensor]
"""The loss of one step, ready for its backward pass."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One step of one plan."""

    round: int
    plan: str
    seconds: float  # forward, backward and optimizer
    optimizer_seconds: float  # of these, what no plan can change


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


def made_up_tokenizer(vocabulary_size: int, max_tokens: int) -> Tokenizer:
    """Words `w4`, `w5`, ... with RoBERTa's special tokens at RoBERTa's places: the published one needs a network."""
    cls, pad, sep, mask = (SPELLINGS[name] for name in (CLS, PAD, SEP, MASK))
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
    vision: Any = module.model.vision
    matching: Any = module.objectives["matching"]
    num_fresh = round(matching.config.negative_fraction * batch_size)
    batch = make_batch(tokenizer, batch_size, vision.image_pixels, num_fresh)
    module.transfer_batch_to_device(batch, module.device, 0)
    assert batch.image is not None
    pairs = replace(batch, keys=batch.keys[:batch_size], image=batch.image[:batch_size])
    return {
        "shared": lambda: module.losses_of(pairs)["loss"],
        "plain": lambda: plain_losses(module, batch)["loss"],
        "plain_padded": lambda: plain_losses(module, batch, tokenizer.max_tokens, tokenizer.pad_id)["loss"],
    }


def count_flops(module: Pretraining, plan: Plan) -> dict[str, int]:
    """Floating-point operations of the forward pass by component, and of forward and backward in `total`."""
    model, head = module.model, module.objectives["masked_language"].head
    parts = {"vision": model.vision, "language": model.language, "fusion": model.fusion, "vocabulary_head": head}
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        loss = plan()
        counts, forward = counter.get_flop_counts(), counter.get_total_flops()
        loss.backward()  # which the counter cannot tell apart by component where inputs need no gradient
    module.zero_grad()
    flops = {name: sum(counts[type(part).__name__].values()) for name, part in parts.items()}
    return flops | {"other": forward - sum(flops.values()), "total": counter.get_total_flops()}


def take_turns(
    module: Pretraining, plans: Mapping[str, Plan], rounds: int, progress: Callable[[Turn], None]
) -> list[Turn]:
    """Steps in turn, the order reversed every other round so that a drift of the machine favours none.

    Round 0 warms up and is left out.
    """
    optimizer: torch.optim.Optimizer = module.configure_optimizers()["optimizer"]
    turns = []
    for number in range(rounds + 1):
        for name in list(plans)[:: 1 if number % 2 else -1]:
            torch.manual_seed(number)  # each plan draws the same masks
            start = now(module.device)
            plans[name]().backward()
            backward_end = now(module.device)
            optimizer.step()
            optimizer.zero_grad()
            end = now(module.device)
            turn = Turn(number, name, round(end - start, 4), round(end - backward_end, 4))
            progress(turn)
            turns.append(turn)
    return [turn for turn in turns if turn.round > 0]


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def ratios(turns: Sequence[Turn], plan: str) -> list[float]:
    """How many times longer than `shared` the plan took, round by round."""
    seconds = {(turn.round, turn.plan): turn.seconds for turn in turns}
    return [seconds[number, plan] / seconds[number, "shared"] for number in sorted({turn.round for turn in turns})]


# --- The report ------------------------------------------------------------------------------------------------------


def summarise(flops: Mapping[str, Mapping[str, int]], turns: Sequence[Turn]) -> dict[str, dict[str, Any]]:
    """Figures of each plan: seconds, operations, and how many times those of `shared`."""
    summary = {}
    for plan, count in flops.items():
        own, against = [turn for turn in turns if turn.plan == plan], ratios(turns, plan)
        summary[plan] = {
            "seconds_median": median(turn.seconds for turn in own),
            "seconds_min": min(turn.seconds for turn in own),
            "seconds_max": max(turn.seconds for turn in own),
            "optimizer_seconds_median": median(turn.optimizer_seconds for turn in own),
            "ratio_median": round(median(against), 3),
            "ratio_min": round(min(against), 3),
            "ratio_max": round(max(against), 3),
            "flops_ratio": round(count["total"] / flops["shared"]["total"], 3),
            "gflops": {name: round(number / 1e9, 3) for name, number in count.items()},
        }
    return summary


def as_table(summary: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("plan", "seconds", "times shared (range)", "GFLOP", "times shared")
    for plan, row in summary.items():
        table.add_row(
            plan,
            f"{row['seconds_median']:.3f}",
            f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
            f"{row['gflops']['total']:.1f}",
            f"{row['flops_ratio']:.2f}",
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
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Seconds of a pretraining step: shared encodings and the plain plan.")
    parser.add_argument("--model", choices=("base", "tiny"), default="base", help="a config of configs/model")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one that warms up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one for each core")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--results", type=Path, default=here / "results.json", help="default: %(default)s")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    torch.set_num_threads(options.threads)
    console, device = Console(), torch.device(options.device)

    module, tokenizer = build(options.model)
    module.to(device).train()
    plans = make_plans(module, tokenizer, options.batch_size)
    flops = {name: count_flops(module, plan) for name, plan in plans.items()}
    turns = take_turns(
        module,
        plans,
        options.repeats,
        lambda turn: console.print(f"round {turn.round}: {turn.plan:12} {turn.seconds:8.3f} s", style="dim"),
    )

    summary = summarise(flops, turns)
    console.print(as_table(summary))
    vision: Any = module.model.vision
    batch = make_batch(tokenizer, options.batch_size, vision.image_pixels)
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
        },
        "summary": summary,
        "turns": [asdict(turn) for turn in turns],
    }
    options.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
