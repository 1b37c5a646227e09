"""From jobs to finished runs: each is started after those it starts from, wherever a launcher runs it.

A job is finished once its result file exists, so the same call continues where a killed one stopped.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from vlm.config import dump_yaml
from vlm.run import CONFIG, write_atomically
from vlm.studies.board import Board
from vlm.studies.plan import Job, distinct
from vlm.studies.work import Ending

FAILURE = "failure.json"
INTERRUPTIONS = 3  # of a job that one call goes on after; a later call begins to count anew


@dataclass
class Attempt:
    """One go at a job. Launchers keep what they need in subclasses."""

    job: Job
    log_start: int  # where its log begins
    start: float = field(default_factory=time.monotonic)

    @property
    def is_running(self) -> bool:
        """Whether it has begun, rather than to wait in a queue."""
        return True

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


class Launcher(ABC):
    """A place where jobs run."""

    capacity: int | None = None  # how many jobs run at once; None where the place keeps a queue of its own
    holds_back = False  # whether it takes jobs before those they start from are finished, and starts them after

    @abstractmethod
    def start(self, jobs: Sequence[Job]) -> list[Attempt]:
        """Begin to run jobs whose folders hold their configs."""

    @abstractmethod
    def wait(self, attempts: Sequence[Attempt], seconds: float) -> None:
        """Return when an attempt may have ended, and after this time at the latest."""

    @abstractmethod
    def ending(self, attempt: Attempt) -> Ending | None:
        """How it ended; None while it goes on."""

    @abstractmethod
    def stop(self, attempts: Sequence[Attempt]) -> None:
        """What becomes of the attempts when this process ends before them."""


@dataclass
class Outcome:
    """How the jobs ended, by their ids."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # why, and the last lines of the log
    interrupted: dict[str, str] = field(default_factory=dict)  # too often for one call
    skipped: list[str] = field(default_factory=list)  # they needed one that failed


def drive(
    jobs: Sequence[Job],
    launcher: Launcher,
    retries: int = 0,
    retry_failed: bool = False,
    console: Console | None = None,
    on_finished: Callable[[Job], None] | None = None,
) -> Outcome:
    """Run what is not finished yet. A job that fails stops only those that start from it.

    A failed job gets `retries` more attempts, unless its error must be mended first. Then its failure is written down,
    and later calls leave it alone without `retry_failed`. Interrupted jobs are run again in any case.
    """
    return _Driver(distinct(jobs), launcher, retries, retry_failed, console or Console(), on_finished).run()


class _Driver:
    def __init__(
        self,
        jobs: Sequence[Job],
        launcher: Launcher,
        retries: int,
        retry_failed: bool,
        console: Console,
        on_finished: Callable[[Job], None] | None,
    ) -> None:
        self.launcher, self.retries, self.on_finished = launcher, retries, on_finished
        self.outcome = Outcome()
        self.waiting: dict[str, Job] = {}
        self.running: list[Attempt] = []
        self.failures: dict[str, int] = {}
        self.interruptions: dict[str, int] = {}
        self.done: set[str] = set()
        before = []
        for job in jobs:
            if job.is_finished:
                self.done.add(job.id)
                self.outcome.finished.append(job.id)
            elif not retry_failed and (job.folder / FAILURE).is_file():
                before.append(job)
                self.outcome.failed[job.id] = str(json.loads((job.folder / FAILURE).read_text())["reason"])
            else:
                self.waiting[job.id] = job
        self.board = Board(jobs, launcher.capacity, console)
        if before:
            console.print(f"{len(before)} failed before and are left alone; --retry-failed tries them again.")
            self.board.unfinished += len(before)

    def run(self) -> Outcome:
        try:
            with self.board:
                while self.waiting or self.running:
                    self._start()
                    self.board.show(list(self.waiting.values()), self.running)
                    if self.running:
                        self.launcher.wait(self.running, self.board.refresh_seconds)
                    for attempt in list(self.running):
                        ending = self.launcher.ending(attempt)
                        if ending is not None:
                            self.running.remove(attempt)
                            self._ended(attempt, ending)
        finally:
            self.launcher.stop(self.running)
        return self.outcome

    def _start(self) -> None:
        """Hand over what may run now, and give up what starts from a failed run."""
        free = None if self.launcher.capacity is None else self.launcher.capacity - len(self.running)
        held = {attempt.job.id for attempt in self.running} if self.launcher.holds_back else set()
        given_up = {*self.outcome.failed, *self.outcome.interrupted, *self.outcome.skipped}
        ready: list[Job] = []
        for job in list(self.waiting.values()):
            needed = [start.id for start in job.upstream.values()]
            if any(start in given_up for start in needed):
                del self.waiting[job.id]
                given_up.add(job.id)
                self.outcome.skipped.append(job.id)
                self.board.unfinished += 1
            elif (free is None or len(ready) < free) and all(s in self.done or s in held for s in needed):
                ready.append(job)
                if self.launcher.holds_back:
                    held.add(job.id)
        for job in ready:
            job.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(job.folder / CONFIG, dump_yaml(job.config))
            (job.folder / FAILURE).unlink(missing_ok=True)
            del self.waiting[job.id]
            self.board.started(job)
        if ready:
            self.running += self.launcher.start(ready)

    def _ended(self, attempt: Attempt, ending: Ending) -> None:
        job = attempt.job
        if ending.kind == "finished":
            self.done.add(job.id)
            self.outcome.finished.append(job.id)
            self.board.finished(attempt)
            if self.on_finished is not None:
                self.on_finished(job)
        elif ending.kind == "early":
            self.waiting[job.id] = job
        elif ending.kind == "interrupted":
            self.interruptions[job.id] = count = self.interruptions.get(job.id, 0) + 1
            if count <= INTERRUPTIONS:
                self.waiting[job.id] = job
            else:
                self.outcome.interrupted[job.id] = ending.reason
            self.board.stopped(attempt, "interrupted", again=count <= INTERRUPTIONS)
        else:
            self.failures[job.id] = count = self.failures.get(job.id, 0) + 1
            again = ending.kind == "failed" and count <= self.retries
            if again:
                self.waiting[job.id] = job
            else:
                self.outcome.failed[job.id] = ending.reason
                failure = {"reason": ending.reason, "attempts": count, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
                write_atomically(job.folder / FAILURE, json.dumps(failure, indent=1))
            self.board.stopped(attempt, "failed", again)
