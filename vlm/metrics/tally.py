"""The values that a benchmark's scores are means of, each with the cluster that it was drawn with."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Name = tuple[str, ...]
"""A score's place among the results: ("overall",) or ("per_answer_type", "yes/no")."""

Statistic = Callable[["NDArray[np.float64]"], "NDArray[np.float64]"]
"""A score that is no mean: weights of the clusters, one row a resample, to one value a row."""


@dataclass(slots=True)
class Sample:
    """The values that one score is the mean of, and the cluster of each. The mean of none is 0."""

    values: list[float] = field(default_factory=list)
    clusters: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Tally:
    """What is known after every prediction was judged once. Scores and intervals are computed from it."""

    scale: float  # what a mean of 1 is reported as: 100 where the official script prints percent
    samples: dict[Name, Sample] = field(default_factory=dict)
    statistics: dict[Name, Statistic] = field(default_factory=dict)
    not_computed: dict[str, str] = field(default_factory=dict)  # the name of a score and what it lacks
    clusters: dict[Hashable, int] = field(default_factory=dict)  # an image or group, and its number

    def cluster(self, key: Hashable) -> int:
        """The number of a cluster; a new one gets the next."""
        return self.clusters.setdefault(key, len(self.clusters))

    def add(self, name: Name, value: float, cluster: int) -> None:
        sample = self.samples.get(name)
        if sample is None:
            sample = self.samples[name] = Sample()
        sample.values.append(value)
        sample.clusters.append(cluster)

    def scores(self) -> dict[str, Any]:
        """Every score under its official name, unrounded; tables are dictionaries."""
        return nested({name: self.value(name) for name in self.names()})

    def counts(self) -> dict[str, Any]:
        """How many values each mean is over."""
        return nested({name: len(sample.values) for name, sample in self.samples.items()})

    def names(self) -> Iterator[Name]:
        yield from self.samples
        yield from self.statistics

    def value(self, name: Name) -> float:
        if name in self.samples:
            values = self.samples[name].values
            return self.scale * sum(values) / max(len(values), 1)
        import numpy as np

        return float(self.statistics[name](np.ones((1, len(self.clusters))))[0])


def nested(values: dict[Name, Any]) -> dict[str, Any]:
    """{("a",): 1, ("b", "c"): 2} as {"a": 1, "b": {"c": 2}}."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *above, last = name
        branch = tree
        for part in above:
            branch = branch.setdefault(part, {})
        branch[last] = value
    return tree
