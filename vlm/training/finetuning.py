"""Fine-tuning: a classifier over pooled pairs, for any task with answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vlm.models.answering import answer_logits
from vlm.models.heads import AnswerHead
from vlm.models.vision_language import VisionLanguageModel
from vlm.training.module import TrainingModule
from vlm.training.optimizer import OptimizerConfig
from vlm.types import Batch


class Finetuning(TrainingModule):
    """Binary cross-entropy times the number of classes over soft targets, or plain cross-entropy."""

    def __init__(
        self,
        model: VisionLanguageModel,
        answers: Sequence[str],
        images_per_text: int,
        multi_label: bool,
        optimizer: OptimizerConfig,
        num_steps: int,
        seed: int,
        in_turn: bool = False,
    ) -> None:
        super().__init__(model, optimizer, num_steps, seed)
        self.multi_label = multi_label
        self.in_turn = in_turn
        self.answers = tuple(answers)
        self.head = AnswerHead(images_per_text * 2 * model.width, len(answers))

    def logits_of(self, batch: Batch) -> Float[Tensor, "b k"]:
        return answer_logits(self.model, self.head, batch, self.in_turn)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The answers belong to the head: without them its outputs mean nothing."""
        checkpoint["answers"] = list(self.answers)

    def loss_of(self, logits: Float[Tensor, "b k"], targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the expected score of the most likely answers in [0, 1]."""
        logits = logits.float()
        best = logits.argmax(-1)
        if self.multi_label:
            loss = F.binary_cross_entropy_with_logits(logits, targets) * logits.shape[1]
            return loss, targets.gather(1, best[:, None]).mean()
        return F.cross_entropy(logits, targets, ignore_index=-100), (best == targets).float().mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, accuracy = self.loss_of(self.logits_of(batch), cast(Tensor, batch.targets))
        self.log_train({"loss": loss.detach(), "accuracy": 100 * accuracy}, len(batch.keys))
        return loss * self.share("answers", self.items_of(batch)["answers"], batch_idx)

    def items_of(self, batch: Batch) -> dict[str, int]:
        """Questions; those without an answer of the vocabulary are in no cross-entropy."""
        targets = cast(Tensor, batch.targets)
        return {"answers": len(targets) if self.multi_label else int((targets != -100).sum())}

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The logits, for whoever shows the answers."""
        logits = self.logits_of(batch)
        loss, accuracy = self.loss_of(logits, cast(Tensor, batch.targets))
        values = {"validation/loss": loss, "validation/accuracy": 100 * accuracy}
        self.log_dict(values, batch_size=len(batch.keys), sync_dist=True, prog_bar=True)
        return logits
