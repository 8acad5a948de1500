"""The queue worker in RunPod's own loop, against its job API on loopback; runner, database and media are real."""

import base64
import io
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
import soundfile

from avatar_api import runpod_worker
from avatar_api.inputs import Planned
from avatar_api.jobs import JobSettings, JobStore
from avatar_api.runpod_worker import RUN_BYTES, RUNSYNC_BYTES, check_fits, local_id
from avatar_api.settings import ServiceSettings
from avatar_api.shutdown import Shutdown
from avatar_api.storage import open_storage
from avatar_api.worker import GPU_FAILED, run, work
from infinitetalk.errors import InputError
from tests.buckets import S3Server, s3_fixture, s3_server_fixture
from tests.conftest import REPOSITORY
from tests.runpod_queue import Asked, JobApi, Worker, data_uri
from tests.stand_in import FRAMES, StandIn
from tests.waiting import PATIENCE, eventually

__all__ = ["s3_fixture", "s3_server_fixture"]

PICTURE = REPOSITORY / "examples" / "portrait.png"
CLIPS = 3


def voice(clips: int = CLIPS) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(clips).normal(0, 0.1, (clips * FRAMES - 3) * 640)
    soundfile.write(file, noise, 16000, format="WAV")
    return file.getvalue()


def wanted(clips: int = CLIPS, **values: Any) -> dict[str, Any]:
    files = {"input_reference": data_uri(PICTURE.read_bytes()), "audio": data_uri(voice(clips))}
    return {"prompt": "A woman talks.", "size": "64x64", "steps": 2, **files, **values}


class Runner:
    """What makes the videos, in a thread; the pipeline is a stand-in."""

    def __init__(self, settings: ServiceSettings, notes: Path) -> None:
        settings.home.mkdir(parents=True, exist_ok=True)
        self.store = JobStore(settings.database, JobSettings(beat=0.1, poll=0.05))
        self._storage, self._shutdown = open_storage(settings), Shutdown()
        self._pipeline: Any = StandIn(notes)
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        work(self.store, self._pipeline, self._storage, "runner", self._shutdown, lambda memory: self._pipeline)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._shutdown.ask(0)
        self._thread.join()


@contextmanager
def running(settings: ServiceSettings, notes: Path) -> Iterator[Runner]:
    runner = Runner(settings, notes)
    runner.start()
    yield runner
    runner.stop()


@pytest.fixture(scope="module")
def api() -> Iterator[JobApi]:
    served = JobApi()
    yield served
    served.shutdown()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ServiceSettings:
    return ServiceSettings(home=tmp_path_factory.mktemp("queue") / "home")


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volume")
    shutil.copyfile(PICTURE, folder / "me.png")
    (folder / "secret").symlink_to("/etc/passwd")
    return folder


@pytest.fixture(scope="module")
def worker(api: JobApi, settings: ServiceSettings, volume: Path, tmp_path_factory: Any) -> Iterator[Worker]:
    notes = tmp_path_factory.mktemp("notes") / "notes"
    with Worker(api, settings.home, volume) as process, running(settings, notes):
        yield process


@pytest.fixture(scope="module")
def finished(api: JobApi, worker: Worker) -> Asked:
    return api.answer("plain-u1", wanted(steps=200, stream=True))


def decoded(content: str) -> av.container.InputContainer:
    return av.open(io.BytesIO(base64.b64decode(content)), "r")


def test_a_job_is_answered_with_the_video_its_length_and_what_took_how_long(finished: Asked) -> None:
    output = finished.output
    with decoded(output["video_base64"]) as film:
        assert film.streams.video[0].frames == output["frames"] == CLIPS * FRAMES - 3
        assert film.streams.audio
    assert output["seconds"] == output["frames"] / 25
    assert {"waiting", "preparing", "generating", "encoding", "uploading", "total"} == set(output["timings"])
    assert output["timings"]["total"] >= output["timings"]["generating"] > 0
    assert finished.taken == 1


def test_its_progress_is_told_meanwhile(finished: Asked) -> None:
    assert len(finished.progress) >= 2
    assert [told["percent"] for told in finished.progress] == sorted(told["percent"] for told in finished.progress)
    last = finished.progress[-1]
    assert (last["clips"], last["steps"]) == (CLIPS, 200)
    assert last["clip"] <= CLIPS
    assert last["eta_seconds"] > 0


def test_finished_clips_are_streamed_before_the_end(finished: Asked) -> None:
    assert [piece["clip"] for piece in finished.streamed] == [1, 2]
    assert all((piece["part"], piece["parts"]) == (1, 1) for piece in finished.streamed)
    for piece in finished.streamed:
        with decoded(piece["video_base64"]) as film:
            assert film.streams.video[0].frames == piece["frames"]


