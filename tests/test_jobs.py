"""The queue, as those who submit and those who run jobs see it: on SQLite and on PostgreSQL, with real processes.

The runners here do what the product's do, with a pause in place of each denoising step. They note every clip they
start, so that a test can tell whether one ran twice.
"""

import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from avatar_api.database import OUTAGES, metadata
from avatar_api.jobs import (
    STALLED_EXIT,
    Claim,
    IdempotencyError,
    Job,
    JobCancelled,
    JobNotFinishedError,
    JobNotFoundError,
    JobSettings,
    JobStore,
    Json,
    LeaseLost,
    QueueFullError,
    QueueLimits,
    runner_name,
)
from tests import waiting
from tests.databases import Database, LossyWire, database_fixture, postgres_fixture  # noqa: F401 - for pytest to find

eventually = partial(waiting.eventually, seconds=20)

QUICK = JobSettings(lease=1.5, beat=0.2, poll=0.05, outage=60, stall=60, backoff=0.3)
BAD_LUCK: Json = {"type": "server_error", "code": "out_of_memory", "message": "The GPU is full.", "param": None}

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["avatar_api.jobs", "pytest"])


def run_jobs(url: str, name: str, notes: Path, settings: JobSettings) -> None:
    """A runner. A job's spec says how many clips it has, of how many steps, how long each, and what goes wrong."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    store = JobStore(url, settings)
    store.reclaim(name)
    note(notes, "ready", name)
    while not stop.is_set():
        try:
            claim = store.claim(name)
        except OUTAGES:
            claim = None
        if claim is None:
            time.sleep(store.poll_seconds)
            continue
        with claim:
            try:
                run_job(claim, name, notes, stop)
            except JobCancelled:
                claim.cancelled()
            except LeaseLost:
                note(notes, "lost", claim.job.id, claim.epoch)


def run_job(claim: Claim, name: str, notes: Path, stop: threading.Event) -> None:
    spec: Json = {"clips": 3, "steps": 5, "seconds": 0.02} | claim.job.spec
    for index in range(len(claim.clips), spec["clips"]):
        note(notes, "clip", claim.job.id, index, claim.epoch, name)
        if spec.get("deadly") == index:
            os.kill(os.getpid(), signal.SIGKILL)
        if spec.get("hangs") == index:
            time.sleep(3600)
        for step in range(spec["steps"]):
            time.sleep(spec["seconds"])
            claim.report({"clip": index, "step": step})
            claim.check()
            if stop.is_set():
                claim.release()
                return
        claim.finish_clip(index, {"epoch": claim.epoch})
    claim.complete({"clips": spec["clips"]})


def note(notes: Path, *words: object) -> None:
    with notes.open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


@dataclass
class Runners:
    """Starts runners, and reads what they noted."""

    url: str
    notes: Path
    settings: JobSettings = QUICK
    running: list[BaseProcess] = field(default_factory=list)

    def start(self, name: str) -> BaseProcess:
        """A runner that is ready for work."""
        before = self.noted("ready").count([name])
        process = processes.Process(target=run_jobs, args=(self.url, name, self.notes, self.settings), daemon=True)
        process.start()
        self.running.append(process)
        eventually(lambda: self.noted("ready").count([name]) > before)
        return process

    def kill(self) -> None:
        for process in self.running:
            process.kill()
            process.join()

    def noted(self, kind: str) -> list[list[str]]:
        lines = [line.split() for line in self.notes.read_text().splitlines()] if self.notes.exists() else []
        return [line[1:] for line in lines if line[0] == kind]

    def clips(self, job: Job) -> list[tuple[int, int]]:
        """(index, epoch) of every clip of a job that was started, in order."""
        return [(int(index), int(epoch)) for job_id, index, epoch, _ in self.noted("clip") if job_id == job.id]


@pytest.fixture
def runners(database: Database, tmp_path: Path) -> Iterator[Runners]:
    fleet = Runners(database.url, tmp_path / "notes")
    yield fleet
    fleet.kill()


@pytest.fixture
def store(database: Database) -> Iterator[JobStore]:
    with closing(JobStore(database.url, QUICK)) as store:
        yield store


def finished(store: JobStore, *submitted: Job) -> bool:
    return all(store.get(job.id).finished_at is not None for job in submitted)


def freeze(process: BaseProcess, store: JobStore, job: Job) -> None:
    """Right after a write: a process that stops within one keeps all others from writing, too."""
    assert process.pid is not None
    progress = store.get(job.id).progress
    eventually(lambda: store.get(job.id).progress != progress)
    os.kill(process.pid, signal.SIGSTOP)


def thaw(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGCONT)


def take(store: JobStore, name: str = "runner") -> Claim:
    claim = store.claim(name)
    assert claim is not None
    return claim


def assert_done_once(store: JobStore, runners: Runners, job: Job, clips: int = 3) -> None:
    """The job is complete, and no clip was started again after it was finished."""
    assert store.get(job.id).state == "completed"
    finishers = [clip.result["epoch"] for clip in store.clips(job.id)]
    assert len(finishers) == clips
    for index, epoch in runners.clips(job):
        assert epoch <= finishers[index], f"clip {index} was finished by epoch {finishers[index]}, and again by {epoch}"


# Submitting, and reading what was submitted


def test_a_job_is_kept_as_it_was_submitted(store: JobStore) -> None:
    spec = {"prompt": "Grüße, 你好 \0 \ud800", "seed": 2**40, "scale": 0.1, "none": None, "list": [1, {"a": True}]}
    job = store.submit(spec, priority=3)
    assert job == store.get(job.id)
    assert job.spec == spec
    assert (job.state, job.priority, job.attempts, job.cancel_requested) == ("queued", 3, 0, False)
    assert (job.progress, job.result, job.error, job.owner, job.started_at, job.finished_at) == (None,) * 6
    assert job.id.startswith("video_")
    assert abs(job.created_at - time.time()) < 5
    assert store.submit({}, job_id="mine").id == "mine"


def test_what_json_cannot_hold_is_refused_on_every_database(store: JobStore) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.submit({"scale": float("nan")})
    assert store.page() == []


def test_the_same_key_is_the_same_job(store: JobStore) -> None:
    job = store.submit({"seed": 1}, key="a")
    assert store.submit({"seed": 1}, key="a") == job
    assert store.submit({"seed": 1}, key="a", job_id="another") == job
    assert store.submit({"seed": 1}, key="b").id != job.id
    assert store.submit({"seed": 1}, job_id=job.id) == job
    with pytest.raises(IdempotencyError, match="'a' was used before"):
        store.submit({"seed": 2}, key="a")
    with pytest.raises(IdempotencyError, match=job.id):
        store.submit({"seed": 2}, job_id=job.id)
    assert len(store.page()) == 2


def submit_keys(url: str, keys: list[str]) -> list[str]:
    with closing(JobStore(url)) as store, ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda key: store.submit({"key": key}, key=key).id, keys))


def test_one_key_sent_many_times_at_once_is_one_job(database: Database, store: JobStore) -> None:
    keys = [f"key {number // 4}" for number in range(100)]
    with ProcessPoolExecutor(2, mp_context=processes) as clients:
        first, second = clients.map(submit_keys, [database.url] * 2, [keys, keys])
    assert first == second
    assert len(set(first)) == 25 == len(store.page(limit=100))


def test_an_id_that_the_database_cannot_hold_is_not_found(store: JobStore) -> None:
    for ask in (store.get, store.cancel, store.delete, store.position, lambda job_id: store.page(after=job_id)):
        with pytest.raises(JobNotFoundError):
            ask("a\0b")


def test_pages_go_through_all_jobs_newest_first(store: JobStore) -> None:
    ids = [store.submit({}).id for _ in range(5)]
    assert [job.id for job in store.page(limit=2)] == [ids[4], ids[3]]
    assert [job.id for job in store.page(limit=2, after=ids[3])] == [ids[2], ids[1]]
    assert [job.id for job in store.page(limit=2, after=ids[1])] == [ids[0]]
    assert [job.id for job in store.page(after=ids[2], order="asc")] == [ids[3], ids[4]]
    with pytest.raises(JobNotFoundError, match="'gone'"):
        store.page(after="gone")


def test_pages_of_one_client_hold_no_other_ones(store: JobStore) -> None:
    ids = [store.submit({}, client=client).id for client in ("a", "b", "a")]
    assert [job.id for job in store.page(client="a")] == [ids[2], ids[0]]
    assert [job.id for job in store.page(limit=1, after=ids[2], client="a")] == [ids[0]]
    assert store.page(client="c") == []


def test_each_client_has_keys_of_its_own(store: JobStore) -> None:
    mine, yours = (store.submit({"of": client}, key="k", client=client) for client in ("a", "b"))
    assert mine.id != yours.id
    assert store.submit({"of": "a"}, key="k", client="a") == mine


def test_only_so_many_jobs_may_wait(store: JobStore) -> None:
    limits = QueueLimits(total=3, per_client=2)
    first = store.submit({}, key="k", client="a", limits=limits)
    store.submit({}, client="a", limits=limits)
    with pytest.raises(QueueFullError, match="2 of your videos are waiting"):
        store.submit({}, client="a", limits=limits)
    assert store.submit({}, key="k", client="a", limits=limits) == first, "that one waits already"
    store.submit({}, client="b", limits=limits)
    with pytest.raises(QueueFullError, match="3 videos are waiting"):
        store.submit({}, client="c", limits=limits)
    with take(store) as claim:
        store.submit({}, client="c", limits=limits)
        claim.complete({})


def fill_up(url: str, count: int) -> int:
    """How many of so many jobs, submitted at once, were taken."""

    with closing(JobStore(url)) as queue, ThreadPoolExecutor(8) as threads:

        def submit(_: int) -> bool:
            try:
                queue.submit({}, client="a", limits=QueueLimits(total=5, per_client=5))
            except QueueFullError:
                return False
            return True

        return sum(threads.map(submit, range(count)))


def test_the_limit_holds_when_many_ask_at_once(database: Database, store: JobStore) -> None:
    with ProcessPoolExecutor(2, mp_context=processes) as clients:
        assert sum(clients.map(fill_up, [database.url] * 2, [20, 20])) == 5
    assert store.counts() == {"queued": 5}


# Who is told of the end


def test_the_webhook_of_a_finished_job_is_sent_by_one_at_a_time_until_it_is_received(store: JobStore) -> None:
    job = store.submit({}, webhook_url="https://example.com/hook")
    store.submit({})
    assert store.next_webhook(patience=60) is None, "nothing has ended"
    with take(store) as claim:
        claim.complete({"file": "video"})
    sending = store.next_webhook(patience=60)
    assert sending is not None
    assert (sending.id, sending.state, sending.webhook_url) == (job.id, "completed", "https://example.com/hook")
    assert sending.webhook_attempts == 1
    assert store.next_webhook(patience=60) is None, "somebody is at it"
    store.webhook_sent(job.id, again_after=0.2)
    assert store.next_webhook(patience=0.2) is None, "not yet"
    eventually(lambda: (again := store.next_webhook(patience=0.2)) is not None and again.webhook_attempts == 2)
    eventually(lambda: (again := store.next_webhook(patience=60)) is not None and again.webhook_attempts == 3)
    store.webhook_sent(job.id, again_after=None)
    assert store.next_webhook(patience=60) is None
    with closing(JobStore(str(store._database._engine.url.render_as_string(hide_password=False)))) as other:
        assert other.next_webhook(patience=60) is None


def test_failed_and_cancelled_jobs_have_webhooks_too(store: JobStore) -> None:
    failed, cancelled = (store.submit({}, webhook_url="https://example.com/") for _ in range(2))
    with take(store) as claim:
        claim.fail(BAD_LUCK, retry=False)
    store.cancel(cancelled.id)
    told = [store.next_webhook(patience=60) for _ in range(2)]
    assert {(job.id, job.state) for job in told if job} == {(failed.id, "failed"), (cancelled.id, "cancelled")}


def test_unknown_jobs_are_named(store: JobStore) -> None:
    for ask in (store.get, store.cancel, store.delete, store.position):
        with pytest.raises(JobNotFoundError, match="'gone'"):
            ask("gone")


def test_only_finished_jobs_can_be_deleted(store: JobStore) -> None:
    job = store.submit({}, key="key")
    with pytest.raises(JobNotFinishedError, match="is queued"):
        store.delete(job.id)
    with take(store) as claim:
        with pytest.raises(JobNotFinishedError, match="is in_progress"):
            store.delete(job.id)
        claim.finish_clip(0, {})
        claim.complete({})
    store.delete(job.id)
    assert store.page() == []
    with store._database.reading() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM clips")).scalar() == 0
    assert store.submit({}, key="key").id != job.id


# The order of the queue


def test_priority_goes_before_age(store: JobStore) -> None:
    ids = [store.submit({}, priority=priority).id for priority in (0, 5, 0, 5, -1)]
    order = [ids[index] for index in (1, 3, 0, 2, 4)]
    assert [store.position(job_id) for job_id in order] == [0, 1, 2, 3, 4]
    assert store.counts() == {"queued": 5}
    for job_id in order:
        with take(store) as claim:
            assert claim.job.id == job_id
            assert store.position(job_id) is None
            claim.complete({})
    assert store.claim("runner") is None
    assert store.counts() == {"completed": 5}


def test_clients_take_turns(store: JobStore) -> None:
    """One that submits many does not keep one that submits few waiting."""
    ids = [store.submit({}, client=client).id for client in ("a", "a", "a", "b", "c", "b")]
    order = [ids[index] for index in (0, 3, 4, 1, 5, 2)]
    assert [store.position(job_id) for job_id in order] == [0, 1, 2, 3, 4, 5]
    claims = [take(store, f"runner {number}") for number in range(2)]
    assert [claim.job.id for claim in claims] == order[:2], "both run: they count as their clients' turns"
    assert [store.position(job_id) for job_id in order[2:]] == [0, 1, 2, 3]
    store.submit({}, client="a", priority=1)
    with take(store, "runner 2") as claim:
        assert claim.job.priority == 1, "priority goes before turns"
    for claim in claims:
        with claim:
            claim.complete({})


def test_a_job_that_lost_its_runner_goes_before_all_others(store: JobStore) -> None:
    first = store.submit({})
    with take(store, "dies"):
        pass
    store.submit({}, priority=9)
    store.reclaim("dies")
    with take(store) as claim:
        assert claim.job.id == first.id


def test_a_restarted_runner_goes_on_with_its_own_job(store: JobStore) -> None:
    first = store.submit({})
    with take(store, "dies") as lost:
        pass
    store.submit({}, priority=9)
    with take(store, "dies") as claim:
        assert (claim.job.id, claim.epoch) == (first.id, lost.epoch + 1)


# Running


def test_callers_follow_a_job_to_its_end(store: JobStore) -> None:
    job = store.submit({})
    with take(store) as claim:
        assert (claim.job.state, claim.job.owner, claim.clips) == ("in_progress", "runner", [])
        assert store.get(job.id) == claim.job
        claim.report({"percent": 50})
        eventually(lambda: store.get(job.id).progress == {"percent": 50})
        claim.finish_clip(0, {"file": "0.mp4"})
        claim.finish_clip(1, {"file": "1.mp4"})
        assert [(clip.index, clip.result) for clip in store.clips(job.id)] == [
            (0, {"file": "0.mp4"}),
            (1, {"file": "1.mp4"}),
        ]
        assert [clip.index for clip in store.clips(job.id, after=0)] == [1]
        claim.report({"percent": 100})
        claim.complete({"file": "video.mp4"})
    job = store.get(job.id)
    assert (job.state, job.progress, job.result, job.error) == (
        "completed",
        {"percent": 100},
        {"file": "video.mp4"},
        None,
    )
    assert job.started_at is not None and job.finished_at is not None
    assert job.created_at <= job.started_at <= store.clips(job.id)[0].finished_at <= job.finished_at


def test_a_job_longer_than_its_lease_stays_with_its_runner(store: JobStore, runners: Runners) -> None:
    job = store.submit({"clips": 1, "steps": 170})
    runners.start("one")
    runners.start("two")
    eventually(lambda: finished(store, job))
    assert runners.clips(job) == [(0, 1)]


def test_eight_runners_run_nothing_twice(store: JobStore, runners: Runners) -> None:
    runners.settings = replace(QUICK, lease=10)
    submitted = [store.submit({"steps": 0}, priority=number % 3) for number in range(120)]
    for number in range(8):
        runners.start(f"runner-{number}")
    eventually(lambda: finished(store, *submitted), seconds=60)
    assert store.counts() == {"completed": 120}
    assert all(runners.clips(job) == [(0, 1), (1, 1), (2, 1)] for job in submitted)
    assert len({name for *_, name in runners.noted("clip")}) > 1


# Cancelling


def test_a_queued_job_is_cancelled_at_once(store: JobStore) -> None:
    job = store.submit({})
    cancelled = store.cancel(job.id)
    assert cancelled.state == "cancelled"
    assert cancelled.finished_at is not None
    assert store.claim("runner") is None
    assert store.cancel(job.id) == cancelled


def test_a_running_job_stops_within_a_step_and_a_beat(store: JobStore, runners: Runners) -> None:
    job = store.submit({"steps": 10_000})
    runners.start("one")
    eventually(lambda: runners.clips(job))
    started = time.monotonic()
    asked = store.cancel(job.id)
    assert (asked.state, asked.cancel_requested) == ("in_progress", True)
    eventually(lambda: store.get(job.id).state == "cancelled")
    assert time.monotonic() - started < 1.5
    after = store.submit({"clips": 1})
    eventually(lambda: finished(store, after))


def test_a_finished_job_cannot_be_cancelled(store: JobStore) -> None:
    job = store.submit({})
    with take(store) as claim:
        claim.complete({"file": "video.mp4"})
    done = store.get(job.id)
    assert store.cancel(job.id) == done


def test_the_partial_result_of_a_cancelled_job_is_kept(store: JobStore) -> None:
    job = store.submit({})
    with take(store) as claim:
        claim.finish_clip(0, {})
        store.cancel(job.id)
        with pytest.raises(JobCancelled):
            while True:
                claim.check()
        claim.cancelled({"file": "partial.mp4"})
    assert store.get(job.id).result == {"file": "partial.mp4"}


def test_a_job_to_be_cancelled_does_not_start_again(store: JobStore) -> None:
    """Whether its runner hands it back, fails, or is killed before it noticed."""
    handed_back, failed, orphaned = (store.submit({}) for _ in range(3))
    with take(store) as claim:
        store.cancel(handed_back.id)
        claim.release()
    with take(store) as claim:
        store.cancel(failed.id)
        assert claim.fail(BAD_LUCK, retry=True) == "cancelled"
    with take(store, "dies"):
        store.cancel(orphaned.id)
    store.reclaim("dies")
    assert store.claim("runner") is None
    assert store.counts() == {"cancelled": 3}
    assert finished(store, handed_back, failed, orphaned)


def test_a_job_whose_runner_is_dead_is_cancelled_at_once(store: JobStore) -> None:
    job = store.submit({})
    with take(store, "dies") as claim:
        pass
    store.reclaim("dies")
    assert store.cancel(job.id).state == "cancelled"
    with pytest.raises(LeaseLost):
        claim.complete({})


# Runners that are killed


def test_a_killed_runners_job_goes_on_elsewhere_after_the_lease(store: JobStore, runners: Runners) -> None:
    job = store.submit({"steps": 40})
    doomed = runners.start("one")
    runners.start("two")
    eventually(lambda: len(runners.clips(job)) == 2)
    time.sleep(0.3)
    killed = time.monotonic()
    doomed.kill()
    eventually(lambda: len(runners.clips(job)) == 3)
    waited = time.monotonic() - killed
    assert waited > QUICK.lease - QUICK.beat - 0.5
    eventually(lambda: finished(store, job))
    assert runners.clips(job) == [(0, 1), (1, 1), (1, 2), (2, 2)]
    assert_done_once(store, runners, job)


def test_a_killed_runner_that_restarts_goes_on_at_once(store: JobStore, runners: Runners) -> None:
    runners.settings = replace(QUICK, lease=60)
    job = store.submit({"steps": 25})
    doomed = runners.start("one")
    eventually(lambda: len(runners.clips(job)) == 2)
    killed = time.monotonic()
    doomed.kill()
    runners.start("one")
    eventually(lambda: len(runners.clips(job)) == 3)
    assert time.monotonic() - killed < 3
    eventually(lambda: finished(store, job))
    assert_done_once(store, runners, job)


def test_a_restarted_runner_hands_its_job_to_any_runner(store: JobStore) -> None:
    job = store.submit({})
    with take(store, "dies"):
        pass
    assert store.claim("other") is None
    store.reclaim("dies")
    with take(store, "other") as claim:
        assert claim.job.id == job.id


def test_kills_at_random_moments_lose_nothing_and_repeat_nothing(store: JobStore, runners: Runners) -> None:
    runners.settings = replace(QUICK, lease=10, attempts=100)
    chance = random.Random(2)  # noqa: S311 - no secret
    submitted = [store.submit({"steps": 3, "seconds": 0.01}) for _ in range(50)]
    fleet = {name: runners.start(name) for name in ("one", "two", "three")}
    for _ in range(20):
        time.sleep(chance.uniform(0, 0.1))
        name = chance.choice(list(fleet))
        fleet[name].kill()
        fleet[name] = runners.start(name)
    eventually(lambda: finished(store, *submitted), seconds=60)
    assert store.counts() == {"completed": 50}
    for job in submitted:
        assert_done_once(store, runners, job)


def test_a_frozen_runner_that_wakes_up_can_write_nothing(store: JobStore, runners: Runners) -> None:
    job = store.submit({"steps": 30})
    frozen = runners.start("one")
    eventually(lambda: len(runners.clips(job)) == 2)
    freeze(frozen, store, job)
    runners.start("two")
    eventually(lambda: finished(store, job))
    before = store.get(job.id), store.clips(job.id)
    thaw(frozen)
    eventually(lambda: runners.noted("lost") == [[job.id, "1"]])
    assert (store.get(job.id), store.clips(job.id)) == before
    assert before[0].owner == "two"
    assert_done_once(store, runners, job)


def test_every_write_of_a_runner_that_lost_its_job_is_refused(store: JobStore) -> None:
    job = store.submit({})
    with take(store) as old, take(store) as new:
        new.finish_clip(0, {"by": "new"})
        before = replace(store.get(job.id), progress=None), store.clips(job.id)
        old.report({"by": "old"})
        for write in (
            lambda: old.finish_clip(1, {}),
            lambda: old.complete({}),
            lambda: old.cancelled(),
            lambda: old.fail(BAD_LUCK, retry=True),
            lambda: old.fail(BAD_LUCK, retry=False),
            old.release,
        ):
            with pytest.raises(LeaseLost, match="another runner"):
                write()
        with pytest.raises(LeaseLost):
            while True:
                old.check()
        assert (store.get(job.id), store.clips(job.id)) == before
        new.complete({})


def test_a_job_ends_once(store: JobStore) -> None:
    job = store.submit({})
    with take(store) as claim:
        claim.complete({"file": "video.mp4"})
        for again in (lambda: claim.fail(BAD_LUCK, retry=False), claim.release, claim.cancelled):
            with pytest.raises(LeaseLost):
                again()
    assert store.get(job.id).state == "completed"


def test_a_job_that_kills_its_runners_is_failed_and_says_so(store: JobStore, runners: Runners) -> None:
    poison = store.submit({"deadly": 1})
    after = store.submit({})
    while not finished(store, poison):
        runners.start("one").join(2)
    job = store.get(poison.id)
    assert (job.state, job.attempts) == ("failed", 3)
    assert job.error is not None
    assert (job.error["type"], job.error["code"]) == ("server_error", "runner_died")
    assert "died 3 times at clip 2" in job.error["message"]
    assert runners.clips(poison) == [(0, 1), (1, 1), (1, 2), (1, 3)]
    eventually(lambda: finished(store, after))
    assert store.get(after.id).state == "completed"


def test_a_runner_whose_gpu_hangs_exits(store: JobStore, runners: Runners) -> None:
    job = store.submit({"clips": 2, "hangs": 1})
    runners.settings = replace(QUICK, stall=1)
    hung = runners.start("one")
    hung.join(10)
    assert hung.exitcode == STALLED_EXIT
    assert runners.clips(job) == [(0, 1), (1, 1)]


def test_sigterm_hands_the_job_back_uncounted(store: JobStore, runners: Runners) -> None:
    job = store.submit({"steps": 25})
    runners.settings = replace(QUICK, lease=20)
    leaving = runners.start("one")
    eventually(lambda: len(runners.clips(job)) == 2)
    runners.start("two")
    asked = time.monotonic()
    leaving.terminate()
    eventually(lambda: len(runners.clips(job)) == 3)
    assert time.monotonic() - asked < 15  # and not after the lease
    assert store.get(job.id).attempts == 1
    eventually(lambda: finished(store, job))
    leaving.join(30)
    assert leaving.exitcode == 0
    assert_done_once(store, runners, job)


# Attempts that fail


def test_a_failed_attempt_is_repeated_twice_ever_later(store: JobStore) -> None:
    job = store.submit({})
    starts, first_start = [], None
    for outcome in ("queued", "queued", "failed"):
        while (claim := store.claim("runner")) is None:
            time.sleep(0.01)
        with claim:
            starts.append(time.monotonic())
            assert claim.fail(BAD_LUCK, retry=True) == outcome
            first_start = first_start or claim.job.started_at
        job = store.get(job.id)
        assert (job.error, job.started_at) == (BAD_LUCK, first_start)
    assert starts[1] - starts[0] >= QUICK.backoff - 0.05
    assert starts[2] - starts[1] >= 2 * QUICK.backoff - 0.05
    assert store.claim("runner") is None


def test_a_callers_mistake_fails_at_once(store: JobStore) -> None:
    job = store.submit({})
    mistake = {"type": "invalid_request_error", "code": "no_voice", "message": "The voice is silent.", "param": "audio"}
    with take(store) as claim:
        assert claim.fail(mistake, retry=False) == "failed"
    job = store.get(job.id)
    assert (job.state, job.error, job.attempts) == ("failed", mistake, 1)


def test_attempts_are_counted_from_the_last_finished_clip(store: JobStore) -> None:
    store.settings = replace(QUICK, backoff=0)
    job = store.submit({})
    for attempt, clip, outcome in [
        (1, None, "queued"),
        (2, None, "queued"),
        (3, 0, "queued"),  # the third attempt at clip 0 is the first at clip 1
        (2, None, "queued"),
        (3, None, "failed"),
    ]:
        with take(store) as claim:
            assert claim.job.attempts == attempt
            if clip is not None:
                claim.finish_clip(clip, {})
            assert claim.fail(BAD_LUCK, retry=True) == outcome
    assert store.get(job.id).state == "failed"


# A database that goes away


only_on_postgresql = pytest.mark.parametrize("database", ["postgresql"], indirect=True)  # SQLite is never away


@only_on_postgresql
def test_a_restart_of_the_database_in_mid_job_repeats_no_clip(
    database: Database, store: JobStore, runners: Runners
) -> None:
    assert database.server is not None
    submitted = [store.submit({"clips": 6, "steps": 25}) for _ in range(3)]
    for name in ("one", "two", "three", "idle"):
        runners.start(name)
    time.sleep(QUICK.lease)  # all of them may take over by now
    database.server.stop()
    with pytest.raises(OUTAGES):
        store.get(submitted[0].id)
    time.sleep(2 * QUICK.lease)
    database.server.start()
    eventually(lambda: finished(store, *submitted))
    for job in submitted:
        assert runners.clips(job) == [(index, 1) for index in range(6)]


@only_on_postgresql
def test_callers_do_not_notice_a_restart_of_the_database_between_two_questions(
    database: Database, store: JobStore
) -> None:
    assert database.server is not None
    job = store.submit({})
    database.server.stop()
    database.server.start()
    assert store.get(job.id) == job


@only_on_postgresql
def test_an_answer_that_gets_lost_on_the_way_changes_nothing(database: Database) -> None:
    """What was written is written once, though whoever wrote it had to say it again."""
    with LossyWire(database) as wire, closing(JobStore(wire.url, replace(QUICK, beat=0.5, backoff=0))) as store:

        def lost() -> None:
            wire.lose_next_answer = True

        lost()
        with pytest.raises(OUTAGES):
            store.submit({}, key="key")
        job = store.submit({}, key="key")
        assert store.counts() == {"queued": 1}

        for index in range(2):
            lost()
            with pytest.raises(OUTAGES):
                store.claim("runner")
            with take(store) as claim:
                lost()
                claim.finish_clip(index, {"index": index})
                lost()
                assert claim.fail(BAD_LUCK, retry=True) == "queued"
            assert store.get(job.id).attempts == 1
        with take(store) as claim:
            assert [clip.result for clip in claim.clips] == [{"index": 0}, {"index": 1}]
            lost()
            claim.complete({"file": "video.mp4"})
        assert not wire.lose_next_answer
        assert store.get(job.id).result == {"file": "video.mp4"}


@only_on_postgresql
def test_a_runner_gives_up_when_the_database_stays_away(database: Database) -> None:
    assert database.server is not None
    with closing(JobStore(database.url, replace(QUICK, outage=1))) as store:
        store.submit({})
        with take(store) as claim:
            database.server.stop()
            try:
                with pytest.raises(LeaseLost, match="database has been away"):
                    claim.finish_clip(0, {})
                with pytest.raises(LeaseLost, match="database has been away"):
                    while True:
                        claim.check()
            finally:
                database.server.start()


def test_after_a_suspension_runners_keep_their_jobs(store: JobStore, runners: Runners) -> None:
    """The lid was closed, all leases have run out, and the idle runner wakes up first."""
    job = store.submit({"clips": 1, "steps": 250})
    busy, idle = runners.start("busy"), runners.start("idle")
    eventually(lambda: runners.clips(job))
    time.sleep(QUICK.lease)  # the idle one may take over from now on
    freeze(idle, store, job)
    freeze(busy, store, job)
    time.sleep(QUICK.lease + 0.5)
    thaw(idle)
    time.sleep(0.5)
    thaw(busy)
    eventually(lambda: finished(store, job))
    assert runners.clips(job) == [(0, 1)]


def test_another_process_may_hold_the_sqlite_file_for_seconds(tmp_path: Path) -> None:
    with closing(JobStore(f"sqlite:///{tmp_path / 'jobs.db'}", QUICK)) as store:
        with closing(sqlite3.connect(tmp_path / "jobs.db", isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            timer = threading.Timer(2, other.execute, ["COMMIT"])
            timer.start()
            store.submit({})
            timer.join()
        assert store.counts() == {"queued": 1}


# The tables


def open_store(url: str, together: Barrier) -> None:
    together.wait()
    with closing(JobStore(url)) as store:
        store.submit({})


def test_eight_processes_may_open_a_new_database_at_once(database: Database) -> None:
    together = processes.Barrier(8)
    openers = [processes.Process(target=open_store, args=(database.url, together)) for _ in range(8)]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join()
    assert [opener.exitcode for opener in openers] == [0] * 8
    with closing(JobStore(database.url)) as store:
        assert store.counts() == {"queued": 8}


def test_the_migrations_make_the_tables_that_the_code_uses(store: JobStore) -> None:
    def is_no_index(_object: object, _name: str, kind: str, *_: object) -> bool:
        return kind != "index"  # alembic cannot compare the one whose order is mixed

    with store._database.reading() as connection:
        migrations = MigrationContext.configure(connection, opts={"include_object": is_no_index})
        assert compare_metadata(migrations, metadata) == []
        assert "jobs_in_order" in [index["name"] for index in sa.inspect(connection).get_indexes("jobs")]


def test_a_database_of_a_newer_version_is_left_alone(store: JobStore, database: Database) -> None:
    with store._database.writing() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'ffff'"))
    with pytest.raises(RuntimeError, match=r"newer version \(ffff\)"):
        JobStore(database.url)


@pytest.mark.parametrize("url", ["mysql://localhost/jobs", "postgres://localhost/jobs"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="use sqlite:///FILE or postgresql://"):
        JobStore(url)


# The process


def hold_name(folder: Path) -> None:
    note(folder / "names", runner_name(folder, "GPU-1"))
    time.sleep(3600)


def test_a_runners_name_is_its_own_and_comes_back_after_a_kill(tmp_path: Path) -> None:
    def start(number: int) -> tuple[BaseProcess, str]:
        process = processes.Process(target=hold_name, args=(tmp_path,), daemon=True)
        process.start()
        eventually(lambda: names.exists() and len(names.read_text().splitlines()) == number)
        return process, names.read_text().splitlines()[-1]

    names = tmp_path / "names"
    (first, first_name), (second, second_name) = start(1), start(2)
    assert first_name != second_name
    assert "-GPU-1-" in first_name
    first.kill()
    first.join()
    third, third_name = start(3)
    assert third_name == first_name
    (tmp_path / "elsewhere").mkdir()
    assert runner_name(tmp_path / "elsewhere", "GPU-1") not in (first_name, second_name)
    for process in (second, third):
        process.kill()


def test_checking_costs_nothing(store: JobStore) -> None:
    store.submit({})
    with take(store) as claim:
        started = time.perf_counter()
        for step in range(10_000):
            claim.report({"step": step})
            claim.check()
        assert time.perf_counter() - started < 0.5  # 20 ms; a look-up in a database would take seconds
        claim.complete({})


def test_the_queue_does_not_load_the_model() -> None:
    subprocess.run([sys.executable, "-c", "import sys, avatar_api.jobs; assert 'torch' not in sys.modules"], check=True)
