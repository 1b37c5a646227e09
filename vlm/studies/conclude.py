"""The end of a study, and `vlm compare`: from finished runs to table, report, figures and TensorBoard."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from vlm.config import did_you_mean
from vlm.errors import UserError
from vlm.run import write_atomically
from vlm.studies import curves
from vlm.studies.collect import collect_with_jobs, table, write_csv, write_parquet
from vlm.studies.compare import PLACE, ancestors, check_axis, compare_panel
from vlm.studies.plan import Job, StudyConfig, distinct, task_name
from vlm.studies.questions import resample
from vlm.studies.report import Report, markdown, mixed_rows, rich_differences, rich_scores, rich_worths
from vlm.studies.tensorboard import write_board


@dataclass(frozen=True)
class View:
    """What of a study is compared."""

    command: str  # `vlm compare` of the study, without the choices below
    task: str | None = None  # None: all
    against: str | None = None  # None: no pairs and all pairs
    by: str = PLACE

    @property
    def is_whole(self) -> bool:
        return (self.by, self.task, self.against) == (PLACE, None, None)

    @property
    def whole_command(self) -> str:
        chosen = {"--by": None if self.by == PLACE else self.by, "--task": self.task, "--against": self.against}
        return " ".join(
            [self.command, *(f"{option} {shlex.quote(value)}" for option, value in chosen.items() if value)]
        )

    @property
    def file(self) -> str:
        """A view of its own has a report of its own."""
        parts = [*([] if self.by == PLACE else ["by", self.by]), *filter(None, (self.task, self.against))]
        name = "-".join(["report", *parts])
        return "".join(c if c.isalnum() or c in "._-" else "-" for c in name) + ".md"


def show(study: StudyConfig, jobs: Sequence[Job], folder: Path, console: Console, view: View) -> None:
    """Write and print what the finished runs of a study say."""
    _check(view, jobs)
    collected = collect_with_jobs(jobs, folder)
    scores = [score for _, score in collected]
    every = [panel for panel in curves.panels(study.figure, jobs) if panel.of(scores)]
    shown = [panel for panel in every if view.task in (None, panel.task)]
    rows = table(jobs, scores, folder)
    write_csv(rows, folder / "results.csv")
    has_parquet = write_parquet(rows, folder / "results.parquet")
    if not shown:
        console.print("No run has scores to show.")
        return
    write_atomically(folder / "table.md", curves.markdown_table(scores, every, study.question))
    drawn = curves.draw(scores, every, study.figure)
    curves.save(drawn, folder / "curve.png")

    resampled, left_out = resample([job for job, _ in collected])
    panels = [compare_panel(panel, collected, resampled, folder, view.by, view.against) for panel in shown]
    runs = distinct(jobs)
    behind = [(job, each) for job, _ in collected for each in ancestors(job)]
    report = Report(
        study.question,
        view.whole_command,
        scores,
        panels,
        sum(job.is_finished for job in runs),
        len(runs),
        view.by,
        left_out,
        list(dict.fromkeys(each.stage for job, each in behind if each.config.seed != job.config.seed)),
        [("The supervision curves", "curve.png")],
    )
    words = markdown(report)
    write_atomically(folder / view.file, words)
    if view.is_whole:
        write_board(jobs, scores, every, study.figure, drawn, words, folder / "tensorboard")
    console.print(f"[bold]{escape(study.question)}[/bold]", highlight=False)
    if view.by == PLACE:
        console.print(curves.rich_table(scores, shown))
        console.print(curves.table_note(scores), highlight=False)
    else:
        for one in panels:
            console.print(rich_scores(report, one))
        for note in mixed_rows(panels):
            console.print(note, highlight=False, markup=False)
    for one in panels:
        for family in one.families:
            console.print(rich_differences(one, family))
    if any(one.worths for one in panels):
        console.print(rich_worths(panels))
    for reason in left_out:
        console.print(f"{reason}: their intervals are over seeds alone", highlight=False)
    files = {"report": view.file, "figure": "curve.png", "scores": "results.csv", "table": "table.md"}
    for name, file in files.items():
        console.print(f"{name}  {folder / file}", highlight=False, soft_wrap=True)
    if not has_parquet:
        console.print("for results.parquet: pip install 'vlm-less-supervision[parquet]'", highlight=False, markup=False)
    board = folder / "tensorboard"
    console.print(f"curves  [bold]tensorboard --logdir {board / 'curve'}[/bold]", highlight=False, soft_wrap=True)
    console.print(f"runs  [bold]tensorboard --logdir {board}[/bold]", highlight=False, soft_wrap=True)


def _check(view: View, jobs: Sequence[Job]) -> None:
    """A choice that the study does not have is told before anything is read."""
    tasks = list(dict.fromkeys(task_name(job) for job in jobs if job.config.task is not None))
    if view.task is not None and view.task not in tasks:
        raise UserError(f"--task {view.task}: the study has no such task. {did_you_mean(view.task, tasks)}")
    if view.by != PLACE:
        check_axis(view.by, jobs)
