"""`/v1/videos`, as its callers meet it: real HTTP, the stock `openai` client, real files.

The runner here does what the product's does, with grey pictures in place of the model's.
"""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
import soundfile
import uvicorn
from PIL import Image

from avatar_api.auth import Authenticated, Keys
from avatar_api.http import OneErrorShape, create_app
from avatar_api.jobs import Claim, JobSettings, JobStore
from avatar_api.routes import create_router
from avatar_api.settings import ServiceSettings
from avatar_api.storage import Storage
from avatar_api.video_writer import VideoWriter
from tests.conftest import SmallDisk
from tests.waiting import eventually

FRAMES = 10  # of each clip


@dataclass
class Backend:
    settings: ServiceSettings
    store: JobStore
    storage: Storage

    def take(self) -> Claim:
        return eventually(lambda: self.store.claim("runner"), "there is no job")

    def finish_clip(self, claim: Claim, index: int) -> None:
        """As the worker does it: segment, then record."""
        folder = self.storage.folder(claim.job.id)
        name = f"clip-{index:05d}.{claim.epoch}.mp4"
        with VideoWriter(folder / name, 64, 64, sound=None) as writer:
            writer.write(np.full((FRAMES, 64, 64, 3), 40 * (index + 1), np.uint8))
        self.storage.publish(claim.job.id, name)
        claim.finish_clip(index, {"segment": name, "state": None, "frames": FRAMES})

    def complete(self, claim: Claim) -> None:
        folder = self.storage.folder(claim.job.id)
        with VideoWriter(folder / "video.1.mp4", 64, 64, folder / "audio") as writer:
            for clip in self.store.clips(claim.job.id):
                writer.append(folder / clip.result["segment"])
        claim.complete({"video": "video.1.mp4", "frames": writer.frames, "seconds": writer.frames / 25})

    def make(self, clips: int = 2) -> str:
        with self.take() as claim:
            for index in range(clips):
                self.finish_clip(claim, index)
            self.complete(claim)
            return claim.job.id


@pytest.fixture(name="backend")
def backend_fixture(tmp_path: Path) -> Iterator[Backend]:
    settings = ServiceSettings(home=tmp_path / "home", max_queued=4, max_queued_per_key=3, max_seconds=5)
    settings.home.mkdir()
    quick = JobSettings(lease=5, beat=0.1, poll=0.05)
    with closing(JobStore(settings.database, quick)) as store:
        yield Backend(settings, store, Storage(settings))


@pytest.fixture(name="full_disk")
def full_disk_fixture(backend: Backend, small_disk: SmallDisk) -> SmallDisk:
    """Where jobs' files lie."""
    (small_disk.folder / "jobs").mkdir()
    (backend.settings.home / "jobs").symlink_to(small_disk.folder / "jobs")
    small_disk.fill()
    return small_disk


@pytest.fixture
def url(backend: Backend) -> Iterator[str]:
    async def ready() -> bool:
        return True

    app: Any = create_app(ready, [create_router(lambda: backend)])
    app = OneErrorShape(Authenticated(app, Keys(["alice", "bob"])), max_upload_bytes=2**20)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/v1/videos"
    server.should_exit = True
    thread.join()


@pytest.fixture
def alice(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=url, headers={"Authorization": "Bearer alice"}, timeout=20, follow_redirects=True
    ) as client:
        yield client


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def voice(seconds: float = 0.8) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).normal(0, 0.1, int(seconds * 16000)), 16000, format="WAV")
    return file.getvalue()


def data_uri(content: bytes) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(content).decode()


def files() -> dict[str, tuple[str, bytes]]:
    return {"input_reference": ("../../me.png", picture()), "audio": ("voice.wav", voice())}


def create(client: httpx.Client, **values: Any) -> dict[str, Any]:
    answer = client.post("", data={"prompt": "A man talks.", "size": "64x64"} | values, files=files())
    assert answer.status_code == 200, answer.text
    video: dict[str, Any] = answer.json()
    return video


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    said: dict[str, Any] = answer.json()["error"]
    assert set(said) == {"type", "code", "message", "param"}
    return said


def frames(content: bytes) -> int:
    with av.open(io.BytesIO(content), "r") as film:
        return sum(1 for _ in film.decode(film.streams.video[0]))


