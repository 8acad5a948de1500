"""Webhooks as those who get them see them: real receivers, real databases, and API processes that are killed."""

import base64
import hashlib
import hmac
import json
import logging
import multiprocessing
import re
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from avatar_api.jobs import Job, JobStore
from avatar_api.settings import ServiceSettings
from avatar_api.webhooks import PARALLEL, Webhooks, WebhookTimes, webhook_secret
from infinitetalk.errors import InputError
from tests.databases import (  # noqa: F401 - for pytest to find
    Database,
    PostgresServer,
    database_fixture,
    postgres_fixture,
)
from tests.waiting import eventually

QUICK = WebhookTimes(attempt=5, claim=60, poll=0.02, retries=(0.02,) * 4)
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["avatar_api.webhooks", "pytest"])


class Receiver(ThreadingHTTPServer):
    """Notes what it gets, and answers as it is told: one status after the other, the last one for good."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hook)
        self.statuses = [204]
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.open = threading.Event()  # until then, nobody gets an answer
        self.open.set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook?token=abc123"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.received]


class _Hook(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = self.server.statuses.pop(0) if len(self.server.statuses) > 1 else self.server.statuses[0]
        self.server.received.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.server.open.wait(60)
        self.send_response(status)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running
        running.open.set()
        running.shutdown()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    yield opened
    opened.close()


@pytest.fixture
def sender(store: JobStore, tmp_path: Path) -> Iterator[Callable[..., Webhooks]]:
    """Starts the webhooks of an API process."""
    started = []

    def start(times: WebhookTimes = QUICK, describe: Callable[[Job], dict[str, Any]] = describe) -> Webhooks:
        started.append(Webhooks(store, settings(tmp_path), describe, times))
        started[-1].start()
        return started[-1]

    yield start
    for webhooks in started:
        webhooks.stop()


def settings(home: Path, allowed_hosts: str = "127.0.0.1") -> ServiceSettings:
    return ServiceSettings(home=home, allowed_hosts=allowed_hosts, webhook_secret=SECRET)


def describe(job: Job) -> dict[str, Any]:
    return {"id": job.id, "object": "video", "status": job.state, "prompt": "Übermut 🙂"}


def finished(store: JobStore, url: str | None, state: str = "completed") -> Job:
    job = store.submit({}, webhook_url=url)
    if state == "cancelled":
        return store.cancel(job.id)
    claim = store.claim("runner")
    assert claim is not None
    with claim:
        if state == "completed":
            claim.complete({})
        else:
            claim.fail({"type": "server_error", "code": "bad", "message": "Bad.", "param": None}, retry=False)
    return store.get(job.id)


def settled(store: JobStore, *jobs: Job) -> bool:
    """Nothing more will be sent for these jobs."""
    return all(store.get(job.id).webhook_url is None for job in jobs)


# What is sent


@pytest.mark.parametrize("state", ["completed", "failed", "cancelled"])
def test_the_end_of_a_job_is_told(
    store: JobStore, receiver: Receiver, sender: Callable[..., Webhooks], state: str
) -> None:
    job = finished(store, receiver.url, state)
    sender()
    eventually(lambda: settled(store, job))
    ((headers, body),) = receiver.received
    event = json.loads(body)
    assert event["type"] == f"video.{state}"
    assert event["data"] == describe(job)
    assert datetime.fromisoformat(event["timestamp"]).timestamp() == pytest.approx(job.finished_at, abs=1e-3)
    assert headers["content-type"] == "application/json"


def test_its_signature_is_that_of_standard_webhooks(
    store: JobStore, receiver: Receiver, sender: Callable[..., Webhooks]
) -> None:
    job = finished(store, receiver.url)
    sender()
    eventually(lambda: settled(store, job))
    ((headers, body),) = receiver.received
    assert Webhook(SECRET).verify(body, headers) == json.loads(body)  # the time is judged too
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    by_hand = hmac.new(bytes(range(32)), signed, hashlib.sha256).digest()
    assert headers["webhook-signature"] == "v1," + base64.b64encode(by_hand).decode()
    for forged in (body.replace(b"completed", b"cancelled"), body + b" "):
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(forged, headers)


def test_only_who_asked_for_it_is_told(store: JobStore, receiver: Receiver, sender: Callable[..., Webhooks]) -> None:
    finished(store, None)
    store.submit({}, webhook_url=receiver.url)  # not finished
    asked = finished(store, receiver.url, "cancelled")
    sender()
    eventually(lambda: settled(store, asked))
    assert [json.loads(body)["data"]["id"] for _, body in receiver.received] == [asked.id]


# How often


def test_it_is_sent_until_it_is_received_each_time_with_the_same_id(
    store: JobStore, receiver: Receiver, sender: Callable[..., Webhooks]
) -> None:
    receiver.statuses = [500, 404, 302, 200]
    job = finished(store, receiver.url)
    sender()
    eventually(lambda: settled(store, job))
    assert len(receiver.received) == 4  # nobody went after the redirect
    assert len(set(receiver.ids)) == 1
    assert len({body for _, body in receiver.received}) == 1
    for headers, body in receiver.received:
        Webhook(SECRET).verify(body, headers)


def test_each_attempt_waits_longer_for_the_next(
    store: JobStore, receiver: Receiver, sender: Callable[..., Webhooks], caplog: pytest.LogCaptureFixture
) -> None:
    receiver.statuses = [500]
    finished(store, receiver.url)
    caplog.set_level(logging.INFO)
    sender(WebhookTimes(poll=0.02, retries=(1, 3600)))
    eventually(lambda: len(re.findall("webhook: again in", caplog.text)) == 2)
    first, second = map(int, re.findall(r"webhook: again in (\d+) s: the answer was 500", caplog.text))
    assert first == 1
    assert 3240 <= second <= 3960
    assert store.next_webhook(0) is None  # not due
    waits = WebhookTimes().retries
    assert list(waits) == sorted(waits)
    assert sum(waits) > 22 * 3600


def test_it_is_given_up_after_the_last_attempt(
    store: JobStore, receiver: Receiver, sender: Callable[..., Webhooks], caplog: pytest.LogCaptureFixture
) -> None:
    receiver.statuses = [500]
    job = finished(store, receiver.url)
    sender()
    eventually(lambda: settled(store, job))
    assert len(receiver.received) == 1 + len(QUICK.retries)
    assert f"job {job.id}: webhook: given up after 5 attempts: the answer was 500" in caplog.text


def test_it_is_given_up_at_once_where_it_is_gone(
    store: JobStore, receiver: Receiver, sender: Callable[..., Webhooks]
) -> None:
    receiver.statuses = [410]
    job = finished(store, receiver.url)
    sender()
    eventually(lambda: settled(store, job))
    assert len(receiver.received) == 1


def test_who_does_not_answer_is_asked_again(
    store: JobStore, receiver: Receiver, sender: Callable[..., Webhooks], caplog: pytest.LogCaptureFixture
) -> None:
    receiver.open.clear()
    job = finished(store, receiver.url)
    caplog.set_level(logging.INFO)
    sender(WebhookTimes(attempt=0.2, poll=0.02, retries=(0.02,) * 9))
    eventually(lambda: len(receiver.received) == 2)
    receiver.open.set()
    eventually(lambda: settled(store, job))
    assert "127.0.0.1 took longer than 0.2 s" in caplog.text
    assert "abc123" not in caplog.text


def test_an_address_inside_is_not_asked(
    store: JobStore, receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = finished(store, receiver.url)
    webhooks = Webhooks(store, settings(tmp_path, allowed_hosts=""), describe, QUICK)
    webhooks.start()
    eventually(lambda: settled(store, job))
    webhooks.stop()
    assert receiver.received == []
    assert "not a public address" in caplog.text


def test_an_event_that_could_not_be_made_is_sent_later(
    store: JobStore, receiver: Receiver, sender: Callable[..., Webhooks]
) -> None:
    mishaps = [RuntimeError("not now"), InputError("video", "not now either")]

    def describe_with_mishaps(job: Job) -> dict[str, Any]:
        if mishaps:
            raise mishaps.pop()
        return describe(job)

    job = finished(store, receiver.url)
    sender(describe=describe_with_mishaps)
    eventually(lambda: settled(store, job))
    assert len(receiver.received) == 1


# Who waits for whom


def test_a_slow_receiver_does_not_hold_up_the_others(
    store: JobStore, receiver: Receiver, sender: Callable[..., Webhooks]
) -> None:
    receiver.open.clear()
    slow = [finished(store, receiver.url) for _ in range(PARALLEL - 1)]
    sender()
    eventually(lambda: len(receiver.received) == len(slow))
    with Receiver() as other:
        quick = [finished(store, other.url) for _ in range(3)]
        eventually(lambda: settled(store, *quick))
        other.shutdown()
    assert not settled(store, slow[0])
    receiver.open.set()
    eventually(lambda: settled(store, *slow))


def test_no_more_than_a_few_are_on_their_way(
    store: JobStore, receiver: Receiver, sender: Callable[..., Webhooks]
) -> None:
    receiver.open.clear()
    jobs = [finished(store, receiver.url) for _ in range(PARALLEL + 2)]
    sender()
    eventually(lambda: len(receiver.received) == PARALLEL)
    assert sum(store.get(job.id).webhook_attempts for job in jobs) == PARALLEL
    receiver.open.set()
    eventually(lambda: settled(store, *jobs))
    assert sorted(receiver.ids) == sorted(set(receiver.ids))


def test_stopping_does_not_wait_for_a_slow_receiver(
    store: JobStore, receiver: Receiver, sender: Callable[..., Webhooks]
) -> None:
    receiver.open.clear()
    job = finished(store, receiver.url)
    webhooks = sender(WebhookTimes(attempt=3600, claim=1, poll=0.02))
    eventually(lambda: receiver.received)
    webhooks.stop()  # would take an hour
    assert not settled(store, job)
    sender()  # the next process
    eventually(lambda: len(receiver.received) > 1)
    receiver.open.set()
    eventually(lambda: settled(store, job))
    assert len(set(receiver.ids)) == 1


def test_stopping_lets_those_on_their_way_arrive(
    store: JobStore, receiver: Receiver, sender: Callable[..., Webhooks]
) -> None:
    receiver.open.clear()
    job = finished(store, receiver.url)
    webhooks = sender()
    eventually(lambda: receiver.received)
    threading.Timer(0.1, receiver.open.set).start()
    webhooks.stop()
    assert settled(store, job)


# Several processes


def send_webhooks(url: str, home: Path, times: WebhookTimes) -> None:
    """An API process."""
    Webhooks(JobStore(url), settings(home), describe, times).start()
    threading.Event().wait()


@pytest.fixture
def api_process(tmp_path: Path) -> Iterator[Callable[[str, WebhookTimes], BaseProcess]]:
    running: list[BaseProcess] = []

    def start(url: str, times: WebhookTimes) -> BaseProcess:
        running.append(processes.Process(target=send_webhooks, args=(url, tmp_path, times), daemon=True))
        running[-1].start()
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.join()


def test_of_several_processes_one_sends_it(
    database: Database, receiver: Receiver, api_process: Callable[[str, WebhookTimes], BaseProcess]
) -> None:
    store = JobStore(database.url)
    for _ in range(2):
        api_process(database.url, QUICK)
    jobs = [finished(store, receiver.url) for _ in range(20)]
    eventually(lambda: settled(store, *jobs))
    store.close()
    assert len(receiver.ids) == len(jobs)
    assert len(set(receiver.ids)) == len(jobs)


def test_when_a_process_is_killed_while_it_sends_another_sends_it_again(
    database: Database, receiver: Receiver, api_process: Callable[[str, WebhookTimes], BaseProcess]
) -> None:
    store = JobStore(database.url)
    job = finished(store, receiver.url)
    receiver.open.clear()
    times = WebhookTimes(attempt=5, claim=1, poll=0.02)
    first = api_process(database.url, times)
    eventually(lambda: receiver.received)
    first.kill()
    first.join()
    receiver.open.set()
    api_process(database.url, times)
    eventually(lambda: settled(store, job))
    store.close()
    assert len(receiver.ids) == 2
    assert len(set(receiver.ids)) == 1


def test_what_ends_while_the_database_is_away_is_told_later(
    postgres: PostgresServer, receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = JobStore(postgres.new_schema())
    webhooks = Webhooks(store, settings(tmp_path), describe, QUICK)
    webhooks.start()
    postgres.stop()
    eventually(lambda: "webhooks: cannot be looked for" in caplog.text)
    postgres.start()
    job = finished(store, receiver.url)
    eventually(lambda: settled(store, job))
    webhooks.stop()
    store.close()
    assert len(receiver.received) == 1


# The secret


def test_a_secret_is_made_once_for_all_and_kept_from_others(tmp_path: Path) -> None:
    own = ServiceSettings(home=tmp_path / "new", webhook_secret=None)
    with ProcessPoolExecutor(8, mp_context=processes) as pool:
        made = set(pool.map(webhook_secret, [own] * 16))
    (secret,) = made
    assert webhook_secret(own) == secret
    (file,) = (tmp_path / "new").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().strip() == secret
    assert len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32


def test_another_home_has_another_secret(tmp_path: Path) -> None:
    made = {webhook_secret(ServiceSettings(home=tmp_path / name, webhook_secret=None)) for name in "ab"}
    assert len(made) == 2


def test_the_secret_of_the_settings_is_used_and_no_other_made(tmp_path: Path) -> None:
    assert webhook_secret(settings(tmp_path)) == SECRET
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("secret", ["", "whsec_", "my secret", SECRET[6:], "whsec_c2hvcnQ=", "whsec_" + "!" * 44])
def test_what_is_no_secret_is_not_used(tmp_path: Path, secret: str) -> None:
    wrong = ServiceSettings(home=tmp_path, webhook_secret=secret)
    with pytest.raises(ValueError, match=r"AVATAR_WEBHOOK_SECRET must be whsec_ and 24 to 64 bytes") as error:
        webhook_secret(wrong)
    assert len(secret) < 10 or secret not in str(error.value)
    (tmp_path / "webhook_secret").write_text(secret)
    with pytest.raises(ValueError, match=r"webhook_secret must be whsec_"):
        webhook_secret(ServiceSettings(home=tmp_path, webhook_secret=None))


def test_settings_that_cannot_be_show_at_the_start(store: JobStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="AVATAR_ALLOWED_HOSTS"):
        Webhooks(store, settings(tmp_path, allowed_hosts="10.0.0.0/99"), describe)
