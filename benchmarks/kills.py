"""Do jobs survive? Clients get their videos while API and runners are killed with -9 at random, on both databases.

    python -m benchmarks.kills [--jobs 200] [--kills 500] [--only sqlite|postgresql]

A supervisor starts again what is dead; the clients send a request again, with the same Idempotency-Key, until it is
answered. In the end each job has to have ended once, each video has to be, to the byte, the one that comes when
nobody disturbs, no clip may have begun again once it was recorded, and no file may be left that nobody deletes. The
pipeline is a stand-in (tests/stand_in.py); database, files, encoder, HTTP and webhooks are the real ones. Exits non-
zero if a promise is broken. 500 kills take some minutes per database.
"""

import argparse
import io
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from avatar_api.housekeeping import ORPHAN_SECONDS, Housekeeper
from avatar_api.jobs import JobStore
from avatar_api.storage import Storage
from tests.conftest import REPOSITORY
from tests.databases import PostgresServer, find_postgres
from tests.stand_in import FRAMES
from tests.supervised import RUNNERS, Supervised
from tests.waiting import PATIENCE, eventually

CLIENTS = 8
BETWEEN_KILLS = 0.3  # seconds, on average
SAME_CLOCK = 0.01  # seconds: SQLite's clock counts in ms, and PostgreSQL's is read when the statement arrives
PICTURE = REPOSITORY / "examples" / "portrait.png"
KINDS = [{"seed": seed, "steps": 10, "clips": clips} for seed, clips in enumerate((1, 3, 5, 7, 6, 4))]


@dataclass(frozen=True)
class Figures:
    """What came of it; but for the first ones and `begun_again`, all have to be 0."""

    jobs: int
    kills_of_the_api: int
    kills_of_runners: int
    requests_repeated: int
    clips: int
    begun_again: int
    """Clips that a kill interrupted."""
    webhooks_repeated: int
    seconds: float
    not_completed: int
    submitted_twice: int
    ended_twice: int
    """Jobs with webhooks of several ends."""
    never_told: int
    wrong_videos: int
    recorded_and_begun_again: int
    pieces_left: int
    """Files in the folders of finished jobs that are neither inputs nor the video, a minute later."""
    left_after_a_day: int
    """Folders without a job, a day later."""
    left_after_deleting: int
    """Files, when all videos are deleted."""

    @property
    def broken(self) -> list[str]:
        names = [field.name for field in fields(self)]
        return [name for name in names[names.index("not_completed") :] if getattr(self, name)]


class Receiver(ThreadingHTTPServer):
    """Notes the webhooks that it gets: (job, event)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hook)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        self.received: list[tuple[str, str]] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class _Hook(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        event = self.headers["webhook-id"]
        self.server.received.append((event.removeprefix("msg_").rpartition("_")[0], event))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def voice(clips: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(clips).normal(0, 0.1, (clips * FRAMES - 3) * 640)
    soundfile.write(file, noise, 16000, format="WAV")
    return file.getvalue()


class Client:
    """Asks until it is answered."""

    def __init__(self, url: str, stopped: threading.Event) -> None:
        self._url = f"{url}/v1/videos"
        self._http = httpx.Client(timeout=30)
        self._stopped = stopped
        self.repeated = 0

    def ask(self, method: str, path: str, **what: Any) -> httpx.Response:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                answer = self._http.request(method, f"{self._url}{path}", **what)
                answer.raise_for_status()
                return answer
            except httpx.TransportError:
                assert time.monotonic() < deadline, "no answer"
                assert not self._stopped.is_set()
                self.repeated += 1
                time.sleep(0.05)

    def create(self, key: str, kind: dict[str, int], webhook_url: str | None = None) -> str:
        form = {"prompt": key, "size": "64x64", "seed": str(kind["seed"]), "steps": str(kind["steps"])}
        form |= {"webhook_url": webhook_url} if webhook_url else {}
        files = {"input_reference": PICTURE.read_bytes(), "audio": voice(kind["clips"])}
        return str(self.ask("POST", "", data=form, files=files, headers={"Idempotency-Key": key}).json()["id"])

    def download(self, video: str) -> bytes:
        deadline = time.monotonic() + PATIENCE
        while (job := self.ask("GET", f"/{video}").json())["status"] in ("queued", "in_progress"):
            assert time.monotonic() < deadline, job
            time.sleep(0.1)
        return self.ask("GET", f"/{video}/content").content if job["status"] == "completed" else b""


def prove(
    folder: Path,
    database_url: str | None,
    jobs: int,
    kills: int,
    seed: int = 0,
    on_kill: Callable[[int], object] = lambda _: None,
) -> Figures:
    """Run a job of each kind undisturbed, then jobs under kills. on_kill: told how many kills there were."""
    settings: dict[str, Any] = {"allowed_hosts": "127.0.0.1"} | ({"database_url": database_url} if database_url else {})
    generator, killed, stopped = random.Random(seed), Counter[str](), threading.Event()  # noqa: S311 - no secret
    with Receiver() as receiver, Supervised(folder, **settings) as product:
        started = time.monotonic()
        clients = [Client(product.url, stopped) for _ in range(CLIENTS)]
        kinds = [clients[0].create(f"kind-{number}", kind) for number, kind in enumerate(KINDS)]
        right = [clients[0].download(video) for video in kinds]

        def order(number: int) -> tuple[str, bool]:
            """One client's job: the video, and whether it is the right one."""
            while killed.total() < kills * number / jobs:  # from the first kill to the last, there are jobs
                assert not stopped.wait(0.02)
            client, kind = clients[number % CLIENTS], number % len(KINDS)
            video = client.create(f"job-{number}", KINDS[kind], receiver.url)
            return video, client.download(video) == right[kind]

        with ThreadPoolExecutor(CLIENTS) as pool:
            ordered = [pool.submit(order, number) for number in range(jobs)]
            try:
                while killed.total() < kills:
                    time.sleep(generator.expovariate(1 / BETWEEN_KILLS))
                    if generator.random() < 0.5:
                        killed["api"] += product.kill("api")
                    else:
                        killed["runner"] += product.kill(f"runner-{generator.randrange(RUNNERS)}")
                    on_kill(killed.total())
                    product.check()
                    for failed in [order for order in ordered if order.done()]:
                        failed.result()
                made = dict(order.result() for order in ordered)
            finally:
                stopped.set()
        with closing(JobStore(product.settings.database)) as store:
            eventually(lambda: all(job.webhook_url is None for job in store.all()), seconds=PATIENCE)
            seconds = time.monotonic() - started
            begun = [line.split() for line in product.notes.read_text().splitlines()]
            recorded = {
                (job.spec["request"]["prompt"], clip.index): clip.finished_at
                for job in store.all()
                for clip in store.clips(job.id)
            }
            events = set(receiver.received)
            again = [key for *key, at in begun if float(at) > recorded[key[0], int(key[1])] + SAME_CLOCK]
            states = Counter(job.state for job in store.all())
            told = Counter(job for job, _ in events)
            left = pieces(product.home, store)
            _a_day_later(product, store)
            orphans = set(_folders(product.home)) - {job.id for job in store.all()}
            for video in (*kinds, *made):
                clients[0].ask("DELETE", f"/{video}")
            return Figures(
                jobs=len(made),
                kills_of_the_api=killed["api"],
                kills_of_runners=killed["runner"],
                requests_repeated=sum(client.repeated for client in clients),
                clips=len(recorded),
                begun_again=len(begun) - len(recorded),
                webhooks_repeated=len(receiver.received) - len(events),
                seconds=round(seconds, 1),
                not_completed=jobs + len(KINDS) - states["completed"],
                submitted_twice=states.total() - jobs - len(KINDS),
                ended_twice=sum(ends > 1 for ends in told.values()),
                never_told=len(set(made) - set(told)),
                wrong_videos=sum(not is_right for is_right in made.values()),
                recorded_and_begun_again=len(again),
                pieces_left=left,
                left_after_a_day=len(orphans),
                left_after_deleting=sum(1 for _ in files_in(product.home / "jobs", product.temporary)),
            )