class TestOpenAI:
    """The stock client, unchanged."""

    @pytest.fixture
    def client(self, url: str) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(api_key="alice", base_url=url.removesuffix("/videos")) as client:
            yield client

    def test_create_poll_download_and_delete(self, client: openai.OpenAI, backend: Backend, tmp_path: Path) -> None:
        (tmp_path / "me.png").write_bytes(picture())
        runner = threading.Thread(target=backend.make)
        runner.start()
        video = client.videos.create_and_poll(
            model="sora-2",
            prompt="A man talks.",
            input_reference=tmp_path / "me.png",
            extra_body={"audio": data_uri(voice()), "size": "64x64"},
            poll_interval_ms=100,
        )
        runner.join()
        assert (video.status, video.progress, video.error) == ("completed", 100, None)
        assert video.expires_at is not None
        assert frames(client.videos.download_content(video.id).read()) == 2 * FRAMES
        thumbnail = client.videos.download_content(video.id, variant="thumbnail").read()
        assert Image.open(io.BytesIO(thumbnail)).size == (64, 64)
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)
        assert not list((backend.settings.home / "jobs").iterdir()), "its files are gone as well"

    def test_list_goes_through_all_pages(self, client: openai.OpenAI, alice: httpx.Client) -> None:
        ids = [create(alice)["id"] for _ in range(3)]
        assert [video.id for video in client.videos.list(limit=2)] == ids[::-1]
        assert [video.id for video in client.videos.list(limit=1, order="asc")] == ids

    def test_errors_are_the_clients_own(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="send a picture or a video"):
            client.videos.create(prompt="Nobody.")


