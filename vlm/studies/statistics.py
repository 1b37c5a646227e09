"""Means over seeds, with the interval that so few seeds allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# fmt: off
T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
     2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
     2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)
# fmt: on
"""97.5% quantiles of Student's t distribution for 1 to 30 degrees of freedom, as any statistics book tables them."""


@dataclass(frozen=True)
class Estimate:
    """The mean of one score over seeds."""

    mean: float
    half_width: float | None  # of the 95% t-interval; None for a single seed
    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.half_width is None else f"{self.mean:.1f} ± {self.half_width:.1f}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean with its 95% t-interval: mean ± t * s / sqrt(n), s with n - 1 in the denominator."""
    if not values:
        raise ValueError("no values to estimate from")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, tuple(values))
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Estimate(mean, t_975(n - 1) * deviation / math.sqrt(n), tuple(values))


def t_975(degrees: int) -> float:
    """The t quantile of a two-sided 95% interval; above 30 degrees by Cornish and Fisher's expansion."""
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1. Got {degrees}")
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
