"""gRPC as its callers meet it: a real server and real channels, over the jobs, files and runner of the HTTP tests."""

import asyncio
import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Value
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from avatar_api import grpc_server
from avatar_api.auth import Keys
from avatar_api.grpc_server import SERVICES, GrpcServer, check
from avatar_api.protos import avatar_pb2 as pb
from avatar_api.protos import bento_service_pb2 as bento
from avatar_api.protos.avatar_pb2_grpc import AvatarServiceStub
from avatar_api.protos.bento_service_pb2_grpc import BentoServiceStub
from avatar_api.settings import ServiceSettings
from avatar_api.videos import Video
from tests.conftest import REPOSITORY, SmallDisk
from tests.test_videos import (  # noqa: F401 - two of them are fixtures, for pytest to find
    FRAMES,
    Backend,
    backend_fixture,
    data_uri,
    frames,
    full_disk_fixture,
    picture,
    voice,
)
from tests.waiting import eventually

PROTOS = REPOSITORY / "avatar_api" / "protos"
MB = 2**20


class Serving:
    """A server in a thread with an event loop of its own, as in the API's process."""

    def __init__(self, backend: Backend, keys: tuple[str, ...] = ("alice", "bob")) -> None:
        self.backend, self.ready = backend, True
        self._keys, self._started = Keys(keys), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._started.wait(60)

    async def _run(self) -> None:
        self.loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self.server = GrpcServer(self.backend, self._keys, self._is_ready)
        self.port = await self.server.start("127.0.0.1", 0)
        self._started.set()
        await self._ended.wait()
        await self.server.stop(0)

    async def _is_ready(self) -> bool:
        return self.ready

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self, grace: float) -> Any:
        """Begin to stop, as at SIGTERM; what comes back has a result when it has stopped."""
        return asyncio.run_coroutine_threadsafe(self.server.stop(grace), self.loop)

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()


@pytest.fixture
def serving(backend: Backend) -> Iterator[Serving]:
    running = Serving(backend)
    yield running
    running.end()


@dataclass
class Caller:
    """The generated stubs, with a key on each call."""

    channel: grpc.Channel
    key: str | None

    def __getattr__(self, name: str) -> Any:
        stub = BentoServiceStub if name in ("Call", "ServiceMetadata") else AvatarServiceStub
        method = getattr(stub(self.channel), name)
        metadata = () if self.key is None else (("authorization", f"Bearer {self.key}"),)
        return lambda request, timeout=60.0: method(request, timeout=timeout, metadata=metadata)

    def create(self, *messages: pb.CreateVideoRequest) -> pb.Video:
        video: pb.Video = self.CreateVideo(finishing(messages or request()))
        return video


@pytest.fixture
def alice(serving: Serving) -> Iterator[Caller]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(serving.address, options) as channel:
        yield Caller(channel, "alice")


@pytest.fixture
def bob(alice: Caller) -> Caller:
    return replace(alice, key="bob")


def wanted(**values: Any) -> pb.CreateVideoRequest:
    return pb.CreateVideoRequest(video=pb.NewVideo(**{"prompt": "A man talks.", "size": "64x64"} | values))


def finishing(messages: Iterable[pb.CreateVideoRequest]) -> Iterator[pb.CreateVideoRequest]:
    """The same, the last one with `finish`."""
    given = list(messages)
    if given:
        given[-1].finish = True
    return iter(given)


def chunk(name: str, content: bytes) -> pb.CreateVideoRequest:
    return pb.CreateVideoRequest(file=pb.FileChunk(name=name, content=content))


def request(sound: bytes | None = None, **values: Any) -> list[pb.CreateVideoRequest]:
    """Both files in pieces, by turns."""
    image, sound = picture(), sound if sound is not None else voice()
    halves = [chunk("input_reference", image[:99]), chunk("audio", sound[:99])]
    return [wanted(**values), *halves, chunk("input_reference", image[99:]), chunk("audio", sound[99:])]


@contextmanager
def refused(
    code: grpc.StatusCode, message: str, error_code: str | None = None, param: str | None = None
) -> Iterator[Any]:
    """The error comes with this code, and with the object that HTTP sends; yields a list that gets its details."""
    details: list[Any] = []
    with pytest.raises(grpc.RpcError) as raised:
        yield details
    assert raised.value.code() is code, raised.value
    assert message in str(raised.value.details())
    status = rpc_status.from_call(raised.value)
    error = pb.VideoError()
    assert status.details[0].Unpack(error)
    assert error.message == raised.value.details() == status.message
    assert error.type in ("invalid_request_error", "server_error")
    assert error.code
    if error_code is not None:
        assert error.code == error_code
    if param is not None:
        assert error.param == param
    details += status.details


INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
PRECONDITION, EXHAUSTED = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED


