"""Each task reads its official files, scores as its authors do, and writes the official results file."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from vlm.errors import UserError
from vlm.tasks.gqa import GQATask
from vlm.tasks.nlvr2 import NLVR2Task
from vlm.tasks.retrieval import RetrievalTask, recall_at, retrieval_scores
from vlm.tasks.task import Task
from vlm.tasks.vqav2 import VQAv2Task
from vlm.types import Question

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
FIXTURES = DATA / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"official example files are not at {FIXTURES}")
needs_nlvr2 = pytest.mark.skipif(
    not (DATA / "nlvr2" / "dev.json").is_file(), reason=f"the NLVR2 dev set is not at {DATA / 'nlvr2'}"
)

VQAV2 = [
    Question("17000", "is there a cat?", ("COCO_val2014_000000000017",), ("yes",) * 10, "yes/no"),
    Question("17001", "how many?", ("COCO_val2014_000000000017",), ("2",) * 6 + ("3",) * 4, "number"),
    Question(
        "18000", "what color?", ("COCO_val2014_000000000018",), ("red",) * 5 + ("pink",) * 3 + ("rose",) * 2, "other"
    ),
]
GQA = [
    Question("201", "What is it?", ("n1",), ("t-shirt",), "query"),
    Question("202", "Is it red?", ("n1",), ("yes",), "verify"),
    Question("203", "Is it blue?", ("n2",), ("no",), "verify"),
]
NLVR2 = [
    Question("dev-1-0-0", "one dog", ("dev-1-0-img0", "dev-1-0-img1"), ("True",), "dev-1-0"),
    Question("dev-1-1-0", "one dog", ("dev-1-1-img0", "dev-1-1-img1"), ("False",), "dev-1-0"),
    Question("dev-1-0-1", "two dogs", ("dev-1-0-img0", "dev-1-0-img1"), ("False",), "dev-1-1"),
]
TASKS: list[tuple[Task, list[Question]]] = [(VQAv2Task(), VQAV2), (GQATask(), GQA), (NLVR2Task(), NLVR2)]
each_task = pytest.mark.parametrize(("task", "questions"), TASKS, ids=[task.type for task, _ in TASKS])


def perfect(questions: Sequence[Question]) -> dict[str, str]:
    """The most frequent human answer to each question."""
    return {question.id: max(question.answers, key=question.answers.count) for question in questions}


# --- Scores ----------------------------------------------------------------------------------------------------------


@each_task
def test_a_perfect_predictor_scores_100(task: Task, questions: list[Question]) -> None:
    scores = task.score(questions, perfect(questions))
    assert task.headline in scores
    assert set(scores.values()) == {100.0}


@each_task
def test_a_predictor_that_is_always_wrong_scores_0(task: Task, questions: list[Question]) -> None:
    assert set(task.score(questions, dict.fromkeys((q.id for q in questions), "zebra")).values()) == {0.0}


@each_task
def test_a_missing_prediction_is_an_error(task: Task, questions: list[Question], tmp_path: Path) -> None:
    predictions = perfect(questions)
    del predictions[questions[1].id]
    with pytest.raises(UserError, match=f"question {questions[1].id}: no prediction among 2"):
        task.score(questions, predictions)
    with pytest.raises(UserError, match=f"question {questions[1].id}: no prediction among 2"):
        task.write_predictions(tmp_path / "predictions.json", questions, predictions)


@each_task
def test_predictions_for_other_questions_do_not_count(task: Task, questions: list[Question]) -> None:
    assert task.score(questions, perfect(questions) | {"99999": "zebra"}) == task.score(questions, perfect(questions))


def test_vqav2_gives_part_of_the_credit_for_rarer_answers() -> None:
    scores = VQAv2Task().score(VQAV2, {"17000": "yes", "17001": "3", "18000": "rose"})
    assert scores == pytest.approx(
        {"accuracy": 100 * 2.6 / 3, "accuracy/yes/no": 100, "accuracy/number": 100, "accuracy/other": 60}
    )
    assert VQAv2Task().target(VQAV2[2], {"red": 0, "pink": 1, "green": 2}) == pytest.approx({0: 1.0, 1: 0.9})


def test_gqa_compares_answers_exactly() -> None:
    scores = GQATask().score(GQA, {"201": "t shirt", "202": "yes", "203": "yes"})
    assert scores == pytest.approx({"accuracy": 100 / 3, "accuracy/query": 0, "accuracy/verify": 50})


def test_nlvr2_is_consistent_only_where_all_pairs_of_a_sentence_are_right() -> None:
    scores = NLVR2Task().score(NLVR2, {"dev-1-0-0": "True", "dev-1-1-0": "True", "dev-1-0-1": "False"})
    assert scores == pytest.approx({"accuracy": 100 * 2 / 3, "consistency": 50})


def test_a_rank_of_zero_is_first() -> None:
    alone = [(0, 0), (1, 0), (4, 0), (30, 0)]
    assert [recall_at(alone, k) for k in (1, 5, 10)] == [25, 75, 75]
    level = [(0, 1), (4, 3)]  # first of two in half of the orders; fifth to eighth
    assert [recall_at(level, k) for k in (1, 5, 10)] == [25, 62.5, 100]
    scores = retrieval_scores(
        {"text_to_image": [(0, 0), (0, 0), (3, 0), (20, 0)], "image_to_text": [(0, 0), (7, 0), (7, 0), (7, 0)]}
    )
    assert scores["recall_at_1"] == pytest.approx((50 + 25) / 2)
    assert scores["text_to_image/recall_at_5"] == 75
    assert scores["image_to_text/recall_at_10"] == 100


# --- What words alone tell -------------------------------------------------------------------------------------------


def statements(count: int, prefix: str) -> list[Question]:
    """`count` statements, each true of two pairs of images and false of two."""
    return [
        Question(
            f"{prefix}-{s}-{pair}-0", f"statement {s}", ("a", "b"), (("True", "False")[pair % 2],), f"{prefix}-{s}-0"
        )
        for s in range(count)
        for pair in range(4)
    ]


def test_the_question_prior_is_chance_where_every_sentence_is_balanced() -> None:
    task = NLVR2Task()
    questions = statements(25, "dev")
    for train in (statements(25, "train"), statements(5, "train")):  # with sentences that training had, and without
        assert task.score(questions, task.question_prior(train, questions))["accuracy"] == 50


def test_the_question_prior_takes_the_question_then_its_type_then_anything() -> None:
    train = [
        Question("1", "is it red?", ("a",), ("yes",), "verify"),
        Question("2", "is it blue?", ("a",), ("no",), "verify"),
        Question("3", "is it pink?", ("a",), ("no",), "verify"),
        *(Question(f"{number}", "what is it?", ("a",), ("dog",), "query") for number in range(4, 9)),
    ]
    asked = [
        Question("a", "is it red?", ("b",), (), "verify"),
        Question("b", "is it new?", ("b",), (), "verify"),
        Question("c", "left or right?", ("b",), (), "choose"),
    ]
    assert GQATask().question_prior(train, asked) == {"a": "yes", "b": "no", "c": "dog"}


def test_the_question_prior_is_told_the_question_type_and_not_the_answer_type() -> None:
    """ "yes/no" and "number" are known only once the answer is."""
    train = [
        Question("1", "is it?", ("a",), ("yes",) * 10, "yes/no", "is it"),
        Question("2", "is there?", ("a",), ("no",) * 10, "yes/no", "is there"),
        Question("3", "is there one?", ("a",), ("no",) * 10, "yes/no", "is there"),
    ]
    asked = [
        Question("4", "is it new?", ("b",), (), "yes/no", "is it"),
        Question("5", "so?", ("b",), (), "yes/no", "so"),
    ]
    assert VQAv2Task().question_prior(train, asked) == {"4": "yes", "5": "no"}
    with pytest.raises(UserError, match="no training question has an answer"):
        VQAv2Task().question_prior([], asked)


# --- Results files ---------------------------------------------------------------------------------------------------


def test_vqav2_results_are_a_list_of_whole_number_ids_and_answers(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    VQAv2Task().write_predictions(file, VQAV2, perfect(VQAV2))
    assert json.loads(file.read_text()) == [
        {"question_id": 17000, "answer": "yes"},
        {"question_id": 17001, "answer": "2"},
        {"question_id": 18000, "answer": "red"},
    ]


def test_gqa_results_are_a_list_of_question_ids_and_predictions(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    GQATask().write_predictions(file, GQA, perfect(GQA))
    assert json.loads(file.read_text())[0] == {"questionId": "201", "prediction": "t-shirt"}
    assert len(json.loads(file.read_text())) == 3


def test_nlvr2_results_are_rows_of_identifier_and_prediction(tmp_path: Path) -> None:
    NLVR2Task().write_predictions(tmp_path / "results.json", NLVR2, perfect(NLVR2))
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]
    rows = list(csv.reader((tmp_path / "results.csv").read_text().splitlines()))
    assert rows == [["dev-1-0-0", "True"], ["dev-1-1-0", "False"], ["dev-1-0-1", "False"]]


# --- Official files --------------------------------------------------------------------------------------------------


def write_gqa(root: Path, split: str, answers: Sequence[str]) -> None:
    rows = {
        f"{split}-{number}": {"question": "what?", "imageId": "n1", "answer": answer, "types": {"structural": "query"}}
        for number, answer in enumerate(answers)
    }
    (root / "gqa").mkdir(exist_ok=True)
    (root / "gqa" / f"{split}_balanced_questions.json").write_text(json.dumps(rows))


def test_the_gqa_vocabulary_holds_the_answers_of_train_and_validation(tmp_path: Path) -> None:
    for split, answers in (("train", ["red", "blue"]), ("val", ["green", "red"]), ("testdev", ["unseen"])):
        write_gqa(tmp_path, split, answers)
    assert GQATask().vocabulary(tmp_path) == ("blue", "green", "red")
    assert GQATask().target(GQATask().read(tmp_path, "test")[0], {"red": 0}) == {}


def test_gqa_answers_all_questions_of_a_split_and_counts_the_balanced_ones(tmp_path: Path) -> None:
    write_gqa(tmp_path, "val", ["red", "blue"])
    rows = json.loads((tmp_path / "gqa" / "val_balanced_questions.json").read_text())
    rows["val-9"] = rows["val-0"] | {"answer": "green", "isBalanced": False}
    (tmp_path / "gqa" / "val_all_questions.json").write_text(json.dumps(rows))
    task = GQATask(evaluation_split="validation", evaluate_on="all")
    questions = task.evaluation_questions(tmp_path)
    assert {question.id: question.counts for question in questions} == {"val-0": True, "val-1": True, "val-9": False}
    assert task.score(questions, dict.fromkeys(rows, "red"))["accuracy"] == 50
    assert [question.id for question in task.read(tmp_path, "validation")] == ["val-0", "val-1"]  # while training
    assert (task.evaluation_name, GQATask().evaluation_name) == ("validation-all", "test")
    rows["val-9"]["isBalanced"] = "no"
    (tmp_path / "gqa" / "val_all_questions.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r'question "val-9": "isBalanced" must be true or false. Got "no"'):
        task.evaluation_questions(tmp_path)


def test_a_gqa_question_in_two_chunks_names_the_second(tmp_path: Path) -> None:
    write_gqa(tmp_path, "train", ["red"] * 3)
    chunks = tmp_path / "gqa" / "train_all_questions"
    chunks.mkdir()
    for number in range(2):
        shutil.copy(tmp_path / "gqa" / "train_balanced_questions.json", chunks / f"train_all_questions_{number}.json")
    with pytest.raises(UserError, match=r"questions_1\.json: question train-0 stands in an earlier chunk too"):
        GQATask(train_on="all").read(tmp_path, "train")


def test_train_fractions_are_nested_and_exact(tmp_path: Path) -> None:
    write_gqa(tmp_path, "train", ["red"] * 200)
    parts = [
        [question.id for question in GQATask(train_fraction=fraction).train_questions(tmp_path)]
        for fraction in (0.001, 0.1, 0.5, 1)
    ]
    assert [len(part) for part in parts] == [1, 20, 100, 200]
    assert parts[0] == parts[1][:1] and parts[1] == parts[2][:20] and set(parts[2]) < set(parts[3])
    assert parts[1] != parts[3][:20]  # random, not the first


def write_vqav2(root: Path, split: str, answers: Sequence[Sequence[str]]) -> None:
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, ten in enumerate(answers):
        identity = {"question_id": number, "image_id": 7}
        questions.append(identity | {"question": "what?"})
        annotations.append(identity | {"answers": [{"answer": answer} for answer in ten], "answer_type": "other"})
    folder = root / "vqav2"
    folder.mkdir(exist_ok=True)
    (folder / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps({"annotations": annotations}))


def test_the_vqav2_vocabulary_holds_frequent_majority_answers(tmp_path: Path) -> None:
    write_vqav2(tmp_path, "train2014", [["red"] * 6 + ["pink"] * 4] * 9 + [["blue"] * 10] * 8)
    assert VQAv2Task().vocabulary(tmp_path) == ("red",)
    assert VQAv2Task(min_occurrences=8).vocabulary(tmp_path) == ("blue", "red")


def test_vqav2_answers_are_counted_after_normalisation(tmp_path: Path) -> None:
    write_vqav2(tmp_path, "train2014", [["The red!"] * 10] * 5 + [["red"] * 10] * 4)
    task = VQAv2Task()
    assert task.vocabulary(tmp_path) == ("red",)
    question = task.read(tmp_path, "train")[0]
    assert question.answers == ("The red!",) * 10  # as they were given: scorers normalise by their own rules
    assert task.target(question, {"red": 0}) == {0: 1.0}


def test_the_vqav2_vocabulary_may_count_validation_too(tmp_path: Path) -> None:
    write_vqav2(tmp_path, "train2014", [["red"] * 10] * 5)
    write_vqav2(tmp_path, "val2014", [["red"] * 10] * 4 + [["blue"] * 10] * 9)
    assert VQAv2Task().vocabulary(tmp_path) == ()
    assert VQAv2Task(vocabulary_from="train_and_validation").vocabulary(tmp_path) == ("blue", "red")


@pytest.mark.parametrize("task", [VQAv2Task, GQATask])
def test_an_answer_vocabulary_may_be_given_in_the_order_of_its_labels(tmp_path: Path, task: Any) -> None:
    (tmp_path / "answers.json").write_text(json.dumps(["", "red", "blue"]))
    assert task(answer_vocabulary=tmp_path / "answers.json").vocabulary(tmp_path) == ("", "red", "blue")


def test_a_vqav2_question_without_a_known_answer_stays_in_evaluation(tmp_path: Path) -> None:
    write_vqav2(tmp_path, "val2014", [["red"] * 10, ["seldom"] * 10])
    task = VQAv2Task()
    questions = task.read(tmp_path, "validation")
    assert task.target(questions[1], {"red": 0}) == {}
    assert task.score(questions, {"0": "red", "1": "red"})["accuracy"] == 50


def test_vqav2_test_splits_are_read_without_answers(tmp_path: Path) -> None:
    for split in ("test2015", "test-dev2015"):
        write_vqav2(tmp_path, split, [["?"] * 10] * 2)
        (tmp_path / "vqav2" / f"v2_mscoco_{split}_annotations.json").unlink()
    for name in ("test", "test_dev"):
        questions = VQAv2Task().read(tmp_path, name)
        assert [(q.answers, q.image_keys) for q in questions] == [((), ("COCO_test2015_000000000007",))] * 2
    with pytest.raises(UserError, match=r"unknown split 'dev'\. Available: train, validation, test, test_dev"):
        VQAv2Task().read(tmp_path, "dev")


MINIVAL_LISTS: dict[str, list[Any]] = {
    "question ids": [3000, 3001],
    "LXMERT's rows": [{"question_id": 3000, "label": {}}, {"question_id": 3001}],
    "image ids": [3],
    "image names": [{"img_id": "COCO_val2014_000000000003"}],
}


@pytest.mark.parametrize("listed", MINIVAL_LISTS.values(), ids=MINIVAL_LISTS)
def test_minival_moves_all_but_its_images_to_training(tmp_path: Path, listed: list[Any]) -> None:
    write_images_of_two_questions(tmp_path, "train2014", range(1, 3))
    write_images_of_two_questions(tmp_path, "val2014", range(3, 6))
    (tmp_path / "minival.json").write_text(json.dumps(listed))
    task = VQAv2Task(validation="minival", minival=tmp_path / "minival.json")
    assert [question.id for question in task.read(tmp_path, "validation")] == ["3000", "3001"]
    train = [question.id for question in task.read(tmp_path, "train")]
    assert train == ["1000", "1001", "2000", "2001", "4000", "4001", "5000", "5001"]


@pytest.mark.parametrize(
    ("listed", "problem"),
    [
        ([3000, 77], "77 is no question and no image of val2014"),
        ([3, 4, 9], "9 is no question and no image of val2014"),
        ([], "names no question"),
        ([True], "record 1 is no question id and no image id"),
        ([3000, None], "record 2 is no question id and no image id, but null"),
        ({"ids": []}, "expected the file to hold a list of records"),
    ],
)
def test_a_minival_list_of_strangers_is_refused(tmp_path: Path, listed: Any, problem: str) -> None:
    write_images_of_two_questions(tmp_path, "val2014", range(3, 6))
    (tmp_path / "minival.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match=rf"minival\.json: {problem}"):
        VQAv2Task(validation="minival", minival=tmp_path / "minival.json").read(tmp_path, "validation")


def test_minival_without_a_list_holds_out_the_lowest_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images_of_two_questions(tmp_path, "train2014", range(1, 3))
    write_images_of_two_questions(tmp_path, "val2014", range(3, 103))
    task = VQAv2Task(validation="minival")
    with pytest.raises(UserError, match=r"val2014 has 100 images here, and 5000 would be held out"):
        task.read(tmp_path, "validation")
    monkeypatch.setattr("vlm.tasks.vqav2.MINIVAL_IMAGES", 10)
    held_out, trained = task.read(tmp_path, "validation"), task.read(tmp_path, "train")
    assert len(held_out) == 20 and len({question.image_keys for question in held_out}) == 10
    assert len(trained) == 4 + 180
    assert {q.image_keys for q in held_out}.isdisjoint(q.image_keys for q in trained)
    write_images_of_two_questions(tmp_path, "val2014", reversed(range(3, 103)))
    assert {q.id for q in task.read(tmp_path, "validation")} == {q.id for q in held_out}


def write_images_of_two_questions(root: Path, split: str, images: Iterable[int]) -> None:
    ids = [(image, 1000 * image + number) for image in images for number in (0, 1)]
    questions = [{"question_id": number, "image_id": image, "question": "what?"} for image, number in ids]
    said = [{"question_id": number, "image_id": image, "answers": [{"answer": "red"}] * 10} for image, number in ids]
    folder = root / "vqav2"
    folder.mkdir(exist_ok=True)
    (folder / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps({"annotations": said}))


@pytest.mark.parametrize("kind", ["questions", "annotations"])
def test_a_vqav2_file_of_another_split_gives_itself_away(tmp_path: Path, kind: str) -> None:
    write_vqav2(tmp_path, "val2014", [["red"] * 10])
    file = next((tmp_path / "vqav2").glob(f"*_{kind}.json"))
    content = json.loads(file.read_text())
    for subtype in ("val2014", "something else", 7):  # only the name of another split is proof
        file.write_text(json.dumps({"data_subtype": subtype} | content))
        assert len(VQAv2Task().read(tmp_path, "validation")) == 1
    file.write_text(json.dumps(content | {"data_subtype": "train2014"}))
    with pytest.raises(UserError, match=rf'{kind}\.json: "data_subtype" is "train2014"\. Is it another file'):
        VQAv2Task().read(tmp_path, "validation")


def test_a_key_that_stands_twice_in_an_annotation_is_named(tmp_path: Path) -> None:
    write_vqav2(tmp_path, "val2014", [["red"] * 10, ["blue"] * 10])
    file = tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json"
    file.write_text(file.read_text().replace('{"answer": "blue"}', '{"answer": "blue", "answer": "red"}', 1))
    with pytest.raises(UserError, match=r'annotations\.json: after record 1: the key "answer" stands twice'):
        VQAv2Task().read(tmp_path, "validation")


def test_vqav2_files_of_different_releases_are_refused(tmp_path: Path) -> None:
    write_vqav2(tmp_path, "train2014", [["red"] * 10] * 3)
    file = tmp_path / "vqav2" / "v2_mscoco_train2014_annotations.json"
    rows = json.loads(file.read_text())["annotations"]
    file.write_text(json.dumps({"annotations": rows[:2]}))
    with pytest.raises(UserError, match="question 2 has no annotation"):
        VQAv2Task().read(tmp_path, "train")


@each_task
def test_missing_files_are_named_with_the_remedy(task: Task, questions: list[Question], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}/{task.type}/.*: no such file\. Prepare the task's data first"):
        task.read(tmp_path, "validation")


@pytest.mark.parametrize(
    "line", ['{"identifier": "dev-1-0"}', "{", '{"identifier": "dev-1-0-0", "sentence": "x"}', "[1]", '"dev-1-0-0"']
)
def test_a_damaged_nlvr2_row_is_named(tmp_path: Path, line: str) -> None:
    good = json.dumps({"identifier": "dev-1-0-0", "sentence": "one dog", "label": "True"})
    (tmp_path / "nlvr2").mkdir()
    (tmp_path / "nlvr2" / "dev.json").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=r"dev\.json: line 2: "):
        NLVR2Task().read(tmp_path, "validation")


def test_retrieval_reads_its_sets(tmp_path: Path) -> None:
    (tmp_path / "retrieval").mkdir()
    file = tmp_path / "retrieval" / "captions.json"
    file.write_text(json.dumps([{"id": 1, "text": "a dog", "image_key": "dog"}]))
    assert RetrievalTask().read(tmp_path, "captions") == [Question("1", "a dog", ("dog",))]
    file.write_text(json.dumps([{"id": 1, "text": "a dog"}]))
    with pytest.raises(UserError, match=r'captions\.json: record 1: has no "image_key"; expected text'):
        RetrievalTask().read(tmp_path, "captions")


# --- Real files ------------------------------------------------------------------------------------------------------


@needs_nlvr2
def test_the_real_nlvr2_dev_set_has_its_published_size(tmp_path: Path) -> None:
    (tmp_path / "nlvr2").mkdir()
    shutil.copy(DATA / "nlvr2" / "dev.json", tmp_path / "nlvr2")
    task = NLVR2Task()
    questions = task.read(tmp_path, "validation")
    assert len(questions) == 6982
    assert len({question.group for question in questions}) == 2018  # 2,004 if grouped by sentence
    assert {answer for question in questions for answer in question.answers} == {"True", "False"}
    first = questions[0]
    assert first.image_keys == tuple(f"{first.id.rpartition('-')[0]}-img{image}" for image in (0, 1))
    assert set(task.score(questions, perfect(questions)).values()) == {100.0}
    always = task.score(questions, dict.fromkeys((question.id for question in questions), "True"))
    assert always["accuracy"] == pytest.approx(50.86, abs=0.01)  # the published majority baseline
    assert always["consistency"] < 5


@needs_fixtures
def test_real_vqav2_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "vqav2").mkdir()
    for theirs, ours in (
        ("questions", "v2_OpenEnded_mscoco_train2014_questions"),
        ("annotations", "v2_mscoco_train2014_annotations"),
    ):
        shutil.copy(FIXTURES / "vqav2" / f"{theirs}.json", tmp_path / "vqav2" / f"{ours}.json")
    questions = VQAv2Task().read(tmp_path, "train")
    assert [question.id for question in questions] == ["458752000", "458752001", "458752002"]
    assert {question.image_keys for question in questions} == {("COCO_train2014_000000458752",)}
    assert questions[0].text == "What is this photo taken looking through?"
    assert {len(question.answers) for question in questions} == {10}
    assert VQAv2Task().score(questions, perfect(questions)) == {"accuracy": 100}  # this sample has no answer types
    assert "net" in VQAv2Task(min_occurrences=1).vocabulary(tmp_path)


@needs_fixtures
def test_real_gqa_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "gqa").mkdir()
    shutil.copy(FIXTURES / "gqa" / "questions.json", tmp_path / "gqa" / "testdev_balanced_questions.json")
    questions = GQATask().read(tmp_path, "test")
    assert questions[0] == Question(
        "202218649", "What is hanging above the chalkboard?", ("n578564",), ("picture",), "query"
    )
    assert GQATask().score(questions, perfect(questions))["accuracy"] == 100


@needs_fixtures
def test_real_nlvr2_rows_name_the_real_pictures(tmp_path: Path) -> None:
    (tmp_path / "nlvr2").mkdir()
    shutil.copy(FIXTURES / "nlvr2" / "tiny-dev.json", tmp_path / "nlvr2" / "dev.json")
    questions = NLVR2Task().read(tmp_path, "validation")
    assert {question.group for question in questions} == {"dev-850-0", "dev-850-1"}
    for question in questions:
        for key in question.image_keys:
            assert (FIXTURES / "images" / "nlvr2" / f"{key}.png").is_file(), key


@each_task
def test_the_mean_over_questions_is_the_headline(task: Task, questions: list[Question]) -> None:
    answers = {q.id: "True" if task.type == "nlvr2" else (q.answers or ("yes",))[0] for q in questions}
    items = task.items(questions, answers)
    assert items is not None
    assert items.percent == pytest.approx(task.score(questions, answers)[task.headline], abs=1e-4)
    assert len(items.values) == sum(question.counts for question in questions)


def test_items_are_drawn_with_their_image_and_statements_with_their_group() -> None:
    vqav2 = VQAv2Task().items(VQAV2, {q.id: "yes" for q in VQAV2})
    nlvr2 = NLVR2Task().items(NLVR2, {q.id: "True" for q in NLVR2})
    assert vqav2 is not None and nlvr2 is not None
    assert len(set(vqav2.clusters.tolist())) == len({q.image_keys for q in VQAV2})
    assert len(set(nlvr2.clusters.tolist())) == len({q.group for q in NLVR2})
