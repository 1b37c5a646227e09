"""A study's points against each other: paired differences, what is left of them after correction, exchange rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.config import Config, did_you_mean
from vlm.errors import UserError
from vlm.studies.collect import Score, pretraining_of, source_name
from vlm.studies.curves import SOURCES, Panel
from vlm.studies.exchange import ExchangeRate, exchange_rate
from vlm.studies.plan import Job
from vlm.studies.questions import Resampled
from vlm.studies.statistics import Difference, Estimate, Interval, difference, estimate, holm, ratio

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PLACE = "point"  # the axis unless another is asked for: the study's named points, apart by variant


@dataclass(frozen=True)
class Cell:
    """All runs of one panel that are told apart no further, by seed."""

    name: str
    variant: str
    source: str  # "" where its runs differ in it
    fraction: float | None  # None where its runs differ in it
    most: float  # the largest fraction of its runs
    pairs: int | None  # that people described, mean over seeds; None where its runs differ in the fraction
    runs: Mapping[int, tuple[Path, ...]]
    by_seed: Mapping[int, float]  # the mean over the seed's runs
    points: tuple[str, ...]

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.name, self.variant))) or "all"

    @property
    def estimate(self) -> Estimate:
        return estimate(list(self.by_seed.values()))

    def items(self, resampled: Resampled, seeds: Sequence[int]) -> NDArray[np.float64] | None:
        """The mean over these seeds under resampled questions; every seed counts alike."""
        of_seeds = resampled.together([self.runs[seed] for seed in seeds])
        return None if of_seeds is None else sum(of_seeds[1:], start=of_seeds[0]) / len(of_seeds)


@dataclass(frozen=True)
class Compared:
    """One cell minus the reference of its family, and which share of what all pairs bring it keeps."""

    cell: Cell
    difference: Difference
    share: tuple[float, Interval] | None = None  # (cell - none) / (all - none), where the pairs bring something


@dataclass(frozen=True)
class Family:
    """Every cell against one reference on one task: the comparisons that Holm's correction holds together.

    A family answers one question of one task (which points differ from no pretraining?), so it is corrected as a
    whole and apart from the others: many against one, as in Dunnett's test (1955).
    """

    reference: Cell
    rows: tuple[Compared, ...]


@dataclass(frozen=True)
class Worth:
    """The exchange rate of one weak source."""

    name: str
    rate: ExchangeRate


@dataclass(frozen=True)
class PanelComparison:
    panel: Panel
    cells: tuple[Cell, ...]
    over_items: Mapping[str, Interval]  # of each cell's mean, by its title
    families: tuple[Family, ...]
    worths: tuple[Worth, ...]

    @property
    def with_items(self) -> bool:
        return any(row.difference.items is not None for family in self.families for row in family.rows)


def compare_panel(
    panel: Panel,
    collected: Sequence[tuple[Job, Score]],
    resampled: Resampled,
    folder: Path,
    by: str = PLACE,
    against: str | None = None,
) -> PanelComparison:
    """The cells of one panel, their differences and the exchange rates of its weak sources."""
    own = {id(score) for score in panel.of([score for _, score in collected])}
    rows = [(job, score) for job, score in collected if id(score) in own]
    usable = resampled if panel.is_headline else Resampled({}, {})  # the mean over questions is the headline's alone
    cells = _cells(rows, by, folder)
    families = tuple(_family(reference, cells, usable) for reference in _references(cells, against))
    bounds = {cell.title: _percentiles(cell.items(usable, list(cell.runs))) for cell in cells}
    return PanelComparison(panel, tuple(cells), bounds, families, tuple(_worths(cells, usable) if by == PLACE else ()))


# --- Cells -----------------------------------------------------------------------------------------------------------


def _cells(rows: Sequence[tuple[Job, Score]], by: str, folder: Path) -> list[Cell]:
    grouped: dict[tuple[str, str], list[Score]] = {}
    for job, score in rows:
        key = (score.point, score.variant) if by == PLACE else (axis_value(job, by), "")
        grouped.setdefault(key, []).append(score)
    return [_cell(name, variant, scores, folder.resolve()) for (name, variant), scores in grouped.items()]


def _cell(name: str, variant: str, scores: Sequence[Score], folder: Path) -> Cell:
    runs: dict[int, dict[Path, float]] = {}  # a run at two places of the grid counts once
    for score in scores:
        runs.setdefault(score.seed, {})[folder / score.run] = score.score
    sources, fractions = {score.source for score in scores}, {score.fraction for score in scores}
    amounts = {score.pairs if score.supervised_pairs is None else score.supervised_pairs for score in scores}
    if not any("captions" in source.split("+") for source in sources):
        amounts = {0}
    known = [amount for amount in amounts if amount is not None]
    return Cell(
        name,
        variant,
        sources.pop() if len(sources) == 1 else "",
        next(iter(fractions)) if len(fractions) == 1 else None,
        max(fractions),
        round(sum(known) / len(known)) if len(fractions) == 1 and len(known) == len(amounts) else None,
        {seed: tuple(of_seed) for seed, of_seed in sorted(runs.items())},
        {seed: sum(of_seed.values()) / len(of_seed) for seed, of_seed in sorted(runs.items())},
        tuple(dict.fromkeys(filter(None, (score.point for score in scores)))),
    )


def axis_value(job: Job, axis: str) -> str:
    """Where a job stands on an axis: a label of the study, "supervision.source", or a key of its config.

    What says how the model was pretrained is looked up in the pretraining. `STAGE:KEY` is a key of that stage's run.
    """
    found = _axis(job, axis)
    if found is None:
        labels = ["supervision.source", *(label for label in job.labels if label not in UNGROUPED)]
        keys = [*labels, *_keys(pretraining_of(job)), *_keys(job)]
        near = get_close_matches(axis, keys, n=1) or [key for key in keys if key.startswith(f"{axis}.")][:1]
        guess = f" Did you mean {near[0]!r}?" if near else ""
        others = f"Available: {', '.join(labels)}, and every key that `vlm show` prints"
        raise UserError(f"--by {axis}: the study has no such label or key.{guess} {others}")
    return found


UNGROUPED = {
    "seed": "the seeds are what means and intervals are over",
    "task": "the tasks are never averaged; choose one with --task",
}
"""Axes that nothing is grouped by, and why."""


def check_axis(axis: str, jobs: Sequence[Job]) -> None:
    """Before anything is read: an axis that the scored jobs have."""
    if axis in UNGROUPED:
        raise UserError(f"--by {axis}: {UNGROUPED[axis]}")
    for job in jobs:
        if job.config.task is not None:
            axis_value(job, axis)


def _axis(job: Job, axis: str) -> str | None:
    stage, _, key = axis.rpartition(":")
    if stage:
        behind = next((each for each in ancestors(job) if each.stage == stage), None)
        return None if behind is None else _lookup(behind, key)
    if axis in job.labels:
        return job.labels[axis]
    pretraining = pretraining_of(job)
    if axis == "supervision.source":
        return source_name(pretraining.config.supervision)
    of_pretraining = axis.split(".")[0] in ("supervision", "objectives")
    return _lookup(pretraining if of_pretraining else job, axis)


def ancestors(job: Job) -> list[Job]:
    """The job and all runs that it starts from."""
    return [job, *(each for upstream in job.upstream.values() for each in ancestors(upstream))]


def _lookup(job: Job, key: str) -> str | None:
    value: Any = job.config
    for part in key.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif part in getattr(type(value), "model_fields", {}):
            value = getattr(value, part)
        else:
            return None
    if isinstance(value, Config | Mapping):
        return None  # a section is no value to group by
    return value.name if isinstance(value, Path) else str(value)


def _keys(job: Job) -> list[str]:
    def walk(value: Any, prefix: str) -> list[str]:
        if not isinstance(value, Mapping):
            return [prefix]
        return [found for key, inner in value.items() for found in walk(inner, f"{prefix}.{key}" if prefix else key)]

    return walk(job.config.model_dump(), "")


# --- Differences -----------------------------------------------------------------------------------------------------


def _references(cells: Sequence[Cell], against: str | None) -> list[Cell]:
    """What the others are compared with: by default no pairs and all pairs, of each variant, else the first cell."""
    if against is not None:
        named = [cell for cell in cells if against in (cell.name, cell.title)]
        if not named:
            raise UserError(f"--against {against}: no such row. {did_you_mean(against, [c.title for c in cells])}")
        return named
    found: list[Cell] = []
    for variant in dict.fromkeys(cell.variant for cell in cells):
        of_variant = [cell for cell in cells if cell.variant == variant]
        for reference in (no_pairs(of_variant), all_pairs(of_variant)):
            found += [reference] if reference is not None and len(of_variant) > 1 else []
    return found or list(cells[:1] if len(cells) > 1 else ())


def no_pairs(cells: Sequence[Cell]) -> Cell | None:
    return next((cell for cell in cells if cell.source == "none"), None)


def all_pairs(cells: Sequence[Cell]) -> Cell | None:
    """The most pairs by people that a cell of nothing else has; None where cells that mix sources have as many."""
    mixed = max((cell.most for cell in cells if cell.source == ""), default=0.0)
    captions = [cell for cell in cells if cell.source == "captions" and cell.most > mixed]
    return max(captions, key=lambda cell: cell.most, default=None)


def _family(reference: Cell, cells: Sequence[Cell], resampled: Resampled) -> Family:
    """The cells of the reference's variant, or where that has but one, all."""
    same = [cell for cell in cells if cell.variant == reference.variant]
    others = [cell for cell in (same if len(same) > 1 else cells) if cell is not reference]
    found = [(cell, subtract(cell, reference, resampled)) for cell in others]
    known = [(cell, one) for cell, one in found if one is not None]
    adjusted = holm([one.p for _, one in known])
    rows = [
        Compared(cell, dataclasses.replace(one, adjusted=p), None)
        for (cell, one), p in zip(known, adjusted, strict=True)
    ]
    return Family(reference, _with_shares(reference, rows, resampled))