class TestVideos:
    def test_a_video_is_created_watched_downloaded_and_deleted(self, alice: Caller, backend: Backend) -> None:
        video = alice.create(*request(seed=7))
        assert (video.status, video.seed, video.queue_position) == (pb.Video.QUEUED, 7, 0)
        assert not video.HasField("started_at")
        events = alice.WatchVideo(pb.WatchVideoRequest(id=video.id))
        first = next(events)
        assert first.progress == video
        backend.make()
        told = [first, *events]
        kinds = [event.WhichOneof("event") for event in told]
        assert [event.clip.clip for event in told if event.WhichOneof("event") == "clip"] == [1, 2]
        assert kinds[-1] == "ended"
        assert kinds.count("ended") == 1
        ended = told[-1].ended
        assert (ended.status, ended.progress, ended.seconds) == (pb.Video.COMPLETED, 100, 2 * FRAMES / 25)
        assert ended == alice.GetVideo(pb.GetVideoRequest(id=video.id))

        content = b"".join(part.content for part in alice.DownloadVideo(pb.DownloadVideoRequest(id=video.id)))
        assert frames(content) == 2 * FRAMES
        thumbnail = pb.DownloadVideoRequest(id=video.id, variant=pb.DownloadVideoRequest.THUMBNAIL)
        assert next(alice.DownloadVideo(thumbnail)).content[:2] == b"\xff\xd8"
        assert alice.DeleteVideo(pb.DeleteVideoRequest(id=video.id)).id == video.id
        with refused(MISSING, "no video", "not_found", "video_id"):
            alice.GetVideo(pb.GetVideoRequest(id=video.id))

    def test_files_may_come_as_urls(self, alice: Caller) -> None:
        uris = {"input_reference": data_uri(picture()), "audio": data_uri(voice())}
        assert alice.create(wanted(**uris)).status == pb.Video.QUEUED

    def test_every_value_arrives(self, alice: Caller, backend: Backend) -> None:
        values: dict[str, Any] = {
            "steps": 3,
            "text_guidance": 2.5,
            "audio_guidance": 1.5,
            "shift": 5.0,
            "color_correction": 0.5,
        }
        values |= {"max_seconds": 4.5, "quality": "exact", "scene_cuts": False, "seed": 2**62}
        box = pb.Speakers.Box(left=0.0, top=0.0, right=0.5, bottom=1.0)
        both = [pb.Speakers.Speaker(box=box), pb.Speakers.Speaker()]
        speakers = pb.Speakers(speakers=both, order=pb.Speakers.IN_TURN)
        video = alice.create(*request(speakers=speakers, webhook_url="https://1.1.1.1/hook", **values))
        job = backend.store.get(video.id)
        kept = job.spec["request"]
        assert {name: kept[name] for name in values} == values
        assert kept["speakers"] == {"boxes": [[0.0, 0.0, 0.5, 1.0], None], "order": "in_turn"}
        assert job.webhook_url == "https://1.1.1.1/hook"

    def test_what_is_told_of_a_video_over_http_is_told_here(self) -> None:
        openai_only = {"object", "model", "remixed_from_video_id"}
        assert {field.name for field in pb.Video.DESCRIPTOR.fields} == set(Video.model_fields) - openai_only

    def test_lists_go_page_by_page_both_ways(self, alice: Caller) -> None:
        ids = [alice.create().id for _ in range(3)]
        page = alice.ListVideos(pb.ListVideosRequest(limit=2))
        assert ([video.id for video in page.videos], page.has_more) == (ids[:0:-1], True)
        rest = alice.ListVideos(pb.ListVideosRequest(limit=2, after=ids[1]))
        assert ([video.id for video in rest.videos], rest.has_more) == (ids[:1], False)
        oldest = alice.ListVideos(pb.ListVideosRequest(order=pb.ListVideosRequest.OLDEST_FIRST))
        assert [video.id for video in oldest.videos] == ids

    def test_what_is_finished_can_be_had_before_the_rest(self, alice: Caller, backend: Backend) -> None:
        asked = pb.DownloadVideoRequest(id=alice.create().id, partial=True)
        with refused(PRECONDITION, "no finished clip", "not_ready"):
            list(alice.DownloadVideo(asked))
        with backend.take() as claim:
            backend.finish_clip(claim, 0)
            assert frames(b"".join(part.content for part in alice.DownloadVideo(asked))) == FRAMES
            with refused(PRECONDITION, "partial=true", "not_ready"):
                list(alice.DownloadVideo(pb.DownloadVideoRequest(id=asked.id)))
            with refused(INVALID, "in_progress", param="offset"):
                list(alice.DownloadVideo(pb.DownloadVideoRequest(id=asked.id, partial=True, offset=1)))
            claim.cancelled()

    def test_a_cancelled_video_ends_its_watch(self, alice: Caller) -> None:
        video = alice.create()
        events = alice.WatchVideo(pb.WatchVideoRequest(id=video.id))
        next(events)
        assert alice.CancelVideo(pb.CancelVideoRequest(id=video.id)).status == pb.Video.CANCELLED
        assert list(events)[-1].ended.status == pb.Video.CANCELLED

    def test_a_watch_goes_on_after_the_clips_that_are_known(self, alice: Caller, backend: Backend) -> None:
        video = alice.create()
        backend.make()
        events = list(alice.WatchVideo(pb.WatchVideoRequest(id=video.id, clips_seen=1)))
        assert [event.clip.clip for event in events[:-1]] == [2]

    def test_ending_a_watch_does_not_end_the_video(self, alice: Caller, backend: Backend) -> None:
        video = alice.create()
        events = alice.WatchVideo(pb.WatchVideoRequest(id=video.id))
        next(events)
        events.cancel()
        with pytest.raises(grpc.RpcError) as late:
            list(alice.WatchVideo(pb.WatchVideoRequest(id=video.id), timeout=0.5))
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert backend.make() == video.id

    def test_a_video_that_is_deleted_ends_its_watch(self, alice: Caller, backend: Backend) -> None:
        video = alice.create()
        events = alice.WatchVideo(pb.WatchVideoRequest(id=video.id))
        next(events)
        backend.store.cancel(video.id)
        backend.store.delete(video.id)
        last = list(events)[-1]
        assert last.WhichOneof("event") in ("deleted", "ended"), "the end may have been seen first"


