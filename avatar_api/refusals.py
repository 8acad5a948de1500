"""Why there is nothing for a caller: what each error means to it, whether it speaks HTTP, gRPC or RunPod's language."""

import logging
from dataclasses import dataclass

from avatar_api.database import OUTAGES
from avatar_api.jobs import (
    CANCELLED,
    IdempotencyError,
    Job,
    JobNotFinishedError,
    JobNotFoundError,
    QueueFullError,
)
from avatar_api.storage import StorageError
from infinitetalk.errors import InputError

logger = logging.getLogger(__name__)

UNAVAILABLE = "The database or the storage is away, or its disk is full; try again in a minute."
RETRY_SECONDS = 30  # what a caller is asked to wait for


class NotReadyError(Exception):
    """There is no such content yet; the message says what there is."""


REFUSABLE = (
    InputError,
    JobNotFoundError,
    IdempotencyError,
    JobNotFinishedError,
    NotReadyError,
    QueueFullError,
    StorageError,
    OSError,  # a full disk, above all
    *OUTAGES,
)


@dataclass(frozen=True)
class Refusal:
    """Why there is nothing for the caller, whatever it speaks."""

    status: int
    """HTTP's."""
    message: str
    code: str
    param: str | None = None
    retry_seconds: int | None = None
    """After which the same may work."""

    @property
    def error(self) -> dict[str, str | None]:
        """The error object, the same in every interface."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"type": kind, "code": self.code, "message": self.message, "param": self.param}


def refusal(error: Exception) -> Refusal:
    """What is told of one of these errors."""
    if isinstance(error, InputError):
        return Refusal(413 if error.code == "too_large" else 400, str(error), error.code, error.param)
    if isinstance(error, JobNotFoundError):
        return Refusal(404, str(error).replace("job", "video"), "not_found", "video_id")
    if isinstance(error, IdempotencyError):
        return Refusal(409, str(error), "idempotency_conflict", "Idempotency-Key")
    if isinstance(error, JobNotFinishedError):
        return Refusal(409, str(error).replace("Job", "Video"), "not_finished", "video_id")
    if isinstance(error, NotReadyError):
        return Refusal(409, str(error), "not_ready")
    if isinstance(error, QueueFullError):
        return Refusal(429, str(error), "queue_full", retry_seconds=RETRY_SECONDS)
    logger.error("%s: %s", type(error).__name__, error, exc_info=isinstance(error, OSError))
    return Refusal(503, UNAVAILABLE, "unavailable", retry_seconds=RETRY_SECONDS)


def failure(job: Job) -> Refusal:
    """What is told to a caller that waited for a video which failed or was cancelled."""
    error = job.error or {"message": "The job was cancelled.", "code": "cancelled", "param": None}
    status = 400 if error.get("type") == "invalid_request_error" else 500
    return Refusal(409 if job.state == CANCELLED else status, error["message"], error["code"], error["param"])