def subtract(first: Cell, second: Cell, resampled: Resampled) -> Difference | None:
    """First minus second, paired over seeds and questions."""
    seeds = sorted(first.runs.keys() & second.runs.keys())
    found = _columns((first, second), seeds, resampled)
    return difference(first.by_seed, second.by_seed, None if found is None else found[:, 0] - found[:, 1])


def _columns(cells: Sequence[Cell], seeds: Sequence[int], resampled: Resampled) -> NDArray[np.float64] | None:
    """The cells' means over these seeds under resampled questions, a cell a column, if all may be paired."""
    import numpy as np

    if not seeds or resampled.mean([run for cell in cells for seed in seeds for run in cell.runs[seed]]) is None:
        return None
    columns = [column for cell in cells if (column := cell.items(resampled, seeds)) is not None]
    return np.stack(columns, axis=1) if len(columns) == len(cells) else None


def _with_shares(reference: Cell, rows: Sequence[Compared], resampled: Resampled) -> tuple[Compared, ...]:
    """Shares of what all pairs bring, where the reference has all pairs and they bring something beyond the noise."""
    none = next((row for row in rows if row.cell.source == "none"), None)
    if none is None or reference.source != "captions" or none.difference.mean > 0 or not none.difference.is_significant:
        return tuple(rows)
    found = []
    for row in rows:
        cells = (row.cell, none.cell, reference)
        seeds = sorted(set.intersection(*(set(cell.runs) for cell in cells)))
        if row is none or len(seeds) < 2:
            found.append(row)
            continue
        own, floor, top = ([cell.by_seed[seed] for seed in seeds] for cell in cells)
        gained = [one - other for one, other in zip(own, floor, strict=True)]
        gain = [one - other for one, other in zip(top, floor, strict=True)]
        items = _columns(cells, seeds, resampled)
        of_items = (None, None) if items is None else (items[:, 0] - items[:, 1], items[:, 2] - items[:, 1])
        share, bounds = ratio(gained, gain, *of_items)
        found.append(dataclasses.replace(row, share=(share, bounds)))
    return tuple(found)


