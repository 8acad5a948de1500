"""`/v1/videos`: the OpenAI Videos API, and what it lacks for a voice and a long wait; with its OpenAPI description."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Security
from fastapi.responses import FileResponse, RedirectResponse, Response, StreamingResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.datastructures import FormData, UploadFile

from avatar_api import outgoing
from avatar_api.auth import NO_KEY, client_of
from avatar_api.inputs import Source
from avatar_api.jobs import COMPLETED, Job
from avatar_api.refusals import UNAVAILABLE, Refusal
from avatar_api.requests import VideoRequest
from avatar_api.settings import ServiceSettings
from avatar_api.videos import (
    AN_ID,
    FILES,
    LARGEST_PAGE,
    LONGEST_KEY,
    PAGE,
    Backend,
    DeletedVideo,
    Error,
    Happening,
    Video,
    VideoPage,
    Videos,
    read_fields,
    save_upload,
)
from infinitetalk.errors import InputError

LINKS = {  # what the new video's id is for
    name: {"operationId": name, "parameters": {"video_id": "$response.body#/id"}}
    for name in ("retrieve", "content", "events", "cancel", "delete")
}
EVENTS = f'id: 1\nevent: clip\ndata: {{"id": "{AN_ID}", "clip": 1, "frames": 72, …}}\n\n'

REFUSALS: dict[int, tuple[str, str, str, str | None]] = {  # status: when, and an example's message, code and parameter
    400: (
        "A value or a file cannot be used.",
        "size is '3x3'; width and height must be multiples of 16 pixels.",
        "invalid_value",
        "size",
    ),
    401: (
        "The API key is missing or not known.",
        NO_KEY,
        "invalid_api_key",
        None,
    ),
    404: ("There is no such video of yours.", f"There is no video {AN_ID!r}.", "not_found", "video_id"),
    409: (
        "Not in this state of the video, or the idempotency key is another request's.",
        f"Video {AN_ID!r} is queued; its content is there when it is completed.",
        "not_ready",
        None,
    ),
    413: ("The request is too large.", "The request is larger than 500 MiB; send smaller files.", "too_large", None),
    422: (
        "A parameter of the query, or a header, is wrong.",
        "limit is '0'; it should be greater than or equal to 1.",
        "invalid_value",
        "limit",
    ),
    429: (
        "The queue is full; `Retry-After` says when to come back.",
        "1000 videos are waiting already, which is the limit here; try again later.",
        "queue_full",
        None,
    ),
    503: (
        "The database or the storage is away; `Retry-After` says when to come back.",
        UNAVAILABLE,
        "unavailable",
        None,
    ),
}


def create_router(backend: Callable[[], Backend]) -> APIRouter:
    """The routes; `backend` is asked at each request, since it is there later than they are."""

    async def videos(request: Request) -> Videos:
        return Videos(backend(), client_of(request))

    api = Annotated[Videos, Depends(videos)]
    keys = [Security(HTTPBearer(auto_error=False)), Security(APIKeyHeader(name="X-API-Key", auto_error=False))]
    router = APIRouter(  # the keys are for the description: `Authenticated` has looked at them
        prefix="/v1/videos",
        tags=["videos"],
        dependencies=keys,
        responses=_refusals(401, 422, 503),
        generate_unique_id_function=lambda route: route.name,
    )

    @router.post(
        "",
        openapi_extra={"requestBody": _request_body()},
        summary="Make a video",
        responses=_refusals(400, 409, 413, 422, 429) | {200: {"links": LINKS}},
    )
    async def create(
        request: Request, api: api, idempotency_key: Annotated[str | None, Header(max_length=LONGEST_KEY)] = None
    ) -> Video:
        """Check the input, queue the video, answer at once. The same `Idempotency-Key` gives the same video."""
        values, files, form = await _read(request, api.backend.settings)
        try:
            job = await asyncio.to_thread(api.create, values, files, idempotency_key)
        finally:
            if form is not None:
                await form.close()
        return Video(**await asyncio.to_thread(api.describe, job))

    @router.get("", summary="List videos, newest first", responses=_refusals(404, 422))
    async def page(
        api: api,
        limit: Annotated[int, Query(ge=1, le=LARGEST_PAGE)] = PAGE,
        after: Annotated[str | None, Query(description="The last id of the page before.")] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoPage:
        return VideoPage(**await asyncio.to_thread(api.page, limit, after, order))

    @router.get("/{video_id}", summary="How a video is getting on", responses=_refusals(404))
    async def retrieve(video_id: str, api: api) -> Video:
        job = await asyncio.to_thread(api.get, video_id)
        return Video(**await asyncio.to_thread(api.describe, job))

    @router.get(
        "/{video_id}/content",
        summary="The video itself",
        response_class=FileResponse,
        responses=_refusals(404, 409, 422)
        | {
            200: {"description": "The file.", "content": {"video/mp4": {}, "image/jpeg": {}}},
            206: {"description": "The part of it that `Range` asks for.", "content": {"video/mp4": {}}},
            302: {"description": "It lies in a bucket: `Location` is where."},
        },
    )
    async def content(
        video_id: str,
        api: api,
        variant: Literal["video", "thumbnail"] = "video",
        partial: Annotated[bool, Query(description="Of a video in the making, the clips that are finished.")] = False,
    ) -> Response:
        job = await asyncio.to_thread(api.get, video_id)
        return await asyncio.to_thread(_content, api, job, variant, partial)

    @router.get(
        "/{video_id}/events",
        summary="Follow a video (server-sent events)",
        response_class=StreamingResponse,
        responses=_refusals(404, 422)
        | {200: {"description": "Events until the end.", "content": {"text/event-stream": {"example": EVENTS}}}},
    )
    async def events(
        video_id: str, api: api, last_event_id: Annotated[str | None, Header(max_length=100)] = None
    ) -> StreamingResponse:
        """`progress` whenever it changes, `clip` for each finished clip, at last `completed`, `failed` or `cancelled`.

        `Last-Event-ID` says which clips are known already.
        """
        await asyncio.to_thread(api.get, video_id)
        stream = _events(api.follow(video_id, _clips_seen(last_event_id)))
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @router.post("/{video_id}/cancel", summary="Stop making a video", responses=_refusals(404))
    async def cancel(video_id: str, api: api) -> Video:
        """Noticed within a denoising step; what is finished can still be had with `?partial=true`."""
        job = await asyncio.to_thread(api.cancel, video_id)
        return Video(**await asyncio.to_thread(api.describe, job))

    @router.delete("/{video_id}", summary="Delete a finished video and its files", responses=_refusals(404, 409))
    async def delete(video_id: str, api: api) -> DeletedVideo:
        await asyncio.to_thread(api.delete, video_id)
        return DeletedVideo(id=video_id)

    return router


async def _read(
    request: Request, settings: ServiceSettings
) -> tuple[dict[str, Any], dict[str, Source], FormData | None]:
    """A request's values, where its files come from, and the form that holds them until it is closed."""
    form = None
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        form = await request.form(max_files=len(FILES), max_fields=100)
        fields: dict[str, Any] = dict(form)
    else:
        try:
            fields = json.loads(await request.body() or b"{}")
        except (ValueError, RecursionError) as error:
            raise InputError("body", f"The body is not JSON ({error}); send JSON or multipart/form-data.") from None
        if not isinstance(fields, dict):
            raise InputError("body", 'The body is JSON, but not an object; send {"prompt": …, …}.')
    files: dict[str, Source] = {}
    for name, value in list(fields.items()):
        if isinstance(value, UploadFile):
            if name not in FILES:
                raise InputError(name, f"{name} is a file; files are taken as {', '.join(FILES)}.", "unknown_parameter")
            files[name] = partial(save_upload, fields.pop(name).file)
    values, named = read_fields(fields, partial(outgoing.save, settings=settings))
    return values, named | files, form


