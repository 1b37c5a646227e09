"""The supervision curve: scores against the fraction of pairs, as a figure and as a table."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from vlm.studies.collect import Score, headline
from vlm.studies.plan import FigureConfig, Job, task_name
from vlm.studies.statistics import Estimate, estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"vqav2": "VQAv2", "gqa": "GQA", "nlvr2": "NLVR2", "retrieval": "Retrieval"}
SOURCES = {
    "captions": "image-text pairs",
    "machine_labels": "machine labels",
    "class_names": "class names",
    "generated_captions": "generated captions",
    "none": "none",
}
# Okabe and Ito's palette, which colour-blind readers can tell apart; markers and dashes tell the lines apart in grey.
STYLES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#E69F00", "v", "-"),
    ("#56B4E9", "P", "--"),
    ("#000000", "X", "-."),
)
# What needs no picture, the strongest first: a trained model that saw none, the most frequent answers, chance.
LEVELS: tuple[tuple[str, str, Any], ...] = (
    ("question_only_score", "question only, trained", (0, (6, 3))),
    ("question_prior", "most frequent answer", (0, (6, 2, 1, 2))),
    ("chance", "chance", (0, (1, 2))),
)
WARNING_COLOUR = "#B00020"


@dataclass(frozen=True)
class Panel:
    """One score of one task."""

    task: str
    metric: str
    title: str
    is_headline: bool

    @property
    def tag(self) -> str:
        return self.task if self.is_headline else f"{self.task}/{self.metric}"

    def of(self, scores: Sequence[Score]) -> list[Score]:
        """The scores of this panel, those of runs that saw grey images left out."""
        own = [score for score in scores if (score.task, score.metric) == (self.task, self.metric)]
        return [score for score in own if not score.question_only]


@dataclass(frozen=True)
class Line:
    """The scores of one source of text, by fraction in ascending order.

    A source that was tried at one amount only `is_flat`: it is no curve, but a level to compare the curve with.
    """

    source: str
    variant: str
    points: tuple[tuple[float, Estimate], ...]
    is_flat: bool
    seen: str = ""  # pairs behind it that its place does not show

    @property
    def legend(self) -> str:
        return f"{self.name} ({self.seen})" if self.seen else self.name

    @property
    def name(self) -> str:
        name = SOURCES.get(self.source) or self.source.replace("+", " + ").replace("_", " ")
        if self.is_flat and self.points[0][0] not in (0, 1):
            name += f" ({percent(self.points[0][0])}%)"
        return f"{name}, {self.variant}" if self.variant else name


@dataclass(frozen=True)
class Baseline:
    """A level that needs no picture."""

    name: str
    value: float
    dashes: Any


def panels(figure: FigureConfig, jobs: Sequence[Job]) -> list[Panel]:
    """The panels that the study asks for, else the headline score of each of its tasks."""
    headlines = {task_name(job): headline(job) for job in jobs if job.config.task is not None}
    if not figure.panels:
        return [Panel(task, metric, TITLES.get(task, task), True) for task, metric in headlines.items()]
    shown = []
    for panel in figure.panels:
        is_headline = headlines.get(panel.task) == panel.metric
        title = TITLES.get(panel.task, panel.task) + ("" if is_headline else f": {_words(panel.metric)}")
        shown.append(Panel(panel.task, panel.metric, panel.title or title, is_headline))
    return shown


def lines(scores: Sequence[Score], panel: Panel) -> list[Line]:
    """The panel's lines, captions first. The runs without any pair begin every line that is not flat."""
    found = []
    own = panel.of(scores)
    for variant in dict.fromkeys(score.variant for score in own):
        of_variant = [score for score in own if score.variant == variant]
        none = _series(of_variant, "none")[:1]
        sources = dict.fromkeys(score.source for score in of_variant if score.source != "none")
        for source in sorted(sources, key=lambda name: name != "captions") or ["none"]:
            for number, series in enumerate(_series(of_variant, source)):
                is_flat = source != "captions" and len(series) == 1
                points = {} if is_flat else {fraction: values for one in none for fraction, (_, values) in one.items()}
                points |= {fraction: values for fraction, (_, values) in series.items()}
                first_point = next(iter(series.values()))[0]
                name = ", ".join(filter(None, (variant, first_point if number else "")))
                estimates = tuple((fraction, estimate(points[fraction])) for fraction in sorted(points))
                of_line = [score for score in of_variant if score.point in {point for point, _ in series.values()}]
                found.append(Line(source, name, estimates, is_flat, _pairs_seen(of_line, is_flat)))
    return sorted(found, key=lambda line: line.is_flat)


