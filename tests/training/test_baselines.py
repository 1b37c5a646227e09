"""What a checkpoint scores without the picture, with the wrong picture, or what the training answers alone score."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_loaders.shards import ShardReader, open_index, write_shards
from vlm.cli import main
from vlm.errors import UserError
from vlm.evaluation import evaluate_run
from vlm.run import RunConfig, train
from vlm.tasks.task import Task

MakeConfig = Callable[..., RunConfig]
BASELINES = ("question_only", "shuffled_images", "most_frequent")


def on_folder(config: RunConfig, root: Path) -> RunConfig:
    """The same run on another data root."""
    return RunConfig.model_validate(config.model_dump(mode="json") | {"data": {"type": "folder", "root": str(root)}})


def predictions_in(file: Path) -> dict[str, str]:
    """Question id -> answer of a VQAv2 or NLVR2 results file."""
    if file.suffix == ".csv":
        return dict(line.split(",") for line in file.read_text().splitlines())
    return {str(row["question_id"]): row["answer"] for row in json.loads(file.read_text())}


@pytest.mark.parametrize("task", ["vqav2", "nlvr2"])
def test_baselines_leave_the_run_as_it_is_and_have_files_of_their_own(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    config = make_config("finetune", f"task={task}", "trainer.samples=64")
    folder = train(config)
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    for baseline in BASELINES:
        assert main(["evaluate", str(folder), "--baseline", baseline]) == 0
        assert "accuracy: " in capsys.readouterr().out
    assert {name: (folder / name).read_bytes() for name in before} == before
    suffix = "csv" if task == "nlvr2" else "json"
    added = {file.name for file in folder.iterdir()} - set(before)
    assert added >= {f"predictions-{task}-test-{baseline}.{suffix}" for baseline in BASELINES}
    assert added >= {f"scores-{task}-test-{baseline}.json" for baseline in BASELINES}

    read: Any = lambda name: predictions_in(folder / f"predictions-{task}-test-{name}.{suffix}")  # noqa: E731
    assert isinstance(config.task, Task)
    questions = config.task.read(config.data.prepare(progress=False), "test")
    by_text: dict[str, set[str]] = {}
    for question in questions:
        by_text.setdefault(question.text, set()).add(read("question_only")[question.id])
    assert len(by_text) < len(questions)
    assert all(len(answers) == 1 for answers in by_text.values())  # the words alone decide
    result = json.loads((folder / "result.json").read_text())
    most_frequent = json.loads((folder / f"scores-{task}-test-most_frequent.json").read_text())
    train_questions = config.task.train_questions(config.data.prepare(progress=False))
    by_type = config.task.question_prior(train_questions, questions, by_text=False)
    assert most_frequent["scores"]["accuracy"] == config.task.score(questions, by_type)["accuracy"]
    assert most_frequent["scores"]["question_prior"] == result["scores"]["question_prior"]


def test_a_run_scored_again_gives_its_result(make_config: MakeConfig) -> None:
    """Also when the run that it started from is gone."""
    pretrained = train(make_config("pretrain", "trainer.samples=16", folder="pretrained"))
    folder = train(make_config("finetune", "task=gqa", "trainer.samples=64", f"start_from={pretrained}"))
    shutil.rmtree(pretrained)
    scores = evaluate_run(folder)
    assert scores == json.loads((folder / "result.json").read_text())["scores"]
    assert json.loads((folder / "scores-gqa-test.json").read_text())["scores"] == scores


def test_answers_to_all_gqa_questions_give_consistency_and_leave_accuracy_as_it_is(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Each balanced question entails an unbalanced one, whose answer it shares and which counts in no accuracy."""
    root = tmp_path / "root"
    shutil.copytree(make_config("finetune").data.prepare(progress=False), root)
    balanced = json.loads((root / "gqa" / "testdev_balanced_questions.json").read_text())
    others = {f"{key}-other": row | {"isBalanced": False, "entailed": []} for key, row in balanced.items()}
    every = others | {key: row | {"entailed": [f"{key}-other"]} for key, row in balanced.items()}
    (root / "gqa" / "testdev_all_questions.json").write_text(json.dumps(every))
    folder = train(on_folder(make_config("finetune", "task=gqa", "trainer.samples=128"), root))
    alone = json.loads((folder / "result.json").read_text())["scores"]
    assert 0 < alone["accuracy"] < 100
    assert evaluate_run(folder, ["task.evaluate_on=all"]) == alone

    predictions = folder / "predictions-gqa-test-all.json"
    assert len(json.loads(predictions.read_text())) == len(every) == 2 * len(balanced)
    questions = root / "gqa" / "testdev_all_questions.json"
    output = tmp_path / "scores.json"
    files = ["--questions", str(questions), "--all-questions", str(questions), "--json", str(output)]
    assert main(["score", "gqa", str(predictions), *files]) == 0
    scores = json.loads(output.read_text())
    assert scores["accuracy"] == pytest.approx(alone["accuracy"])
    assert scores["num_questions"] == len(balanced)
    assert scores["consistency"] == 100  # the same words about the same picture have the same answer


