"""A few validation questions with their images and answers, drawn into TensorBoard at each validation."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vlm.types import Batch, Question

SIDE, TEXT_HEIGHT, LINE = 224, 84, 34  # pixels of an image, of the text below it; characters of a line


class PredictionPictures(Callback):
    """Draws the same `count` questions of the first validation batch each time, in the main process.

    The answers are those that validation gave (`validation_step` returns its logits): nothing is computed again.
    """

    def __init__(self, questions: Sequence[Question], answers: Sequence[str], count: int) -> None:
        self.questions = {question.id: question for question in questions}
        self.answers, self.count = answers, count

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        logger = trainer.logger
        if batch_idx or not trainer.is_global_zero or not isinstance(logger, TensorBoardLogger):
            return
        if not isinstance(outputs, Tensor) or batch.image is None or batch.image.is_floating_point():
            return  # states of a frozen encoder in place of pixels
        num_texts = len(batch.keys)
        rows = torch.linspace(0, num_texts - 1, min(self.count, num_texts)).round().long().tolist()
        drawn = []
        for row in rows:
            question = self.questions[batch.keys[row]]
            images = [batch.image[row + place * num_texts] for place in range(batch.images_per_text)]
            drawn.append(_drawn(images, question, self.answers[int(outputs[row].argmax())]))
        strip = np.concatenate(drawn, axis=1)
        logger.experiment.add_image("validation/predictions", strip, trainer.global_step, dataformats="HWC")


def _drawn(images: Sequence[Tensor], question: Question, answer: str) -> NDArray[np.uint8]:
    """The images side by side, and below them the question, the answer and what is true."""
    sheet = Image.new("RGB", (SIDE * len(images), SIDE + TEXT_HEIGHT), "white")
    for place, image in enumerate(images):
        picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (place * SIDE, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    width = LINE * len(images)
    lines = textwrap.wrap(question.text, width, max_lines=3, placeholder=" ...")
    lines.append(textwrap.shorten(f"says: {answer}", width, placeholder=" ..."))
    if question.answers:
        true = max(dict.fromkeys(question.answers), key=question.answers.count)
        lines.append(textwrap.shorten(f"true: {true}", width, placeholder=" ..."))
    for number, line in enumerate(lines):
        draw.text((4, SIDE + 2 + 16 * number), line, fill="black", font=font)
    return np.array(sheet, np.uint8)