def _pairs_seen(scores: Sequence[Score], is_flat: bool) -> str:
    """Who has seen pairs beyond the supervised ones behind these scores, else the supervised ones of a mixture."""
    if elsewhere := seen_elsewhere(scores):
        return f"pairs seen: {elsewhere}"
    counts = {score.supervised_pairs for score in scores if "+" in score.source} - {None, 0}
    return f"{counts.pop():,} pairs" if is_flat and len(counts) == 1 else ""


def _series(scores: Sequence[Score], source: str) -> list[dict[float, tuple[str, list[float]]]]:
    """The points of a source by fraction, with the scores of their seeds.

    Points of one fraction differ in something else, and are never averaged: the second begins a series of its own.
    """
    found: list[dict[float, tuple[str, list[float]]]] = []
    own = [score for score in scores if score.source == source]
    for point, fraction in dict.fromkeys((score.point, score.fraction) for score in own):
        values = [score.score for score in own if (score.point, score.fraction) == (point, fraction)]
        series = next((one for one in found if fraction not in one), None)
        if series is None:
            series = {}
            found.append(series)
        series[fraction] = (point, values)
    return found


def baselines(scores: Sequence[Score], panel: Panel) -> list[Baseline]:
    """The levels of this panel, in the order of `LEVELS`."""
    own = panel.of(scores)
    found = []
    for attribute, name, dashes in LEVELS:
        values = [value for score in own if (value := getattr(score, attribute)) is not None]
        if values:
            found.append(Baseline(name, estimate(values).mean, dashes))
    return found


def warnings(scores: Sequence[Score]) -> list[str]:
    """Points that claim no image-text pairs, or do not say, while a component has seen some elsewhere: a CLIP tower."""
    claims = {0: "no image-text pairs are claimed for", None: "nobody knows how many image-text pairs supervised"}
    by_others: dict[tuple[str, str], dict[str, None]] = {}
    for score in scores:
        if score.supervised_pairs in claims and score.others and not score.question_only:
            claim = claims[score.supervised_pairs]
            by_others.setdefault((claim, score.others), {})[score.point or "all"] = None
    return [
        f"Warning: {claim} {', '.join(points)}, but others "
        f"{'have' if any(map(str.isdigit, others)) else 'may have'} seen pairs: {others}"
        for (claim, others), points in by_others.items()
    ]


def seen_elsewhere(scores: Sequence[Score]) -> str:
    """Who has seen pairs beyond the supervised ones, over all runs; empty where nobody has."""
    found = {other: None for score in scores if not score.question_only for other in score.others.split("; ") if other}
    return "; ".join(found)


def percent(fraction: float) -> str:
    """A fraction in percent, as short as it can be said."""
    return f"{100 * fraction:.6g}"


# --- Figure ----------------------------------------------------------------------------------------------------------