def test_a_root_without_training_questions_is_enough_to_score_a_run_again(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Without them there is no most frequent answer. Damaged ones are an error, not a score that is left out."""
    root = tmp_path / "root"
    shutil.copytree(make_config("finetune").data.prepare(progress=False), root)
    folder = train(on_folder(make_config("finetune", "task=gqa", "trainer.samples=32"), root))
    expected = json.loads((folder / "result.json").read_text())["scores"]
    expected.pop("question_prior")
    questions = root / "gqa" / "train_balanced_questions.json"
    questions.write_text("{")
    with pytest.raises(UserError, match="train_balanced_questions"):
        evaluate_run(folder)
    questions.unlink()
    assert evaluate_run(folder) == expected


def test_a_split_without_answers_has_predictions_and_no_scores(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """VQAv2's test split, as it is released."""
    world = make_config("finetune").data.prepare(progress=False)
    root = tmp_path / "root"
    shutil.copytree(world, root, ignore=shutil.ignore_patterns("v2_mscoco_test2015_annotations.json", "pairs", "gqa"))
    folder = train(on_folder(make_config("finetune", "task=vqav2", "trainer.samples=32"), root))
    assert json.loads((folder / "result.json").read_text())["scores"] == {}
    assert len(predictions_in(folder / "predictions-vqav2-test.json")) == 32
    for baseline in ("shuffled_images", "most_frequent"):
        assert main(["evaluate", str(folder), "--baseline", baseline]) == 0
        assert "no scores: this split comes without answers" in capsys.readouterr().out
        assert len(predictions_in(folder / f"predictions-vqav2-test-{baseline}.json")) == 32


def test_retrieval_without_its_pictures_is_chance(make_config: MakeConfig, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(make_config("pretrain").data.prepare(progress=False), root)
    records = list(ShardReader(open_index(root / "pairs" / "validation")))[:8]
    write_shards(records, root / "retrieval" / "captions_images")
    rows = [{"id": record.key, "text": record.captions[0], "image_key": record.key} for record in records]
    (root / "retrieval" / "captions.json").write_text(json.dumps(rows))
    pretrained = train(on_folder(make_config("pretrain", "trainer.samples=32", folder="pretrained"), root))
    config = make_config("finetune", "task=retrieval", f"start_from={pretrained}", folder="retrieval")
    folder = train(on_folder(config, root))
    scores = evaluate_run(folder, baseline="question_only")
    assert scores["captions/text_to_image/recall_at_1"] == 100 / 8  # eight equal images, all level
    assert scores["captions/text_to_image/recall_at_5"] == 100 * 5 / 8
    shuffled = evaluate_run(folder, baseline="shuffled_images")
    assert main(["evaluate", str(folder), "--baseline", "most_frequent"]) == 2
    assert json.loads((folder / "result.json").read_text())["scores"].keys() == scores.keys() == shuffled.keys()


def test_a_pretraining_is_not_evaluated(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(make_config("pretrain", "trainer.samples=16"))
    assert main(["evaluate", str(folder)]) == 2
    assert "is a pretraining, which has no task" in capsys.readouterr().err
