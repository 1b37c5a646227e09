"""Which pairs are seen, at a fixed number of them: a random window, or the best by a score."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray


def best_by_score(
    hashes: NDArray[np.int64], scores: NDArray[np.float64], count: int, direction: Literal["highest", "lowest"]
) -> NDArray[np.int64]:
    """Positions of the `count` best-scored examples, in ascending order; NaN has no score and is never chosen.

    Of equal scores the lower place on the ring wins, so the choice depends on keys and scores alone, and a smaller
    count is inside a larger one. `count` must not exceed the number of scores.
    """
    num_scored = int((~np.isnan(scores)).sum())
    if not 0 <= count <= num_scored:
        raise ValueError(f"count must be in [0, {num_scored}]. Got {count}")
    ranked = np.lexsort((hashes, -scores if direction == "highest" else scores))  # NaN comes last either way
    return np.sort(ranked[:count]).astype(np.int64)
