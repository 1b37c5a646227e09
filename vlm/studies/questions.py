"""The score of each question of a study's finished runs, as resampled means that every comparison shares."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.bookkeeping import prepared_root
from vlm.config import fingerprint
from vlm.errors import UserError
from vlm.metrics.bootstrap import RESAMPLES, mean_replicates
from vlm.metrics.items import Items, read_items
from vlm.run import RESULT, task_of
from vlm.scoring.predictions import read_gqa_predictions, read_nlvr2_predictions, read_vqav2_results
from vlm.studies.collect import headline
from vlm.studies.plan import Job, distinct
from vlm.tasks.task import Task
from vlm.types import Question

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SAME_SCORE = 0.01  # percent: between a headline and the mean over its questions, of 32-bit floats


@dataclass(frozen=True)
class Resampled:
    """The headline of each run, in percent, under resampled questions; all runs of one test set resampled alike."""

    columns: Mapping[Path, NDArray[np.float64]]  # by the run's folder
    test_set: Mapping[Path, str]  # runs of different test sets are never paired

    def mean(self, runs: Sequence[Path]) -> NDArray[np.float64] | None:
        """Of several runs together, if all of them kept their questions and answered the same."""
        if not runs or len({self.test_set.get(run, "") for run in runs} | {""}) != 2:
            return None
        if any(run not in self.columns for run in runs):
            return None
        return sum((self.columns[run] for run in runs[1:]), start=self.columns[runs[0]]) / len(runs)

    def together(self, runs: Sequence[Sequence[Path]]) -> list[NDArray[np.float64]] | None:
        """The means of several groups of runs, if all may be paired."""
        if self.mean([run for group in runs for run in group]) is None:
            return None
        return [mean for group in runs if (mean := self.mean(group)) is not None]


def resample(jobs: Sequence[Job], num_resamples: int = RESAMPLES) -> tuple[Resampled, list[str]]:
    """The finished runs of these jobs, and in words why some are left out. One test set is in memory at a time."""
    import numpy as np

    known: dict[tuple[str, str], Sequence[Question] | None] = {}
    of_set: dict[str, dict[Path, Items]] = {}
    left_out: dict[str, int] = {}
    for job in distinct(jobs):
        if not job.is_finished or not isinstance(task_of(job.config), Task):
            continue
        found = _items(job, known)
        if isinstance(found, str):
            left_out[found] = left_out.get(found, 0) + 1
        else:
            of_set.setdefault(f"{found.questions} {zlib.crc32(found.clusters.tobytes())}", {})[job.folder] = found
    columns: dict[Path, NDArray[np.float64]] = {}
    for of_runs in of_set.values():
        clusters = next(iter(of_runs.values())).clusters
        drawn = mean_replicates(np.stack([items.values for items in of_runs.values()]), clusters, num_resamples)
        columns |= dict(zip(of_runs, 100 * drawn.T, strict=True))
    sets = {run: questions for questions, of_runs in of_set.items() for run in of_runs}
    return Resampled(columns, sets), [f"{count} {_runs(count)} {reason}" for reason, count in left_out.items()]


def _runs(count: int) -> str:
    return "run" if count == 1 else "runs"


def _items(job: Job, known: dict[tuple[str, str], Sequence[Question] | None]) -> Items | str:
    """A run's scores of questions, from its file or else from its predictions; or why there are none."""
    task: Any = task_of(job.config)
    name = f"{task.type}-{task.evaluation_name}"
    file = job.folder / f"items-{name}.safetensors"
    if file.is_file():
        try:
            items: Items | None = read_items(file)
        except UserError as error:
            return f"cannot be compared by question ({error})"
    else:  # a run of before there were such files
        items = _judged(job, task, name, known)
    if items is None:
        return "kept no scores of questions, and no predictions whose questions are still at hand"
    score = json.loads((job.folder / RESULT).read_text())["scores"].get(headline(job))
    if score is None or abs(score - items.percent) > SAME_SCORE:
        return "kept scores of questions that do not belong to its result"
    return items


def _judged(job: Job, task: Task, name: str, known: dict[tuple[str, str], Sequence[Question] | None]) -> Items | None:
    readers: Mapping[str, Any] = {
        "vqav2": read_vqav2_results,
        "gqa": read_gqa_predictions,
        "nlvr2": read_nlvr2_predictions,
    }
    file = job.folder / f"predictions-{name}.{'csv' if task.type == 'nlvr2' else 'json'}"
    if task.type not in readers or not file.is_file():
        return None
    key = fingerprint(job.config.data), fingerprint(task.model_copy(update={"question_only": False}))
    if key not in known:  # one reading of the official files serves all runs
        known[key] = _questions(job, task)
    found = known[key]
    if found is None:
        return None
    try:
        predictions = {str(number): answer for number, answer in readers[task.type](file).items()}
        return task.items(found, predictions)
    except UserError:  # predictions of other questions
        return None


def _questions(job: Job, task: Task) -> Sequence[Question] | None:
    root = prepared_root(job.config)
    if root is None:
        return None
    try:
        return task.evaluation_questions(root)
    except UserError:
        return None
