"""From a study.yaml to jobs: every run of the grid as a complete, validated RunConfig that knows its inputs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from vlm.config import Composer, Config, ConfigError, Fingerprints, Setting, did_you_mean
from vlm.run import RESULT, RunConfig


class ResourcesConfig(Config):
    """What one job asks of a cluster. On one machine the jobs share cores and GPUs evenly instead."""

    cpus: PositiveInt | None = None  # None: one
    gpus: NonNegativeInt | None = None  # None: `trainer.devices`, where there are GPUs
    memory_gib: PositiveFloat | None = None  # None: not limited by the study
    hours: PositiveFloat | None = None  # None: a day; SLURM takes a job that needs longer up again


Labelled = str | int | float  # a value as a label shows it
NamedValues = dict[str, dict[str, Any]]


def _refuse_twice(where: str, values: Sequence[Any]) -> None:
    """One run at two places that nothing tells apart would count as two."""
    seen: list[str] = []
    for value in values:
        if _label(value) in seen:
            raise ValueError(f"{where}: {_label(value)} stands there twice")
        seen.append(_label(value))


class StageConfig(Config):
    """Runs of one config. Their number: seeds x points x grid x runs of the upstream stages, less the excluded."""

    config: str  # a name that `vlm show` knows
    overrides: tuple[str, ...] = ()
    upstream: dict[str, str] = Field({})  # key of the run's config that takes a run folder -> an earlier stage
    only: dict[str, tuple[Labelled, ...]] = Field({})  # label -> the values of it that upstream runs may have
    points: NamedValues = Field({})  # named values of the independent variable, each a set of overrides
    # Crossed: a key with its values, or the name of an axis with named sets of overrides.
    grid: dict[str, tuple[Any, ...] | NamedValues] = Field({})
    exclude: tuple[dict[str, Labelled | tuple[Labelled, ...]], ...] = ()  # places: label -> value, or any of several
    seeds: tuple[NonNegativeInt, ...] | None = Field(None, min_length=1)  # None: the study's
    resources: ResourcesConfig = ResourcesConfig()  # in place of the study's, one by one

    @field_validator("grid", mode="before")
    @classmethod
    def _axes_are_lists_or_named_sets(cls, grid: Any) -> Any:
        """Here, because pydantic would name the branch of the union that it tried first."""
        for axis, values in grid.items() if isinstance(grid, Mapping) else ():
            named = values if isinstance(values, Mapping) else {}
            wrong = next((name for name, settings in named.items() if not isinstance(settings, Mapping)), None)
            if wrong is not None:
                raise ValueError(f"{axis}.{wrong}: expected overrides (key: value), got {named[wrong]!r}")
            if not isinstance(values, list | tuple | Mapping):
                raise ValueError(f"{axis}: expected a list of values, or named sets of overrides, got {values!r}")
        return grid

    @model_validator(mode="after")
    def _every_axis_has_values(self) -> StageConfig:
        for axis, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{axis}: no values. Give some, or leave the axis out")
            if not isinstance(values, dict):
                _refuse_twice(f"grid.{axis}", values)
        _refuse_twice("seeds", self.seeds or ())
        for number, place in enumerate(self.exclude):
            if not place:
                raise ValueError(f"exclude.{number}: names no label, so it would leave nothing")
        return self


class DryRunConfig(Config):
    """What `--dry-run` changes, so that every kind of job takes some steps on small data within minutes."""

    overrides: tuple[str, ...] = ()  # for every run, or for those of one stage as `stage:key=value`


class PanelConfig(Config):
    """One score of one task, shown against the fraction of pairs."""

    task: str
    metric: str = "accuracy"
    title: str | None = None


class FigureConfig(Config):
    """What the figure and the table show. Without panels: the headline score of each task."""

    panels: tuple[PanelConfig, ...] = ()
    x_label: str | None = None  # None: the pairs, in percent
    y_label: str | None = None  # None: the metric's name


class StudyConfig(Config):
    """A grid of runs. Stages stand in the order in which they feed each other.

    A run starts from the upstream runs of its own seed. Where the upstream stage has `seeds` of its own and this one
    is not among them, it starts from those of the first: so one unimodal encoder can serve all seeds.
    """

    question: str
    overrides: tuple[str, ...] = ()  # for every run
    seeds: tuple[NonNegativeInt, ...] = Field((0,), min_length=1)
    stages: dict[str, StageConfig] = Field(min_length=1)
    figure: FigureConfig = FigureConfig()
    retries: NonNegativeInt = 1  # further attempts at a job that failed by its own error
    resources: ResourcesConfig = ResourcesConfig()
    dry_run: DryRunConfig = DryRunConfig()

    @model_validator(mode="after")
    def _stages_feed_later_ones(self) -> StudyConfig:
        _refuse_twice("seeds", self.seeds)
        earlier: list[str] = []
        for name, stage in self.stages.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"stages.{name}: a name of letters, digits, - and _ is needed")
            for key, upstream in stage.upstream.items():
                if upstream in self.stages and upstream not in earlier:
                    raise ValueError(
                        f"stages.{name}.upstream.{key}: stage {upstream!r} does not stand before {name!r}. A stage "
                        "starts from earlier ones, so that there is no loop"
                    )
                if upstream not in earlier:
                    known = did_you_mean(upstream, earlier) or "No stage stands before this one"
                    raise ValueError(f"stages.{name}.upstream.{key}: unknown earlier stage {upstream!r}. {known}")
            earlier.append(name)
        return self


@dataclass(frozen=True, eq=False)
class Job:
    """One run of a study, with the runs that it starts from.

    Two jobs of one `id` are one run that stands at two places of the grid. `labels` tells the place: "seed", "point",
    and a label for each axis of a grid, those of the upstream runs included.
    """

    stage: str
    id: str  # `<stage>-<fingerprint>`, which is also the folder's name
    config: RunConfig
    upstream: Mapping[str, Job]
    labels: Mapping[str, str]
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)

    @property
    def folder(self) -> Path:
        return self.config.run_folder

    @cached_property
    def title(self) -> str:
        """For people: "finetune 5% nlvr2 seed=0"."""
        plain = [value for label, value in self.labels.items() if label in ("point", "task")]
        named = [f"{label}={value}" for label, value in self.labels.items() if label not in ("point", "task")]
        return " ".join([self.stage, *plain, *named])

    @property
    def is_finished(self) -> bool:
        return (self.folder / RESULT).is_file()


def plan(
    study: StudyConfig,
    folder: Path,
    overrides: Sequence[str] = (),
    config_folder: Path | None = None,
    forced: Sequence[str] = (),
) -> list[Job]:
    """All jobs, upstream ones first, each validated; nothing is written.

    `overrides` hold for every run, or for those of one stage as `stage:key=value`. `forced` ones may be of what the
    study varies, too.
    """
    _refuse_unknown_stages(study, [*overrides, *forced])
    _refuse_varied_keys(study, overrides)
    composer, fingerprints = Composer(RunConfig, config_folder), Fingerprints()
    runs = folder.resolve() / "runs"
    jobs: dict[str, list[Job]] = {}
    for name, stage in study.stages.items():
        _check_only(name, stage, [job for source in stage.upstream.values() for job in jobs[source]])
        given: list[str | Setting] = [
            *of_stage(overrides, name),
            *of_stage(forced, name),
            Setting("name", name),
            Setting("trainer.progress", False),
        ]
        places = _places(stage)
        asked = stage.resources.model_dump(exclude_unset=True)
        resources = study.resources.model_copy(update=asked)
        jobs[name] = []
        known: dict[str, dict[str, None]] = {}  # label -> the values that places have
        for seed in stage.seeds or study.seeds:
            for (upstream, inherited), (place, settings) in itertools.product(_starts(stage, jobs, seed), places):
                own = {label if label not in inherited else f"{name}.{label}": value for label, value in place.items()}
                labels = inherited | own | {"seed": str(seed)}
                for label, value in labels.items() if stage.exclude else ():
                    known.setdefault(label, {})[value] = None
                if any(_is_at(labels, excluded) for excluded in stage.exclude):
                    continue
                starts = [Setting(key, str(job.folder)) for key, job in upstream.items()]
                own_settings = [*settings, *given, Setting("seed", seed), *starts]
                try:
                    config = composer.compose(stage.config, [*study.overrides, *stage.overrides, *own_settings])
                except ConfigError as error:
                    shown = ", ".join(f"{label} {value}" for label, value in labels.items())
                    raise ConfigError(f"stage {name} ({shown}): {error}") from None
                identity = f"{name}-{fingerprints.of(config)}"
                config = config.model_copy(update={"folder": runs / identity})
                jobs[name].append(Job(name, identity, config, upstream, labels, resources))
        _check_exclude(name, stage, known)
        if not jobs[name]:
            raise ConfigError(f"stages.{name}: no upstream run passes, or all places are excluded, so it has no run")
    planned = [job for of_stage in jobs.values() for job in of_stage]
    _check_panels(study.figure, planned)
    return planned


def of_stage(overrides: Sequence[str], stage: str) -> list[str]:
    """Those that hold for every stage, and then those for this one, written `stage:key=value`."""
    general = [override for override in overrides if ":" not in override.split("=")[0]]
    return general + [o.removeprefix(f"{stage}:") for o in overrides if o.startswith(f"{stage}:")]


def distinct(jobs: Sequence[Job]) -> list[Job]:
    """Each run once."""
    return list({job.id: job for job in jobs}.values())


def _places(stage: StageConfig) -> list[tuple[dict[str, str], list[Setting]]]:
    """(labels, settings) of each combination of a stage's points and grid."""
    named = ({"point": stage.points} if stage.points else {}) | stage.grid
    axes: list[list[tuple[tuple[str, str], dict[str, Any]]]] = []
    for axis, values in named.items():
        if isinstance(values, dict):
            axes.append([((axis, name), settings) for name, settings in values.items()])
        else:
            axes.append([((axis, _label(value)), {axis: value}) for value in values])
    return [
        (dict(label for label, _ in chosen), [Setting(*one) for _, settings in chosen for one in settings.items()])
        for chosen in itertools.product(*axes)
    ]


