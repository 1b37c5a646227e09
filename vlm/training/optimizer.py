"""AdamW with a learning rate a component, and the schedule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from vlm.config import Config

Beta = Annotated[float, Field(ge=0, lt=1)]


class Multipliers(Config):
    """Factors on the learning rate of each component. Defaults: the reference paper's pretraining."""

    encoders: NonNegativeFloat = 1.0
    fusion: NonNegativeFloat = 5.0  # the projections and the pooler too
    heads: NonNegativeFloat = 5.0


class OptimizerConfig(Config):
    """AdamW and its schedule. Defaults: the reference paper's pretraining (arXiv 2211.00262, appendix)."""

    learning_rate: PositiveFloat = 1e-4
    multipliers: Multipliers = Multipliers()
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    weight_decay: NonNegativeFloat = 0.01
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    decay: Literal["linear", "none"] = "linear"
    clip_norm: PositiveFloat | None = None

    def rate_factor(self, num_steps: int) -> Callable[[int], float]:
        """Step -> factor on every learning rate: linear warm-up to 1, then linear decay to 0 at `num_steps`."""
        warmup = max(1, round(self.warmup_fraction * num_steps))

        def factor(step: int) -> float:
            if step < warmup and self.warmup_fraction > 0:
                return (step + 1) / (warmup + 1)
            if self.decay == "none":
                return 1.0
            return max(0.0, (num_steps - step) / max(1, num_steps - warmup))

        return factor

    def parameter_groups(self, named: Iterable[tuple[str, Any]], decaying: frozenset[str]) -> list[dict[str, Any]]:
        """Groups by component and by decay, which the `decaying` names have. Frozen parameters are left out.

        `named` are the training module's: `model.vision...`, `model.language...`, `model....`, heads elsewhere.
        """
        groups: dict[tuple[str, bool], list[Any]] = defaultdict(list)
        for name, parameter in named:
            if parameter.requires_grad:
                groups[component_of(name), name in decaying].append(parameter)
        return [
            {
                "params": parameters,
                "lr": self.learning_rate * getattr(self.multipliers, component),
                "weight_decay": self.weight_decay if decays else 0.0,
                "name": component if decays else f"{component}/no_decay",
            }
            for (component, decays), parameters in sorted(groups.items())
        ]


def matrices(named: Iterable[tuple[str, Any]]) -> frozenset[str]:
    """Names of the parameters that weight decay is for: no norms, biases, other vectors, nor positions."""
    return frozenset(name for name, parameter in named if parameter.ndim > 1 and "position" not in name)


def component_of(name: str) -> Literal["encoders", "fusion", "heads"]:
    """The component that a parameter of a training module belongs to, from its name."""
    if name.startswith(("model.vision.", "model.language.")):
        return "encoders"
    return "fusion" if name.startswith("model.") else "heads"
