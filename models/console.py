"""How a long command shows and ends its work: lines above a bar, jobs side by side that move it, an end that waits
for nobody."""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from models.store import READ_BYTES, Advance

WORKERS = 8  # files at a time

Result = TypeVar("Result")
console = Console()


def say(text: str) -> None:
    """Print a line, above the bar where there is one."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def byte_progress(disable: bool = False) -> Progress:
    """Bars of bytes, with their rate and the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=disable)


@contextmanager
def byte_bar(title: str, size: int, done: int = 0) -> Iterator[Advance]:
    """A bar over `size` bytes, `done` of them before; with nothing to do, none."""
    with byte_progress(disable=size == done) as progress:
        task = progress.add_task(title, total=size, completed=done)
        lock, waiting = threading.Lock(), 0

        def advance(count: int) -> None:
            # The bar reckons its rate from the last 1000 steps: they must not be the last tenth of a second.
            nonlocal waiting
            with lock:
                waiting += count
                if abs(waiting) >= min(READ_BYTES, size // 100):
                    progress.advance(task, waiting)
                    waiting = 0

        yield advance
        progress.advance(task, waiting)


class StoppedError(Exception):
    """Another job has failed, or the user has pressed Ctrl-C."""


def in_parallel(jobs: Sequence[Callable[[Advance], Result]], advance: Advance) -> list[Result]:
    """The jobs' results, in order. The first error stops them all, and is raised without waiting for slow servers."""
    stop = threading.Event()

    def advance_or_stop(count: int) -> None:
        if stop.is_set():
            raise StoppedError
        advance(count)

    pool = ThreadPoolExecutor(WORKERS)
    futures = [pool.submit(job, advance_or_stop) for job in jobs]
    try:
        for future in as_completed(futures):
            future.result()
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [future.result() for future in futures]


def leave(status: int) -> NoReturn:
    """End the process at once. sys.exit would wait for threads, which may wait for a server."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