def _folders(home: Path) -> list[str]:
    return [folder.name for folder in (home / "jobs").iterdir()]


def files_in(*folders: Path) -> Iterator[Path]:
    return (file for folder in folders for file in folder.rglob("*") if file.is_file())


def pieces(home: Path, store: JobStore) -> int:
    """How many files there are in the folders of finished jobs that are neither inputs nor the video."""
    kept = {job.id: {*job.spec["files"], job.result["video"]} for job in store.all() if job.result}
    return sum(file.name not in kept[file.parent.name] for file in files_in(home / "jobs") if file.parent.name in kept)


def _a_day_later(product: Supervised, store: JobStore) -> None:
    """The housekeeper comes when what nobody writes to any more is a day old."""
    old = time.time() - ORPHAN_SECONDS - 1
    for path in (product.home / "jobs").rglob("*"):
        os.utime(path, (old, old))
    for path in (product.home / "jobs").iterdir():
        os.utime(path, (old, old))
    Housekeeper(store, Storage(product.settings), product.settings).clean()


@contextmanager
def databases(only: str | None) -> Iterator[dict[str, str | None]]:
    """By name, the addresses of new ones."""
    programs = find_postgres() if only != "sqlite" else None
    server = PostgresServer(programs) if programs else None
    if server:
        server.start()
    try:
        found: dict[str, str | None] = {"SQLite": None} if only != "postgresql" else {}
        yield found | ({"PostgreSQL": server.new_schema()} if server else {})
    finally:
        if server:
            server.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200, help="%(default)s")
    parser.add_argument("--kills", type=int, default=500, help="on each database (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (%(default)s)")
    parser.add_argument("--only", choices=["sqlite", "postgresql"], help="one database")
    options = parser.parse_args()
    measured: dict[str, Figures] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        databases(options.only) as addresses,
        Progress(console=Console(stderr=True)) as progress,
    ):
        for name, address in addresses.items():
            task = progress.add_task(f"Kills, {name}", total=options.kills)
            measured[name] = prove(
                Path(folder) / name,
                address,
                options.jobs,
                options.kills,
                options.seed,
                lambda done, task=task: progress.update(task, completed=done),  # type: ignore[misc]
            )
    table = Table("", *measured)
    for field in fields(Figures):
        figures = (str(getattr(figures, field.name)) for figures in measured.values())
        table.add_row(field.name.replace("_", " "), *figures)
    Console().print(table)
    if any(figures.broken for figures in measured.values()):
        raise SystemExit("A promise is broken.")


if __name__ == "__main__":
    main()
