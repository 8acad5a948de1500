"""What a runner waits for, what ends a job, and that nothing finished is lost meanwhile."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from avatar_api import worker
from avatar_api.inputs import lay_down
from avatar_api.jobs import Job, JobSettings, JobStore
from avatar_api.requests import VideoRequest
from avatar_api.settings import ServiceSettings
from avatar_api.shutdown import Shutdown
from avatar_api.storage import open_storage
from avatar_api.worker import load_fast_loras, run
from infinitetalk.errors import CheckpointError
from infinitetalk.lora import read_lora
from infinitetalk.pipeline import Clip, InfiniteTalkPipeline
from tests.buckets import S3Server, s3_fixture, s3_server_fixture
from tests.conftest import REPOSITORY, SmallDisk
from tests.stand_in import FRAMES, StandIn
from tests.waiting import eventually

__all__ = ["s3_fixture", "s3_server_fixture"]

CLIPS = 3


class Machine:
    """One runner, with a home and perhaps a bucket."""

    def __init__(self, home: Path, settings: JobSettings, **storage: Any) -> None:
        home.mkdir()
        self.settings = ServiceSettings(home=home, **storage)
        self.store = JobStore(self.settings.database, settings)
        self.storage = open_storage(self.settings)
        self.notes = home.parent / "notes"
        self.shutdown = Shutdown()

    def submit(self, job_id: str, **values: Any) -> Job:
        voice = self.settings.home.parent / "voice.wav"
        soundfile.write(voice, 0.1 * np.random.default_rng(0).standard_normal(16000 * FRAMES * CLIPS // 25), 16000)
        portrait = REPOSITORY / "examples" / "portrait.png"
        files = {"image": partial(shutil.copyfile, portrait), "audio": partial(shutil.copyfile, voice)}
        request = VideoRequest(prompt=job_id, size="128x128", steps=2, **values)
        spec = lay_down(request, files, self.storage.folder(job_id), 60, "image")
        self.storage.publish(job_id, *spec["files"])
        return self.store.submit(spec, job_id=job_id)

    def run(self, pipeline: Any = None) -> None:
        claim = self.store.claim("runner")
        assert claim is not None
        with claim:
            stand_in: Any = pipeline or StandIn(self.notes)
            assert run(claim, stand_in, self.storage, self.shutdown)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Meanwhile."""
        thread = threading.Thread(target=self.run, daemon=True)
        thread.start()
        yield
        thread.join(60)
        assert not thread.is_alive()

    def video(self, job_id: str) -> bytes:
        result = self.store.get(job_id).result
        assert result is not None
        return (self.storage.folder(job_id) / str(result["video"])).read_bytes()

    def clips_begun(self, job_id: str) -> list[int]:
        lines = self.notes.read_text().splitlines()
        return [int(line.split()[1]) for line in lines if line.split()[0] == job_id]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "OUTAGE_WAIT", 0.1)


def test_a_full_disk_is_waited_for(small_disk: SmallDisk, caplog: pytest.LogCaptureFixture) -> None:
    """The database lies on the same disk. Nothing that is finished runs again."""
    machine = Machine(small_disk.folder / "home", JobSettings(beat=0.1))
    machine.submit("undisturbed")
    machine.run()
    machine.submit("full")
    with machine.running():
        eventually(lambda: machine.store.clips("full"))
        small_disk.fill()
        eventually(lambda: "No space left" in caplog.text or "is full" in caplog.text)
        time.sleep(0.5)
        small_disk.make_room()
    job = machine.store.get("full")
    assert (job.state, job.attempts) == ("completed", 1)
    assert machine.clips_begun("full") == list(range(CLIPS))
    assert machine.video("full") == machine.video("undisturbed")


