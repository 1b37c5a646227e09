"""What is shown while jobs run: a line for each that ends, and in a terminal a table of those that run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from vlm.run import PROGRESS, RESULT
from vlm.studies.plan import Job

if TYPE_CHECKING:
    from vlm.studies.driver import Attempt

SHOWN = 20  # running jobs in the table


class Board:
    """A line for each job that ends; in a terminal also a bar over all and the running jobs, in a log their starts."""

    def __init__(self, jobs: Sequence[Job], at_once: int | None, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.refresh_seconds = 0.25 if self.live else 1.0
        self.at_once = at_once
        self.total = len(jobs)
        self.known: dict[str, list[float]] = {}
        self.begin = time.monotonic()
        finished = [job for job in jobs if job.is_finished]
        for job in finished:
            if (seconds := seconds_of(job)) is not None:
                self.known.setdefault(job.stage, []).append(seconds)
        self.done = len(finished)
        self.unfinished = 0  # failed or skipped
        if self.done:
            console.print(f"{self.done} of {self.total} runs are finished already.")

    def __enter__(self) -> Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def started(self, job: Job) -> None:
        if not self.live:
            self._line("started ", job)

    def finished(self, one: Attempt) -> None:
        self.done += 1
        seconds = seconds_of(one.job) or one.seconds
        self.known.setdefault(one.job.stage, []).append(seconds)
        self._line("[green]finished[/green]", one.job, f"in {clock(seconds)}")

    def stopped(self, one: Attempt, word: str, again: bool) -> None:
        self.unfinished += not again
        then = "it is tried again" if again else "what starts from it is skipped"
        self._line(f"[red]{word:8}[/red]", one.job, f"after {clock(one.seconds)}; {then}")

    def show(self, waiting: Sequence[Job], attempts: Sequence[Attempt]) -> None:
        if not self.live:
            return
        running = [one for one in attempts if one.is_running]
        queued = len(attempts) - len(running)
        now = [(one.job.stage, one.seconds) for one in running]
        behind = [job.stage for job in waiting] + [one.job.stage for one in attempts if not one.is_running]
        left = remaining_seconds(self.known, behind, now, self.at_once or max(len(running), 1))
        overall = Table.grid(padding=(0, 1))
        overall.add_row(
            ProgressBar(self.total, self.done + self.unfinished, width=40),
            f"{self.done}/{self.total} runs",
            f"{clock(time.monotonic() - self.begin)} passed",
            f"about {clock(left)} left" if left is not None else "",
            f"{queued} in the queue" if queued else "",
        )
        lines = Table.grid(padding=(0, 2))
        for one in running[:SHOWN]:
            lines.add_row(f"  {escape(one.job.title)}", clock(one.seconds), *_progress(one.job.folder), style="dim")
        if len(running) > SHOWN:
            lines.add_row(f"  and {len(running) - SHOWN} more", style="dim")
        self.live.update(Group(overall, lines), refresh=True)

    def _line(self, word: str, job: Job, rest: str = "") -> None:
        count = f"[{self.done + self.unfinished}/{self.total}]"
        self.console.print(
            f"{escape(count)} {word} {escape(job.title)} {rest}".rstrip(), highlight=False, soft_wrap=True
        )


def seconds_of(job: Job) -> float | None:
    """What a finished job took, as it says itself."""
    try:
        seconds = json.loads((job.folder / RESULT).read_text()).get("seconds")
    except OSError:
        return None
    return float(seconds) if seconds is not None else None


def remaining_seconds(
    known: Mapping[str, Sequence[float]], waiting: Sequence[str], running: Sequence[tuple[str, float]], num_slots: int
) -> float | None:
    """An estimate from finished jobs: `known` seconds by stage, `waiting` stages, `running` stages with seconds so far.

    A stage that has no finished job counts as the mean of all that have; None before the first.
    """
    everything = [seconds for of_stage in known.values() for seconds in of_stage]
    if not everything:
        return None
    means = {stage: sum(seconds) / len(seconds) for stage, seconds in known.items() if seconds}
    usual = sum(everything) / len(everything)
    left = [max(means.get(stage, usual) - seconds, 0.0) for stage, seconds in running]
    total = sum(left) + sum(means.get(stage, usual) for stage in waiting)
    return max(total / num_slots, *left, 0.0)


def _progress(folder: Path) -> tuple[str, ...]:
    """The steps of a run that trains, its rate and what is left of its training."""
    try:
        told = json.loads((folder / PROGRESS).read_text())
        step, steps, rate = int(told["step"]), int(told["steps"]), float(told["examples_per_second"])
        left = (steps - step) * int(told["batch_size"]) / rate if rate else 0.0
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    return f"step {step:,} of {steps:,}", f"{rate:,.0f} examples/s", f"{clock(left)} left"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
