"""The durable queue: jobs in a database, and runners that pull them.

    store = JobStore("sqlite:////home/me/jobs.db")  # or postgresql://…, the same code
    job = store.submit({"prompt": "A man talks."})  # an API process

    while (claim := store.claim(owner)) is None:  # a runner: one process per GPU, one job at a time
        time.sleep(store.poll_seconds)
    with claim:
        for index in range(len(claim.clips), 3):  # goes on after the clips that are finished
            ...  # claim.check() at every denoising step
            claim.finish_clip(index, {"file": ...})
        claim.complete({"file": ...})

API processes and runners share nothing but this database and the files; any of them may be killed at any moment.
A runner holds a job by renewing its lease, and a job whose lease ran out goes to the next runner that asks. Each
claim raises the job's epoch, and a runner writes only where the epoch is still its own: one that was given up for
dead, and is not, can write nothing. A clip and its record are one transaction, so a finished clip never runs again.
All times are the database's clock, in seconds since 1970, UTC.
"""

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TextIO, get_args

import sqlalchemy as sa
from sqlalchemy import Column, Connection, Row

from avatar_api import logs, metrics
from avatar_api.database import OUTAGES, SUBMISSION_LOCK, Database, clips, jobs

logger = logging.getLogger(__name__)

QUEUED: Final = "queued"
IN_PROGRESS: Final = "in_progress"
COMPLETED: Final = "completed"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"
State = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
FINISHED: tuple[State, ...] = (COMPLETED, FAILED, CANCELLED)
RUNNER_DIED = "runner_died"

POLL_SECONDS = {"sqlite": 0.25, "postgresql": 1.0}
PAGE = 500  # jobs read at a time
STALLED_EXIT = 70  # exit status, EX_SOFTWARE

Json = dict[str, Any]


class JobNotFoundError(LookupError):
    """There is no job with this id."""


class IdempotencyError(ValueError):
    """This idempotency key, or this id, already belongs to a job with another specification."""


class QueueFullError(Exception):
    """No further job is taken at present; the message says whose are too many."""


class JobNotFinishedError(ValueError):
    """Only a finished job can be deleted."""


class JobNotFailedError(ValueError):
    """Only a job that failed or was cancelled can be run again."""


class JobCancelled(Exception):  # noqa: N818 - no error: somebody asked for it
    """Raised in the runner: the job shall stop. End it with `Claim.cancelled`."""


class LeaseLost(Exception):  # noqa: N818 - as above
    """Raised in the runner: the job is no longer this runner's. Drop it; nothing more can be written."""


@dataclass(frozen=True)
class JobSettings:
    """How long everybody waits, in seconds."""

    lease: float = 30
    """A runner that has not renewed for so long has lost its job to the next one that asks."""
    beat: float = 0.4
    """Between renewals; a cancel is noticed and progress is seen as late as this."""
    poll: float | None = None
    """Between a runner's questions for work; None: 0.25 on SQLite, 1 on PostgreSQL."""
    outage: float = 600
    """How long a runner keeps its job and its finished clip while the database is away."""
    stall: float = 900
    """A runner that did not call `Claim.check` for so long exits: a hung GPU must not keep its lease."""
    backoff: float = 10
    """Before the second attempt; twice as long before each further one."""
    attempts: int = 3
    """How often a job is started without finishing a clip before it fails."""


@dataclass(frozen=True)
class QueueLimits:
    """How many jobs may wait: in all, and of one client."""

    total: int
    per_client: int


@dataclass(frozen=True)
class Job:
    """A job as it was when it was read."""

    id: str
    client: str
    """Whose it is; clients take turns in the queue."""
    spec: Json
    """What was asked for, as submitted."""
    state: State
    priority: int
    """Higher ones go first."""
    progress: Json | None
    """What the runner last reported."""
    result: Json | None
    error: Json | None
    """{type, code, message, param}: why it failed, or, before that, why the last attempt did."""
    attempts: int
    """Starts since the last finished clip, the running one included."""
    owner: str | None
    """The runner that has it or had it last."""
    cancel_requested: bool
    webhook_url: str | None
    """Who is told of its end."""
    webhook_attempts: int
    """How often that was tried."""
    traceparent: str | None
    """The request that made it, for its run to join that trace."""
    created_at: float
    started_at: float | None
    """When it was first claimed."""
    finished_at: float | None