class TestRefusals:
    @pytest.mark.parametrize(
        ("messages", "param", "message"),
        [
            ([], "part", "No message was sent"),
            ([pb.CreateVideoRequest()], "part", "holds nothing"),
            ([chunk("audio", b"x")], "part", "holds file"),
            ([wanted(), wanted()], "part", "holds video"),
            ([wanted(), pb.CreateVideoRequest(), chunk("audio", b"x")], "part", "holds nothing"),
            ([*finishing(request()), chunk("audio", b"x")], "finish", "comes after"),
            ([wanted(), chunk("../../etc/passwd", b"x")], "../../etc/passwd", "There is no file"),
            ([wanted(), chunk("a" * 20_000, b"x")], None, "There is no file"),
            ([wanted(input_reference="data:,"), chunk("input_reference", b"x")], "input_reference", "comes twice"),
            (request(size="3x3"), "size", "multiples of 16"),
            (request(steps=0), "steps", "greater than or equal to 1"),
            (request(text_guidance=float("nan")), "text_guidance", "finite"),
            (request(seed=-1), "seed", "greater than or equal to 0"),
            (request(max_seconds=6), "max_seconds", "the limit here is 5"),
            (request(webhook_url="ftp://example.com"), "webhook_url", "http"),
            (request(speakers=pb.Speakers(order=7)), "speakers.order", "'together' or 'in_turn'"),  # type: ignore[arg-type]
            (request(speakers=pb.Speakers(speakers=[pb.Speakers.Speaker()])), "speakers.boxes", "2 items"),
            (request(sound=b"text"), "audio", "looks like text"),
            (request(idempotency_key="k" * 256), "idempotency_key", "more than 255"),
            ([wanted(audio="http://127.0.0.1:9/voice.wav"), chunk("input_reference", picture())], "audio", "127.0.0.1"),
        ],
    )
    def test_what_cannot_be_is_refused_by_name_and_leaves_nothing(
        self, alice: Caller, backend: Backend, messages: list[pb.CreateVideoRequest], param: str | None, message: str
    ) -> None:
        with refused(INVALID, message, param=param):
            alice.CreateVideo(finishing(messages))
        assert not backend.store.counts()
        jobs = backend.settings.home / "jobs"
        assert not jobs.exists() or not list(jobs.iterdir())

    def test_an_upload_beyond_the_limit_is_refused_while_it_comes(self, alice: Caller, backend: Backend) -> None:
        backend.settings.max_upload_bytes = MB
        endless = (chunk("audio", bytes(MB // 8)) for _ in iter(int, 1))
        with refused(EXHAUSTED, "larger than 1 MiB", "too_large", "audio"):
            alice.CreateVideo(message for part in ([wanted()], endless) for message in part)

    def test_an_upload_that_breaks_off_leaves_nothing(self, alice: Caller, backend: Backend) -> None:
        released = threading.Event()

        def endless() -> Iterator[pb.CreateVideoRequest]:
            yield from request()
            released.wait()

        try:
            with pytest.raises(grpc.RpcError) as late:
                alice.CreateVideo(endless(), timeout=1)
        finally:
            released.set()
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with refused(INVALID, "broke off", "incomplete", "finish"):  # what it looks like to the server
            alice.CreateVideo(iter(request()))
        assert not backend.store.counts()
        assert not (backend.settings.home / "jobs").exists()

    @pytest.mark.parametrize("method", ["CreateVideo", "GetVideo", "Call", "WatchVideo"])
    def test_bytes_that_are_no_message_are_refused(self, alice: Caller, method: str) -> None:
        service = "bentoml.grpc.v1.BentoService" if method == "Call" else "avatar.v1.AvatarService"
        metadata = (("authorization", "Bearer alice"),)
        raw: Any = alice.channel.stream_stream(f"/{service}/{method}")
        with pytest.raises(grpc.RpcError) as raised:
            list(raw(iter([b"\xff" * 100]), metadata=metadata, timeout=60))
        assert raised.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, INVALID)
        assert "Traceback" not in str(raised.value.details())
        assert not alice.ListVideos(pb.ListVideosRequest()).videos, "the server is well"

    def test_other_wrong_requests_are_refused_by_name(self, alice: Caller, backend: Backend) -> None:
        for wrong, param in ((pb.ListVideosRequest(limit=101), "limit"), (pb.ListVideosRequest(limit=0), "limit")):
            with refused(INVALID, "1 to 100", param=param):
                alice.ListVideos(wrong)
        with refused(INVALID, "NEWEST_FIRST", param="order"):
            alice.ListVideos(pb.ListVideosRequest(order=9))  # type: ignore[arg-type]
        with refused(MISSING, "no video"):
            alice.ListVideos(pb.ListVideosRequest(after="video_unknown"))
        video = alice.create()
        with refused(PRECONDITION, "cancel it", "not_finished"):
            alice.DeleteVideo(pb.DeleteVideoRequest(id=video.id))
        with refused(INVALID, "THUMBNAIL", param="variant"):
            list(alice.DownloadVideo(pb.DownloadVideoRequest(id=video.id, variant=9)))  # type: ignore[arg-type]
        backend.make()
        for offset in (-1, 2**62):
            with refused(INVALID, "the file's bytes", param="offset"):
                list(alice.DownloadVideo(pb.DownloadVideoRequest(id=video.id, offset=offset)))

    def test_the_same_key_gives_the_same_video(self, alice: Caller, bob: Caller, backend: Backend) -> None:
        first = alice.create(*request(idempotency_key="k"))
        assert alice.create(*request(idempotency_key="k")).id == first.id
        with refused(PRECONDITION, "used before", "idempotency_conflict"):
            alice.create(*request(idempotency_key="k", steps=3))
        assert bob.create(*request(idempotency_key="k")).id != first.id
        assert len(list((backend.settings.home / "jobs").iterdir())) == 2

    def test_a_full_queue_says_when_to_come_back(self, alice: Caller) -> None:
        for _ in range(3):
            alice.create()
        with refused(EXHAUSTED, "3 of your videos", "queue_full") as details:
            alice.create()
        retry = RetryInfo()
        assert details[1].Unpack(retry)
        assert retry.retry_delay.seconds > 0

    def test_a_full_disk_is_told(self, alice: Caller, full_disk: SmallDisk) -> None:
        with refused(grpc.StatusCode.UNAVAILABLE, "disk is full", "unavailable") as details:
            alice.create()
        assert details[1].Is(RetryInfo.DESCRIPTOR)

    def test_what_fails_here_is_told_without_its_inside(
        self, alice: Caller, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backend, "store", None)
        with refused(grpc.StatusCode.INTERNAL, "server's log", "internal_error"):
            alice.GetVideo(pb.GetVideoRequest(id="video_x"))


class TestWhoseItIs:
    def test_nobody_comes_in_without_a_key(self, alice: Caller, bob: Caller) -> None:
        calls: list[tuple[str, Any]] = [
            ("CreateVideo", iter(request())),
            ("GetVideo", pb.GetVideoRequest()),
            ("WatchVideo", pb.WatchVideoRequest()),
            ("Call", bento.Request(api_name="generate")),
        ]
        for key in (None, "eve"):
            for name, message in calls:
                with refused(grpc.StatusCode.UNAUTHENTICATED, "API key", "invalid_api_key"):
                    answer = getattr(replace(alice, key=key), name)(message)
                    list(answer)
        reflection = ProtoReflectionDescriptorDatabase(alice.channel)
        with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
            reflection.get_services()
        assert replace(alice, key=None).ServiceMetadata(bento.ServiceMetadataRequest()).name == "avatar_api"
        by_header = AvatarServiceStub(alice.channel).ListVideos
        assert not by_header(pb.ListVideosRequest(), metadata=(("x-api-key", "bob"),)).videos

    def test_others_videos_are_not_there(self, alice: Caller, bob: Caller, backend: Backend) -> None:
        video = alice.create()
        backend.make()
        for name in ("GetVideo", "WatchVideo", "DownloadVideo", "CancelVideo", "DeleteVideo"):
            message = getattr(pb, f"{name}Request")(id=video.id)
            with refused(MISSING, "no video", "not_found"):
                list(getattr(bob, name)(message))
        assert not bob.ListVideos(pb.ListVideosRequest()).videos
        assert alice.GetVideo(pb.GetVideoRequest(id=video.id)).status == pb.Video.COMPLETED


def parts(**values: Any) -> bento.Request:
    """A call of `generate`, with files as bytes and the values as text or JSON."""
    fields: dict[str, bento.Part] = {}
    for name, value in ({"image": picture(), "audio": voice(), "size": "64x64"} | values).items():
        if isinstance(value, bytes):
            fields[name] = bento.Part(file=bento.File(kind="application/octet-stream", content=value))
        elif isinstance(value, str):
            fields[name] = bento.Part(text=StringValue(value=value))
        elif isinstance(value, bento.Part):
            fields[name] = value
        else:
            fields[name] = bento.Part(json=Value(number_value=value))
    return bento.Request(api_name="generate", multipart=bento.Multipart(fields=fields))


class TestBento:
    def test_a_call_answers_with_the_video(self, alice: Caller, backend: Backend) -> None:
        call = BentoServiceStub(alice.channel).Call.future
        answer = call(parts(prompt="A man talks.", steps=3, seed="7"), metadata=(("authorization", "Bearer alice"),))
        eventually(lambda: backend.store.counts())
        job = backend.store.get(backend.make())
        kept = job.spec["request"]
        assert (kept["prompt"], kept["steps"], kept["seed"]) == ("A man talks.", 3, 7)
        file = answer.result(60).file
        assert file.kind == "video/mp4"
        assert frames(file.content) == 2 * FRAMES

    @pytest.mark.parametrize(
        ("message", "param", "text"),
        [
            (bento.Request(api_name="predict"), "api_name", "'generate'"),
            (bento.Request(api_name="generate"), "content", "holds nothing"),
            (bento.Request(api_name="generate", serialized_bytes=b"x"), "content", "serialized_bytes"),
            (parts(size="3x3"), "size", "multiples of 16"),
            (parts(steps=0), "steps", "greater than or equal"),
            (parts(sede="1"), "sede", "there is no parameter"),
            (parts(sede=bento.Part(ndarray=bento.NDArray())), "sede", "holds ndarray"),
            (parts(prompt=b"A man talks."), "prompt", "holds file"),
            (parts(shift=float("nan")), "shift", "infinite or none"),
            (parts(image="http://127.0.0.1/me.png"), "image", "holds text"),
            (parts(image=bento.Part()), "image", "holds nothing"),
            (parts(image=b""), "image", "empty"),
            (parts(audio=b"text"), "audio", "looks like text"),
            (parts(speakers="{"), "speakers", "not JSON"),
            (parts(**{"x" * 20_000: bento.Part()}), None, "holds nothing"),
        ],
    )
    def test_what_cannot_be_is_refused_by_name(
        self, alice: Caller, backend: Backend, message: bento.Request, param: str | None, text: str
    ) -> None:
        with refused(INVALID, text, param=param):
            alice.Call(message)
        assert not backend.store.counts()

    @pytest.mark.parametrize("gone", ["cancelled", "late"])
    def test_a_caller_that_goes_away_cancels_its_video(self, alice: Caller, backend: Backend, gone: str) -> None:
        metadata = (("authorization", "Bearer alice"),)
        timeout = 3 if gone == "late" else None
        call = BentoServiceStub(alice.channel).Call.future(parts(), metadata=metadata, timeout=timeout)
        if gone == "cancelled":
            eventually(lambda: backend.store.counts())
            call.cancel()
        eventually(lambda: backend.store.counts() == {"cancelled": 1})

    def test_a_video_that_fails_says_why(self, alice: Caller, backend: Backend) -> None:
        def fail() -> None:
            eventually(lambda: backend.store.counts())
            with backend.take() as claim:
                error = {"type": "server_error", "code": "out_of_memory", "message": "Full.", "param": "size"}
                claim.fail(error, retry=False)

        runner = threading.Thread(target=fail)
        runner.start()
        with refused(grpc.StatusCode.INTERNAL, "Full.", "out_of_memory", "size"):
            alice.Call(parts())
        runner.join()


class TestServer:
    def test_health_follows_the_models(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(grpc_server, "READY_SECONDS", 0.1)
        serving = Serving(backend)
        try:
            with grpc.insecure_channel(serving.address) as channel:
                health = HealthStub(channel)
                for service in ("", *SERVICES):
                    states = health.Watch(HealthCheckRequest(service=service), timeout=60)
                    serving.ready = True
                    while next(states).status != HealthCheckResponse.SERVING:
                        pass
                    assert health.Check(HealthCheckRequest(service=service)).status == HealthCheckResponse.SERVING
                    serving.ready = False
                    assert next(states).status == HealthCheckResponse.NOT_SERVING
                    states.cancel()
        finally:
            serving.end()

    def test_a_stock_client_finds_the_services_by_reflection(self, alice: Caller) -> None:
        keyed = grpc.intercept_channel(alice.channel, _WithKey())
        database = ProtoReflectionDescriptorDatabase(keyed)
        assert {*SERVICES, "grpc.health.v1.Health"} <= set(database.get_services())
        pool = DescriptorPool(database)
        method = pool.FindServiceByName("avatar.v1.AvatarService").FindMethodByName("ListVideos")
        asked, answered = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        call = keyed.unary_unary(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=asked.SerializeToString,
            response_deserializer=answered.FromString,
        )
        video = alice.create()
        assert MessageToDict(call(asked()))["videos"][0]["id"] == video.id
        assert pool.FindMessageTypeByName("avatar.v1.VideoError"), "so that it can show what a refusal holds"

    def test_when_it_ends_running_calls_finish_and_no_new_ones_begin(
        self, serving: Serving, alice: Caller, backend: Backend
    ) -> None:
        health = HealthStub(alice.channel)
        eventually(lambda: health.Check(HealthCheckRequest()).status == HealthCheckResponse.SERVING)
        states = health.Watch(HealthCheckRequest(), timeout=60)
        next(states)
        call = BentoServiceStub(alice.channel).Call.future
        answer = call(parts(), metadata=(("authorization", "Bearer alice"),))
        eventually(lambda: backend.store.counts())
        stopped = serving.stop(60)
        assert next(states).status == HealthCheckResponse.NOT_SERVING
        states.cancel()
        with (
            grpc.insecure_channel(serving.address) as other,
            pytest.raises(grpc.RpcError, match="UNAVAILABLE"),
        ):
            replace(alice, channel=other).ListVideos(pb.ListVideosRequest(), timeout=20)
        backend.make()
        assert frames(answer.result(60).file.content) == 2 * FRAMES
        stopped.result(60)

    def test_calls_that_outlast_the_grace_period_end_and_their_videos_go_on(
        self, serving: Serving, alice: Caller, backend: Backend
    ) -> None:
        answer = BentoServiceStub(alice.channel).Call.future(parts(), metadata=(("authorization", "Bearer alice"),))
        eventually(lambda: backend.store.counts())
        serving.stop(0.2).result(60)
        assert answer.exception(60).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert backend.store.counts() == {"queued": 1}

    def test_the_end_begins_at_the_signal_and_whoever_else_waits_for_it_hears_it_too(self, backend: Backend) -> None:
        heard: list[int] = []

        async def run() -> None:
            server = GrpcServer(backend, Keys([]), _ready)
            port = await server.start("127.0.0.1", 0)
            server.stop_at_sigterm(60)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                states = HealthStub(channel).Watch(HealthCheckRequest(), timeout=60)
                while (await states.read()).status != HealthCheckResponse.SERVING:
                    pass
                os.kill(os.getpid(), signal.SIGTERM)
                assert (await states.read()).status == HealthCheckResponse.NOT_SERVING
                states.cancel()
                await server.stop(60)

        before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
        try:
            asyncio.run(run())
        finally:
            signal.signal(signal.SIGTERM, before)
        assert heard == [signal.SIGTERM]

    def test_servers_of_several_workers_share_a_port(self, serving: Serving, backend: Backend) -> None:
        async def start_and_stop() -> int:
            second = GrpcServer(backend, Keys(["alice"]), _ready)
            port = await second.start("127.0.0.1", serving.port)
            await second.stop(0)
            return port

        assert asyncio.run(start_and_stop()) == serving.port

    def test_a_port_that_another_server_has_is_refused_before_it_is_shared(self, serving: Serving) -> None:
        with pytest.raises(ValueError, match=f"127.0.0.1 port {serving.port} .*in use.*AVATAR_GRPC_PORT"):
            check(ServiceSettings(grpc_port=serving.port))
        check(ServiceSettings(grpc_port=0))


async def _ready() -> bool:
    return True


class _WithKey(grpc.StreamStreamClientInterceptor, grpc.UnaryUnaryClientInterceptor):
    """As a stock client has `-H 'authorization: Bearer alice'`."""

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(details._replace(metadata=(("authorization", "Bearer alice"),)), requests)

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return self.intercept_stream_stream(continuation, details, request)


@dataclass
class Certificate:
    chain: Path
    key: Path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    folder = tmp_path_factory.mktemp("tls")
    made = Certificate(folder / "cert.pem", folder / "key.pem")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, *names, "-keyout", made.key, "-out", made.chain], check=True, capture_output=True)
    return made


class TestTls:
    def test_with_a_certificate_only_tls_is_spoken(self, backend: Backend, certificate: Certificate) -> None:
        backend.settings.grpc_tls_cert, backend.settings.grpc_tls_key = certificate.chain, certificate.key
        serving = Serving(backend)
        try:
            trusted = grpc.ssl_channel_credentials(certificate.chain.read_bytes())
            with grpc.secure_channel(f"localhost:{serving.port}", trusted) as channel:
                assert not Caller(channel, "alice").ListVideos(pb.ListVideosRequest()).videos
            with grpc.insecure_channel(serving.address) as plain, pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
                Caller(plain, "alice").ListVideos(pb.ListVideosRequest(), timeout=20)
        finally:
            serving.end()

    def test_what_cannot_be_used_is_named(self, certificate: Certificate, tmp_path: Path) -> None:
        for cert, key, message in (
            (certificate.chain, None, "belong together"),
            (certificate.chain, tmp_path / "none", "No such file"),
            (certificate.key, certificate.key, "cannot be used"),
        ):
            with pytest.raises(ValueError, match=message):
                check(ServiceSettings(grpc_port=1, grpc_tls_cert=cert, grpc_tls_key=key))


def peak_growth(since: int) -> float:
    """MB that this process, which holds the server and its caller, has at most grown by since `start_peak`."""
    return (_status("VmHWM") - since) / 1024


def start_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


@pytest.fixture
def large(backend: Backend, serving: Serving, alice: Caller) -> tuple[str, str]:
    """A finished video of 200 MB: its id and its digest."""
    video = alice.create()
    block = np.random.default_rng(0).bytes(MB)
    digest = hashlib.sha256()
    with backend.take() as claim:
        with (backend.storage.folder(video.id) / "video.1.mp4").open("wb") as file:
            for _ in range(200):
                file.write(block)
                digest.update(block)
        claim.complete({"video": "video.1.mp4", "frames": 25, "seconds": 1.0})
    return video.id, digest.hexdigest()


def digest_of(contents: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


class TestSize:
    def test_an_upload_of_200_mb_takes_no_memory(self, backend: Backend) -> None:
        backend.settings.max_upload_bytes = 256 * MB
        serving = Serving(backend)
        header = io.BytesIO()
        with wave.open(header, "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(16000)
            sound.setnframes(100 * MB)
        noise = (np.random.default_rng(0).normal(0, 3000, MB // 2).astype(np.int16)).tobytes()

        def messages() -> Iterator[pb.CreateVideoRequest]:
            yield wanted(max_seconds=1)
            yield chunk("input_reference", picture())
            yield chunk("audio", header.getvalue())
            for _ in range(200):
                yield chunk("audio", noise)
            yield pb.CreateVideoRequest(finish=True)

        try:
            with grpc.insecure_channel(serving.address) as channel:
                alice = Caller(channel, "alice")
                alice.create(*request())  # what a first request loads
                before = start_peak()
                video = alice.CreateVideo(messages())
                assert peak_growth(before) < 60
        finally:
            serving.end()
        voice_file = backend.storage.folder(video.id) / "audio"
        assert voice_file.stat().st_size == 200 * MB + len(header.getvalue())

    def test_a_download_of_200_mb_takes_no_memory_and_goes_on_where_it_broke(
        self, alice: Caller, large: tuple[str, str]
    ) -> None:
        video, digest = large
        next(alice.DownloadVideo(pb.DownloadVideoRequest(id=video)))
        before = start_peak()
        whole = hashlib.sha256()
        broken = alice.DownloadVideo(pb.DownloadVideoRequest(id=video))
        for part in broken:
            whole.update(part.content)
            reached = part.offset + len(part.content)
            if reached > 100 * MB:
                break
        broken.cancel()
        for part in alice.DownloadVideo(pb.DownloadVideoRequest(id=video, offset=reached)):
            assert part.size == 200 * MB
            whole.update(part.content)
        assert peak_growth(before) < 60
        assert whole.hexdigest() == digest
        (last,) = alice.DownloadVideo(pb.DownloadVideoRequest(id=video, offset=200 * MB))
        assert (last.content, last.offset, last.size) == (b"", 200 * MB, 200 * MB)

    def test_a_slow_reader_is_waited_for(self, alice: Caller, large: tuple[str, str]) -> None:
        video, digest = large
        next(alice.DownloadVideo(pb.DownloadVideoRequest(id=video)))
        before = start_peak()
        slow = alice.DownloadVideo(pb.DownloadVideoRequest(id=video))
        first = next(slow).content
        time.sleep(1)
        assert alice.GetVideo(pb.GetVideoRequest(id=video)).id == video, "others are served meanwhile"
        assert peak_growth(before) < 60, "nobody reads ahead"
        assert digest_of([first, *(part.content for part in slow)]) == digest

    def test_fifty_watchers_see_the_same(self, serving: Serving, alice: Caller, backend: Backend) -> None:
        video = alice.create()
        metadata = (("authorization", "Bearer alice"),)

        async def watch(channel: grpc.aio.Channel, watching: list[int]) -> tuple[list[int], pb.Video]:
            clips = []
            async for event in AvatarServiceStub(channel).WatchVideo(
                pb.WatchVideoRequest(id=video.id), metadata=metadata, timeout=120
            ):
                watching.append(1)
                kind = event.WhichOneof("event")
                if kind == "clip":
                    clips.append(event.clip.clip)
                elif kind == "ended":
                    return clips, event.ended
            raise AssertionError("it ended without saying so")

        async def all_of_them() -> list[tuple[list[int], pb.Video]]:
            watching: list[int] = []
            async with grpc.aio.insecure_channel(serving.address) as channel:
                watchers = [asyncio.create_task(watch(channel, watching)) for _ in range(50)]
                while len(watching) < 50:
                    await asyncio.sleep(0.02)
                await asyncio.to_thread(backend.make)
                return await asyncio.gather(*watchers)

        seen = asyncio.run(all_of_them())
        assert all(clips == [1, 2] for clips, _ in seen)
        assert all(ended.status == pb.Video.COMPLETED for _, ended in seen)


@pytest.fixture(scope="module")
def bentomls_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """BentoML's gRPC client does not import with our protobuf: here are the versions that it was made for."""
    folder = tmp_path_factory.mktemp("site-packages")
    packages = ["protobuf==5.29.5", "grpcio==1.71.2", "grpcio-health-checking==1.71.2"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    subprocess.run(command, check=True)
    return {**os.environ, "PYTHONPATH": str(folder), "BENTOML_DO_NOT_TRACK": "1"}


BENTOMLS_CLIENT = """
import sys
from pathlib import Path

import google.protobuf
from bentoml.client import GrpcClient, SyncGrpcClient
from bentoml.grpc.utils import import_generated_stubs, import_grpc
from google.protobuf.struct_pb2 import Value
from google.protobuf.wrappers_pb2 import StringValue

pb, services = import_generated_stubs("v1")
grpc, _ = import_grpc()
assert (google.protobuf.__version__, grpc.__version__) == ("5.29.5", "1.71.2")

# Its client object finds the API, but in 1.4.39 it can send no multipart, to no server; and this name it mistakes:
GrpcClient._create_channel = SyncGrpcClient._create_channel
address, picture, voice, video = sys.argv[1:]
host, _, port = address.partition(":")
SyncGrpcClient.wait_until_server_ready(host, int(port), 30)
client = SyncGrpcClient.from_url(address)
(api,) = client._svc.apis.values()
print(client._svc.name, api.name, api.input, api.output)
assert client.health("bentoml.grpc.v1.BentoService").status == 1

fields = {
    "image": pb.Part(file=pb.File(content=Path(picture).read_bytes())),
    "audio": pb.Part(file=pb.File(content=Path(voice).read_bytes())),
    "size": pb.Part(text=StringValue(value="64x64")),
    "steps": pb.Part(json=Value(number_value=3)),
}
with grpc.insecure_channel(address) as channel:
    call = services.BentoServiceStub(channel).Call
    request = pb.Request(api_name="generate", multipart=pb.Multipart(fields=fields))
    answer = call(request, metadata=[("authorization", "Bearer alice")], timeout=60)
    Path(video).write_bytes(answer.file.content)
    try:
        call(pb.Request(api_name="generate", text=StringValue(value="A man talks.")), metadata=[("x-api-key", "alice")])
    except grpc.RpcError as error:
        print(error.code().name, error.details())
"""


def test_bentomls_own_client_code_gets_a_video(
    serving: Serving, backend: Backend, bentomls_environment: dict[str, str], tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("me.png", "voice.wav", "video.mp4")]
    files[0].write_bytes(picture())
    files[1].write_bytes(voice())

    def make_it() -> None:
        eventually(lambda: backend.store.counts())
        backend.make()

    runner = threading.Thread(target=make_it)
    runner.start()
    command = [sys.executable, "-W", "ignore", "-c", BENTOMLS_CLIENT, serving.address, *map(str, files)]
    client = subprocess.run(command, env=bentomls_environment, capture_output=True, text=True)
    assert client.returncode == 0, client.stderr
    runner.join()
    assert frames(files[2].read_bytes()) == 2 * FRAMES
    (job,) = backend.store.page()
    assert job.spec["request"]["steps"] == 3
    api, refusal = client.stdout.splitlines()
    assert api.startswith("avatar_api generate Multipart(")
    assert refusal == "INVALID_ARGUMENT The request holds text; send a multipart of named parts."


def test_the_generated_code_is_that_of_the_protos(tmp_path: Path) -> None:
    protos = [str(file.relative_to(REPOSITORY)) for file in sorted(PROTOS.glob("*.proto"))]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *outputs, *protos], cwd=REPOSITORY, check=True
    )
    made = sorted((tmp_path / "avatar_api" / "protos").iterdir())
    assert [file.name for file in made] == sorted(file.name for file in PROTOS.glob("*_pb2*"))
    for file in made:
        assert file.read_text() == (PROTOS / file.name).read_text(), "run `make protos`"


def test_bentomls_protocol_is_bentomls_word_for_word() -> None:
    import bentoml

    theirs = (Path(bentoml.__file__).parent / "grpc" / "v1" / "service.proto").read_text()
    ours = (PROTOS / "bento_service.proto").read_text()
    assert ours.endswith(theirs)
    assert "Copyright" in ours.removesuffix(theirs)
