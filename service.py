"""The Bento: AvatarRunner holds the pipeline and works through the jobs, AvatarApi takes requests and answers them.

    bentoml serve

They share a database and a folder, and no call of any length: either may be killed at any moment, and nothing is lost.
"""

import asyncio
import json
import logging
import os
import shutil
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import bentoml
from bentoml.exceptions import BentoMLException
from bentoml.models import BentoModel
from bentoml.validators import ContentType, FileSchema
from fastapi.responses import Response
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from avatar_api import grpc_server, loading, logs, metrics, runpod_balanced
from avatar_api.auth import Authenticated, Keys, client_of
from avatar_api.bentoml_patches import adapt_forms, count_by_route, end_with_the_answer, log_failures_only
from avatar_api.database import OUTAGES
from avatar_api.grpc_server import GrpcServer
from avatar_api.housekeeping import Housekeeper
from avatar_api.http import OneErrorShape, SecurityHeaders, create_app, refuse
from avatar_api.inputs import Source
from avatar_api.jobs import COMPLETED, FINISHED, STATES, Job, JobStore, runner_name
from avatar_api.refusals import REFUSABLE, Refusal, failure, refusal
from avatar_api.requests import DEFAULTS, VideoRequest
from avatar_api.routes import create_router
from avatar_api.settings import ServiceSettings
from avatar_api.shutdown import Shutdown
from avatar_api.storage import open_storage
from avatar_api.videos import POLL_SECONDS, Videos, describe
from avatar_api.webhooks import Webhooks
from container import image

logger = logging.getLogger("avatar_api")
logs.set_up(ServiceSettings().log_format)

SCRAPE_SECONDS = 5.0  # how long Prometheus, who waits for ten, waits for the database
RUNNER_SECONDS = 3.0  # how long health waits for the runner, who answers at once where there is one
GRACE_SECONDS = 20.0  # after SIGTERM: what a clip may take before its job goes back to the queue, and a gRPC call


def _text(value: Any) -> str:
    """BentoML reads a form's texts as JSON where they are: a prompt of 42 arrives as a number, and a file as bytes."""
    if isinstance(value, bytes):
        raise PydanticCustomError("file", "it is a file; send text")
    return value if isinstance(value, str) else json.dumps(value)


Text = Annotated[str, BeforeValidator(_text)]
OptionalFile = Annotated[Path | None, FileSchema()]  # BentoML takes a bare `Path | None` for no file


_V1 = VideoRequest.model_json_schema()["properties"]


def _as_in_v1(name: str) -> Any:
    """A parameter's description, and in it the range, which `VideoRequest` judges for all interfaces."""
    known = _V1[name]
    bounds = {key: known[key] for key in ("minimum", "maximum", "maxLength", "enum") if key in known}
    return Field(description=known["description"], json_schema_extra=bounds)


