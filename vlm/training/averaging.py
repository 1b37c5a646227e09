"""Averages of the weights over the steps of a run, which are what the run is validated by and hands on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedWeights(WeightAveraging):
    """An exponential moving average (`decay`), or the plain mean of the weights at the last few of every so many steps.

    Lightning's averaging, with these departures. Checkpoints hold the average as `state_dict` and the weights that
    learn as `current_model_state`, the one of the last step too, so that any of them can be continued. As long as there
    is no average, the weights themselves stand for it. Buffers are copied: the mean of integers would be none.
    """

    def __init__(self, num_steps: int, decay: float | None = None, last: int = 1, every_steps: int = 1) -> None:
        average = {} if decay is None else {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
        super().__init__(use_buffers=False, **average)
        self.num_steps, self.decay, self.last, self.every_steps = num_steps, decay, last, every_steps

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is None:
            return False
        left = self.num_steps - (step_idx + 1)
        return self.decay is not None or (left % self.every_steps == 0 and left // self.every_steps < self.last)

    @property
    def is_there(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged > 0)

    @contextmanager
    def in_place(self, module: lightning.LightningModule) -> Iterator[None]:
        """The module with the average for weights."""
        if not self.is_there:
            yield
            return
        self._swap_models(module)
        try:
            yield
        finally:
            self._swap_models(module)

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.is_there:
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.is_there:
            super().on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Nothing: `last.ckpt` is still to be saved, with both."""

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.is_there:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if "averaging_state" in checkpoint:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


class BestAverage(ModelCheckpoint):
    """The best checkpoint of a run whose average is what is validated."""

    def __init__(self, average: AveragedWeights, **options: Any) -> None:
        super().__init__(**options)
        self.average = average

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        with self.average.in_place(pl_module):  # Lightning asks no callback what a checkpoint of weights alone holds
            super().on_validation_end(trainer, pl_module)
