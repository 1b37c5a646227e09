"""Jobs in the queue of a SLURM cluster, as arrays that submitit writes; or as processes, by submitit's local executor.

All jobs are handed over at once. SLURM holds an array back until the runs that it starts from have ended, and goes on
when the process that watches is gone; the same command watches again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.run import RESULT, resume, write_atomically
from vlm.studies.driver import Attempt, Launcher
from vlm.studies.launchers.local import num_cores, thread_variables
from vlm.studies.plan import Job
from vlm.studies.work import FAILED, INTERRUPTED, LOG_LINES, TOO_EARLY, Ending, ending, log_size, run_logged, train

SUBMITTED, STATUS = "submitted.json", "exit_status"
ASK_SECONDS = 5.0  # between two looks at the queue
USUAL_HOURS = 24.0
MOST_AT_ONCE = 1000  # elements of an array; SLURM's MaxArraySize is 1001 unless a cluster says otherwise


@dataclass
class _Submitted(Attempt):
    id: str = ""  # of the queue: "123_4" is an element of an array

    @property
    def is_running(self) -> bool:
        return log_size(self.job.folder) > self.log_start


class Work:
    """What an element of an array does. submitit stores it, and calls `checkpoint` before the time is over."""

    def __init__(self, work: Callable[[Path], None], threads: int) -> None:
        self.work, self.threads = work, threads
        self.is_requeued = False

    def __call__(self, folder: str, upstream: Sequence[str]) -> None:
        run = Path(folder)
        os.environ |= thread_variables(self.threads)  # torch is not imported yet
        if all((Path(start) / RESULT).is_file() for start in upstream):
            status = run_logged(run, self.work)
        else:
            status = TOO_EARLY
        if self.is_requeued:  # by `checkpoint`, from inside the work: it did not end, it goes on elsewhere
            sys.exit(INTERRUPTED)
        if int(os.environ.get("SLURM_PROCID", 0)) == 0:
            write_atomically(run / STATUS, str(status))

    def checkpoint(self, folder: str, upstream: Sequence[str]) -> Any:
        """What is to be run in this one's place after a timeout or a preemption: the same, from the last checkpoint."""
        import submitit

        self.is_requeued = True
        return submitit.helpers.DelayedSubmission(Work(self.work, self.threads), folder, upstream)


def train_rank(folder: Path) -> None:
    """The work of one rank that srun has started."""
    resume(folder)