@dataclass(frozen=True)
class FinishedClip:
    index: int
    result: Json
    """What the runner wants to know about it later: file names, where the next clip starts from, …"""
    finished_at: float


for _state in FINISHED:
    metrics.ENDED.labels(_state)  # is 0 until the first
metrics.FAILURES.labels(RUNNER_DIED)

_Row = Row[*tuple[Any, ...]]
_JOB = [jobs.c[field.name] for field in fields(Job)]
_CLIP = [clips.c[field.name] for field in fields(FinishedClip)]


class JobStore:
    """The queue. Any number of processes and threads may use the same database, each process through one store.

    url: of the `Database`. Every method raises one of its OUTAGES while it is out of reach.
    """

    def __init__(self, url: str, settings: JobSettings = JobSettings()) -> None:
        self.settings = settings
        self._database = Database(url)
        self.poll_seconds = settings.poll or POLL_SECONDS[self._database.kind]
        self._now = self._database.now
        self._reached_at = self._reached_since = 0.0

    def close(self) -> None:
        self._database.close()

    # The API's side

    def submit(
        self,
        spec: Json,
        key: str | None = None,
        job_id: str | None = None,
        priority: int = 0,
        client: str = "",
        webhook_url: str | None = None,
        limits: QueueLimits | None = None,
        traceparent: str | None = None,
        made_elsewhere: Sequence[Json] = (),
    ) -> Job:
        """Put a job in the queue; the same `key` of a client, or `job_id`, again returns the job that is there.

        So `spec` must be equal for equal requests: it holds nothing that is new each time, such as the id. Raises
        IdempotencyError when it is not, QueueFullError, ValueError for what JSON cannot hold.

        made_elsewhere: what another database knew of the first clips; the job goes on after them.
        """
        spec = json.loads(json.dumps(spec, allow_nan=False))
        job_id = job_id or f"video_{secrets.token_hex(16)}"
        own_key = None if key is None else json.dumps([client, key])
        values = {"id": job_id, "key": own_key, "spec": spec, "priority": priority, "created_at": self._now}
        values |= {"client": client, "webhook_url": webhook_url, "traceparent": traceparent}
        if made_elsewhere:  # whoever made them may still be at it: no epoch of theirs comes near the time of day
            values["epoch"] = int(time.time())
        insert = self._database.insert(jobs, values).returning(jobs.c.seq, *_JOB)
        same = (jobs.c.id == job_id) if key is None else (jobs.c.id == job_id) | (jobs.c.key == own_key)
        while True:  # again only if the job that is there was deleted in between
            with self._database.writing(None if limits is None else SUBMISSION_LOCK) as connection:
                known = sa.select(sa.select(jobs.c.seq).where(same).exists())
                if limits is not None and not connection.execute(known).scalar():
                    self._check_limits(connection, client, limits)
                if row := connection.execute(insert).first():
                    seq, *made = row
                    for index, result in enumerate(made_elsewhere):
                        clip = {"job": seq, "index": index, "result": result, "finished_at": self._now}
                        connection.execute(sa.insert(clips).values(clip))
                    return Job(*made)
                found = [Job(*row) for row in connection.execute(sa.select(*_JOB).where(same))]
            if any(job.spec != spec for job in found) or len(found) > 1:
                name = f"idempotency key {key!r}" if key is not None else f"id {job_id!r}"
                raise IdempotencyError(f"The {name} was used before, with another request; use a new one.")
            if found:
                return found[0]

    def _check_limits(self, connection: Connection, client: str, limits: QueueLimits) -> None:
        own = sa.func.count().filter(jobs.c.client == client)
        total, of_client = connection.execute(sa.select(sa.func.count(), own).where(jobs.c.state == QUEUED)).one()
        if of_client >= limits.per_client:
            raise QueueFullError(
                f"{of_client} of your videos are waiting already, which is the limit; try again later."
            )
        if total >= limits.total:
            raise QueueFullError(f"{total} videos are waiting already, which is the limit here; try again later.")

    def get(self, job_id: str) -> Job:
        """One look-up by index: cheap enough to be asked several times a second. Raises JobNotFoundError."""
        with self._database.reading() as connection:
            return Job(*_row(connection, job_id, _JOB))

    def clips(self, job_id: str, after: int = -1) -> list[FinishedClip]:
        """The finished clips with an index greater than `after`, in order; none for an unknown job."""
        mine = clips.join(jobs).select().with_only_columns(*_CLIP).where(_named(job_id), clips.c.index > after)
        with self._database.reading() as connection:
            return [FinishedClip(*row) for row in connection.execute(mine.order_by(clips.c.index))]

    def page(
        self,
        limit: int = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        client: str | None = None,
    ) -> list[Job]:
        """`limit` jobs by time of submission, newest first, following the job `after`; of one client, or of all.

        Raises JobNotFoundError for an `after` that is not there.
        """
        query = sa.select(*_JOB).order_by(jobs.c.seq.desc() if order == "desc" else jobs.c.seq).limit(limit)
        if client is not None:
            query = query.where(jobs.c.client == client)
        with self._database.reading() as connection:
            if after is not None:
                (seq,) = _row(connection, after, [jobs.c.seq])
                query = query.where(jobs.c.seq < seq if order == "desc" else jobs.c.seq > seq)
            return [Job(*row) for row in connection.execute(query)]

    def all(self) -> Iterator[Job]:
        """Every job, the oldest first, a few hundred at a time; jobs may come and go meanwhile."""
        last = 0
        while True:
            query = sa.select(jobs.c.seq, *_JOB).where(jobs.c.seq > last).order_by(jobs.c.seq).limit(PAGE)
            with self._database.reading() as connection:
                rows = connection.execute(query).all()
            for seq, *values in rows:
                last = seq
                yield Job(*values)
            if len(rows) < PAGE:
                return

    def position(self, job_id: str) -> int | None:
        """How many queued jobs go before this one; None for one that is not queued. Raises JobNotFoundError."""
        queue, order = _in_turn(jobs.c.state == QUEUED)
        places = queue.add_columns((sa.func.row_number().over(order_by=order) - 1).label("place")).subquery()
        with self._database.reading() as connection:
            (seq,) = _row(connection, job_id, [jobs.c.seq])
            return connection.execute(sa.select(places.c.place).where(places.c.seq == seq)).scalar()

    def counts(self) -> dict[State, int]:
        """How many jobs are in each state; a state with none is left out."""
        with self._database.reading() as connection:
            query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
            return dict(connection.execute(query).all())

    def cancel(self, job_id: str) -> Job:
        """A queued job is cancelled at once, a running one when its runner next checks (`cancel_requested`).

        A finished job stays as it is. Raises JobNotFoundError.
        """
        idle = jobs.c.lease_until < self._now  # queued, or its runner is dead
        stop = sa.update(jobs).where(_named(job_id), jobs.c.state.not_in(FINISHED))
        state, finished_at = sa.case((idle, CANCELLED), else_=jobs.c.state), sa.case((idle, self._now))
        stop = stop.values(cancel_requested=True, state=state, finished_at=finished_at).returning(jobs.c.state)
        with self._database.writing() as connection:
            stopped = connection.execute(stop).scalar()
            job = Job(*_row(connection, job_id, _JOB))
        if stopped == CANCELLED:
            metrics.ENDED.labels(CANCELLED).inc()
        return job

    def retry(self, job_id: str, webhook_url: str | None = None) -> Job:
        """A job that failed or was cancelled goes back into the queue, and on from its last finished clip.

        webhook_url: who is told of its end, once more. Raises JobNotFoundError, JobNotFailedError.
        """
        ended = jobs.c.state.in_((FAILED, CANCELLED))
        values: Json = {"state": QUEUED, "finished_at": None, "cancel_requested": False, "error": None, "result": None}
        values |= {"attempts": 0, "not_before": 0, "lease_until": 0, "epoch": jobs.c.epoch + 1}
        values |= {"webhook_url": webhook_url, "webhook_at": 0, "webhook_attempts": 0}
        again = sa.update(jobs).where(jobs.c.id == job_id, ended).values(values).returning(*_JOB)
        with self._database.writing() as connection:
            if row := connection.execute(again).first():
                return Job(*row)
            (state,) = _row(connection, job_id, [jobs.c.state])
            raise JobNotFailedError(f"Job {job_id!r} is {state}; only a failed or cancelled one can be run again.")

    def delete(self, job_id: str) -> None:
        """Forget a finished job; its files are the caller's to delete. Raises JobNotFoundError, JobNotFinishedError."""
        finished = sa.delete(jobs).where(_named(job_id), jobs.c.state.in_(FINISHED)).returning(jobs.c.seq)
        with self._database.writing() as connection:
            if connection.execute(finished).first() is None:
                (state,) = _row(connection, job_id, [jobs.c.state])
                raise JobNotFinishedError(f"Job {job_id!r} is {state}; cancel it, or wait, before deleting it.")

    # Those who are told of a job's end

    def next_webhook(self, patience: float) -> Job | None:
        """A finished job whose webhook is due, for this caller to send and to answer for within `patience` seconds."""
        due = jobs.c.state.in_(FINISHED) & jobs.c.webhook_url.is_not(None) & (jobs.c.webhook_at <= self._now)
        first = sa.select(jobs.c.seq).where(due).order_by(jobs.c.webhook_at).limit(1)
        with self._database.reading() as connection:
            if connection.execute(first).first() is None:
                return None
        taken = {"webhook_at": self._now + patience, "webhook_attempts": jobs.c.webhook_attempts + 1}
        with self._database.writing() as connection:
            row = connection.execute(first.with_for_update(skip_locked=True)).first()
            if row is None:
                return None
            return Job(
                *connection.execute(sa.update(jobs).where(jobs.c.seq == row.seq).values(taken).returning(*_JOB)).one()
            )

    def webhook_sent(self, job_id: str, again_after: float | None) -> None:
        """What became of it: None if it was received or is given up, else the seconds until the next attempt."""
        values = {"webhook_url": None} if again_after is None else {"webhook_at": self._now + again_after}
        with self._database.writing() as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(values))

    # The runner's side

    def reclaim(self, owner: str) -> None:
        """A runner that starts hands back what its dead self held, for any runner to take now, not after the lease."""
        held = (jobs.c.owner == owner) & (jobs.c.state == IN_PROGRESS)
        with self._database.writing() as connection:
            connection.execute(sa.update(jobs).where(held).values(lease_until=0))

    def last_completed(self, owner: str) -> Job | None:
        """The job that a runner completed last, if it is still there."""
        own = sa.select(*_JOB).where(jobs.c.state == COMPLETED, jobs.c.owner == owner)
        with self._database.reading() as connection:
            row = connection.execute(own.order_by(jobs.c.finished_at.desc()).limit(1)).first()
        return None if row is None else Job(*row)

    def claim(self, owner: str) -> "Claim | None":
        """Take the job whose turn it is; None when there is none.

        Jobs that lost their runner go first, then by priority; clients take turns, and each one's jobs keep their
        order. An owner runs one job at a time: what it still holds counts as lost (the answer to its last claim may
        have been).
        """
        running = jobs.c.state == IN_PROGRESS
        queued = (jobs.c.state == QUEUED) & (jobs.c.not_before <= self._now)
        freed = running & ((jobs.c.lease_until == 0) | (jobs.c.owner == owner))
        expired = running & (jobs.c.lease_until < self._now)
        with self._database.reading() as connection:  # idle runners only read
            some = [sa.select(jobs.c.seq).where(kind).exists() for kind in (queued, freed, expired)]
            now, some_queued, some_freed, some_expired = connection.execute(sa.select(self._now, *some)).one()
        owners_had_their_turn = self._reached(now)
        if not (some_queued or some_freed or (some_expired and owners_had_their_turn)):
            return None
        lost = freed | expired if owners_had_their_turn else freed
        with self._database.writing() as connection:
            lost_first = sa.select(jobs).where(lost).order_by(jobs.c.priority.desc(), jobs.c.seq)
            queue, order = _in_turn(queued)
            taken = self._take(connection, lost_first, owner) or self._take(connection, queue.order_by(*order), owner)
        return None if taken is None else Claim(self, *taken)

    def _take(
        self, connection: Connection, free: sa.Select[Any], owner: str
    ) -> tuple[int, int, Job, tuple[FinishedClip, ...]] | None:
        first = free.limit(1).with_for_update(skip_locked=True, of=jobs)
        while row := connection.execute(first).first():
            this = jobs.c.seq == row.seq
            if row.state == IN_PROGRESS:
                metrics.FAILURES.labels(RUNNER_DIED).inc()
            finished = sa.select(*_CLIP).where(clips.c.job == row.seq).order_by(clips.c.index)
            done = tuple(FinishedClip(*clip) for clip in connection.execute(finished))
            if row.cancel_requested:
                connection.execute(sa.update(jobs).where(this).values(self._finished(CANCELLED)))
                metrics.ENDED.labels(CANCELLED).inc()
            elif row.state == IN_PROGRESS and row.attempts >= self.settings.attempts:  # nobody lived to fail it
                died = f"The process that ran the job died {row.attempts} times at clip {len(done) + 1}"
                error = {"type": "server_error", "code": RUNNER_DIED, "message": f"{died}.", "param": None}
                connection.execute(sa.update(jobs).where(this).values(self._finished(FAILED) | {"error": error}))
                logger.error("job %s: failed: %s", row.id, died)
                metrics.ENDED.labels(FAILED).inc()
            else:
                values = {"state": IN_PROGRESS, "owner": owner, "lease_until": self._now + self.settings.lease}
                values |= {"epoch": row.epoch + 1, "attempts": row.attempts + 1}
                values |= {"started_at": sa.func.coalesce(jobs.c.started_at, self._now)}
                job = Job(*connection.execute(sa.update(jobs).where(this).values(values).returning(*_JOB)).one())
                return row.seq, row.epoch + 1, job, done
        return None

    def _finished(self, state: State) -> Json:
        return {"state": state, "finished_at": self._now, "lease_until": 0}

    def _reached(self, now: float) -> bool:
        """The database was reached at `now`. Whether it has been all the time, for one lease.

        After an outage, or a night with the lid closed, all leases have run out and all owners are alive: they get
        one lease to renew before anybody takes their jobs. Half a lease without contact counts as an outage, and so
        does the time before the first: shorter ones leave the owners the other half.
        """
        if now - self._reached_at > self.settings.lease / 2:
            self._reached_since = now
        self._reached_at = now
        return now - self._reached_since >= self.settings.lease


