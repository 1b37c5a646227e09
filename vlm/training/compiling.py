"""Compiles the repeated blocks of a model, each region alone, and goes on without where that is not possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from torch import fx, nn


def compile_blocks(model: nn.Module, tell: Callable[[str], None] | None = None) -> int:
    """Compile the blocks of all parts (both encoders, the fusion) in place, and return how many there are.

    Blocks that are alike share their code, so that the time does not grow with depth. Names of parameters stay as they
    are. Dropout draws what it draws without compilation: the numbers differ by rounding alone. What the compiler
    cannot do, for lack of a C++ compiler say, runs as before, and `tell` gets one line about it.
    """
    backend = _Inductor(tell or _tell)
    blocks = [block for part in model.children() for block in repeated_blocks(part)]
    for block in blocks:
        block.compile(backend=backend)
    return len(blocks)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks that a module names, else the members of its outermost lists."""
    if (named := getattr(module, "blocks", None)) is not None:
        return list(named)
    blocks: list[nn.Module] = []
    for child in module.children():
        blocks += child if isinstance(child, nn.ModuleList) else repeated_blocks(child)
    return blocks


class _Inductor:
    """Torch's own compiler; a graph that it refuses is run as it is."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.refused = False

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if not self.refused:
            try:
                from torch._inductor.compile_fx import compile_fx

                compiled: Any = compile_fx(graph, inputs, config_patches={"fallback_random": True})
                return compiled  # type: ignore[no-any-return]  # the compiler has several kinds of results
            except Exception as error:  # it has a class of its own for each thing that may be missing
                self.refused = True
                reason = " ".join(str(error).split())[:200]
                self.tell(f"trainer.compile: blocks run uncompiled ({type(error).__name__}: {reason})")
        return graph.forward


def _tell(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)
