"""From a study.yaml to jobs: every run of the grid as a complete, validated RunConfig that knows its inputs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, model_validator

from vlm.config import Config, ConfigError, apply_overrides, compose, did_you_mean, fingerprint
from vlm.run import RESULT, RunConfig


class StageConfig(Config):
    """Runs of one config. Their number: seeds x points x grid x runs of the upstream stages."""

    config: str  # a name that `vlm show` knows
    overrides: tuple[str, ...] = ()
    upstream: dict[str, str] = Field({})  # key of the run's config that takes a run folder -> an earlier stage
    only: dict[str, tuple[str | int | float, ...]] = Field({})  # label -> the values of it that upstream runs may have
    points: dict[str, dict[str, Any]] = Field({})  # named values of the independent variable, each a set of overrides
    grid: dict[str, tuple[Any, ...]] = Field({})  # key -> values, crossed
    seeds: tuple[NonNegativeInt, ...] | None = Field(None, min_length=1)  # None: the study's


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

    @model_validator(mode="after")
    def _stages_feed_later_ones(self) -> StudyConfig:
        earlier: list[str] = []
        for name, stage in self.stages.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"stages.{name}: a name of letters, digits, - and _ is needed")
            for key, upstream in stage.upstream.items():
                if upstream not in earlier:
                    known = did_you_mean(upstream, earlier) or "No stage stands before this one"
                    raise ValueError(f"stages.{name}.upstream.{key}: unknown earlier stage {upstream!r}. {known}")
            earlier.append(name)
        return self


@dataclass(frozen=True, eq=False)
class Job:
    """One run of a study, with the runs that it starts from.

    Two jobs of one `id` are one run that stands at two places of the grid. `labels` tells the place: "seed", "point",
    and a label for each key of a grid, those of the upstream runs included.
    """

    stage: str
    config: RunConfig
    upstream: Mapping[str, Job]
    labels: Mapping[str, str]

    @cached_property
    def id(self) -> str:
        """`<stage>-<fingerprint>`, which is also the folder's name."""
        return f"{self.stage}-{fingerprint(self.config)}"

    @property
    def folder(self) -> Path:
        return self.config.run_folder

    @property
    def title(self) -> str:
        """For people: "finetune 5% nlvr2 seed=0"."""
        plain = [value for label, value in self.labels.items() if label in ("point", "task")]
        named = [f"{label}={value}" for label, value in self.labels.items() if label not in ("point", "task")]
        return " ".join([self.stage, *plain, *named])

    @property
    def is_finished(self) -> bool:
        return (self.folder / RESULT).is_file()


def plan(
    study: StudyConfig, folder: Path, overrides: Sequence[str] = (), config_folder: Path | None = None
) -> list[Job]:
    """All jobs, upstream ones first, each validated; nothing is written.

    `overrides` hold for every run, or for those of one stage as `stage:key=value`.
    """
    _refuse_varied_keys(study, overrides)

    @cache  # runs that differ only in where they start from are composed once, and then get their folders
    def composed(config: str, settings: tuple[str, ...]) -> RunConfig:
        return compose(config, settings, RunConfig, config_folder)

    jobs: dict[str, list[Job]] = {}
    for name, stage in study.stages.items():
        _check_only(name, stage, [job for source in stage.upstream.values() for job in jobs[source]])
        given = [override for override in overrides if ":" not in override.split("=")[0]]
        given += [override.removeprefix(f"{name}:") for override in overrides if override.startswith(f"{name}:")]
        # In place of the folders the stages' names, so that a wrong key is found here.
        given += [f"{key}={_written(source)}" for key, source in stage.upstream.items()]
        given += [f"name={_written(name)}", "trainer.progress=false"]
        jobs[name] = []
        for seed in stage.seeds or study.seeds:
            for (upstream, inherited), (place, settings) in itertools.product(
                _starts(stage, jobs, seed), _places(stage)
            ):
                own = {label if label not in inherited else f"{name}.{label}": value for label, value in place.items()}
                labels = inherited | own | {"seed": str(seed)}
                every = (*study.overrides, *stage.overrides, *settings, *given, f"seed={seed}")
                try:
                    base = composed(stage.config, every)
                except ConfigError as error:
                    shown = ", ".join(f"{label} {value}" for label, value in labels.items())
                    raise ConfigError(f"stage {name} ({shown}): {error}") from None
                jobs[name].append(_job(name, base, upstream, labels, folder))
        if not jobs[name]:
            raise ConfigError(f"stages.{name}: no upstream run passes, so the stage has none")
    return [job for of_stage in jobs.values() for job in of_stage]


def distinct(jobs: Sequence[Job]) -> list[Job]:
    """Each run once."""
    return list({job.id: job for job in jobs}.values())


def _job(
    stage: str,
    base: RunConfig,
    upstream: Mapping[str, Job],
    labels: Mapping[str, str],
    folder: Path,
) -> Job:
    """The run of `base` that starts from these runs, in its folder under the study's."""
    references = [f"{key}={_written(str(job.folder))}" for key, job in upstream.items()]
    config = apply_overrides(base, references) if references else base
    run_folder = folder.resolve() / "runs" / f"{stage}-{fingerprint(config)}"
    return Job(stage, config.model_copy(update={"folder": run_folder}), upstream, labels)


def _places(stage: StageConfig) -> list[tuple[dict[str, str], list[str]]]:
    """(labels, overrides) of each combination of a stage's points and grid."""
    axes = [[({"point": point}, settings) for point, settings in stage.points.items()]] if stage.points else []
    axes += [[({key: _label(value)}, {key: value}) for value in values] for key, values in stage.grid.items()]
    places = []
    for combination in itertools.product(*axes):
        labels = {label: value for place, _ in combination for label, value in place.items()}
        places.append(
            (labels, [f"{key}={_written(value)}" for _, chosen in combination for key, value in chosen.items()])
        )
    return places


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


def _refuse_varied_keys(study: StudyConfig, overrides: Sequence[str]) -> None:
    """An override of what the study itself varies would make its points the same."""
    for override in overrides:
        stage_name, _, rest = override.rpartition(":") if ":" in override.split("=")[0] else ("", "", override)
        if stage_name and stage_name not in study.stages:
            raise ConfigError(f"override {override!r}: unknown stage. {did_you_mean(stage_name, study.stages)}")
        key = rest.split("=")[0].lstrip("+~")
        for name, stage in study.stages.items():
            if stage_name in ("", name):
                varied = {"name", "seed", "folder", *stage.upstream, *stage.grid}
                varied |= {setting for settings in stage.points.values() for setting in settings}
                if key in varied:
                    raise ConfigError(
                        f"override {override!r}: the study sets {key} itself. Edit its study.yaml instead"
                    )


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _written(value: Any) -> str:
    """A YAML value in the grammar of overrides."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_written(inner) for inner in value) + "]"
    if isinstance(value, str):
        is_word = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value)
        if is_word and value.lower() not in ("true", "false", "null", "nan", "inf"):
            return value
        # Hydra reads \' as a quote, and \\ as a backslash only where backslashes stand before a quote.
        escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
        trailing = len(escaped) - len(escaped.rstrip("\\"))
        return f"'{escaped}{chr(92) * trailing}'"
    return json.dumps(value)