def _percentiles(items: NDArray[np.float64] | None) -> Interval:
    import numpy as np

    if items is None:
        return None
    low, high = np.percentile(items, (2.5, 97.5))
    return float(low), float(high)


# --- Exchange rates --------------------------------------------------------------------------------------------------


def _worths(cells: Sequence[Cell], resampled: Resampled) -> list[Worth]:
    """Each source but captions, on the curve of captions of its own variant."""
    found = []
    for variant in dict.fromkeys(cell.variant for cell in cells):
        own = [cell for cell in cells if cell.variant == variant]
        by_amount: dict[int, Cell] = {}
        for cell in own:
            if cell.source == "captions" and cell.pairs:
                by_amount.setdefault(cell.pairs, cell)  # a second point of one amount differs in something else
        curve = sorted(by_amount.items())
        for cell in own if curve else ():
            if cell.source in ("captions", "none", ""):
                continue
            every = [*(each for _, each in curve), cell]
            seeds = sorted(set.intersection(*(set(each.runs) for each in every)))
            by_amount_and_seed = [(amount, each.by_seed) for amount, each in curve]
            rate = exchange_rate(by_amount_and_seed, cell.by_seed, _columns(every, seeds, resampled))
            kind = SOURCES.get(cell.source, cell.source.replace("+", " + ").replace("_", " "))
            name = cell.title if cell.name == kind else f"{cell.title} ({kind})"
            found.append(Worth(name, rate))
    return found
