"""RunPod's queue: takes its jobs, one at a time, has the runner beside it make the videos, and answers.

It is a third interface to `Videos`, beside HTTP and gRPC. A job of RunPod's is a job here, under an id that follows
from RunPod's: one that comes again, because this process or all of its worker died, is gone on with. On the same worker
the database knows how far it was, on another one the files do, in the bucket or on the volume (`recovery`).
"""

import asyncio
import base64
import hashlib
import json
import logging
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import runpod
from aiohttp import ClientSession
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules import rp_http

from avatar_api import logs, outgoing
from avatar_api.database import OUTAGES
from avatar_api.inputs import Planned
from avatar_api.jobs import (
    CANCELLED,
    COMPLETED,
    FAILED,
    RUNNER_DIED,
    Job,
    JobNotFailedError,
    JobNotFoundError,
    JobStore,
)
from avatar_api.recovery import remains
from avatar_api.refusals import REFUSABLE, Refusal, failure, refusal
from avatar_api.settings import ServiceSettings
from avatar_api.storage import Storage, open_storage
from avatar_api.video_writer import SOUND_BIT_RATE, shrink
from avatar_api.videos import FILES, Backend, Happening, Videos, read_fields
from infinitetalk.errors import InputError
from infinitetalk.timeline import FRAMES_PER_SECOND

logger = logging.getLogger(__name__)

CLIENT = "runpod"
"""Who owns the jobs: RunPod knows who is calling, and does not say."""

RUN_BYTES, RUNSYNC_BYTES = 10_000_000, 20_000_000
"""What RunPod takes as an answer to /run and to /runsync."""
AROUND_BYTES = 20_000  # of an answer, for all that is not the video
YIELD_BYTES = 700_000  # of a clip in one piece of the stream: RunPod takes 1 MB, and base64 makes four bytes of three
LEAST_BITS = 0.03  # per pixel: with less, a face falls to pieces

PROGRESS_SECONDS = 2.0  # between two reports
OUTAGE_SECONDS, OUTAGE_WAIT = 600.0, 2.0  # how long the database may be away, and how often it is asked
GPU_CODES = ("gpu_failed", RUNNER_DIED)
"""Failures after which RunPod is asked for a fresh worker."""


@dataclass
class _Backend:
    settings: ServiceSettings
    store: JobStore
    storage: Storage


def serve(settings: ServiceSettings, checks: Sequence[Callable[[], object]], volume: Path) -> None:
    """Take jobs until SIGTERM, or until a fresh worker is needed; a job in the making is finished first.

    checks: have to pass before the first job is taken; what one raises, RunPod is told. volume: where the network
    volume is mounted.
    """
    settings.home.mkdir(parents=True, exist_ok=True)
    backend = _Backend(settings, JobStore(settings.database), open_storage(settings))
    config: dict[str, Any] = {}
    worker = QueueWorker(backend, volume, partial(config.__setitem__, "refresh_worker", True))
    config["handler"] = worker.handle
    for check in checks:
        runpod.serverless.register_fitness_check(check)
    runpod.serverless.start(config)


