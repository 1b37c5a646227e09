"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from vlm.errors import BusyError, UserError

WAIT_SECONDS = 20.0  # what was killed a moment ago may still be dying


@contextlib.contextmanager
def only_process(folder: Path, what: str, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the folder's lock. It goes with the process that holds it, however that ends.

    On file systems without locks nothing is locked.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=wait_seconds)
    except Timeout:
        raise BusyError(f"{folder}: another process works on this {what}. Wait for it, or stop it") from None
    except (NotImplementedError, OSError):
        if not os.access(folder, os.W_OK):
            raise UserError(f"{folder}: cannot be written to. Choose another folder") from None
    try:
        yield
    finally:
        lock.release()
