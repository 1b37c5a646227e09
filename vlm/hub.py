"""Load a run for use: the model with its transform, tokenizer and answers, in evaluation mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor, nn

from data_loaders.transforms import ImageTransform
from vlm.config import CustomConfig, load_yaml
from vlm.errors import UserError
from vlm.models.heads import AnswerHead
from vlm.models.language.tokenizer import Tokenizer
from vlm.models.vision_language import VisionLanguageModel
from vlm.run import CONFIG, TOKENIZER, RunConfig, fill, image_transform, read_checkpoint, task_of, without_weights
from vlm.training.finetuning import answer_logits
from vlm.types import Batch, Encoded, View

Picture = Image.Image | Path | str | bytes


class LoadedModel:
    """A trained model that takes pictures and texts as they are.

    `model` is the plain module; `answers` is empty unless the run was fine-tuned on a task with answers.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        transform: ImageTransform,
        tokenizer: Tokenizer,
        config: RunConfig,
        head: nn.Module | None = None,
        answers: Sequence[str] = (),
    ) -> None:
        self.model, self.transform, self.tokenizer, self.config = model, transform, tokenizer, config
        self.head, self.answers = head, tuple(answers)

    @torch.inference_mode()
    def encode(self, images: Sequence[Picture], texts: Sequence[str]) -> Encoded:
        """Fused states and pooled vectors of each image with its text, in order."""
        if len(images) != len(texts):
            raise ValueError(f"images and texts must be as many. Got {len(images)} and {len(texts)}")
        ids, mask, _ = self.tokenizer(texts)
        view = View("pair", ids.to(self.device), mask.to(self.device))
        return self.model.encode(self.pixels(images), [view])[0]

    @torch.inference_mode()
    def answer(
        self, images: Sequence[Picture] | Sequence[Sequence[Picture]], questions: Sequence[str]
    ) -> list[dict[str, float]]:
        """For each question, its answers with their probabilities, the most likely first.

        A task of two images a statement (NLVR2) takes a pair of images for each. Probabilities of VQAv2 are those of
        each answer alone and do not sum to 1.
        """
        if self.head is None:
            raise UserError(f"run {self.config.name!r} was not fine-tuned on a task with answers; load one that was")
        task: Any = task_of(self.config)
        groups = [[item] if task.images_per_text == 1 else list(cast(Sequence[Picture], item)) for item in images]
        if len(groups) != len(questions) or any(len(group) != task.images_per_text for group in groups):
            raise ValueError(f"each of the {len(questions)} questions needs {task.images_per_text} image(s)")
        ids, mask, _ = self.tokenizer(questions)
        pixels = self.pixels([cast(Picture, group[place]) for place in range(task.images_per_text) for group in groups])
        batch = Batch(
            keys=tuple(questions),
            image=pixels,
            text_ids=ids.to(self.device),
            text_mask=mask.to(self.device),
            images_per_text=task.images_per_text,
        )
        logits = answer_logits(self.model, self.head, batch, task.images_in_turn).float()
        probabilities = logits.sigmoid() if task.multi_label else logits.softmax(-1)
        ranked = probabilities.sort(dim=-1, descending=True)
        return [
            {self.answers[number]: value for value, number in zip(values, numbers, strict=True)}
            for values, numbers in zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True)
        ]

    def pixels(self, images: Sequence[Picture]) -> UInt8[Tensor, "b 3 h w"]:
        """Pictures, paths or encoded bytes as the model wants them, on its device."""
        return torch.stack([self.transform(*_picture(image)) for image in images]).to(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> LoadedModel:
        self.model.to(device)
        if self.head is not None:
            self.head.to(device)
        return self


def _picture(image: Picture) -> tuple[Image.Image | bytes, str]:
    """What the transform takes, and what an error calls it."""
    if isinstance(image, Image.Image):
        return image, "image"
    if isinstance(image, bytes):
        return image, "image"
    try:
        return Path(image).read_bytes(), str(image)
    except OSError as error:
        raise UserError(f"{image}: cannot be read ({error.strerror})") from None


def _code_of(config: RunConfig) -> str | None:
    """The first class from outside that the model or its task would call."""
    parts = [getattr(config.model, name) for name in type(config.model).model_fields]
    return next((part.target for part in [*parts, config.task] if isinstance(part, CustomConfig)), None)


def load(run_or_checkpoint: str | Path, trust_code: bool = False) -> LoadedModel:
    """The model of a run's folder, or of a checkpoint inside one, ready for use.

    Reads weights and plain values only. A config may also name code from outside (`type: custom`), which is imported
    and run only with `trust_code=True`.
    """
    path = Path(run_or_checkpoint)
    folder, name = (path.parent, path.name) if path.suffix == ".ckpt" else (path, None)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no run here ({CONFIG} is missing)")
    config = load_yaml(folder / CONFIG, RunConfig)
    if not trust_code and (target := _code_of(config)):
        raise UserError(f"{folder}: it runs outside code ({target}). If you trust it: load(..., trust_code=True)")
    checkpoint = read_checkpoint(folder, name)
    states: dict[str, Tensor] = checkpoint["state_dict"]
    model = without_weights(config.model).build()
    tokenizer = Tokenizer.from_file(folder / TOKENIZER, config.model.language.max_tokens)
    fill(model, states, "model", folder)
    answers = tuple(checkpoint.get("answers", ()))
    head = None
    if answers:
        task: Any = task_of(config)
        head = AnswerHead(task.images_per_text * 2 * model.width, len(answers))
        fill(head, states, "head", folder)
        head.eval()
    model.eval()
    return LoadedModel(model, image_transform(config, model, training=False), tokenizer, config, head, answers)
