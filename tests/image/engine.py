"""podman in a storage of the tests' own, a base image that needs no registry, and containers of the image under test.

What does not change lies in AVATAR_TEST_CACHE (~/.cache/avatar-api-test): the base image, torch's wheel, and the layers
of earlier builds. It may be deleted at any time.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from tests.conftest import REPOSITORY
from tests.served import free_port

CACHE = Path(os.environ.get("AVATAR_TEST_CACHE") or "~/.cache/avatar-api-test").expanduser()
BASE = "localhost/avatar-test-base"
PACKAGES = "podman buildah skopeo runc debootstrap docker-registry"
READY = "✅ Container Ready"
START_SECONDS = 600

# Without systemd and cgroups of version 2, podman's own defaults do not work; with them, these do too.
CONTAINERS = """
[containers]
netns = "host"
default_ulimits = ["nofile=8192:8192", "nproc=4096:4096"]
volumes = [{volumes}]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
STORAGE = """
[storage]
driver = "overlay"
runroot = "{run}"
graphroot = "{storage}"
"""


@dataclass(frozen=True)
class Engine:
    """podman, with files that say where its storage is and what its containers see of this machine."""

    folder: Path

    @classmethod
    def set_up(
        cls, folder: Path, storage: Path = CACHE / "storage", run: Path = Path("/run/avatar-api-test")
    ) -> "Engine":
        """storage, run: folders for its images and for what ends with this machine."""
        for program in PACKAGES.split():
            if shutil.which(program) is None and program != "runc":
                pytest.fail(f"{program} is not installed: apt-get install {PACKAGES}")
        wheels = CACHE / "wheels"
        if not list(wheels.glob("torch-*.whl")):  # uv shall take the build that pip takes here, not CUDA's
            download = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "-d",
                str(wheels),
                "torch==2.13.0",
            ]
            subprocess.run(download, check=True)
        # In a build: this machine's certificates, and the wheel. They do not end up in the image.
        (folder / "uv.toml").write_text(f'system-certs = true\nfind-links = ["{wheels}"]\n')
        (folder / "pip.conf").write_text("[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n")
        mounts = ["/etc/ssl/certs:/etc/ssl/certs:ro", f"{wheels}:{wheels}:ro"]
        mounts += [f"{folder}/uv.toml:/etc/uv/uv.toml:ro", f"{folder}/pip.conf:/etc/pip.conf:ro"]
        (folder / "building.conf").write_text(CONTAINERS.format(volumes=", ".join(f'"{mount}"' for mount in mounts)))
        (folder / "running.conf").write_text(CONTAINERS.format(volumes=""))
        (folder / "storage.conf").write_text(STORAGE.format(storage=storage, run=run))
        engine = cls(folder)
        engine.import_base()
        return engine

    def environment(self, building: bool = False, more: Mapping[str, str] = {}) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CONTAINERS_CONF": str(self.folder / ("building.conf" if building else "running.conf")),
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
            "AVATAR_BASE_IMAGE": BASE,
            "BENTOML_DO_NOT_TRACK": "1",
            **more,
        }

    def run(
        self, *command: object, building: bool = False, cwd: Path = REPOSITORY, variables: Mapping[str, str] = {}
    ) -> str:
        """What a command prints, on both streams. Raises if it fails."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env=self.environment(building, variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}"
        return done.stdout

    def import_base(self) -> None:
        """Debian's Python, in the place of python:3.11-slim-bookworm."""
        archive = CACHE / "base.tar"
        if not archive.exists():
            root = self.folder / "root"
            include = "--include=ca-certificates,python3,python3-pip,python3-venv"
            self.run("debootstrap", "--variant=minbase", include, "bookworm", root)
            (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()  # python:3.11-slim has no such thing
            self.run(
                "tar", "-C", root, "--exclude=./var/cache/apt/archives/*.deb", "-cf", self.folder / "base.tar", "."
            )
            shutil.rmtree(root)
            shutil.move(self.folder / "base.tar", archive)
        if BASE not in self.run("podman", "image", "ls", "--format", "{{.Repository}}").splitlines():
            path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            self.run("podman", "import", "--change", f"ENV {path}", archive, BASE)

    def refused(self, image: str, *options: object, command: tuple[str, ...] = (), status: int = 1) -> str:
        """What a container says that ends by itself with an error."""
        run = ["podman", "run", "--rm", "--network", "none", *map(str, options), image, *command]
        done = subprocess.run(run, env=self.environment(), capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stderr


def copy_checkout(folder: Path) -> None:
    """The repository as it is here, but for what git ignores and the tests."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=REPOSITORY, capture_output=True, check=True).stdout.decode().split("\0"):
        if name and (REPOSITORY / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)


@dataclass
class Container:
    """One that serves, on ports of its own on loopback."""

    engine: Engine
    name: str
    port: int
    grpc_port: int
    log_file: Path
    process: "subprocess.Popen[bytes]"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait_for(self, said: str, times: int = 1) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.log.count(said) < times:
            assert self.process.poll() is None and "[CRITICAL]" not in self.log, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.2)

    def execute(self, command: str) -> str:
        return self.engine.run("podman", "exec", self.name, "bash", "-c", command)

    def runner(self) -> Any:
        """The process that holds the models, as this machine sees it."""
        first = int(self.engine.run("podman", "inspect", "--format", "{{.State.Pid}}", self.name))
        children = psutil.Process(first).children(recursive=True)
        return next(child for child in children if "avatar_runner" in child.cmdline())

    def stop(self, seconds: int = 60) -> int:
        """As `docker stop` does, with so much patience. The exit status."""
        self.engine.run("podman", "stop", "--time", seconds, self.name)
        return self.process.wait(60)


@contextmanager
def serving(engine: Engine, image: str, folder: Path, *options: object) -> Iterator[Container]:
    """Within it, a container of the image is ready."""
    port, grpc_port = free_port(), free_port()
    name, log = f"avatar-test-{port}", folder / f"{port}.log"
    settings = {
        "PORT": port,
        "BENTOML_HOST": "127.0.0.1",
        "AVATAR_GRPC_HOST": "127.0.0.1",
        "AVATAR_GRPC_PORT": grpc_port,
        "AVATAR_AUTH": "off",
        "OMP_NUM_THREADS": 1,
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    given = [part for key, value in settings.items() for part in ("--env", f"{key}={value}")]
    command = ["podman", "run", "--rm", "--name", name, "--network", "host", *given, *map(str, options), image]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=engine.environment(), stdout=output, stderr=output)
    container = Container(engine, name, port, grpc_port, log, process)
    try:
        container.wait_for(READY)
        yield container
    finally:
        if process.poll() is None:
            container.stop()
