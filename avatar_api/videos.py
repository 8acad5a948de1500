"""What can be done with videos, for one client at a time, whether it speaks HTTP or gRPC.

A request is judged, its files are laid into the job's folder, and the job is queued: nothing here computes or waits.
"""

import asyncio
import logging
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from avatar_api import outgoing, previews, tracing
from avatar_api.inputs import Planned, Source, lay_down
from avatar_api.jobs import (
    CANCELLED,
    COMPLETED,
    FAILED,
    FINISHED,
    IN_PROGRESS,
    QUEUED,
    Job,
    JobNotFoundError,
    JobStore,
    QueueLimits,
    State,
)
from avatar_api.refusals import NotReadyError
from avatar_api.requests import VideoRequest, with_few_steps
from avatar_api.settings import ServiceSettings
from avatar_api.storage import Storage
from infinitetalk.errors import InputError

logger = logging.getLogger(__name__)

FILES = ("input_reference", "audio", "audio_2")
MODEL = "infinitetalk"
LONGEST_KEY = 255  # characters of an idempotency key
PAGE, LARGEST_PAGE = 20, 100  # videos of a list, unless asked otherwise, and at most
HEARTBEAT_SECONDS = 15.0  # of silence, after which an event stream says that it is alive
POLL_SECONDS = 0.1  # how often a call that waits for its video looks for it, and whether its caller is still there
FOLLOW_SECONDS, QUEUED_SECONDS = 0.25, 1.0  # how often an event stream looks; while the video waits, places cost more


AN_ID = "video_0123456789abcdef01234567"
A_VIDEO: dict[str, Any] = {
    "id": AN_ID,
    "object": "video",
    "model": MODEL,
    "status": "in_progress",
    "progress": 37,
    "created_at": 1795000000,
    "started_at": 1795000002,
    "completed_at": None,
    "expires_at": None,
    "prompt": "A woman talks.",
    "size": "480p",
    "seconds": None,
    "seed": 42,
    "stage": "generating",
    "queue_position": None,
    "clip": 1,
    "clips": 2,
    "step": 30,
    "steps": 40,
    "eta_seconds": 410.5,
    "error": None,
    "remixed_from_video_id": None,
}


class Backend(Protocol):
    """What the routes work on."""

    settings: ServiceSettings
    store: JobStore
    storage: Storage


class VideoError(BaseModel):
    type: Literal["invalid_request_error", "server_error"]
    code: str
    message: Annotated[str, Field(description="What is wrong with which input, and what would be right.")]
    param: str | None


class Error(BaseModel):
    """Every error has this shape."""

    error: VideoError


class Video(BaseModel):
    """A video, made or in the making."""

    model_config = ConfigDict(json_schema_extra={"examples": [A_VIDEO]})

    id: str
    object: Literal["video"] = "video"
    model: str = MODEL
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    progress: Annotated[int, Field(ge=0, le=100, description="Per cent.")]
    created_at: Annotated[int, Field(description="Seconds since 1970, UTC, as all times here.")]
    started_at: int | None
    completed_at: int | None
    expires_at: Annotated[int | None, Field(description="When a finished video is deleted.")]
    prompt: str
    size: str
    seconds: Annotated[str | None, Field(description="How long it is, once it is known.")]
    seed: int
    stage: Annotated[str | None, Field(description="queued, preparing, generating, encoding or uploading.")]
    queue_position: Annotated[int | None, Field(description="How many videos go first.")]
    clip: Annotated[int | None, Field(description="In the making, of `clips`.")]
    clips: int | None
    step: Annotated[int | None, Field(description="The last one done of the clip's `steps`.")]
    steps: int | None
    eta_seconds: Annotated[float | None, Field(description="How long it will still take, by its own steps so far.")]
    error: VideoError | None
    remixed_from_video_id: None = None


class VideoPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


@dataclass(frozen=True)
class Happening:
    """What those who follow a video are told."""

    kind: State | Literal["progress", "clip", "deleted"]
    data: dict[str, Any]
    seen: int
    """How many clips they know of now."""


