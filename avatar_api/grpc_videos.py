"""`avatar.v1.AvatarService`: /v1/videos in typed calls, with files that come and go in chunks."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack
from functools import partial
from typing import Any, BinaryIO, Literal

from google.protobuf.json_format import MessageToDict, ParseDict

from avatar_api import outgoing
from avatar_api.grpc_calls import Context, answering, client
from avatar_api.inputs import Source
from avatar_api.jobs import COMPLETED, Job
from avatar_api.protos import avatar_pb2 as pb
from avatar_api.protos.avatar_pb2_grpc import AvatarServiceServicer
from avatar_api.videos import FILES, LARGEST_PAGE, LONGEST_KEY, PAGE, Backend, Happening, Videos, save_upload
from infinitetalk.errors import InputError

CHUNK_BYTES = 2**19  # of a download at a time


class AvatarService(AvatarServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @property
    def _videos(self) -> Videos:
        return Videos(self.backend, client())

    async def CreateVideo(self, requests: AsyncIterator[pb.CreateVideoRequest], context: Context) -> pb.Video:  # noqa: N802
        async with answering(context):
            with ExitStack() as stack:  # a caller that goes away takes its files along
                uploads: dict[str, BinaryIO] = {}
                wanted = await _receive(requests, uploads, stack, self.backend.settings.max_upload_bytes)
                files: dict[str, Source] = {name: partial(save_upload, file) for name, file in uploads.items()}
                for name in FILES:
                    if url := getattr(wanted, name):
                        if name in files:
                            raise InputError(name, f"{name} comes twice, as a URL and in chunks; send one of them.")
                        files[name] = partial(outgoing.save, url, param=name, settings=self.backend.settings)
                key = wanted.idempotency_key or None
                if key is not None and len(key) > LONGEST_KEY:
                    raise InputError("idempotency_key", f"idempotency_key has more than {LONGEST_KEY} characters.")
                job = await asyncio.to_thread(self._videos.create, _values(wanted), files, key)
            return await self._described(job)

    async def GetVideo(self, request: pb.GetVideoRequest, context: Context) -> pb.Video:  # noqa: N802
        async with answering(context):
            return await self._described(await asyncio.to_thread(self._videos.get, request.id))

    async def ListVideos(self, request: pb.ListVideosRequest, context: Context) -> pb.ListVideosResponse:  # noqa: N802
        async with answering(context):
            limit = request.limit if request.HasField("limit") else PAGE
            if not 1 <= limit <= LARGEST_PAGE:
                raise InputError("limit", f"limit is {limit}; it should be from 1 to {LARGEST_PAGE}.")
            _check_known("order", request.order, pb.ListVideosRequest.Order)
            order: Literal["asc", "desc"] = "desc" if request.order == pb.ListVideosRequest.NEWEST_FIRST else "asc"
            page = await asyncio.to_thread(self._videos.page, limit, request.after or None, order)
            return pb.ListVideosResponse(videos=map(_video, page["data"]), has_more=page["has_more"])

    async def WatchVideo(self, request: pb.WatchVideoRequest, context: Context) -> AsyncIterator[pb.VideoEvent]:  # noqa: N802
        async with answering(context):
            await asyncio.to_thread(self._videos.get, request.id)
            async for happened in self._videos.follow(request.id, max(request.clips_seen, 0)):
                if happened is not None:
                    yield _event(happened)

    async def DownloadVideo(  # noqa: N802
        self, request: pb.DownloadVideoRequest, context: Context
    ) -> AsyncIterator[pb.VideoContent]:
        async with answering(context):
            _check_known("variant", request.variant, pb.DownloadVideoRequest.Variant)
            thumbnail = request.variant == pb.DownloadVideoRequest.THUMBNAIL
            job = await asyncio.to_thread(self._videos.get, request.id)
            if request.offset and job.state != COMPLETED:
                message = (
                    f"offset is {request.offset}; it should be 0 while the video is {job.state}, since it may grow."
                )
                raise InputError("offset", message)
            variant: Literal["video", "thumbnail"] = "thumbnail" if thumbnail else "video"
            file = await asyncio.to_thread(self._videos.content, job, variant, request.partial)
            with file.open("rb") as content:
                size = os.fstat(content.fileno()).st_size
                offset = request.offset
                if not 0 <= offset <= size:
                    raise InputError("offset", f"offset is {offset}; it should be from 0 to {size}, the file's bytes.")
                content.seek(offset)
                while chunk := await asyncio.to_thread(content.read, CHUNK_BYTES):
                    yield pb.VideoContent(content=chunk, offset=offset, size=size)
                    offset += len(chunk)
                if request.offset == size:
                    yield pb.VideoContent(offset=size, size=size)

    async def CancelVideo(self, request: pb.CancelVideoRequest, context: Context) -> pb.Video:  # noqa: N802
        async with answering(context):
            return await self._described(await asyncio.to_thread(self._videos.cancel, request.id))

    async def DeleteVideo(self, request: pb.DeleteVideoRequest, context: Context) -> pb.DeleteVideoResponse:  # noqa: N802
        async with answering(context):
            await asyncio.to_thread(self._videos.delete, request.id)
            return pb.DeleteVideoResponse(id=request.id)

    async def _described(self, job: Job) -> pb.Video:
        return _video(await asyncio.to_thread(self._videos.describe, job))


async def _receive(
    requests: AsyncIterator[pb.CreateVideoRequest], uploads: dict[str, BinaryIO], stack: ExitStack, limit: int
) -> pb.NewVideo:
    """What is wanted; the chunks go into `uploads`, nameless files that end with the stack."""
    wanted: pb.NewVideo | None = None
    received, finished = 0, False
    async for request in requests:
        if finished:
            raise InputError("finish", "A message comes after the one with finish; only the last one has it.")
        finished = request.finish
        part, expected = request.WhichOneof("part"), "video" if wanted is None else "file"
        if part is None and finished and wanted is not None:
            continue
        if part != expected:
            raise InputError("part", f"A message holds {part or 'nothing'}; the first holds video, all others file.")
        received += request.ByteSize()
        if received > limit:
            message = f"The request is larger than {limit / 2**20:.0f} MiB; send smaller files."
            raise InputError(request.file.name or "video", message, "too_large")
        if wanted is None:
            wanted = request.video
            continue
        name = request.file.name
        if name not in FILES:
            raise InputError(
                name, f"There is no file {name[:60]!r}; files are taken as {', '.join(FILES)}.", "unknown_parameter"
            )
        if name not in uploads:
            uploads[name] = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        await asyncio.to_thread(uploads[name].write, request.file.content)
    if wanted is None:
        raise InputError("part", "No message was sent; the first holds video, all others file.")
    if not finished:
        raise InputError("finish", "The request broke off; its last message has finish.", "incomplete")
    for file in uploads.values():
        file.seek(0)
    return wanted


def _values(wanted: pb.NewVideo) -> dict[str, Any]:
    """As they are judged: by name, and only those that are set."""
    values = MessageToDict(wanted, preserving_proto_field_name=True)
    for name in (*FILES, "idempotency_key"):
        values.pop(name, None)
    if "speakers" in values:
        order = str(values["speakers"].get("order", "together")).lower()
        boxes = [
            [speaker.box.left, speaker.box.top, speaker.box.right, speaker.box.bottom]
            if speaker.HasField("box")
            else None
            for speaker in wanted.speakers.speakers
        ]
        values["speakers"] = {"boxes": boxes or None, "order": order}
    return values


def _video(described: dict[str, Any]) -> pb.Video:
    """From what `Videos.describe` says; `object` and `model`, which OpenAI's clients want, are not in it."""
    named = described | {"status": described["status"].upper()}
    return ParseDict(named, pb.Video(), ignore_unknown_fields=True)


def _event(happened: Happening) -> pb.VideoEvent:
    if happened.kind == "progress":
        return pb.VideoEvent(progress=_video(happened.data))
    if happened.kind == "clip":
        clip = pb.FinishedClip(**{name: happened.data[name] for name in ("clip", "frames", "finished_at")})
        return pb.VideoEvent(clip=clip)
    if happened.kind == "deleted":
        return pb.VideoEvent(deleted=pb.DeleteVideoResponse(id=happened.data["id"]))
    return pb.VideoEvent(ended=_video(happened.data))


def _check_known(param: str, value: int, known: Any) -> None:
    if value not in known.values():
        raise InputError(param, f"{param} is {value}; it should be one of {', '.join(known.keys())}.")
