from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlm.errors import UserError
from vlm.metrics.submission import check_submission, merge_predictions

FILE = Path("results.json")


def test_ranks_that_agree_count_once() -> None:
    assert merge_predictions([{"1": "yes", "2": "no"}, None, {"3": "red", "1": "yes"}]) == {
        "1": "yes",
        "2": "no",
        "3": "red",
    }


def test_ranks_that_contradict_each_other_are_an_error() -> None:
    with pytest.raises(UserError, match="question 2: rank 2 predicts 'yes', an earlier rank 'no'"):
        merge_predictions([{"1": "yes"}, {"2": "no"}, {"2": "yes"}])


def test_a_complete_submission_passes() -> None:
    check_submission(FILE, ["1", "2"], {"2": "no", "1": ""})
    check_submission(FILE, ["1"], {"1": "True"}, allowed=("False", "True"))


@pytest.mark.parametrize(
    ("ids", "predictions", "message"),
    [
        (["1", "2"], {"1": "a"}, "question 2: no prediction among 1"),
        (["1"], {"1": "a", "3": "b"}, "question 3 is not one of the 1 of its split"),
        (["1", "1"], {"1": "a"}, "question 1 stands twice in its split"),
        (["1"], {"1": 5}, "question 1: the answer must be text. Got 5"),
        (["1"], {"1": None}, "question 1: the answer must be text. Got None"),
        (["1"], {"1": "yes"}, "1: must be one of False, True. Got 'yes'"),
    ],
)
def test_a_defect_is_named_before_anything_is_written(
    ids: list[str], predictions: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"results.json: not written: {message}"):
        check_submission(FILE, ids, predictions, allowed=("False", "True") if "one of F" in message else None)


def test_metrics_and_scoring_import_without_torch() -> None:
    code = (
        "import sys\nimport vlm.metrics, vlm.scoring.score, vlm.scoring.report, vlm.metrics.bootstrap\n"
        "assert not {'torch', 'lightning', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
