"""`bentoml serve`, with a stand-in for the pipeline or for real, and what its processes take: memory, files, disk."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import httpx
import psutil  # type: ignore[import-untyped]

from avatar_api.jobs import JobStore
from models.store import Model, write_model_yaml
from tests.waiting import PATIENCE, eventually

REPOSITORY = Path(__file__).parent.parent
MODELS = ("wan2.1-i2v-14b-480p", "infinitetalk", "chinese-wav2vec2-base")
MB = 1e6


@dataclass(frozen=True)
class Footprint:
    """What a process holds on to."""

    resident: float
    """MB."""
    peak: float
    """MB: the most that was resident at once since the process began, or since `Served.forget_peak`."""
    open_files: int
    """Descriptors, sockets included."""
    threads: int

    @classmethod
    def of(cls, process: psutil.Process) -> "Footprint":
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        resident, peak = (
            next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024 / MB
            for name in ("VmRSS", "VmHWM")
        )
        return cls(resident, peak, process.num_fds(), process.num_threads())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """A context manager: within it the service runs at `url`."""

    def __init__(
        self,
        home: Path,
        runpod: Mapping[str, str] | None = None,
        bento_home: Path | None = None,
        environment: Mapping[str, str] = {},
        **settings: object,
    ) -> None:
        """runpod: what RunPod sets in the environment, for `scripts/start.py` to start it there; bento_home: a
        BENTOML_HOME whose models are served, in place of the stand-in; environment: more of that; settings: of the
        service, by their names."""
        port = str(free_port())
        self.home = home
        self.temporary = Path(tempfile.mkdtemp(prefix="served-"))  # short: names of sockets are limited
        self.url = f"http://127.0.0.1:{port}"
        self._stands_in = bento_home is None
        service = "tests.stand_in_service:AvatarApi" if self._stands_in else "service:AvatarApi"
        self._command = [sys.executable, "-m", "bentoml", "serve", service, "--host", "127.0.0.1", "--port", port]
        if runpod is not None:
            self._command = [sys.executable, "-m", "scripts.start", service]
        self._environment = {
            **os.environ,
            "PORT": port,
            **(runpod or {}),
            "BENTOML_HOME": str(bento_home or home / "bentoml"),
            "BENTOML_CONFIG": str(REPOSITORY / "configuration.yaml"),
            "BENTOML_DO_NOT_TRACK": "1",
            "AVATAR_GRPC_PORT": "0",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.temporary),
        } | {f"AVATAR_{name.upper()}": str(value) for name, value in {"auth": "off", "home": home, **settings}.items()}
        self._environment |= environment

    def _start(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        for name in MODELS if self._stands_in else ():  # BentoML wants them there; nobody reads them
            folder = self.home / "bentoml" / "models" / name / "1"
            folder.mkdir(parents=True)
            write_model_yaml(folder, Model(name, "1", name, None, None, "runtime", ()))
            (folder.parent / "latest").write_text("1")
        with (self.home / "log").open("wb") as output:
            self._process = subprocess.Popen(
                self._command, cwd=REPOSITORY, env=self._environment, stdout=output, stderr=output
            )

    def run(self, seconds: float = PATIENCE) -> int:
        """Start it, in the place of entering it, and wait until it ends by itself. The exit status."""
        self._start()
        try:
            return self._process.wait(seconds)
        finally:
            self.__exit__()

    def __enter__(self) -> Self:
        self._start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        self._processes = {role: self.process(role) for role in ("avatar_api", "avatar_runner")}
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        shutil.rmtree(self.temporary)

    @property
    def log(self) -> str:
        return (self.home / "log").read_text()

    def wait_until_ready(self) -> None:
        eventually(lambda: self._ready() or self._process.poll() is not None, "it is not ready", seconds=PATIENCE)
        assert self._process.poll() is None, self.log

    @cached_property
    def store(self) -> JobStore:
        return JobStore(f"sqlite:///{self.home / 'jobs.db'}")

    def alive(self) -> bool:
        """Are both processes still those that started?"""
        return all(process.is_running() for process in self._processes.values())

    def kill(self, role: str) -> None:
        """The process gets no chance to end well; BentoML starts another."""
        self.process(role).kill()

    def footprint(self, role: str = "avatar_api") -> Footprint:
        return Footprint.of(self._processes[role])

    def forget_peak(self) -> None:
        Path(f"/proc/{self._processes['avatar_api'].pid}/clear_refs").write_text("5")

    def files(self) -> int:
        """How many files there are, of jobs and temporary ones."""
        folders = (self.home / "jobs", self.temporary)
        walked = (Path(at, name) for folder in folders for at, _, names in os.walk(folder) for name in names)
        return sum(path.is_file() for path in walked)

    def _ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/ping", timeout=5, verify=False).status_code == 200  # noqa: S501 - no TLS here
        return False

    def process(self, role: str) -> psutil.Process:
        """The one of the two services that runs now."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            if role in " ".join(process.cmdline()):
                return process
        raise AssertionError(f"{role} has no process")