class TestFast:
    def test_a_job_that_came_from_a_server_with_a_lora_is_refused_by_a_runner_without(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path / "home", JobSettings())
        machine.submit("one", quality="fast")
        machine.run()
        job = machine.store.get("one")
        assert (job.state, job.attempts) == ("failed", 1)
        assert job.error is not None
        assert (job.error["param"], "AVATAR_FAST_LORA" in job.error["message"]) == ("quality", True)

    def test_a_lora_for_another_model_is_refused_before_the_first_job(
        self, pipeline: InfiniteTalkPipeline, tiny_lora: Path, tmp_path: Path
    ) -> None:
        tensors = load_file(tiny_lora)
        tensors["diffusion_model.blocks.1.norm3.diff"] = torch.zeros(65)
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match="was the LoRA made for another model"):
            load_fast_loras(pipeline, ServiceSettings(home=tmp_path, fast_lora=tmp_path / "other.safetensors"))
        with pytest.raises(CheckpointError, match=r"none\.safetensors is missing"):
            load_fast_loras(pipeline, ServiceSettings(home=tmp_path, fast_lora=tmp_path / "none.safetensors"))
        ((_, scale),) = load_fast_loras(pipeline, ServiceSettings(home=tmp_path, fast_lora=tiny_lora))
        assert scale == 1

    def test_all_its_forwards_are_computed_where_the_lora_is(
        self, pipeline: InfiniteTalkPipeline, tiny_lora: Path
    ) -> None:
        usual = pipeline.ranks
        loras = [(read_lora(tiny_lora), 1.0)]
        with pytest.raises(KeyboardInterrupt), pipeline.with_loras(loras):
            assert pipeline.ranks is not usual
            assert pipeline.ranks.size == 1
            raise KeyboardInterrupt
        assert pipeline.ranks is usual


class TestABucketThatIsAway:
    @pytest.fixture
    def settings(self, s3: S3Server, tmp_path: Path) -> dict[str, Any]:
        name = f"away-{abs(hash(tmp_path)):x}"
        s3.client.create_bucket(Bucket=name)
        return {"s3_bucket": name, "s3_endpoint_url": s3.url}

    def test_is_waited_for(
        self, s3: S3Server, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine = Machine(tmp_path / "home", JobSettings(), **settings)
        machine.submit("one")
        s3.set(busy=10_000)
        with machine.running():
            eventually(lambda: "waits" in caplog.text)
            s3.set(busy=0)
        assert machine.store.get("one").state == "completed"
        assert machine.clips_begun("one") == list(range(CLIPS))

    def test_ends_the_attempt_after_the_time_that_an_outage_may_last(
        self, s3: S3Server, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        machine = Machine(tmp_path / "home", JobSettings(outage=0.01), **settings)
        machine.submit("one")
        s3.set(busy=10_000)
        machine.run()
        job = machine.store.get("one")
        assert (job.state, job.attempts) == ("queued", 1)
        assert job.error is not None
        assert "StorageError" in job.error["message"]

    def test_does_not_keep_a_job_from_being_cancelled(
        self, s3: S3Server, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine = Machine(tmp_path / "home", JobSettings(), **settings)
        machine.submit("one")
        s3.set(busy=10_000)
        with machine.running():
            eventually(lambda: "waits" in caplog.text)
            machine.store.cancel("one")
        assert machine.store.get("one").state == "cancelled"

    def test_nor_the_runner_from_ending(
        self, s3: S3Server, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine = Machine(tmp_path / "home", JobSettings(), **settings)
        machine.submit("one")
        s3.set(busy=10_000)
        with machine.running():
            eventually(lambda: "waits" in caplog.text)
            machine.shutdown.ask(0)
        assert (machine.store.get("one").state, machine.store.get("one").attempts) == ("queued", 0)


def test_a_video_of_nan_fails_at_once(tmp_path: Path) -> None:
    class NotANumber(StandIn):
        def generate(self, *arguments: Any, **options: Any) -> Iterator[Clip]:
            yield next(super().generate(*arguments, **options))
            raise FloatingPointError("clip 2 of 3 came out as NaN.")

    machine = Machine(tmp_path / "home", JobSettings())
    machine.submit("one")
    machine.run(NotANumber())
    job = machine.store.get("one")
    assert (job.state, job.attempts, len(machine.store.clips("one"))) == ("failed", 1, 1)
    assert job.error is not None
    assert job.error["code"] == "not_a_number"
    assert "clip 2 of 3 came out as NaN" in job.error["message"]


def test_a_gpu_that_failed_ends_the_process_and_the_job_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poisoned(StandIn):
        def generate(self, *arguments: Any, **options: Any) -> Iterator[Clip]:
            yield next(super().generate(*arguments, **options))
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def ended(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", ended)
    machine = Machine(tmp_path / "home", JobSettings(backoff=0))
    machine.submit("one")
    with pytest.raises(SystemExit) as exit:
        machine.run(Poisoned())
    assert exit.value.code == worker.GPU_FAILED_EXIT
    job = machine.store.get("one")
    assert (job.state, job.error) == ("queued", worker.GPU_FAILED)
    machine.run()
    assert machine.store.get("one").state == "completed"
    assert machine.clips_begun("one") == [1, 2], "the first clip was finished"
