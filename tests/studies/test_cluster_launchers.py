"""The launchers of clusters with stand-ins for training, which must end as on one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from made_up_jobs import finish, job, silent

from vlm.config import load_yaml
from vlm.errors import UserError
from vlm.run import CONFIG, RESULT, RunConfig
from vlm.studies.driver import FAILURE, Outcome, drive
from vlm.studies.launchers.slurm import STATUS, SUBMITTED, SlurmLauncher, Work
from vlm.studies.plan import Job, ResourcesConfig
from vlm.studies.work import LOG, TOO_EARLY

ray = pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]


def end_as_named(folder: Path) -> None:
    """Crashes, is killed once, is wrong or finishes, as the run's name says."""
    name = load_yaml(folder / CONFIG, RunConfig).name
    if name == "crash":
        raise ValueError("the loss is not a number")
    if name == "killed" and not (folder / "once").exists():
        (folder / "once").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "wrong":
        raise UserError("data.root: no such folder")
    finish(folder)


def on_submitit(folder: Path, jobs: list[Job], work: Callable[[Path], None]) -> Outcome:
    return drive(jobs, SlurmLauncher(folder, "local", at_once=2, work=work), console=silent())


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Jobs find the stand-ins of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        yield


@pytest.fixture(scope="module")
def cluster(importable: None) -> Iterator[None]:
    """A small Ray cluster for the tests of this file."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def on_ray(folder: Path, jobs: list[Job], work: Callable[[Path], None]) -> Outcome:
    from vlm.studies.launchers.ray import RayLauncher

    return drive(jobs, RayLauncher(work=work), console=silent())


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")  # of processes that Ray leaves to the operating system
@pytest.mark.parametrize("launch", [on_submitit, on_ray])
def test_jobs_end_as_on_one_machine(launch: Callable[..., Outcome], tmp_path: Path) -> None:
    jobs = {name: job(tmp_path, name) for name in ("crash", "killed", "wrong", "fine")}
    after = {name: job(tmp_path, f"after-{name}", 0, one) for name, one in jobs.items()}
    outcome = launch(tmp_path, [*jobs.values(), *after.values()], end_as_named)
    assert set(outcome.finished) == {jobs["fine"].id, after["fine"].id, jobs["killed"].id, after["killed"].id}
    assert outcome.failed[jobs["crash"].id].endswith("ValueError: the loss is not a number")
    assert outcome.failed[jobs["wrong"].id].endswith("error: data.root: no such folder")
    assert set(outcome.skipped) == {after["crash"].id, after["wrong"].id} and not outcome.interrupted
    assert (jobs["killed"].folder / "started").read_text() == "x"
    assert (jobs["fine"].folder / LOG).read_text() == "trained\n"
    assert (jobs["crash"].folder / FAILURE).is_file()


@pytest.mark.usefixtures("cluster")
def test_more_than_any_node_has_is_refused(tmp_path: Path) -> None:
    from vlm.studies.launchers.ray import RayLauncher

    first = job(tmp_path, "first")
    greedy = Job(first.stage, first.id, first.config, {}, first.labels, ResourcesConfig(cpus=64))
    with pytest.raises(UserError, match=r"stages\.first\.resources: no node of the cluster has 64 CPU"):
        drive([greedy], RayLauncher(work=finish), console=silent())


def test_an_address_without_a_cluster_is_refused() -> None:
    """In a process of its own, because this one may be part of a cluster."""
    script = "from vlm.ray_cluster import connect\nconnect('127.0.0.1:1')"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "UserError: --address 127.0.0.1:1: no Ray cluster answers (Connection refused)" in ended.stderr


# --- SLURM, as far as it goes without a controller -------------------------------------------------------------------


def test_a_job_whose_input_is_not_finished_ends_without_work(tmp_path: Path) -> None:
    first = job(tmp_path, "first")
    last = job(tmp_path, "last", 0, first)
    for one in (first, last):
        one.folder.mkdir(parents=True)
    Work(finish, 1)(str(last.folder), [str(first.folder)])
    assert (last.folder / STATUS).read_text() == str(TOO_EARLY) and not (last.folder / RESULT).exists()


def test_jobs_of_an_earlier_call_are_taken_up_again(tmp_path: Path) -> None:
    one = job(tmp_path, "first")
    one.folder.mkdir(parents=True)
    (one.folder / CONFIG).write_text("")
    launcher = SlurmLauncher(tmp_path, "local", at_once=2, work=finish_slowly)
    launcher.start([one])
    again = SlurmLauncher(tmp_path, "local", at_once=2, work=finish_slowly)
    (second,) = again.start([one])
    number = (one.folder / SUBMITTED).read_text()
    deadline = time.monotonic() + 60
    while (ending := again.ending(second)) is None and time.monotonic() < deadline:
        again.wait([second], 0.1)
    assert ending is not None and ending.kind == "finished"
    assert (one.folder / "started").read_text() == "x"
    assert (one.folder / SUBMITTED).read_text() == number
    while not launcher.processes[0].done():
        time.sleep(0.05)


def test_a_process_that_has_only_just_started_is_alive(tmp_path: Path) -> None:
    """For a moment after its start the system knows no command line of a process."""
    launcher = SlurmLauncher(tmp_path, "local")
    for _ in range(20):
        with subprocess.Popen([sys.executable, "-S", "-c", "'submitit'; input()"], stdin=subprocess.PIPE) as process:
            assert launcher._is_alive(str(process.pid))
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and nobody has asked how
            assert not launcher._is_alive(str(process.pid))
        assert not launcher._is_alive(str(process.pid))


def finish_slowly(folder: Path) -> None:
    time.sleep(1)
    finish(folder)


def test_a_stage_asks_slurm_for_what_it_declares(tmp_path: Path) -> None:
    launcher = SlurmLauncher(tmp_path, "local", {"partition": "gpu", "reservation": "mine"})
    launcher.cluster = "slurm"  # only the parameters are asked for
    first = job(tmp_path, "first")
    resources = ResourcesConfig(cpus=8, gpus=2, memory_gib=64, hours=1.5)
    parameters = launcher._parameters(Job(first.stage, first.id, first.config, {}, {}, resources), ["7_0", "7_1"])
    assert parameters == {
        "timeout_min": 90,
        "nodes": 1,
        "tasks_per_node": 1,
        "name": "vlm-first",
        "cpus_per_task": 8,
        "gpus_per_node": 2,
        "mem_gb": 64,
        "slurm_dependency": "afterany:7_0:7_1",
        "slurm_partition": "gpu",
        "slurm_additional_parameters": {"reservation": "mine"},
    }


SBATCH = """#!/bin/sh
cp "$1" {folder}/sent-$(ls {folder} | grep -c sent)
if [ -e {folder}/refuse ]; then echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1; fi
echo "Submitted batch job $(ls {folder} | grep -c sent)"
"""


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an `sbatch` that keeps what it is sent; none of it ever runs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in (("sbatch", SBATCH.format(folder=folder)), ("squeue", "#!/bin/sh\n")):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def with_folders(jobs: list[Job]) -> list[Job]:
    for one in jobs:
        one.folder.mkdir(parents=True)
    return jobs


def test_what_sbatch_refuses_is_one_error_that_names_the_stage(tmp_path: Path, sbatch: Path) -> None:
    (sbatch / "refuse").touch()
    launcher = SlurmLauncher(tmp_path, options={"partition": "gpu"}, work=finish)
    with pytest.raises(UserError, match=r"stages\.first: sbatch took no job \(.*invalid partition specified: gpu\)"):
        launcher.start(with_folders([job(tmp_path, "first", seed) for seed in range(2)]))


def test_more_jobs_than_an_array_may_have_go_in_several(
    tmp_path: Path, sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm.studies.launchers.slurm.MOST_AT_ONCE", 2)
    jobs = with_folders([job(tmp_path, "first", seed) for seed in range(5)])
    attempts = SlurmLauncher(tmp_path, work=finish).start(jobs)
    assert [attempt.job.id for attempt in attempts] == [one.id for one in jobs]
    sent = [file.read_text() for file in sorted(sbatch.glob("sent-*"))]
    assert ["--array=0-1" in text for text in sent] == [True, True, False]
    numbers = [json.loads((one.folder / SUBMITTED).read_text())["id"] for one in jobs]
    assert numbers == ["1_0", "1_1", "2_0", "2_1", "3"]