class QueueWorker:
    def __init__(self, backend: Backend, volume: Path, refresh: Callable[[], object]) -> None:
        """refresh: asks for a fresh worker once the job is answered."""
        self._videos = Videos(backend, CLIENT)
        self._volume, self._refresh = volume, refresh

    async def handle(self, asked: dict[str, Any]) -> dict[str, Any]:
        """RunPod's job → its output, or {"error": the error object as JSON}."""
        job_id = local_id(asked["id"])
        with logs.of_job(job_id):
            logger.info("job %s: is RunPod's %s", job_id, asked["id"])
            try:
                async with AsyncClientSession() as session:
                    return await self._answer(asked, job_id, session)
            except REFUSABLE as error:
                return _error(refusal(error))
            except Exception:
                logger.exception("job %s: cannot be answered", job_id)
                message = "Something failed here; the worker's log has the details."
                return _error(Refusal(500, message, "internal_error"))

    async def _answer(self, asked: dict[str, Any], job_id: str, session: ClientSession) -> dict[str, Any]:
        limit = RUNSYNC_BYTES if asked["id"].startswith("sync-") else RUN_BYTES
        fields = asked["input"]
        if not isinstance(fields, dict):
            raise InputError("input", f'input is {type(fields).__name__}; send {{"input": {{"prompt": …, …}}}}.')
        stream = fields.get("stream", False)
        if not isinstance(stream, bool):
            raise InputError("stream", f"stream is {stream!r}; it should be true or false.")
        values = {name: value for name, value in fields.items() if name != "stream"}
        taking = asyncio.ensure_future(asyncio.to_thread(self._take, job_id, values, limit))
        try:
            await asyncio.shield(taking)
            told = 0.0
            async for happened in self._follow(job_id):
                if happened.kind == "clip" and stream:
                    await self._stream(happened, asked, session)
                elif happened.kind == "progress" and time.monotonic() - told > PROGRESS_SECONDS:
                    await rp_http.send_result(session, {"status": "IN_PROGRESS", "output": _report(happened)}, asked)
                    told = time.monotonic()
            job = await asyncio.to_thread(self._videos.get, job_id)
            if job.state == COMPLETED:
                return await asyncio.to_thread(self._output, job, limit)
        except asyncio.CancelledError:  # RunPod's job-stop: somebody cancelled it, or its time is up
            with suppress(*REFUSABLE):
                await taking
                await asyncio.to_thread(self._videos.cancel, job_id)
            raise
        why = failure(job)
        if why.code in GPU_CODES:
            logger.critical("job %s: this worker's GPU is in doubt; it takes no further job", job_id)
            self._refresh()
        return _error(why)

    def _take(self, job_id: str, fields: dict[str, Any], limit: int) -> None:
        """See that the job is in the queue here. One that is there, or was, comes from RunPod again: it goes on."""
        try:
            job = self._videos.get(job_id)
        except JobNotFoundError:
            self._create(job_id, fields, limit)
            return
        if job.state in (FAILED, CANCELLED):
            with suppress(JobNotFailedError):
                self._videos.backend.store.retry(job_id)
                logger.info("job %s: once more", job_id)

    def _create(self, job_id: str, fields: dict[str, Any], limit: int) -> None:
        backend = self._videos.backend
        left = remains(job_id, FILES, backend.storage)
        if left.clips:
            logger.info("job %s: another worker left %d clips", job_id, len(left.clips))
        values, files = read_fields(fields, self._save)
        if backend.storage.link(job_id, "video.mp4", "video.mp4") is not None:  # a link, as long as the video may be
            limit = 0
        self._videos.create(
            values,
            files | left.files,
            None,
            job_id=job_id,
            made_elsewhere=left.clips,
            judge=lambda planned: check_fits(planned, limit) if limit else None,
        )

    def _save(self, text: str, target: Path, param: str) -> None:
        """What a text stands for: a file on the network volume, a URL or a data URI."""
        if not text.startswith("/"):
            outgoing.save(text, target, param, self._videos.backend.settings)
            return
        try:
            file, volume = Path(text).resolve(strict=True), self._volume.resolve(strict=True)
        except (OSError, ValueError):  # ValueError: a NUL in it
            file = volume = Path(text)
        if file == volume or not file.is_relative_to(volume) or not file.is_file():
            problem = f"{param} is {text[:100]!r}, and no file under {self._volume} has this path"
            raise InputError(param, f"{problem}; attach the network volume and name a file on it.", "not_found")
        largest = self._videos.backend.settings.max_upload_bytes
        if file.stat().st_size > largest:
            message = f"{param} is larger than {largest / 2**20:.3g} MiB; name a smaller file."
            raise InputError(param, message, "too_large")
        shutil.copyfile(file, target)

    async def _follow(self, job_id: str) -> AsyncIterator[Happening]:
        """All that happens to the job, also across a time in which the database is away."""
        seen, reached = 0, time.monotonic()
        while True:
            try:
                async for happened in self._videos.follow(job_id, seen):
                    reached = time.monotonic()
                    if happened is not None:
                        seen = happened.seen
                        yield happened
                return
            except OUTAGES as error:
                if time.monotonic() - reached > OUTAGE_SECONDS:
                    raise
                logger.warning("job %s: the database is away: %s", job_id, error)
                await asyncio.sleep(OUTAGE_WAIT)

    async def _stream(self, happened: Happening, asked: dict[str, Any], session: ClientSession) -> None:
        """A finished clip, without sound: a link to it, or the file itself in as many pieces as it takes.

        Not the last one: with it the video is finished, and the clips are deleted.
        """
        for piece in await asyncio.to_thread(self._pieces, happened):
            await rp_http.stream_result(session, {"output": piece}, asked)

    def _pieces(self, happened: Happening) -> list[dict[str, Any]]:
        job_id, number = happened.data["id"], happened.data["clip"]
        storage, about = self._videos.backend.storage, {"clip": number, "frames": happened.data["frames"]}
        (clip,) = self._videos.backend.store.clips(job_id, number - 2)[:1]
        if clip.result["state"] is None:  # the last
            return []
        segment = str(clip.result["segment"])
        if (link := storage.link(job_id, segment, f"clip-{number}.mp4")) is not None:
            return [about | {"video_url": link}]
        try:
            content = (storage.folder(job_id) / segment).read_bytes()
        except FileNotFoundError:  # the video is finished by now
            return []
        cuts = range(0, len(content), YIELD_BYTES)
        return [
            about | {"part": part, "parts": len(cuts), "video_base64": _base64(content[cut : cut + YIELD_BYTES])}
            for part, cut in enumerate(cuts, 1)
        ]

    def _output(self, job: Job, limit: int) -> dict[str, Any]:
        result = job.result or {}
        ended, started = job.finished_at or 0.0, job.started_at or 0.0
        timings = {"waiting": round(started - job.created_at, 3), **result["timings"]}
        timings["total"] = round(ended - job.created_at, 3)
        about = {"id": job.id, "seconds": result["seconds"], "frames": result["frames"], "timings": timings}
        link = self._videos.backend.storage.link(job.id, result["video"], f"{job.id}.mp4")
        if link is not None:
            return {"video_url": link} | about
        file, room = self._videos.content(job, "video", False), _room(limit)
        if file.stat().st_size > room:
            smaller = file.with_name("answer.mp4")
            shrink(file, smaller, room)
            logger.info("job %s: %.1f MB made %.1f", job.id, file.stat().st_size / 1e6, smaller.stat().st_size / 1e6)
            file = smaller
        return {"video_base64": _base64(file.read_bytes())} | about


