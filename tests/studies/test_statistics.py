from __future__ import annotations

import pytest

from vlm.studies.statistics import estimate, t_975


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


def test_quantiles_fall_towards_the_normal_one() -> None:
    quantiles = [t_975(degrees) for degrees in range(1, 200)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert quantiles[-1] > 1.96
