"""`bentoml.grpc.v1.BentoService`: `generate` for BentoML's own gRPC clients. One call, and the answer is the video.

The request is a multipart of parts that have the names of `generate`'s parameters: files as `file`, values as `text` or
`json`. The response is a `file`.
"""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from google.protobuf.json_format import Error as JsonError
from google.protobuf.json_format import MessageToDict, ParseDict

from avatar_api.grpc_calls import LARGEST_MESSAGE, Context, abort, answering, client
from avatar_api.inputs import Source
from avatar_api.jobs import COMPLETED, FINISHED, Job
from avatar_api.protos import bento_service_pb2 as pb
from avatar_api.protos.bento_service_pb2_grpc import BentoServiceServicer
from avatar_api.refusals import Refusal, failure
from avatar_api.requests import VideoRequest
from avatar_api.videos import POLL_SECONDS, Backend, Videos
from infinitetalk.errors import InputError

GENERATE_FILES = ("image", "audio", "audio_2")
VALUES = tuple(name for name in VideoRequest.model_fields if name != "webhook_url")
DOCS = "A picture or a video and a voice, or two, become a talking video (mp4). The answer comes when it is there."


class BentoService(BentoServiceServicer):
    def __init__(self, backend: Backend, closing: Callable[[], bool]) -> None:
        """closing: is it the server that ends calls?"""
        self.backend = backend
        self.closing = closing

    async def Call(self, request: pb.Request, context: Context) -> pb.Response:  # noqa: N802
        async with answering(context):
            if request.api_name != "generate":
                raise InputError("api_name", f"api_name is {request.api_name[:60]!r}; it should be 'generate'.")
            if (kind := request.WhichOneof("content")) != "multipart":
                raise InputError("content", f"The request holds {kind or 'nothing'}; send a multipart of named parts.")
            values, files = _parts(request.multipart.fields)
            videos = Videos(self.backend, client())
            job = await self._make(videos, values, files)
            if job.state != COMPLETED:
                await abort(context, failure(job))
            file = await asyncio.to_thread(videos.content, job, "video", False)
            if file.stat().st_size + 1024 > LARGEST_MESSAGE:
                message = f"The video is too large for one message; DownloadVideo of avatar.v1 has it as {job.id!r}."
                await abort(context, Refusal(413, message, "too_large"))
            return pb.Response(file=pb.File(kind="video/mp4", content=await asyncio.to_thread(file.read_bytes)))

    async def _make(self, videos: Videos, values: dict[str, Any], files: Mapping[str, Source]) -> Job:
        """The finished job. A caller that goes away, or whose deadline passes, cancels it."""
        creating = asyncio.ensure_future(asyncio.to_thread(videos.create, values, files, None, GENERATE_FILES[0]))
        try:
            job = await asyncio.shield(creating)
            while job.state not in FINISHED:
                await asyncio.sleep(POLL_SECONDS)
                job = await asyncio.to_thread(videos.get, job.id)
        except asyncio.CancelledError:
            if not self.closing():
                job = await creating
                await asyncio.to_thread(videos.cancel, job.id)
            raise
        return job

    async def ServiceMetadata(  # noqa: N802
        self, request: pb.ServiceMetadataRequest, context: Context
    ) -> pb.ServiceMetadataResponse:
        return METADATA


def _parts(fields: Mapping[str, pb.Part]) -> tuple[dict[str, Any], dict[str, Source]]:
    """The values of a multipart, and where its files come from."""
    values: dict[str, Any] = {}
    files: dict[str, Source] = {}
    for name, part in fields.items():
        kind = part.WhichOneof("representation")
        if name in GENERATE_FILES:
            if kind != "file":
                raise InputError(name, f"{name} holds {kind or 'nothing'}; send a file.")
            files[name] = partial(Path.write_bytes, data=part.file.content)
        elif kind == "text":
            values[name] = part.text.value
        elif kind == "json":
            try:
                values[name] = MessageToDict(part.json)
            except (JsonError, ValueError):
                raise InputError(name, f"{name} is not JSON; a number in it is infinite or none.") from None
        else:
            raise InputError(name, f"{name[:60]} holds {kind or 'nothing'}; send text or json.")
    return {name: value for name, value in values.items() if value is not None}, files


def _metadata() -> pb.ServiceMetadataResponse:
    file: dict[str, Any] = {"id": "bentoml.io.File", "args": {"kind": "binaryio"}}
    value: dict[str, Any] = {"id": "bentoml.io.JSON", "args": {}}
    parts = dict.fromkeys(GENERATE_FILES, file) | dict.fromkeys(VALUES, value)
    video = {"kind": "binaryio", "mime_type": "video/mp4"}
    described = {
        "name": "avatar_api",
        "docs": DOCS,
        "apis": [
            {
                "name": "generate",
                "docs": DOCS,
                "input": {"descriptorId": "bentoml.io.Multipart", "attributes": {"args": parts}},
                "output": {"descriptorId": "bentoml.io.File", "attributes": {"args": video}},
            }
        ],
    }
    return ParseDict(described, pb.ServiceMetadataResponse())


METADATA = _metadata()
