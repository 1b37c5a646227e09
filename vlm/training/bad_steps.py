"""Steps whose loss is no number, or far above the steps before: the run stops with their keys, or leaves them out."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any, Literal, cast

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from vlm.errors import UserError
from vlm.types import Batch

FILE = "bad_steps.jsonl"
WINDOW = 100  # good steps that a spike is measured against
FEWEST = 20  # of them, before there can be a spike: the first losses of a run fall fast
NUM_SHOWN = 8  # keys in a message; the file has all


class BadSteps(Callback):
    """Looks at the loss of each optimizer step, over its micro-batches and all ranks, before its weights change.

    `skip`: the step leaves weights and moments as they are. It counts as a step all the same: its examples are used up
    and the schedule goes on. `bad_steps.jsonl` of the run's folder lists each with the keys of its batch.
    """

    def __init__(
        self, folder: Path, on_bad_loss: Literal["stop", "skip"], spike_factor: float | None, max_in_a_row: int
    ) -> None:
        self.file = folder / FILE
        self.on_bad_loss, self.spike_factor, self.max_in_a_row = on_bad_loss, spike_factor, max_in_a_row
        self.num_skipped, self.in_a_row = 0, 0
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._losses: list[Tensor] = []
        self._keys: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"num_skipped": self.num_skipped, "in_a_row": self.in_a_row, "recent": list(self._recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_skipped, self.in_a_row = int(state_dict["num_skipped"]), int(state_dict["in_a_row"])
        self._recent = deque(state_dict["recent"], maxlen=WINDOW)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._losses, self._keys = [], []
        self._keys += batch.keys

    def on_before_backward(self, trainer: lightning.Trainer, module: lightning.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        of_step = torch.stack(self._losses).sum()  # Lightning has divided each by their number
        loss = float(cast(Tensor, trainer.strategy.reduce(of_step, reduce_op="mean")))
        loss /= 1.0 if scaler is None else scaler.get_scale()
        reason = self._reason(loss)
        if reason is None:
            self.in_a_row = 0
            self._recent.append(loss)
        else:
            self._answer(trainer, loss, reason)
            _drop_gradients(optimizer, keep=scaler is not None)
        if self.on_bad_loss == "skip":
            module.log("train/skipped_steps", float(self.num_skipped), batch_size=len(self._keys))

    def _reason(self, loss: float) -> str | None:
        """What is wrong with a loss; None if nothing is."""
        if not math.isfinite(loss):
            return f"is {loss}"
        if self.spike_factor is None or len(self._recent) < FEWEST:
            return None
        median = statistics.median(self._recent)
        if loss <= self.spike_factor * median:
            return None
        return f"is {loss:.4g}, above {self.spike_factor:g} times the median of the steps before ({median:.4g})"

    def _answer(self, trainer: lightning.Trainer, loss: float, reason: str) -> None:
        step, keys = trainer.global_step, _of_all_ranks(self._keys)
        if trainer.is_global_zero:
            self._list({"step": step, "loss": str(loss), "keys": keys})
        more = f" and {len(keys) - NUM_SHOWN:,} more ({self.file} has all)" if len(keys) > NUM_SHOWN else ""
        what = f"step {step}: the loss {reason}. Its examples: {', '.join(keys[:NUM_SHOWN])}{more}"
        if self.on_bad_loss == "stop":
            raise UserError(f"{what}. Look at them, lower optimizer.learning_rate, or set trainer.on_bad_loss=skip")
        self.num_skipped, self.in_a_row = self.num_skipped + 1, self.in_a_row + 1
        if self.in_a_row > self.max_in_a_row:
            raise UserError(
                f"{what}. {self.max_in_a_row} steps before it were skipped in a row (trainer.max_skips_in_a_row): the "
                "weights themselves must be at fault. Lower optimizer.learning_rate, or clip (optimizer.clip_norm)"
            )

    def _list(self, row: dict[str, Any]) -> None:
        """Each step once, also where a resumed run meets it again."""
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        listed = [line for line in lines if line.endswith("}")]  # a kill may have cut off the last one
        if json.dumps(row) not in listed:
            self.file.write_text("".join(f"{line}\n" for line in [*listed, json.dumps(row)]), encoding="utf-8")


def _of_all_ranks(keys: list[str]) -> list[str]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return keys
    parts: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, keys)
    return [key for part in parts for key in part]


def _drop_gradients(optimizer: torch.optim.Optimizer, keep: bool) -> None:
    """No gradient, no step: AdamW passes over the parameter, its moments and its decay too.

    `keep`: a float16 scaler wants to see gradients; it skips the step of those that are no numbers, by itself.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if keep and parameter.grad is not None:
                parameter.grad.fill_(math.nan)
            else:
                parameter.grad = None
