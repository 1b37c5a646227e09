"""The supervision curve: scores against the fraction of pairs, as a figure, in TensorBoard and as a table."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from vlm.run import write_atomically
from vlm.studies.collect import Score, headline, is_question_only, task_name
from vlm.studies.plan import FigureConfig, Job
from vlm.studies.statistics import Estimate, estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"vqav2": "VQAv2", "gqa": "GQA", "nlvr2": "NLVR2", "retrieval": "Retrieval"}
SOURCES = {
    "captions": "image-text pairs",
    "machine_labels": "machine labels",
    "class_names": "class names",
    "none": "none",
}
# Okabe and Ito's palette, which colour-blind readers can tell apart; markers and dashes tell the lines apart in grey.
STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"))
STYLES += (("#E69F00", "v", "-"), ("#56B4E9", "P", "--"), ("#000000", "X", "-."))
BASIS_POINTS = 10_000


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
    own = panel.of(scores)
    found = []
    for variant in dict.fromkeys(score.variant for score in own):
        of_variant = [score for score in own if score.variant == variant]
        sources = dict.fromkeys(score.source for score in of_variant if score.source != "none")
        for source in sorted(sources, key=lambda name: name != "captions") or ["none"]:
            fractions = sorted({score.fraction for score in of_variant if score.source == source})
            is_flat = source != "captions" and len(fractions) == 1
            started = [0.0] if not is_flat and any(score.source == "none" for score in of_variant) else []
            points = [
                (fraction, estimate([s.score for s in of_variant if s.fraction == fraction and s.source in kinds]))
                for fraction in [*started, *fractions]
                for kinds in [("none",) if fraction == 0 else (source,)]
            ]
            found.append(Line(source, variant, tuple(points), is_flat))
    return sorted(found, key=lambda line: line.is_flat)


def baselines(scores: Sequence[Score], panel: Panel) -> list[Baseline]:
    """Levels that need no picture, highest authority first: a trained model that saw none, the prior, chance."""
    own = panel.of(scores)
    found = []
    kinds: tuple[tuple[str, str, Any], ...] = (
        ("question_only_score", "question only, trained", (0, (6, 3))),
        ("question_prior", "most frequent answer", (0, (6, 2, 1, 2))),
        ("chance", "chance", (0, (1, 2))),
    )
    for attribute, name, dashes in kinds:
        values = [value for score in own if (value := getattr(score, attribute)) is not None]
        if values:
            found.append(Baseline(name, estimate(values).mean, dashes))
    return found


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
    drawn = Figure(figsize=(3.5 * columns + 0.4, 3.1 * rows + 0.75), dpi=180, layout="constrained")
    legend: dict[str, Any] = {}
    for number, (panel, of_panel) in enumerate(zip(shown, by_panel, strict=True)):
        axes = drawn.add_subplot(rows, columns, number + 1)
        scale = _Scale.of(of_panel)
        for baseline in baselines(scores, panel):
            handle = axes.axhline(baseline.value, color="0.45", linewidth=1.1, linestyle=baseline.dashes, zorder=1)
            legend.setdefault(baseline.name, handle)
        for line in of_panel:
            handle = _draw_line(axes, line, scale, styles[line.source, line.variant])
            legend.setdefault(line.name, handle)
        scale.apply(axes)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
        axes.margins(y=0.12)
        axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
        if number % columns == 0 or (figure.y_label is None and panel.metric != shown[number - 1].metric):
            axes.set_ylabel(figure.y_label or f"{_words(panel.metric)} (%)")
        if number >= len(shown) - columns:
            axes.set_xlabel(figure.x_label)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    if legend:
        # Lines first, though the baselines were drawn first.
        order = sorted(legend, key=lambda name: not hasattr(legend[name], "has_yerr"))
        handles = [legend[name] for name in order]
        drawn.legend(
            handles,
            order,
            loc="outside lower center",
            ncols=min(len(order), 3 if columns > 1 else 2),
            frameon=False,
            fontsize=9,
            handlelength=3.2,
        )
    return drawn


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
    def gap(self) -> float:
        return 0.5 * (2 - self.zero) / 2

    def place(self, fraction: float) -> float:
        return math.log10(100 * fraction) if fraction > 0 else self.zero

    def flat_place(self, name: str) -> float:
        return 2 + self.gap * (0.85 + 0.6 * self.flat.index(name))

    def apply(self, axes: Axes) -> None:
        end = self.flat_place(self.flat[-1]) if self.flat else 2.0
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
            for name in self.flat:
                label = name.replace(" ", "\n", 1)
                axes.text(
                    self.flat_place(name),
                    -0.025,
                    label,
                    transform=axes.get_xaxis_transform(),
                    ha="center",
                    va="top",
                    fontsize=8,
                    linespacing=0.95,
                )

    def _break(self, axes: Axes, place: float) -> None:
        """Two strokes over the axis, where it stops being one scale."""
        half = 0.013 * (self.flat_place(self.flat[-1]) if self.flat else 2.0 - self.zero)
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
    widths = [value.half_width or 0.0 for value in estimates]
    handle = axes.errorbar(
        places,
        [value.mean for value in estimates],
        yerr=widths if any(widths) else None,
        color=colour,
        marker=marker,
        linestyle=dashes,
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.8,
        linewidth=1.8,
        elinewidth=1.2,
        capsize=3,
        zorder=5,
    )
    for place, value in zip(places, estimates, strict=True):
        if len(value.values) > 1:
            axes.plot(
                [place] * len(value.values),
                value.values,
                ".",
                color=colour,
                alpha=0.4,
                markersize=5,
                zorder=4,
                markeredgewidth=0,
            )
    return handle


def _words(metric: str) -> str:
    """ "captions/recall_at_1" -> "captions, recall at 1"."""
    return metric.replace("/", ", ").replace("_", " ")


# --- Table -----------------------------------------------------------------------------------------------------------


def table_rows(scores: Sequence[Score], shown: Sequence[Panel]) -> list[list[str]]:
    """Header, a row a point, and the baselines; cells hold mean ± half the width of the 95% interval."""
    rows = [["pretraining", *(panel.title for panel in shown)]]
    by_panel = [panel.of(scores) for panel in shown]
    for point, variant in dict.fromkeys((score.point, score.variant) for own in by_panel for score in own):
        cells = []
        for own in by_panel:
            values = [score.score for score in own if (score.point, score.variant) == (point, variant)]
            cells.append(str(estimate(values)) if values else "")
        rows.append([", ".join(filter(None, (point, variant))) or "all", *cells])
    of_panels = [{baseline.name: baseline.value for baseline in baselines(scores, panel)} for panel in shown]
    for name in dict.fromkeys(name for of_panel in of_panels for name in of_panel):
        rows.append([name, *(f"{of_panel[name]:.1f}" if name in of_panel else "" for of_panel in of_panels)])
    return rows


def table_note(scores: Sequence[Score]) -> str:
    seeds = len({score.seed for score in scores if not score.question_only})
    if seeds < 2:
        return "Scores in percent, one seed."
    return f"Scores in percent: mean ± half the width of the 95% t-interval over {seeds} seeds."


def markdown_table(scores: Sequence[Score], shown: Sequence[Panel], question: str) -> str:
    header, *rows = table_rows(scores, shown)
    ruler = ["---", *["---:"] * (len(header) - 1)]
    written = "\n".join(f"| {' | '.join(row)} |" for row in [header, ruler, *rows])
    return f"{question}\n\n{written}\n\n{table_note(scores)}\n"


def rich_table(scores: Sequence[Score], shown: Sequence[Panel], question: str) -> Table:
    header, *rows = table_rows(scores, shown)
    table = Table(title=question, caption=table_note(scores), title_justify="left", caption_justify="left")
    table.add_column(header[0])
    for title in header[1:]:
        table.add_column(title, justify="right")
    baseline_names = {baseline.name for panel in shown for baseline in baselines(scores, panel)}
    last_run = sum(row[0] not in baseline_names for row in rows) - 1
    for number, row in enumerate(rows):
        table.add_row(*row, end_section=number == last_run, style="dim" if row[0] in baseline_names else None)
    return table


def write_table(text: str, file: Path) -> None:
    write_atomically(file, text)


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def write_tensorboard(scores: Sequence[Score], shown: Sequence[Panel], drawn: Figure, table: str, folder: Path) -> None:
    """Each line as a TensorBoard run under `folder`, which is written anew; figure and table beside them.

    TensorBoard's x axis is an integer step. Here a step is a basis point of the pairs: 10,000 are all of them. A flat
    line goes from 0 to 10,000.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from torch.utils.tensorboard import SummaryWriter

    def write(run: str, tag: str, points: Sequence[tuple[float, float]]) -> None:
        with SummaryWriter(str(folder / "curve" / run)) as writer:
            for fraction, value in points:
                step = max(1, round(BASIS_POINTS * fraction)) if fraction else 0
                writer.add_scalar(f"supervision_curve/{tag}", value, step)

    shutil.rmtree(folder, ignore_errors=True)
    for panel in shown:
        for line in lines(scores, panel):
            fractions = (0.0, 1.0) if line.is_flat else tuple(fraction for fraction, _ in line.points)
            means = [value.mean for _, value in line.points] * (2 if line.is_flat else 1)
            write(f"{panel.title} {line.name}", panel.tag, list(zip(fractions, means, strict=True)))
        for baseline in baselines(scores, panel):
            write(f"{panel.title} {baseline.name}", panel.tag, [(0.0, baseline.value), (1.0, baseline.value)])
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    with SummaryWriter(str(folder / "curve" / "figure and table")) as writer:
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        writer.add_image("supervision_curve", pixels, dataformats="HWC")
        note = "In the scalars, a step is a basis point (1/100 of a percent) of the pairs: step 10,000 is all of them."
        writer.add_text("supervision_curve", f"{table}\n{note}")
