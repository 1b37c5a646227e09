"""What pretraining and fine-tuning share as LightningModules: seeding by step, optimizer, logging."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor

from data_loaders.loader import step_seed
from vlm.models.vision_language import VisionLanguageModel
from vlm.training.optimizer import OptimizerConfig, matrices
from vlm.types import Batch


class TrainingModule(lightning.LightningModule):
    """A model, an optimizer config and a seed.

    Every micro-batch seeds torch by (seed, its number over all ranks), so dropout, masks and negatives are the same
    after a restart, and the same on two ranks as with twice the accumulation on one.
    """

    def __init__(self, model: VisionLanguageModel, optimizer: OptimizerConfig, num_steps: int, seed: int) -> None:
        super().__init__()
        self.model = model
        self.optimizer_config = optimizer
        self.num_steps = num_steps
        self.seed = seed
        self.decaying: frozenset[str] = frozenset()
        self.fused = True

    def setup(self, stage: str) -> None:
        """What a sharding strategy hides later: which parameters are matrices."""
        self.decaying = matrices(self.named_parameters())
        # Under mixed precision Lightning cannot clip for an optimizer that is fused.
        self.fused = self.optimizer_config.clip_norm is None or "mixed" not in str(self.trainer.precision)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(step_seed(self.seed, batch_idx * self.trainer.world_size + self.global_rank, "step"))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        for name in ("image", "text_ids", "text_mask", "special_mask", "label_tokens", "targets"):
            value = getattr(batch, name)
            if isinstance(value, Tensor):
                setattr(batch, name, value.to(device, non_blocking=True))
        return batch

    def configure_optimizers(self) -> Any:
        decaying = self.decaying or matrices(self.named_parameters())
        groups = self.optimizer_config.parameter_groups(self.named_parameters(), decaying)
        optimizer = torch.optim.AdamW(groups, betas=self.optimizer_config.betas, fused=self.fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.optimizer_config.rate_factor(self.num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def log_train(self, values: dict[str, Tensor], batch_size: int) -> None:
        """Scalars under `train/`, the rate of each component, and the loss on the progress bar."""
        self.log("loss", values["loss"], prog_bar=True, logger=False, batch_size=batch_size)
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=batch_size)
        groups = self.trainer.optimizers[0].param_groups
        rates = {f"learning_rate/{g['name']}": g["lr"] for g in groups if not g["name"].endswith("/no_decay")}
        self.log_dict(rates, batch_size=batch_size)
