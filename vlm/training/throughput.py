"""How fast a run goes and what memory it takes, in its logs."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable
from typing import cast

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from vlm.types import Batch

GIB = 2**30

# Operations a second of one device in bfloat16 or float16, dense (the data sheets' larger numbers are for sparse
# matrices). Source: NVIDIA's data sheets of each product.
PEAK_FLOPS = {
    r"A100\b": 312e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"H100\b": 989e12,  # SXM, which calls itself "H100 80GB HBM3"
    r"H200\b": 989e12,
    r"L40S\b": 362e12,
    r"L40\b": 181e12,
    r"L4\b": 121e12,
    r"A10\b": 125e12,
    r"A40\b": 149.7e12,
}


def peak_flops(precision: str) -> float | None:
    """Of this machine's GPU in a 16-bit precision; None where nobody says."""
    if not torch.cuda.is_available() or "16" not in precision:
        return None
    name = torch.cuda.get_device_name()
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(rf"\b{pattern}", name)), None)


class Throughput(Callback):
    """Logs rates over all ranks since the last entry, validation left out, and the most memory of one device so far.

    `throughput/images_per_second`, `throughput/tokens_per_second` (real ones), `throughput/padding_fraction` (of the
    token places), `memory/peak_gib` (allocated on a GPU, else resident). With `peak` also
    `throughput/model_flop_utilisation`: the operations of the model, counted once for texts of the mean length
    (`flops_of_example`), over what the devices could do in the time. Recomputed activations are no work of the model.
    """

    def __init__(self, batch_size: int, peak: float | None, flops_of_example: Callable[[int], float]) -> None:
        self.batch_size, self.peak, self.flops_of_example = batch_size, peak, flops_of_example
        self.flops: float | None = None
        self.start: float | None = None  # of the interval; the first step warms up and belongs to none
        self._step, self._paused, self._validation_start = 0, 0.0, 0.0
        self._counts: Tensor | None = None  # images, real tokens, places for tokens, texts; on the device until asked
        self._encoded = False

    def on_train_start(self, trainer: lightning.Trainer, *_: object) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self._counts is None:
            self._counts = torch.zeros(4, dtype=torch.int64, device=module.device)
        if batch.image is not None:
            self._counts[0] += len(batch.image)
            self._encoded |= batch.image.is_floating_point()
        if batch.text_mask is not None:
            self._counts[1] += batch.text_mask.sum()
            self._counts[2] += batch.text_mask.numel()
            self._counts[3] += len(batch.text_mask)

    def on_validation_start(self, *_: object) -> None:
        self._validation_start = time.monotonic()

    def on_validation_end(self, *_: object) -> None:
        self._paused += time.monotonic() - self._validation_start

    def on_train_batch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: object) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # an optimizer step is not yet whole
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector of Lightning sets it
        if self.start is None:
            self._begin(step)
        elif step % every == 0:
            self._log(trainer, step)
            self._begin(step)

    def _begin(self, step: int) -> None:
        self._step, self._counts, self._paused = step, None, 0.0
        self.start = time.monotonic()

    def _log(self, trainer: lightning.Trainer, step: int) -> None:
        assert self._counts is not None and self.start is not None
        counts = cast(Tensor, trainer.strategy.reduce(self._counts, reduce_op="sum")).tolist()
        seconds = time.monotonic() - self.start - self._paused  # once the device has answered
        if not trainer.is_global_zero or trainer.logger is None:
            return
        images, tokens, places, texts = counts
        values = {"memory/peak_gib": peak_gib(trainer.strategy.root_device)}
        if images:
            values["throughput/images_per_second"] = images / seconds
        if texts:
            values["throughput/tokens_per_second"] = tokens / seconds
            values["throughput/padding_fraction"] = 1 - tokens / places
        if self.peak is not None and not self._encoded:  # states from memory spare what would be counted
            if self.flops is None:
                self.flops = self.flops_of_example(round(tokens / texts) if texts else 0)
            done = self.flops * self.batch_size * (step - self._step)
            values["throughput/model_flop_utilisation"] = done / (seconds * trainer.world_size * self.peak)
        trainer.logger.log_metrics(values, step=step)


def peak_gib(device: torch.device) -> float:
    """The most memory that was allocated on a GPU, or that this process had in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
