"""`bentoml serve` with a stand-in for the pipeline, and what its two processes take: memory, open files, disk."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import psutil  # type: ignore[import-untyped]

from models.store import Model, write_model_yaml

REPOSITORY = Path(__file__).parent.parent
START_SECONDS = END_SECONDS = 600
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


class Served:
    """A context manager: within it the service runs at `url`."""

    def __init__(self, home: Path, runpod: Mapping[str, str] | None = None, **settings: object) -> None:
        """runpod: what RunPod sets in the environment, for `scripts/start.py` to start it there; settings: of the
        service, by their names."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.home, self.temporary = (
            home,
            Path(tempfile.mkdtemp(prefix="served-")),
        )  # short: names of sockets are limited
        self.url = f"http://127.0.0.1:{self._port}"
        self._command = [sys.executable, "-m", "bentoml", "serve", "tests.stand_in_service:AvatarApi"]
        self._command += ["--host", "127.0.0.1", "--port", str(self._port)]
        if runpod is not None:
            self._command = [sys.executable, "-m", "scripts.start", "tests.stand_in_service:AvatarApi"]
        self._environment = {
            **os.environ,
            "PORT": str(self._port),
            **(runpod or {}),
            "BENTOML_HOME": str(home / "bentoml"),
            "BENTOML_CONFIG": str(REPOSITORY / "configuration.yaml"),
            "BENTOML_DO_NOT_TRACK": "1",
            "AVATAR_GRPC_PORT": "0",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.temporary),
        } | {f"AVATAR_{name.upper()}": str(value) for name, value in {"auth": "off", "home": home, **settings}.items()}

    def _start(self) -> None:
        for name in MODELS:  # BentoML wants them there; nobody reads them
            folder = self.home / "bentoml" / "models" / name / "1"
            folder.mkdir(parents=True)
            write_model_yaml(folder, Model(name, "1", name, None, None, "runtime", ()))
            (folder.parent / "latest").write_text("1")
        with (self.home / "log").open("wb") as output:
            self._process = subprocess.Popen(
                self._command, cwd=REPOSITORY, env=self._environment, stdout=output, stderr=output
            )

    def run(self) -> int:
        """Start it, in the place of entering it, and wait until it ends by itself. The exit status."""
        self._start()
        try:
            return self._process.wait(END_SECONDS)
        finally:
            self.__exit__()

    def __enter__(self) -> Self:
        self._start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        self._processes = {role: self._find(role) for role in ("avatar_api", "avatar_runner")}
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
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.2)

    def alive(self) -> bool:
        """Are both processes still those that started?"""
        return all(process.is_running() for process in self._processes.values())

    def kill(self, role: str) -> None:
        """The process gets no chance to end well; BentoML starts another."""
        self._processes[role].kill()

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
            return httpx.get(f"{self.url}/ping", timeout=5).status_code == 200
        return False

    def _find(self, role: str) -> psutil.Process:
        for process in psutil.Process(self._process.pid).children(recursive=True):
            if role in " ".join(process.cmdline()):
                return process
        raise AssertionError(f"{role} has no process")