class ImportedModel(BentoModel):
    """A model of the store; where it is missing, the error says how it gets there."""

    def resolve(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().resolve(*arguments, **options)
        except BentoMLException as error:
            command = f"python models/import_models.py --only {self.tag.name}"
            raise BentoMLException(f"Model {self.tag} is not in the model store; import it: {command}") from error


@bentoml.on_deployment
def watch_over_loading() -> None:
    """Of both services: a runner may serve alone, and beside an API its environment is set before it is asked."""
    loading.end_when_given_up()


@bentoml.service(
    name="avatar_runner",
    workers=1,
    resources={"gpu": ServiceSettings().gpus},
    # BentoML would renew the connection every 300 s and every 100 calls, and break off the calls that are on it.
    runner_connection={"max_age": 1e9, "max_requests": 10**9},
)
class AvatarRunner:
    """One per GPU, or per AVATAR_GPUS of them. Loads in a thread and works through the jobs in it; meanwhile it says at
    once whether it is ready."""

    wan = ImportedModel("wan2.1-i2v-14b-480p:latest")
    infinitetalk = ImportedModel("infinitetalk:latest")
    wav2vec2 = ImportedModel("chinese-wav2vec2-base:latest")

    def __init__(self) -> None:
        self.ready = False
        self._shutdown = Shutdown()
        self._thread = threading.Thread(target=self._run, name="runner")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._load_and_work()
        except Exception:
            logger.critical("The runner failed; this process exits and is started again", exc_info=True)
            os._exit(loading.AGAIN_EXIT)

    def _load_and_work(self) -> None:
        settings = ServiceSettings()
        settings.home.mkdir(parents=True, exist_ok=True)
        if (verified := os.environ.get("AVATAR_VERIFY_SECONDS")) is not None:  # in the image, by container/start.py
            metrics.start_took("verify", float(verified))
        started = time.monotonic()
        stored: list[Any] = [self.wan, self.infinitetalk, self.wav2vec2]  # which is what BentoML makes of them
        wan, infinitetalk, wav2vec2 = (Path(model.path) for model in stored)
        store = JobStore(settings.database)  # where the database is away, nothing is loaded
        with loading.attempt(self._shutdown):
            from avatar_api.worker import load, load_fast_loras, work  # with torch

            load_models = partial(load, wan, infinitetalk, wav2vec2, settings)
            pipeline = load_models(settings.memory)
            fast_loras = load_fast_loras(pipeline, settings)
        logger.info("Models loaded on %s in %.1f s; %s", pipeline.device, time.monotonic() - started, pipeline.memory)
        owner = runner_name(settings.home, str(pipeline.device))
        self.ready = True
        work(store, pipeline, open_storage(settings), owner, self._shutdown, load_models, fast_loras)

    watch_over_loading = watch_over_loading

    def __is_ready__(self) -> bool:
        return self.ready

    def __is_alive__(self) -> bool:
        return self._thread.is_alive()

    @bentoml.api
    def loaded(self) -> bool:
        """Are the models loaded?"""
        return self.ready

    @bentoml.on_shutdown
    def stop(self) -> None:
        self._shutdown.ask(GRACE_SECONDS)
        self._thread.join()


def _api() -> "AvatarApi":
    return bentoml.get_current_service()


async def _ready() -> bool:
    return await _api().loaded()


router = create_router(_api)


@bentoml.service(name="avatar_api", image=image.define())
@bentoml.asgi_app(create_app(_ready, [router]), path="/")
class AvatarApi:
    """What callers talk to."""

    runner = bentoml.depends(AvatarRunner)

    def __init__(self) -> None:
        self.settings = ServiceSettings()
        self.settings.home.mkdir(parents=True, exist_ok=True)
        self.storage = open_storage(self.settings)
        self.storage.check()
        self.store = JobStore(self.settings.database)
        self._webhooks = Webhooks(self.store, self.settings, self._describe)
        self._webhooks.start()
        self._housekeeper = Housekeeper(self.store, self.storage, self.settings)
        self._housekeeper.start()

    def _describe(self, job: Job) -> dict[str, Any]:
        return describe(job, self.settings.keep_days, None).model_dump()

    async def __metrics__(self, counted: str) -> str:
        """What /metrics answers: what BentoML's processes counted, and the queue as it is now."""
        jobs = None
        with suppress(TimeoutError, *OUTAGES):
            async with asyncio.timeout(SCRAPE_SECONDS):
                jobs = await asyncio.to_thread(self.store.counts)
        return counted + metrics.queue(None if jobs is None else {state: jobs.get(state, 0) for state in STATES})

    watch_over_loading = watch_over_loading

    @bentoml.on_deployment
    def check_grpc() -> None:
        try:
            grpc_server.check(ServiceSettings())
        except ValueError as error:
            raise BentoMLException(str(error)) from error

    @bentoml.on_startup
    async def serve_health(self) -> None:
        self._health = asyncio.create_task(runpod_balanced.serve_health(self.loaded))

    @bentoml.on_startup
    async def serve_grpc(self) -> None:
        self._grpc: GrpcServer | None = None
        if self.settings.grpc_port:
            self._grpc = GrpcServer(self, Keys.of(self.settings), self.loaded)
            await self._grpc.start(self.settings.grpc_host, self.settings.grpc_port)
            self._grpc.stop_at_sigterm(GRACE_SECONDS)

    async def loaded(self) -> bool:
        """Are the models loaded? Not while the runner's process is away: it is started again, and its socket waits."""
        runner: Any = self.runner
        try:
            async with asyncio.timeout(RUNNER_SECONDS):
                return bool(await runner.to_async.loaded())
        except (aiohttp.ClientError, TimeoutError):
            return False

    @bentoml.on_shutdown
    async def stop(self) -> None:
        if self._grpc is not None:
            await self._grpc.stop(GRACE_SECONDS)
        self._health.cancel()
        self._housekeeper.stop()
        self._webhooks.stop()

    @bentoml.api
    async def generate(
        self,
        ctx: bentoml.Context,
        image: Annotated[Path, Field(description="The picture that talks, or the video to be dubbed.")],
        audio: Annotated[OptionalFile, Field(description="The voice; required for a picture.")] = None,
        audio_2: Annotated[OptionalFile, Field(description="The voice of a second speaker.")] = None,
        prompt: Annotated[Text, _as_in_v1("prompt")] = "",
        size: Annotated[Text, _as_in_v1("size")] = DEFAULTS.size,
        steps: Annotated[int | None, _as_in_v1("steps")] = None,
        seed: Annotated[int, _as_in_v1("seed")] = DEFAULTS.seed,
        text_guidance: Annotated[float | None, _as_in_v1("text_guidance")] = None,
        audio_guidance: Annotated[float | None, _as_in_v1("audio_guidance")] = None,
        shift: Annotated[float | None, _as_in_v1("shift")] = None,
        color_correction: Annotated[float, _as_in_v1("color_correction")] = DEFAULTS.color_correction,
        max_seconds: Annotated[float | None, _as_in_v1("max_seconds")] = None,
        speakers: Annotated[Text, _as_in_v1("speakers")] = "",
        scene_cuts: Annotated[bool, _as_in_v1("scene_cuts")] = False,
        quality: Annotated[Text, _as_in_v1("quality")] = "exact",
    ) -> Annotated[Path, ContentType("video/mp4")]:
        """A picture or a video and a voice, or two, become a talking video (mp4). The answer comes when it is there.

        A caller that goes away cancels the video.
        """
        values = {
            "prompt": prompt,
            "size": size,
            "steps": steps,
            "seed": seed,
            "text_guidance": text_guidance,
            "audio_guidance": audio_guidance,
            "shift": shift,
            "color_correction": color_correction,
            "max_seconds": max_seconds,
            "speakers": speakers,
            "scene_cuts": scene_cuts,
            "quality": quality,
        }
        values = {name: value for name, value in values.items() if value is not None}
        sent = {"image": image, "audio": audio, "audio_2": audio_2}
        files: dict[str, Source] = {name: partial(shutil.copyfile, file) for name, file in sent.items() if file}
        videos = Videos(self, client_of(ctx.request))
        try:
            job = await asyncio.to_thread(videos.create, values, files, None, "image")
        except REFUSABLE as error:
            return _refused(ctx, refuse(refusal(error)))
        answer_by = time.monotonic() + runpod_balanced.LONGEST_ANSWER
        while job.state not in FINISHED:
            if time.monotonic() > answer_by:
                return _refused(ctx, runpod_balanced.in_the_making(await asyncio.to_thread(videos.describe, job)))
            if await ctx.request.is_disconnected():
                with logs.of_job(job.id):
                    logger.info("job %s: the caller went away", job.id)
                await asyncio.to_thread(self.store.cancel, job.id)
                return _refused(ctx, refuse(Refusal(499, "The caller went away.", "cancelled")))
            await asyncio.sleep(POLL_SECONDS)
            job = await asyncio.to_thread(self.store.get, job.id)
        if job.state != COMPLETED:
            return _refused(ctx, refuse(failure(job)))
        return await asyncio.to_thread(videos.content, job, "video", False)


end_with_the_answer()
log_failures_only()
adapt_forms(ServiceSettings().max_upload_bytes)
count_by_route(["/ping", "/livez", "/readyz", *(str(getattr(route, "path", "")) for route in router.routes)])
AvatarApi.add_asgi_middleware(SecurityHeaders)  # type: ignore[attr-defined]
AvatarApi.add_asgi_middleware(Authenticated)  # type: ignore[attr-defined]
AvatarApi.add_asgi_middleware(runpod_balanced.NamesWorker)  # type: ignore[attr-defined]
AvatarApi.add_asgi_middleware(OneErrorShape, max_upload_bytes=ServiceSettings().max_upload_bytes)  # type: ignore[attr-defined]


def _refused(ctx: bentoml.Context, answer: Response) -> Any:
    """BentoML sends a response as it is, but for the status: that it takes from the context."""
    ctx.response.status_code = answer.status_code
    return answer