def draw(scores: Sequence[Score], shown: Sequence[Panel], figure: FigureConfig) -> Figure:
    """One panel a task: the fraction on a logarithmic axis, with zero at a place of its own on the left."""
    from matplotlib import ticker
    from matplotlib.figure import Figure

    shown = [panel for panel in shown if panel.of(scores)]
    by_panel = [lines(scores, panel) for panel in shown]
    names = list(dict.fromkeys((line.source, line.variant) for of_panel in by_panel for line in of_panel))
    styles = {name: STYLES[number % len(STYLES)] for number, name in enumerate(names)}
    columns = min(max(len(shown), 1), 3)
    rows = math.ceil(max(len(shown), 1) / columns)
    drawn = Figure(
        figsize=(3.5 * columns + (0.4 if columns > 1 else 1.4), 3.1 * rows + 0.75), dpi=180, layout="constrained"
    )
    legend: dict[str, Any] = {}
    for number, (panel, of_panel) in enumerate(zip(shown, by_panel, strict=True)):
        axes = drawn.add_subplot(rows, columns, number + 1)
        scale = _Scale.of(of_panel)
        for baseline in baselines(scores, panel):
            handle = axes.axhline(baseline.value, color="0.45", linewidth=1.1, linestyle=baseline.dashes, zorder=1)
            legend.setdefault(baseline.name, handle)
        for line in of_panel:
            handle = _draw_line(axes, line, scale, styles[line.source, line.variant])
            legend.setdefault(line.legend, handle)
        scale.apply(axes)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(7, steps=[1, 2, 5, 10]))
        axes.margins(y=0.12)
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0), min(high, 100))  # no score lies outside, even where an interval would
        axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", pad=12)
        kinds = [one.metric.split("/")[-1] for one in shown]
        if number % columns == 0 or (figure.y_label is None and kinds[number] != kinds[number - 1]):
            axes.set_ylabel(figure.y_label or f"{_words(kinds[number])} (%)")
        if number >= len(shown) - columns:
            axes.set_xlabel(_x_label(figure, scores), labelpad=9 if scale.flat else 4)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    if warned := warnings(scores):
        lines_of = [textwrap.fill(line, round(14 * drawn.get_figwidth())) for line in warned]
        drawn.suptitle("\n".join(lines_of), color=WARNING_COLOUR, fontsize=9, x=0.01, ha="left")
    if legend:
        levels = [name for _, name, _ in LEVELS]
        order = [name for name in legend if name not in levels] + [name for name in levels if name in legend]
        several = [len(value.values) for of_panel in by_panel for line in of_panel for _, value in line.points]
        note = "bars: 95% t-interval of the mean over seeds; dots: single seeds" if max(several) > 1 else None
        ends = [
            abs(value.mean - 50) + (value.half_width or 0)
            for own in by_panel
            for line in own
            for _, value in line.points
        ]
        if note and max(ends) > 50:
            note += "; open triangle: the interval goes on"
        legend_columns = _legend_columns(order, drawn.get_figwidth())
        more_rows = max(0, math.ceil(len(order) / legend_columns) - 2)
        drawn.set_figheight(drawn.get_figheight() + 0.19 * more_rows)
        drawn.legend(
            [legend[name] for name in order],
            order,
            loc="outside lower center",
            ncols=legend_columns,
            frameon=False,
            fontsize=9,
            handlelength=3.2,
            title=None if note is None else textwrap.fill(note, round(17 * drawn.get_figwidth())),
            title_fontsize=8,
        )
    return drawn


def _legend_columns(names: Sequence[str], width_inches: float) -> int:
    """As many columns as fit; they are filled one after the other."""
    inches = [0.7 + 0.075 * len(name) for name in names]  # about: the line and the letters
    for rows in range(1, len(names)):
        columns = [inches[start : start + rows] for start in range(0, len(names), rows)]
        if sum(map(max, columns)) < width_inches:
            return len(columns)
    return 1


def save(drawn: Figure, file: Path) -> None:
    partial = file.with_name(f".{file.name}")
    drawn.savefig(partial, format="png")
    partial.replace(file)


