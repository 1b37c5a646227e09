"""From records, texts and questions to batches of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from data_loaders.shards import ShardReader
from data_loaders.transforms import ImageTransform
from vlm.errors import UserError
from vlm.models.language.tokenizer import Tokenizer
from vlm.supervision import SourceConfig
from vlm.supervision.sources import supervise
from vlm.types import Batch, Example, Question, Record


class PairBatches:
    """Supervised image-text pairs of a window of the shards.

    `extra_images` is how many images of other examples are appended to a batch (the published random negatives).
    """

    def __init__(
        self,
        reader: ShardReader,
        positions: NDArray[np.int64],
        sources: Sequence[SourceConfig],
        transform: ImageTransform,
        tokenizer: Tokenizer,
        negative_fraction: float = 0.0,
    ) -> None:
        self.reader, self.positions, self.sources = reader, positions, tuple(sources)
        self.transform, self.tokenizer, self.negative_fraction = transform, tokenizer, negative_fraction

    def __len__(self) -> int:
        return len(self.positions)

    def batch(self, positions: Sequence[int]) -> Batch:
        examples = [supervise(self.reader[int(self.positions[at])], self.sources) for at in positions]
        extra = [self.reader[int(self.positions[at])] for at in self._other(len(positions))]
        shown: list[Example | Record] = [*examples, *extra]
        images = [self.transform(item.image, item.key) for item in shown]
        ids, mask, special = self.tokenizer([example.text for example in examples])
        return Batch(
            keys=tuple(item.key for item in shown),
            image=torch.stack(images),
            text_ids=ids,
            text_mask=mask,
            special_mask=special,
            sources=tuple(example.source for example in examples),
        )

    def _other(self, count: int) -> list[int]:
        num_extra = round(self.negative_fraction * count)
        return torch.randint(len(self), (num_extra,)).tolist()


class ImageBatches:
    """Images with their classes, no text: for vision encoders that are pretrained alone."""

    def __init__(
        self, reader: ShardReader, positions: NDArray[np.int64], classes: Sequence[str], transform: ImageTransform
    ) -> None:
        self.reader, self.positions, self.transform = reader, positions, transform
        self.class_ids = {name: number for number, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.positions)

    def batch(self, positions: Sequence[int]) -> Batch:
        records = [self.reader[int(self.positions[at])] for at in positions]
        targets = torch.zeros(len(records), len(self.class_ids))
        for row, record in enumerate(records):
            for name in record.classes:
                if name not in self.class_ids:
                    raise UserError(f"{self.reader.index.folder}: {record.key} has the unknown class {name!r}")
                targets[row, self.class_ids[name]] = 1.0
        images = torch.stack([self.transform(record.image, record.key) for record in records])
        return Batch(keys=tuple(record.key for record in records), image=images, targets=targets)


class TextBatches:
    """Unpaired texts: for language encoders that are pretrained alone."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        self.texts, self.tokenizer = texts, tokenizer

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, positions: Sequence[int]) -> Batch:
        ids, mask, special = self.tokenizer([self.texts[at] for at in positions])
        keys = tuple(f"text-{at}" for at in positions)
        return Batch(keys=keys, text_ids=ids, text_mask=mask, special_mask=special)


class QuestionBatches:
    """Questions with their images and targets; every image of a batch is decoded once.

    `grey` replaces each image by an even grey, for the baseline that may not look.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        reader: ShardReader,
        transform: ImageTransform,
        tokenizer: Tokenizer,
        target: Callable[[Question], Mapping[int, float]],
        num_classes: int,
        multi_label: bool,
        grey: bool = False,
    ) -> None:
        self.questions, self.reader, self.transform, self.tokenizer = questions, reader, transform, tokenizer
        self.target, self.num_classes, self.multi_label, self.grey = target, num_classes, multi_label, grey

    def __len__(self) -> int:
        return len(self.questions)

    def batch(self, positions: Sequence[int]) -> Batch:
        questions = [self.questions[at] for at in positions]
        images_per_text = len(questions[0].image_keys)
        keys = [question.image_keys[place] for place in range(images_per_text) for question in questions]
        pixels = {key: self._pixels(key) for key in dict.fromkeys(keys)}
        ids, mask, special = self.tokenizer([question.text for question in questions])
        return Batch(
            keys=tuple(question.id for question in questions),
            image=torch.stack([pixels[key] for key in keys]),
            text_ids=ids,
            text_mask=mask,
            special_mask=special,
            targets=self._targets(questions),
            images_per_text=images_per_text,
        )

    def _pixels(self, key: str) -> UInt8[Tensor, "3 h w"]:
        if self.grey:
            return torch.full((3, self.transform.image_pixels, self.transform.image_pixels), 127, dtype=torch.uint8)
        try:
            return self.transform(self.reader[self.reader.position(key)].image, key)
        except KeyError:
            raise UserError(
                f"{self.reader.index.folder}: a question asks for image {key!r}, which is not here"
            ) from None

    def _targets(self, questions: Sequence[Question]) -> Tensor:
        soft = [self.target(question) for question in questions]
        if not self.multi_label:  # -100: cross-entropy leaves it out
            return torch.tensor([max(values, key=values.__getitem__) if values else -100 for values in map(dict, soft)])
        targets = torch.zeros(len(questions), self.num_classes)
        for row, values in enumerate(soft):
            for answer, value in values.items():
                targets[row, answer] = value
        return targets
