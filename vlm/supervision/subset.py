"""The supervised subset as a window of the hash ring."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

RING = 2**63


@runtime_checkable
class Positions(Protocol):
    """Places of the chosen examples on the ring, in the order in which they count: a window, or an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: int, /) -> Any: ...


@dataclass(frozen=True)
class Window(Sequence[int]):
    """The `num_positions` places from `first` on around a ring of `size`: three numbers, whatever they span."""

    first: int
    num_positions: int
    size: int

    def __len__(self) -> int:
        return self.num_positions

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[int]: ...

    def __getitem__(self, at: int | slice) -> int | Sequence[int]:
        if isinstance(at, slice):
            numbers = range(self.num_positions)[at]
            if numbers.step == 1:
                return Window(self.first + numbers.start, len(numbers), self.size)
            return [self[number] for number in numbers]
        return (self.first + range(self.num_positions)[at]) % self.size

    def __iter__(self) -> Iterator[int]:
        return ((self.first + number) % self.size for number in range(self.num_positions))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray((self.first + np.arange(self.num_positions, dtype=np.int64)) % max(self.size, 1), dtype)


def window(hashes: NDArray[np.int64], fraction: float, subset_seed: int) -> Window:
    """Positions of the first `round(fraction * n)` examples at or after the seed's place on the ring.

    `hashes` ascend. Windows of one seed are nested: a smaller fraction is a prefix of a larger one. Where examples
    lie is random (their keys are hashed), so a window is a random subset; it is contiguous, so only its bytes are read.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1]. Got {fraction}")
    start = int.from_bytes(hashlib.sha256(f"subset {subset_seed}".encode()).digest()[:8], "big") % RING
    first = int(np.searchsorted(hashes, start))
    return Window(first, round(fraction * len(hashes)), len(hashes))
