"""Ledgers of whole runs: through encoders, pretraining and fine-tuning."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_loaders import FolderData
from data_loaders.shards import ShardReader, open_index, write_shards
from vlm.bookkeeping import ledger_of, ledger_of_run
from vlm.config import compose, dump_yaml, fingerprint
from vlm.run import CONFIG, RunConfig, train
from vlm.supervision.ledger import LEDGER, Component, Ledger, read_ledger
from vlm.supervision.published import KINDS, Kind
from vlm.types import Record

MakeConfig = Callable[..., RunConfig]
SHORT = "trainer.samples=16"


def books(run: Path) -> Ledger:
    return read_ledger(run / LEDGER)


def seen(ledger: Ledger, *components: Component) -> dict[Kind, int]:
    counts = {kind: ledger.count(kind, components) for kind in KINDS}
    assert not any(one.unknown for one in counts.values())
    return {kind: one.known for kind, one in counts.items() if one.known}


def test_the_books_follow_a_model_through_all_its_runs(make_config: MakeConfig) -> None:
    vision = train(make_config("unimodal_vision", SHORT, folder="vision"))
    language = train(make_config("unimodal_language", SHORT, folder="language"))
    assert seen(books(vision), "vision") == {"labelled_images": 32}
    assert seen(books(language), "language") == {"texts": 200}
    encoders = (f"model.vision.weights='{vision}'", f"model.language.weights='{language}'", "model.vision.frozen=true")
    first = train(make_config("pretrain", SHORT, *encoders, "supervision.fraction=0.25", folder="first"))
    assert seen(books(first), "fusion") == {"pairs": 16}
    assert seen(books(first), "vision") == {"labelled_images": 32}  # frozen: it learnt from no pair
    assert seen(books(first), "language") == {"pairs": 16, "texts": 200}
    labels = ("supervision=machine_labels", "supervision.fraction=0.5", f"start_from='{first}'")
    second = train(make_config("pretrain", SHORT, *labels, folder="second"))
    assert seen(books(second), "fusion") == {"pairs": 16, "labelled_images": 32}
    last = train(make_config("finetune", SHORT, "task=gqa", f"start_from='{second}'", folder="last"))
    asked = json.loads((last / "result.json").read_text())["examples"]
    assert seen(books(last), "fusion") == {"pairs": 16, "labelled_images": 32, "questions": asked}
    # 32 images of the pairs' data with machine labels, and 32 of the encoder's own.
    assert seen(books(last), "vision", "fusion")["labelled_images"] == 64
    assert books(last).others() == {}


def test_windows_of_two_runs_are_united(make_config: MakeConfig) -> None:
    first = train(make_config("pretrain", SHORT, "supervision.fraction=0.5", folder="first"))
    for seed, expected in ((0, 32), (1, None)):
        options = (f"start_from='{first}'", "supervision.fraction=0.5", f"supervision.subset_seed={seed}")
        config = make_config("pretrain", SHORT, *options)
        known = ledger_of(config, config.data.prepare(progress=False)).count("pairs").known
        assert known == expected if expected else 32 < known <= 64


def test_a_mixture_is_counted_by_what_each_example_shows(make_config: MakeConfig) -> None:
    mixture = "supervision.sources=[{type: captions}, {type: machine_labels}, {type: none, weight: 0.5}]"
    config = make_config("pretrain", mixture, SHORT)
    root = config.data.prepare(progress=False)
    ledger = ledger_of(config, root)
    counts = seen(ledger, "fusion")
    assert counts.keys() == {"pairs", "labelled_images", "images"} and sum(counts.values()) == 64
    assert ledger_of(config, root, max_read=10).count("pairs").unknown  # nobody reads many millions
    assert ledger_of(config, None).count("pairs").unknown


def test_the_same_shards_in_another_folder_are_the_same_data_and_others_are_not(tmp_path: Path) -> None:
    records = [Record(f"key-{n}", captions=("a text",)) for n in range(40)]
    for name, words in (("one", "a text"), ("copy", "a text"), ("other", "another")):
        changed = [dataclasses.replace(record, captions=(words,)) for record in records]
        write_shards(changed, tmp_path / name / "pairs" / "train", 16)

    def config(name: str, *more: str) -> RunConfig:
        data = ("data=folder", f"data.root={tmp_path / name}", "supervision.fraction=0.5")
        return compose("pretrain", [*data, *more], RunConfig)

    (tmp_path / "first").mkdir()
    (tmp_path / "first" / CONFIG).write_text(dump_yaml(config("one")))
    for name, count in (("copy", 20), ("other", 40)):
        ledger = ledger_of(config(name, f"start_from={tmp_path / 'first'}"), tmp_path / name)
        assert seen(ledger, "fusion", "language", "vision") == {"pairs": count}


@pytest.mark.parametrize(
    ("sources", "is_told"),
    [
        ("{type: captions}", True),
        ("{type: class_names}", True),
        ("{type: none}", True),
        ("{type: machine_labels}, {type: class_names}", True),
        ("{type: machine_labels, labels_from: SIDE}", True),
        ("{type: generated_captions, file: SIDE}", True),
        ("{type: machine_labels, labels_from: SIDE, min_score: 0.6}", False),
        ("{type: machine_labels, labels_from: SIDE, missing: none}", False),
        ("{type: captions}, {type: machine_labels}", False),
    ],
)
def test_what_an_index_tells_is_what_reading_finds(
    make_config: MakeConfig, tmp_path: Path, sources: str, is_told: bool
) -> None:
    """And a long window is then counted too, which nobody reads."""
    source = make_config("pretrain").data.prepare(progress=False) / "pairs" / "train"
    records = [
        Record(record.key, b"", record.captions, ("x", "y"), (0.5 + number % 2 / 4, 0.1), ("c",))
        for number, record in enumerate(ShardReader(open_index(source)))
    ]
    write_shards(records, tmp_path / "root" / "pairs" / "train", 10)
    write_shards(records, tmp_path / "side")
    data = ("data=folder", f"data.root={tmp_path / 'root'}", "supervision.fraction=0.5")
    config = compose(
        "pretrain", [*data, f"supervision.sources=[{sources.replace('SIDE', str(tmp_path / 'side'))}]"], RunConfig
    )
    told = ledger_of(config, tmp_path / "root", max_read=0)
    read = ledger_of(config, tmp_path / "root")
    assert any("at most 32" in str(told.count(kind, ["fusion"])) for kind in KINDS) != is_told
    for folder in ("root/pairs/train", "side"):
        file = tmp_path / folder / "index.json"
        header = json.loads(file.read_text())
        file.write_text(json.dumps({name: header[name] for name in header if name != "complete"}))
    old = ledger_of(config, tmp_path / "root")
    assert old.text() == read.text() and sum(seen(old, "fusion").values()) == 32
    if is_told:
        assert told.text() == read.text()


def test_the_examples_of_a_remote_root_are_not_fetched_to_be_counted(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        records = (Record(f"{split}-{n}", captions=("a text",), labels=("x",)) for n in range(9))
        write_shards(records, tmp_path / "pairs" / split)
    for sources, pairs in (("{type: captions}", "9"), ("{type: captions}, {type: none}", "at most 9")):
        data = ("data=folder", f"data.root={tmp_path.as_uri()}", f"supervision.sources=[{sources}]")
        config = compose("pretrain", [*data], RunConfig)
        root = config.data.prepare(progress=False)
        (tmp_path / "pairs" / "train" / "00000.tar").unlink(missing_ok=True)
        assert str(ledger_of(config, root).count("pairs", ["fusion"])) == pairs


def test_no_pretraining_has_seen_nothing(make_config: MakeConfig) -> None:
    folder = train(make_config("pretrain", SHORT, "supervision.fraction=0"))
    assert seen(books(folder), *KINDS_OF_COMPONENTS) == {}


KINDS_OF_COMPONENTS: tuple[Component, ...] = ("fusion", "vision", "language", "labeller", "generator", "filter")


def test_tensorboard_shows_the_ledger(make_config: MakeConfig) -> None:
    folder = train(make_config("pretrain", SHORT, "supervision.fraction=0.5"))
    events = EventAccumulator(str(folder)).Reload()
    assert events.Scalars("ledger/fusion/pairs")[0].value == 32
    text = events.Tensors("ledger/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| fusion | 32 | 0 |" in text


def test_a_run_from_before_there_were_ledgers_is_counted_from_its_config(make_config: MakeConfig) -> None:
    folder = train(make_config("pretrain", SHORT, "supervision.fraction=0.5"))
    before = books(folder).text()
    (folder / LEDGER).unlink()
    assert ledger_of_run(folder).text() == before
    assert ledger_of_run(folder / "nowhere").count("pairs").unknown


# --- Encoders, labellers and filters ---------------------------------------------------------------------------------


def test_the_reference_encoders_have_seen_no_pair() -> None:
    ledger = ledger_of(compose("pretrain", ["model=base"], RunConfig), None)
    assert str(ledger.count("pairs", ["vision", "language"])) == "unknown before the data is prepared"
    assert ledger.count("labelled_images", ["vision"]).known == 14_197_122
    clean = ledger_of(compose("pretrain", ["model=base", "supervision.fraction=0"], RunConfig), None)
    assert str(clean.count("pairs")) == "0"
    assert clean.count("labelled_images", ["vision"]).known == 14_197_122
    assert clean.others() == {}


@pytest.mark.parametrize(
    ("overrides", "component", "pairs"),
    [
        (["model.vision.name=vit_base_patch16_clip_224.openai"], "vision", 400_000_000),
        (["model.vision.weights=clip.pth"], "vision", None),
        (["model.vision.weights=clip.pth", "declared.vision={pairs: 5, labelled_images: 0}"], "vision", 5),
        (["model.vision={type: custom, target: 'fractions:Fraction'}"], "vision", None),
        (["model.vision.pretrained=false", "model.vision.name=vit_base_patch16_clip_224.openai"], "vision", 0),
        (["model.language.name=somebody/encoder"], "language", None),
    ],
)
def test_what_an_encoder_has_seen_goes_by_its_weights(
    overrides: list[str], component: Component, pairs: int | None
) -> None:
    config = compose("pretrain", ["model=base", "supervision.fraction=0", *overrides], RunConfig)
    ledger = ledger_of(config, None)
    counted = ledger.count("pairs", [component])
    assert (counted.known == pairs and not counted.unknown) if pairs is not None else counted.unknown
    assert (component in ledger.others()) == (pairs != 0)


def test_a_declaration_changes_no_run() -> None:
    plain, declared = (
        compose("pretrain", ["model=base", *more], RunConfig) for more in ([], ["declared.vision.pairs=7"])
    )
    assert fingerprint(plain) == fingerprint(declared)


def test_labellers_captioners_and_filters_hand_on_what_they_have_seen(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("pretrain")
    root = config.data.prepare(progress=False)
    reader = ShardReader(open_index(root / "pairs" / "train"))
    records = [Record(r.key, labels=("x",), scores=(0.5,), captions=("a text",)) for r in reader]
    write_shards(records, tmp_path / "clip", made_by={"model": "open_clip:ViT-B-32/openai"})
    write_shards(records, tmp_path / "nobody")
    (tmp_path / "scores.jsonl").write_text("".join(f'{{"key": "{r.key}", "score": 1}}\n' for r in reader))

    def of(*overrides: str) -> Ledger:
        return ledger_of(make_config("pretrain", *overrides), root)

    def labels(folder: str) -> str:
        return f"supervision.sources=[{{type: machine_labels, labels_from: '{tmp_path / folder}'}}]"

    assert of(labels("clip")).count("pairs", ["labeller"]).known == 400_000_000
    assert list(of(labels("clip")).others()) == ["labeller"]
    assert of(labels("nobody")).count("pairs", ["labeller"]).unknown
    assert of(labels("nobody"), "declared.labeller={pairs: 0, labelled_images: 0}").others() == {}
    assert of("supervision=machine_labels").others() == {}  # the world's labels come from no model
    captions = f"supervision.sources=[{{type: generated_captions, file: '{tmp_path / 'clip'}'}}]"
    assert of(captions).count("pairs", ["generator"]).known == 400_000_000
    best = f"supervision.selection={{type: best_by_score, file: '{tmp_path / 'clip'}'}}"
    assert list(of(best, "supervision.fraction=0.5").others()) == ["filter"]
    assert of(best).others() == {}  # of all there is no choice
    unknown = f"supervision.selection={{type: best_by_score, file: '{tmp_path / 'scores.jsonl'}'}}"
    assert of(unknown, "supervision.fraction=0.5").count("pairs", ["filter"]).unknown
    assert of("supervision.selection={type: best_by_score}", "supervision.fraction=0.5").others() == {}


def test_labels_of_a_prepared_folder_are_somebody_s(make_config: MakeConfig) -> None:
    config = make_config("pretrain", "supervision=machine_labels")
    root = config.data.prepare(progress=False)
    config = config.model_copy(update={"data": FolderData(root=root)})
    assert ledger_of(config, root).count("pairs", ["labeller"]).unknown


def test_only_images_that_have_a_label_are_counted_and_a_long_window_says_at_most(make_config: MakeConfig) -> None:
    config = make_config("pretrain", "supervision.sources=[{type: machine_labels, min_score: 0.9}]")
    root = config.data.prepare(progress=False)
    ledger = ledger_of(config, root)
    assert 0 < ledger.count("labelled_images", ["fusion"]).known < 64
    assert sum(seen(ledger, "fusion").values()) == 64
    assert str(ledger_of(config, root, max_read=10).count("labelled_images", ["fusion"])) == "at most 64"


def test_a_finished_run_writes_its_ledger_again_and_takes_new_declarations(make_config: MakeConfig) -> None:
    config = make_config("pretrain", SHORT, "supervision.fraction=0.5")
    folder = train(config)
    (folder / LEDGER).unlink()
    train(config)
    assert seen(books(folder), "fusion") == {"pairs": 32}
    declared = make_config(
        "pretrain", SHORT, "supervision.fraction=0.5", "declared.vision={pairs: 7, labelled_images: 0}"
    )
    train(declared.model_copy(update={"folder": folder}))
    assert seen(books(folder), "vision") == {"pairs": 39}


def test_a_declaration_fills_what_the_first_run_left_unknown(make_config: MakeConfig, tmp_path: Path) -> None:
    said = "declared.vision={pairs: 7, labelled_images: 0}"
    config = make_config("pretrain", "supervision.fraction=0", f"start_from='{tmp_path / 'nowhere'}'", said)
    assert seen(ledger_of(config, None), "vision") == {"pairs": 7}