def _content(api: Videos, job: Job, variant: Literal["video", "thumbnail"], partly: bool) -> Response:
    if job.state == COMPLETED and job.result is not None and variant == "video":
        link = api.backend.storage.link(job.id, job.result["video"], f"{job.id}.mp4")
        if link is not None:
            return RedirectResponse(link, 302)
    file = api.content(job, variant, partly)
    if variant == "thumbnail":
        return FileResponse(file, media_type="image/jpeg")
    return FileResponse(file, media_type="video/mp4", filename=f"{job.id}.mp4")


async def _events(happenings: AsyncIterator[Happening | None]) -> AsyncIterator[str]:
    async for happened in happenings:
        if happened is None:
            yield ": still here\n\n"
        elif happened.kind == "clip":
            content = {"content": f"/v1/videos/{happened.data['id']}/content?partial=true"}
            yield _event(happened.kind, happened.data | content, happened.seen)
        else:
            yield _event(happened.kind, happened.data, happened.seen)


def _event(kind: str, data: Any, seen: int) -> str:
    return f"id: {seen}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"


def _clips_seen(last_event_id: str | None) -> int:
    return int(last_event_id) if last_event_id and last_event_id.isdecimal() and len(last_event_id) < 10 else 0


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error answers in OpenAPI."""
    return {
        status: {
            "model": Error,
            "description": description,
            "content": {"application/json": {"example": {"error": Refusal(status, message, code, param).error}}},
        }
        for status, (description, message, code, param) in REFUSALS.items()
        if status in statuses
    }


def _request_body() -> dict[str, Any]:
    """The request in OpenAPI: the values of VideoRequest, and the files."""
    schema = VideoRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    properties = {name: _inlined(definition, definitions) for name, definition in schema["properties"].items()} | {
        "model": {"type": "string", "description": "For OpenAI's client; there is one model here."}
    }
    about = {
        "input_reference": "The picture that talks, or the video to be dubbed",
        "audio": "The voice; required for a picture, else the video's own sound",
        "audio_2": "The voice of a second speaker",
    }
    texts = {
        name: {"type": "string", "description": f"{text}: an http(s) URL or a data URI."}
        for name, text in about.items()
    }
    uploads = {
        name: {"type": "string", "format": "binary", "description": f"{text}; or a URL or data URI."}
        for name, text in about.items()
    }
    example = {
        "prompt": "A woman talks.",
        "size": "480p",
        "input_reference": "https://example.com/me.png",
        "audio": "https://example.com/voice.mp3",
    }
    needed = ["input_reference"]
    return {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "properties": properties | uploads, "required": needed}
            },
            "application/json": {
                "schema": {"type": "object", "properties": properties | texts, "required": needed},
                "example": example,
            },
        },
    }


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """A JSON schema without references."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return {name: _inlined(value, definitions) for name, value in schema.items()}
    return [_inlined(value, definitions) for value in schema] if isinstance(schema, list) else schema