@dataclass(frozen=True)
class _Scale:
    """Fractions to places on the x axis: log10 of the percentage; zero, and sources without a fraction, beside it."""

    fractions: tuple[float, ...]
    zero: float  # place of no pairs at all
    flat: tuple[str, ...]  # names of the flat lines, each with a place right of 100%

    @classmethod
    def of(cls, drawn: Sequence[Line]) -> _Scale:
        on_axis = {fraction for line in drawn if not line.is_flat for fraction, _ in line.points}
        least = min((fraction for fraction in on_axis if fraction > 0), default=1.0)
        span = max(-math.log10(least), 1.0)
        flat = tuple(line.name for line in drawn if line.is_flat)
        return cls(tuple(sorted(on_axis)), math.log10(100 * least) - 0.4 * span, flat)

    @property
    def end(self) -> float:
        return self.flat_place(self.flat[-1]) if self.flat else 2.0

    @property
    def gap(self) -> float:
        return 0.5 * (2 - self.zero) / 2

    def place(self, fraction: float) -> float:
        return math.log10(100 * fraction) if fraction > 0 else self.zero

    def flat_place(self, name: str) -> float:
        step = min(0.5, 1.2 / len(self.flat))
        return 2 + self.gap * (0.85 + step * self.flat.index(name))

    def apply(self, axes: Axes) -> None:
        end = self.end
        pad = 0.06 * (end - self.zero)
        axes.set_xlim(self.zero - pad, end + pad * (1.6 if self.flat else 1))
        axes.set_xticks([self.place(fraction) for fraction in self.fractions], [percent(f) for f in self.fractions])
        positive = [fraction for fraction in self.fractions if fraction > 0]
        decades = range(-8, 2)
        minor = [decade + math.log10(digit) for decade in decades for digit in range(1, 10)]
        low = self.place(positive[0]) if positive else 2.0
        axes.set_xticks([place for place in minor if low <= place <= 2], minor=True)
        if 0 in self.fractions and positive:
            self._break(axes, self.zero + 0.5 * (low - self.zero))
        if self.flat:
            self._break(axes, 2 + 0.4 * self.gap)
            label = self.flat[0].replace(" ", "\n", 1) if len(self.flat) == 1 else "other\nsources"
            middle = (self.flat_place(self.flat[0]) + self.end) / 2
            transform = axes.get_xaxis_transform()
            axes.text(middle, -0.03, label, transform=transform, ha="center", va="top", fontsize=8.5, linespacing=0.95)

    def _break(self, axes: Axes, place: float) -> None:
        """Two strokes over the axis, where it stops being one scale."""
        half = 0.013 * (self.end - self.zero)
        transform = axes.get_xaxis_transform()
        axes.plot(
            [place - half, place + half],
            [0, 0],
            color="white",
            linewidth=4,
            transform=transform,
            clip_on=False,
            zorder=9,
        )
        for shift in (-half, half):
            axes.plot(
                [place + shift - half, place + shift + half],
                [-0.025, 0.025],
                color="black",
                linewidth=0.9,
                transform=transform,
                clip_on=False,
                zorder=10,
            )


def _draw_line(axes: Axes, line: Line, scale: _Scale, style: tuple[str, str, str]) -> Any:
    """Means with their intervals, and the single seeds as faint dots."""
    colour, marker, dashes = style
    if line.is_flat:
        places = [scale.flat_place(line.name)]
        axes.axhline(line.points[0][1].mean, color=colour, linewidth=1.0, linestyle=dashes, alpha=0.75, zorder=2)
    else:
        places = [scale.place(fraction) for fraction, _ in line.points]
    estimates = [value for _, value in line.points]
    begin = 1 if len(places) > 1 and line.points[0][0] == 0 else 0
    axes.plot(places[: begin + 1], [value.mean for value in estimates[: begin + 1]], ":", color=colour, linewidth=1.2)
    handle = _draw_estimates(axes, places[begin:], estimates[begin:], dashes, colour, marker)
    if begin:  # the way from zero crosses the break of the axis, so it is no part of the line
        _draw_estimates(axes, places[:1], estimates[:1], "none", colour, marker)
    aside = 0.022 * (scale.end - scale.zero)
    for place, value in zip(places, estimates, strict=True):
        if len(value.values) > 1:
            x = [place + aside] * len(value.values)
            dots: dict[str, Any] = {"alpha": 0.55, "markersize": 5.5, "markeredgewidth": 0, "zorder": 4}
            axes.plot(x, value.values, ".", color=colour, clip_on=False, **dots)
    return handle


def _draw_estimates(
    axes: Axes, places: Sequence[float], estimates: Sequence[Estimate], dashes: str, colour: str, marker: str
) -> Any:
    """Means with the part of their intervals that scores can reach; an open triangle says where one goes on."""
    from matplotlib.transforms import offset_copy

    widths = [value.half_width or 0.0 for value in estimates]
    below = [min(width, value.mean) for value, width in zip(estimates, widths, strict=True)]
    above = [min(width, 100 - value.mean) for value, width in zip(estimates, widths, strict=True)]
    handle = axes.errorbar(
        places,
        [value.mean for value in estimates],
        yerr=[below, above] if any(widths) else None,
        linestyle=dashes,
        **_markers(colour, marker),
    )
    for artist in handle.get_children():
        artist.set_clip_on(False)  # what stands at 100% is drawn whole
    for place, value, width in zip(places, estimates, widths, strict=True):
        for end, beyond, pointer in ((100, value.mean + width > 100, "^"), (0, value.mean - width < 0, "v")):
            if beyond:
                aside = offset_copy(axes.transData, axes.get_figure(root=True), y=6 if end else -6, units="points")
                style: dict[str, Any] = {"markersize": 5, "markerfacecolor": "white", "markeredgewidth": 1.1}
                axes.plot([place], [end], pointer, color=colour, zorder=6, transform=aside, clip_on=False, **style)
    return handle


