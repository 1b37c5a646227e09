"""The exchange rate: how many image-text pairs a weak source of text is worth.

The error (100 minus the score) falls with the pairs as floor + scale * pairs^-exponent, as the learning curves of deep
networks do (Hestness et al., arXiv 1712.00409; with a floor: Kaplan et al., arXiv 2001.08361). A source is
worth as many pairs as the fitted curve needs for the source's own score. The curve is fitted by least squares over
positive amounts of pairs, every amount alike: a variance that three seeds estimate is too uncertain to weight by. For
each exponent floor and scale are solved exactly (variable projection: Golub and Pereyra, 1973), so there is no start
to choose and no local minimum.

The interval comes from fitting the curve again to `joint_draws` of all points and the source together: it covers
training noise, and the choice of questions where the runs kept their scores. Nothing is extrapolated: where the points
support no fit, or the interval leaves the measured amounts, there is no number but a reason, and the bound that holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from vlm.studies.statistics import LEVEL, Difference, difference, holm, joint_draws

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MIN_AMOUNTS = 4  # three unknowns, and one amount to see whether the form holds
DRAWS = 2000
LEAST_EXPONENT, LARGEST_EXPONENT, EXPONENTS = 0.02, 4.0, 41  # from nearly logarithmic to a step
FINER = 6  # steps to either side of the best, in each refinement
SHOWN = 0.05  # points of percent: what no table shows


@dataclass(frozen=True)
class Fit:
    """error(pairs) = floor + scale * pairs^-exponent, in percent."""

    floor: float
    scale: float
    exponent: float

    def score(self, pairs: float) -> float:
        """In percent."""
        return 100 - self.floor - self.scale * math.pow(pairs, -self.exponent)


@dataclass(frozen=True)
class ExchangeRate:
    """What a source is worth, in words, with the number where the points support one.

    `low` and `high` bound the pairs with 95% confidence: both of an interval around `pairs`, or one alone, or none.
    """

    statement: str  # "about 520 pairs (95% interval 310 to 900)", "at most 900 pairs", "no number"
    reason: str = ""  # why there is no number; empty where there is
    pairs: float | None = None
    low: float | None = None
    high: float | None = None
    fit: Fit | None = None
    num_seeds: int = 0
    with_items: bool = False  # the uncertainty covers the choice of questions too


def exchange_rate(
    curve: Sequence[tuple[int, Mapping[int, float]]],
    source: Mapping[int, float],
    items: NDArray[np.float64] | None = None,
    seed: int = 0,
) -> ExchangeRate:
    """What a source with these scores by seed is worth on a curve of (pairs, scores by seed), in ascending order.

    `items` are the means over seeds under resampled questions, [resamples, len(curve) + 1], the source last.
    """
    import numpy as np

    amounts = [pairs for pairs, _ in curve]
    seeds = sorted(set(source).intersection(*(scores for _, scores in curve)))
    if len(seeds) < 2:
        return _refusal(f"{len(seeds) or 'no'} seed{'s' if not seeds else ''} in common: training noise is unknown")
    by_seed = np.array([[*(scores[number] for _, scores in curve), source[number]] for number in seeds])
    points = _Points(by_seed, items, amounts)

    def bound(reason: str) -> ExchangeRate:
        low, high = points.bounds()
        return _refusal(reason, low, high, len(seeds), items is not None)

    if len(amounts) < MIN_AMOUNTS:
        return bound(f"a fit needs {MIN_AMOUNTS} or more positive amounts of pairs, and the study has {len(amounts)}")
    if fall := points.fall():
        return bound(f"the score falls from {fall[0]:,} to {fall[1]:,} pairs beyond the noise, as no such curve does")
    if not points.rises():
        return bound(f"from {amounts[0]:,} to {amounts[-1]:,} pairs the score does not rise beyond the noise")
    drawn = joint_draws(by_seed, items, DRAWS, seed)
    fits = fit_power_laws(np.array(amounts), 100 - np.vstack([by_seed.mean(0)[None, :-1], drawn[:, :-1]]))
    if (off := _off_the_curve(fits, np.array(amounts), drawn)) is not None:
        return bound(f"the point at {amounts[off]:,} pairs lies off every curve of the form that is fitted")
    worth = _pairs_at(fits, 100 - np.append(by_seed.mean(0)[-1], drawn[:, -1]))
    best = Fit(*(float(values[0]) for values in fits))
    low, high = np.percentile(worth[1:], (2.5, 97.5), method="nearest")  # between infinities nothing is interpolated
    return _stated(float(worth[0]), float(low), float(high), amounts, best, len(seeds), items is not None)


def _stated(
    estimate: float, low: float, high: float, amounts: Sequence[int], fit: Fit, num_seeds: int, with_items: bool
) -> ExchangeRate:
    first, last = amounts[0], amounts[-1]
    inside = f"the measured {first:,} to {last:,}"
    if first <= low and high <= last:
        share = 100 * estimate / last
        words = f"about {rounded(estimate)} pairs (95% interval {rounded(low)} to {rounded(high)}), {share:.2g}% of all"
        return ExchangeRate(words, "", estimate, low, high, fit, num_seeds, with_items)
    if low < first and high > last:
        reason = f"its score fits any amount within {inside}: the curve is too flat there for its noise"
        found = _refusal(reason, None, None, num_seeds, with_items)
    elif high > last:
        flat = "reaches the flat end of the curve" if low <= last else "lies above the curve"
        reason = f"its score {flat}: the interval leaves {inside}"
        found = _refusal(reason, min(low, last), None, num_seeds, with_items)
    else:
        lies = "lies below the curve" if high < first else "may lie below the curve"
        reason = f"its score {lies}: the interval leaves {inside}"
        found = _refusal(reason, None, max(high, first), num_seeds, with_items)
    return ExchangeRate(found.statement, reason, None, found.low, found.high, fit, num_seeds, with_items)


def _refusal(
    reason: str, low: float | None = None, high: float | None = None, num_seeds: int = 0, with_items: bool = False
) -> ExchangeRate:
    if low is not None and high is not None:
        words = f"between {rounded(low)} and {rounded(high)} pairs"
    elif low is not None:
        words = f"at least {rounded(low)} pairs"
    else:
        words = "no number" if high is None else f"at most {rounded(high)} pairs"
    return ExchangeRate(words, reason, None, low, high, None, num_seeds, with_items)


def rounded(pairs: float) -> str:
    """Two digits: 1,234 -> "1,200"."""
    return f"{float(f'{pairs:.2g}'):,.0f}" if pairs >= 10 else f"{pairs:.2g}"


class _Points:
    """The curve's points and, in the last column, the source: what can be said without a fitted curve."""

    def __init__(self, by_seed: NDArray[np.float64], items: NDArray[np.float64] | None, amounts: Sequence[int]) -> None:
        self.by_seed, self.items, self.amounts = by_seed, items, amounts

    def sum(self, weights: Sequence[float]) -> Difference:
        """A weighted sum of the points against zero."""
        import numpy as np

        row = np.asarray(weights)
        values = dict(enumerate((self.by_seed @ row).tolist()))
        found = difference(values, dict.fromkeys(values, 0.0), None if self.items is None else self.items @ row)
        assert found is not None
        return found

    def minus(self, first: int, second: int) -> Difference:
        weights = [0.0] * (len(self.amounts) + 1)
        weights[first], weights[second] = 1.0, -1.0
        return self.sum(weights)

    def rises(self) -> bool:
        """The slope over the logarithm of the pairs is above zero."""
        import numpy as np

        places = np.log(self.amounts)
        found = self.sum([*(places - places.mean()), 0.0])
        return found.mean > 0 and found.p is not None and found.p < LEVEL

    def fall(self) -> tuple[int, int] | None:
        """Two amounts of which the larger scores less, beyond the noise of all such comparisons."""
        pairs = list(combinations(range(len(self.amounts)), 2))
        found = [self.minus(more, fewer) for fewer, more in pairs]
        for (fewer, more), one, p in zip(pairs, found, holm([one.p for one in found]), strict=True):
            if one.mean < 0 and p is not None and p < LEVEL:
                return self.amounts[fewer], self.amounts[more]
        return None

    def bounds(self) -> tuple[int | None, int | None]:
        """The most pairs that the source surely beats, and the fewest that surely beat it.

        Tested one amount after the other, from the least likely to fail, and stopped at the first that does: such a
        sequence needs no correction where more pairs are never worse.
        """
        source = len(self.amounts)
        low = high = None
        for number, pairs in enumerate(self.amounts):
            found = self.minus(source, number)
            if not (found.mean > 0 and found.p is not None and found.p < LEVEL):
                break
            low = pairs
        for number, pairs in reversed(list(enumerate(self.amounts))):
            found = self.minus(source, number)
            if not (found.mean < 0 and found.p is not None and found.p < LEVEL):
                break
            high = pairs
        return low, high


