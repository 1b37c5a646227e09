"""Lightning's Trainer as a run's config asks for it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from vlm.errors import UserError
from vlm.objectives import WeightSchedule
from vlm.training.averaging import AveragedWeights, BestAverage
from vlm.training.bad_steps import BadSteps
from vlm.training.damage import DamagedExamples
from vlm.training.throughput import Throughput, peak_flops

if TYPE_CHECKING:
    from vlm.run import RunConfig


EXPECTED_WARNINGS = (
    "Checkpoint directory .* exists and is not empty",  # it is the run's folder, which holds its config
    "The 'train_dataloader' does not have many workers",  # data.num_workers says how many; tiny images need none
    "The 'val_dataloader' does not have many workers",
    ".isinstance.treespec, LeafSpec.. is deprecated",  # inside Lightning, with newer torch
    "You're resuming from a checkpoint that ended before the epoch ended",  # our loader starts at the right batch
    "Found .* module.s. in eval mode at the start of training",  # frozen encoders are to be
    "The .srun. command is available on your system but is not used",  # a study on a login node
    "The number of training batches .* is smaller than the logging interval",
)


def quiet_lightning() -> None:
    """Hide what Lightning says of things that are as they should be, and its advertisements."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all, however the process dies."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        partial = f"{path}.partial"
        super().save_checkpoint(checkpoint, partial, storage_options)
        os.replace(partial, path)


def build_trainer(config: RunConfig, num_steps: int, flops_of_example: Callable[[int], float]) -> lightning.Trainer:
    """A Trainer for `num_steps` optimizer steps that logs to TensorBoard and keeps the last and best checkpoints.

    `flops_of_example`: the operations that training on one example takes, by the tokens of its text.
    """
    quiet_lightning()
    options, folder = config.trainer, config.run_folder
    validate_every = min(options.validate_every_steps or num_steps, num_steps) or 1
    precision = options.precision
    if precision == "auto":
        precision = "bf16-mixed" if torch.cuda.is_available() and options.accelerator != "cpu" else "32-true"
    callbacks: list[Callback] = [DamagedExamples(folder)] if config.data.damaged == "skip" else []
    callbacks.append(BadSteps(folder, options.on_bad_loss, options.spike_factor, options.max_skips_in_a_row))
    peak = options.peak_flops or peak_flops(precision)
    callbacks.append(Throughput(options.batch_size, peak, flops_of_example))
    average = None
    if options.averages:
        last, every = options.average_last or 1, options.average_every_steps
        average = AveragedWeights(num_steps, options.ema_decay, last, every)
        callbacks.append(average)
    if options.select == "best":
        monitor, mode = ("validation/loss", "min") if config.task is None else ("validation/accuracy", "max")
        best: dict[str, Any] = {
            "dirpath": folder,
            "filename": "best",
            "monitor": monitor,
            "mode": mode,
            "save_weights_only": True,
            "enable_version_counter": False,
        }
        callbacks.append(ModelCheckpoint(**best) if average is None else BestAverage(average, **best))
    # After the best one, so that its state in `last.ckpt` knows the validation of the same step.
    save = options.checkpoint_every_steps, validate_every, options.keep_every_steps
    callbacks.append(_SaveLast(folder / "last.ckpt", *save))
    callbacks.append(TellProgress(folder / "progress.json", num_steps, options.batch_size))
    if options.progress:
        callbacks.append(TQDMProgressBar(refresh_rate=5))
    strategy = options.strategy
    if strategy == "ddp" and not _uses_all(config):
        strategy = "ddp_find_unused_parameters_true"
    try:
        return lightning.Trainer(
            default_root_dir=folder,
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy=strategy,
            precision=precision,
            max_steps=num_steps,
            max_epochs=1,  # the loader is one long pass; shuffled passes over the data are its affair
            accumulate_grad_batches=options.accumulate,
            gradient_clip_val=config.optimizer.clip_norm,
            val_check_interval=validate_every * options.accumulate,
            num_sanity_val_steps=0,
            log_every_n_steps=min(options.log_every_steps, max(num_steps, 1)),
            logger=_Logger(folder, name="", version=""),
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            enable_progress_bar=options.progress,
            enable_model_summary=False,
        )
    # Which accelerators and strategies there are is Lightning's own affair, and the machine's.
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from None


class _Logger(TensorBoardLogger):
    """TensorBoard without the `epoch` that Lightning adds to every entry: steps are what is counted here."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


class _SaveLast(Checkpoint):
    """Saves `last.ckpt` every so many steps and at the end, after the validation of that step where one is due.

    Saved before it, a run killed in between would skip that validation, and could hand on another best checkpoint.
    With `keep_every` that of each so many steps stays as `step-00000100.ckpt`.
    """

    def __init__(self, file: Path, every_steps: int, validate_every: int, keep_every: int | None = None) -> None:
        self.file, self.every_steps, self.validate_every = file, every_steps, validate_every
        self.keep_every = keep_every
        self.saved = 0

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.saved = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step != self.saved and (step % self.every_steps == 0 or self._keeps(step)) and step % self.validate_every:
            self._save(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step // self.every_steps > self.saved // self.every_steps or (step != self.saved and self._keeps(step)):
            self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step != self.saved:
            self._save(trainer)

    def _keeps(self, step: int) -> bool:
        return self.keep_every is not None and step % self.keep_every == 0

    def _save(self, trainer: lightning.Trainer) -> None:
        step = trainer.global_step
        trainer.save_checkpoint(self.file)
        if self._keeps(step) and trainer.is_global_zero:
            partial = self.file.with_name(f"step-{step:08}.partial")
            shutil.copyfile(self.file, partial)
            os.replace(partial, partial.with_suffix(".ckpt"))
        self.saved = step


class TellProgress(Callback):
    """Writes the step and the rate into a small file now and then, for who watches many runs at once."""

    every_seconds = 2.0
    examples_per_second: float | None = None  # over the whole training; None before its second step

    def __init__(self, file: Path, num_steps: int, batch_size: int) -> None:
        self.file, self.num_steps, self.batch_size = file, num_steps, batch_size
        self.first: tuple[int, float] | None = None
        self.told: tuple[int, float] | None = None

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        now, step = time.monotonic(), trainer.global_step
        self.first, self.told = self.first or (step, now), self.told or (step, now)
        if step > self.first[0]:
            seconds = now - self.first[1]
            self.examples_per_second = round((step - self.first[0]) * self.batch_size / seconds, 1)
        before, then = self.told
        if now - then < self.every_seconds or not trainer.is_global_zero:
            return
        self.told = step, now
        rate = round((step - before) * self.batch_size / (now - then), 1)
        told = {"step": step, "steps": self.num_steps, "batch_size": self.batch_size, "examples_per_second": rate}
        with contextlib.suppress(OSError):  # a full disk stops a run where it must write, not here
            partial = self.file.with_name(f".{self.file.name}")
            partial.write_text(json.dumps(told))
            partial.replace(self.file)


def _uses_all(config: RunConfig) -> bool:
    """Whether every parameter gets a gradient each step; DDP must know where some do not."""
    if config.task is not None:
        return True
    weights = [objective.weight for objective in config.objectives.values()]
    is_constant = all(weight and not isinstance(weight, WeightSchedule) for weight in weights)
    return is_constant and any(objective.type == "matching" for objective in config.objectives.values())
