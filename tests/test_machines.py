"""Several machines: folders that do not know each other, one database, one bucket. Any of them may go up in smoke."""

import multiprocessing
import shutil
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from avatar_api.inputs import lay_down
from avatar_api.jobs import JobSettings, JobStore
from avatar_api.requests import VideoRequest
from avatar_api.settings import ServiceSettings
from avatar_api.shutdown import Shutdown
from avatar_api.storage import Storage, open_storage
from avatar_api.worker import load, run, work
from infinitetalk.pipeline import InfiniteTalkPipeline
from tests.buckets import S3Server, s3_fixture, s3_server_fixture
from tests.conftest import REPOSITORY
from tests.waiting import eventually

__all__ = ["s3_fixture", "s3_server_fixture"]

QUICK = JobSettings(lease=3, beat=0.2, poll=0.1)


def serve(settings: ServiceSettings, snapshots: Path) -> None:
    """A machine with a GPU: the runner's process."""
    wan, infinitetalk = snapshots / "Wan2.1-I2V-14B-480P", snapshots / "InfiniteTalk"
    load_models = partial(load, wan, infinitetalk, snapshots / "chinese-wav2vec2-base", settings)
    store, storage = JobStore(settings.database, QUICK), open_storage(settings)
    work(store, load_models(None), storage, settings.home.name, Shutdown(), load_models)


def submit(store: JobStore, storage: Storage, job_id: str, voice: Path) -> None:
    """As an API replica does it."""
    files = {
        "input_reference": partial(shutil.copyfile, REPOSITORY / "examples" / "portrait.png"),
        "audio": partial(shutil.copyfile, voice),
    }
    request = VideoRequest(size="64x64", steps=1, text_guidance=1)
    spec = lay_down(request, files, storage.folder(job_id), 60, "input_reference")
    storage.publish(job_id, *spec["files"])
    store.submit(spec, job_id=job_id)


def finish(store: JobStore, pipeline: InfiniteTalkPipeline, storage: Storage, runner: str) -> str:
    """Take the job that is there, as soon as it may be taken, and finish it. Returns the video's name."""
    with eventually(lambda: store.claim(runner), "nobody may take the job") as claim:
        run(claim, pipeline, storage, Shutdown())
        result = store.get(claim.job.id).result
    assert result is not None
    return str(result["video"])


def test_a_video_begun_on_a_machine_that_dies_is_finished_on_another(
    pipeline: InfiniteTalkPipeline, snapshots: Path, s3: S3Server, tmp_path: Path
) -> None:
    bucket = f"videos-{time.time_ns()}"
    s3.client.create_bucket(Bucket=bucket)
    url = f"sqlite:///{tmp_path / 'jobs.db'}"

    def machine(name: str) -> ServiceSettings:
        return ServiceSettings(
            home=tmp_path / name, database_url=url, device="cpu", s3_bucket=bucket, s3_endpoint_url=s3.url
        )

    voice = tmp_path / "voice.wav"
    soundfile.write(voice, np.random.default_rng(0).standard_normal(100 * 640) * 0.1, 16000)  # two clips

    with closing(JobStore(url, QUICK)) as store:
        submit(store, open_storage(machine("api 1")), "video_a", voice)
        first = multiprocessing.get_context("spawn").Process(target=serve, args=(machine("gpu 1"), snapshots))
        first.start()
        eventually(lambda: store.clips("video_a") or not first.is_alive(), seconds=180)
        assert first.is_alive()
        first.kill()
        first.join()
        for lost in ("api 1", "gpu 1"):
            shutil.rmtree(tmp_path / lost)

        second = open_storage(machine("gpu 2"))
        name = finish(store, pipeline, second, "gpu 2")
        assert [clip.result["segment"].split(".")[1] for clip in store.clips("video_a")] == ["1", "2"], "the epochs"

        third = open_storage(machine("api 2"))
        third.obtain("video_a", name)
        video = (third.folder("video_a") / name).read_bytes()
        assert third.link("video_a", name, "video.mp4") is not None

        alone = open_storage(ServiceSettings(home=tmp_path / "alone"))
        submit(store, alone, "video_b", voice)
        undisturbed = (alone.folder("video_b") / finish(store, pipeline, alone, "alone")).read_bytes()
    assert video == undisturbed, "to the byte"
