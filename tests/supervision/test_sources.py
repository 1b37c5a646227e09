from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from vlm.config import CustomConfig
from vlm.errors import UserError
from vlm.supervision import CaptionsConfig, ClassNamesConfig, MachineLabelsConfig, SourceConfig
from vlm.supervision.sources import source_text, supervise
from vlm.types import Record

CAPTIONS, LABELS, CLASSES = CaptionsConfig(), MachineLabelsConfig(), ClassNamesConfig()
ALL: tuple[SourceConfig, ...] = (CAPTIONS, LABELS, CLASSES)


def make_record(number: int = 0, **changes: Any) -> Record:
    record = Record(
        key=f"key-{number}",
        image=b"picture",
        captions=("a red circle", "a circle of red", "one round thing"),
        labels=("circle", "red", "sky", "square"),
        scores=(0.9, 0.8, 0.5, 0.1),
        classes=("circle", "shape"),
    )
    return dataclasses.replace(record, **changes)


def words(text: str) -> list[str]:
    return sorted(text.split(", "))


# --- The same for every rank, worker and epoch -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "sources", [(CAPTIONS,), (LABELS,), (CLASSES,), ALL], ids=["captions", "labels", "names", "all"]
)
def test_an_example_depends_on_its_record_alone(sources: tuple[SourceConfig, ...]) -> None:
    records = [make_record(number) for number in range(50)]
    first = [supervise(record, sources) for record in records]
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(99)
    again = [supervise(record, sources) for record in reversed(records)]
    assert first == again[::-1]


def test_another_picture_changes_no_choice() -> None:
    for number in range(20):
        texts = [supervise(make_record(number, image=image), ALL).text for image in (b"first", b"second")]
        assert texts[0] == texts[1]


def test_the_key_decides_caption_and_order() -> None:
    records = [make_record(number) for number in range(200)]
    captions = Counter(source_text(CAPTIONS, record)[0] for record in records)
    assert set(captions) == set(records[0].captions)
    assert min(captions.values()) > 40  # about a third each
    assert len({source_text(LABELS, record)[0] for record in records}) == 24  # every order of four
    assert len({source_text(CLASSES, record)[0] for record in records}) == 2


def test_the_choice_of_a_source_says_nothing_about_the_choice_of_a_caption() -> None:
    examples = [supervise(make_record(number), (CAPTIONS, CLASSES)) for number in range(1500)]
    shown = Counter(example.text for example in examples if example.source == "human")
    assert min(shown.values()) > 0.25 * sum(shown.values())


# --- What each source shows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("min_score", "expected"),
    [(0.0, ["circle", "red", "sky", "square"]), (0.5, ["circle", "red", "sky"]), (0.85, ["circle"])],
)
def test_labels_below_the_least_score_are_left_out(min_score: float, expected: list[str]) -> None:
    assert words(source_text(MachineLabelsConfig(min_score=min_score), make_record())[0]) == expected


def test_the_best_labels_are_kept() -> None:
    for number in range(20):
        text = source_text(MachineLabelsConfig(max_labels=2), make_record(number))[0]
        assert words(text) == ["circle", "red"]


def test_labels_without_scores_are_all_certain() -> None:
    text = source_text(MachineLabelsConfig(min_score=1.0), make_record(scores=()))[0]
    assert words(text) == ["circle", "red", "sky", "square"]


def test_class_names_are_all_named() -> None:
    assert words(source_text(CLASSES, make_record())[0]) == ["circle", "shape"]


@pytest.mark.parametrize(
    ("source", "provenance"), [(CAPTIONS, "human"), (LABELS, "machine"), (CLASSES, "class_name")], ids=str
)
def test_an_example_says_where_its_text_comes_from(source: SourceConfig, provenance: str) -> None:
    example = supervise(make_record(), [source])
    assert example.source == provenance
    assert (example.key, example.image, example.classes) == ("key-0", b"picture", ("circle", "shape"))


@pytest.mark.parametrize(
    ("source", "record"),
    [
        (CAPTIONS, make_record(captions=())),
        (LABELS, make_record(labels=(), scores=())),
        (MachineLabelsConfig(min_score=0.95), make_record()),
        (CLASSES, make_record(classes=())),
    ],
    ids=["no caption", "no label", "no sure label", "no class"],
)
def test_without_a_text_the_source_is_none(source: SourceConfig, record: Record) -> None:
    example = supervise(record, [source])
    assert (example.text, example.source) == ("", "none")


# --- Mixtures --------------------------------------------------------------------------------------------------------


def test_sources_are_mixed_by_weight() -> None:
    sources = (CaptionsConfig(weight=3), MachineLabelsConfig(weight=1), ClassNamesConfig(weight=0))
    counts = Counter(supervise(make_record(number), sources).source for number in range(4000))
    assert counts["human"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert counts["machine"] / 4000 == pytest.approx(0.25, abs=0.03)
    assert counts["class_name"] == 0


def test_weights_are_relative() -> None:
    pairs = [(CaptionsConfig(weight=weight), ClassNamesConfig(weight=weight)) for weight in (0.5, 8)]
    for number in range(50):
        first, second = (supervise(make_record(number), pair) for pair in pairs)
        assert first == second


@pytest.mark.parametrize("sources", [(), (CaptionsConfig(weight=0),)], ids=["none", "weightless"])
def test_at_least_one_source_with_a_weight_is_needed(sources: tuple[SourceConfig, ...]) -> None:
    with pytest.raises(UserError, match=r"supervision\.sources: at least one source"):
        supervise(make_record(), sources)


def shout(record: Record, mark: str) -> tuple[str, str]:
    return record.captions[0].upper() + mark, "machine"


def test_a_source_from_outside_is_a_function_of_the_record() -> None:
    source = CustomConfig(target=f"{__name__}:shout", options={"mark": "!"})
    example = supervise(make_record(), [source])
    assert (example.text, example.source) == ("A RED CIRCLE!", "machine")
