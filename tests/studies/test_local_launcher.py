"""The local launcher with stand-ins for training: what a job does is told by its name and seed."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from made_up_jobs import finish, job, silent
from rich.console import Console

from vlm.config import dump_yaml, load_yaml
from vlm.errors import UserError
from vlm.run import CONFIG, RESULT, RunConfig, TrainerConfig
from vlm.studies.board import remaining_seconds
from vlm.studies.driver import FAILURE, INTERRUPTIONS, Outcome, drive
from vlm.studies.launchers.local import LocalLauncher, Slot, machine_slots
from vlm.studies.plan import Job
from vlm.studies.work import INTERRUPTED, LOG, run_logged, train
from vlm.tasks import VQAv2Task

ROOT = Path(__file__).parents[2]


def launch(
    jobs: list[Job],
    at_once: int,
    work: Callable[[Path], None],
    console: Console | None = None,
    retries: int = 0,
    retry_failed: bool = False,
) -> Outcome:
    return drive(jobs, LocalLauncher(jobs, at_once, work), retries, retry_failed, console)


def fail_twice(folder: Path) -> None:
    """Fails by its own error the first two times."""
    attempts = folder / "attempts"
    attempts.write_text(attempts.read_text() + "x" if attempts.is_file() else "x")
    if len(attempts.read_text()) < 3:
        raise ValueError("bad luck")
    finish(folder)


def be_killed_twice(folder: Path) -> None:
    try:
        fail_twice(folder)
    except ValueError:
        os.kill(os.getpid(), signal.SIGKILL)


def run_full(folder: Path) -> None:
    """As on a full disk, of which torch tells in words of its own."""
    try:
        fail_twice(folder)
    except ValueError:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise RuntimeError("PytorchStreamWriter failed writing file") from error


def be_killed(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_as_named(folder: Path) -> None:
    """Crashes, is killed, stops without a result or finishes, as the run's name says."""
    name = load_yaml(folder / CONFIG, RunConfig).name
    if name == "crash":
        raise ValueError("the loss is not a number")
    if name == "wrong":
        raise UserError("data.root: no such folder")
    if name == "killed":
        print("step 7", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "quiet":
        return
    finish(folder)


def check_inputs(folder: Path) -> None:
    """A last job that wants its inputs' results."""
    if folder.name.startswith("last"):
        assert all((one / RESULT).is_file() for one in folder.parent.glob("first-*"))
    finish(folder)


def write_environment(folder: Path) -> None:
    import torch

    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    (folder / "environment").write_text(" ".join(os.environ.get(name, "none") for name in names))
    (folder / "threads").write_text(str(torch.get_num_threads()))
    finish(folder)


def wait_with_a_child(folder: Path) -> None:
    """A job with a process of its own, like a data loader's."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_jobs_start_after_those_they_start_from(tmp_path: Path) -> None:
    first = [job(tmp_path, "first", seed) for seed in range(3)]
    outcome = launch([job(tmp_path, "last", 0, *first), *first], 2, check_inputs, silent())
    assert sorted(outcome.finished) == sorted(one.id for one in [*first, job(tmp_path, "last")])
    assert not outcome.failed and not outcome.skipped


def test_a_run_that_stands_at_two_places_of_the_grid_is_trained_once(tmp_path: Path) -> None:
    outcome = launch([job(tmp_path, "first"), job(tmp_path, "first")], 2, finish, silent())
    assert len(outcome.finished) == 1
    assert (tmp_path / "runs/first-0/started").read_text() == "x"


def test_failures_stop_only_what_starts_from_them(tmp_path: Path) -> None:
    names = ["crash", "killed", "wrong", "quiet", "fine"]
    jobs = {name: job(tmp_path, name) for name in names}
    after = {name: job(tmp_path, f"after-{name}", 0, jobs[name]) for name in names}
    later = job(tmp_path, "later", 0, after["crash"])
    console = silent()
    outcome = launch([*jobs.values(), *after.values(), later], 2, end_as_named, console)
    assert sorted(outcome.finished) == sorted([jobs["fine"].id, after["fine"].id])
    assert set(outcome.failed) == {jobs[name].id for name in ("crash", "wrong", "quiet")}
    assert set(outcome.interrupted) == {jobs["killed"].id}
    assert set(outcome.skipped) == {after[name].id for name in names if name != "fine"} | {later.id}
    assert outcome.failed[jobs["crash"].id].startswith("exit status 1")
    assert outcome.failed[jobs["crash"].id].endswith("ValueError: the loss is not a number")
    assert outcome.failed[jobs["wrong"].id].splitlines()[1:] == ["error: data.root: no such folder"]
    assert outcome.interrupted[jobs["killed"].id] == "ended by SIGKILL\nstep 7"
    assert outcome.failed[jobs["quiet"].id] == "exit status 0, no result.json"
    assert "failed   crash seed=0" in shown(console) and "finished after-fine seed=0" in shown(console)


def test_a_failed_job_is_tried_again_as_often_as_it_may(tmp_path: Path) -> None:
    one, other = job(tmp_path, "first"), job(tmp_path, "second")
    console = silent()
    assert launch([one], 1, fail_twice, console, retries=2).finished == [one.id]
    assert shown(console).count("it is tried again") == 2
    outcome = launch([other], 1, fail_twice, silent(), retries=1)
    assert outcome.failed[other.id].endswith("ValueError: bad luck")
    assert (other.folder / "attempts").read_text() == "xx"


def test_an_error_of_the_users_is_not_tried_again_at_once(tmp_path: Path) -> None:
    one = job(tmp_path, "wrong")
    launch([one], 1, end_as_named, silent(), retries=5)
    assert (one.folder / LOG).read_text().count("no such folder") == 1


@pytest.mark.parametrize("work", [be_killed_twice, run_full])
def test_an_interrupted_job_goes_on_without_counting_as_failed(tmp_path: Path, work: Callable[[Path], None]) -> None:
    one = job(tmp_path, "first")
    assert launch([one], 1, work, silent(), retries=0).finished == [one.id]
    assert not (one.folder / FAILURE).exists()


def test_a_signal_to_the_command_of_several_ranks_is_no_failure_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(task=VQAv2Task(), trainer=TrainerConfig(devices=2))
    (tmp_path / CONFIG).write_text(dump_yaml(config))
    command = tmp_path / "command"
    command.write_text("#!/bin/sh\nkill -9 $$\n")
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command))
    assert run_logged(tmp_path, train) == INTERRUPTED


def test_a_job_that_is_interrupted_each_time_ends_the_call_and_not_the_next_one(tmp_path: Path) -> None:
    one, after = job(tmp_path, "first"), job(tmp_path, "last", 0, job(tmp_path, "first"))
    console = silent()
    outcome = launch([one, after], 1, be_killed, console)
    assert list(outcome.interrupted) == [one.id] and outcome.skipped == [after.id] and not outcome.failed
    assert shown(console).count("interrupted") == INTERRUPTIONS + 1
    assert len(launch([one, after], 1, finish, silent()).finished) == 2


def test_what_failed_is_left_alone_until_it_is_asked_for_and_what_finished_for_ever(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "fine"), job(tmp_path, "crash")]
    launch(jobs, 1, end_as_named, silent())
    failure = json.loads((jobs[1].folder / FAILURE).read_text())
    assert failure["attempts"] == 1 and failure["reason"].endswith("the loss is not a number")
    console = silent()
    outcome = launch(jobs, 1, finish, console)
    assert outcome.finished == [jobs[0].id] and outcome.failed == {jobs[1].id: failure["reason"]}
    assert "1 failed before and are left alone; --retry-failed tries them again" in shown(console)
    outcome = launch(jobs, 1, finish, silent(), retry_failed=True)
    assert sorted(outcome.finished) == sorted(one.id for one in jobs) and not outcome.failed
    assert [(one.folder / "started").read_text() for one in jobs] == ["x", "x"]
    assert not (jobs[1].folder / FAILURE).exists()
    log = (tmp_path / "runs/crash-0" / LOG).read_text()
    assert "ValueError" in log and log.endswith("trained\n")


def test_a_job_finds_its_config_and_its_share_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    one = job(tmp_path, "first")
    launch([one], 1, write_environment, silent())
    assert load_yaml(one.folder / CONFIG, RunConfig) == one.config
    threads = (one.folder / "threads").read_text()
    assert (one.folder / "environment").read_text() == f"{threads} 5"
    assert os.environ["OMP_NUM_THREADS"] == "1"  # as tests/conftest.py sets it: changed for the job alone


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes under /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-C", "SIGKILL"])
def test_no_process_outlives_its_study(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "study.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        from pathlib import Path
        sys.path += {[str(Path(__file__).parent), str(ROOT)]!r}
        import test_local_launcher as stand_in
        from vlm.studies.launchers import local
        if __name__ == "__main__":
            local.IMPORTED_ONCE.clear()  # these jobs need no torch
            jobs = [stand_in.job(Path({str(tmp_path)!r}), "first", seed) for seed in range(2)]
            stand_in.launch(jobs, 2, stand_in.wait_with_a_child)
        """)
    )
    study = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    files = [tmp_path / f"runs/first-{seed}/pids" for seed in range(2)]
    deadline = time.monotonic() + 60
    while not all(file.is_file() and file.read_text() for file in files):
        assert study.poll() is None and time.monotonic() < deadline, study.communicate()[0].decode()
        time.sleep(0.05)
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    study.send_signal(number)
    study.communicate(timeout=30)
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_cores_are_shared_among_the_jobs_and_gpus_given_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job(tmp_path, "first", seed) for seed in range(5)]
    monkeypatch.setattr("vlm.studies.launchers.local.num_cores", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert list(machine_slots(jobs, None)) == [Slot(1)] * 4
    assert list(machine_slots(jobs[:1], None)) == [Slot(4)]
    assert list(machine_slots(jobs, 2)) == [Slot(2)] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert list(machine_slots(jobs, None)) == [Slot(2, ("2",)), Slot(2, ("3",))]
    assert [slot.gpus for slot in machine_slots(jobs, 3)] == [("2",), ("3",), ("2",)]
    config = jobs[0].config.model_copy(update={"trainer": TrainerConfig(devices=2)})
    assert [slot.gpus for slot in machine_slots([Job("first", "first-0", config, {}, {})], None)] == [("2", "3")]
    with pytest.raises(UserError, match="at least 1"):
        list(machine_slots(jobs, 0))


def test_remaining_time_is_judged_by_finished_runs_of_the_same_stage() -> None:
    assert remaining_seconds({}, ["a"], [], 1) is None
    assert remaining_seconds({"a": [8, 12]}, ["a", "a"], [], 2) == 10
    assert remaining_seconds({"a": [10]}, [], [("a", 4)], 2) == 6  # the second slot cannot help
    assert remaining_seconds({"a": [10]}, ["b"], [], 1) == 10  # nothing known of b
    assert remaining_seconds({"a": [10]}, [], [("a", 15)], 1) == 0
