"""What a study says, in words and tables: `report.md`, and the tables of `vlm compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from vlm.studies.collect import Score
from vlm.studies.compare import PLACE, Compared, Family, PanelComparison, all_pairs, no_pairs
from vlm.studies.curves import Panel, baselines, percent, table_note, warnings
from vlm.studies.statistics import Interval, difference, holm

PAPER = "arXiv 2211.00262"


@dataclass(frozen=True)
class Report:
    """All that a report tells of a study; the scores are those of the panels that it shows."""

    question: str
    command: str  # makes the report again
    scores: Sequence[Score]
    panels: Sequence[PanelComparison]
    num_runs: int
    num_planned: int
    axis: str
    left_out: Sequence[str]  # runs without scores of questions, and why
    shared_stages: Sequence[str]  # whose one run serves several seeds
    figures: Sequence[tuple[str, str]]  # title, file

    @property
    def seeds(self) -> list[int]:
        return sorted({score.seed for score in self.scores if not score.question_only})


def markdown(report: Report) -> str:
    """The report as a Markdown document."""
    parts = [f"# {report.question}", _opening(report)]
    if claims := _claims(report):
        parts += [f"## Beside the reference paper ({PAPER})", claims]
    parts += ["## Scores", *(_scores(report, one) for one in report.panels)]
    parts += [f"![{title}]({file})" for title, file in report.figures]
    parts += ["## Differences", *(_differences(one, family) for one in report.panels for family in one.families)]
    if any(one.worths for one in report.panels):
        parts += ["## What a weak source is worth, in image-text pairs", _worths(report.panels)]
    parts += ["## How to read this", _method(report), "## Again", f"```\n{report.command}\n```"]
    return "\n\n".join(parts) + "\n"


def _opening(report: Report) -> str:
    seeds = report.seeds
    done = f"{report.num_runs} of {report.num_planned}" if report.num_runs < report.num_planned else report.num_runs
    counted = f"{len(seeds)} seeds ({', '.join(map(str, seeds))})" if len(seeds) > 1 else "one seed"
    text = f"{done} runs, {counted}."
    if len(seeds) < 2:
        text += " **One seed supports no claim**: what another training would give is unknown."
    if report.axis != PLACE:
        text += f" Rows are the values of `{report.axis}`; what else differs among a row's runs is averaged over."
        text += "".join(f"\n- {row}" for row in mixed_rows(report.panels))
    if report.shared_stages and len(seeds) > 1:
        text += f" All seeds start from one run of {', '.join(report.shared_stages)}: "
        text += "what another one would give is in no interval."
    notes = [f"{reason[0].upper()}{reason[1:]}, so their intervals are over seeds alone." for reason in report.left_out]
    return "\n\n".join([text, *notes, *warnings(report.scores)])


# --- The paper's claims ----------------------------------------------------------------------------------------------


def _claims(report: Report) -> str:
    """The three claims of the paper, each beside what this study found; empty where it has no such points."""
    lost, kept, replaced = [], [], []
    for one in report.panels:
        variants = {cell.variant for cell in one.cells}
        none, full = no_pairs(one.cells), all_pairs(one.cells)
        family = next((each for each in one.families if each.reference is full), None)
        if len(variants) > 1 or none is None or full is None or family is None:
            continue
        for row in family.rows:
            if row.cell is none:
                means = f"{none.estimate.mean:.1f}, and {full.estimate.mean:.1f} with all pairs"
                lost.append(f"{one.panel.title}: {means}, {_told(row)}{_levels(report, one.panel)}")
            elif row.cell.source == "captions" and row.cell.fraction is not None and row.cell.fraction <= 0.1:
                kept.append(f"{one.panel.title}, {percent(row.cell.fraction)}%: {_told(row)}{_share(row)}")
            elif row.cell.source == "machine_labels":
                replaced.append(f"{one.panel.title}, {row.cell.title}: {_told(row)}{_share(row)}")
    if not lost:
        return ""
    order = _order(report)
    rows = [
        ("Without pairs NLVR2 is at chance; VQAv2 and GQA lose little", [*lost, *order]),
        ("5% of the pairs nearly suffice: NLVR2 about 70, 74 with all, which is 5/6 of what pairs bring", kept),
        ("Machine labels alone do as well as 5%: NLVR2 about 70", replaced),
    ]
    shown = [(claim, "<br>".join(found) or "not tried") for claim, found in rows]
    return _table(["the paper", "here"], shown, "ll")


def _told(row: Compared) -> str:
    """ "-30.8 (-37.5 to -24.1; p 0.01)"."""
    found = row.difference
    if found.both is None:
        return f"{found.mean:+.1f} (one seed)"
    return f"{found.mean:+.1f} ({found.both[0]:+.1f} to {found.both[1]:+.1f}; {_p(found.adjusted, 'p ')})"


def _share(row: Compared) -> str:
    if row.share is None:
        return ""
    share, bounds = row.share
    interval = "" if bounds is None else f" ({100 * bounds[0]:.0f} to {100 * bounds[1]:.0f})"
    return f", {100 * share:.0f}%{interval} of what all pairs bring"


def _levels(report: Report, panel: Panel) -> str:
    found = [f"{level.name} {level.value:.1f}" for level in baselines(report.scores, panel)]
    return f" ({'; '.join(found)})" if found else ""


def _order(report: Report) -> list[str]:
    """Whether NLVR2 loses more without pairs than the other tasks, paired over seeds, p by Holm over the tasks."""
    losses: dict[str, dict[int, float]] = {}
    for one in report.panels:
        none, full = no_pairs(one.cells), all_pairs(one.cells)
        if none is not None and full is not None and one.panel.is_headline:
            shared = none.by_seed.keys() & full.by_seed.keys()
            losses[one.panel.title] = {seed: full.by_seed[seed] - none.by_seed[seed] for seed in shared}
    others = [title for title in losses if title != "NLVR2" and "NLVR2" in losses]
    compared = [difference(losses["NLVR2"], losses[title]) for title in others]
    corrected = holm([None if more is None else more.p for more in compared])
    found = []
    for title, more, p in zip(others, compared, corrected, strict=True):
        if more is not None and more.seeds is not None and p is not None:
            told = f"{more.mean:+.1f} ({more.seeds[0]:+.1f} to {more.seeds[1]:+.1f} over seeds; {_p(p, 'p ')})"
            found.append(f"NLVR2 loses more than {title} by {told}")
    return found


# --- Tables ----------------------------------------------------------------------------------------------------------


def _score_rows(report: Report, one: PanelComparison) -> list[list[str]]:
    """Header, a row a cell, and the baselines."""
    first = "pretraining" if report.axis == PLACE else report.axis
    rows = [[first, "pairs", "seeds", f"{one.panel.title} (%)", "95% over seeds", "95% over questions"]]
    for cell in one.cells:
        found = cell.estimate
        bounds = None if found.half_width is None else (found.mean - found.half_width, found.mean + found.half_width)
        pairs, over_items = "" if cell.pairs is None else f"{cell.pairs:,}", one.over_items.get(cell.title)
        rows.append(
            [cell.title, pairs, str(len(cell.by_seed)), f"{found.mean:.1f}", _clipped(bounds), _clipped(over_items)]
        )
    return rows + [[level.name, "", "", f"{level.value:.1f}", "", ""] for level in baselines(report.scores, one.panel)]


def _scores(report: Report, one: PanelComparison) -> str:
    header, *rows = _score_rows(report, one)
    return f"### {one.panel.title}\n\n{_table(header, rows, 'lrrrrr')}"


def rich_scores(report: Report, one: PanelComparison) -> Table:
    header, *rows = _score_rows(report, one)
    table = Table()
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def mixed_rows(panels: Sequence[PanelComparison]) -> list[str]:
    """Which rows are means over several points: they differ in more than the axis."""
    found = {cell.title: cell.points for one in panels for cell in one.cells if len(cell.points) > 1}
    return [f"{title}: the mean of {', '.join(points)}" for title, points in found.items()]


def difference_rows(one: PanelComparison, family: Family) -> list[list[str]]:
    """A row a comparison, the columns of `DIFFERENCE_HEADER`."""
    rows = []
    for row in family.rows:
        found = row.difference
        share = _share(row).removeprefix(", ").removesuffix(" of what all pairs bring")
        claimed = "one seed" if found.both is None else _p(found.adjusted)
        cells = [row.cell.title, f"{found.mean:+.1f}", _bounds(found.both), _bounds(found.seeds), _bounds(found.items)]
        rows.append([*cells, claimed, share])
    return rows


DIFFERENCE_HEADER = ["", "difference", "95%: both", "over seeds", "over questions", "p (Holm)", "share of the gain"]


def _differences(one: PanelComparison, family: Family) -> str:
    rows = difference_rows(one, family)
    told = [row.cell.title for row in family.rows if row.difference.is_significant]
    tested = [row for row in family.rows if row.difference.p is not None]
    words = f"{len(told)} of {len(tested)} differences hold after correction" + (f": {', '.join(told)}" if told else "")
    words = f"{words}." if tested else "One seed: no difference is tested."
    table = _table(DIFFERENCE_HEADER, rows, "lrrrrrr")
    return f"### {one.panel.title}, against {family.reference.title}\n\n{table}\n\n{words}"


def worth_rows(panels: Sequence[PanelComparison]) -> list[list[str]]:
    """Task, source, what it is worth and why there is no number."""
    return [
        [one.panel.title, each.name, each.rate.statement, each.rate.reason] for one in panels for each in one.worths
    ]


def _worths(panels: Sequence[PanelComparison]) -> str:
    table = _table(["task", "source", "is worth", "why no number"], worth_rows(panels), "llll")
    fits = []
    for one in panels:
        for fit in {each.rate.fit for each in one.worths if each.rate.fit is not None}:
            curve = f"{fit.floor:.3g} + {fit.scale:.3g} * pairs^-{fit.exponent:.3g}"
            fits.append(f"{one.panel.title}: error in percent = {curve}.")
    covered = [each.rate.with_items for one in panels for each in one.worths if each.rate.pairs is not None]
    note = "Intervals are of 95% over seeds and questions." if all(covered) else "Some intervals are over seeds alone."
    return "\n\n".join([table, *fits, *([note] if covered else [])])


def rich_differences(one: PanelComparison, family: Family) -> Table:
    table = Table(title=f"{one.panel.title}, against {family.reference.title}", title_justify="left")
    for number, name in enumerate(DIFFERENCE_HEADER):
        table.add_column(name, justify="right" if number else "left")
    for row, cells in zip(family.rows, difference_rows(one, family), strict=True):
        table.add_row(*cells, style="bold" if row.difference.is_significant else None)
    return table


def rich_worths(panels: Sequence[PanelComparison]) -> Table:
    table = Table("task", "source", "is worth", "why no number", title="in image-text pairs", title_justify="left")
    for row in worth_rows(panels):
        table.add_row(*row)
    return table


def _method(report: Report) -> str:
    lines = [
        table_note(report.scores).splitlines()[0],
        "**Differences** are in points of percent and paired, by seed, whose runs share encoders, pairs and order, and "
        "by question. *Over seeds* is the t-interval of another training on these questions; *over questions* the "
        "cluster bootstrap of another test set for these models (clusters are images, or NLVR2's statement groups); "
        "*both* adds the two errors (Behrens and Fisher), and is what p and every claim are of.",
        "**p (Holm)** is corrected over the rows of its table; below 0.05 a difference holds. A difference that does "
        "not hold is not shown to be none: its interval says how large it may be.",
        "**Share of the gain**: (row - no pairs) / (all pairs - no pairs), with Fieller's interval, where all pairs "
        "bring something beyond the noise.",
        "**What a source is worth**: the pairs at which a curve of error = floor + scale * pairs^-exponent, fitted to "
        "the positive amounts of pairs, reaches the source's score. Nothing is extrapolated.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    ruler = ["---:" if one == "r" else "---" for one in align]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in [header, ruler, *rows]
    )


def _bounds(bounds: Interval) -> str:
    return "" if bounds is None else f"{bounds[0]:+.1f} to {bounds[1]:+.1f}"


def _clipped(bounds: Interval) -> str:
    """An interval of a score; what lies beyond 0 or 100 is cut, and said to."""
    if bounds is None:
        return ""
    low, high = bounds
    return f"{'< 0' if low < 0 else f'{low:.1f}'} to {'> 100' if high > 100 else f'{high:.1f}'}"


def _p(value: float | None, prefix: str = "") -> str:
    if value is None:
        return "not tested"
    return f"{prefix}< 0.001" if value < 0.001 else f"{prefix}{value:.3f}"
