"""A labeller from outside: dark, middling or bright, by the mean of the pixels. One may die once in the middle."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


class Brightness:
    def __init__(self, vocabulary: tuple[str, ...] | None, dies_once: str | None = None) -> None:
        self.labels = vocabulary or ("dark", "middling", "bright")
        self.model: Any = nn.Identity()
        self.dies_once = Path(dies_once) if dies_once else None

    def transform(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.resize((2, 2)))).permute(2, 0, 1).float() / 255

    def scores(self, pixels: Tensor) -> Tensor:
        if self.dies_once is not None and not self.dies_once.exists():
            self.dies_once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        centres = torch.linspace(0, 1, len(self.labels))
        return (-10 * (pixels.mean((1, 2, 3))[:, None] - centres).abs()).softmax(-1)
