"""What an objective is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from vlm.types import Batch, Encoded, Loss, View


class Objective(nn.Module, ABC):
    """A pretraining loss in two halves, so that the model can encode for all objectives at once."""

    @abstractmethod
    def view(self, batch: Batch) -> View:
        """What this objective wants encoded. Random choices come from torch's global generator."""

    @abstractmethod
    def loss(self, view: View, encoded: Encoded) -> Loss:
        """The loss and its figures, from the states of the view."""
