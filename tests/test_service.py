"""`bentoml serve` as its users meet it: real server, real HTTP, real clients, and processes that are killed."""

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import bentoml
import grpc
import httpx
import numpy as np
import openai
import pytest
import soundfile
from google.protobuf.wrappers_pb2 import StringValue

from avatar_api.jobs import FINISHED, Job
from avatar_api.protos import avatar_pb2 as pb
from avatar_api.protos import bento_service_pb2 as bento
from avatar_api.protos.avatar_pb2_grpc import AvatarServiceStub
from avatar_api.protos.bento_service_pb2_grpc import BentoServiceStub
from avatar_api.video_writer import VideoWriter
from tests.conftest import REPOSITORY
from tests.served import Served, free_port
from tests.waiting import eventually

PICTURE = REPOSITORY / "examples" / "portrait.png"
CLIPS = 3
KILLS = int(os.environ.get("AVATAR_TEST_KILLS", "2"))  # of each service, spread over the three clips
LONG = {"size": "64x64", "steps": "2", "prompt": "A woman talks."}


def generate(served: Served, voice: Path, **values: str) -> httpx.Response:
    files = {"image": PICTURE.open("rb"), "audio": voice.open("rb")}
    return httpx.post(f"{served.url}/generate", files=files, data=values, timeout=300)


