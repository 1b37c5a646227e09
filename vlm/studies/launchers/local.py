"""Jobs as processes of this machine, several at once.

Importing torch and Lightning takes seconds of CPU, more than a small job itself. So the processes are forked from one
server (`multiprocessing`'s forkserver) that has imported them and done nothing else: each starts in milliseconds,
with a clean state, and dies alone. The server is single-threaded, and CUDA is first touched after the fork.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from vlm.config import dump_yaml, load_yaml
from vlm.errors import UserError
from vlm.run import CONFIG, RESULT, RunConfig, resume, write_atomically
from vlm.studies.plan import Job, distinct

LOG = "log.txt"
IMPORTED_ONCE = [
    "vlm.run",
    "vlm.evaluation",
    "vlm.training.trainer",
    "vlm.training.pretraining",
    "vlm.training.finetuning",
    "torch.utils.tensorboard",
]
GRACE_SECONDS = 5.0  # between asking a process to end and killing it
LOG_LINES = 8  # of a failed job that are shown


@dataclass
class Outcome:
    """How the jobs ended, by their ids."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # why, and the last lines of the log
    skipped: list[str] = field(default_factory=list)  # they needed one that failed


@dataclass(frozen=True)
class Slot:
    """The share of the machine that one job gets."""

    threads: int
    gpus: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = dict.fromkeys(names, str(self.threads)) | {"TOKENIZERS_PARALLELISM": "false"}
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask for GPUs must not start CUDA before the fork
        return environment | {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else environment


@dataclass
class _Running:
    job: Job
    slot: Slot
    process: ForkServerProcess | SpawnProcess
    log_start: int  # where this attempt begins in the log
    start: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


def train(folder: Path) -> None:
    """The work of a job: what `vlm train FOLDER` does."""
    if load_yaml(folder / CONFIG, RunConfig).trainer.world_size > 1:
        # For further ranks Lightning repeats the command line of its process, which must then be this run's.
        sys.exit(subprocess.run([sys.executable, "-m", "vlm.cli", "train", str(folder)]).returncode)
    resume(folder)


def launch(
    jobs: Sequence[Job],
    at_once: int | None = None,
    work: Callable[[Path], None] = train,
    console: Console | None = None,
) -> Outcome:
    """Run what is not finished yet, each job after those it starts from.

    A job is finished once its result file exists; so the same call continues where a killed one stopped. One that
    fails stops only those that start from it. Whatever ends this process ends the running jobs too.
    """
    jobs = distinct(jobs)
    slots = list(machine_slots(jobs, at_once))
    waiting = [job for job in jobs if not job.is_finished]
    outcome = Outcome(finished=[job.id for job in jobs if job.is_finished])
    running: list[_Running] = []
    board = _Board(jobs, len(slots), console or Console())
    try:
        with board:
            while waiting or running:
                for job in list(waiting):
                    needed = [start.id for start in job.upstream.values()]
                    if any(start in outcome.failed or start in outcome.skipped for start in needed):
                        waiting.remove(job)
                        outcome.skipped.append(job.id)
                        board.unfinished += 1
                    elif slots and all(start in outcome.finished for start in needed):
                        waiting.remove(job)
                        running.append(_start(job, slots.pop(0), work))
                        board.started(job)
                board.show(waiting, running)
                connection.wait([one.process.sentinel for one in running], timeout=board.refresh_seconds)
                for one in [one for one in running if one.process.exitcode is not None]:
                    running.remove(one)
                    slots.append(one.slot)
                    if one.job.is_finished:
                        outcome.finished.append(one.job.id)
                        board.finished(one)
                    else:
                        outcome.failed[one.job.id] = _failure(one)
                        board.failed(one)
    finally:
        _stop([one.process for one in running])
    return outcome


def warm_up(at_once: int | None, jobs: Sequence[Job]) -> None:
    """Start the server's imports now, so that they run beside whatever comes before `launch`."""
    if isinstance(_context(), ForkServerContext):
        with _environment(next(machine_slots(jobs, at_once)).environment):
            forkserver.set_forkserver_preload(IMPORTED_ONCE)
            forkserver.ensure_running()


def machine_slots(jobs: Sequence[Job], at_once: int | None) -> Iterator[Slot]:
    """A slot for each job that may run at once. Without a wish: one a GPU, else one a core."""
    if at_once is not None and at_once < 1:
        raise UserError(f"--jobs: must be at least 1, got {at_once}")
    trainers = [job.config.trainer for job in jobs]
    if any(trainer.num_nodes > 1 for trainer in trainers):
        raise UserError("trainer.num_nodes: a study on one machine runs on one node. Start such a run by vlm train")
    cores = num_cores()
    gpus = visible_gpus() if any(trainer.accelerator not in ("cpu", "tpu", "mps") for trainer in trainers) else []
    devices = min(max((trainer.devices for trainer in trainers), default=1), max(len(gpus), 1))
    by_stage = [sum(job.stage == stage for job in distinct(jobs)) for stage in {job.stage for job in jobs}]
    number = at_once or (len(gpus) // devices if gpus else min(cores, max(by_stage, default=1)))
    for slot in range(number):
        chosen = dict.fromkeys(gpus[(slot * devices + device) % len(gpus)] for device in range(devices) if gpus)
        yield Slot(max(1, cores // number), tuple(chosen))


def num_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may hold. Asked of the driver's tool, because to ask torch would import it here."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True)
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]


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


# --- Processes -------------------------------------------------------------------------------------------------------


def _context() -> ForkServerContext | SpawnContext:
    if "forkserver" in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("forkserver")
    return multiprocessing.get_context("spawn")


def _start(job: Job, slot: Slot, work: Callable[[Path], None]) -> _Running:
    job.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(job.folder / CONFIG, dump_yaml(job.config))
    log = job.folder / LOG
    log_start = log.stat().st_size if log.is_file() else 0
    # Not daemonic: the job's data loader may have processes of its own.
    process = _context().Process(target=_child, args=(job.folder, work, slot.environment))
    with _environment(slot.environment):
        forkserver.set_forkserver_preload(IMPORTED_ONCE)
        process.start()
    return _Running(job, slot, process, log_start)


def _child(folder: Path, work: Callable[[Path], None], environment: Mapping[str, str]) -> None:
    """First function of a job's process."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # ctrl-C reaches the study alone, and a signal to the group reaches the job's own children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    if "torch" in sys.modules:  # imported by the server, perhaps for another number of threads
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        work(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _end_with_parent() -> None:
    """Two processes must never write one run: a study that was killed takes its jobs with it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    if hasattr(os, "killpg"):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def _stop(processes: Sequence[ForkServerProcess | SpawnProcess]) -> None:
    """End the processes and theirs, and wait until they are gone."""
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        _signal(process, signal.SIGTERM)
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        if process.exitcode is None:
            _signal(process, getattr(signal, "SIGKILL", signal.SIGTERM))
            process.join()


def _signal(process: ForkServerProcess | SpawnProcess, number: int) -> None:
    if process.pid is None:
        return
    try:
        os.killpg(process.pid, number)
    except (AttributeError, ProcessLookupError):  # no groups on this system, or not in one of its own yet
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """OpenMP and its like read their number of threads as they are loaded, so the server must be born with it."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _failure(ended: _Running) -> str:
    code = ended.process.exitcode or 0
    reason = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}, no {RESULT}"
    log = ended.job.folder / LOG
    text = log.read_bytes()[ended.log_start :].decode(errors="replace") if log.is_file() else ""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join([reason, *lines[-LOG_LINES:]])


# --- What is shown meanwhile -----------------------------------------------------------------------------------------


class _Board:
    """A line for each job that ends; in a terminal also a bar over all and the running jobs, in a log their starts."""

    def __init__(self, jobs: Sequence[Job], num_slots: int, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.refresh_seconds = 0.25 if self.live else 1.0
        self.num_slots = num_slots
        self.total = len(jobs)
        self.known: dict[str, list[float]] = {}
        self.begin = time.monotonic()
        for job in jobs:
            if job.is_finished:
                seconds = json.loads((job.folder / RESULT).read_text()).get("seconds")
                self.known.setdefault(job.stage, []).extend([] if seconds is None else [seconds])
        self.done = sum(job.is_finished for job in jobs)
        self.unfinished = 0  # failed or skipped
        if self.done:
            console.print(f"{self.done} of {self.total} runs are finished already.")

    def __enter__(self) -> _Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def started(self, job: Job) -> None:
        if not self.live:
            self._line("started ", job)

    def finished(self, one: _Running) -> None:
        self.done += 1
        self.known.setdefault(one.job.stage, []).append(one.seconds)
        self._line("[green]finished[/green]", one.job, f"in {_clock(one.seconds)}")

    def failed(self, one: _Running) -> None:
        self.unfinished += 1
        self._line("[red]failed  [/red]", one.job, f"after {_clock(one.seconds)}; what starts from it is skipped")

    def show(self, waiting: Sequence[Job], running: Sequence[_Running]) -> None:
        if not self.live:
            return
        now = [(one.job.stage, one.seconds) for one in running]
        left = remaining_seconds(self.known, [job.stage for job in waiting], now, self.num_slots)
        overall = Table.grid(padding=(0, 1))
        overall.add_row(
            ProgressBar(self.total, self.done + self.unfinished, width=40),
            f"{self.done}/{self.total} runs",
            f"{_clock(time.monotonic() - self.begin)} passed",
            f"about {_clock(left)} left" if left is not None else "",
        )
        lines = Table.grid(padding=(0, 2))
        for one in running:
            lines.add_row(f"  {escape(one.job.title)}", _clock(one.seconds), style="dim")
        self.live.update(Group(overall, lines), refresh=True)

    def _line(self, word: str, job: Job, rest: str = "") -> None:
        count = f"[{self.done + self.unfinished}/{self.total}]"
        self.console.print(
            f"{escape(count)} {word} {escape(job.title)} {rest}".rstrip(), highlight=False, soft_wrap=True
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
