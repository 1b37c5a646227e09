"""Momentum distillation: a slow copy of the model gives the objectives soft targets."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vlm.models.vision_language import VisionLanguageModel
from vlm.objectives.objective import Objective
from vlm.types import View

if TYPE_CHECKING:
    from vlm.objectives import DistillationConfig


class MomentumTeacher(nn.Module):
    """Moving averages of the model and of the objectives that distil, in evaluation mode and without gradient.

    Source: ALBEF, arXiv 2107.07651, section 3.3, but for two things. The teacher has no dropout, and contrast stays
    within the batch: there is no queue of earlier texts and images. A step costs one forward pass more over the views
    of these objectives; frozen encoders are shared, not copied.
    """

    def __init__(
        self,
        config: DistillationConfig,
        model: VisionLanguageModel,
        objectives: Mapping[str, Objective],
        num_steps: int,
    ) -> None:
        super().__init__()
        self.config, self.num_steps = config, num_steps
        shared = {id(part): part for part in (getattr(model, name) for name in model.frozen)}
        self.model = copy.deepcopy(model, dict(shared))
        chosen = {name: objective for name, objective in objectives.items() if objective.distils}
        self.objectives = nn.ModuleDict({name: copy.deepcopy(objective) for name, objective in chosen.items()})
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> MomentumTeacher:
        """Always in evaluation mode."""
        return super().train(False)

    def alpha(self, step: int) -> float:
        """The weight of the soft targets, which rises from 0 over the first steps."""
        ramp = self.config.ramp_fraction * self.num_steps
        return self.config.alpha * (min(1.0, step / ramp) if ramp else 1.0)

    @torch.no_grad()
    def teach(
        self, image: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b p dv"] | None, views: Mapping[str, View], step: int
    ) -> None:
        """Put soft targets and their weight into the views of the objectives that distil."""
        alpha, mine = self.alpha(step), {name: view for name, view in views.items() if name in self.objectives}
        if not alpha or not mine:
            return
        for (name, view), encoded in zip(mine.items(), self.model.encode(image, list(mine.values())), strict=True):
            soft = cast(Objective, self.objectives[name]).teach(view, encoded)
            view.targets |= soft | {"alpha": torch.tensor(alpha)}

    @torch.no_grad()
    def follow(self, model: VisionLanguageModel, objectives: Mapping[str, Any]) -> None:
        """One step towards the weights as they are now; moving statistics are taken over."""
        pairs = [(self.model, model), *((copied, objectives[name]) for name, copied in self.objectives.items())]
        for own, other in pairs:
            for slow, fast in zip(own.parameters(), other.parameters(), strict=True):
                if fast.requires_grad:
                    slow.lerp_(fast, 1 - self.config.momentum)
            for average, current in zip(own.buffers(), other.buffers(), strict=True):
                average.copy_(current)
