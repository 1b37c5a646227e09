from __future__ import annotations

import itertools

import pytest

from vlm.metrics.vqav2 import vqa_accuracy


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_matches_of_ten_answers_give_the_published_accuracy(matches: int, accuracy: float) -> None:
    assert vqa_accuracy("red", ["red"] * matches + ["blue"] * (10 - matches)) == pytest.approx(accuracy)


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_accuracy_is_the_mean_over_all_sets_that_leave_one_answer_out(count: int) -> None:
    for matches in range(count + 1):
        answers = ["red"] * matches + ["blue"] * (count - matches)
        left = itertools.combinations(answers, count - 1)
        expected = [min(1.0, sum(answer == "red" for answer in part) / 3) for part in left]
        assert vqa_accuracy("red", answers) == pytest.approx(sum(expected) / len(expected))


def test_the_order_of_the_answers_does_not_matter() -> None:
    answers = ["red", "blue", "red", "green", "red", "blue", "red", "pink", "blue", "blue"]
    assert vqa_accuracy("red", answers) == vqa_accuracy("red", sorted(answers)) == pytest.approx(1)


def test_without_human_answers_there_is_no_accuracy() -> None:
    with pytest.raises(ValueError, match="at least one human answer"):
        vqa_accuracy("red", [])