Fits = tuple["NDArray[np.float64]", "NDArray[np.float64]", "NDArray[np.float64]"]
"""Floors, scales and exponents, one of each a row of errors."""


def fit_power_laws(amounts: NDArray[np.int64], errors: NDArray[np.float64]) -> Fits:
    """The least-squares curve of each row of errors [rows, amounts], with floor and scale of at least zero."""
    import numpy as np

    centre = np.exp(np.log(amounts).mean())  # so that scales of all exponents are of one size
    places = amounts / centre
    ratio = (LARGEST_EXPONENT / LEAST_EXPONENT) ** (1 / (EXPONENTS - 1))
    chosen = np.full(len(errors), (LEAST_EXPONENT * LARGEST_EXPONENT) ** 0.5)
    half = (EXPONENTS - 1) / 2
    steps = np.linspace(-half, half, EXPONENTS)
    for _ in range(3):  # all exponents, then those around the best of each row, twice; kinks at floor 0 do no harm
        tried = [_solved(places[None, :] ** -(chosen * ratio**step)[:, None], errors)[2] for step in steps]
        chosen = (chosen * ratio ** steps[np.argmin(tried, axis=0)]).clip(LEAST_EXPONENT, LARGEST_EXPONENT)
        steps = np.linspace(-steps[-1] / half, steps[-1] / half, 2 * FINER + 1)
        half = FINER
    floor, scale, _ = _solved(places[None, :] ** -chosen[:, None], errors)
    return floor, scale * centre**chosen, chosen


