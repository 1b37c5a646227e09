"""From records, texts and questions to batches of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_loaders.damage import OnDamage, WindowReader
from data_loaders.images import Images
from data_loaders.shards import ShardReader
from vlm.errors import UserError
from vlm.models.language.tokenizer import Tokenizer
from vlm.supervision import SourceConfig
from vlm.supervision.sources import Beside, LabelMatching, label_spans, supervise
from vlm.supervision.subset import Positions
from vlm.types import Batch, Question


class PairBatches:
    """Supervised image-text pairs of a window of the shards.

    `negative_fraction`: how many images of other examples are appended, as a share of the batch (the published random
    negatives). `beside`: what the sources read beside the data. `label_matching`: the batch also says which tokens are
    hidden with each label (`label_spans`), for objectives that mask whole labels. `whole_words`: and where the words
    begin, for those that mask whole words.
    """

    def __init__(
        self,
        reader: ShardReader,
        positions: Positions,
        sources: Sequence[SourceConfig],
        images: Images,
        tokenizer: Tokenizer,
        negative_fraction: float = 0.0,
        beside: Mapping[Path, Beside] | None = None,
        label_matching: LabelMatching | None = None,
        damaged: OnDamage = "stop",
        seed: int = 0,
        whole_words: bool = False,
    ) -> None:
        self.window = WindowReader(reader, positions, images, damaged, seed)
        self.sources, self.beside, self.label_matching = tuple(sources), beside, label_matching
        self.tokenizer, self.negative_fraction, self.whole_words = tokenizer, negative_fraction, whole_words

    def __len__(self) -> int:
        return len(self.window)

    def batch(self, positions: Sequence[int]) -> Batch:
        records, pixels, damages = self.window.read([*positions, *self._other(len(positions))])
        examples = [supervise(record, self.sources, self.beside) for record in records[: len(positions)]]
        texts, label_tokens, starts = [example.text for example in examples], None, None
        if self.label_matching is None and not self.whole_words:
            ids, mask, special = self.tokenizer(texts)
        if self.whole_words:
            ids, mask, special, starts = self.tokenizer.with_words(texts)
        if self.label_matching is not None:
            spans = [label_spans(example.labels, self.label_matching) for example in examples]
            ids, mask, special, label_tokens = self.tokenizer.with_spans(texts, spans)
        return Batch(
            keys=tuple(record.key for record in records),
            image=pixels,
            text_ids=ids,
            text_mask=mask,
            special_mask=special,
            label_tokens=label_tokens,
            word_starts=starts,
            sources=tuple(example.source for example in examples),
            damages=damages,
        )

    @property
    def images(self) -> Images:
        return self.window.images

    @images.setter
    def images(self, images: Images) -> None:
        self.window.images = images

    def image_keys(self) -> list[str]:
        """The distinct images of all examples."""
        return self.window.keys()

    def shard_cuts(self) -> tuple[int, ...]:
        return self.window.reader.index.cuts(self.window.positions)

    def read_ahead(self, positions: Sequence[int]) -> None:
        self.window.read_ahead(positions)

    def _other(self, count: int) -> list[int]:
        num_extra = round(self.negative_fraction * count)
        return torch.randint(len(self), (num_extra,)).tolist()


class ImageBatches:
    """Images with their classes, no text: for vision encoders that are pretrained alone."""

    def __init__(
        self,
        reader: ShardReader,
        positions: Positions,
        classes: Sequence[str],
        images: Images,
        damaged: OnDamage = "stop",
        seed: int = 0,
    ) -> None:
        self.window = WindowReader(reader, positions, images, damaged, seed)
        self.class_ids = {name: number for number, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.window)

    def batch(self, positions: Sequence[int]) -> Batch:
        records, pixels, damages = self.window.read(positions)
        targets = torch.zeros(len(records), len(self.class_ids))
        for row, record in enumerate(records):
            for name in record.classes:
                if name not in self.class_ids:
                    folder = self.window.reader.index.folder
                    raise UserError(f"{folder}: {record.key} has the unknown class {name!r}")
                targets[row, self.class_ids[name]] = 1.0
        return Batch(keys=tuple(record.key for record in records), image=pixels, targets=targets, damages=damages)

    def shard_cuts(self) -> tuple[int, ...]:
        return self.window.reader.index.cuts(self.window.positions)

    def read_ahead(self, positions: Sequence[int]) -> None:
        self.window.read_ahead(positions)


class TextBatches:
    """Unpaired texts: for language encoders that are pretrained alone."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, whole_words: bool = False) -> None:
        self.texts, self.tokenizer, self.whole_words = texts, tokenizer, whole_words

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, positions: Sequence[int]) -> Batch:
        texts, starts = [self.texts[at] for at in positions], None
        if self.whole_words:
            ids, mask, special, starts = self.tokenizer.with_words(texts)
        else:
            ids, mask, special = self.tokenizer(texts)
        keys = tuple(f"text-{at}" for at in positions)
        return Batch(keys=keys, text_ids=ids, text_mask=mask, special_mask=special, word_starts=starts)


class QuestionBatches:
    """Questions with their images and targets."""

    def __init__(
        self,
        questions: Sequence[Question],
        images: Images,
        tokenizer: Tokenizer,
        target: Callable[[Question], Mapping[int, float]],
        num_classes: int,
        multi_label: bool,
    ) -> None:
        self.questions, self.images, self.tokenizer = questions, images, tokenizer
        self.target, self.num_classes, self.multi_label = target, num_classes, multi_label

    def __len__(self) -> int:
        return len(self.questions)

    def batch(self, positions: Sequence[int]) -> Batch:
        questions = [self.questions[at] for at in positions]
        images_per_text = len(questions[0].image_keys)
        keys = [question.image_keys[place] for place in range(images_per_text) for question in questions]
        ids, mask, special = self.tokenizer([question.text for question in questions])
        return Batch(
            keys=tuple(question.id for question in questions),
            image=self.images(keys),
            text_ids=ids,
            text_mask=mask,
            special_mask=special,
            targets=self._targets(questions),
            images_per_text=images_per_text,
        )

    def image_keys(self) -> list[str]:
        """The distinct images of all questions."""
        return list(dict.fromkeys(key for question in self.questions for key in question.image_keys))

    def _targets(self, questions: Sequence[Question]) -> Tensor:
        soft = [self.target(question) for question in questions]
        if not self.multi_label:  # -100: cross-entropy leaves it out
            return torch.tensor([max(values, key=values.__getitem__) if values else -100 for values in map(dict, soft)])
        targets = torch.zeros(len(questions), self.num_classes)
        for row, values in enumerate(soft):
            for answer, value in values.items():
                targets[row, answer] = value
        return targets