def test_pings_say_which_job_is_in_the_making_and_every_question_carries_the_key(api: JobApi, finished: Asked) -> None:
    assert any(ping.get("job_id") == [finished.id] for ping in api.pings)
    assert api.unauthorized == 0


def test_a_file_can_lie_on_the_network_volume(api: JobApi, worker: Worker, volume: Path) -> None:
    job = api.answer("volume-u1", wanted(1, input_reference=str(volume / "me.png")))
    assert job.output["frames"] == FRAMES - 3


@pytest.mark.parametrize("path", ["/etc/passwd", "{}/../passwd", "{}/secret", "{}", "{}/gone.png", "{}\0", "/" * 5000])
def test_but_nowhere_else_on_the_worker(api: JobApi, worker: Worker, volume: Path, path: str) -> None:
    job = api.answer(f"path-{time.monotonic_ns()}", wanted(1, input_reference=path.format(volume)))
    assert (job.error["param"], job.error["code"]) == ("input_reference", "not_found")
    assert "network volume" in job.error["message"]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (None, "input"),
        ("a prompt", "input"),
        ({}, "input_reference"),
        (wanted(1, size="3x3"), "size"),
        (wanted(1, steps="many"), "steps"),
        (wanted(1, audio=17), "audio"),
        (wanted(1, audio="data:,no%20sound"), "audio"),
        (wanted(1, stream="yes"), "stream"),
        (wanted(1, frames=3), "frames"),
    ],
)
def test_what_cannot_be_used_is_answered_at_once_by_name(api: JobApi, worker: Worker, given: Any, param: str) -> None:
    job = api.answer(f"bad-{time.monotonic_ns()}", given)
    assert job.error["type"] == "invalid_request_error"
    assert job.error["param"] == param
    assert "Traceback" not in job.answers[0]["error"]


def test_a_job_that_is_stopped_stops_within_a_step(api: JobApi, worker: Worker, settings: ServiceSettings) -> None:
    job = api.ask("stopped-u1", wanted(CLIPS, steps=200))
    store = JobStore(settings.database)
    eventually(lambda: any("step" in told for told in job.progress), seconds=PATIENCE)
    api.stop(job.id)
    eventually(lambda: store.get(local_id(job.id)).state == "cancelled", seconds=PATIENCE)
    assert api.answer("after-u1", wanted(1)).output["frames"], "the worker goes on"
    assert job.answers == [], "RunPod knows"
    api.retry()  # somebody asks RunPod to try it again
    eventually(lambda: job.answers, seconds=PATIENCE)
    assert job.output["frames"] == CLIPS * FRAMES - 3


def test_a_video_that_cannot_fit_into_an_answer_is_refused_before_it_is_made(
    api: JobApi, worker: Worker, settings: ServiceSettings
) -> None:
    long = io.BytesIO()
    soundfile.write(long, np.random.default_rng(0).normal(0, 0.1, 16000 * 150).astype(np.int16), 16000, format="WAV")
    job = api.answer("long-u1", wanted(audio=data_uri(long.getvalue()), size="1280x720"))
    assert job.error["code"] == "result_too_large"
    assert "AVATAR_S3_BUCKET" in job.error["message"]
    assert "max_seconds" in job.error["message"]
    assert not settings.job_folder(local_id(job.id)).exists()
    assert local_id(job.id) not in [made.id for made in JobStore(settings.database).all()]


def test_what_fits_is_decided_by_length_size_and_the_kind_of_request() -> None:
    check_fits(Planned(100, 480, 832), RUN_BYTES)
    with pytest.raises(InputError, match=r"does not fit into an answer of 10 MB.*/runsync"):
        check_fits(Planned(200, 480, 832), RUN_BYTES)
    check_fits(Planned(200, 480, 832), RUNSYNC_BYTES)
    with pytest.raises(InputError, match="send at most 68 s"):
        check_fits(Planned(3600, 720, 1280), RUN_BYTES)


def test_a_video_that_is_too_large_is_made_smaller(tmp_path: Path) -> None:
    settings = ServiceSettings(home=tmp_path / "home")
    with running(settings, tmp_path / "notes") as runner:
        backend = runpod_worker._Backend(settings, runner.store, open_storage(settings))
        queue = runpod_worker.QueueWorker(backend, tmp_path, lambda: None)
        queue._take("video_large", wanted(2, size="640x640"), RUN_BYTES)
        eventually(lambda: runner.store.get("video_large").state == "completed", seconds=PATIENCE)
        job = runner.store.get("video_large")
        whole, answer = queue._output(job, RUNSYNC_BYTES), queue._output(job, 300_000)
    assert len(whole["video_base64"]) > 500_000 > 300_000 > len(json.dumps(answer)) > 150_000
    with decoded(answer["video_base64"]) as film:
        assert film.streams.video[0].frames == answer["frames"] == 2 * FRAMES - 3
        assert film.streams.audio[0].duration is not None


