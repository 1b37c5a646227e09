from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from vlm.metrics.gqa import Choices, Question, Region, map_grounding, num_steps, object_grounding, score

# Two images. Question a entails b and itself, c entails d, which is not balanced; e entails nothing.
QUESTIONS = {
    "a": Question("n1", "red", "query", "attr", 2, 5, "color", ("a", "b")),
    "b": Question("n1", "yes", "verify", "attr", 1, 7, None, ("b",)),
    "c": Question("n1", "left", "choose", "rel", 3, 9, "side", ("c", "d", "b")),
    "e": Question("n2", "t-shirt", "query", "obj", 2, 5, "cloth"),
}
ALL_ANSWERS = {"a": "red", "b": "yes", "c": "left", "d": "no", "e": "t-shirt"}
RIGHT: dict[str, str | None] = dict(ALL_ANSWERS)


def test_a_perfect_predictor_scores_100_everywhere() -> None:
    scores = score(QUESTIONS, RIGHT, ALL_ANSWERS)
    assert scores.pop("distribution") == 0  # no distance
    assert scores == {
        "accuracy": 100,
        "binary": 100,
        "open": 100,
        "consistency": 100,
        "accuracy_per_structural_type": {"query": 100, "verify": 100, "choose": 100},
        "accuracy_per_semantic_type": {"attr": 100, "rel": 100, "obj": 100},
        "accuracy_per_steps": {"1": 100, "2": 100, "3": 100},
        "accuracy_per_length": {"5": 100, "7": 100, "9": 100},
    }


def test_answers_are_compared_exactly() -> None:
    scores = score(QUESTIONS, RIGHT | {"e": "t shirt", "a": "Red"})
    assert scores["accuracy"] == 50
    assert (scores["open"], scores["binary"]) == (0, 100)
    assert scores["accuracy_per_semantic_type"] == {"attr": 50, "rel": 100, "obj": 0}


@pytest.mark.parametrize(
    ("changed", "consistency"),
    [
        ({}, 100),
        ({"b": "no"}, 100 * (0 + 1 / 2) / 2),  # a: b wrong, 0 of 1; c: d right and b wrong, 1 of 2
        ({"d": "yes"}, 100 * (1 + 1 / 2) / 2),  # an answer that counts in no accuracy
        ({"a": "blue"}, 100),  # a is wrong, so it asks for nothing; c has both
        ({"c": "right", "b": "no"}, 0),
        ({"a": "blue", "c": "right"}, 0),  # no right answer entails another: 0, as the script prints
        ({"e": "shirt"}, 100),
        ({"d": None}, 100 * (1 + 1 / 2) / 2),
    ],
)
def test_consistency_is_over_what_right_answers_entail_without_themselves(
    changed: dict[str, str | None], consistency: float
) -> None:
    assert score(QUESTIONS, RIGHT | changed, ALL_ANSWERS)["consistency"] == pytest.approx(consistency)


def test_validity_and_plausibility_look_the_prediction_up() -> None:
    colors, things = ("red", "blue", "purple"), ("t-shirt", "red")
    choices = {
        "a": Choices(colors, ("red",)),
        "b": Choices(("yes", "no"), ("yes", "no")),
        "c": Choices(("left", "right"), ("left", "right")),
        "e": Choices(things, things),
    }
    scores = score(QUESTIONS, {"a": "purple", "b": "maybe", "c": "right", "e": None}, choices=choices)
    assert (scores["validity"], scores["plausibility"]) == (50, 25)  # valid: a and c; plausible: c
    common = {"a": QUESTIONS["a"]._replace(compares=True)}
    for answer, value in (("shape", 100), ("red", 0)):  # what do both have in common?
        assert score(common, {"a": answer}, choices=choices)["validity"] == value


def test_distribution_is_a_chi_square_by_group_weighted_by_its_size() -> None:
    colors = ("red", "red", "red", "blue")
    questions = {f"c{n}": Question("n1", answer, "query", group="color") for n, answer in enumerate(colors)}
    questions |= {f"s{n}": Question("n1", "left", "choose", group="side") for n in range(2)}
    questions |= {"none": Question("n1", "yes", "verify")}
    predictions: dict[str, str | None] = {
        **dict.fromkeys(("c0", "c1"), "red"),
        "c2": "blue",
        "c3": "green",  # no true answer of this group: it counts as nothing
        **dict.fromkeys(("s0", "s1"), "left"),
        "none": "red",  # of no group
    }
    color = (2 - 3) ** 2 / 3 + (1 - 1) ** 2 / 1
    assert score(questions, predictions)["distribution"] == pytest.approx((color * 4 + 0 * 2) / 6 / 100)


