"""The score of each question of one run, kept beside its predictions, for comparing runs question by question."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.errors import UserError
from vlm.sharing import share

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

QUESTIONS = "questions"


@dataclass(frozen=True, slots=True)
class Items:
    """Scores in [0, 1] of the questions that count, in the order of the official file; their mean is the headline.

    Two runs can be compared question by question if `questions` is the same: a hash of the ids in order.
    """

    values: NDArray[np.float32]
    clusters: NDArray[np.int32]  # the number of the image, or of NLVR2's statement group
    questions: str

    @property
    def percent(self) -> float:
        return 100 * float(self.values.mean(dtype=float))


def make_items(ids: Sequence[str], values: Sequence[float], clusters: Sequence[Hashable]) -> Items:
    """Items of questions with these ids, scores and clusters; clusters are numbered as they come."""
    import numpy as np

    numbers: dict[Hashable, int] = {}
    numbered = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    return Items(np.asarray(values, np.float32), np.asarray(numbered, np.int32), digest)


def write_items(file: Path, items: Items) -> None:
    """A safetensors file: nothing in it can run, and a header that lies about sizes is refused."""
    from safetensors.numpy import save_file

    partial = file.with_name(f".{file.name}.{os.getpid()}")
    save_file({"values": items.values, "clusters": items.clusters}, partial, {QUESTIONS: items.questions})
    share(partial)
    os.replace(partial, file)


def read_items(file: Path) -> Items:
    """What `write_items` wrote; anything else is an error that names the file."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            values, clusters = opened.get_tensor("values"), opened.get_tensor("clusters")
            questions = (opened.metadata() or {}).get(QUESTIONS, "")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: holds no scores of questions ({error}). Evaluate the run again") from None
    sound = values.dtype == np.float32 and clusters.dtype == np.int32 and values.ndim == clusters.ndim == 1
    if not sound or not len(values) or len(values) != len(clusters) or not questions:
        raise UserError(f"{file}: expected a score and a cluster for each question. Evaluate the run again")
    if not (np.isfinite(values).all() and clusters.min() >= 0 and clusters.max() < len(clusters)):
        raise UserError(f"{file}: a score is not finite, or a cluster has an impossible number. Evaluate the run again")
    return Items(values, clusters, questions)
