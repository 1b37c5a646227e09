from __future__ import annotations

import math

import numpy as np
import pytest

from vlm.metrics import gqa
from vlm.metrics.bootstrap import intervals, paired_differences, replicates
from vlm.metrics.tally import Tally


def tally_of(values: list[list[float]]) -> Tally:
    """One score; each inner list is a cluster."""
    result = Tally(scale=100)
    for number, cluster in enumerate(values):
        for value in cluster:
            result.add(("accuracy",), value, result.cluster(number))
    return result


def test_the_same_seed_gives_the_same_interval_and_another_one_another() -> None:
    tally = tally_of([[float(number % 3 == 0)] for number in range(100)])
    assert intervals(tally, seed=1) == intervals(tally, seed=1)
    assert intervals(tally, seed=1) != intervals(tally, seed=2)


def test_without_clusters_the_interval_is_that_of_a_mean() -> None:
    random = np.random.default_rng(0)
    values = (random.random(2000) < 0.6).astype(float)
    bounds = intervals(tally_of([[value] for value in values]), num_resamples=4000)["accuracy",]
    assert bounds is not None
    half = 196 * values.std() / math.sqrt(len(values))
    assert bounds == pytest.approx((100 * values.mean() - half, 100 * values.mean() + half), abs=0.2)


def test_clusters_whose_questions_stand_and_fall_together_count_once() -> None:
    singles = tally_of([[float(number % 2)] for number in range(50)])
    copies = tally_of([[float(number % 2)] * 20 for number in range(50)])
    assert intervals(singles)["accuracy",] == pytest.approx(intervals(copies)["accuracy",])


def test_every_resample_is_the_ratio_over_the_drawn_clusters() -> None:
    """Drawing clusters one by one gives the same as the matrix products."""
    clusters = [[1.0], [0.0, 1.0, 0.0], [1.0, 1.0]]
    drawn = replicates(tally_of(clusters), num_resamples=60, seed=3)["accuracy",]
    random = np.random.default_rng(3)
    for value in drawn:
        sample = [item for number in random.integers(3, size=3) for item in clusters[number]]
        assert value == pytest.approx(100 * sum(sample) / len(sample))


def test_one_cluster_has_no_interval() -> None:
    assert intervals(tally_of([[1.0, 0.0]])) == {("accuracy",): None}


def test_a_table_row_that_some_resamples_miss_has_an_interval_over_the_others() -> None:
    tally = tally_of([[1.0], [0.0], [1.0]])
    tally.add(("per_answer_type", "rare"), 1.0, 2)
    assert np.isnan(replicates(tally)["per_answer_type", "rare"]).any()
    assert intervals(tally)["per_answer_type", "rare"] == (100, 100)


def test_a_paired_difference_with_itself_is_exactly_nothing() -> None:
    tally = tally_of([[float(number % 2)] for number in range(20)])
    assert paired_differences(tally, tally) == {("accuracy",): (0, (0, 0))}


def test_pairing_narrows_the_interval_of_models_that_fail_alike() -> None:
    hard = [float(number % 2) for number in range(200)]
    better = tally_of([[max(value, float(number % 20 == 0))] for number, value in enumerate(hard)])
    worse = tally_of([[value] for value in hard])
    difference, bounds = paired_differences(better, worse)["accuracy",]
    assert difference == pytest.approx(5)
    assert bounds is not None and 0 < bounds[0] < 5 < bounds[1]
    apart = [intervals(tally)["accuracy",] for tally in (better, worse)]
    assert all(bounds[1] - bounds[0] < (high - low) / 2 for low, high in filter(None, apart))


def test_a_difference_needs_the_same_questions() -> None:
    with pytest.raises(ValueError, match="two tallies of the same questions"):
        paired_differences(tally_of([[1.0], [0.0]]), tally_of([[1.0]]))


def test_the_interval_of_a_chi_square_surrounds_it() -> None:
    questions = {
        str(number): gqa.Question(f"n{number}", ("red", "blue")[number % 2], "query", group="color")
        for number in range(200)
    }
    predictions: dict[str, str | None] = {key: ("red", "blue")[int(key) % 3 == 0] for key in questions}
    tally = gqa.tally(questions, predictions)
    bounds = intervals(tally)["distribution",]
    assert bounds is not None and bounds[0] < tally.value(("distribution",)) < bounds[1]