def _solved(
    x: NDArray[np.float64], errors: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Floor and scale, of at least zero, of each row's best line over `x`, and the sum of its squared residuals."""
    import numpy as np

    x_mean, y_mean = x.mean(1), errors.mean(1)
    centred = x - x_mean[:, None]
    scale = (errors * centred).sum(1) / (centred**2).sum(1)
    floor = y_mean - scale * x_mean
    through_zero = (errors * x).sum(1) / (x**2).sum(1)
    scale, floor = np.where(floor < 0, through_zero, scale), np.maximum(floor, 0)
    scale, floor = np.maximum(scale, 0), np.where(scale < 0, np.maximum(y_mean, 0), floor)
    return floor, scale, ((errors - floor[:, None] - scale[:, None] * x) ** 2).sum(1)


def _pairs_at(fits: Fits, errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """The pairs at which each curve has this error: infinite where it never gets there, 0 where it always was below."""
    import numpy as np

    floor, scale, exponent = fits
    above = errors - floor
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        found = (scale / above) ** (1 / exponent)
    return np.where(above <= 0, np.inf, np.where(scale <= 0, 0.0, found))


def _off_the_curve(fits: Fits, amounts: NDArray[np.int64], drawn: NDArray[np.float64]) -> int | None:
    """The number of a point that lies on one side of its curve in all but the fewest draws."""
    import numpy as np

    floor, scale, exponent = (values[1:, None] for values in fits)
    residuals = 100 - drawn[:, :-1] - floor - scale * amounts[None, :] ** -exponent
    tail = 100 * LEVEL / 2 / len(amounts)
    low, high = np.percentile(residuals, (tail, 100 - tail), axis=0)
    off = np.flatnonzero((low > SHOWN) | (high < -SHOWN))
    return int(off[0]) if len(off) else None