class Claim:
    """One running job, in the hands of one runner. A thread renews the lease until the job is ended.

    Every method raises LeaseLost once the job is somebody else's, which is the end of it. While the database is away
    they wait for it, and raise LeaseLost after `JobSettings.outage` seconds.
    """

    def __init__(self, store: JobStore, seq: int, epoch: int, job: Job, finished: tuple[FinishedClip, ...]) -> None:
        self.job = job
        """As it was when it was claimed."""
        self.clips = list(finished)
        """The clips that are finished, by runners before this one and by this one."""
        self.epoch = epoch
        """Unlike any other claim's of this job: in file names, it keeps a runner given up for dead off our files."""
        self.settings = store.settings
        self._store, self._seq = store, seq
        self._attempts = job.attempts
        self._progress = job.progress
        self._halt: Exception | None = None
        self._checked = self._reached = time.monotonic()
        self._reached_at = 0.0  # by the database's clock
        self._away = False
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat_until_ended, name=f"heart of {job.id}", daemon=True)
        self._heart.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop renewing. A job that was not ended goes to the next runner when its lease runs out."""
        self._ended.set()
        self._heart.join()

    def check(self) -> None:
        """Call it at every denoising step: it shows that the runner is alive, and touches no database.

        Raises JobCancelled, LeaseLost.
        """
        self._checked = time.monotonic()
        if self._halt is not None:
            raise self._halt

    def report(self, progress: Json) -> None:
        """What callers shall see, within a beat. It is only kept here; do not change it afterwards."""
        self._progress = progress

    def finish_clip(self, index: int, result: Json) -> None:
        """Record a finished clip; its files are in place. Whatever happens after this, it never runs again."""
        self._attempts = 1
        row = {"job": self._seq, "index": index, "result": result, "finished_at": self._store._now}
        insert = self._store._database.insert(clips, row)  # said twice if the answer got lost
        self._insist((IN_PROGRESS,), {"lease_until": self._lease, "attempts": 1, "error": None}, insert)
        self.clips.append(FinishedClip(index, result, self._reached_at))

    def complete(self, result: Json) -> None:
        self._insist((COMPLETED,), self._store._finished(COMPLETED) | {"result": result, "error": None})

    def cancelled(self, result: Json | None = None) -> None:
        """End a job that was to be cancelled; `result`: what there is so far, if it is worth keeping."""
        self._insist((CANCELLED,), self._store._finished(CANCELLED) | {"result": result})

    def fail(self, error: Json, retry: bool) -> State:
        """End this attempt; error: {type, code, message, param}.

        retry: try again a little later, if there are attempts left since the last finished clip; not for a mistake of
        the caller's. Returns what the job is now: queued, failed, or cancelled, if that was asked for meanwhile.
        """
        metrics.FAILURES.labels(error["code"]).inc()
        if not retry or self._attempts >= self.settings.attempts:
            return self._insist((FAILED,), self._store._finished(FAILED) | {"error": error})
        wait = self.settings.backoff * 2 ** (self._attempts - 1)
        again = self._queued() | {"not_before": self._store._now + wait, "error": error}
        return self._insist((QUEUED, CANCELLED), again)

    def release(self) -> None:
        """Hand the job back, uncounted, for another runner to take at once: this one has to stop, on SIGTERM.

        Does not wait for a database that is away: the lease will run out.
        """
        self._write((QUEUED, CANCELLED), self._queued() | {"attempts": self._attempts - 1})

    @property
    def _lease(self) -> sa.ColumnElement[float]:
        return self._store._now + self.settings.lease

    def _queued(self) -> Json:
        """Back in the queue, unless it is to be cancelled."""
        to_cancel = jobs.c.cancel_requested
        state, finished_at = sa.case((to_cancel, CANCELLED), else_=QUEUED), sa.case((to_cancel, self._store._now))
        return {"state": state, "finished_at": finished_at, "lease_until": 0}

    def _insist(self, states: tuple[State, ...], values: Json, insert: sa.Insert | None = None) -> State:
        """Write, however long the database is away: what is written here took minutes of a GPU."""
        while (state := self._write(states, values, insert)) is None:
            self._checked = time.monotonic()
            time.sleep(self.settings.beat)
        return state

    def _write(self, states: tuple[State, ...], values: Json, insert: sa.Insert | None = None) -> State | None:
        """One fenced transaction. None: the database is away, and not yet for long enough to give up.

        The answer to a write may get lost with the connection. So it may be repeated on a job that already is in one
        of `states`, with the same outcome.
        """
        mine = (jobs.c.seq == self._seq) & (jobs.c.epoch == self.epoch) & jobs.c.state.in_((IN_PROGRESS, *states))
        write = sa.update(jobs).where(mine).values(values | {"progress": self._progress})
        answer = write.returning(jobs.c.state, jobs.c.cancel_requested, self._store._now)
        try:
            with self._store._database.writing() as connection:
                row = connection.execute(answer).first()
                if row is not None and insert is not None:
                    connection.execute(insert)
        except OUTAGES as error:
            away = time.monotonic() - self._reached
            if away > self.settings.outage:
                raise LeaseLost(f"The database has been away for {away:.0f} s.") from error
            if not self._away:
                logger.warning("job %s goes on while the database is away: %s", self.job.id, error.orig)
            self._away = True
            return None
        if row is None:
            raise LeaseLost(f"Job {self.job.id} was taken over by another runner, cancelled or deleted.")
        state, cancel_requested, now = row
        if self._away:
            logger.warning("job %s: the database is back after %.0f s", self.job.id, time.monotonic() - self._reached)
        self._reached, self._reached_at, self._away = time.monotonic(), now, False
        self._store._reached(now)
        if cancel_requested:
            self._halt = JobCancelled(f"Job {self.job.id} is to be cancelled.")
        if state != IN_PROGRESS:
            self._ended.set()
        if state in FINISHED:
            metrics.ENDED.labels(state).inc()
        return state

    def _beat_until_ended(self) -> None:
        with logs.of_job(self.job.id):
            self._beat()

    def _beat(self) -> None:
        while not self._ended.wait(self.settings.beat):
            silent = time.monotonic() - self._checked
            if silent > self.settings.stall:
                logger.critical("job %s: no step for %.0f s, the GPU hangs; this process exits", self.job.id, silent)
                os._exit(STALLED_EXIT)
            if self._halt is None or isinstance(self._halt, JobCancelled):
                try:
                    self._write((IN_PROGRESS,), {"lease_until": self._lease})
                except Exception as error:  # LeaseLost, or a progress that JSON cannot hold: for the next check()
                    self._halt = error


def runner_name(folder: Path, device: str) -> str:
    """The name under which this process claims jobs, the same again after a restart: host, device (a GPU's UUID) and
    a number drawn once. A locked file in `folder` keeps it from other processes until this one ends.
    """
    host, turn = socket.gethostname(), 1
    while True:  # several runners on one device take turns in asking
        lock = (folder / f"{host}-{device}-{turn}.lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            turn += 1
            continue
        _locks.append(lock)
        lock.seek(0)
        number = lock.read()
        if not number:
            number = secrets.token_hex(4)
            lock.write(number)
            lock.flush()
        return f"{host}-{device}-{number}"


_locks: list[TextIO] = []  # open until the process ends


def _in_turn(queued: sa.ColumnElement[bool]) -> tuple[sa.Select[Any], list[sa.ColumnElement[Any]]]:
    """The queued jobs, and their order: by priority, then one job of each client after the other.

    A job's turn is its number among its client's jobs, those that are running counted first.
    """
    number = sa.func.row_number().over(partition_by=jobs.c.client, order_by=[jobs.c.priority.desc(), jobs.c.seq])
    numbered = sa.select(jobs.c.seq, number.label("number")).where(queued).subquery()
    running = sa.select(jobs.c.client, sa.func.count().label("jobs")).where(jobs.c.state == IN_PROGRESS)
    busy = running.group_by(jobs.c.client).subquery()
    queue = sa.select(jobs).join(numbered, numbered.c.seq == jobs.c.seq).outerjoin(busy, busy.c.client == jobs.c.client)
    turn = numbered.c.number + sa.func.coalesce(busy.c.jobs, 0)
    # Asked twice: of a row that changed before it could be locked, PostgreSQL looks at this condition again, only here.
    return queue.where(queued), [jobs.c.priority.desc(), turn, jobs.c.seq]


def _named(job_id: str) -> sa.ColumnElement[bool]:
    """That a job has this id; none has one with a NUL, and PostgreSQL refuses such a text."""
    return sa.false() if "\0" in job_id else jobs.c.id == job_id


def _row(connection: Connection, job_id: str, columns: Sequence[Column[Any]]) -> _Row:
    row = connection.execute(sa.select(*columns).where(_named(job_id))).first()
    if row is None:
        raise JobNotFoundError(f"There is no job {job_id!r}.")
    return row
