"""How does the cost of a pretraining step grow with the length of its texts and the number of its pairs?

Steps of the project's own plan at batches of 1 to 16 pairs with texts of 16 tokens, and at texts of 8 to 128 tokens
with 2 pairs, in turn. A straight line is fitted to the medians. The README has command and result.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from step_speed import Stepper, build, describe_machine, take_turns
from torch.utils.flop_counter import FlopCounterMode

from vlm.models.language.tokenizer import Tokenizer
from vlm.training.pretraining import Pretraining
from vlm.types import Batch

PAIRS, TOKENS = (1, 2, 4, 8, 16), (8, 16, 32, 64, 128)
PAIRS_OF_TOKENS, TOKENS_OF_PAIRS = 2, 16  # what stays while the other grows


@dataclass(frozen=True, slots=True)
class Line:
    """`intercept + slope * x`, and how far from it the points lie."""

    intercept: float
    slope: float
    r_squared: float
    largest_deviation: float  # of a point, relative to the line there


def fit(points: Mapping[int, float]) -> Line:
    """Least squares of relative errors: a point of a large batch weighs as much as one of a small one."""
    x = torch.tensor(list(points), dtype=torch.float64)
    y = torch.tensor(list(points.values()), dtype=torch.float64)
    ones = torch.stack([torch.ones_like(x), x], dim=1)
    solution = torch.linalg.lstsq(ones / y[:, None], torch.ones_like(y)[:, None]).solution[:, 0]
    line = ones @ solution
    r_squared = 1 - ((y - line) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    largest = (y / line - 1).abs().max()
    return Line(float(solution[0]), float(solution[1]), float(r_squared), float(largest))


def make_batch(module: Pretraining, tokenizer: Tokenizer, num_pairs: int, text_tokens: int) -> Batch:
    """Noise images, and texts that fill all their tokens."""
    vision: Any = module.model.vision
    generator = torch.Generator().manual_seed(0)
    longer = Tokenizer(tokenizer.backend, text_tokens)
    words = torch.randint(4, tokenizer.vocabulary_size - 1, (num_pairs, text_tokens - 2), generator=generator)
    ids, mask, special = longer([" ".join(f"w{word}" for word in row) for row in words.tolist()])
    size = (num_pairs, 3, vision.image_pixels, vision.image_pixels)
    images = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    return Batch(tuple(str(number) for number in range(num_pairs)), images, ids, mask, special)


def forward_flops(stepper: Stepper) -> int:
    """Floating-point operations of a forward pass; backward costs twice as much."""
    torch.manual_seed(0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        stepper.plan()
    return counter.get_total_flops()


def plot(results: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    names = {"pairs": f"pairs of a batch ({TOKENS_OF_PAIRS} text tokens each)"}
    names["tokens"] = f"text tokens ({PAIRS_OF_TOKENS} pairs a batch)"
    for panel, (axis, result) in zip(panels, results.items(), strict=True):
        x = [int(value) for value in result["seconds"]]
        rows = list(result["seconds"].values())
        middle = [median(row) for row in rows]
        ends = [[m - min(row) for m, row in zip(middle, rows, strict=True)]]
        ends.append([max(row) - m for m, row in zip(middle, rows, strict=True)])
        panel.errorbar(x, middle, yerr=ends, fmt="o", capsize=3, label="median and range of the rounds")
        line = result["line"]
        straight = [line["intercept"] + line["slope"] * value for value in (0, x[-1])]
        label = f"{line['intercept']:.2f} s + {line['slope']:.3f} s x {axis}"
        panel.plot([0, x[-1]], straight, label=label)
        panel.set_xlabel(names[axis])
        panel.set_ylabel("seconds a step, forward to optimizer")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.legend(loc="lower right")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Seconds of a step against text length and number of pairs.")
    parser.add_argument("--model", choices=("base", "tiny"), default="base", help="a config of configs/model")
    parser.add_argument("overrides", nargs="*", help="of the model: model.vision.depth=6 ...")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one for each core")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--results", type=Path, default=here / "linear_cost.json", help="a PNG is written beside it")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    torch.set_num_threads(options.threads)
    console, device = Console(), torch.device(options.device)

    longest = [f"model.language.max_tokens={TOKENS[-1]}"]  # tiny encoders have as many positions
    module, tokenizer = build(options.model, [*longest, *options.overrides])
    module.to(device).train()
    optimizer = module.configure_optimizers()["optimizer"]
    shapes = {("pairs", count): (count, TOKENS_OF_PAIRS) for count in PAIRS}
    shapes |= {("tokens", count): (PAIRS_OF_TOKENS, count) for count in TOKENS}
    steppers = {}
    for (axis, count), shape in shapes.items():
        batch = make_batch(module, tokenizer, *shape)
        module.transfer_batch_to_device(batch, device, 0)
        steppers[f"{axis} {count}"] = Stepper(lambda batch=batch: module.losses_of(batch)["loss"], optimizer, device)
    flops = {name: forward_flops(stepper) for name, stepper in steppers.items()}
    steppers[f"pairs {PAIRS[0]}"].step()  # the optimizer's state is made here
    turns = take_turns(
        steppers,
        options.repeats,
        lambda turn: console.print(f"round {turn.round}: {turn.plan:12} {turn.seconds:8.3f} s", style="dim"),
    )
    results: dict[str, dict[str, Any]] = {}
    for axis, counts in {"pairs": PAIRS, "tokens": TOKENS}.items():
        seconds = {n: [turn.seconds for turn in turns if turn.plan == f"{axis} {n}"] for n in counts}
        operations = {n: flops[f"{axis} {n}"] / 1e9 for n in counts}
        line, count_line = fit({n: median(row) for n, row in seconds.items()}), fit(operations)
        results[axis] = {
            "seconds": seconds,
            "line": {name: round(getattr(line, name), 4) for name in line.__slots__},
            "gflops": {n: round(value, 3) for n, value in operations.items()},
            "gflops_line": {name: round(getattr(count_line, name), 4) for name in count_line.__slots__},
        }
        console.print(axis, results[axis]["line"], results[axis]["gflops_line"])
    result = {
        "command": shlex.join(["python", "experiments/step_speed/linear_cost.py", *given]),
        "machine": describe_machine(device),
        "model": [options.model, *options.overrides],
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        **results,
    }
    options.results.write_text(json.dumps(result, indent=1) + "\n")
    plot(results, options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