def newest(served: Served) -> Job:
    return served.store.page(limit=1)[0]


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(
    bento_home: Path, tiny_lora: Path, grpc_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("avatar")
    with Served(home, bento_home=bento_home, grpc_port=grpc_port, fast_lora=tiny_lora) as running:
        yield running


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough for three clips: 81 + 72 + 72 frames, less a few."""
    path = tmp_path_factory.mktemp("voice") / "voice.wav"
    noise = np.random.default_rng(0).standard_normal(220 * 640) * 0.1
    soundfile.write(path, noise, 16000)
    return path


@pytest.fixture(scope="module")
def short_voice(voice: Path) -> Path:
    path = voice.with_name("short.wav")
    soundfile.write(path, soundfile.read(voice)[0][: 10 * 640], 16000)
    return path


@pytest.fixture(scope="module")
def undisturbed(server: Served, voice: Path) -> bytes:
    """The three-clip video as it comes when nothing happens to it."""
    answer = generate(server, voice, **LONG)
    assert answer.status_code == 200, answer.text
    assert len(server.store.clips(newest(server).id)) == CLIPS
    return answer.content


def test_a_video_comes_back_with_picture_and_sound(undisturbed: bytes, tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(undisturbed)
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 220
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert container.streams.audio[0].codec_context.name == "aac"
        assert container.duration is not None
        assert abs(container.duration / 1e6 - 220 / 25) < 0.05


def test_the_stock_client_gets_the_same_video_from_the_same_request(
    server: Served, voice: Path, undisturbed: bytes
) -> None:
    with bentoml.SyncHTTPClient(server.url, timeout=300) as client:
        path = client.generate(image=PICTURE, audio=voice, prompt=LONG["prompt"], size="64x64", steps=2)
        assert Path(path).read_bytes() == undisturbed


def test_a_fast_video_takes_four_steps_and_other_weights_and_the_next_exact_one_the_usual(
    server: Served, voice: Path, short_voice: Path, undisturbed: bytes
) -> None:
    fast = generate(server, short_voice, quality="fast", prompt=LONG["prompt"], size="64x64")
    asked = newest(server).spec["request"]
    assert (asked["quality"], asked["steps"], asked["text_guidance"], asked["shift"]) == ("fast", 4, 1, 2)
    the_same = {"steps": "4", "text_guidance": "1", "audio_guidance": "2", "shift": "2"}
    exact = generate(server, short_voice, **LONG | the_same)
    assert (fast.status_code, exact.status_code) == (200, 200), fast.text + exact.text
    assert fast.content != exact.content
    assert generate(server, voice, **LONG).content == undisturbed


def test_two_people_talk_one_after_the_other(server: Served, short_voice: Path, tmp_path: Path) -> None:
    speakers = {"boxes": [[0, 0, 0.5, 1], [0.5, 0, 1, 1]], "order": "in_turn"}
    files = {"image": PICTURE.open("rb"), "audio": short_voice.open("rb"), "audio_2": short_voice.open("rb")}
    form = {"size": "64x64", "steps": "1", "speakers": json.dumps(speakers)}
    answer = httpx.post(f"{server.url}/generate", files=files, data=form, timeout=300)
    assert answer.status_code == 200, answer.text
    (tmp_path / "video.mp4").write_bytes(answer.content)
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 20


def test_a_video_is_dubbed_with_its_own_sound(server: Served, short_voice: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    with VideoWriter(film, 96, 64, short_voice) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (8, 64, 96, 3), dtype=np.uint8))
    with bentoml.SyncHTTPClient(server.url, timeout=300) as client:
        path = client.generate(image=film, size="64x64", steps=1, scene_cuts=True)
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 8


def test_the_openai_client_makes_a_video_with_a_thumbnail(server: Served, short_voice: Path, tmp_path: Path) -> None:
    voice = "data:audio/wav;base64," + base64.b64encode(short_voice.read_bytes()).decode()
    with openai.OpenAI(api_key="none", base_url=f"{server.url}/v1") as client:
        video = client.videos.create_and_poll(
            prompt="A woman talks.",
            input_reference=PICTURE,
            extra_body={"audio": voice, "size": "64x64", "steps": 2},
            poll_interval_ms=200,
        )
        assert (video.status, video.progress, video.seconds) == ("completed", 100, "0.4")
        (tmp_path / "video.mp4").write_bytes(client.videos.download_content(video.id).read())
        assert client.videos.download_content(video.id, variant="thumbnail").read()[:2] == b"\xff\xd8"
        assert video.id in [listed.id for listed in client.videos.list(limit=5)]
        assert client.videos.delete(video.id).deleted
    assert not (server.home / "jobs" / video.id).exists()
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 10


def test_the_same_video_comes_over_grpc(server: Served, grpc_port: int, short_voice: Path) -> None:
    over_http = generate(server, short_voice, size="64x64", steps="1")
    files = {"image": PICTURE.read_bytes(), "audio": short_voice.read_bytes()}
    fields = {name: bento.Part(file=bento.File(content=content)) for name, content in files.items()}
    fields |= {name: bento.Part(text=StringValue(value=text)) for name, text in (("size", "64x64"), ("steps", "1"))}
    request = bento.Request(api_name="generate", multipart=bento.Multipart(fields=fields))
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        answer = BentoServiceStub(channel).Call(request, timeout=300)
        newest = AvatarServiceStub(channel).ListVideos(pb.ListVideosRequest(limit=1)).videos[0]
    assert answer.file.content == over_http.content
    assert httpx.get(f"{server.url}/v1/videos/{newest.id}").json()["status"] == "completed", "they are the same jobs"


def test_every_parameter_of_generate_is_described_where_callers_look(server: Served) -> None:
    described = httpx.get(f"{server.url}/docs.json").json()["components"]["schemas"]["generate__Input"]["properties"]
    assert len(described) == 15
    assert all(len(parameter["description"]) > 10 for parameter in described.values())
    assert (described["steps"]["minimum"], described["steps"]["maximum"]) == (1, 200)
    assert described["quality"]["enum"] == ["exact", "balanced", "fast"]


@pytest.mark.parametrize("path", ["/ping", "/livez", "/readyz", "/metrics"])
def test_health_and_metrics_answer_at_once(server: Served, path: str) -> None:
    assert httpx.get(server.url + path, timeout=5).status_code == 200


@pytest.mark.parametrize(
    ("values", "status", "param", "message"),
    [
        ({"size": "3x3"}, 400, "size", "multiples of 16"),
        ({"size": "64"}, 400, "size", "use '480p'"),
        ({"steps": "many"}, 400, "steps", "valid integer"),
        ({"steps": "0"}, 400, "steps", "greater than or equal to 1"),
        ({"seed": "-1"}, 400, "seed", "greater than or equal to 0"),
        ({"prompt": "a" * 2_000_000}, 400, "prompt", "at most 4000"),
        ({"audio_guidance": "NaN"}, 400, "audio_guidance", "finite"),
        ({"speakers": "[0, 1"}, 400, "speakers", "is not JSON"),
        ({"speakers": '{"boxes": [[0, 0, 1, 1], [0, 0, 1, 1]]}'}, 400, "speakers", "lies wholly within"),
    ],
)
def test_a_wrong_value_is_refused_in_one_shape(
    server: Served, short_voice: Path, values: dict[str, str], status: int, param: str, message: str
) -> None:
    answer = generate(server, short_voice, **values)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"type", "code", "message", "param"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"type", "code", "message", "param"}
    assert "Traceback" not in answer.text
    return error


def test_wrong_files_are_refused_in_one_shape_and_leave_nothing(server: Served) -> None:
    folders = set((server.home / "jobs").iterdir())
    url, text = f"{server.url}/generate", b"just text"
    picture = PICTURE.read_bytes()
    error = error_of(httpx.post(url, files={"image": ("a.png", text), "audio": ("b.wav", text)}), 400)
    assert (error["param"], "looks like text" in error["message"]) == ("image", True)
    error = error_of(httpx.post(url, files={"image": ("a.png", picture), "audio": ("b.wav", text)}), 400)
    assert error["param"] == "audio"
    error = error_of(httpx.post(url, files={"image": ("a.png", picture[:5000]), "audio": ("b.wav", text)}), 400)
    assert error["code"] == "damaged_file"
    error = error_of(httpx.post(url, files={"image": ("a.png", picture)}), 400)
    assert (error["code"], error["param"]) == ("missing", "audio")
    error = error_of(httpx.post(url, data={"image": f"{server.url}/livez", "audio": "b"}), 400)
    assert "send the file itself" in error["message"]
    assert set((server.home / "jobs").iterdir()) == folders


def test_malformed_requests_are_refused_in_one_shape_and_leave_no_traceback(server: Served) -> None:
    error_of(
        httpx.post(f"{server.url}/generate", content=b'{"image":', headers={"content-type": "application/json"}), 400
    )
    error_of(httpx.post(f"{server.url}/generate", json={"image": "x"}), 400)
    error_of(httpx.post(f"{server.url}/generate"), 400)
    error_of(httpx.get(f"{server.url}/generate"), 405)
    error_of(httpx.get(f"{server.url}/nothing/here"), 404)
    wrong = httpx.post(f"{server.url}/generate", files={"image": PICTURE.open("rb")}, data={"steps": "my password"})
    assert "steps" in error_of(wrong, 400)["message"]
    log = server.log
    assert "Traceback" not in log
    assert "my password" not in log


def test_no_url_is_fetched_on_a_callers_behalf(server: Served, short_voice: Path) -> None:
    asked: list[bytes] = []

    def listen(listener: Any) -> None:
        connection, _ = listener.accept()
        asked.append(connection.recv(1000))
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=listen, args=(listener,), daemon=True).start()
        secret = f"http://127.0.0.1:{listener.getsockname()[1]}/secret.png"
        form = [("image", (None, secret)), ("audio", ("a.wav", short_voice.read_bytes()))]
        error = error_of(httpx.post(f"{server.url}/generate", files=form), 400)  # type: ignore[arg-type]
        time.sleep(0.5)
    assert "send the file itself" in error["message"]
    assert not asked


def test_a_caller_that_goes_away_cancels_its_video(server: Served, voice: Path) -> None:
    with pytest.raises(httpx.ReadTimeout):
        files = {"image": PICTURE.open("rb"), "audio": voice.open("rb")}
        httpx.post(f"{server.url}/generate", files=files, data={"size": "64x64", "steps": "100"}, timeout=4)
    eventually(lambda: newest(server).state == "cancelled", seconds=20)
    assert "Traceback" not in server.log


def start_and_wait_for_progress(server: Served, voice: Path, percent: float) -> str:
    """Submit the three-clip job from a thread of its own and wait until it is so far."""
    before = {job.id for job in server.store.page(limit=100)}

    def call() -> None:
        with contextlib.suppress(httpx.TransportError):  # its server is killed
            generate(server, voice, **LONG)

    threading.Thread(target=call, daemon=True).start()
    started = eventually(lambda: [job.id for job in server.store.page(limit=100) if job.id not in before], seconds=120)[
        0
    ]
    eventually(lambda: (server.store.get(started).progress or {}).get("percent", 0) >= percent, seconds=120)
    return started


@pytest.mark.parametrize("percent", [round(100 * (kill + 0.5) / KILLS) for kill in range(KILLS)])
@pytest.mark.parametrize("service", ["avatar_runner", "avatar_api"])
def test_the_video_is_right_although_a_process_was_killed(
    server: Served, voice: Path, undisturbed: bytes, service: str, percent: float
) -> None:
    job_id = start_and_wait_for_progress(server, voice, percent)
    server.kill(service)
    eventually(lambda: server.store.get(job_id).state in FINISHED, seconds=180)
    job = server.store.get(job_id)
    assert job.state == "completed", job.error
    assert job.result is not None
    assert (server.home / "jobs" / job_id / job.result["video"]).read_bytes() == undisturbed
    pieces = "the pieces go once they are joined"
    eventually(lambda: not list((server.home / "jobs" / job_id).glob("clip-*")), pieces)
    server.wait_until_ready()


def test_a_missing_model_is_named_with_the_command_that_imports_it(tmp_path: Path) -> None:
    server = Served(tmp_path, bento_home=tmp_path)
    assert server.run(60) != 0
    assert "import it: python models/import_models.py --only " in " ".join(server.log.split())
    assert "Traceback" not in server.log


def test_the_bento_builds_with_what_serving_needs_and_nothing_else(bento_home: Path) -> None:
    environment = {**os.environ, "BENTOML_HOME": str(bento_home), "BENTOML_DO_NOT_TRACK": "1"}
    command = [sys.executable, "-m", "bentoml", "build", "--output", "tag"]
    build = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    tag = build.stdout.strip().rpartition("__tag__:")[2]
    source = bento_home / "bentos" / tag.replace(":", "/") / "src"
    assert {path.name for path in source.iterdir()} == {
        *("service.py", "avatar_api", "container", "infinitetalk", "models", "scripts", "examples"),
        *("bentofile.yaml", "configuration.yaml", "pyproject.toml", "README.md", "LICENSE"),
    }
    manifest = (source.parent / "bento.yaml").read_text()
    for model in ("wan2.1-i2v-14b-480p", "infinitetalk", "chinese-wav2vec2-base"):
        assert model in manifest
