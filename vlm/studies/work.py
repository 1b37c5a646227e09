"""What a job does, wherever it runs: it trains, writes its log, and tells by its exit status how it ended."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlm.config import load_yaml
from vlm.errors import BusyError, UserError
from vlm.run import CONFIG, RESULT, RunConfig, resume

if TYPE_CHECKING:
    from vlm.studies.plan import Job

LOG = "log.txt"
LOG_LINES = 8  # of a failed job that are shown
FAILED, WRONG, INTERRUPTED, TOO_EARLY = 1, 2, 75, 76  # exit statuses; 75 is EX_TEMPFAIL of sysexits.h
FULL_BYTES = 2**22  # a file system with less room than this is full
# What is wrong with the machine and not with the job.
PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENOMEM}


@dataclass(frozen=True)
class Ending:
    """How an attempt at a job ended.

    `failed`: by its own error. `wrong`: by one that the user must mend first, so that to try again at once is in vain.
    `interrupted`: by something outside of it, such as a signal, a lost node or a full disk.
    `early`: a run that it starts from was not finished.
    """

    kind: Literal["finished", "failed", "wrong", "interrupted", "early"]
    reason: str = ""


def train(folder: Path) -> None:
    """The work of a job: what `vlm train FOLDER` does."""
    if load_yaml(folder / CONFIG, RunConfig).trainer.world_size > 1:
        # For further ranks Lightning repeats the command line of its process, which must then be this run's.
        status = subprocess.run([sys.executable, "-m", "vlm.cli", "train", str(folder)]).returncode
        sys.exit(INTERRUPTED if status < 0 else status)  # a signal ended it; no exit status is below zero
    resume(folder)


def run_logged(folder: Path, work: Callable[[Path], None]) -> int:
    """Do the work and return its exit status. All output of the process goes to the run's log meanwhile."""
    before = [os.dup(1), os.dup(2)]
    try:
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for number in (1, 2):
            os.dup2(log, number)
        os.close(log)
        work(folder)
        status = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        is_passing = isinstance(error, BusyError) or _is_passing(error, folder)
        status = INTERRUPTED if is_passing else WRONG
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else FAILED if error.code else 0
        status = INTERRUPTED if status == FAILED and _is_passing(error, folder) else status
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BaseException as error:
        traceback.print_exc()
        status = INTERRUPTED if _is_passing(error, folder) else FAILED
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the disk that the log lies on is full
            status = INTERRUPTED if status else status
    for number, saved in enumerate(before, start=1):
        os.dup2(saved, number)
        os.close(saved)
    return status


def _is_passing(error: BaseException, folder: Path) -> bool:
    """Whether the machine is to blame. torch calls a full disk a RuntimeError, so the disk itself is asked too."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(one, OSError) and one.errno in PASSING for one in causes):
        return True
    try:
        return shutil.disk_usage(folder).free < FULL_BYTES
    except OSError:
        return True


def ending(job: Job, status: int, log_start: int) -> Ending:
    """What an exit status means, minus the number of a signal included; `log_start`: where the attempt's log begins."""
    if job.is_finished:
        return Ending("finished")
    if status == TOO_EARLY:
        return Ending("early")
    if status < 0:
        return Ending("interrupted", f"ended by {signal.Signals(-status).name}{_log(job.folder, log_start)}")
    kind: Literal["failed", "wrong", "interrupted"] = "failed"
    if status in (WRONG, INTERRUPTED):
        kind = "wrong" if status == WRONG else "interrupted"
    return Ending(kind, f"exit status {status}, no {RESULT}{_log(job.folder, log_start)}")


def log_size(folder: Path) -> int:
    log = folder / LOG
    return log.stat().st_size if log.is_file() else 0


def _log(folder: Path, start: int) -> str:
    """The last lines of an attempt's log, each after a line break."""
    log = folder / LOG
    text = log.read_bytes()[start:].decode(errors="replace") if log.is_file() else ""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "".join(f"\n{line}" for line in lines[-LOG_LINES:])
