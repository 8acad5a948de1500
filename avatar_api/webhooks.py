"""Webhooks: who asked for it is told when a job has ended, in the form of standardwebhooks.com.

    webhooks = Webhooks(store, settings, describe)  # in each API process
    webhooks.start()
    ...
    webhooks.stop()

What is due, and since when, is in the job's row: a process claims one webhook for a while and sends it, and if it dies
meanwhile, any other claims it later. So a webhook arrives at least once, with the same id each time.
"""

import base64
import json
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from standardwebhooks import Webhook

from avatar_api.jobs import Job, JobStore
from avatar_api.logs import of_job
from avatar_api.outgoing import AllowedHosts, post
from avatar_api.secret_files import kept_secret
from avatar_api.settings import ServiceSettings
from infinitetalk.errors import InputError

logger = logging.getLogger(__name__)

PARALLEL = 8  # so many at once: slow receivers do not hold up the others
SECRET_PREFIX = "whsec_"  # noqa: S105 - what secrets begin with
SECRET_BYTES = range(24, 65)  # as standardwebhooks.com has it
GONE = 410
STOP_SECONDS = 0.8  # what those on their way may take when the process ends


@dataclass(frozen=True)
class WebhookTimes:
    """How long everybody waits, in seconds."""

    attempt: float = 15
    """For the whole of one attempt."""
    claim: float = 60
    """After so long without word of an attempt, the process that made it is dead."""
    poll: float = 1
    """Between questions for webhooks that are due."""
    retries: tuple[float, ...] = (5, 30, 120, 600, 3600, 3 * 3600, 6 * 3600, 12 * 3600)
    """Between one attempt and the next, give or take a tenth; after the last one it is given up."""


class Webhooks:
    """Sends the webhooks of finished jobs, from threads of their own."""

    def __init__(
        self,
        store: JobStore,
        settings: ServiceSettings,
        describe: Callable[[Job], dict[str, Any]],
        times: WebhookTimes = WebhookTimes(),
    ) -> None:
        """describe: a job as callers see it. Raises ValueError for settings that cannot be."""
        AllowedHosts.parse(settings.allowed_hosts)
        self._signer = Webhook(webhook_secret(settings))
        self._store, self._settings, self._describe, self._times = store, settings, describe, times
        self._stopping = threading.Event()
        self._free = threading.Semaphore(PARALLEL)
        self._thread = threading.Thread(target=self._send_all, name="webhooks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Waits a moment for those on their way; what cannot wait is sent again by whoever starts next."""
        self._stopping.set()
        end = time.monotonic() + STOP_SECONDS
        for _ in range(PARALLEL):
            self._free.acquire(timeout=max(0, end - time.monotonic()))

    def _send_all(self) -> None:
        while not self._stopping.is_set():
            if not self._free.acquire(timeout=self._times.poll):
                continue
            job = self._next()
            if job is None:
                self._free.release()
                self._stopping.wait(self._times.poll)
            else:
                threading.Thread(target=self._send, args=(job,), name=f"webhook of {job.id}", daemon=True).start()

    def _next(self) -> Job | None:
        try:
            return None if self._stopping.is_set() else self._store.next_webhook(self._times.claim)
        except Exception as error:  # an outage mostly; this thread must live
            logger.warning("webhooks: cannot be looked for: %s", error)
            return None

    def _send(self, job: Job) -> None:
        """One attempt, and what follows from it."""
        try:
            with of_job(job.id):
                again_after = self._attempt(job)
            self._store.webhook_sent(job.id, again_after)
        except Exception as error:  # an outage mostly; it will be sent again
            logger.warning("job %s: webhook: its outcome cannot be recorded: %s", job.id, error)
        finally:
            self._free.release()

    def _attempt(self, job: Job) -> float | None:
        """The seconds until the next attempt; None if there is to be none."""
        try:
            status = self._post(job)
        except InputError as error:
            outcome = str(error)
        except Exception:
            logger.exception("job %s: webhook: not sent", job.id)
            outcome = "it could not be made"
        else:
            if 200 <= status < 300:
                logger.info("job %s: webhook: received", job.id)
                return None
            outcome = f"the answer was {status}"
            if status == GONE:
                logger.info("job %s: webhook: given up: %s", job.id, outcome)
                return None
        if job.webhook_attempts > len(self._times.retries):
            logger.warning("job %s: webhook: given up after %d attempts: %s", job.id, job.webhook_attempts, outcome)
            return None
        wait = self._times.retries[job.webhook_attempts - 1] * random.uniform(0.9, 1.1)  # noqa: S311 - no secret
        logger.info("job %s: webhook: again in %.0f s: %s", job.id, wait, outcome)
        return wait

    def _post(self, job: Job) -> int:
        url, ended = cast(str, job.webhook_url), cast(float, job.finished_at)  # the store gives no others
        event = {"type": f"video.{job.state}", "timestamp": _iso(ended), "data": self._describe(job)}
        body = json.dumps(event)
        name = f"msg_{job.id}_{round(1000 * ended)}"  # a job that is run again ends again, which is another event
        now = datetime.now(UTC)
        headers = {
            "Content-Type": "application/json",
            "webhook-id": name,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._signer.sign(name, now, body),
        }
        return post(url, body.encode(), headers, "webhook_url", self._settings, self._times.attempt)


def webhook_secret(settings: ServiceSettings) -> str:
    """What webhooks are signed with: the setting, or a secret made once and kept in the home folder.

    Raises ValueError for what is no secret.
    """
    if settings.webhook_secret is not None:
        return _judged(settings.webhook_secret.get_secret_value(), "AVATAR_WEBHOOK_SECRET")
    file = settings.home / "webhook_secret"
    made = SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()
    return _judged(kept_secret(file, made), str(file))


def _judged(secret: str, where: str) -> str:
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except ValueError:
        key = b""
    if not secret.startswith(SECRET_PREFIX) or len(key) not in SECRET_BYTES:
        sizes = f"{SECRET_BYTES[0]} to {SECRET_BYTES[-1]} bytes in base64"
        raise ValueError(f"{where} must be {SECRET_PREFIX} and {sizes}: echo {SECRET_PREFIX}$(openssl rand -base64 32)")
    return secret


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