def _is_at(labels: Mapping[str, str], place: Mapping[str, Labelled | tuple[Labelled, ...]]) -> bool:
    return all(labels.get(label) in _values(values) for label, values in place.items())


def _values(values: Labelled | tuple[Labelled, ...]) -> list[str]:
    return [_label(value) for value in (values if isinstance(values, tuple) else (values,))]


def _starts(
    stage: StageConfig, jobs: Mapping[str, Sequence[Job]], seed: int
) -> list[tuple[dict[str, Job], dict[str, str]]]:
    """What a stage's runs of one seed may start from: upstream runs by key, and the labels that they agree on.

    Runs of two upstream stages that stand at different places of an axis they share are never joined.
    """
    sources = list(dict.fromkeys(stage.upstream.values()))
    found = []
    for starts in itertools.product(*(_of_seed(jobs[source], seed) for source in sources)):
        labels: dict[str, str] = {}
        every = [(label, value) for job in starts for label, value in job.labels.items() if label != "seed"]
        agree = all(labels.setdefault(label, value) == value for label, value in every)
        wanted = {label: {_label(value) for value in values} for label, values in stage.only.items()}
        if agree and all(labels.get(label) in values for label, values in wanted.items()):
            found.append(({key: starts[sources.index(source)] for key, source in stage.upstream.items()}, labels))
    return found


