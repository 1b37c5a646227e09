"""AdamW with a learning rate a component, and the schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from vlm.config import Config
from vlm.models.adaptation import Depth

Beta = Annotated[float, Field(ge=0, lt=1)]


class Multipliers(Config):
    """Factors on the learning rate of each component. Defaults: the reference paper's pretraining."""

    encoders: NonNegativeFloat = 1.0
    fusion: NonNegativeFloat = 5.0  # the projections and the pooler too
    heads: NonNegativeFloat = 5.0


class OptimizerConfig(Config):
    """AdamW and its schedule. Defaults: the reference paper's pretraining (arXiv 2211.00262, appendix).

    `decay=cooldown` is constant until the last `cooldown_fraction` of the steps, and falls there as 1 - sqrt (Haegele
    et al., arXiv 2405.18392). Runs of many budgets then share their beginning: `continue_from`.
    """

    learning_rate: PositiveFloat = 1e-4
    multipliers: Multipliers = Multipliers()
    # Each block of an encoder learns at so many times the rate of the block after it, the embeddings slowest. 1: no
    # decay. The rule is BEiT's (arXiv 2106.08254) and timm's; 0.65 to 0.9 are usual.
    layer_decay: float = Field(1.0, gt=0, le=1)
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    weight_decay: NonNegativeFloat = 0.01
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    warmup_steps: NonNegativeInt | None = None  # in place of the fraction: the same whatever the budget
    decay: Literal["linear", "cosine", "cooldown", "none"] = "linear"
    cooldown_fraction: float = Field(0.2, ge=0, le=1)
    clip_norm: PositiveFloat | None = None

    def rate_factor(self, num_steps: int) -> Callable[[int], float]:
        """Step -> factor on every learning rate: linear warm-up to 1, then `decay` to 0 at `num_steps`."""
        warmup, warms_up = max(1, round(self.warmup_fraction * num_steps)), self.warmup_fraction > 0
        if self.warmup_steps is not None:
            warmup, warms_up = self.warmup_steps, self.warmup_steps > 0
        cooldown = round(self.cooldown_fraction * num_steps)

        def factor(step: int) -> float:
            if step < warmup and warms_up:
                return (step + 1) / (warmup + 1)
            if self.decay == "none":
                return 1.0
            if self.decay == "cooldown":
                gone = (step - (num_steps - cooldown)) / max(1, cooldown)
                return 1.0 - math.sqrt(min(max(gone, 0.0), 1.0))
            left = max(0.0, (num_steps - step) / max(1, num_steps - warmup))
            return left if self.decay == "linear" else (1 - math.cos(math.pi * min(left, 1.0))) / 2

        return factor

    def parameter_groups(
        self, named: Iterable[tuple[str, Any]], decaying: frozenset[str], depths: Mapping[str, Depth] | None = None
    ) -> list[dict[str, Any]]:
        """Groups by component and by decay, which the `decaying` names have. Frozen parameters are left out.

        `named` are the training module's: `model.vision...`, `model.language...`, `model....`, heads elsewhere.
        `depths` of the encoders' parameters, by the same names, are for `layer_decay`: each depth has its own groups.
        """
        depths = depths if depths is not None and self.layer_decay != 1 else {}
        groups: dict[tuple[str, bool], list[Any]] = defaultdict(list)
        rates: dict[str, float] = {}
        for name, parameter in named:
            if parameter.requires_grad:
                component, depth = component_of(name), depths.get(name)
                group = component if depth is None else str(depth)
                groups[group, name in decaying].append(parameter)
                factor = 1.0 if depth is None else self.layer_decay**depth.below_top
                rates[group] = self.learning_rate * getattr(self.multipliers, component) * factor
        return [
            {
                "params": parameters,
                "lr": rates[group],
                "weight_decay": self.weight_decay if decays else 0.0,
                "name": group if decays else f"{group}/no_decay",
            }
            for (group, decays), parameters in sorted(groups.items())
        ]


def matrices(named: Iterable[tuple[str, Any]]) -> frozenset[str]:
    """Names of the parameters that weight decay is for: no norms, biases, other vectors, nor positions."""
    return frozenset(name for name, parameter in named if parameter.ndim > 1 and "position" not in name)


def component_of(name: str) -> Literal["encoders", "fusion", "heads"]:
    """The component that a parameter of a training module belongs to, from its name."""
    if name.startswith(("model.vision.", "model.language.")):
        return "encoders"
    return "fusion" if name.startswith("model.") else "heads"
