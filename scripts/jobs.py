"""The jobs of a server, from its machine: what there is, why one failed, cancel, run again, clear away.

    python scripts/jobs.py list --state failed
    python scripts/jobs.py show video_4c4295d17bedb453ae81a473
    python scripts/jobs.py retry video_4c4295d17bedb453ae81a473

It works on the database and the files themselves, the server running or not, and finds them as the server does: by the
AVATAR_* settings of the environment. Give it the server's.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from sqlalchemy.exc import ArgumentError

from avatar_api.database import OUTAGES
from avatar_api.jobs import (
    FINISHED,
    STATES,
    Job,
    JobNotFailedError,
    JobNotFinishedError,
    JobNotFoundError,
    JobStore,
)
from avatar_api.settings import ServiceSettings
from avatar_api.storage import Storage, StorageError, open_storage

COLORS = {"completed": "green", "failed": "red", "cancelled": "yellow", "in_progress": "cyan", "queued": "default"}
DAY = 24 * 3600
PAGE = 100

console = Console(width=None if sys.stdout.isatty() else 160)  # where it is piped, ids stay whole, too


def list_jobs(store: JobStore, storage: Storage, options: argparse.Namespace) -> int:
    wanted = options.state or STATES
    fitting = (job for job in _newest_first(store, options.client) if job.state in wanted)
    chosen = list(islice(fitting, options.limit))
    if options.json:
        for job in chosen:
            print(json.dumps(_record(job)))
        return 0
    table = Table(
        Column("id", no_wrap=True, min_width=30),
        "client",
        "state",
        "progress",
        "made",
        "waited",
        "took",
        "error",
        box=None,
    )
    for job in chosen:
        table.add_row(
            job.id,
            job.client,
            f"[{COLORS[job.state]}]{job.state}",
            _progress(job),
            _time(job.created_at),
            _seconds(job.created_at, job.started_at),
            _seconds(job.started_at, job.finished_at),
            escape(job.error["code"]) if job.error else "",
        )
    console.print(table)
    counts = store.counts()
    console.print(", ".join(f"{counts.get(state, 0)} {state}" for state in STATES) + " in all")
    return 0


def show(store: JobStore, storage: Storage, options: argparse.Namespace) -> int:
    job = store.get(options.id)
    clips = store.clips(job.id)
    folder = ServiceSettings().job_folder(job.id)
    files = {file.name: file.stat().st_size for file in sorted(folder.glob("*"))}
    if options.json:
        record = _record(job) | {"clips": [asdict(clip) for clip in clips], "folder": str(folder), "files": files}
        print(json.dumps(record))
        return 0
    facts = Table(show_header=False, box=None)
    for name, value in _record(job).items():
        if name not in ("spec", "error") and value not in (None, 0, "", False):
            facts.add_row(name, escape(str(value)))
    console.print(facts)
    for name, value in (("spec", job.spec), ("error", job.error)):
        if value is not None:
            console.print(f"\n[bold]{name}")
            console.print_json(data=value)
    console.print(f"\n[bold]{len(clips)} finished clips, {len(files)} files in {folder}")
    for clip in clips:
        console.print(f"  clip {clip.index}, {clip.result['frames']} frames, at {_time(clip.finished_at)}")
    for file, size in files.items():
        console.print(f"  {file}  {size / 1e6:.1f} MB", highlight=False)
    return 0


def cancel(store: JobStore, storage: Storage, options: argparse.Namespace) -> int:
    return _each(options.ids, lambda job_id: _said_of_cancel(store.cancel(job_id)))


def retry(store: JobStore, storage: Storage, options: argparse.Namespace) -> int:
    def again(job_id: str) -> str:
        url = store.get(job_id).spec.get("request", {}).get("webhook_url")
        store.retry(job_id, url)
        return f"queued, goes on after {len(store.clips(job_id))} finished clips" + (", webhook again" if url else "")

    return _each(options.ids, again)


def purge(store: JobStore, storage: Storage, options: argparse.Namespace) -> int:
    latest = time.time() - options.older_than * DAY
    states = options.state or FINISHED
    old = [
        job for job in store.all() if job.state in states and job.finished_at is not None and job.finished_at < latest
    ]
    total = sum(storage.size(job.id) for job in old)
    print(
        f"{len(old)} jobs that ended more than {options.older_than:g} days ago, {total / 1e6:.1f} MB on this machine."
    )
    if not old:
        return 0
    if not options.yes:
        print("Nothing is deleted yet; --yes deletes them and their files, for good.")
        return 0

    def delete(job_id: str) -> str:
        store.delete(job_id)
        storage.delete(job_id)
        return "deleted"

    return _each([job.id for job in old], delete)


def _each(ids: Sequence[str], act: Callable[[str], str]) -> int:
    """Do it to every job, whatever becomes of the others. The exit status: 1 if it could not be done to all."""
    failed = 0
    for job_id in ids:
        try:
            print(f"{job_id}: {act(job_id)}")
        except (JobNotFoundError, JobNotFailedError, JobNotFinishedError, StorageError, ValueError) as error:
            print(f"error: {job_id}: {error}", file=sys.stderr)
            failed = 1
    return failed


def _said_of_cancel(job: Job) -> str:
    if job.state in FINISHED:
        return job.state if job.state == "cancelled" else f"is {job.state} already, and stays so"
    return "its runner stops at the next denoising step"


def _newest_first(store: JobStore, client: str | None) -> Iterator[Job]:
    page: list[Job] = []
    while page := store.page(PAGE, page[-1].id if page else None, client=client):
        yield from page


def _record(job: Job) -> dict[str, Any]:
    """A job as JSON; times as ISO 8601, in UTC."""
    times = ("created_at", "started_at", "finished_at")
    return {name: _time(value) if name in times and value else value for name, value in asdict(job).items()}


def _progress(job: Job) -> str:
    told = job.progress or {}
    if job.state != "in_progress":
        return ""
    where = f" clip {told['clip']}/{told['clips']}" if "clip" in told else ""
    return f"{told.get('percent', 0):g} % {told.get('stage', '')}{where}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _seconds(begin: float | None, end: float | None) -> str:
    return "" if begin is None or end is None else f"{end - begin:.0f} s"


def _days(text: str) -> float:
    days = float(text)
    if not days >= 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of days; 0 or more is.")
    return days


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of jobs; 1 or more is.")
    return count


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(act: Callable[..., int], name: str, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(act=act)
        return added

    listed = command(list_jobs, "list", "Jobs, the newest first.")
    listed.add_argument("--state", action="append", choices=STATES, help="only these; may be given several times")
    listed.add_argument("--client", help="only this client's: the first 16 hex digits of its key's sha256")
    listed.add_argument("--limit", type=_count, default=50, metavar="N", help="at most so many (%(default)s)")
    listed.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")

    shown = command(show, "show", "All about one job: what was asked for, its clips, its error, its files.")
    shown.add_argument("id", metavar="ID")
    shown.add_argument("--json", action="store_true", help="as one JSON object")

    stopped = command(cancel, "cancel", "Stop jobs: waiting ones at once, running ones at their next denoising step.")
    stopped.add_argument("ids", metavar="ID", nargs="+")

    again = command(
        retry,
        "retry",
        "Put failed or cancelled jobs back into the queue: they go on after their last finished clip, and their "
        "webhooks are sent again.",
    )
    again.add_argument("ids", metavar="ID", nargs="+")

    purged = command(purge, "purge", "Delete jobs that ended long ago, with their files. Shows how many, unless --yes.")
    purged.add_argument("--older-than", type=_days, required=True, metavar="DAYS", help="since they ended")
    purged.add_argument("--state", action="append", choices=FINISHED, help="only these; may be given several times")
    purged.add_argument("--yes", action="store_true", help="delete them")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        settings = ServiceSettings()
        if settings.database_url is None and not (settings.home / "jobs.db").exists():
            raise SystemExit(
                f"error: there is no database {settings.home / 'jobs.db'}; set AVATAR_HOME or AVATAR_DATABASE_URL as "
                "the server has them."
            )
        status: int = options.act(JobStore(settings.database), open_storage(settings), options)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise SystemExit(f"error: AVATAR_{str(wrong['loc'][0]).upper()}: {wrong['msg']}.") from None
    except OUTAGES as error:
        raise SystemExit(f"error: the database does not answer: {error.orig}") from None
    except ArgumentError:
        raise SystemExit(
            "error: AVATAR_DATABASE_URL is no SQLAlchemy URL; sqlite:///FILE and postgresql://… are."
        ) from None
    except (JobNotFoundError, StorageError, ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    return status


if __name__ == "__main__":
    sys.exit(main())
