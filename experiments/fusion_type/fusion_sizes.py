"""Parameters and time of every fusion side by side, each at the depth that is as large as a co-attention's.

Each round takes all fusions in turn, the order reversed every other round, and a fusion's time is the median over
rounds of one forward and backward pass in training, dropout included, over random states of one size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn

from vlm.models.fusion import (
    BridgesConfig,
    CoAttentionConfig,
    CrossAttentionConfig,
    LateConfig,
    MergedConfig,
    NoFusionConfig,
    PerceiverConfig,
    QFormerConfig,
)
from vlm.parameter_counts import as_large_as, fusion_parameters


def fusions(width: int, depth: int) -> dict[str, tuple[str, nn.Module, int]]:
    """By name: the depth as shown, the module and its parameters. The first is the reference."""
    heads = width // 64
    reference = CoAttentionConfig(width=width, depth=depth, num_heads=heads)
    found = {"coattention": reference}
    for name, config in {
        "merged": MergedConfig(width=width, num_heads=heads),
        "cross_attention": CrossAttentionConfig(width=width, num_heads=heads),
        "bridges": BridgesConfig(width=width, num_heads=heads),
        "qformer": QFormerConfig(width=width, num_heads=heads),
        "perceiver": PerceiverConfig(width=width, num_heads=heads),
        "perceiver, merged": PerceiverConfig(width=width, num_heads=heads, reader="merged"),
        "late": LateConfig(width=width),
    }.items():
        found[name] = as_large_as(config, reference)
    shown = {}
    for name, config in (found | {"none": NoFusionConfig(width=width)}).items():
        extra = f"{config.resampler_depth} + " if isinstance(config, PerceiverConfig) else ""
        shown[name] = f"{extra}{getattr(config, 'depth', 0)}", config.build(), fusion_parameters(config)
    return shown


def seconds(fusion: nn.Module, batch_size: int, patches: int, tokens: int) -> float:
    layers = [fusion.num_encoder_layers] if hasattr(fusion, "num_encoder_layers") else []
    width = int(fusion.width)  # type: ignore[call-overload]
    image = torch.randn(batch_size, *layers, patches, width, requires_grad=True)
    text = torch.randn(batch_size, *layers, tokens, width, requires_grad=True)
    start = time.perf_counter()
    states: tuple[Tensor, Tensor] = fusion(image, text, torch.ones(batch_size, tokens, dtype=torch.bool))
    torch.stack([part.square().mean() for part in states]).sum().backward()
    fusion.zero_grad()
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Parameters and time of every fusion, as large as a co-attention.")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=2, help="of the co-attention that the others are as large as")
    parser.add_argument("--patches", type=int, default=197)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one that warms up")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    shown = fusions(options.width, options.depth)
    taken: dict[str, list[float]] = {name: [] for name in shown}
    for number in range(options.repeats + 1):
        for name in list(shown)[:: 1 if number % 2 else -1]:
            spent = seconds(shown[name][1], options.batch_size, options.patches, options.tokens)
            if number:
                taken[name].append(spent)
    first = next(iter(shown))
    print("| fusion | depth | parameters | of co-attention's | ms a pair | of co-attention's |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, (depth, _, parameters) in shown.items():
        milliseconds, reference = (1000 * median(taken[one]) / options.batch_size for one in (name, first))
        size = parameters / shown[first][2]
        print(
            f"| {name} | {depth} | {parameters:,} | {size:.2f} | {milliseconds:.1f} | {milliseconds / reference:.2f} |"
        )


if __name__ == "__main__":
    main()
