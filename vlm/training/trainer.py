"""Lightning's Trainer as a run's config asks for it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

if TYPE_CHECKING:
    from vlm.run import RunConfig


EXPECTED_WARNINGS = (
    "Checkpoint directory .* exists and is not empty",  # it is the run's folder, which holds its config
    "The 'train_dataloader' does not have many workers",  # data.num_workers says how many; tiny images need none
    "The 'val_dataloader' does not have many workers",
    ".isinstance.treespec, LeafSpec.. is deprecated",  # inside Lightning, with newer torch
    "You're resuming from a checkpoint that ended before the epoch ended",  # our loader starts at the right batch
    "Found .* module.s. in eval mode at the start of training",  # frozen encoders are to be
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


def build_trainer(config: RunConfig, num_steps: int) -> lightning.Trainer:
    """A Trainer for `num_steps` optimizer steps that logs to TensorBoard and keeps the last and best checkpoints."""
    quiet_lightning()
    options, folder = config.trainer, config.run_folder
    validate_every = min(options.validate_every_steps or num_steps, num_steps) or 1
    precision = options.precision
    if precision == "auto":
        precision = "bf16-mixed" if torch.cuda.is_available() and options.accelerator != "cpu" else "32-true"
    callbacks: list[Callback] = [
        ModelCheckpoint(
            dirpath=folder,
            filename="last",
            every_n_train_steps=min(options.checkpoint_every_steps, max(num_steps, 1)),
            enable_version_counter=False,
        ),
    ]
    if num_steps % min(options.checkpoint_every_steps, max(num_steps, 1)):
        callbacks.append(_SaveLast(folder / "last.ckpt"))
    if options.select == "best":
        monitor, mode = ("validation/loss", "min") if config.task is None else ("validation/accuracy", "max")
        callbacks.append(
            ModelCheckpoint(
                dirpath=folder,
                filename="best",
                monitor=monitor,
                mode=mode,
                save_weights_only=True,
                enable_version_counter=False,
            )
        )
    if options.progress:
        callbacks.append(TQDMProgressBar(refresh_rate=5))
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=options.strategy,
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


class _Logger(TensorBoardLogger):
    """TensorBoard without the `epoch` that Lightning adds to every entry: steps are what is counted here."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


class _SaveLast(Callback):
    """Saves `last.ckpt` at the last step too, where the interval does not fall on it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.save_checkpoint(self.file)
