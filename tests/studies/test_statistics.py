from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vlm.studies.statistics import difference, estimate, holm, joint_draws, p_value, t_975


def test_the_interval_is_the_one_computed_by_hand() -> None:
    # s = sqrt(((60-62)^2 + 0 + (64-62)^2) / 2) = 2; 4.3027 * 2 / sqrt(3) = 4.968
    found = estimate([60, 62, 64])
    assert found.mean == 62
    assert found.half_width == pytest.approx(4.9683, abs=1e-4)
    # s = sqrt(2) / 1; 12.7062 * sqrt(2) / sqrt(2) = 12.7062
    assert estimate([1, 3]).half_width == pytest.approx(12.7062)


def test_one_seed_has_no_interval() -> None:
    assert estimate([61.04]).half_width is None
    assert str(estimate([61.04])) == "61.0"


def test_equal_seeds_have_an_interval_of_no_width() -> None:
    assert str(estimate([50, 50, 50])) == "50.0 ± 0.0"


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.7062), (9, 2.2622), (30, 2.0423), (40, 2.0211), (60, 2.0003)])
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert t_975(degrees) == pytest.approx(quantile, abs=1e-4)


def test_a_difference_is_paired_by_seed() -> None:
    first, second = {0: 60.0, 1: 70.0, 2: 80.0}, {0: 58.0, 1: 69.0, 2: 77.0, 3: 0.0}
    found = difference(first, second)
    assert found is not None and found.seeds is not None
    expected = stats.ttest_rel([60, 70, 80], [58, 69, 77])
    assert (found.mean, found.num_seeds) == (2, 3)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.seeds == pytest.approx(tuple(expected.confidence_interval()))
    assert found.both == pytest.approx(found.seeds) and found.items is None


def test_one_seed_claims_nothing_however_many_questions_there_are() -> None:
    found = difference({0: 60.0}, {0: 50.0}, np.random.default_rng(0).normal(10, 0.1, 1000))
    assert found is not None
    assert (found.mean, found.seeds, found.both, found.p) == (10, None, None, None)
    assert found.items is not None and not found.is_significant
    assert difference({0: 60.0}, {1: 50.0}) is None


def test_the_headline_is_wider_than_either_part_and_agrees_with_its_p_value() -> None:
    items = np.random.default_rng(0).normal(3, 1.0, 4000)
    found = difference({0: 5.0, 1: 6.0, 2: 7.0}, {0: 3.0, 1: 3.0, 2: 3.0}, items)
    assert found is not None and found.seeds is not None and found.items is not None and found.both is not None
    assert found.both[0] < min(found.seeds[0], found.items[0])
    edge = found.mean - found.both[0]
    assert p_value(edge, stats.sem([2, 3, 4]), items.std(ddof=1), 2) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize("degrees", [1, 2, 19, 25])
def test_p_values_of_seeds_alone_are_those_of_the_t_distribution(degrees: int) -> None:
    for value in (0.5, 2.0, 5.0):
        by_integral = p_value(value, 1, 1e-9, degrees)
        assert by_integral == pytest.approx(2 * stats.t.sf(value, degrees), rel=1e-5)
        assert p_value(value, 1, 0, degrees) == pytest.approx(by_integral, rel=1e-5)
    assert p_value(1.96, 0, 1, degrees) == pytest.approx(2 * stats.norm.sf(1.96), rel=1e-6)
    assert p_value(0, 0, 0, degrees) == 1 and p_value(0.1, 0, 0, degrees) == 0


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("item_error", [0.3, 1.0])
def test_95_of_100_intervals_hold_a_truth_with_noise_of_both_kinds(num_seeds: int, item_error: float) -> None:
    random = np.random.default_rng(num_seeds)
    held = []
    for _ in range(1000):
        of_items = random.normal(0, item_error)
        trained = random.normal(of_items, np.sqrt(num_seeds), num_seeds)  # their mean has a standard error of 1
        p = p_value(trained.mean(), stats.sem(trained), item_error, num_seeds - 1)
        held.append(p > 0.05)
    assert 0.94 <= np.mean(held) <= 0.99


def test_holm_is_the_procedure_of_the_paper() -> None:
    # 4 * 0.01, 3 * 0.013, kept above the one before; 2 * 0.04; 0.05
    assert holm([0.04, 0.01, None, 0.05, 0.013]) == pytest.approx([0.08, 0.04, None, 0.08, 0.04])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([None]) == [None]


def test_joint_draws_spread_every_difference_as_its_paired_interval_says() -> None:
    random = np.random.default_rng(1)
    by_seed = random.normal([10, 20, 40], [3, 3, 1], (3, 3)) + random.normal(0, 5, (3, 1))
    items = random.normal([10, 20, 40], 0.5, (2000, 3))
    drawn = joint_draws(by_seed, items, 40_000, 0)
    for left, right in ((0, 1), (1, 2)):
        columns = ({seed: float(row[column]) for seed, row in enumerate(by_seed)} for column in (left, right))
        found = difference(*columns, items[:, left] - items[:, right])
        assert found is not None and found.both is not None
        low, high = np.percentile(drawn[:, left] - drawn[:, right], (2.5, 97.5))
        assert high - low == pytest.approx(found.both[1] - found.both[0], rel=0.05)