def local_id(runpod_id: str) -> str:
    return f"video_{hashlib.sha256(f'runpod {runpod_id}'.encode()).hexdigest()[:24]}"


def check_fits(planned: Planned, limit: int) -> None:
    """Can a video be answered with, if need be at a lower bit rate than it is made with? Raises InputError.

    limit: bytes that RunPod takes as an answer.
    """
    pixels = planned.height * planned.width * FRAMES_PER_SECOND
    bytes_per_second = (pixels * LEAST_BITS + SOUND_BIT_RATE["stereo"]) / 8
    longest = _room(limit) / bytes_per_second
    if planned.seconds > longest:
        size = f"{planned.width}x{planned.height}"
        problem = f"a video of {planned.seconds:.0f} s at {size} does not fit into an answer of {limit / 1e6:.0f} MB"
        sync = "" if limit == RUNSYNC_BYTES else ", ask with /runsync, which takes 20 MB"
        remedy = f"send at most {longest:.0f} s (max_seconds), a smaller size{sync}, or give the endpoint a bucket"
        raise InputError("max_seconds", f"{problem}; {remedy} (AVATAR_S3_BUCKET).", "result_too_large")


def _room(limit: int) -> int:
    """Bytes of a video in an answer: base64 makes four of three."""
    return (limit - AROUND_BYTES) * 3 // 4


def _report(happened: Happening) -> dict[str, Any]:
    video = happened.data
    names = ("id", "stage", "queue_position", "clip", "clips", "step", "steps", "eta_seconds")
    return {"percent": video["progress"]} | {name: video[name] for name in names if video[name] is not None}


def _error(refused: Refusal) -> dict[str, Any]:
    return {"error": json.dumps(refused.error)}  # in ASCII: a caller's text may hold what no encoding has


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
