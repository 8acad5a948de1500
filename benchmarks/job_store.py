"""How quick is the queue, and what does a kill cost? Real runners, in processes of their own, on both databases.

    python benchmarks/job_store.py [--only sqlite|postgresql]

The PostgreSQL server is one of the benchmark's own, made with the programs on this machine. The runners are those of
tests/test_jobs.py. Lease 5 s, a beat every 0.5 s, a poll every 0.25 s; a line may take minutes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from avatar_api.jobs import Job, JobSettings, JobStore
from tests.databases import Database, PostgresServer, find_postgres
from tests.test_jobs import Runners, finished, processes
from tests.waiting import PATIENCE, eventually

SETTINGS = JobSettings(lease=5, beat=0.5, poll=0.25)
SUBMITTERS, KEYS = 50, 500
SAMPLES = 30
RUNNERS, JOBS = 8, 1000


def measure_submit(store: JobStore, runners: Runners) -> str:
    with ProcessPoolExecutor(2, mp_context=processes) as clients:
        times = [time for client in clients.map(submit_all, [runners.url] * 2) for time in client]
    return f"{percentiles(times)}; {store.counts()['queued'] - KEYS}"


def submit_all(url: str) -> list[float]:
    """One of two clients that send the same keys, each with half of the submitters → ms for every request."""

    def submit(number: int) -> float:
        started = time.perf_counter()
        store.submit({"prompt": "A man talks.", "number": number}, key=str(number))
        return 1000 * (time.perf_counter() - started)

    with closing(JobStore(url)) as store, ThreadPoolExecutor(SUBMITTERS // 2) as threads:
        return list(threads.map(submit, range(KEYS)))


def measure_start(store: JobStore, runners: Runners) -> str:
    runners.start("one")
    jobs = []
    for _ in range(SAMPLES):
        jobs.append(store.submit({"clips": 1, "steps": 0}))
        time.sleep(0.37)
    return percentiles([1000 * ((job.started_at or 0) - job.created_at) for job in completed(store, jobs)])


def measure_throughput(store: JobStore, runners: Runners) -> str:
    jobs = [store.submit({"clips": 3, "steps": 0}) for _ in range(JOBS)]
    for number in range(RUNNERS):
        runners.start(f"runner-{number}")
    jobs = completed(store, jobs)
    seconds = max(job.finished_at or 0 for job in jobs) - min(job.started_at or 0 for job in jobs)
    return f"{JOBS / seconds:.0f}; {run_twice(runners)}"


def measure_cancel(store: JobStore, runners: Runners) -> str:
    runners.start("one")
    times = []
    for sample in range(SAMPLES):
        job = store.submit({"steps": 10_000, "seconds": 0.01})
        eventually(partial(runners.clips, job), seconds=PATIENCE)
        time.sleep(sample / SAMPLES * SETTINGS.beat)
        asked = time.time()
        store.cancel(job.id)
        (job,) = completed(store, [job])
        times.append(1000 * ((job.finished_at or 0) - asked))
    return f"{statistics.median(times):.0f} / {max(times):.0f}"


def measure_end(end: str, successor: str, store: JobStore, runners: Runners) -> str:
    """A runner ends in the middle of a clip; the job goes on in one that waits, or in the same, started again."""
    job = store.submit({"clips": 1, "steps": 1000})
    first = runners.start("first")
    eventually(lambda: runners.clips(job), seconds=PATIENCE)
    if successor != "first":
        runners.start(successor)
        time.sleep(SETTINGS.lease)  # it may take over from now on
    ended = time.monotonic()
    {"kill -9": first.kill, "SIGTERM": first.terminate}[end]()
    if successor == "first":
        runners.start("first")
    eventually(lambda: len(runners.clips(job)) == 2, seconds=PATIENCE)
    return f"{time.monotonic() - ended:.2f}"


def measure_outage(server: PostgresServer, seconds: float, store: JobStore, runners: Runners) -> str:
    jobs = [store.submit({"clips": 10, "steps": 50}) for _ in range(3)]
    for number in range(4):
        runners.start(f"runner-{number}")
    time.sleep(SETTINGS.lease)
    server.stop()
    time.sleep(seconds)
    server.start()
    completed(store, jobs)
    return str(run_twice(runners))


def completed(store: JobStore, jobs: Sequence[Job]) -> list[Job]:
    eventually(lambda: finished(store, *jobs), seconds=2 * PATIENCE)
    return [store.get(job.id) for job in jobs]


def run_twice(runners: Runners) -> int:
    clips = [(job, index) for job, index, *_ in runners.noted("clip")]
    return len(clips) - len(set(clips))


def percentiles(times: Sequence[float]) -> str:
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return f"{cuts[49]:.1f} / {cuts[98]:.0f}"


def measure(figure: Callable[[JobStore, Runners], str], database: Database) -> str:
    with tempfile.TemporaryDirectory() as folder, closing(JobStore(database.url, SETTINGS)) as store:
        runners = Runners(database.url, Path(folder) / "notes", SETTINGS)
        try:
            return figure(store, runners)
        finally:
            runners.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["sqlite", "postgresql"], help="measure one database")
    only = parser.parse_args().only
    programs = find_postgres() if only != "sqlite" else None
    server = PostgresServer(programs, fsync=True) if programs else None
    if server:
        server.start()
    try:
        Console().print(table_of_figures(server, sqlite=only != "postgresql"))
    finally:
        if server:
            server.remove()


def table_of_figures(server: PostgresServer | None, sqlite: bool) -> Table:
    figures: dict[str, Callable[[JobStore, Runners], str]] = {
        f"submit by {SUBMITTERS} in 2 processes, every key by both: ms, p50 / p99; jobs too many": measure_submit,
        "queued → claimed by an idle runner: ms, p50 / p99": measure_start,
        f"{RUNNERS} runners, {JOBS} jobs of 3 clips: jobs per s; clips run twice": measure_throughput,
        "a running job notices a cancel and ends: ms, p50 / max": measure_cancel,
        "kill -9, another runner goes on: s": partial(measure_end, "kill -9", "second"),
        "kill -9, the same runner, restarted, goes on: s": partial(measure_end, "kill -9", "first"),
        "SIGTERM, another runner goes on: s": partial(measure_end, "SIGTERM", "second"),
    }
    if server:
        for seconds in (3, 9):
            name = f"database stopped for {seconds} s in mid-job: clips run twice"
            figures[name] = partial(measure_outage, server, seconds)

    table = Table("", *(["SQLite"] if sqlite else []), *(["PostgreSQL"] if server else []))
    with Console(stderr=True).status("") as status, tempfile.TemporaryDirectory() as folder:
        for number, (name, figure) in enumerate(figures.items()):
            status.update(name)
            row = [name]
            if sqlite:
                row.append("" if "stopped" in name else measure(figure, Database(f"sqlite:///{folder}/{number}.db")))
            if server:
                row.append(measure(figure, Database(server.new_schema(), server)))
            table.add_row(*row)
    return table


if __name__ == "__main__":
    main()
