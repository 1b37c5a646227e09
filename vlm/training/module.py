"""What pretraining and fine-tuning share as LightningModules: seeding by step, optimizer, logging."""

from __future__ import annotations

from typing import Any, cast

import lightning
import torch
from torch import Tensor

from data_loaders.loader import step_seed
from vlm.models.adaptation import Depth
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
        self.by_items = False  # whether the micro-batches of a step weigh as much as they have items
        self._items: list[dict[str, int]] = []  # of the step's micro-batches on this rank, for each loss
        self._items_of_step: dict[str, int] = {}  # of all ranks
        self.depths: dict[str, Depth] = {}

    def setup(self, stage: str) -> None:
        """What a sharding strategy hides later: which parameters are matrices, and how deep they lie."""
        self.decaying = matrices(self.named_parameters())
        if self.optimizer_config.layer_decay != 1:
            self.depths = {f"model.{name}": depth for name, depth in self.model.depths().items()}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.by_items and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._count_items(batch, batch_idx)
        self._seed(batch_idx)

    def _seed(self, batch_idx: int) -> None:
        torch.manual_seed(step_seed(self.seed, batch_idx * self.trainer.world_size + self.global_rank, "step"))

    def items_of(self, batch: Batch) -> dict[str, int]:
        """How many items each loss of this micro-batch is the mean of, with the draws that its training step makes."""
        raise NotImplementedError

    def share(self, name: str, count: int, batch_idx: int) -> float:
        """The factor on a loss that is the mean over `count` items of this micro-batch.

        With `by_items` the gradient of a step is then that of the mean over all items of its micro-batches on all
        ranks, as in one large batch. Otherwise 1: the mean of the micro-batches' means.
        """
        if not self.by_items:
            return 1.0
        micro_batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
        counted, of_step = self._items[batch_idx % len(self._items)][name], self._items_of_step[name]
        if count != counted:
            raise ValueError(f"{name}: a loss over {count} items, of which count() had said that they are {counted}")
        # Lightning divides by the accumulation, DDP by the ranks.
        return count * micro_batches / of_step if of_step else 0.0

    def _count_items(self, first: Batch, batch_idx: int) -> None:
        """Items of the whole step, before its first loss: gradients of several losses cannot be told apart after it.

        The masks of every micro-batch are drawn here and, from the same seed, again in its own step.
        """
        batches = (first, *first.later)
        if len(batches) != self.trainer.accumulate_grad_batches:
            raise ValueError(f"{len(batches)} of the step's {self.trainer.accumulate_grad_batches} micro-batches")
        self._items = []
        for place, batch in enumerate(batches):
            self.transfer_batch_to_device(batch, self.device, 0)
            self._seed(batch_idx + place)
            self._items.append(self.items_of(batch))
        counts = torch.tensor([sum(one[name] for one in self._items) for name in self._items[0]], device=self.device)
        counts = cast(Tensor, self.trainer.strategy.reduce(counts, reduce_op="sum"))
        self._items_of_step = dict(zip(self._items[0], counts.tolist(), strict=True))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        for name in ("image", "text_ids", "text_mask", "special_mask", "label_tokens", "word_starts", "targets"):
            value = getattr(batch, name)
            if isinstance(value, Tensor):
                setattr(batch, name, value.to(device, non_blocking=True))
        return batch

    def configure_optimizers(self) -> Any:
        decaying = self.decaying or matrices(self.named_parameters())
        groups = self.optimizer_config.parameter_groups(self.named_parameters(), decaying, self.depths)
        optimizer = torch.optim.AdamW(groups, betas=self.optimizer_config.betas, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.optimizer_config.rate_factor(self.num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """By norm, as Lightning does, which under mixed precision refuses to do it for a fused optimizer."""
        if gradient_clip_val is None:
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # float16; the optimizer would unscale only after this
            scaler.unscale_(getattr(optimizer, "optimizer", optimizer))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def log_train(self, values: dict[str, Tensor], batch_size: int) -> None:
        """Scalars under `train/`, the rate of each component, and the loss on the progress bar."""
        self.log("loss", values["loss"], prog_bar=True, logger=False, batch_size=batch_size)
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=batch_size)
        groups = self.trainer.optimizers[0].param_groups
        rates = {f"learning_rate/{g['name']}": g["lr"] for g in groups if not g["name"].endswith("/no_decay")}
        self.log_dict(rates, batch_size=batch_size)
