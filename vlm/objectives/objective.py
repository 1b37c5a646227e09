"""What an objective is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from vlm.types import Batch, Encoded, Loss, View


class Objective(nn.Module, ABC):
    """A pretraining loss in two halves, so that the model can encode for all objectives at once.

    One that learns from soft targets too (`distillation.py`) says so and has `teach`; it finds what that returned, and
    the weight `alpha` of it, in the targets of the view at its loss.
    """

    distils: ClassVar[bool] = False

    @abstractmethod
    def view(self, batch: Batch) -> View:
        """What this objective wants encoded. Random choices come from torch's global generator.

        Where several micro-batches make a step it is asked twice with the same draws, so it changes nothing of its own.
        """

    @abstractmethod
    def count(self, view: View) -> int:
        """How many items the loss of this view will be the mean of: `Loss.count`, before anything is encoded."""

    def beside(self, view: View, others: Mapping[str, View]) -> View:
        """The view once all objectives have said what they want, by their names: for what one takes from another."""
        return view

    @abstractmethod
    def loss(self, view: View, encoded: Encoded) -> Loss:
        """The loss and its figures, from the states of the view."""

    def teach(self, view: View, encoded: Encoded) -> dict[str, Tensor]:
        """Soft targets for the view, from a teacher's states of it; for objectives that distil."""
        raise NotImplementedError
