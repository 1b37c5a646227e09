"""From a record, as it lies in a shard, to the example that a step sees."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from vlm.errors import UserError
from vlm.supervision import (
    CaptionsConfig,
    ClassNamesConfig,
    GeneratedCaptionsConfig,
    MachineLabelsConfig,
    NoneConfig,
    SourceConfig,
    source_weight,
)
from vlm.types import Example, Record, Source

SEPARATOR = ", "
"""Between the labels of a text."""

LabelMatching = Literal["position", "substring"]
Span = tuple[int, int]


@runtime_checkable
class Beside(Protocol):
    """What lies beside the data and speaks of its examples: a file or folder that was opened."""

    def __call__(self, key: str) -> Record | None:
        """What is said of this key; None if nothing is."""
        ...


def key_random(key: str, purpose: str) -> random.Random:
    """A generator that depends on the key and on what it is for, so that choices never move with rank or epoch."""
    return random.Random(hashlib.sha256(f"{purpose} {key}".encode()).digest())


def beside_path(source: SourceConfig) -> Path | None:
    """The file or folder beside the data that a source reads, if it reads one."""
    if isinstance(source, MachineLabelsConfig):
        return source.labels_from
    return source.file if isinstance(source, GeneratedCaptionsConfig) else None


def source_text(
    source: SourceConfig, record: Record, beside: Mapping[Path, Beside] | None = None
) -> tuple[str, Source]:
    """The text that `source` puts beside the image, and its provenance. Empty where the record has none."""
    said, provenance = _said(source, record, beside or {})
    return (said if isinstance(said, str) else SEPARATOR.join(said)), provenance


def supervise(record: Record, sources: Sequence[SourceConfig], beside: Mapping[Path, Beside] | None = None) -> Example:
    """The record as one source of the mixture shows it. The source is drawn by weight from the key alone.

    `beside`: what `beside_path` of each source names, opened.
    """
    weights = [source_weight(source) for source in sources]
    if not sources or sum(weights) <= 0:
        raise UserError("supervision.sources: at least one source with a weight above 0 is needed")
    source = key_random(record.key, "source").choices(list(sources), weights)[0]
    said, provenance = _said(source, record, beside or {})
    labels = () if isinstance(said, str) else said
    text = said if isinstance(said, str) else SEPARATOR.join(said)
    if not text.strip():
        text, provenance, labels = "", "none", ()
    return Example(record.key, record.image, text, provenance, record.classes, labels)


def label_spans(labels: Sequence[str], matching: LabelMatching) -> list[list[Span]]:
    """For each label of a text, [start, end) of the characters that are hidden with it.

    `position`: its own, and nothing else. `substring`: wherever its letters stand in the text, as the reference
    paper's released code has it, so that "man" takes a part of "woman" along.
    """
    text, spans, start = SEPARATOR.join(labels), [], 0
    for label in labels:
        own = (start, start + len(label))
        if matching == "position" or not label:
            spans.append([own])
        else:
            found = [place for place in range(len(text)) if text.startswith(label, place)]
            spans.append([(place, place + len(label)) for place in found])
        start += len(label) + len(SEPARATOR)
    return spans


def _said(source: SourceConfig, record: Record, beside: Mapping[Path, Beside]) -> tuple[str | tuple[str, ...], Source]:
    """A text, or the labels of one, and where it comes from."""
    rng = key_random(record.key, source.type)
    if isinstance(source, CaptionsConfig):
        return (rng.choice(record.captions) if record.captions else ""), "human"
    if isinstance(source, MachineLabelsConfig):
        labels = best_labels(source, _from(source, record, beside) if source.labels_from is not None else record)
        if source.order == "shuffled":
            rng.shuffle(labels)
        return tuple(labels), "machine"
    if isinstance(source, ClassNamesConfig):
        names = list(record.classes)
        rng.shuffle(names)
        return tuple(names), "class_name"
    if isinstance(source, GeneratedCaptionsConfig):
        captions = _from(source, record, beside).captions
        return (rng.choice(captions) if captions else ""), "generated"
    if isinstance(source, NoneConfig):
        return "", "none"
    said, provenance = source.load()(record, **source.options)
    if provenance not in get_args(Source):
        known = ", ".join(get_args(Source))
        raise UserError(f"supervision.sources: {source.target} gave the provenance {provenance!r}. Use one of {known}")
    return (said if isinstance(said, str) else tuple(said)), provenance


def best_labels(source: MachineLabelsConfig, record: Record) -> list[str]:
    """The labels of a record that a source shows, best first."""
    if record.scores and len(record.scores) != len(record.labels):
        counts = f"{len(record.labels)} labels and {len(record.scores)} scores"
        raise UserError(f"{record.key}: as many scores as labels are needed. Got {counts}. Label the shards again")
    scored = zip(record.labels, record.scores or (1.0,) * len(record.labels), strict=True)
    ranked = sorted(scored, key=lambda pair: -pair[1])  # shards have them in this order already
    return [label for label, score in ranked if score >= source.min_score][: source.max_labels]


def _from(source: Any, record: Record, beside: Mapping[Path, Beside]) -> Record:
    """What is said of the record beside the data."""
    path = beside_path(source)
    assert path is not None
    found = beside[path](record.key)
    if found is None and source.missing == "error":
        raise UserError(f"{path}: says nothing of {record.key!r}. Complete it, or set missing=none for this source")
    return found if found is not None else Record(record.key)
