"""Databases to test on: a SQLite file, and a PostgreSQL server of the tests' own, which they may stop and start.

A test that asks for `database` runs on both; its file imports the two fixtures from here. Without PostgreSQL on the
machine half of it is skipped, and fails where AVATAR_TEST_POSTGRES=required says so.
"""

import os
import pwd
import select
import shutil
import socket
import socketserver
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest


class PostgresServer:
    """A server on a socket in a folder of its own, which is all that ever knew of it when it is removed."""

    def __init__(self, programs: Path, fsync: bool = False) -> None:
        """fsync: as in earnest, where a power cut must lose nothing; without it, a start after a crash is quicker."""
        self.programs, self.fsync = programs, fsync
        self.folder = Path(tempfile.mkdtemp(prefix="avatar-postgres-"))
        self.schemas = 0
        self.user: str | None = None
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root; Debian's package brings this user
            self.user = "postgres"
            os.chown(self.folder, pwd.getpwnam(self.user).pw_uid, -1)
        self._run("initdb", "--auth=trust", "--username=postgres", "--no-sync", f"--pgdata={self.folder / 'data'}")

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses= -c max_connections=200 -c fsync={self.fsync}"
        self._run("pg_ctl", "start", "--wait", f"--log={self.folder / 'log'}", f"--options={options}")

    def stop(self) -> None:
        """As a crash would: every connection breaks at once, whatever it was doing."""
        self._run("pg_ctl", "stop", "--wait", "--mode=immediate")

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def new_schema(self) -> str:
        """Its address: as good as an empty database, and much quicker to make and to remove."""
        self.schemas += 1
        with psycopg.connect(f"host={self.folder} user=postgres", autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA test_{self.schemas}".encode())
        return f"postgresql://postgres@/postgres?options=-csearch_path=test_{self.schemas}&host={self.folder}"

    def _run(self, program: str, *arguments: str) -> None:
        environment = {**os.environ, "PGDATA": str(self.folder / "data"), "LC_ALL": "C"}
        command = [str(self.programs / program), *arguments]
        with (self.folder / "output").open("w+") as output:  # a pipe would stay open as long as the server
            status = subprocess.run(
                command, user=self.user, cwd=self.folder, env=environment, stdout=output, stderr=output
            ).returncode
            output.seek(0)
            assert status == 0, f"{program}: {output.read()}"


class LossyWire(socketserver.ThreadingTCPServer):
    """A way to a server on which the answer to a commit gets lost, when asked for: the connection breaks instead."""

    daemon_threads = True

    def __init__(self, database: "Database") -> None:
        assert database.server is not None
        super().__init__(("127.0.0.1", 0), _Wire)
        self.upstream = str(database.server.folder / ".s.PGSQL.5432")
        schema = database.url.split("&")[0].removeprefix("postgresql://postgres@/")
        self.url = f"postgresql://postgres@127.0.0.1:{self.server_address[1]}/{schema}&sslmode=disable"
        self.lose_next_answer = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()  # else its thread asks the closed socket for ever, and takes a processor
        super().server_close()


class _Wire(socketserver.BaseRequestHandler):
    server: LossyWire

    def handle(self) -> None:
        client, lose = self.request, False
        with socket.socket(socket.AF_UNIX) as upstream:
            upstream.connect(self.server.upstream)
            while True:
                for source in select.select([client, upstream], [], [])[0]:
                    message = source.recv(1 << 16)
                    if not message or (lose and source is upstream):
                        return
                    (upstream if source is client else client).sendall(message)
                    if source is client and self.server.lose_next_answer and b"COMMIT" in message:
                        self.server.lose_next_answer, lose = False, True


@dataclass(frozen=True)
class Database:
    url: str
    server: PostgresServer | None = None
    """None on SQLite, which is never away."""


def find_postgres() -> Path | None:
    """The folder with initdb and pg_ctl, which Debian keeps off the PATH; the newest version's."""
    found = shutil.which("pg_ctl")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: float(path.parts[-3]))
    return Path(found).parent if found else debian[-1].parent if debian else None


@pytest.fixture(scope="session", name="postgres")
def postgres_fixture() -> Iterator[PostgresServer]:
    programs = find_postgres()
    if programs is None:
        assert os.environ.get("AVATAR_TEST_POSTGRES") != "required", "PostgreSQL is not installed"
        pytest.skip("PostgreSQL is not installed")
    server = PostgresServer(programs)
    server.start()
    yield server
    server.remove()


@pytest.fixture(params=["sqlite", "postgresql"], name="database")
def database_fixture(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """An empty database."""
    if request.param == "sqlite":
        return Database(f"sqlite:///{tmp_path / 'jobs.db'}")
    server: PostgresServer = request.getfixturevalue("postgres")
    return Database(server.new_schema(), server)
