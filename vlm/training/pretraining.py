"""Pretraining: any set of objectives over one shared encoding of each batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from data_loaders.loader import step_seed
from vlm.models.vision_language import VisionLanguageModel
from vlm.objectives.objective import Objective
from vlm.training.module import TrainingModule
from vlm.training.optimizer import OptimizerConfig
from vlm.types import Batch


class Pretraining(TrainingModule):
    """Sums the weighted objectives. Unimodal pretraining is the same module with unimodal objectives."""

    def __init__(
        self,
        model: VisionLanguageModel,
        objectives: Mapping[str, Objective],
        weights: Mapping[str, float],
        optimizer: OptimizerConfig,
        num_steps: int,
        seed: int,
    ) -> None:
        super().__init__(model, optimizer, num_steps, seed)
        self.objectives = nn.ModuleDict(dict(objectives))
        self.weights = dict(weights)

    def losses_of(self, batch: Batch) -> dict[str, Tensor]:
        """Every objective's loss and figures by name, and `loss`, the weighted sum."""
        views = {name: objective.view(batch) for name, objective in self._named()}
        encoded = self.model.encode(batch.image, list(views.values()))
        values: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        for (name, objective), states in zip(self._named(), encoded, strict=True):
            loss = objective.loss(views[name], states)
            values[f"{name}/loss"] = loss.value
            values |= {f"{name}/{figure}": value for figure, value in loss.figures.items()}
            total = total + self.weights[name] * loss.value
        return values | {"loss": total}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        values = self.losses_of(batch)
        self.log_train({name: value.detach() for name, value in values.items()}, len(batch.keys))
        return values["loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same masks and negatives at every validation, whatever the step."""
        number = batch_idx * self.trainer.world_size + self.global_rank
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(step_seed(self.seed, number, "validation"))
            values = self.losses_of(batch)
        size = len(batch.keys)
        self.log_dict({f"validation/{n}": value for n, value in values.items()}, batch_size=size, sync_dist=True)

    def _named(self) -> list[tuple[str, Objective]]:
        return list(self.objectives.items())  # type: ignore[arg-type]  # ModuleDict forgets the class
