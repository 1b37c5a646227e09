"""From a record, as it lies in a shard, to the example that a step sees."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from vlm.config import CustomConfig
from vlm.errors import UserError
from vlm.supervision import CaptionsConfig, ClassNamesConfig, MachineLabelsConfig, SourceConfig
from vlm.types import Example, Record, Source


def key_random(key: str, purpose: str) -> random.Random:
    """A generator that depends on the key and on what it is for, so that choices never move with rank or epoch."""
    return random.Random(hashlib.sha256(f"{purpose} {key}".encode()).digest())


def source_text(source: SourceConfig, record: Record) -> tuple[str, Source]:
    """The text that `source` puts beside the image, and its provenance. Empty where the record has none."""
    rng = key_random(record.key, source.type)
    if isinstance(source, CaptionsConfig):
        return (rng.choice(record.captions) if record.captions else ""), "human"
    if isinstance(source, MachineLabelsConfig):
        scored = zip(record.labels, record.scores or (1.0,) * len(record.labels), strict=True)
        labels = [label for label, score in scored if score >= source.min_score][: source.max_labels]
        rng.shuffle(labels)
        return ", ".join(labels), "machine"
    if isinstance(source, ClassNamesConfig):
        names = list(record.classes)
        rng.shuffle(names)
        return ", ".join(names), "class_name"
    text, provenance = source.load()(record, **source.options)
    return text, provenance


def supervise(record: Record, sources: Sequence[SourceConfig]) -> Example:
    """The record as one source of the mixture shows it. The source is drawn by weight from the key alone."""
    weights = [1.0 if isinstance(source, CustomConfig) else source.weight for source in sources]
    if not sources or sum(weights) <= 0:
        raise UserError("supervision.sources: at least one source with a weight above 0 is needed")
    source = key_random(record.key, "source").choices(list(sources), weights)[0]
    text, provenance = source_text(source, record)
    if not text:
        provenance = "none"
    return Example(record.key, record.image, text, provenance, record.classes)
