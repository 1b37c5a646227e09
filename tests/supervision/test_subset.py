from __future__ import annotations

import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data_loaders.shards import ring_hash
from vlm.supervision.subset import RING, Window, window

FRACTIONS = (0.0, 0.001, 0.01, 0.05, 0.3, 0.5, 0.999, 1.0)


def make_hashes(count: int = 1000) -> NDArray[np.int64]:
    return np.sort(np.array([ring_hash(f"key-{number}") for number in range(count)], dtype=np.int64))


def test_hashes_lie_on_the_ring() -> None:
    hashes = make_hashes()
    assert int(hashes[0]) >= 0 and int(hashes[-1]) < RING


@pytest.mark.parametrize("seed", range(5))
def test_fraction_windows_are_nested(seed: int) -> None:
    windows = [window(make_hashes(), fraction, seed) for fraction in FRACTIONS]
    for small, large in itertools.pairwise(windows):
        assert np.array_equal(small, large[: len(small)])


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_a_window_holds_exactly_its_fraction_without_repeats(fraction: float, count: int) -> None:
    chosen = window(make_hashes(count), fraction, 3)
    assert len(chosen) == len(set(chosen)) == round(fraction * count)
    assert set(chosen) <= set(range(count))


@pytest.mark.parametrize("seed", range(5))
def test_a_window_is_contiguous_on_the_ring(seed: int) -> None:
    chosen = window(make_hashes(), 0.3, seed)
    assert set(np.diff(chosen) % 1000) == {1}


def test_the_seed_moves_the_window() -> None:
    starts = {int(window(make_hashes(), 0.01, seed)[0]) for seed in range(20)}
    assert len(starts) > 15
    assert max(starts) - min(starts) > 500  # over the whole ring


def test_windows_of_many_seeds_cover_the_ring_evenly() -> None:
    counts = np.zeros(100)
    hashes = make_hashes(100)
    for seed in range(1000):
        counts[window(hashes, 0.1, seed)] += 1
    assert counts.mean() == 100
    assert counts.min() > 0


def test_a_window_depends_on_hashes_fraction_and_seed_alone() -> None:
    hashes = make_hashes()
    first = window(hashes, 0.1, 7)
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(99)
    assert np.array_equal(window(hashes.copy(), 0.1, 7), first)


def test_the_seed_names_a_place_on_the_ring_whatever_the_data() -> None:
    """The first members of a window lie right after the seed's place, in a small data set and in a large one."""
    small, large = make_hashes(100), make_hashes(10_000)
    for seed in range(20):
        first_small, first_large = (int(hashes[window(hashes, 0.1, seed)[0]]) for hashes in (small, large))
        assert (first_small - first_large) % RING <= RING // 10


@pytest.mark.parametrize("fraction", [-0.01, 1.01])
def test_a_fraction_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]\. Got"):
        window(make_hashes(), fraction, 0)


@pytest.mark.parametrize("seed", range(3))
def test_a_window_is_the_array_of_its_positions(seed: int) -> None:
    """However it is read: one by one, in slices, as an array; over the end of the ring too."""
    for fraction in (0.0, 0.3, 1.0):
        chosen = window(make_hashes(100), fraction, seed)
        array = np.asarray(chosen)
        assert list(chosen) == array.tolist() == [chosen[at] for at in range(len(chosen))]
        for part in (slice(3, 9), slice(None, None, 2), slice(None, -4), slice(5, 2)):
            assert list(chosen[part]) == array[part].tolist()
        with pytest.raises(IndexError):
            chosen[len(chosen)]


def test_a_window_of_any_size_is_three_numbers() -> None:
    chosen = Window(3, 3_000_000, 3_300_000)
    assert len(pickle.dumps(chosen)) < 200
