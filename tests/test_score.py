"""`vlm score` on real and small files: official names on official scales, and one clear error for each defect."""

from __future__ import annotations

import copy
import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm.cli import main

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
FIXTURES = DATA / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"official example files are not at {FIXTURES}")
needs_nlvr2 = pytest.mark.skipif(
    not (DATA / "nlvr2" / "dev.json").is_file(), reason=f"the NLVR2 dev set is not at {DATA / 'nlvr2'}"
)

Content = Any
FEW = ["--resamples", "20"]


class Files:
    """Files of one task in a folder, and `vlm score` on them."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def write(self, **contents: Content) -> None:
        """JSON for anything but text, which is written as it is; `name_csv` becomes name.csv."""
        for name, content in contents.items():
            file = self.folder / (f"{name.removesuffix('_csv')}.csv" if name.endswith("_csv") else f"{name}.json")
            file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    def __call__(self, *arguments: str) -> dict[str, Any]:
        """The scores of files that are good."""
        output = self.folder / "scores.json"
        assert main(["score", *self.paths(arguments), "--json", str(output), *FEW]) == 0, self.capsys.readouterr().err
        scores: dict[str, Any] = json.loads(output.read_text())
        return scores

    def error(self, *arguments: str) -> str:
        """The one line that files with a defect give, without the folder."""
        self.capsys.readouterr()
        assert main(["score", *self.paths(arguments), *FEW]) == 2
        captured = self.capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err.strip().removeprefix("error: ").replace(f"{self.folder}/", "")

    def paths(self, arguments: tuple[str, ...]) -> list[str]:
        return [str(self.folder / text) if text.endswith((".json", ".csv", "/")) else text for text in arguments]


@pytest.fixture
def files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Files:
    return Files(tmp_path, capsys)


# --- VQAv2 -----------------------------------------------------------------------------------------------------------

VQAV2 = ("vqav2", "results.json", "--annotations", "annotations.json", "--questions", "questions.json")


def annotation(number: int, image: int, answers: list[str], kind: str, question_kind: str) -> dict[str, Any]:
    return {
        "question_id": number,
        "image_id": image,
        "answers": [{"answer_id": place, "answer": answer} for place, answer in enumerate(answers, start=1)],
        "answer_type": kind,
        "question_type": question_kind,
    }


ANNOTATIONS = [
    annotation(11, 1, ["yes"] * 10, "yes/no", "is the"),
    annotation(12, 1, ["two"] * 3 + ["2"] * 3 + ["3"] * 4, "number", "how many"),
    annotation(21, 2, ["the cat"] * 2 + ["dog"] * 8, "other", "what is"),
    annotation(31, 3, ["1,000"] * 10, "number", "how many"),
]
RESULTS = [
    {"question_id": 11, "answer": "yes"},
    {"question_id": 12, "answer": "Two."},
    {"question_id": 21, "answer": "a cat"},
    {"question_id": 31, "answer": "1000"},
]


def vqav2(files: Files) -> Files:
    questions = [{key: row[key] for key in ("question_id", "image_id")} | {"question": "?"} for row in ANNOTATIONS]
    files.write(
        annotations={"info": {}, "annotations": ANNOTATIONS}, questions={"questions": questions}, results=RESULTS
    )
    return files


def test_vqav2_scores_by_hand_under_both_rules(files: Files) -> None:
    scores = vqav2(files)(*VQAV2)
    # 2021: yes is right; "Two." and six of ten answers become 2; "cat" has two of ten; "1000" is not "1,000" as it
    # stands, for all ten agree.
    assert scores["overall"] == pytest.approx(100 * (1 + 1 + 0.6 + 0) / 4)
    assert scores["per_answer_type"] == pytest.approx({"yes/no": 100, "number": 50, "other": 60})
    assert scores["per_question_type"] == pytest.approx({"is the": 100, "how many": 50, "what is": 60})
    assert (scores["rule"], scores["num_questions"], scores["missing_predictions"]) == ("2021", 4, 0)
    assert scores["not_computed"] == {}
    assert scores["counts"]["per_answer_type"] == {"yes/no": 1, "number": 2, "other": 1}
    low, high = scores["intervals_95"]["overall"]
    assert low <= scores["overall"] <= high
    # 2016: "2" matches only the three answers that are written so; the article of "the cat" stays, so none is "cat".
    assert vqav2(files)(*VQAV2, "--rule", "2016")["overall"] == pytest.approx(100 * (1 + 0.9 + 0 + 0) / 4)


@needs_fixtures
def test_real_vqav2_files_score(files: Files) -> None:
    real = {
        name: json.loads((FIXTURES / "vqav2" / f"{name}.json").read_text()) for name in ("annotations", "questions")
    }
    ids = [row["question_id"] for row in real["annotations"]["annotations"]]
    assert ids == [458752000, 458752001, 458752002]
    # The first question: six "net" of ten, then netting, mesh, pitcher and orange, one each.
    for first, accuracy in (("net", 1), ("The net!", 1), ("mesh", 0.3), ("Mesh.", 0.3), ("nets", 0)):
        answers = [{"question_id": key, "answer": first if key == ids[0] else "no answer at all"} for key in ids]
        files.write(**real, results=answers)
        scores = files(*VQAV2)
        assert scores["overall"] == pytest.approx(100 * accuracy / 3)
    assert scores["not_computed"] == {  # this sample of the release has no types
        "per_answer_type": "the annotations carry no answer_type",
        "per_question_type": "the annotations carry no question_type",
    }


def test_missing_predictions_are_wrong_only_when_asked_and_are_counted(files: Files) -> None:
    vqav2(files).write(results=RESULTS[1:3])
    assert files.error(*VQAV2) == (
        "results.json: no prediction for question 11 of annotations.json (2 of 4 missing). Predict them, or score them "
        "as wrong with --allow-missing"
    )
    scores = files(*VQAV2, "--allow-missing")
    assert scores["overall"] == pytest.approx(100 * 1.6 / 4)
    assert scores["missing_predictions"] == 2
    assert "2 of 4 predictions are missing and count as wrong" in files.capsys.readouterr().out


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([*RESULTS, {"question_id": 99, "answer": "no"}], "question 99 is not in annotations.json"),
        (
            [{"question_id": 7, "answer": "no"}],
            "question 7 and all others are not in annotations.json: the files are of",
        ),
        ([*RESULTS, RESULTS[0]], "record 5: a second prediction for question 11"),
        ([*RESULTS, dict(RESULTS[0], answer="no")], "record 5: a second prediction for question 11"),
        ([{"question_id": "11", "answer": "no"}], 'record 1: "question_id" must be a whole number. Got "11"'),
        ([{"question_id": True, "answer": "no"}], 'record 1: "question_id" must be a whole number. Got true'),
        ([{"question_id": 11, "answer": 2}], 'record 1: "answer" must be text. Got 2'),
        ([{"question_id": 11, "answer": None}], 'record 1: "answer" must be text. Got null'),
        ([{"question_id": 11}], 'record 1: has no "answer"; expected text'),
        ([RESULTS[0], ["x"]], 'record 2: must be an object. Got ["x"]'),
        ({"11": "yes"}, "expected the file to hold a list of records"),
        (json.dumps(RESULTS)[:-30], "after record 3: the file is cut off"),
        ("", "after the start: the file is cut off"),
    ],
)
def test_a_defect_of_a_results_file_names_file_and_record(files: Files, results: Content, message: str) -> None:
    vqav2(files).write(results=results)
    assert files.error(*VQAV2).startswith(f"results.json: {message}")


def without(name: str) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[1].pop(name) and None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(), "no annotation for question 31 of questions.json"),
        (lambda rows: rows.append(rows[0]), "record 5: question_id 11 stands twice"),
        (lambda rows: rows[2].update(question_id=22), "record 3: question 22 is not in questions.json"),
        (lambda rows: rows[2].update(image_id=9), "record 3: image_id is 9, but 2 for question 21 of questions.json"),
        (lambda rows: rows[2].update(answers=[]), 'record 3: "answers" must be a list of {"answer": text}'),
        (lambda rows: rows[2].update(answers=["dog"]), 'record 3: "answers" must be a list of {"answer": text}'),
        (lambda rows: rows[2]["answers"][4].pop("answer"), 'record 3: "answers" must be a list of {"answer": text}'),
        (without("answer_type"), "record 2: has no 'answer_type', while record 1 has one"),
        (without("question_id"), 'record 2: has no "question_id"; expected a whole number'),
    ],
)
def test_a_defect_of_the_annotations_names_file_and_record(
    files: Files, change: Callable[[list[dict[str, Any]]], None], message: str
) -> None:
    rows = copy.deepcopy(ANNOTATIONS)
    change(rows)
    vqav2(files).write(annotations={"annotations": rows})
    assert files.error(*VQAV2).startswith(f"annotations.json: {message}")


def test_files_in_each_others_place_are_refused(files: Files) -> None:
    vqav2(files)
    swapped = ("vqav2", "results.json", "--annotations", "questions.json", "--questions", "questions.json")
    assert files.error(*swapped).startswith('questions.json: has no "annotations". Is it another file?')
    assert files.error("vqav2", "nowhere.json", *VQAV2[2:]).startswith("nowhere.json: no such file")
    assert (
        files.error(*VQAV2, "--json", "nowhere/scores.json") == "nowhere: no such folder for scores.json. Make it first"
    )


# --- GQA -------------------------------------------------------------------------------------------------------------

GQA = ("gqa", "predictions.json", "--questions", "questions.json")
GQA_ALL = (
    "--all-questions", "all.json", "--choices", "choices.json", "--scenes", "scenes.json",
    "--attentions", "attentions.json",
)  # fmt: skip


def gqa_question(
    image: str, text: str, answer: str, structural: str, entailed: list[str], **more: Any
) -> dict[str, Any]:
    return {
        "imageId": image,
        "question": text,
        "answer": answer,
        "isBalanced": True,
        "types": {"structural": structural, "semantic": "rel", "detailed": "relS"},
        "semantic": [
            {"operation": "select", "dependencies": [], "argument": "table (1)"},
            {"operation": "query", "dependencies": [0], "argument": "name"},
        ],
        "groups": {"global": "thing" if structural == "query" else None, "local": None},
        "entailed": entailed,
        "annotations": {"question": {"2": "1"}, "answer": {}, "fullAnswer": {}},
    } | more


QUESTIONS = {
    "201": gqa_question("n1", "What is on the table?", "cup", "query", ["201", "203"]),
    "202": gqa_question("n2", "Is it a t-shirt?", "yes", "verify", ["202"]),
}
UNBALANCED = {"203": gqa_question("n1", "Is there a cup?", "yes", "verify", [], isBalanced=False)}
PREDICTIONS = [{"questionId": "201", "prediction": "cup"}, {"questionId": "202", "prediction": "no"}]
ALL_PREDICTIONS = [*PREDICTIONS, {"questionId": "203", "prediction": "no"}]
BOX = {"x": 0, "y": 0, "w": 50, "h": 100}


def gqa(files: Files) -> Files:
    scene = {"width": 100, "height": 100, "objects": {"1": BOX}}
    files.write(
        questions=QUESTIONS,
        predictions=PREDICTIONS,
        all=QUESTIONS | UNBALANCED,
        choices={key: {"valid": ["cup", "yes", "no"], "plausible": ["cup", "yes"]} for key in ("201", "202", "203")},
        scenes={"n1": scene, "n2": scene},
        attentions=[
            {"questionId": "201", "attention": [[0.5, 0.25], [0.25, 0]]},
            {"questionId": "202", "attention": [[0, 0], [0.5, 0.5]]},
        ],
    )
    return files


def test_gqa_scores_what_the_questions_alone_allow_and_names_the_rest(files: Files) -> None:
    scores = gqa(files)(*GQA)
    assert {name: scores[name] for name in ("accuracy", "binary", "open", "distribution")} == {
        "accuracy": 50,
        "binary": 0,
        "open": 100,
        "distribution": 0,
    }
    assert scores["accuracy_per_structural_type"] == {"query": 100, "verify": 0}
    assert scores["accuracy_per_semantic_type"] == {"rel": 50}
    assert scores["accuracy_per_steps"] == {"1": 50}
    assert scores["accuracy_per_length"] == {"4": 0, "5": 100}
    assert scores["not_computed"] == {
        "consistency": "needs --all-questions",
        "validity": "needs --choices",
        "plausibility": "needs --choices",
        "grounding": "needs --attentions and --scenes",
    }
    assert not scores["not_computed"].keys() & scores.keys()


def test_gqa_scores_everything_that_its_files_allow(files: Files) -> None:
    gqa(files).write(predictions=ALL_PREDICTIONS)
    scores = files(*GQA, *GQA_ALL)
    assert scores["not_computed"] == {}
    assert scores["consistency"] == 0  # the right answer to 201 entails one to 203, which was not given
    assert (scores["validity"], scores["plausibility"]) == (100, 50)
    # The object is the left half: the first column of 201's map holds 0.75 of the attention, of 202's none.
    assert scores["grounding"] == pytest.approx(100 * 0.75 / 2)


def test_gqa_attention_of_five_by_five_needs_to_be_told_from_five_boxes(files: Files) -> None:
    """The object is the left half: of five columns two and a half, of five boxes the first."""
    one_map = [[0.2] * 5, *[[0] * 5] * 4]
    boxes = [[0, 0, 0.5, 1, 0.9], *[[0.5, 0, 1, 1, 0.025]] * 4]
    wanted = (*GQA, "--attentions", "attentions.json", "--scenes", "scenes.json")
    for form, attention, grounding in (("maps", one_map, 100), ("boxes", boxes, 90)):
        gqa(files).write(attentions=[{"questionId": key, "attention": attention} for key in ("201", "202")])
        assert "5 by 5 numbers are a map of 5 by 5 cells, or five boxes" in files.error(*wanted)
        assert files(*wanted, "--attention-form", form)["grounding"] == pytest.approx(grounding)
    gqa(files).write(attentions=[{"questionId": key, "attention": boxes[:3]} for key in ("201", "202")])
    assert "expected square maps of one size. Got 3 by 5" in files.error(*wanted, "--attention-form", "maps")


def test_predictions_for_all_gqa_questions_need_all_questions(files: Files) -> None:
    gqa(files).write(predictions=ALL_PREDICTIONS)
    assert "--all-questions" in files.error(*GQA)


def test_gqa_counts_balanced_questions_only(files: Files) -> None:
    gqa(files).write(predictions=ALL_PREDICTIONS)
    whole = ("gqa", "predictions.json", "--questions", "all.json")
    assert files(*whole)["accuracy"] == 50
    assert files(*whole)["num_questions"] == 2
    files.write(predictions=PREDICTIONS)  # without consistency, the script asks for no others
    assert files(*whole)["accuracy"] == 50
    assert files.error(*GQA, "--all-questions", "all.json").startswith(
        'predictions.json: no prediction for question "203" of all.json (1 of 3 missing)'
    )
    assert files(*GQA, "--all-questions", "all.json", "--allow-missing")["consistency"] == 0


def test_gqa_reads_all_questions_in_chunks(files: Files) -> None:
    gqa(files).write(predictions=ALL_PREDICTIONS)
    (files.folder / "chunks").mkdir()
    for number, part in enumerate((QUESTIONS, UNBALANCED)):
        files.write(**{f"chunks/{number}": part})
    assert files(*GQA, "--all-questions", "chunks/") == files(*GQA, "--all-questions", "all.json")
    files.write(**{"chunks/2": UNBALANCED})
    assert files.error(*GQA, "--all-questions", "chunks/").startswith(
        'chunks/2.json: question "203": stands in an earlier'
    )


@needs_fixtures
def test_real_gqa_questions_score(files: Files) -> None:
    real = json.loads((FIXTURES / "gqa" / "questions.json").read_text())
    files.write(questions=real, predictions=[{"questionId": "202218649", "prediction": "picture"}])
    scores = files(*GQA)
    assert scores["accuracy"] == scores["open"] == 100
    assert scores["accuracy_per_steps"] == {"2": 100}  # select and relate; "query: name" reads the answer off
    assert scores["accuracy_per_length"] == {"6": 100}
    assert scores["binary"] == 0  # of no question, as the script prints it
    assert scores["intervals_95"]["accuracy"] is None  # of one image
    files.write(all=real)
    assert files.error(*GQA, "--all-questions", "all.json").startswith(
        'all.json: no question "202218648", which question "202218649" entails'
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("predictions", [{"questionId": 201, "prediction": "cup"}], '"questionId" must be text. Got 201'),
        ("predictions", [{"questionId": "201", "prediction": ["cup"]}], '"prediction" must be text. Got ["cup"]'),
        ("predictions", [*PREDICTIONS, PREDICTIONS[0]], 'record 3: a second prediction for question "201"'),
        ("predictions", ALL_PREDICTIONS[::-1] * 1, None),
        ("questions", QUESTIONS | {"204": {}}, 'question "204": has no "types"; expected an object'),
        ("questions", {"201": QUESTIONS["201"] | {"answer": None}}, 'question "201": "answer" must be text. Got null'),
        ("questions", {"201": QUESTIONS["201"] | {"isBalanced": "yes"}}, '"isBalanced" must be true or false'),
        ("questions", UNBALANCED, "holds no balanced question"),
        ("questions", [], "expected the file to hold an object of records"),
        ("all", QUESTIONS, 'no question "203", which question "201" entails'),
        ("choices", {"201": {"valid": [], "plausible": []}}, 'no choices for question "202"'),
        ("choices", {"201": {"valid": "cup", "plausible": []}}, '"valid" must be a list of texts. Got "cup"'),
        ("scenes", {"n1": {"width": 9, "height": 9, "objects": {}}}, 'image "n1", objects: has no "1"'),
        ("scenes", {"n1": {"width": 0, "height": 9, "objects": {"1": BOX}}}, "an image of 0.0 by 9.0 pixels"),
        ("scenes", {"n1": {"width": 9, "height": 9, "objects": {"1": BOX | {"x": "0"}}}}, '"x" must be a number'),
        ("scenes", {}, 'no scene graph for the image of question "201"'),
        ("attentions", [{"questionId": "201", "attention": [[1]]}], 'no attention for question "202"'),
        ("attentions", [{"questionId": "201", "attention": [[1], [1, 2]]}], "equally long lists of numbers"),
        ("attentions", [{"questionId": "201", "attention": [["1"]]}], "equally long lists of numbers"),
        ("attentions", [{"questionId": k, "attention": [[1, 2, 3]]} for k in QUESTIONS], "attention is 1 by 3"),
        ("attentions", [{"questionId": k, "attention": [[0, 0, 0, 1, 1]]} for k in QUESTIONS], "a box without area"),
    ],
)
def test_a_defect_of_a_gqa_file_names_file_and_record(
    files: Files, name: str, content: Content, message: str | None
) -> None:
    gqa(files).write(predictions=ALL_PREDICTIONS)
    files.write(**{name: content})
    if message is None:  # another order is no defect
        assert files(*GQA, *GQA_ALL)["accuracy"] == 50
        return
    found = files.error(*GQA, *GQA_ALL)
    assert found.startswith(f"{name}.json: ") and message in found


def test_an_unknown_gqa_question_is_named(files: Files) -> None:
    gqa(files).write(predictions=ALL_PREDICTIONS)
    assert files.error(*GQA).startswith('predictions.json: question "203" is not in questions.json')


# --- NLVR2 -----------------------------------------------------------------------------------------------------------

NLVR2 = ("nlvr2", "predictions.csv", "--data", "dev.json")
ROWS = [
    {"identifier": f"dev-{group}-{pair}-0", "label": ("True", "False")[pair % 2], "sentence": "a \u2028 dog"}
    for group in range(2)
    for pair in range(4)
]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def nlvr2(files: Files) -> Files:
    predictions = "".join(f"{row['identifier']},{row['label']}\n" for row in ROWS)
    files.write(dev=lines(ROWS), predictions_csv=predictions, balanced=lines(ROWS[:2]), unbalanced=lines(ROWS[2:]))
    return files


def test_nlvr2_scores_are_fractions_as_the_official_script_prints(files: Files) -> None:
    wrong = ["dev-0-0-0,true"] + [f"{row['identifier']},FALSE" for row in ROWS[1:]]
    nlvr2(files).write(predictions_csv="\n".join(wrong))
    # Right are the four False pairs and the one that was called true; no statement is right with all four.
    scores = files(*NLVR2)
    assert (scores["accuracy"], scores["consistency"]) == (5 / 8, 0)
    assert scores["not_computed"] == {"balanced": "needs --balanced", "unbalanced": "needs --unbalanced"}
    scores = files(*NLVR2, "--balanced", "balanced.json", "--unbalanced", "unbalanced.json")
    assert scores["balanced"] == {"accuracy": 1, "consistency": 1}
    assert scores["unbalanced"] == {"accuracy": 3 / 6, "consistency": 0}
    assert scores["not_computed"] == {}
    assert scores["bootstrap"]["num_clusters"] == 2


@needs_nlvr2
def test_the_real_dev_set_of_nlvr2_has_its_published_groups_and_majority(files: Files) -> None:
    rows = [json.loads(line) for line in (DATA / "nlvr2" / "dev.json").read_text().splitlines()]
    files.write(predictions_csv="".join(f"{row['identifier']},True\n" for row in rows))
    scores = files("nlvr2", "predictions.csv", "--data", str(DATA / "nlvr2" / "dev.json"))
    assert scores["num_questions"] == scores["counts"]["accuracy"] == 6982
    assert scores["counts"]["consistency"] == scores["bootstrap"]["num_clusters"] == 2018
    assert scores["accuracy"] == sum(row["label"] == "True" for row in rows) / 6982
    assert scores["accuracy"] == pytest.approx(0.5086, abs=5e-5)  # the published majority baseline
    low, high = scores["intervals_95"]["accuracy"]
    assert low < scores["accuracy"] < high


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (
            "identifier,prediction\n",
            'line 1: the identifier must be split-set-pair-sentence, without a header above. Got "identifier"',
        ),
        ("dev-0-0-0,1\n", 'line 1: the prediction must be True or False, and the file has no header. Got "1"'),
        ("dev-0-0-0, True\n", "line 1: the prediction must be True or False"),
        ("dev-0-0-0.png,True\n", "line 1: the identifier must be split-set-pair-sentence, without a header above. Got"),
        ("dev-0-0-0\n", 'line 1: expected identifier,prediction. Got "dev-0-0-0"'),
        ("dev-0-0-0,True,0.9\n", "line 1: expected identifier,prediction"),
        ("dev-0-0-0,True\n\ndev-0-1-0,True\n", "line 2 is empty"),
        ("dev-0-0-0,True\ndev-0-0-0,True\n", 'line 2: a second prediction for question "dev-0-0-0"'),
        ("dev-0-0-0,True\ntest-0-0-0,True\n", 'question "test-0-0-0" is not in dev.json'),
        ("test1-0-0-0,True\n", 'question "test1-0-0-0" and all others are not in dev.json: the files are of different'),
        ("dev-0-0-0,True\n", 'no prediction for question "dev-0-1-0" of dev.json (7 of 8 missing)'),
        ("", 'no prediction for question "dev-0-0-0" of dev.json (8 of 8 missing)'),
    ],
)
def test_a_defect_of_an_nlvr2_file_names_file_and_line(files: Files, predictions: str, message: str) -> None:
    nlvr2(files).write(predictions_csv=predictions)
    assert files.error(*NLVR2).startswith(f"predictions.csv: {message}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lines(ROWS) + "{", "line 9: not valid JSON"),
        (lines([*ROWS, ROWS[0]]), 'line 9: identifier "dev-0-0-0" stands twice'),
        (lines([ROWS[0] | {"label": "maybe"}]), 'line 1: "label" must be True or False. Got "maybe"'),
        (
            lines([ROWS[0] | {"identifier": "dev-0-0"}]),
            'line 1: "identifier" must be split-set-pair-sentence. Got "dev-0-0"',
        ),
        ("", "holds no pair"),
    ],
)
def test_a_defect_of_the_nlvr2_data_names_file_and_line(files: Files, data: str, message: str) -> None:
    nlvr2(files).write(dev=data)
    assert files.error(*NLVR2).startswith(f"dev.json: {message}")


def test_a_subset_of_another_split_is_refused(files: Files) -> None:
    nlvr2(files).write(balanced=lines([ROWS[0] | {"identifier": "test1-0-0-0"}]))
    assert files.error(*NLVR2, "--balanced", "balanced.json").startswith(
        'balanced.json: line 1: "test1-0-0-0" is not in'
    )


# --- Two files -------------------------------------------------------------------------------------------------------


def test_two_files_are_compared_pair_by_pair(files: Files) -> None:
    vqav2(files).write(other=[dict(row, answer="yes") for row in RESULTS])
    compared = ("--compare", "results.json", "other.json")
    scores = files("vqav2", *compared, *VQAV2[2:])
    assert scores["first"]["overall"] == pytest.approx(65)
    assert scores["second"]["overall"] == pytest.approx(25)
    assert scores["difference"]["overall"] == pytest.approx(40)
    assert scores["difference"]["per_answer_type"] == pytest.approx({"yes/no": 0, "number": 50, "other": 60})
    low, high = scores["intervals_95"]["overall"]
    assert low <= 40 <= high
    assert files(*compared, "vqav2", *VQAV2[2:]) == scores  # --compare may stand before the task
    assert "A - B" in files.capsys.readouterr().out


def test_a_file_compared_with_itself_differs_by_nothing(files: Files) -> None:
    for task, file, rest in (
        (gqa, "predictions.json", GQA[2:]),
        (nlvr2, "predictions.csv", NLVR2[2:]),
    ):
        task(files)
        scores = files(GQA[0] if task is gqa else NLVR2[0], "--compare", file, file, *rest)
        flat = json.dumps([scores["difference"], scores["intervals_95"]])
        assert set(flat) & set("123456789") <= set("1245")  # names of table rows only
        assert scores["difference"]["accuracy"] == 0 and scores["intervals_95"]["accuracy"] == [0, 0]


def test_compare_takes_the_place_of_predictions(files: Files) -> None:
    vqav2(files)
    assert "give one prediction file, or two with --compare" in files.error("vqav2", *VQAV2[2:])
    assert "give one prediction file, or two with --compare" in files.error(
        "vqav2", "results.json", "--compare", "results.json", "results.json", *VQAV2[2:]
    )
    twice = ("--compare", "results.json", "results.json")
    for arguments in ((*twice, "vqav2", *twice, *VQAV2[2:]), ("vqav2", *twice, *twice, *VQAV2[2:])):
        assert "--compare is given 2 times" in files.error(*arguments)
    gqa(files).write(predictions=ALL_PREDICTIONS)
    assert "attention belongs to one model" in files.error(
        "gqa", "--compare", "predictions.json", "predictions.json", *GQA[2:], *GQA_ALL
    )


# --- What reaches the terminal ---------------------------------------------------------------------------------------


def test_names_that_no_terminal_can_show_are_escaped(files: Files) -> None:
    rows = copy.deepcopy(ANNOTATIONS)
    rows[0]["question_type"] = "[/bold] \ud800"
    vqav2(files).write(annotations={"annotations": rows})
    assert files(*VQAV2)["per_question_type"]["[/bold] \ud800"] == 100
    assert "[/bold] \\ud800" in files.capsys.readouterr().out


def test_the_same_files_give_the_same_numbers_in_any_order(files: Files) -> None:
    scores = vqav2(files)(*VQAV2)
    shuffled = RESULTS.copy()
    random.Random(0).shuffle(shuffled)
    files.write(results=shuffled)
    assert files(*VQAV2) == scores


# --- Malformed files -------------------------------------------------------------------------------------------------

numbers = st.integers(-3, 40) | st.floats()
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.sampled_from(["11", "201", "n1", "dev-0-0-0", "True", "", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["answer", "question_id", "answers", "201", "n1", "types", "objects"]), inner)
    ),
    max_leaves=6,
)


def broken(content: Any, data: st.DataObject) -> Any:
    """The content with one value, at a drawn place, replaced, removed or repeated."""
    content = copy.deepcopy(content)
    parent, key, here = None, None, content
    while isinstance(here, dict | list) and here and (parent is None or data.draw(st.booleans())):
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        parent, key = here, data.draw(st.sampled_from(keys))
        here = parent[key]
    how = data.draw(st.sampled_from(["replace", "remove", "repeat"]))
    if how == "replace" or parent is None:
        parent[key] = data.draw(json_values)  # type: ignore[index]  # None only without a key
    elif how == "remove":
        del parent[key]
    elif isinstance(parent, list):
        parent.append(parent[key])
    return content


@settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@pytest.mark.parametrize(
    ("prepare", "arguments", "names"),
    [
        (vqav2, VQAV2, ("results", "annotations", "questions")),
        (gqa, (*GQA, *GQA_ALL), ("predictions", "questions", "all", "choices", "scenes", "attentions")),
        (nlvr2, (*NLVR2, "--balanced", "balanced.json"), ("predictions.csv", "dev", "balanced")),
    ],
    ids=["vqav2", "gqa", "nlvr2"],
)
@given(data=st.data())
def test_a_malformed_file_is_scored_or_is_one_error_never_a_trace(
    files: Files,
    prepare: Callable[[Files], Files],
    arguments: tuple[str, ...],
    names: tuple[str, ...],
    data: st.DataObject,
) -> None:
    prepare(files)
    if prepare is gqa:
        files.write(predictions=ALL_PREDICTIONS)
    name = data.draw(st.sampled_from(names))
    file = files.folder / (name if "." in name else f"{name}.json")
    text = file.read_text(encoding="utf-8")
    if prepare is nlvr2:
        rows = text.split("\n")
        place = data.draw(st.integers(0, len(rows) - 1))
        rows[place] = data.draw(st.text(max_size=8) | st.just(rows[place - 1]) | json_values.map(json.dumps))
        text = "\n".join(rows)
    elif data.draw(st.booleans()):
        text = json.dumps(broken(json.loads(text), data))
    if data.draw(st.integers(0, 3)) == 0:
        text = text[: data.draw(st.integers(0, len(text)))]
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    output = files.folder / "scores"
    status = main(["score", *files.paths(arguments), "--allow-missing", "--resamples", "2", "--json", str(output)])
    captured = files.capsys.readouterr()
    assert status in (0, 2)
    if status == 2:
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        assert str(files.folder) in captured.err
    else:
        scores = json.loads(output.read_text())
        assert (scores["num_questions"], scores["missing_predictions"]) == counted(files.folder, prepare)


def counted(folder: Path, prepare: Callable[[Files], Files]) -> tuple[int, int]:
    """How many questions there are, and how many more than predictions, counted without our readers."""

    def content(name: str) -> Any:
        return json.loads((folder / f"{name}.json").read_text("utf-8", "surrogatepass"))

    if prepare is vqav2:
        num_questions = len(content("annotations")["annotations"])
        return num_questions, num_questions - len(content("results"))
    if prepare is gqa:
        balanced = [row for row in content("questions").values() if row.get("isBalanced", True)]
        return len(balanced), len(content("all")) - len(content("predictions"))
    rows = [
        sum(bool(line.strip()) for line in (folder / name).read_text("utf-8", "surrogatepass").split("\n"))
        for name in ("dev.json", "predictions.csv")
    ]
    return rows[0], rows[0] - rows[1]


def test_prediction_files_that_tasks_write_are_read(files: Files) -> None:
    from vlm.tasks.nlvr2 import NLVR2Task
    from vlm.types import Question

    questions = [Question(row["identifier"], "", (), (row["label"],), "") for row in ROWS]
    nlvr2(files)
    (files.folder / "predictions.csv").unlink()
    NLVR2Task().write_predictions(files.folder / "predictions.json", questions, {q.id: q.answers[0] for q in questions})
    assert len(list(csv.reader((files.folder / "predictions.csv").read_text().splitlines()))) == 8
    assert files(*NLVR2)["accuracy"] == 1


def test_scores_never_replace_a_file_that_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions, data = tmp_path / "predictions.csv", tmp_path / "dev.json"
    predictions.write_text("dev-1-0-0,True\n")
    data.write_text('{"identifier": "dev-1-0-0", "label": "True", "sentence": "two dogs"}\n')
    for read in (predictions, data):
        before = read.read_text()
        assert main(["score", "nlvr2", str(predictions), "--data", str(data), "--json", str(read)]) == 2
        assert "--json would replace a file that is read" in capsys.readouterr().err
        assert read.read_text() == before


def test_scores_are_not_written_among_chunks_that_are_read(files: Files) -> None:
    gqa(files)
    folder = files.folder / "chunks"
    folder.mkdir()
    (files.folder / "questions.json").rename(folder / "questions_0.json")
    for name in ("questions_0.json", "scores.json"):
        chunks = ("gqa", "predictions.json", "--questions", str(folder), "--json", str(folder / name))
        assert "--json would replace a file that is read, or lie among them" in files.error(*chunks)


def test_what_a_terminal_would_obey_is_escaped(files: Files) -> None:
    gqa(files).write(predictions=[{"questionId": "\x1b[31m" + "9" * 100_000, "prediction": "red"}])
    error = files.error(*GQA)
    assert "\\u001b[31m9" in error and len(error) < 1000