class SlurmLauncher(Launcher):
    """Submits jobs as arrays with dependencies, or runs them as processes where `cluster` is "local"."""

    def __init__(
        self,
        folder: Path,
        cluster: str = "slurm",
        options: Mapping[str, str] | None = None,
        at_once: int | None = None,
        work: Callable[[Path], None] | None = None,
    ) -> None:
        """`options`: sbatch's long options, such as partition and account."""
        try:
            import submitit
        except ImportError:
            raise UserError("--on slurm needs submitit: pip install 'vlm-less-supervision[slurm]'") from None
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise UserError("--on slurm: no sbatch here. Run it on a login node; --on submitit tries a study without")
        self.cluster = cluster
        self.holds_back = cluster == "slurm"
        self.capacity = None if cluster == "slurm" else at_once or 1
        self.options = dict(options or {})
        self.at_once = at_once
        self.work = work
        self.folder = folder.resolve() / "submitit"
        self.executor = submitit.AutoExecutor(self.folder, cluster=cluster)
        self.ids: dict[str, str] = {}  # of what is in the queue, by job
        self.processes: list[Any] = []  # submitit's handles, which reap their processes
        self.queue: set[str] = set()
        self.asked = -math.inf

    def start(self, jobs: Sequence[Job]) -> list[Attempt]:
        self._ask()
        attempts: list[Attempt] = []
        arrays: dict[tuple[str, tuple[str, ...]], list[Job]] = {}
        for job in jobs:
            before = _submitted(job)
            if before is not None and self._is_alive(before):  # by an earlier call
                self.ids[job.id] = before
                attempts.append(_Submitted(job, 0, id=before))
            else:
                arrays.setdefault((job.stage, tuple(start.id for start in job.upstream.values())), []).append(job)
        for (_, upstream), array in arrays.items():
            for begin in range(0, len(array), MOST_AT_ONCE):
                behind = [self.ids[start] for start in upstream if start in self.ids]
                attempts += self._submit(array[begin : begin + MOST_AT_ONCE], behind)
        return attempts

    def wait(self, attempts: Sequence[Attempt], seconds: float) -> None:
        time.sleep(seconds)
        self._ask()

    def ending(self, attempt: Attempt) -> Ending | None:
        assert isinstance(attempt, _Submitted)
        told = attempt.job.folder / STATUS
        if not told.is_file() and self._is_alive(attempt.id):
            return None
        self.ids.pop(attempt.job.id, None)
        if told.is_file():
            text = told.read_text()
            return ending(attempt.job, int(text) if text.lstrip("-").isdigit() else FAILED, attempt.log_start)
        if attempt.job.is_finished:
            return Ending("finished")
        # Neither there nor heard of: killed with its node, or before its work began.
        log = self.folder / f"{attempt.id}_0_log.err"
        said = log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:] if log.is_file() else []
        return Ending("interrupted", "\n".join([f"{attempt.id} left the queue without an exit status", *said]))

    def stop(self, attempts: Sequence[Attempt]) -> None:
        """What is in the queue stays there; processes of this machine are ended."""
        ours = {attempt.id for attempt in attempts if isinstance(attempt, _Submitted)}
        for process in self.processes if self.cluster != "slurm" else []:
            if process.job_id in ours and not process.done():
                process.cancel()

    def _submit(self, jobs: Sequence[Job], upstream: Sequence[str]) -> list[Attempt]:
        from submitit.core.utils import FailedJobError

        parameters = self._parameters(jobs[0], upstream)
        self.executor.update_parameters(**parameters)
        for job in jobs:
            (job.folder / STATUS).unlink(missing_ok=True)
        # Under srun every rank is a process already; elsewhere a job of several ranks starts its own.
        work = self.work or (train_rank if self.cluster == "slurm" else train)
        cores = num_cores() // (self.at_once or 1) if self.cluster != "slurm" else parameters["cpus_per_task"]
        begin = [log_size(job.folder) for job in jobs]
        handles = []
        try:
            with self.executor.batch():
                for job in jobs:
                    starts = [str(start.folder) for start in job.upstream.values()]
                    handles.append(self.executor.submit(Work(work, max(1, cores)), str(job.folder), starts))
        except FailedJobError as error:
            raise UserError(
                f"stages.{jobs[0].stage}: sbatch took no job ({str(error).strip()}). Mend the stage's resources "
                "(gpus: 0 where the cluster has none) or --sbatch; the same command continues"
            ) from None
        for job, handle in zip(jobs, handles, strict=True):
            self.ids[job.id] = handle.job_id
            self.queue.add(handle.job_id)
            write_atomically(job.folder / SUBMITTED, json.dumps({"id": handle.job_id, "cluster": self.cluster}))
        self.processes += handles
        return [_Submitted(job, start, id=self.ids[job.id]) for job, start in zip(jobs, begin, strict=True)]

    def _parameters(self, job: Job, upstream: Sequence[str]) -> dict[str, Any]:
        """Of submitit's executor, for an array of jobs like this one."""
        trainer, resources = job.config.trainer, job.resources
        parameters: dict[str, Any] = {"timeout_min": round(60 * (resources.hours or USUAL_HOURS))}
        if self.cluster != "slurm":
            return parameters
        gpus = trainer.devices if resources.gpus is None and trainer.accelerator != "cpu" else resources.gpus or 0
        parameters |= {"nodes": trainer.num_nodes, "tasks_per_node": trainer.devices, "name": f"vlm-{job.stage}"}
        parameters |= {"cpus_per_task": max(1, (resources.cpus or 1) // trainer.devices)}
        if gpus:
            parameters["gpus_per_node"] = gpus
        if resources.memory_gib is not None:
            parameters["mem_gb"] = resources.memory_gib
        if upstream:
            # Whether they finished or failed: who finds one unfinished ends at once, and nothing hangs in the queue.
            parameters["slurm_dependency"] = "afterany:" + ":".join(upstream)
        else:
            parameters["slurm_dependency"] = None
        if self.at_once:
            parameters["slurm_array_parallelism"] = self.at_once
        known = {"partition", "qos", "account", "constraint", "exclude", "nodelist", "gres", "comment", "exclusive"}
        parameters |= {f"slurm_{name}": value for name, value in self.options.items() if name in known}
        others = {name: value for name, value in self.options.items() if name not in known}
        return parameters | ({"slurm_additional_parameters": others} if others else {})

    def _ask(self) -> None:
        """Look at the queue, not too often: a controller serves many users."""
        if self.cluster != "slurm" or time.monotonic() - self.asked < ASK_SECONDS:
            return
        listed = subprocess.run(
            ["squeue", "--me", "--noheader", "--array", "--format=%i"], capture_output=True, text=True
        )
        if listed.returncode == 0:  # else the controller is busy: what was there is there
            self.queue = set(listed.stdout.split())
        self.asked = time.monotonic()

    def _is_alive(self, id: str) -> bool:
        if self.cluster == "slurm":
            return id in self.queue
        handle = next((one for one in self.processes if one.job_id == id), None)
        if handle is not None:
            return not handle.done()
        try:  # started by an earlier call; another process may have its number by now
            command = Path(f"/proc/{id}/cmdline").read_bytes()
            state = Path(f"/proc/{id}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        # Without a command line it has only just been started, or has ended (Z) and its parent has not looked yet.
        return b"submitit" in command if command else state not in ("Z", "X")


def _submitted(job: Job) -> str | None:
    """The job's number in the queue, if it was ever there."""
    try:
        return str(json.loads((job.folder / SUBMITTED).read_text())["id"])
    except (OSError, ValueError, KeyError):
        return None