def test_sigterm_lets_the_job_in_the_making_be_finished(tmp_path: Path) -> None:
    api = JobApi()
    settings = ServiceSettings(home=tmp_path / "home")
    with Worker(api, settings.home) as worker, running(settings, tmp_path / "notes"):
        job = api.ask("drained-u1", wanted(steps=100))
        eventually(lambda: job.progress, seconds=PATIENCE)
        later = api.ask("later-u1", wanted(1))
        assert worker.drain() == 0
        assert job.output["frames"]
        assert later.taken == 0


def test_after_the_gpu_failed_a_fresh_worker_is_asked_for_and_no_job_taken(tmp_path: Path) -> None:
    api = JobApi()
    settings = ServiceSettings(home=tmp_path / "home")
    settings.home.mkdir()
    store = JobStore(settings.database, JobSettings(beat=0.1))
    with Worker(api, settings.home) as worker:
        job = api.ask("poisoned-u1", wanted())
        claim = eventually(lambda: store.claim("runner"), seconds=PATIENCE)
        with claim:
            claim.fail(GPU_FAILED, retry=False)
        assert worker.process.wait(PATIENCE) == 0
    assert job.error["code"] == "gpu_failed"
    assert job.answers[0]["stopPod"] is True


class TestAJobWhoseWorkerDied:
    """It goes on after its last finished clip: on another worker too, with a database of its own, from the files."""

    def _die_after_a_clip(self, settings: ServiceSettings, api: JobApi, job: Asked, notes: Path) -> None:
        settings.home.mkdir()
        store = JobStore(settings.database, JobSettings(beat=0.1))
        with Worker(api, settings.home, **_own(settings)) as worker:
            claim = eventually(lambda: store.claim("runner"), seconds=PATIENCE)

            class Dies(StandIn):
                def generate(self, *arguments: Any, **options: Any) -> Any:
                    clips = super().generate(*arguments, **options)
                    yield next(clips)
                    raise KeyboardInterrupt

            pipeline: Any = Dies(notes)
            with claim, pytest.raises(KeyboardInterrupt):
                run(claim, pipeline, open_storage(settings), Shutdown())
            worker.kill()
        assert api.lost() == [job.id]

    def test_and_the_files_lie_on_a_volume(self, finished: Asked, tmp_path: Path) -> None:
        api = JobApi()
        job, notes = api.ask("volume-died-u1", wanted()), tmp_path / "died"
        one, other = (
            ServiceSettings(home=tmp_path / "volume", database_url=f"sqlite:///{tmp_path / name}.db")
            for name in ("one", "other")
        )
        self._die_after_a_clip(one, api, job, notes)
        notes.unlink()
        with Worker(api, other.home, **_own(other)), running(other, notes):
            eventually(lambda: job.answers, seconds=PATIENCE)
        assert [line.split()[-2] for line in notes.read_text().splitlines()] == ["1", "2"], "the clips that were begun"
        assert job.output["video_base64"] == finished.output["video_base64"], "to the byte"

    def test_or_in_a_bucket(self, finished: Asked, s3: S3Server, tmp_path: Path) -> None:
        api, right = JobApi(), base64.b64decode(finished.output["video_base64"])
        bucket = f"queue-{time.time_ns()}"
        s3.client.create_bucket(Bucket=bucket)
        job, notes = api.ask("bucket-died-u1", wanted()), tmp_path / "died"
        one, other = (
            ServiceSettings(home=tmp_path / name, s3_bucket=bucket, s3_endpoint_url=s3.url) for name in ("one", "other")
        )
        self._die_after_a_clip(one, api, job, notes)
        notes.unlink()
        with Worker(api, other.home, **_own(other)), running(other, notes):
            eventually(lambda: job.answers, seconds=PATIENCE)
        assert [line.split()[-2] for line in notes.read_text().splitlines()] == ["1", "2"], "the clips that were begun"
        assert httpx.get(job.output["video_url"]).content == right, "to the byte, by the link"


def _own(settings: ServiceSettings) -> dict[str, Any]:
    names = ("database_url", "s3_bucket", "s3_endpoint_url")
    return {name: value for name in names if (value := getattr(settings, name)) is not None}
