from __future__ import annotations

import dataclasses
import json
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_loaders.beside import CaptionFile, SideShards, content_fingerprint, of_split, open_beside
from data_loaders.shards import ShardReader, write_shards
from vlm.config import CustomConfig
from vlm.errors import UserError
from vlm.supervision import (
    CaptionsConfig,
    ClassNamesConfig,
    GeneratedCaptionsConfig,
    MachineLabelsConfig,
    NoneConfig,
    SourceConfig,
)
from vlm.supervision.sources import label_spans, source_text, supervise
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


def list_of(record: Record) -> tuple[list[str], str]:
    return list(record.labels), "machine"


def test_a_source_from_outside_may_give_a_list_of_labels() -> None:
    example = supervise(make_record(), [CustomConfig(target=f"{__name__}:list_of")])
    assert (example.text, example.labels) == ("circle, red, sky, square", ("circle", "red", "sky", "square"))


def unheard_of(record: Record) -> tuple[str, str]:
    return "a text", "oracle"


def test_a_provenance_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UserError, match=r"unheard_of gave the provenance 'oracle'\. Use one of human, machine"):
        supervise(make_record(), [CustomConfig(target=f"{__name__}:unheard_of")])


# --- Labels ----------------------------------------------------------------------------------------------------------


def test_labels_by_score_stand_best_first() -> None:
    source = MachineLabelsConfig(order="by_score", max_labels=3)
    for number in range(5):
        assert source_text(source, make_record(number))[0] == "circle, red, sky"
    unsorted = make_record(labels=("low", "high"), scores=(0.1, 0.9))
    assert source_text(source, unsorted)[0] == "high, low"


def test_a_list_of_labels_is_known_as_one_and_a_caption_is_not() -> None:
    assert supervise(make_record(), [CAPTIONS]).labels == ()
    for source in (LABELS, CLASSES):
        example = supervise(make_record(), [source])
        assert ", ".join(example.labels) == example.text and len(example.labels) >= 2


def test_more_scores_than_labels_are_refused() -> None:
    with pytest.raises(UserError, match="Got 1 labels and 2 scores"):
        source_text(LABELS, make_record(labels=("one",), scores=(0.5, 0.4)))


def test_a_label_is_found_by_its_place_and_never_inside_another() -> None:
    labels = ("woman", "man", "man, old", "man")
    text = ", ".join(labels)
    by_place = label_spans(labels, "position")
    assert [[text[start:end] for start, end in spans] for spans in by_place] == [[label] for label in labels]
    assert by_place[1] != by_place[3]  # the same word twice
    released = label_spans(labels, "substring")
    assert [len(spans) for spans in released] == [1, 4, 1, 4]  # wo-man, man, man-comma-old, man


# --- Beside the data -------------------------------------------------------------------------------------------------


def side_labels(folder: Path, keys: list[str]) -> Path:
    records = [Record(key, labels=("ours", "worse"), scores=(0.9, 0.2), captions=(f"seen in {key}",)) for key in keys]
    write_shards(records, folder)
    return folder


def test_labels_from_side_shards_stand_in_place_of_the_records_own(tmp_path: Path) -> None:
    folder = side_labels(tmp_path / "side", ["key-0", "key-1"])
    source = MachineLabelsConfig(labels_from=folder, min_score=0.5)
    beside = {folder: SideShards(folder)}
    assert supervise(make_record(), [source], beside).text == "ours"
    with pytest.raises(UserError, match=r"side: says nothing of 'key-2'"):
        supervise(make_record(2), [source], beside)
    tolerant = MachineLabelsConfig(labels_from=folder, missing="none")
    example = supervise(make_record(2), [tolerant], beside)
    assert (example.text, example.source) == ("", "none")


CAPTION_LINES = [("key-0", "a cat, on a mat"), ("key-1", 'two "big"\nlines'), ("key-0", "a café"), ("key-9", "nine")]


def write_captions(file: Path) -> Path:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({"key": key, "caption": text}) + "\n" for key, text in CAPTION_LINES))
    elif file.suffix == ".csv":
        cells = [(key, text.replace('"', '""')) for key, text in CAPTION_LINES]
        file.write_text("\ufeffcaption,key\r\n" + "".join(f'"{text}",{key}\r\n' for key, text in cells))
    else:
        by_key = {key: tuple(text for other, text in CAPTION_LINES if other == key) for key, _ in CAPTION_LINES}
        write_shards([Record(key, captions=captions) for key, captions in by_key.items()], file)
    return file


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv", "side"])
def test_generated_captions_come_from_any_form_of_file(tmp_path: Path, name: str) -> None:
    file = write_captions(tmp_path / name)
    read = SideShards(file) if file.is_dir() else CaptionFile(file)
    read = pickle.loads(pickle.dumps(read))
    expected = {key: tuple(text for other, text in CAPTION_LINES if other == key) for key, _ in CAPTION_LINES}
    for key, captions in expected.items():
        found = read(key)
        assert found is not None and found.captions == captions
    assert read("stranger") is None
    source = GeneratedCaptionsConfig(file=file)
    example = supervise(make_record(1), [source], {file: read})
    assert (example.text, example.source, example.labels) == ('two "big"\nlines', "generated", ())


