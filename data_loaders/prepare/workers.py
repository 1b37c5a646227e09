"""Work over processes: progress counted as it happens, a prompt end on errors and ctrl-C, no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from vlm.errors import UserError

T = TypeVar("T")
TICKS_AT_ONCE = 16  # the shared counter is locked at each of its changes


class Stopped(Exception):
    """The other processes have failed, or the user has stopped them."""


class _Counter:
    """Counts what this process has done; in a worker, into the number that its parent shows."""

    def __init__(self) -> None:
        self.shared: Any = None
        self.stop: Any = None
        self.show: Callable[[int], None] = lambda count: None
        self.waiting = 0

    def __call__(self, count: int = 1) -> None:
        self.waiting += count
        if self.waiting >= TICKS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        count, self.waiting = self.waiting, 0
        if self.shared is None:
            self.show(count)
            return
        with self.shared.get_lock():
            self.shared.value += count
        if self.stop.is_set():
            raise Stopped


tick = _Counter()
"""Call it for each thing done."""


class Workers:
    """Runs a function over tasks, in this process (`number` 1) or in that many. The function must not be a closure."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._pool: ProcessPoolExecutor | None = None
        if number > 1:
            context = multiprocessing.get_context("spawn")
            self._count, self._stop = context.Value("q", 0), context.Event()
            self._pool = ProcessPoolExecutor(number, context, _begin, (self._count, self._stop))

    def run(self, work: Callable[[T], None], tasks: Iterable[T], advance: Callable[[int], None]) -> None:
        """All tasks, in any order; the first error ends it."""
        if self._pool is None:
            tick.show = advance
            for task in tasks:
                work(task)
            tick.flush()
            return
        shown = self._count.value
        futures = {self._pool.submit(_run, work, task) for task in tasks}
        try:
            while futures:
                done, futures = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED)
                now = self._count.value
                advance(now - shown)
                shown = now
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was ended from outside (is memory short?). Run the same command again, with fewer "
                "--workers if it happens again: what is finished is kept"
            ) from None
        except BaseException:
            self._stop.set()
            for future in futures:
                future.cancel()
            raise

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@contextmanager
def workers(number: int) -> Iterator[Workers]:
    made = Workers(number)
    try:
        yield made
    finally:
        made.close()


def _run(work: Callable[[T], None], task: T) -> None:
    try:
        work(task)
        tick.flush()
    except Stopped:
        pass


def _begin(count: Any, stop: Any) -> None:
    """A worker's first act. Ctrl-C is its parent's to hear; without a parent it ends at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tick.shared, tick.stop = count, stop
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
