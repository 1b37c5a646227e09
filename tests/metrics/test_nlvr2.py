from __future__ import annotations

import pytest

from vlm.metrics.nlvr2 import group_of, score

# Two statements about set 7 with four and two pairs, and one of set 8, where the split has one pair only.
LABELS = {
    "dev-7-0-0": "True",
    "dev-7-1-0": "False",
    "dev-7-2-0": "True",
    "dev-7-3-0": "False",
    "dev-7-0-1": "True",
    "dev-7-1-1": "False",
    "dev-8-3-0": "False",
}


def test_a_group_is_the_identifier_without_its_pair() -> None:
    assert group_of("dev-850-2-0") == group_of("dev-850-3-0")
    assert len({group_of(identifier) for identifier in LABELS}) == 3


def test_one_wrong_pair_makes_its_whole_statement_inconsistent() -> None:
    predictions = dict(LABELS) | {"dev-7-2-0": "False"}
    assert score(LABELS, predictions) == {"accuracy": pytest.approx(6 / 7), "consistency": pytest.approx(2 / 3)}


def test_a_constant_answer_is_right_by_the_share_of_its_label() -> None:
    assert score(LABELS, dict.fromkeys(LABELS, "False")) == {
        "accuracy": pytest.approx(4 / 7),
        "consistency": pytest.approx(1 / 3),  # the statement with a single pair
    }


def test_case_does_not_matter_and_a_missing_prediction_is_wrong() -> None:
    right: dict[str, str | None] = {key: label.upper() for key, label in LABELS.items()}
    assert score(LABELS, right) == {"accuracy": 1, "consistency": 1}
    right["dev-8-3-0"] = None
    assert score(LABELS, right) == {"accuracy": pytest.approx(6 / 7), "consistency": pytest.approx(2 / 3)}


def test_a_subset_has_its_own_groups() -> None:
    predictions = dict(LABELS) | {"dev-7-2-0": "False"}
    scores = score(LABELS, predictions, {"balanced": ["dev-7-0-0", "dev-7-1-0"], "unbalanced": ["dev-7-2-0"]})
    assert scores["balanced"] == {"accuracy": 1, "consistency": 1}  # the wrong pair of this statement is not in it
    assert scores["unbalanced"] == {"accuracy": 0, "consistency": 0}
