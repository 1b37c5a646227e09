from __future__ import annotations

import math

import numpy as np
import pytest

from vlm.studies.exchange import ExchangeRate, Fit, exchange_rate, fit_power_laws, rounded

AMOUNTS = (100, 300, 1000, 3000, 10_000)
TRUTH = Fit(floor=10, scale=400, exponent=0.5)  # 50% at 100 pairs, 86% at 10,000


def noisy(
    worth: float,
    noise: float,
    random: np.random.Generator,
    truth: Fit = TRUTH,
    num_seeds: int = 3,
    amounts: tuple[int, ...] = AMOUNTS,
    item_noise: float = 0.0,
) -> ExchangeRate:
    """The rate of a source that is worth so many pairs, from scores with noise of items and of seeds, half shared."""
    shared = random.normal(0, noise * math.sqrt(0.5), num_seeds)

    def scores(pairs: float) -> dict[int, float]:
        own = truth.score(pairs) + random.normal(0, item_noise)
        return {seed: own + shared[seed] + random.normal(0, noise * math.sqrt(0.5)) for seed in range(num_seeds)}

    curve, source = [(pairs, scores(pairs)) for pairs in amounts], scores(worth)
    means = [np.mean(list(values.values())) for values in [*(values for _, values in curve), source]]
    items = random.normal(means, item_noise, (500, len(means))) if item_noise else None
    return exchange_rate(curve, source, items)


def test_a_curve_without_noise_gives_its_parameters_and_the_exact_rate() -> None:
    errors = np.array([[100 - TRUTH.score(pairs) for pairs in AMOUNTS]])
    floor, scale, exponent = (float(values[0]) for values in fit_power_laws(np.array(AMOUNTS), errors))
    assert (floor, scale, exponent) == pytest.approx((10, 400, 0.5), rel=0.01)
    found = noisy(800, 1e-3, np.random.default_rng(0))
    assert found.pairs == pytest.approx(800, rel=0.02) and found.reason == ""


@pytest.mark.parametrize(("num_seeds", "noise", "item_noise"), [(3, 1.0, 0.0), (5, 1.0, 0.0), (3, 0.5, 0.4)])
def test_about_95_of_100_intervals_hold_the_true_rate(num_seeds: int, noise: float, item_noise: float) -> None:
    random = np.random.default_rng(num_seeds)
    found = [noisy(800, noise, random, num_seeds=num_seeds, item_noise=item_noise) for _ in range(50)]
    given = [one for one in found if one.pairs is not None]
    assert len(given) >= 42  # a fit is refused by chance in a few
    held = [one.low <= 800 <= one.high for one in given if one.low is not None and one.high is not None]
    assert 0.86 <= np.mean(held) <= 1
    assert all(one.with_items == (item_noise > 0) and one.num_seeds == num_seeds for one in given)


def test_more_seeds_make_the_interval_narrower() -> None:
    def width(num_seeds: int) -> float:
        found = [noisy(800, 1, np.random.default_rng(number), num_seeds=num_seeds) for number in range(10)]
        return float(np.median([one.high / one.low for one in found if one.low and one.high]))

    assert width(10) < width(3)


def test_a_flat_curve_is_refused() -> None:
    found = noisy(800, 0.5, np.random.default_rng(0), truth=Fit(30, 0, 0.5))
    assert found.pairs is None and found.fit is None
    assert found.reason == "from 100 to 10,000 pairs the score does not rise beyond the noise"


def test_a_curve_of_few_points_is_refused_and_says_between_which_the_source_lies() -> None:
    found = noisy(800, 0.2, np.random.default_rng(0), amounts=(100, 10_000))
    assert found.pairs is None
    assert found.reason == "a fit needs 4 or more positive amounts of pairs, and the study has 2"
    assert (found.low, found.high, found.statement) == (100, 10_000, "between 100 and 10,000 pairs")


def test_a_source_below_the_measured_range_gets_an_upper_bound() -> None:
    found = noisy(20, 0.3, np.random.default_rng(0))
    assert (found.pairs, found.low, found.high) == (None, None, 100)
    assert found.statement == "at most 100 pairs"
    assert "lies below the curve" in found.reason and "100 to 10,000" in found.reason


def test_a_source_above_the_measured_range_gets_a_lower_bound() -> None:
    found = noisy(200_000, 0.2, np.random.default_rng(0))
    assert (found.pairs, found.high) == (None, None)
    assert found.low is not None and 5000 < found.low <= 10_000
    assert found.statement.startswith("at least ")


def test_a_source_on_the_flat_end_gets_a_lower_bound() -> None:
    saturated = Fit(floor=10, scale=4e5, exponent=2)  # from 1,000 pairs on less than half a point below the ceiling
    found = noisy(5000, 0.3, np.random.default_rng(1), truth=saturated)
    assert found.pairs is None and found.low is not None and found.low < 5000
    assert "flat end" in found.reason


def test_a_curve_that_falls_is_refused() -> None:
    curve = [(pairs, {seed: 60.0 + 0.1 * seed + fall for seed in range(3)}) for pairs, fall in zip(
        AMOUNTS, (0, 10, 20, 21, 5), strict=True
    )]  # fmt: skip
    source = {seed: 65 + 0.15 * seed for seed in range(3)}
    curve = [(pairs, {s: v + 0.01 * ((pairs * (s + 1)) % 7) for s, v in scores.items()}) for pairs, scores in curve]
    assert "falls from 300 to 10,000 pairs beyond the noise" in exchange_rate(curve, source).reason


def test_a_step_is_no_power_law() -> None:
    random = np.random.default_rng(3)
    curve = [(n, {s: (50.0 if n < 3000 else 90.0) + random.normal(0, 0.2) for s in range(4)}) for n in AMOUNTS]
    found = exchange_rate(curve, {s: 70 + random.normal(0, 0.2) for s in range(4)})
    assert found.pairs is None
    assert "lies off every curve" in found.reason
    assert found.statement == "between 1,000 and 3,000 pairs"


def test_one_seed_is_refused() -> None:
    found = noisy(800, 0.3, np.random.default_rng(0), num_seeds=1)
    assert (found.statement, found.reason) == ("no number", "1 seed in common: training noise is unknown")


@pytest.mark.parametrize(("pairs", "shown"), [(1234, "1,200"), (519, "520"), (96_100, "96,000"), (3.4567, "3.5")])
def test_pairs_are_told_with_two_digits(pairs: float, shown: str) -> None:
    assert rounded(pairs) == shown
