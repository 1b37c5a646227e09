"""95% intervals by cluster bootstrap, of scores and of paired differences.

Questions about one image, and statements over one group of pairs, are not independent: whole clusters are drawn with
replacement (Field and Welsh, "Bootstrapping clustered data", 2007). A resample is a row of weights, how often each
cluster was drawn, and a mean over it is a ratio of two weighted sums, so that all scores of all resamples come from
two matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from vlm.metrics.tally import Name, Tally

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 1000
"""Enough for two digits of a 95% percentile interval (Efron and Tibshirani, 1993, section 13.3)."""

BLOCK = 50  # resamples that are held in memory at a time
TAILS = (2.5, 97.5)

Interval = tuple[float, float] | None
"""Lower and upper bound; None where there are fewer than two clusters, or none was ever drawn."""


def intervals(tally: Tally, num_resamples: int = RESAMPLES, seed: int = 0) -> dict[Name, Interval]:
    """The 95% interval of every score."""
    drawn = replicates(tally, num_resamples, seed)
    return {name: _interval(tally, name, values, tally.value(name)) for name, values in drawn.items()}


def paired_differences(
    first: Tally, second: Tally, num_resamples: int = RESAMPLES, seed: int = 0
) -> dict[Name, tuple[float, Interval]]:
    """For each score that both have: first minus second, and its 95% interval.

    Paired: each resample draws the same clusters for both, so what is hard for both cancels.
    """
    if first.clusters != second.clusters:
        raise ValueError("a paired difference needs two tallies of the same questions")
    both = replicates(first, num_resamples, seed), replicates(second, num_resamples, seed)
    found: dict[Name, tuple[float, Interval]] = {}
    for name in both[0].keys() & both[1].keys():
        difference = first.value(name) - second.value(name)
        found[name] = difference, _interval(first, name, both[0][name] - both[1][name], difference)
    return {name: found[name] for name in both[0] if name in found}


def replicates(tally: Tally, num_resamples: int = RESAMPLES, seed: int = 0) -> Mapping[Name, NDArray[np.float64]]:
    """For each score its value in every resample; NaN where a resample drew none of its questions."""
    import numpy as np

    num_clusters, means = len(tally.clusters), list(tally.samples)
    sums = np.empty((num_clusters, len(means)))
    counts = np.empty((num_clusters, len(means)))
    for column, name in enumerate(means):
        sample = tally.samples[name]
        clusters = np.asarray(sample.clusters, dtype=int)
        sums[:, column] = np.bincount(clusters, sample.values, num_clusters)
        counts[:, column] = np.bincount(clusters, None, num_clusters)
    rows: list[NDArray[np.float64]] = []
    others: dict[Name, list[NDArray[np.float64]]] = {name: [] for name in tally.statistics}
    for weights in resample_weights(num_clusters, num_resamples, seed):
        with np.errstate(invalid="ignore"):
            rows.append(tally.scale * (weights @ sums) / (weights @ counts))
        for name, statistic in tally.statistics.items():
            others[name].append(statistic(weights))
    drawn = {name: np.concatenate([block[:, column] for block in rows]) for column, name in enumerate(means)}
    return drawn | {name: np.concatenate(blocks) for name, blocks in others.items()}


def mean_replicates(
    values: NDArray[np.float32], clusters: NDArray[np.int32], num_resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """For each row of `values`, which are of the same questions, its mean in every resample: [resamples, rows].

    All rows are resampled alike, so that the differences of columns are paired.
    """
    import numpy as np

    num_clusters = int(clusters.max()) + 1
    sums = np.stack([np.bincount(clusters, row, num_clusters) for row in values], axis=1)
    counts = np.bincount(clusters, None, num_clusters)
    return np.concatenate(
        [
            (weights @ sums) / (weights @ counts)[:, None]
            for weights in resample_weights(num_clusters, num_resamples, seed)
        ]
    )


def resample_weights(num_clusters: int, num_resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each cluster was drawn, one row a resample, in blocks. The same seed draws the same."""
    import numpy as np

    random = np.random.default_rng(seed)
    for start in range(0, num_resamples, BLOCK):
        yield np.stack(
            [
                np.bincount(random.integers(num_clusters, size=num_clusters), minlength=num_clusters).astype(float)
                for _ in range(min(BLOCK, num_resamples - start))
            ]
        )


def _interval(tally: Tally, name: Name, values: NDArray[np.float64], estimate: float) -> Interval:
    import numpy as np

    known = values[~np.isnan(values)]
    if len(tally.clusters) < 2 or not len(known):
        return None
    low, high = np.percentile(known, TAILS)
    if name in tally.statistics:
        # A chi-square of resampled counts is biased upwards, for drawing twice doubles what is off. Bias is removed.
        shift = estimate - known.mean()
        low, high = low + shift, high + shift
    return float(low), float(high)
