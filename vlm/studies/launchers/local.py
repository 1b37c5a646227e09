"""Jobs as processes of this machine, several at once.

Importing torch and Lightning takes seconds of CPU, more than a small job itself. So the processes are forked from one
server (`multiprocessing`'s forkserver) that has imported them and done nothing else: each starts in milliseconds,
with a clean state, and dies alone. The server is single-threaded, and CUDA is first touched after the fork.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from pathlib import Path

from vlm.errors import UserError
from vlm.studies.driver import Attempt, Launcher
from vlm.studies.plan import Job, distinct
from vlm.studies.work import Ending, ending, log_size, run_logged, train

IMPORTED_ONCE = [
    "vlm.run",
    "vlm.evaluation",
    "vlm.training.trainer",
    "vlm.training.pretraining",
    "vlm.training.finetuning",
    "torch.utils.tensorboard",
]
GRACE_SECONDS = 5.0  # between asking a process to end and killing it


@dataclass(frozen=True)
class Slot:
    """The share of the machine that one job gets."""

    threads: int
    gpus: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        environment = thread_variables(self.threads)
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask for GPUs must not start CUDA before the fork
        return environment | {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else environment


@dataclass
class _Running(Attempt):
    slot: Slot | None = None
    process: ForkServerProcess | SpawnProcess | None = None


class LocalLauncher(Launcher):
    """Runs jobs as processes. Whatever ends this process ends them too."""

    def __init__(self, jobs: Sequence[Job], at_once: int | None = None, work: Callable[[Path], None] = train) -> None:
        self.work = work
        self.slots = list(machine_slots(jobs, at_once))
        self.capacity = len(self.slots)

    def start(self, jobs: Sequence[Job]) -> list[Attempt]:
        return [self._start(job, self.slots.pop(0)) for job in jobs]

    def wait(self, attempts: Sequence[Attempt], seconds: float) -> None:
        connection.wait([_process(one).sentinel for one in attempts], timeout=seconds)

    def ending(self, attempt: Attempt) -> Ending | None:
        status = _process(attempt).exitcode
        if status is None:
            return None
        assert isinstance(attempt, _Running) and attempt.slot is not None
        self.slots.append(attempt.slot)
        return ending(attempt.job, status, attempt.log_start)

    def stop(self, attempts: Sequence[Attempt]) -> None:
        _stop([_process(one) for one in attempts])

    def _start(self, job: Job, slot: Slot) -> Attempt:
        begin = log_size(job.folder)
        # Not daemonic: the job's data loader may have processes of its own.
        process = _context().Process(target=_child, args=(job.folder, self.work, slot.environment))
        with _environment(slot.environment):
            forkserver.set_forkserver_preload(IMPORTED_ONCE)
            process.start()
        return _Running(job, begin, slot=slot, process=process)


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


def thread_variables(threads: int) -> dict[str, str]:
    """What libraries read their number of threads from, as they are loaded."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return dict.fromkeys(names, str(threads)) | {"TOKENIZERS_PARALLELISM": "false"}


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


# --- Processes -------------------------------------------------------------------------------------------------------


def _context() -> ForkServerContext | SpawnContext:
    if "forkserver" in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("forkserver")
    return multiprocessing.get_context("spawn")


def _process(attempt: Attempt) -> ForkServerProcess | SpawnProcess:
    assert isinstance(attempt, _Running) and attempt.process is not None
    return attempt.process


def _child(folder: Path, work: Callable[[Path], None], environment: Mapping[str, str]) -> None:
    """First function of a job's process."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # ctrl-C reaches the study alone, and a signal to the group reaches the job's own children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    if "torch" in sys.modules:  # imported by the server, perhaps for another number of threads
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.exit(run_logged(folder, work))


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