def test_a_missing_prediction_is_wrong_in_every_metric() -> None:
    scores = score(QUESTIONS, dict.fromkeys(ALL_ANSWERS), ALL_ANSWERS, {key: Choices((), ()) for key in QUESTIONS})
    # Nothing predicted: (0 - 1)^2 / 1 in each of the three groups of one question.
    assert scores.pop("distribution") == pytest.approx(1 / 100)
    flat = [value for entry in scores.values() for value in (entry.values() if isinstance(entry, dict) else [entry])]
    assert set(flat) == {0.0}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([("select", "chalkboard (0)"), ("relate", "_,hanging above,s (12)"), ("query", "name")], 2),
        ([("select", "dog (1)"), ("exist", "?")], 1),
        ([("select", "dog (1)"), ("query", "color")], 2),  # only a name is read off
        ([("select", "dog (1)"), ("choose name", "dog|cat")], 1),
        ([], 0),
    ],
)
def test_steps_that_read_the_answer_off_do_not_count(steps: list[tuple[str, str]], expected: int) -> None:
    program: list[dict[str, Any]] = [{"operation": operation, "argument": argument} for operation, argument in steps]
    assert num_steps(program) == expected


# --- Grounding -------------------------------------------------------------------------------------------------------

EVEN = np.full((4, 4), 1 / 16)


@pytest.mark.parametrize(
    ("regions", "expected"),
    [
        ([], 0),
        ([(0, 0, 1, 1)], 1),
        ([(0, 0, 0.5, 1)], 0.5),
        ([(0.25, 0.25, 0.5, 0.5)], 1 / 16),
        ([(0, 0, 0.125, 0.125)], 1 / 64),  # a quarter of one cell
        ([(0, 0, 1, 1), (0, 0, 0.5, 1)], 1.5),  # a sum over regions, not a mean
        ([(0.5, 0.5, 0.5, 0.9)], 0),
    ],
)
def test_even_attention_lies_on_a_region_by_its_area(regions: list[Region], expected: float) -> None:
    assert map_grounding(regions, EVEN) == pytest.approx(expected)


def test_the_first_index_of_a_map_goes_from_left_to_right() -> None:
    attention = np.zeros((4, 4))
    attention[3, 0] = 1
    assert map_grounding([(0.75, 0, 1, 0.25)], attention) == pytest.approx(1)  # right, top
    assert map_grounding([(0, 0.75, 0.25, 1)], attention) == 0


def test_attention_over_objects_counts_by_the_share_of_each_box() -> None:
    boxes = np.array([[0, 0, 0.5, 0.5, 0.75], [0.5, 0.5, 1, 1, 0.25]])
    assert object_grounding([(0, 0, 0.5, 0.25)], boxes) == pytest.approx(0.75 / 2)
    assert object_grounding([(0, 0, 1, 1)], boxes) == pytest.approx(1)


def test_a_map_is_the_same_as_its_cells_as_boxes() -> None:
    random = np.random.default_rng(0)
    attention = random.random((7, 7))
    edges = np.arange(8) / 7
    boxes = np.array(
        [[edges[i], edges[j], edges[i + 1], edges[j + 1], attention[i, j]] for i in range(7) for j in range(7)]
    )
    regions = [(0.1, 0.2, 0.77, 0.5), (0.3, 0.0, 1.0, 0.9)]
    assert map_grounding(regions, attention) == pytest.approx(object_grounding(regions, boxes))


def test_grounding_is_a_mean_over_questions_in_percent() -> None:
    scores = score(QUESTIONS, RIGHT, grounding={"a": 0.5, "b": 0, "c": 1.5, "e": 0})
    assert scores["grounding"] == pytest.approx(50)
    assert not any(math.isnan(value) for value in scores["accuracy_per_steps"].values())