def _markers(colour: str, marker: str) -> dict[str, Any]:
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.8}
    bars = {"elinewidth": 1.2, "capsize": 3}
    return {"color": colour, "marker": marker, "markersize": 6.5, "linewidth": 1.8, "zorder": 5} | edge | bars


def _x_label(figure: FigureConfig, scores: Sequence[Score]) -> str:
    """With the number of pairs that 100% are, where all runs agree on it, and the pairs that came in by other ways."""
    full = {score.pairs for score in scores if score.fraction == 1 and score.source == "captions"} - {None}
    label = f"image-text pairs used (% of {full.pop():,})" if len(full) == 1 else "image-text pairs used (%)"
    label = label if figure.x_label is None else figure.x_label
    elsewhere = seen_elsewhere(scores)
    return f"{label}\n{textwrap.fill(f'and pairs seen elsewhere: {elsewhere}', 46)}" if elsewhere else label


def _words(metric: str) -> str:
    """ "captions/recall_at_1" -> "captions, recall at 1"."""
    return metric.replace("/", ", ").replace("_", " ")


# --- Table -----------------------------------------------------------------------------------------------------------


def table_rows(scores: Sequence[Score], shown: Sequence[Panel]) -> list[list[str]]:
    """Header, a row a point, and the baselines; cells hold mean ± half the width of the 95% interval.

    Where a component has seen pairs beyond the supervised ones, the second column says how many anybody has.
    """
    with_total = bool(seen_elsewhere(scores))
    rows = [["pretraining", *(["pairs ever seen"] if with_total else []), *(panel.title for panel in shown)]]
    by_panel = [panel.of(scores) for panel in shown]
    for point, variant in dict.fromkeys((score.point, score.variant) for own in by_panel for score in own):
        cells = []
        for own in by_panel:
            values = [score.score for score in own if (score.point, score.variant) == (point, variant)]
            cells.append(str(estimate(values)) if values else "")
        total = [_totals([score for own in by_panel for score in own if score.point == point])] if with_total else []
        rows.append([", ".join(filter(None, (point, variant))) or "all", *total, *cells])
    of_panels = [{baseline.name: baseline.value for baseline in baselines(scores, panel)} for panel in shown]
    for name in [name for _, name, _ in LEVELS if any(name in of_panel for of_panel in of_panels)]:
        blank = [""] if with_total else []
        rows.append([name, *blank, *(f"{of_panel[name]:.1f}" if name in of_panel else "" for of_panel in of_panels)])
    return rows


def table_note(scores: Sequence[Score]) -> str:
    """What the numbers are, and what must be known of them."""
    seeds = len({score.seed for score in scores if not score.question_only})
    note = "Scores in percent, one seed."
    if seeds >= 2:
        note = f"Scores in percent: mean ± half the width of the 95% t-interval over {seeds} seeds."
    elsewhere = seen_elsewhere(scores)
    return "\n\n".join([note, *([f"Pairs seen elsewhere: {elsewhere}."] if elsewhere else []), *warnings(scores)])


def _totals(scores: Sequence[Score]) -> str:
    """Pairs that any component has seen, over the runs of one point."""
    totals = {score.total_pairs for score in scores}
    if None in totals or not totals:
        return "unknown"
    low, high = min(totals), max(totals)  # type: ignore[type-var]  # None is not among them
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def markdown_table(scores: Sequence[Score], shown: Sequence[Panel], question: str) -> str:
    header, *rows = table_rows(scores, shown)
    ruler = ["---", *["---:"] * (len(header) - 1)]
    written = "\n".join(f"| {' | '.join(row)} |" for row in [header, ruler, *rows])
    return f"{question}\n\n{written}\n\n{table_note(scores)}\n"


def rich_table(scores: Sequence[Score], shown: Sequence[Panel]) -> Table:
    header, *rows = table_rows(scores, shown)
    table = Table()
    table.add_column(header[0])
    for title in header[1:]:
        table.add_column(title, justify="right")
    baseline_names = {baseline.name for panel in shown for baseline in baselines(scores, panel)}
    last_run = sum(row[0] not in baseline_names for row in rows) - 1
    for number, row in enumerate(rows):
        table.add_row(*row, end_section=number == last_run, style="dim" if row[0] in baseline_names else None)
    return table
