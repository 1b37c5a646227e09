"""From the result files of a study's runs to one tidy table: a row a run and score."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.bookkeeping import ledger_of_run
from vlm.config import CustomConfig
from vlm.errors import UserError
from vlm.run import CONFIG, RESULT, write_atomically
from vlm.studies.plan import Job, distinct, task_name
from vlm.studies.statistics import estimate
from vlm.supervision import NoneConfig, SupervisionConfig
from vlm.supervision.ledger import LEDGER

BASELINES = ("question_prior", "chance")
"""Scores that no model made. `chance` may stand under a prefix: "styles/chance" belongs to the scores "styles/..."."""


@dataclass(frozen=True)
class Score:
    """One score of one run, in percent, with the supervision behind it and what can be had without a picture."""

    stage: str
    point: str
    variant: str  # the run's place on further axes: "learning_rate=0.001"
    source: str  # of the texts in pretraining; "none" at fraction 0
    fraction: float  # of the pairs, in [0, 1]
    pairs: int | None  # how many that were; None where the pretraining did not tell
    task: str
    metric: str
    seed: int
    question_only: bool  # the run saw grey images
    score: float
    question_only_score: float | None  # of runs that saw grey images, mean over seeds
    question_prior: float | None  # of the most frequent training answers
    chance: float | None
    run: str  # its folder, seen from the study's
    # From the ledger; None where the run has none, or where some component's count is unknown.
    supervised_pairs: int | None = None  # with texts by people, that the fusion was trained on
    total_pairs: int | None = None  # that any component has ever seen, labeller and filter included
    total_labelled_images: int | None = None
    others: str = ""  # components that have seen pairs beyond the supervised ones: "vision 400,000,000"
    # What the run cost; None where its result does not tell.
    steps: int | None = None
    samples: int | None = None
    seconds: float | None = None


Row = dict[str, Any]
"""A line of the tidy table: the fields of `Score`, None where the run has no such value."""


def collect(jobs: Sequence[Job], folder: Path) -> list[Score]:
    """The scores of all finished jobs, in the order of the plan."""
    return [score for _, score in collect_with_jobs(jobs, folder)]


def collect_with_jobs(jobs: Sequence[Job], folder: Path) -> list[tuple[Job, Score]]:
    """The scores of all finished jobs, each with its job: a run at two places of the grid has two."""
    stages = _stages_of_tasks(jobs)
    scores = []
    of_jobs = []
    for job in jobs:
        result = _result(job)
        if result is None or job.config.task is None:
            continue
        pretraining = pretraining_of(job)
        supervision = pretraining.config.supervision
        task = task_name(job)
        question_only = is_question_only(job)
        books = _books(job)
        variant = _variant(job)
        if len(stages[task]) > 1 and not question_only:
            variant = ", ".join(filter(None, (variant, job.stage)))
        for metric, score in result["scores"].items():
            if metric.split("/")[-1] in BASELINES:
                continue
            of_jobs.append(job)
            scores.append(
                Score(
                    stage=job.stage,
                    point=job.labels.get("point", ""),
                    variant=variant,
                    source=source_name(supervision),
                    fraction=supervision.fraction,
                    pairs=(_result(pretraining) or {}).get("examples") if pretraining is not job else None,
                    task=task,
                    metric=metric,
                    seed=job.config.seed,
                    question_only=question_only,
                    score=score,
                    question_only_score=None,
                    question_prior=_baseline("question_prior", metric, result["scores"], headline(job)),
                    chance=_baseline("chance", metric, result["scores"], headline(job)),
                    run=str(job.folder.relative_to(folder.resolve())),
                    **books,
                    **_cost(result),
                )
            )
    return list(zip(of_jobs, _with_question_only(scores), strict=True))


def table(jobs: Sequence[Job], scores: Sequence[Score], folder: Path) -> list[Row]:
    """The tidy table: a row a run and score, then a row for each finished run that has none, with what it cost."""
    rows = [dataclasses.asdict(score) for score in scores]
    names = [field.name for field in dataclasses.fields(Score)]
    for job in distinct(jobs):
        result = _result(job)
        if result is None or job.config.task is not None:
            continue
        own = {"stage": job.stage, "point": job.labels.get("point", ""), "seed": job.config.seed}
        own |= {"variant": _variant(job), "run": str(job.folder.relative_to(folder.resolve()))}
        if job.config.data.part == "pairs":
            supervision = job.config.supervision
            own |= {"source": source_name(supervision), "fraction": supervision.fraction}
            own |= {"pairs": result.get("examples")} | _books(job)
        rows.append(dict.fromkeys(names) | own | _cost(result))
    return rows


def write_csv(rows: Iterable[Row], file: Path) -> None:
    """Floats with at most 4 digits behind the point, empty where there is no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in dataclasses.fields(Score)]
    writer.writerow(names)
    for row in rows:
        writer.writerow(round(value, 4) if isinstance(value := row[name], float) else value for name in names)
    write_atomically(file, text.getvalue())