@dataclass(frozen=True)
class Videos:
    """The work behind the routes and the gRPC calls, for one client."""

    backend: Backend
    client: str

    def create(
        self,
        values: dict[str, Any],
        files: Mapping[str, Source],
        key: str | None,
        reference: str = FILES[0],
        job_id: str | None = None,
        made_elsewhere: Sequence[dict[str, Any]] = (),
        judge: Callable[[Planned], object] = lambda planned: None,
    ) -> Job:
        """reference: what the caller calls the picture; job_id: a new one if not given; made_elsewhere: as for
        `JobStore.submit`; judge: as for `lay_down`. Raises InputError, IdempotencyError, QueueFullError.
        """
        settings, store = self.backend.settings, self.backend.store
        request = VideoRequest.judge(with_few_steps(values, settings.few_steps))
        if request.webhook_url is not None:
            outgoing.check_url(request.webhook_url, "webhook_url")
        if request.max_seconds is not None and request.max_seconds > settings.max_seconds:
            raise InputError(
                "max_seconds", f"max_seconds is {request.max_seconds}; the limit here is {settings.max_seconds}."
            )
        job_id = job_id or f"video_{secrets.token_hex(12)}"
        folder = self.backend.storage.folder(job_id)
        spec = lay_down(request, files, folder, settings.max_seconds, reference, judge)
        try:
            self.backend.storage.publish(job_id, *spec["files"])
            job = store.submit(
                spec,
                key=key,
                job_id=job_id,
                client=self.client,
                webhook_url=request.webhook_url,
                limits=QueueLimits(settings.max_queued, settings.max_queued_per_key),
                traceparent=tracing.traceparent(),
                made_elsewhere=made_elsewhere,
            )
        except BaseException:
            if not made_elsewhere:
                self.backend.storage.delete(job_id)
            raise
        if job.id != job_id:  # the same request was here before
            self.backend.storage.delete(job_id)
        return job

    def get(self, video_id: str) -> Job:
        """Raises JobNotFoundError, also for a video of another client."""
        job = self.backend.store.get(video_id)
        if job.client != self.client:
            raise JobNotFoundError(f"There is no job {video_id!r}.")
        return job

    def describe(self, job: Job) -> dict[str, Any]:
        position = self.backend.store.position(job.id) if job.state == QUEUED else None
        return describe(job, self.backend.settings.keep_days, position).model_dump()

    def page(self, limit: int, after: str | None, order: Literal["asc", "desc"]) -> dict[str, Any]:
        if after is not None:
            self.get(after)
        jobs = self.backend.store.page(limit + 1, after, order, self.client)
        data = [describe(job, self.backend.settings.keep_days, None) for job in jobs[:limit]]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return VideoPage(data=data, first_id=first, last_id=last, has_more=len(jobs) > limit).model_dump()

    def delete(self, video_id: str) -> None:
        self.get(video_id)
        self.backend.store.delete(video_id)
        self.backend.storage.delete(video_id)

    def cancel(self, video_id: str) -> Job:
        self.get(video_id)
        return self.backend.store.cancel(video_id)

    def content(self, job: Job, variant: Literal["video", "thumbnail"], partly: bool) -> Path:
        """The file of a video, of its first picture, or of the clips that are finished. Raises NotReadyError."""
        storage = self.backend.storage
        if job.state == COMPLETED and job.result is not None and variant == "video":
            storage.obtain(job.id, job.result["video"])
            return storage.folder(job.id) / str(job.result["video"])
        if variant == "video" and not partly:
            message = f"Video {job.id!r} is {job.state}; its content is there when it is completed."
            if job.state in (QUEUED, IN_PROGRESS, CANCELLED):
                message += " What is finished comes with partial=true."
            raise NotReadyError(message)
        made = previews.thumbnail if variant == "thumbnail" else previews.so_far
        file = made(job, self.backend.store.clips(job.id), storage)
        if file is None:
            raise NotReadyError(f"Video {job.id!r} has no finished clip yet; try again later.")
        return file

    async def follow(self, video_id: str, seen: int) -> AsyncIterator[Happening | None]:
        """Everything that happens up to the video's end, and None now and then, so that silence means trouble.

        seen: how many clips the listener knows of.
        """
        last: dict[str, Any] | None = None
        spoken = time.monotonic()
        while True:
            try:
                job = await asyncio.to_thread(self.get, video_id)
            except JobNotFoundError:
                yield Happening("deleted", {"id": video_id}, seen)
                return
            for clip in await asyncio.to_thread(self.backend.store.clips, video_id, seen - 1):
                seen = clip.index + 1
                told = {"id": video_id, "clip": seen, "frames": clip.result["frames"], "finished_at": clip.finished_at}
                yield Happening("clip", told, seen)
                spoken = time.monotonic()
            video = await asyncio.to_thread(self.describe, job)
            if job.state in FINISHED:
                yield Happening(job.state, video, seen)
                return
            if video != last:
                yield Happening("progress", video, seen)
                last, spoken = video, time.monotonic()
            elif time.monotonic() - spoken > HEARTBEAT_SECONDS:
                yield None
                spoken = time.monotonic()
            await asyncio.sleep(QUEUED_SECONDS if job.state == QUEUED else FOLLOW_SECONDS)


def describe(job: Job, keep_days: float, position: int | None) -> Video:
    """A job as callers see it."""
    request, told = job.spec["request"], job.progress or {}
    running = job.state == IN_PROGRESS
    done = 100 if job.state == COMPLETED else int(told.get("percent", 0))
    length = (job.result or {}).get("seconds")
    finished = None if job.finished_at is None else int(job.finished_at)
    return Video(
        id=job.id,
        status=job.state,
        progress=done,
        created_at=int(job.created_at),
        started_at=None if job.started_at is None else int(job.started_at),
        completed_at=finished,
        expires_at=None if finished is None else finished + round(keep_days * 24 * 3600),
        prompt=request["prompt"],
        size=request["size"],
        seconds=None if length is None else f"{length:g}",
        seed=request["seed"],
        stage=QUEUED if job.state == QUEUED else told.get("stage", "preparing") if running else None,
        queue_position=position,
        clip=told.get("clip"),
        clips=told.get("clips"),
        step=told.get("step"),
        steps=told.get("steps"),
        eta_seconds=told.get("eta_seconds") if running else None,
        error=VideoError(**job.error) if job.state == FAILED and job.error else None,
    )


def read_fields(fields: Mapping[str, Any], save: Callable[..., object]) -> tuple[dict[str, Any], dict[str, Source]]:
    """A JSON request's values, and where its files come from. save(text, target, param): writes what a text stands
    for. Raises InputError."""
    values, files = dict(fields), dict[str, Source]()
    for name in FILES:
        given = values.pop(name, None)
        if isinstance(given, dict):  # OpenAI's JSON form
            given = given.get("image_url")
        if isinstance(given, str) and given:
            files[name] = partial(save, given, param=name)
        elif given not in (None, ""):
            raise InputError(name, f"{name} is {type(given).__name__}; send a file, a URL or a data URI.")
    values.pop("model", None)
    if "seconds" in values:  # OpenAI's name
        values.setdefault("max_seconds", values.pop("seconds"))
    return values, files


def save_upload(upload: BinaryIO, target: Path) -> None:
    with target.open("wb") as file:
        shutil.copyfileobj(upload, file, 2**20)
