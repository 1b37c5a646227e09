"""The supervised subset as a window of the hash ring."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

RING = 2**63


def window(hashes: NDArray[np.int64], fraction: float, subset_seed: int) -> NDArray[np.int64]:
    """Positions of the first `round(fraction * n)` examples at or after the seed's place on the ring.

    `hashes` ascend. Windows of one seed are nested: a smaller fraction is a prefix of a larger one. Where examples
    lie is random (their keys are hashed), so a window is a random subset; it is contiguous, so only its bytes are read.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1]. Got {fraction}")
    start = int.from_bytes(hashlib.sha256(f"subset {subset_seed}".encode()).digest()[:8], "big") % RING
    first = int(np.searchsorted(hashes, start))
    count = round(fraction * len(hashes))
    return (first + np.arange(count, dtype=np.int64)) % max(len(hashes), 1)
