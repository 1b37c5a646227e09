"""`vlm plan`: the runs of a study, what is done of them, and what the rest will take."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlm.config import fingerprint
from vlm.errors import UserError
from vlm.run import RESULT
from vlm.studies.board import clock, seconds_of
from vlm.studies.driver import FAILURE, drive
from vlm.studies.launchers.local import LocalLauncher, machine_slots
from vlm.studies.plan import Job, StudyConfig, distinct, plan
from vlm.studies.work import train

PROBE_STEPS = 30


@dataclass(frozen=True)
class Probe:
    """What a short run of one stage and task took."""

    fixed_seconds: float  # start, validation and evaluation
    examples_per_second: float
    examples: int  # that it trains on
    fraction: float  # of the pairs

    def seconds(self, job: Job) -> float:
        """Of a whole run like this one."""
        examples = self.examples
        if job.config.task is None and self.fraction:
            examples = round(examples * job.config.supervision.fraction / self.fraction)
        options = job.config.trainer
        return self.fixed_seconds + options.num_steps(examples) * options.batch_size / self.examples_per_second


@dataclass
class Outlook:
    """The runs of a study with their costs in seconds, as far as these are known."""

    jobs: list[Job]  # each run once
    places: Mapping[str, int]  # how often each run stands in the grid, by id
    finished: set[str]
    failed: set[str]
    probes: dict[tuple[str, str], Probe] = field(default_factory=dict)

    @classmethod
    def of(cls, planned: Sequence[Job]) -> Outlook:
        jobs, places = distinct(planned), dict.fromkeys((job.id for job in planned), 0)
        for job in planned:
            places[job.id] += 1
        finished = {job.id for job in jobs if job.is_finished}
        failed = {job.id for job in jobs if job.id not in finished and (job.folder / FAILURE).is_file()}
        return cls(jobs, places, finished, failed)

    def costs(self) -> dict[str, float | None]:
        """Seconds by run: its own, else the mean of its siblings of other seeds, of its stage and task, or by probe."""
        groups: dict[tuple[str, ...], list[float]] = {}
        own: dict[str, float | None] = {}
        for job in self.jobs:
            if job.id in self.finished and (seconds := seconds_of(job)) is not None:
                own[job.id] = seconds
                for group in _groups(job):
                    groups.setdefault(group, []).append(seconds)
        for job in self.jobs:
            known = next((groups[group] for group in _groups(job) if group in groups), None)
            probe = self.probes.get(_kind(job))
            if job.id not in own:
                own[job.id] = sum(known) / len(known) if known else probe.seconds(job) if probe else None
        return own

    def table(self, at_once: int) -> Table:
        """A row a stage."""
        costs = self.costs()
        table = Table(
            caption=self._caption(costs, at_once), caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        table.padding = (0, 1)
        table.collapse_padding = True
        table.add_column("stage", no_wrap=True)
        for name in ("places", "runs", "shared", "finished", "failed", "left", "a run", "to do"):
            table.add_column(name, justify="right", no_wrap=True)
        for stage in dict.fromkeys(job.stage for job in self.jobs):
            own = [job for job in self.jobs if job.stage == stage]
            left = [job for job in own if job.id not in self.finished]
            seconds = [costs[job.id] for job in own]
            rest = [costs[job.id] for job in left]
            table.add_row(
                stage,
                f"{sum(self.places[job.id] for job in own):,}",
                f"{len(own):,}",
                f"{sum(self.places[job.id] > 1 for job in own):,}",
                f"{len(own) - len(left):,}",
                f"{sum(job.id in self.failed for job in own):,}",
                f"{len(left):,}",
                _span(seconds),
                _total(rest),
            )
        return table

    def _caption(self, costs: Mapping[str, float | None], at_once: int) -> str:
        left = [costs[job.id] for job in self.jobs if job.id not in self.finished]
        if not left:
            return "All runs are finished."
        if None in left:
            return "What has no finished run yet has no cost: --probe measures it in short runs."
        hours = f"about {clock(sum(seconds or 0 for seconds in left) / at_once)} with {at_once} at once on this machine"
        return f"Left to do: {_total(left)} of one job at a time, {hours}."


def show_plan(
    study: StudyConfig,
    folder: Path,
    overrides: Sequence[str] = (),
    config_folder: Path | None = None,
    at_once: int | None = None,
    probe: bool = False,
    every: bool = False,
) -> None:
    """Print the plan; `every` lists each run."""
    console = Console()
    planned = plan(study, folder, overrides, config_folder)
    outlook = Outlook.of(planned)
    slots = len(list(machine_slots(planned, at_once)))
    if probe:
        outlook.probes = measure(study, outlook, overrides, config_folder, at_once, console)
    console.print(f"[bold]{escape(study.question)}[/bold]", highlight=False)
    for line in axes(planned):
        console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    console.print(outlook.table(slots), highlight=False)
    if every:
        costs = outlook.costs()
        for job in outlook.jobs:
            state = "finished" if job.id in outlook.finished else "failed" if job.id in outlook.failed else "left"
            cost = costs[job.id]
            shown = "" if cost is None else f"  {'' if job.id in outlook.finished else 'about '}{clock(cost)}"
            console.print(f"{state:8}  {job.id}  {escape(job.title)}{shown}", highlight=False, soft_wrap=True)


def axes(planned: Sequence[Job]) -> list[str]:
    """Each label with its values: "point: none, 5%, 100%"."""
    values: dict[str, dict[str, None]] = {}
    for job in planned:
        for label, value in job.labels.items():
            values.setdefault(label, {})[value] = None
    return [f"{label}: {_some(list(found))}" for label, found in values.items()]


def measure(
    study: StudyConfig,
    outlook: Outlook,
    overrides: Sequence[str],
    config_folder: Path | None,
    at_once: int | None,
    console: Console,
) -> dict[tuple[str, str], Probe]:
    """Short runs, in a folder that is thrown away, for each stage and task that has no finished run."""
    known = {_kind(job) for job in outlook.jobs if job.id in outlook.finished}
    wanted = {_kind(job) for job in outlook.jobs} - known
    if not wanted:
        return {}
    from vlm.studies.run import prepare_data, require_weights

    with tempfile.TemporaryDirectory(prefix="vlm-probe-") as folder:
        batch: dict[str, int] = {}
        for job in outlook.jobs:
            batch[job.stage] = max(batch.get(job.stage, 0), job.config.trainer.batch_size)
        short = [f"{stage}:trainer.samples={PROBE_STEPS * size}" for stage, size in batch.items()]
        jobs = plan(one_seed(study), Path(folder), overrides, config_folder, short)
        chosen: dict[tuple[str, str], Job] = {}
        for job in jobs:  # the one with most pairs, which surely has steps to take
            kind = _kind(job)
            if kind in wanted and (kind not in chosen or _fraction(job) > _fraction(chosen[kind])):
                chosen[kind] = job
        needed = with_upstream(list(chosen.values()))
        console.print(f"{len(needed)} short runs tell what the others cost.")
        prepare_data(needed)
        require_weights(needed)
        outcome = drive(needed, LocalLauncher(needed, at_once), console=console)
        if outcome.failed or outcome.interrupted:
            reason = next(iter((outcome.failed | outcome.interrupted).values()))
            raise UserError(f"--probe: a short run failed, as the whole one would: {reason}")
        return {kind: _probe(job) for kind, job in chosen.items()}


def dry_run(
    study: StudyConfig,
    overrides: Sequence[str] = (),
    config_folder: Path | None = None,
    at_once: int | None = None,
    work: Callable[[Path], None] = train,
) -> None:
    """Run every kind of run of the study, with the overrides of its `dry_run`, in a folder that is thrown away.

    Runs that differ in their seeds, or only in the weights that they start from, are of one kind. Exits with status 1
    where a run failed.
    """
    from vlm.studies.run import prepare_data, report_unfinished, require_weights

    console = Console()
    with tempfile.TemporaryDirectory(prefix="vlm-dry-run-") as folder:
        planned = plan(one_seed(study), Path(folder), overrides, config_folder, study.dry_run.overrides)
        ordered = with_upstream(kinds(depth_first(planned)))  # so that few checkpoints lie there at a time
        dependents: dict[str, set[str]] = {job.id: set() for job in ordered}
        for job in ordered:
            for start in job.upstream.values():
                dependents[start.id].add(job.id)

        def forget(job: Job) -> None:
            for one in (job, *job.upstream.values()):
                dependents[one.id] -= {job.id}
                if not dependents[one.id]:
                    for checkpoint in one.folder.glob("*.ckpt"):
                        checkpoint.unlink()

        cells = f"{len(ordered)} kinds of runs stand for {len(distinct(planned))} cells"
        console.print(f"{cells}; each goes in short.", highlight=False)
        prepare_data(ordered)
        require_weights(ordered)
        launcher = LocalLauncher(ordered, at_once or 1, work)
        outcome = drive(ordered, launcher, console=console, on_finished=forget)
        report_unfinished(ordered, outcome, console)
    console.print("Every kind of run works.")


def one_seed(study: StudyConfig) -> StudyConfig:
    """The study with the first of its seeds alone."""
    stages = {
        name: stage if stage.seeds is None else stage.model_copy(update={"seeds": stage.seeds[:1]})
        for name, stage in study.stages.items()
    }
    return study.model_copy(update={"seeds": study.seeds[:1], "stages": stages})


def with_upstream(jobs: Sequence[Job]) -> list[Job]:
    """The jobs and all that they start from, upstream ones first."""
    found: dict[str, Job] = {}
    for job in jobs:
        for one in (*with_upstream(list(job.upstream.values())), job):
            found.setdefault(one.id, one)
    return list(found.values())


def kinds(jobs: Sequence[Job]) -> list[Job]:
    """The first of those that differ only in the weights that they start from."""
    found: dict[tuple[str, ...], Job] = {}
    for job in jobs:
        alone = job.config.model_copy(update={"start_from": None})
        starts = [fingerprint(start.config.model) for start in job.upstream.values()]
        found.setdefault((job.stage, fingerprint(alone), *starts), job)
    return list(found.values())


def depth_first(jobs: Sequence[Job]) -> list[Job]:
    """Each run once, right before those that start from it."""
    places = {job.id: number for number, job in enumerate(distinct(jobs))}

    def path(job: Job) -> tuple[int, ...]:
        start = max(job.upstream.values(), key=lambda one: places[one.id], default=None)
        return (*path(start), places[job.id]) if start else (places[job.id],)

    return with_upstream(sorted(distinct(jobs), key=path))


def _groups(job: Job) -> list[tuple[str, ...]]:
    """What a run's cost may be judged by, the closest first."""
    place = tuple(f"{label}={value}" for label, value in job.labels.items() if label != "seed")
    return [(job.stage, *place), _kind(job), (job.stage,)]


def _kind(job: Job) -> tuple[str, str]:
    return job.stage, job.labels.get("task", "")


def _fraction(job: Job) -> float:
    return job.config.supervision.fraction if job.config.task is None else 1.0


def _probe(job: Job) -> Probe:
    result = json.loads((job.folder / RESULT).read_text())
    rate = float(result.get("examples_per_second") or 0.0) or float("inf")
    fixed = float(result["seconds"]) - int(result.get("samples", 0)) / rate
    return Probe(max(fixed, 0.0), rate, int(result.get("examples", 0)), _fraction(job))


def _span(seconds: Sequence[float | None]) -> str:
    known = [one for one in seconds if one is not None]
    if not known:
        return "?"
    low, high = clock(min(known)), clock(max(known))
    return low if low == high else f"{low} to {high}"


def _total(seconds: Sequence[float | None]) -> str:
    return "?" if None in seconds else clock(sum(one or 0 for one in seconds))


def _some(values: Sequence[str], most: int = 12) -> str:
    more = f" and {len(values) - most:,} more" if len(values) > most else ""
    return ", ".join(values[:most]) + more