def write_parquet(rows: Sequence[Row], file: Path) -> bool:
    """The same table with types and unrounded; False if pyarrow is not there to write it."""
    try:
        pyarrow: Any = importlib.import_module("pyarrow")  # it has no types
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        return False
    kinds = {"str": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64(), "bool": pyarrow.bool_()}
    fields = [(field.name, kinds[str(field.type).split(" ")[0]]) for field in dataclasses.fields(Score)]
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), pyarrow.schema(fields)), partial)
    os.replace(partial, file)
    return True


def pretraining_of(job: Job) -> Job:
    """The pretraining whose supervision a fine-tuning inherits; the job itself if it starts from none."""
    while job.config.task is not None and "start_from" in job.upstream:
        job = job.upstream["start_from"]
    return job


def headline(job: Job) -> str:
    """The score that a curve of this job's task shows."""
    task: Any = job.config.task.load() if isinstance(job.config.task, CustomConfig) else job.config.task
    return str(getattr(task, "headline", "accuracy"))


def is_question_only(job: Job) -> bool:
    return bool(getattr(job.config.task, "question_only", False))


def source_name(supervision: SupervisionConfig) -> str:
    """Where the texts of a pretraining come from: "captions", "captions+machine_labels", "none" at fraction 0.

    "images_only" are images that no text stands beside, which is not the same as no pretraining.
    """
    if supervision.fraction == 0:
        return "none"
    names = {
        source.target.split(":")[1] if isinstance(source, CustomConfig) else source.type
        for source in supervision.drawn
        if not isinstance(source, NoneConfig)
    }
    return "+".join(sorted(names)) or "images_only"


def _stages_of_tasks(jobs: Sequence[Job]) -> dict[str, set[str]]:
    stages: dict[str, set[str]] = {}
    for job in jobs:
        if job.config.task is not None:
            of_task = stages.setdefault(task_name(job), set())
            if not is_question_only(job):
                of_task.add(job.stage)
    return stages


def _variant(job: Job) -> str:
    """The job's place on axes that have no column of their own."""
    labels = {label: value for label, value in job.labels.items() if label not in ("point", "task", "seed")}
    return ", ".join(f"{label.split('.')[-1]}={value}" for label, value in labels.items())


def _cost(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: result.get(name) for name in ("steps", "samples", "seconds")}


def _books(job: Job) -> dict[str, Any]:
    """What a score says of its run's ledger; counted from its config where it has none and its data is still there."""
    if not any((job.folder / name).is_file() for name in (LEDGER, CONFIG)):
        return {}
    try:
        ledger = ledger_of_run(job.folder)
    except UserError:
        if (job.folder / LEDGER).is_file():
            raise
        return {}
    own, pairs, labelled = ledger.count("pairs", ["fusion"]), ledger.count("pairs"), ledger.count("labelled_images")
    others = [f"{name} {'unknown' if seen.unknown else f'{seen.known:,}'}" for name, seen in ledger.others().items()]
    return {
        "supervised_pairs": None if own.unknown else own.known,
        "total_pairs": None if pairs.unknown else pairs.known,
        "total_labelled_images": None if labelled.unknown else labelled.known,
        "others": "; ".join(others),
    }


def _result(job: Job) -> dict[str, Any] | None:
    file = job.folder / RESULT
    return json.loads(file.read_text()) if file.is_file() else None


def _baseline(name: str, metric: str, scores: Mapping[str, float], headline: str) -> float | None:
    """The baseline that stands beside this score: its own, else under the same prefix, and then for headlines only."""
    if f"{metric}/{name}" in scores:
        return scores[f"{metric}/{name}"]
    prefix, _, kind = metric.rpartition("/")
    if kind != headline:
        return None
    while prefix and f"{prefix}/{name}" not in scores:
        prefix = prefix.rpartition("/")[0]
    return scores.get(f"{prefix}/{name}" if prefix else name)


def _with_question_only(scores: Sequence[Score]) -> list[Score]:
    """Each score beside what the same task and metric gave to runs that saw grey images."""
    blind: dict[tuple[str, str], list[float]] = {}
    for score in scores:
        if score.question_only:
            blind.setdefault((score.task, score.metric), []).append(score.score)
    means = {key: estimate(values).mean for key, values in blind.items()}
    return [dataclasses.replace(score, question_only_score=means.get((score.task, score.metric))) for score in scores]
