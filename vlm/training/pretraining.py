"""Pretraining: any set of objectives over one shared encoding of each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from data_loaders.loader import step_seed
from vlm.models.vision_language import VisionLanguageModel
from vlm.objectives import DistillationConfig, WeightSchedule, weight_at
from vlm.objectives.distillation import MomentumTeacher
from vlm.objectives.objective import Objective
from vlm.training.module import TrainingModule
from vlm.training.optimizer import OptimizerConfig
from vlm.types import Batch, Loss, Source, View


class Pretraining(TrainingModule):
    """Sums the weighted objectives. Unimodal pretraining is the same module with unimodal objectives.

    The logs say where the texts of a step come from (`train/share/machine`). `is_mixture`: from several sources, whose
    losses are told apart too (`train/matching/loss/machine`). An objective without anything to predict has no entry.

    A weight may be a schedule, which is logged (`train/matching/weight`). While an objective weighs nothing in
    training, its view is made, so that others may build on it, but nothing is encoded for it and it has no loss.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        objectives: Mapping[str, Objective],
        weights: Mapping[str, float | WeightSchedule],
        optimizer: OptimizerConfig,
        num_steps: int,
        seed: int,
        is_mixture: bool = False,
        distillation: DistillationConfig | None = None,
    ) -> None:
        super().__init__(model, optimizer, num_steps, seed)
        self.is_mixture = is_mixture
        self.objectives = nn.ModuleDict(dict(objectives))
        self.weights = dict(weights)
        self.teacher: MomentumTeacher | None = None
        if distillation is not None:
            self.teacher = MomentumTeacher(distillation, model, dict(self._named()), num_steps)

    def losses_of(
        self,
        batch: Batch,
        by_source: bool = False,
        training: bool = False,
        share: Callable[[str, int], float] = lambda name, count: 1.0,
        step: int | None = None,
    ) -> dict[str, Tensor]:
        """Every objective's loss and figures by name, and `loss`, the weighted sum.

        `by_source` adds those figures for each source that the batch holds. While `training` an objective without
        anything to predict is left out; else it is 0, so that all ranks have the same names, and weighs nothing.
        `share`: a further factor in the sum, from an objective's name and the number of its items. `step` is what
        schedules go by; without one the weights are the final ones.
        """
        step = self.num_steps if step is None else step
        weights = {name: weight_at(weight, step / max(1, self.num_steps)) for name, weight in self.weights.items()}
        views = self.views_of(batch)
        if training:
            views = {name: view for name, view in views.items() if weights[name]}
        encoded = dict(zip(views, self.model.encode(batch.image, list(views.values())), strict=True))
        if training and self.teacher is not None:
            self.teacher.teach(batch.image, views, step)
        values: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device, requires_grad=not views)  # a step of weights of 0 changes nothing
        for name, objective in self._named():
            if training and isinstance(self.weights[name], WeightSchedule):
                values[f"{name}/weight"] = torch.tensor(weights[name], device=self.device)
            if name not in views:
                continue
            loss = objective.loss(views[name], encoded[name])
            if loss.count or not training:
                values[f"{name}/loss"] = loss.value
                values |= {f"{name}/{figure}": value for figure, value in loss.figures.items()}
            if by_source:
                values |= _by_source(name, loss, batch)
            total = total + weights[name] * share(name, loss.count) * loss.value
        return values | {"loss": total}

    def views_of(self, batch: Batch) -> dict[str, View]:
        """What each objective wants encoded, by its name."""
        views = {name: objective.view(batch) for name, objective in self._named()}
        return {name: objective.beside(views[name], views) for name, objective in self._named()}

    def items_of(self, batch: Batch) -> dict[str, int]:
        views = self.views_of(batch)
        return {name: objective.count(views[name]) for name, objective in self._named()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        is_logged = (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # a connector of Lightning sets it
        share, step = partial(self.share, batch_idx=batch_idx), self.trainer.global_step
        by_source = self.is_mixture and is_logged
        values = self.losses_of(batch, by_source, training=True, share=share, step=step)
        if is_logged and batch.sources:
            shares = {source: batch.sources.count(source) / len(batch.sources) for source in get_args(Source)}
            values |= {f"share/{source}": values["loss"].new_tensor(share) for source, share in shares.items()}
        self.log_train({name: value.detach() for name, value in values.items()}, len(batch.keys))
        return values["loss"]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The teacher follows before any checkpoint of this step is written."""
        super().optimizer_step(*args, **kwargs)
        if self.teacher is not None:
            self.teacher.follow(self.model, dict(self._named()))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same masks and negatives at every validation, whatever the step."""
        number = batch_idx * self.trainer.world_size + self.global_rank
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(step_seed(self.seed, number, "validation"))
            values = self.losses_of(batch)
        num_texts = sum(source != "none" for source in batch.sources)
        size = num_texts if batch.sources else len(batch.keys)
        self.log_dict({f"validation/{n}": value for n, value in values.items()}, batch_size=size, sync_dist=True)

    def _named(self) -> list[tuple[str, Objective]]:
        return list(self.objectives.items())  # type: ignore[arg-type]  # ModuleDict forgets the class


def _by_source(name: str, loss: Loss, batch: Batch) -> dict[str, Tensor]:
    """Means over the items of each source that has any."""
    if loss.items is None:
        return {}
    items, values = loss.items(), {}
    numbers = {source: number for number, source in enumerate(get_args(Source))}
    sources = torch.tensor([numbers[source] for source in batch.sources], device=items.row.device)[items.row]
    for source, number in numbers.items():
        mine = sources == number
        if mine.any():
            values[f"{name}/loss/{source}"] = items.loss[mine].mean()
            values[f"{name}/accuracy/{source}"] = items.correct[mine].float().mean()
    return values
