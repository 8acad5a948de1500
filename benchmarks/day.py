"""A day of jobs in fast time: do memory, files and rows stay flat?

    python -m benchmarks.day [--jobs 4000]

A client keeps a few videos in the making, downloads each and forgets it; the server's retention deletes them. A day's
worth of jobs goes through in minutes, since the pipeline is a stand-in, and retention and housekeeping are as much
faster: what is kept for a week in earnest is kept for KEEP_SECONDS here, and cleaning up comes every EVERY_SECONDS.
All else is the product. Leaves day.svg and day.csv in the output folder, prints what grew, and exits non-zero if
anything did.
"""

import argparse
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from avatar_api.jobs import JobStore
from benchmarks.kills import KINDS, Client
from tests.supervised import Supervised

KEEP_SECONDS, EVERY_SECONDS = 20.0, 2.0
CLIENTS = 6
SAMPLES = 80
SETTLED = 0.25  # of the jobs: by then everything was used, and retention has begun
GROWTH_MB, GROWTH_FILES = 15.0, 4.0
"""From there to the end, by the line through all samples."""
MB = 1e6
NAMES = {
    "api": "MB resident, API",
    "runner": "MB resident, a runner",
    "api_files": "open files, API",
    "runner_files": "open files, a runner",
    "files": "files on disk per job in the database",
    "rows": "jobs in the database",
    "database": "MB of the database",
}


@dataclass(frozen=True)
class Sample:
    """After so many jobs. Memory in MB, resident."""

    jobs: int
    api: float
    runner: float
    api_files: int
    runner_files: int
    files: float
    """On disk, for each job in the database: how many of those there are depends on how quick the machine is."""
    rows: int
    database: float
    """MB of the SQLite files."""


def take(product: Supervised, store: JobStore, jobs: int) -> Sample:
    api, runner = product.process("api"), product.process("runner-0")
    files = sum(len(names) for _, _, names in os.walk(product.home / "jobs"))  # jobs go meanwhile
    rows = sum(store.counts().values())
    database = sum(path.stat().st_size for path in product.home.glob("jobs.db*")) / MB
    resident = (api.memory_info().rss / MB, runner.memory_info().rss / MB)
    return Sample(jobs, *resident, api.num_fds(), runner.num_fds(), files / max(1, rows), rows, database)


def live(folder: Path, jobs: int, every: int, console: Console) -> list[Sample]:
    """Run so many jobs → what is held after `every` so many."""
    taken: list[Sample] = []
    with (
        Supervised(folder, clean_seconds=EVERY_SECONDS, keep_days=KEEP_SECONDS / 86400) as product,
        closing(JobStore(product.settings.database)) as store,
    ):
        local = threading.local()

        def order(number: int) -> None:
            if not hasattr(local, "client"):
                local.client = Client(product.url, threading.Event())
            client: Client = local.client
            assert client.download(client.create(f"job-{number}", KINDS[0] | {"seed": number}))

        with ThreadPoolExecutor(CLIENTS) as pool:
            batches = [range(jobs)[start : start + every] for start in range(0, jobs, every)]
            for batch in track(batches, description=f"{jobs} jobs", console=console):
                list(pool.map(order, batch))
                taken.append(take(product, store, batch[-1] + 1))
    return taken


def growth(samples: list[Sample], name: str) -> tuple[float, float]:
    """At SETTLED, and how much more at the end: by the straight line that is nearest to all samples from there on."""
    settled = [sample for sample in samples if sample.jobs >= SETTLED * samples[-1].jobs]
    done = [sample.jobs for sample in settled]
    slope, start = np.polyfit(done, [getattr(sample, name) for sample in settled], 1)
    return float(start + slope * done[0]), float(slope * (done[-1] - done[0]))


def plot(samples: list[Sample], path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    memory, disk = figure.subplots(2, 1, sharex=True)
    done = [sample.jobs for sample in samples]
    for axes, names in ((memory, ("api", "runner")), (disk, ("rows", "api_files", "runner_files", "files"))):
        for name in names:
            axes.plot(done, [getattr(sample, name) for sample in samples], label=NAMES[name], linewidth=1)
        axes.set(ylim=(0, 1.1 * axes.get_ylim()[1]), xlim=(0, None))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    memory.set(ylabel="MB")
    disk.set(xlabel="jobs")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=4000, help="%(default)s")
    parser.add_argument("--output", type=Path, default=Path("out"), metavar="DIR", help="%(default)s")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    console, started = Console(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        samples = live(Path(folder), options.jobs, max(1, options.jobs // SAMPLES), Console(stderr=True))
    minutes = (time.monotonic() - started) / 60
    plot(samples, options.output / "day.svg")
    with (options.output / "day.csv").open("w") as log:
        log.write(",".join(field.name for field in fields(Sample)) + "\n")
        log.writelines(",".join(map(str, astuple(sample))) + "\n" for sample in samples)
    table = Table(f"{options.jobs} jobs in {minutes:.0f} min", f"after {SETTLED:.0%}", "growth from there on")
    grown = {name: growth(samples, name) for name in NAMES}
    for name, (at_first, more) in grown.items():
        table.add_row(NAMES[name], f"{at_first:.1f}", f"{more:+.1f}")
    console.print(table)
    limits = {name: GROWTH_MB if "MB" in NAMES[name] else GROWTH_FILES for name in NAMES if name != "rows"}
    if any(grown[name][1] > limit for name, limit in limits.items()):
        raise SystemExit("Something grows.")


if __name__ == "__main__":
    main()