def test_a_file_of_captions_costs_an_index_and_not_its_texts(tmp_path: Path) -> None:
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps({"key": f"k{n}", "captions": ["word " * 200]}) + "\n" for n in range(500)))
    read = CaptionFile(file)
    assert len(pickle.dumps(read)) < 500 * 24 + 2000 < file.stat().st_size / 30
    found = read("k77")
    assert found is not None and found.captions == ("word " * 200,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"key": "a", "caption": 3}\n', r"record 1 \(a\): expected a text under 'caption'"),
        ('{"key": "a", "captions": "text"}\n', "'captions' must be a list of texts"),
        ('{"key": "a", "caption": "x"}\n\n{"caption": "x"}\n', "record 2: has no text under 'key'"),
        ('{"key": "a", "caption": "x"}\n{"key": "b", "capt', r"record 2: cannot be read .*cut off"),
    ],
)
def test_a_file_of_captions_that_is_damaged_is_one_clear_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "captions.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        CaptionFile(tmp_path / "captions.jsonl")


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path: Path) -> None:
    file = write_captions(tmp_path / "captions.jsonl")
    read = CaptionFile(file)
    file.write_text(file.read_text().replace("key-1", "key-7"))
    with pytest.raises(UserError, match="changed while it was read"):
        read("key-1")


def test_what_lies_beside_the_data_is_found_by_split_and_must_be_complete(tmp_path: Path) -> None:
    keys = [f"key-{number}" for number in range(6)]
    reader = ShardReader(write_shards([Record(key, b"picture") for key in keys], tmp_path / "data"))
    side_labels(tmp_path / "labels" / "train", keys[:4])
    side_labels(tmp_path / "labels" / "validation", keys)
    source, everything = MachineLabelsConfig(labels_from=tmp_path / "labels"), np.arange(6)
    first = next(record.key for record in reader if record.key in keys[4:])
    with pytest.raises(UserError, match=rf"labels/train: says nothing of 2 of 6 examples of .*'{first}' the first"):
        open_beside([source], "train", reader, everything)
    opened = open_beside([source], "validation", reader, everything)
    assert supervise(reader[0], [source], opened).source == "machine"
    seen = np.array([reader.position(key) for key in keys[:4]])
    assert open_beside([source], "train", reader, seen)  # what is not seen may be missing


# --- No text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv", "x" * 300])
def test_what_lies_beside_the_data_and_cannot_be_read_is_one_error(tmp_path: Path, name: str) -> None:
    """A folder in the place of a file, and a name that no system takes: the root of a machine may read all else."""
    path = tmp_path / name
    if len(name) < 300:
        path.mkdir()
        with pytest.raises(UserError, match=rf"^{path}: holds no side shards"):
            content_fingerprint(path)
        with pytest.raises(UserError, match=rf"^{path}: cannot be read \(Is a directory\)"):
            CaptionFile(path)
    else:
        for read in (content_fingerprint, lambda path: of_split(path, "train")):
            with pytest.raises(UserError, match=r"x: cannot be read \(File name too long\)"):
                read(path)


def test_an_image_alone_has_no_text_whatever_is_known_of_it() -> None:
    example = supervise(make_record(), [NoneConfig()])
    assert (example.text, example.source, example.image) == ("", "none", b"picture")
    assert supervise(make_record(captions=("  ",)), [CAPTIONS]).source == "none"


def test_five_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    folder = side_labels(tmp_path / "side", [f"key-{number}" for number in range(2000)])
    sources = (*ALL, GeneratedCaptionsConfig(file=folder, weight=2), NoneConfig())
    beside = {folder: SideShards(folder)}
    counts = Counter(supervise(make_record(number), sources, beside).source for number in range(2000))
    assert counts.keys() == {"human", "machine", "class_name", "generated", "none"}
    assert counts["generated"] / 2000 == pytest.approx(1 / 3, abs=0.04)
    assert counts["none"] / 2000 == pytest.approx(1 / 6, abs=0.04)
