"""What is deleted, when, and what never is."""

import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from avatar_api.housekeeping import ORPHAN_SECONDS, Housekeeper
from avatar_api.jobs import Job, JobStore
from avatar_api.settings import ServiceSettings
from avatar_api.storage import Storage, open_storage
from tests.buckets import S3Server, s3_fixture, s3_server_fixture

__all__ = ["s3_fixture", "s3_server_fixture"]

KILOBYTE = 1000


class House:
    def __init__(self, home: Path, store: JobStore) -> None:
        self.home, self.store = home, store
        self.storage = Storage(ServiceSettings(home=home))

    def clean(self, **settings: float) -> None:
        wanted = ServiceSettings(home=self.home, **settings)  # type: ignore[arg-type]
        Housekeeper(self.store, self.storage, wanted).clean()

    def submit(self) -> Job:
        job = self.store.submit({})
        (self.storage.folder(job.id) / "input").write_bytes(bytes(KILOBYTE))
        return job

    def finish(self) -> Job:
        job = self.submit()
        claim = self.store.claim("runner")
        assert claim is not None
        with claim:
            claim.complete({})
        return job

    @property
    def left(self) -> set[str]:
        in_store, on_disk = {job.id for job in self.store.all()}, {path.name for path in (self.home / "jobs").iterdir()}
        assert in_store == on_disk
        return in_store


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with closing(JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")) as store:
        yield House(tmp_path, store)


def test_finished_videos_go_after_their_time_and_others_never(house: House) -> None:
    house.finish()
    running = house.submit()
    claim = house.store.claim("runner")
    assert claim is not None
    waiting = house.submit()
    with claim:
        time.sleep(0.1)
        house.clean(keep_days=1)
        assert len(house.left) == 3
        house.clean(keep_days=0.05 / 86400)
        assert house.left == {running.id, waiting.id}


def test_the_oldest_go_first_where_there_is_too_much(house: House) -> None:
    running = house.submit()
    claim = house.store.claim("another runner")
    assert claim is not None
    with claim:
        finished = [house.finish() for _ in range(3)]
        waiting = house.submit()
        house.clean(keep_bytes=5 * KILOBYTE)
        assert len(house.left) == 5
        house.clean(keep_bytes=4 * KILOBYTE - 1)
        assert house.left == {running.id, finished[2].id, waiting.id}
        house.clean(keep_bytes=1)
        assert house.left == {running.id, waiting.id}


def test_a_folder_that_nobody_owns_goes_when_nobody_has_touched_it_for_long(house: House) -> None:
    job = house.submit()
    for name in ("video_old", "video_new"):
        (house.storage.folder(name) / "input").write_bytes(b"x")
    long_ago = time.time() - ORPHAN_SECONDS - 60
    for folder in ("video_old", job.id):
        for path in (*(house.home / "jobs" / folder).iterdir(), house.home / "jobs" / folder):
            os.utime(path, (long_ago, long_ago))
    house.clean()
    assert {path.name for path in (house.home / "jobs").iterdir()} == {job.id, "video_new"}


def test_it_ends_at_once_when_the_server_does(house: House) -> None:
    keeper = Housekeeper(house.store, house.storage, ServiceSettings(home=house.home))
    keeper.start()
    begun = time.monotonic()
    keeper.stop()
    assert time.monotonic() - begun < 5


def test_with_a_bucket_only_the_copies_here_go_where_there_is_too_much(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.client.create_bucket(Bucket="kept")
    settings = ServiceSettings(home=tmp_path, s3_bucket="kept", s3_endpoint_url=s3.url, keep_bytes=2 * KILOBYTE)
    with closing(JobStore(settings.database)) as store:
        house = House(tmp_path, store)
        house.storage = open_storage(settings)
        running = house.submit()
        claim = store.claim("another runner")
        assert claim is not None
        jobs = [house.finish(), house.finish()]
        for job in jobs:
            house.storage.publish(job.id, "input")
        with claim:
            Housekeeper(store, house.storage, settings).clean()
        assert {path.name for path in (tmp_path / "jobs").iterdir()} == {running.id, jobs[1].id}
        house.storage.obtain(jobs[0].id, "input")
        assert house.storage.size(jobs[0].id) == KILOBYTE
