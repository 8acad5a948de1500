"""The database under the jobs: its tables, and SQLite or PostgreSQL behind one way of reading and of writing.

Nothing here knows what a job's states mean; `jobs` does.
"""

import json
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Column, Connection, Engine, ForeignKey, Index, MetaData, Table, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError

OUTAGES = (OperationalError, InterfaceError, InternalError)  # stopped, restarting, read-only, locked, out of disk
SQLITE_WAIT = 10  # seconds for another process to finish its write
MIGRATIONS = Path(__file__).parent / "migrations"
MIGRATION_LOCK, SUBMISSION_LOCK = 0x41564154, 0x41564155  # any numbers that nothing else in the database locks
NOW = {  # the database's clock; PostgreSQL's when the statement arrived, as locks may be waited for inside
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    "postgresql": "CAST(extract(epoch FROM statement_timestamp()) AS DOUBLE PRECISION)",
}

metadata = MetaData()
_Json = sa.JSON(none_as_null=True)
_Seq = sa.BigInteger().with_variant(sa.Integer, "sqlite")

_TELLS = sa.text("webhook_url IS NOT NULL")

jobs = Table(
    "jobs",
    metadata,
    Column("seq", _Seq, primary_key=True),  # the order of submission; never used again
    Column("id", sa.Text, nullable=False, unique=True),
    Column("key", sa.Text, unique=True),
    Column("spec", _Json, nullable=False),
    Column("state", sa.Text, nullable=False, default="queued"),
    Column("priority", sa.Integer, nullable=False),
    Column("progress", _Json),
    Column("result", _Json),
    Column("error", _Json),
    Column("attempts", sa.Integer, nullable=False, default=0),
    Column("not_before", sa.Double, nullable=False, default=0),
    Column("owner", sa.Text),
    Column("epoch", sa.Integer, nullable=False, default=0),
    Column("lease_until", sa.Double, nullable=False, default=0),  # 0: nobody's
    Column("cancel_requested", sa.Boolean, nullable=False, default=False),
    Column("created_at", sa.Double, nullable=False),
    Column("started_at", sa.Double),
    Column("finished_at", sa.Double),
    Column("client", sa.Text, nullable=False, server_default=""),
    Column("webhook_url", sa.Text),
    Column("webhook_at", sa.Double, nullable=False, server_default="0"),  # the next attempt
    Column("webhook_attempts", sa.Integer, nullable=False, server_default="0"),
    Column("traceparent", sa.Text),
    Index("jobs_in_order", "state", sa.text("priority DESC"), "seq"),
    Index("jobs_of_client", "client", "seq"),
    Index("jobs_to_tell", "webhook_at", sqlite_where=_TELLS, postgresql_where=_TELLS),
    sqlite_autoincrement=True,
)
clips = Table(
    "clips",
    metadata,
    Column("job", _Seq, ForeignKey("jobs.seq", ondelete="CASCADE"), primary_key=True),
    Column("index", sa.Integer, primary_key=True),
    Column("result", _Json, nullable=False),
    Column("finished_at", sa.Double, nullable=False),
)


class Database:
    """SQLite or PostgreSQL, with the tables brought up to date. Every method raises one of OUTAGES while it is away.

    url: `sqlite:///FILE`, for the processes of one machine, never on a network drive; or `postgresql://…`.
    """

    def __init__(self, url: str) -> None:
        self.kind = sa.make_url(url).get_backend_name()
        if self.kind not in NOW:
            raise ValueError(f"database: {self.kind}:// is not supported; use sqlite:///FILE or postgresql://…")
        self.now = sa.literal_column(NOW[self.kind], sa.Double)
        """Seconds since 1970, UTC, by the database's clock."""
        self._engine = sa.create_engine(
            url,
            pool_pre_ping=True,
            hide_parameters=True,  # an error shows the statement, which is logged, and not what people sent
            json_serializer=partial(json.dumps, allow_nan=False),
        )
        self._writer = self._engine.execution_options(writes=True)
        self._one_writer = threading.Lock() if self.kind == "sqlite" else nullcontext()
        (_prepare_sqlite if self.kind == "sqlite" else _prepare_postgresql)(self._engine)
        self._migrate()

    def close(self) -> None:
        self._engine.dispose()

    def insert(self, table: Table, values: dict[str, Any]) -> Any:
        """A statement that does nothing where a row like this is there already."""
        insert = sqlite.insert if self.kind == "sqlite" else postgresql.insert
        return insert(table).values(values).on_conflict_do_nothing()

    def reading(self) -> AbstractContextManager[Connection]:
        return self._engine.connect()

    @contextmanager
    def writing(self, alone: int | None = None) -> Iterator[Connection]:
        """One transaction that may write, all or nothing. alone: of those with this number, one at a time."""
        with self._one_writer, self._writer.begin() as connection:
            if alone is not None and self.kind == "postgresql":  # SQLite has one writer anyway
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(alone)))
            yield connection

    def _migrate(self) -> None:
        """Bring the tables up to date. Of several processes at once, the first does it and the others wait."""
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        known = {revision.revision for revision in ScriptDirectory.from_config(config).walk_revisions()}
        with self.writing(alone=MIGRATION_LOCK) as connection:
            current = MigrationContext.configure(connection).get_current_revision()
            if current is not None and current not in known:
                raise RuntimeError(f"The database is of a newer version ({current}) than this program; update it.")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _prepare_sqlite(engine: Engine) -> None:
    def once_free(execute: Callable[[], object]) -> None:
        """SQLite itself asks ever more seldom, down to every 0.1 s, and never gets its turn on a busy database."""
        deadline = time.monotonic() + SQLITE_WAIT
        while True:
            try:
                execute()
            except (sqlite3.OperationalError, OperationalError) as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0.001, 0.004))  # noqa: S311 - no secret
            else:
                return

    @event.listens_for(engine, "connect")
    def connect(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # transactions begin below, not where the driver thinks fit
        connection.execute(f"PRAGMA busy_timeout = {SQLITE_WAIT * 1000}")
        once_free(lambda: connection.execute("PRAGMA journal_mode = WAL"))
        connection.execute("PRAGMA synchronous = FULL")  # 0.4 ms a write, for surviving a power cut
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if not connection.get_execution_options().get("writes"):
            connection.exec_driver_sql("BEGIN")
            return
        connection.exec_driver_sql("PRAGMA busy_timeout = 0")
        once_free(lambda: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {SQLITE_WAIT * 1000}")


def _prepare_postgresql(engine: Engine) -> None:
    """A machine that vanishes must not keep others waiting: not for its answer, and not for its locks."""

    @event.listens_for(engine, "do_connect")
    def dial(_dialect: object, _record: object, _arguments: object, options: dict[str, Any]) -> None:
        ours: dict[str, Any] = {
            "connect_timeout": 5,
            "tcp_user_timeout": 10000,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
        }
        ours |= {"client_encoding": "utf8"}  # where a server was set up without a locale, text would come as bytes
        for name, value in ours.items():
            options.setdefault(name, value)  # the address may say otherwise

    @event.listens_for(engine, "connect")
    def connect(connection: DBAPIConnection, _: object) -> None:
        connection.cursor().execute("SET idle_in_transaction_session_timeout = '30s'")
        connection.commit()