class TestCreate:
    def test_a_video_waits_in_the_queue_at_once(self, alice: httpx.Client) -> None:
        first, second = create(alice, seed="7"), create(alice)
        assert (first["object"], first["status"], first["progress"], first["seed"]) == ("video", "queued", 0, 7)
        assert [first["queue_position"], second["queue_position"]] == [0, 1]
        assert alice.get(f"/{first['id']}").json() == first

    def test_json_with_data_uris_does_as_well(self, alice: httpx.Client, backend: Backend) -> None:
        body = {"size": "64x64", "input_reference": data_uri(picture()), "audio": data_uri(voice())}
        assert alice.post("", json=body).json()["status"] == "queued"
        assert alice.post("", json=body | {"input_reference": {"image_url": data_uri(picture())}}).status_code == 200
        assert backend.store.counts() == {"queued": 2}

    @pytest.mark.parametrize(
        ("values", "sent", "param", "message"),
        [
            ({"size": "3x3"}, {}, "size", "multiples of 16"),
            ({"sede": "1"}, {}, "sede", "there is no parameter"),
            ({"max_seconds": "6"}, {}, "max_seconds", "the limit here is 5"),
            ({"webhook_url": "ftp://example.com"}, {}, "webhook_url", "http"),
            ({"speakers": "{"}, {}, "speakers", "not JSON"),
            ({}, {"audio": ("a.wav", b"text")}, "audio", "looks like text"),
            ({}, {"audio": ("a.wav", voice(6))}, "audio", "lasts more than 5 s"),
            ({}, {"input_reference": ("a.png", b"")}, "input_reference", "empty"),
            ({}, {"poster": ("a.png", picture())}, "poster", "is a file"),
            ({"audio": "http://127.0.0.1:9/voice.wav"}, {"audio": None}, "audio", "127.0.0.1"),
            ({"audio": "file:///etc/passwd"}, {"audio": None}, "audio", "data"),
            ({"audio": "data:;base64,!!!!"}, {"audio": None}, "audio", "base64"),
        ],
    )
    def test_what_cannot_be_is_refused_by_name_and_leaves_nothing(
        self, alice: httpx.Client, backend: Backend, values: Any, sent: Any, param: str, message: str
    ) -> None:
        form = {name: file for name, file in (files() | sent).items() if file is not None}
        said = error(alice.post("", data={"size": "64x64"} | values, files=form), 400)
        assert said["param"] == param
        assert message in said["message"]
        assert not backend.store.counts()
        jobs = backend.settings.home / "jobs"
        assert not jobs.exists() or not list(jobs.iterdir())

    @pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff", b'{"input_reference": 7}', b"[" * 100_000])
    def test_a_body_that_is_no_request_is_refused(self, alice: httpx.Client, body: bytes) -> None:
        assert error(alice.post("", content=body, headers={"content-type": "application/json"}), 400)["message"]

    def test_a_body_beyond_the_limit_is_refused(self, alice: httpx.Client) -> None:
        sent = files() | {"audio": ("a.wav", bytes(2**21))}
        assert error(alice.post("", files=sent), 413)["code"] == "too_large"

    def test_the_same_key_gives_the_same_video(self, alice: httpx.Client, backend: Backend) -> None:
        headers = {"Idempotency-Key": "k"}
        form = {"size": "64x64"}
        first = alice.post("", data=form, files=files(), headers=headers).json()
        assert alice.post("", data=form, files=files(), headers=headers).json()["id"] == first["id"]
        assert [folder.name for folder in (backend.settings.home / "jobs").iterdir()] == [first["id"]]
        other = files() | {"audio": ("voice.wav", voice(0.9))}
        said = error(alice.post("", data=form, files=other, headers=headers), 409)
        assert said["code"] == "idempotency_conflict"
        other_key = {"Authorization": "Bearer bob"} | headers
        assert alice.post("", data=form, files=files(), headers=other_key).json()["id"] != first["id"]

    def test_a_full_queue_says_when_to_come_back(self, alice: httpx.Client, backend: Backend) -> None:
        for _ in range(3):
            create(alice)
        answer = alice.post("", data={"size": "64x64"}, files=files())
        assert "3 of your videos" in error(answer, 429)["message"]
        assert int(answer.headers["Retry-After"]) > 0
        bob = {"Authorization": "Bearer bob"}
        assert alice.post("", data={"size": "64x64"}, files=files(), headers=bob).status_code == 200
        assert "4 videos" in error(alice.post("", data={"size": "64x64"}, files=files(), headers=bob), 429)["message"]
        assert len(list((backend.settings.home / "jobs").iterdir())) == 4


class TestWatching:
    def test_a_failed_video_says_why(self, alice: httpx.Client, backend: Backend) -> None:
        video = create(alice)
        with backend.take() as claim:
            claim.fail(
                {"type": "server_error", "code": "out_of_memory", "message": "Full.", "param": None}, retry=False
            )
        failed = alice.get(f"/{video['id']}").json()
        assert (failed["status"], failed["error"]["code"]) == ("failed", "out_of_memory")
        assert "is failed" in error(alice.get(f"/{video['id']}/content"), 409)["message"]

    def test_progress_is_told(self, alice: httpx.Client, backend: Backend) -> None:
        video = create(alice)
        with backend.take() as claim:
            claim.report({"stage": "generating", "clip": 1, "clips": 2, "step": 3, "steps": 4, "percent": 37.5})
            backend.finish_clip(claim, 0)
            told = alice.get(f"/{video['id']}").json()
            assert (told["status"], told["stage"], told["progress"]) == ("in_progress", "generating", 37)
            assert (told["clip"], told["clips"], told["step"], told["steps"]) == (1, 2, 3, 4)
            assert told["queue_position"] is None
            claim.cancelled()

    def test_what_is_finished_can_be_seen_before_the_rest(self, alice: httpx.Client, backend: Backend) -> None:
        path = f"/{create(alice)['id']}/content"
        assert "no finished clip" in error(alice.get(path, params={"partial": True}), 409)["message"]
        assert error(alice.get(path, params={"variant": "thumbnail"}), 409)["code"] == "not_ready"
        with backend.take() as claim:
            for index in range(2):
                backend.finish_clip(claim, index)
                film = alice.get(path, params={"partial": True})
                assert film.headers["content-type"] == "video/mp4"
                assert frames(film.content) == FRAMES * (index + 1)
                assert "partial=true" in error(alice.get(path), 409)["message"]
            with av.open(io.BytesIO(film.content)) as container:
                assert container.streams.audio
            assert alice.get(path, params={"variant": "thumbnail"}).headers["content-type"] == "image/jpeg"
            claim.cancelled()
        assert frames(alice.get(path, params={"partial": True}).content) == 2 * FRAMES, "a cancelled one, too"

    def test_a_part_of_the_content_may_be_asked_for(self, alice: httpx.Client, backend: Backend) -> None:
        path = f"/{create(alice)['id']}/content"
        backend.make()
        whole = alice.get(path)
        part = alice.get(path, headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, whole.content[10:20])

    def test_events_tell_everything_up_to_the_end(self, alice: httpx.Client, backend: Backend) -> None:
        path = f"/{create(alice)['id']}/events"
        runner = threading.Timer(0.3, backend.make)
        runner.start()
        told = list(listen(alice, path))
        runner.join()
        kinds = [kind for _, kind, _ in told]
        assert kinds[0] == "progress"
        assert kinds.count("clip") == 2
        assert kinds[-1] == "completed"
        assert [data["clip"] for _, kind, data in told if kind == "clip"] == [1, 2]
        assert told[-1][2]["status"] == "completed"

        rest = list(listen(alice, path, {"Last-Event-ID": "1"}))
        assert [(kind, data.get("clip")) for _, kind, data in rest if kind == "clip"] == [("clip", 2)]
        assert rest[-1][1] == "completed"
        for nonsense in ("-1", "x" * 99, "²"):
            assert list(listen(alice, path, {"Last-Event-ID": nonsense.encode()}))[-1][1] == "completed"


def listen(client: httpx.Client, path: str, headers: Any = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(id, kind, data) of each event."""
    with client.stream("GET", path, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "event" in fields:
                yield fields["id"], fields["event"], json.loads(fields["data"])
                fields = {}


class TestEnding:
    def test_a_waiting_video_is_cancelled_at_once(self, alice: httpx.Client) -> None:
        video = create(alice)
        assert alice.post(f"/{video['id']}/cancel").json()["status"] == "cancelled"
        assert alice.post(f"/{video['id']}/cancel").json()["status"] == "cancelled", "or again"

    def test_only_a_finished_video_can_be_deleted(self, alice: httpx.Client, backend: Backend) -> None:
        video = create(alice)
        assert error(alice.delete(f"/{video['id']}"), 409)["code"] == "not_finished"
        alice.post(f"/{video['id']}/cancel")
        assert alice.delete(f"/{video['id']}").json() == {"id": video["id"], "object": "video.deleted", "deleted": True}
        assert error(alice.get(f"/{video['id']}"), 404)["code"] == "not_found"


class TestWhoseItIs:
    def test_nobody_comes_in_without_a_key(self, url: str) -> None:
        for headers in ({}, {"Authorization": "Bearer eve"}, {"Authorization": "alice"}, {"X-API-Key": ""}):
            answer = httpx.get(url, headers=headers)
            assert error(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert httpx.get(url.replace("/v1/videos", "/ping")).status_code == 200
        assert httpx.get(url, headers={"X-API-Key": "bob"}).status_code == 200

    def test_others_videos_are_not_there(self, alice: httpx.Client, backend: Backend) -> None:
        video = create(alice)
        backend.make()
        bob = {"Authorization": "Bearer bob"}
        path = f"/{video['id']}"
        for method, where in (
            ("GET", path),
            ("GET", f"{path}/content"),
            ("GET", f"{path}/events"),
            ("POST", f"{path}/cancel"),
            ("DELETE", path),
            ("GET", f"?after={video['id']}"),
        ):
            assert error(alice.request(method, where, headers=bob), 404)["code"] == "not_found"
        assert alice.get("", headers=bob).json()["data"] == []
        assert alice.get(path).status_code == 200


class TestOpenAPI:
    def test_it_says_what_can_be_sent_and_what_comes_back(self, url: str) -> None:
        about = httpx.get(url.replace("/v1/videos", "/openapi.json"), headers={"X-API-Key": "bob"}).json()
        assert set(about["paths"]) >= {"/v1/videos", "/v1/videos/{video_id}", "/v1/videos/{video_id}/content"}
        body = about["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
        assert set(body) == {"application/json", "multipart/form-data"}
        for form in body.values():
            assert {"prompt", "size", "speakers", "audio_2", "webhook_url"} <= set(form["schema"]["properties"])
        assert "$ref" not in json.dumps(body)

    @pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=up"])
    def test_wrong_queries_are_refused_in_the_same_shape(self, alice: httpx.Client, query: str) -> None:
        assert error(alice.get(f"?{query}"), 422)["param"] == query.partition("=")[0]


def test_a_full_disk_is_told_and_leaves_nothing_behind(
    backend: Backend, alice: httpx.Client, full_disk: SmallDisk
) -> None:
    refused = alice.post("", data={"size": "64x64"}, files=files())
    assert refused.status_code == 503, refused.text
    assert refused.headers["Retry-After"]
    assert refused.json()["error"]["code"] == "unavailable"
    assert "disk is full" in refused.json()["error"]["message"]
    assert list((full_disk.folder / "jobs").iterdir()) == []
    full_disk.make_room()
    assert create(alice)["status"] == "queued"
