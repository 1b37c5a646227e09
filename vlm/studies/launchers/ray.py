"""Jobs as tasks of a Ray cluster: one that runs already, or one that is started on this machine for the study."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.ray_cluster import connect
from vlm.run import CONFIG
from vlm.studies.driver import Attempt, Launcher
from vlm.studies.plan import Job
from vlm.studies.work import Ending, ending, log_size, run_logged, train


@dataclass
class _Task(Attempt):
    reference: Any = None

    @property
    def is_running(self) -> bool:
        return log_size(self.job.folder) > self.log_start


class RayLauncher(Launcher):
    """Runs each job as one Ray task with the resources that its stage declares.

    A task has a process of its own. One that is lost, with its worker or its node, is interrupted; the others go on.
    Every node must see the study's folder, and whatever the configs name, under the same paths.
    """

    def __init__(
        self, address: str | None = None, at_once: int | None = None, work: Callable[[Path], None] = train
    ) -> None:
        """`address` of a running cluster ("auto": the one of this machine); None starts one with `at_once` cores."""
        self.ray, self.started = connect(address, at_once)
        self.work = work
        self.task = self.ray.remote(max_calls=1, max_retries=0)(_run)

    def start(self, jobs: Sequence[Job]) -> list[Attempt]:
        tasks = [self._task(job) for job in jobs]  # all of them before one is submitted: any may be refused
        given = os.getcwd(), self.work
        return [
            _Task(job, log_size(job.folder), reference=task.remote(str(job.folder), *given))
            for job, task in zip(jobs, tasks, strict=True)
        ]

    def wait(self, attempts: Sequence[Attempt], seconds: float) -> None:
        self.ray.wait([_reference(one) for one in attempts], num_returns=1, timeout=seconds, fetch_local=False)

    def ending(self, attempt: Attempt) -> Ending | None:
        ended, _ = self.ray.wait([_reference(attempt)], timeout=0)
        if not ended:
            return None
        try:
            status = self.ray.get(ended[0])
        except self.ray.exceptions.RayTaskError as error:  # before the work began
            return Ending("wrong" if "UserError" in str(error) else "failed", str(error).strip().splitlines()[-1])
        except self.ray.exceptions.RayError as error:
            lost = ending(attempt.job, -9, attempt.log_start)
            if lost.kind == "finished":
                return lost
            return Ending("interrupted", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return ending(attempt.job, status, attempt.log_start)

    def stop(self, attempts: Sequence[Attempt]) -> None:
        for attempt in attempts:
            self.ray.cancel(_reference(attempt), force=True)
        if self.started:
            self.ray.shutdown()

    def _task(self, job: Job) -> Any:
        resources = job.resources
        if job.config.trainer.num_nodes > 1:
            raise UserError(f"stages.{job.stage}: trainer.num_nodes is for --on slurm. A Ray task runs on one node")
        total = self.ray.cluster_resources()
        gpus = resources.gpus
        if gpus is None:
            wanted = job.config.trainer.accelerator not in ("cpu", "tpu", "mps") and total.get("GPU", 0) > 0
            gpus = job.config.trainer.devices if wanted else 0
        memory = None if resources.memory_gib is None else int(resources.memory_gib * 2**30)
        for name, needed in (("CPU", resources.cpus or 1), ("GPU", gpus)):
            if needed > max((node["Resources"].get(name, 0) for node in self.ray.nodes() if node["Alive"]), default=0):
                raise UserError(
                    f"stages.{job.stage}.resources: no node of the cluster has {needed} {name}. Ask for less, or wait "
                    "until such a node has joined"
                )
        return self.task.options(num_cpus=resources.cpus or 1, num_gpus=gpus, memory=memory, name=job.title)


def _reference(attempt: Attempt) -> Any:
    assert isinstance(attempt, _Task)
    return attempt.reference


def _run(folder: str, here: str, work: Callable[[Path], None]) -> int:
    run = Path(folder)
    if not (run / CONFIG).is_file():
        raise UserError(f"{run}: not there on {socket.gethostname()}. Give a --folder that all nodes share")
    if Path(here).is_dir():
        os.chdir(here)
    return run_logged(run, work)
