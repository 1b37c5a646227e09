from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from made_up_study import Finished

from data_loaders.shards import write_shards
from vlm.config import compose, dump_yaml
from vlm.run import CONFIG, RESULT, RunConfig
from vlm.studies.collect import (
    Score,
    collect,
    headline,
    pretraining_of,
    source_name,
    table,
    write_csv,
    write_parquet,
)
from vlm.studies.plan import plan
from vlm.supervision import CaptionsConfig, MachineLabelsConfig, NoneConfig, SupervisionConfig
from vlm.supervision.ledger import LEDGER, Entry, Ledger, model_entries, unknown_entries
from vlm.types import Record


def select(scores: list[Score], **wanted: object) -> list[Score]:
    return [score for score in scores if all(getattr(score, name) == value for name, value in wanted.items())]


def test_each_score_carries_the_supervision_of_the_pretraining_behind_it(finished: Finished) -> None:
    found = {score.point: (score.source, score.fraction, score.pairs) for score in select(finished.scores, task="gqa")}
    assert found == {
        "none": ("none", 0, 0),
        "5%": ("captions", 0.05, 1000),
        "100%": ("captions", 1, 20_000),
        "labels": ("machine_labels", 1, 20_000),
    }


def test_every_metric_of_every_seed_is_a_row_and_baselines_are_columns(finished: Finished) -> None:
    rows = select(finished.scores, stage="finetune", task="nlvr2")
    assert len(rows) == 4 * 3 * 2
    assert {score.metric for score in finished.scores if score.task == "retrieval"} == {
        "styles/recall_at_1",
        "styles/text_to_image/recall_at_5",
    }
    assert [score.score for score in select(rows, point="none", metric="accuracy")] == [50, 51, 52]


def test_baselines_stand_beside_the_scores_that_they_are_comparable_to(finished: Finished) -> None:
    def baselines(**wanted: object) -> set[tuple[float | None, float | None, float | None]]:
        found = select(finished.scores, **wanted)
        return {(score.question_only_score, score.question_prior, score.chance) for score in found}

    assert baselines(task="nlvr2", metric="accuracy") == {(52, 50, None)}
    assert baselines(task="nlvr2", metric="consistency") == {(26, None, None)}
    assert baselines(task="gqa") == {(None, 40, None)}
    assert baselines(metric="styles/recall_at_1") == {(None, None, 0.5)}
    assert baselines(metric="styles/text_to_image/recall_at_5") == {(None, None, None)}


def test_runs_without_a_result_are_left_out(finished: Finished, tmp_path: Path) -> None:
    jobs = plan(finished.study, tmp_path)
    assert collect(jobs, tmp_path) == []
    chosen = next(job for job in jobs if job.stage == "finetune")
    chosen.folder.mkdir(parents=True)
    (chosen.folder / RESULT).write_text(json.dumps({"scores": {"accuracy": 50.0}}))
    assert [(score.run, score.pairs) for score in collect(jobs, tmp_path)] == [(f"runs/{chosen.id}", None)]


def test_the_file_has_a_line_a_score_and_no_machine_s_paths(finished: Finished, tmp_path: Path) -> None:
    write_csv(table(finished.jobs, finished.scores, finished.folder), tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["score"] != "" for row in rows] == [True] * len(finished.scores) + [False] * 12
    assert {row["run"] for row in rows} == {f"runs/{job.id}" for job in finished.jobs}
    assert {(row["stage"], row["pairs"]) for row in rows if row["point"] == "5%"} >= {("pretrain", "1000")}
    assert all(row["seconds"] == "2.5" for row in rows)
    assert all(row["run"].startswith("runs/") for row in rows)
    five = next(row for row in rows if (row["point"], row["task"]) == ("5%", "nlvr2"))
    assert five["score"] == "59.4574"  # 50 + 20 * 0.05^0.25
    assert five["chance"] == ""


def test_parquet_holds_the_same_table_with_types(finished: Finished, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = table(finished.jobs, finished.scores, finished.folder)
    assert write_parquet(rows, tmp_path / "results.parquet")
    read = parquet.read_table(tmp_path / "results.parquet")
    assert read.to_pylist() == rows
    types = {name: str(read.schema.field(name).type) for name in ("seed", "score", "question_only", "total_pairs")}
    assert types == {"seed": "int64", "score": "double", "question_only": "bool", "total_pairs": "int64"}


def test_a_score_says_who_has_seen_how_many_pairs(finished: Finished, tmp_path: Path) -> None:
    (one, *_) = [job for job in finished.jobs if job.stage == "finetune"]
    file = one.folder / LEDGER
    ledger = Ledger().plus(["fusion"], [Entry("pairs", "data", 500)])
    tower = ledger.plus(["vision"], model_entries("vision", "timm:vit_base_patch16_clip_224.openai"))
    unknown = tower.plus(["labeller"], unknown_entries("labeller", "somebody's"))
    found = []
    try:
        for books in (ledger, tower, unknown):
            file.write_text(books.text())
            score = select(collect([one], finished.folder), metric=headline(one))[0]
            found.append((score.supervised_pairs, score.total_pairs, score.total_labelled_images, score.others))
    finally:
        file.unlink()
    assert found == [
        (500, 500, 0, ""),
        (500, 400_000_500, 0, "vision 400,000,000"),
        (500, None, None, "vision 400,000,000; labeller unknown"),
    ]
    write_csv(table([], [score], finished.folder), tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as read:
        (row,) = csv.DictReader(read)
    assert (row["pairs"], row["total_pairs"], row["others"]) == ("0", "", "vision 400,000,000; labeller unknown")


def test_a_finished_run_of_before_ledgers_is_counted_where_its_data_is_and_stops_no_study(
    finished: Finished, tmp_path: Path
) -> None:
    (one, *_) = [job for job in finished.jobs if job.stage == "finetune"]
    first, root = pretraining_of(one).folder, tmp_path / "root"
    written = {
        first / CONFIG: compose("pretrain", ["data=folder", f"data.root={root}"], RunConfig),
        one.folder / CONFIG: compose("finetune", ["task=nlvr2", f"start_from={first}"], RunConfig),
    }

    def counted() -> tuple[int | None, int | None]:
        score = select(collect([one], finished.folder), metric=headline(one))[0]
        return score.supervised_pairs, score.total_pairs

    try:
        for file, config in written.items():
            file.write_text(dump_yaml(config))
        assert counted() == (None, None)  # its data is gone
        write_shards([Record(f"key-{n}", captions=("a text",)) for n in range(9)], root / "pairs" / "train")
        assert counted() == (9, 9)
        (root / "pairs" / "train" / "index.safetensors").write_bytes(b"")
        assert counted() == (None, None)
        assert not (one.folder / LEDGER).exists()
    finally:
        for file in written:
            file.unlink()


def test_sources_of_a_mixture_are_all_named() -> None:
    captions, labels = CaptionsConfig(weight=0.5), MachineLabelsConfig()
    assert source_name(SupervisionConfig(sources=(labels, captions))) == "captions+machine_labels"
    assert source_name(SupervisionConfig(sources=(labels, CaptionsConfig(weight=0)))) == "machine_labels"
    assert source_name(SupervisionConfig(fraction=0)) == "none"
    assert source_name(SupervisionConfig(sources=(captions, NoneConfig()))) == "captions"
    assert source_name(SupervisionConfig(sources=(NoneConfig(),))) == "images_only"
