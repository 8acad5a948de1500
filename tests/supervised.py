"""The product in processes that can be killed hundreds of times in minutes, and come up again.

    python -m tests.supervised PORT NOTES CLEAN     with AVATAR_HOME and the other settings in the environment

runs an API process and some runners, and starts again what has died: a supervisor that imports everything once and
forks, since importing takes a runner seconds. The API is avatar_api's over uvicorn, a runner is avatar_api.worker with
a stand-in for the pipeline. `Supervised` starts all that from a test, and knows who is who.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil  # type: ignore[import-untyped]
import uvicorn

from avatar_api import housekeeping
from avatar_api.auth import Authenticated
from avatar_api.bentoml_patches import adapt_forms
from avatar_api.housekeeping import Housekeeper
from avatar_api.http import OneErrorShape, create_app
from avatar_api.jobs import JobSettings, JobStore, runner_name
from avatar_api.routes import create_router
from avatar_api.settings import ServiceSettings
from avatar_api.shutdown import Shutdown
from avatar_api.storage import Storage, open_storage
from avatar_api.videos import describe
from avatar_api.webhooks import Webhooks, WebhookTimes
from avatar_api.worker import work
from tests.served import free_port
from tests.stand_in import StandIn
from tests.waiting import PATIENCE, eventually

REPOSITORY = Path(__file__).parent.parent
RUNNERS = 2
JOBS = JobSettings(beat=0.2, poll=0.05, attempts=20)
"""Attempts: kills by chance hit one clip more often than the three times after which a job counts as deadly."""
WEBHOOKS = WebhookTimes(claim=3, poll=0.1, retries=(0.5,) * 20)


@dataclass
class Backend:
    settings: ServiceSettings
    store: JobStore
    storage: Storage


def serve(settings: ServiceSettings, port: int, clean_seconds: float) -> None:
    """An API process, put together as service.py does it."""
    backend = Backend(settings, JobStore(settings.database, JOBS), open_storage(settings))
    Webhooks(
        backend.store, settings, lambda job: describe(job, settings.keep_days, None).model_dump(), WEBHOOKS
    ).start()
    housekeeping.EVERY_SECONDS = clean_seconds
    Housekeeper(backend.store, backend.storage, settings).start()

    async def ready() -> bool:
        return True

    adapt_forms(settings.max_upload_bytes)
    app: Any = create_app(ready, [create_router(lambda: backend)])
    app = OneErrorShape(Authenticated(app), settings.max_upload_bytes)
    uvicorn.run(app, port=port, log_level="warning", lifespan="off")


def run_jobs(settings: ServiceSettings, notes: Path) -> None:
    shutdown = Shutdown()
    signal.signal(signal.SIGTERM, lambda *_: shutdown.ask(0))
    owner = runner_name(settings.home, "cpu")
    stand_in: Any = StandIn(notes)
    work(JobStore(settings.database, JOBS), stand_in, open_storage(settings), owner, shutdown, lambda memory: stand_in)


def supervise(port: int, notes: Path, clean_seconds: float) -> None:
    """Fork, and fork again whoever is killed, until SIGTERM or an error. Tells who is who: a line `<role> <pid>`."""
    settings = ServiceSettings()
    roles: dict[int, str] = {}

    def start(role: str) -> None:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            try:
                serve(settings, port, clean_seconds) if role == "api" else run_jobs(settings, notes)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        roles[child] = role
        print(role, child, flush=True)

    def end(*_: object) -> None:
        for child in roles:
            os.kill(child, signal.SIGKILL)
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    for role in ("api", *(f"runner-{number}" for number in range(RUNNERS))):
        start(role)
    while True:
        child, status = os.wait()
        role = roles.pop(child)
        if not os.WIFSIGNALED(status):
            end()
        start(role)


class Supervised:
    """A context manager: within it the product runs at `url`."""

    def __init__(self, home: Path, clean_seconds: float = housekeeping.EVERY_SECONDS, **settings: object) -> None:
        """clean_seconds: how often the housekeeper comes; settings: of the service, by their names."""
        self._clean_seconds = clean_seconds
        self._port = free_port()
        self.home, self.notes, self.temporary = home, home / "notes", home / "temporary"
        self.url = f"http://127.0.0.1:{self._port}"
        values = {"auth": "off", "home": home, **settings}
        self.settings = ServiceSettings(**values)  # type: ignore[arg-type]
        self._environment = {f"AVATAR_{name.upper()}": str(value) for name, value in values.items()}
        self._pids: dict[str, int] = {}

    def __enter__(self) -> Self:
        self.temporary.mkdir(parents=True)
        self.notes.touch()
        environment = {**os.environ, **self._environment, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.supervised", str(self._port), str(self.notes)]
        command.append(str(self._clean_seconds))
        self._log = (self.home / "log").open("wb")
        self._process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        threading.Thread(target=self._listen, daemon=True).start()
        eventually(lambda: self._answers() or self._process.poll() is not None, "nothing answers", seconds=PATIENCE)
        self.check()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def check(self) -> None:
        """Fails if a process ended that nobody killed."""
        assert self._process.poll() is None, self.log

    @property
    def log(self) -> str:
        return (self.home / "log").read_text()

    def process(self, role: str) -> psutil.Process:
        return psutil.Process(self._pids[role])

    def kill(self, role: str) -> bool:
        """kill -9 a role's process; False if it is dead just now."""
        with contextlib.suppress(KeyError, ProcessLookupError):
            os.kill(self._pids.pop(role), signal.SIGKILL)
            return True
        return False

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            role, pid = line.split()
            self._pids[role] = int(pid)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1):
            return True
        return False


if __name__ == "__main__":
    tempfile.tempdir = os.environ["TMPDIR"]
    supervise(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