def _of_seed(jobs: Sequence[Job], seed: int) -> list[Job]:
    same = [job for job in jobs if job.labels["seed"] == str(seed)]
    return same or [job for job in jobs if job.labels["seed"] == jobs[0].labels["seed"]]


def _check_only(name: str, stage: StageConfig, upstream: Sequence[Job]) -> None:
    known: dict[str, dict[str, None]] = {}  # label -> its values, in order
    for job in upstream:
        for label, found in job.labels.items():
            if label != "seed":
                known.setdefault(label, {})[found] = None
    for label, values in stage.only.items():
        if label not in known:
            raise ConfigError(f"stages.{name}.only.{label}: unknown label. {did_you_mean(label, known)}")
        for value in values:
            if _label(value) not in known[label]:
                near = did_you_mean(_label(value), known[label])
                raise ConfigError(f"stages.{name}.only.{label}: no upstream run has {_label(value)!r}. {near}")


def _check_exclude(name: str, stage: StageConfig, known: Mapping[str, Mapping[str, None]]) -> None:
    for number, place in enumerate(stage.exclude):
        for label, values in place.items():
            where = f"stages.{name}.exclude.{number}.{label}"
            if label not in known:
                raise ConfigError(f"{where}: unknown label. {did_you_mean(label, known)}")
            for value in _values(values):
                if value not in known[label]:
                    raise ConfigError(f"{where}: no run has {value!r}. {did_you_mean(value, known[label])}")


def _check_panels(figure: FigureConfig, jobs: Sequence[Job]) -> None:
    """A panel of a task that no run has would be missing from the figure, and nobody would be told."""
    tasks = dict.fromkeys(task_name(job) for job in jobs if job.config.task is not None)
    for number, panel in enumerate(figure.panels):
        if panel.task not in tasks:
            near = did_you_mean(panel.task, tasks)
            raise ConfigError(f"figure.panels.{number}.task: no run has {panel.task!r}. {near}")


def _refuse_unknown_stages(study: StudyConfig, overrides: Sequence[str]) -> None:
    for override in overrides:
        stage = override.split("=")[0].rpartition(":")[0]
        if stage and stage not in study.stages:
            raise ConfigError(f"override {override!r}: unknown stage. {did_you_mean(stage, study.stages)}")


def _refuse_varied_keys(study: StudyConfig, overrides: Sequence[str]) -> None:
    """An override of what the study itself varies would make its points the same."""
    for override in overrides:
        stage_name, _, rest = override.rpartition(":") if ":" in override.split("=")[0] else ("", "", override)
        key = rest.split("=")[0].lstrip("+~")
        for name, stage in study.stages.items():
            if stage_name in ("", name):
                varied = {"name", "seed", "folder", *stage.upstream, *stage.grid}
                for values in (stage.points, *stage.grid.values()):
                    if isinstance(values, dict):
                        varied |= {setting for settings in values.values() for setting in settings}
                if key in varied:
                    raise ConfigError(
                        f"override {override!r}: the study sets {key} itself. Edit its study.yaml instead"
                    )


def task_name(job: Job) -> str:
    """The task as the grid calls it, else its type."""
    assert job.config.task is not None
    return job.labels.get("task", job.config.task.type)


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
