"""Jobs' files in a folder, and in a bucket that several machines share: here, folders that do not know each other."""

import http.server
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from avatar_api import storage as storage_module
from avatar_api.settings import ServiceSettings
from avatar_api.storage import Storage, StorageError, open_storage
from tests.buckets import READER, READER_SECRET, SECRET, S3Server, s3_fixture, s3_server_fixture
from tests.conftest import REPOSITORY
from tests.waiting import eventually

__all__ = ["s3_fixture", "s3_server_fixture"]

JOB = "video_1f"
OTHER = "video_1f2"

Machine = Callable[..., Storage]


@pytest.fixture(name="bucket")
def bucket_fixture(s3: S3Server, tmp_path: Path) -> str:
    name = f"bucket-{tmp_path.parent.name}-{tmp_path.name}".replace("_", "-").lower()[:60].rstrip("-")
    s3.client.create_bucket(Bucket=name)
    return name


@pytest.fixture(name="machine")
def machine_fixture(s3: S3Server, bucket: str, tmp_path: Path) -> Machine:
    """Makes a machine: a folder of its own, and the bucket."""

    def machine(name: str, **settings: object) -> Storage:
        ours = {"home": tmp_path / name, "s3_bucket": bucket, "s3_endpoint_url": s3.url}
        return open_storage(ServiceSettings.model_validate(ours | settings))

    return machine


@pytest.fixture(name="storage", params=["folder", "bucket"])
def storage_fixture(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Either kind."""
    if request.param == "folder":
        return open_storage(ServiceSettings(home=tmp_path / "home"))
    machine: Machine = request.getfixturevalue("machine")
    return machine("home")


def write(storage: Storage, name: str, content: bytes, job_id: str = JOB) -> bytes:
    (storage.folder(job_id) / name).write_bytes(content)
    return content


def read(storage: Storage, name: str, job_id: str = JOB) -> bytes:
    return (storage.folder(job_id) / name).read_bytes()


def listed(storage: Storage, job_id: str = JOB) -> list[str]:
    return sorted(file.name for file in storage.folder(job_id).iterdir())


def child(machine: Storage, code: str) -> "subprocess.Popen[str]":
    """Another process of the same machine; `storage` is there in its code."""
    settings = machine._settings.model_dump_json(include={"home", "s3_bucket", "s3_endpoint_url"})
    program = f"""
from avatar_api.settings import ServiceSettings
from avatar_api.storage import open_storage
storage = open_storage(ServiceSettings.model_validate_json({settings!r}))
{textwrap.dedent(code)}
"""
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE)


# Either kind


def test_a_published_file_is_there_when_it_is_obtained(storage: Storage) -> None:
    content = write(storage, "clip.mp4", b"some frames")
    storage.publish(JOB, "clip.mp4")
    storage.obtain(JOB, "clip.mp4")
    assert read(storage, "clip.mp4") == content


def test_a_file_that_nobody_published_cannot_be_obtained(storage: Storage) -> None:
    with pytest.raises(StorageError, match=r"clip\.mp4") as refused:
        storage.obtain(JOB, "clip.mp4")
    assert not refused.value.away
    with pytest.raises(FileNotFoundError):
        storage.publish(JOB, "clip.mp4")


def test_deleting_takes_one_job_with_all_its_files_and_no_other(storage: Storage) -> None:
    for job_id in (JOB, OTHER):
        write(storage, "audio", b"voice", job_id)
        storage.publish(job_id, "audio")
    write(storage, "never-published", b"")
    for _ in range(2):
        storage.delete(JOB)
        assert storage.jobs() == [OTHER]
    with pytest.raises(StorageError):
        storage.obtain(JOB, "audio")
    storage.forget(OTHER)
    storage.obtain(OTHER, "audio")
    assert read(storage, "audio", OTHER) == b"voice"


def test_many_may_delete_the_same_job(storage: Storage) -> None:
    for index in range(300):
        write(storage, f"clip-{index}", b"")
    with ThreadPoolExecutor() as pool:
        for deleted in [pool.submit(storage.delete, JOB) for _ in range(4)]:
            deleted.result()
    assert storage.jobs() == []


def test_the_clips_of_a_finished_video_are_discarded_everywhere(storage: Storage) -> None:
    for name in ("clip-00000.1.mp4", "clip-00000.1.safetensors", "video.1.mp4"):
        write(storage, name, b"content")
        storage.publish(JOB, name)
    storage.discard(JOB, "clip-")
    assert listed(storage) == ["video.1.mp4"]
    with pytest.raises(StorageError):
        storage.obtain(JOB, "clip-00000.1.mp4")
    storage.obtain(JOB, "video.1.mp4")


def test_it_knows_the_jobs_on_this_machine_and_how_much_they_take(storage: Storage) -> None:
    assert storage.jobs() == []
    write(storage, "a", b"x" * 1000)
    write(storage, "b", b"x" * 500)
    write(storage, "a", b"x", OTHER)
    assert storage.jobs() == [JOB, OTHER]
    assert (storage.size(JOB), storage.size(OTHER), storage.size("video_unknown")) == (1500, 1, 0)
    old = time.time() - 3600
    for path in (storage.folder(JOB), *storage.folder(JOB).iterdir(), storage.folder(OTHER)):
        os.utime(path, (old, old))
    assert storage.jobs(untouched_seconds=600) == [JOB]


def test_a_name_never_becomes_a_path(storage: Storage) -> None:
    of_jobs: list[Callable[[str], object]] = [storage.folder, storage.delete, storage.size]
    of_files: list[Callable[[str, str], object]] = [storage.publish, storage.obtain, storage.discard]
    for name in ("", "..", "../audio", "a/b", "/etc/passwd", ".hidden", "a b", "größe", "a\n", "*"):
        for of_job in of_jobs:
            with pytest.raises(ValueError, match="no name"):
                of_job(name)
        for of_file in of_files:
            with pytest.raises(ValueError, match="no name"):
                of_file(JOB, name)


# The folder


def test_a_folder_is_served_from_itself_and_never_forgotten(tmp_path: Path) -> None:
    storage = open_storage(ServiceSettings(home=tmp_path))
    storage.check()
    write(storage, "video.1.mp4", b"content")
    assert storage.link(JOB, "video.1.mp4", "video.mp4") is None
    assert not storage.forget(JOB)
    assert read(storage, "video.1.mp4") == b"content"


def test_machines_without_a_bucket_are_told_that_they_need_one(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="AVATAR_S3_BUCKET"):
        open_storage(ServiceSettings(home=tmp_path)).obtain(JOB, "audio")


# The bucket


def test_what_one_machine_publishes_another_obtains(machine: Machine, s3: S3Server, bucket: str) -> None:
    here, there = machine("here"), machine("there")
    here.check()
    audio, picture = write(here, "audio", os.urandom(100_000)), write(here, "input_reference", os.urandom(50_000))
    write(here, "empty", b"")
    here.publish(JOB, "audio", "input_reference", "empty")
    assert s3.keys(bucket) == [f"avatar/{JOB}/{name}" for name in ("audio", "empty", "input_reference")]
    there.obtain(JOB, "audio", "input_reference", "empty")
    assert (read(there, "audio"), read(there, "input_reference"), read(there, "empty")) == (audio, picture, b"")
    assert listed(there) == ["audio", "empty", "input_reference"]


def test_what_is_in_the_folder_is_not_asked_for_again(machine: Machine, s3: S3Server) -> None:
    here = machine("here")
    write(here, "audio", b"voice")
    here.publish(JOB, "audio")
    before = s3.set()["requests"]
    here.obtain(JOB, "audio")
    assert s3.set()["requests"] == before


def test_a_forgotten_job_is_only_gone_from_this_machine(machine: Machine) -> None:
    here = machine("here")
    write(here, "audio", b"voice")
    here.publish(JOB, "audio")
    assert here.forget(JOB)
    assert here.forget(JOB)
    assert here.jobs() == []
    here.obtain(JOB, "audio")
    assert read(here, "audio") == b"voice"


def test_a_download_that_is_killed_leaves_no_half_file(machine: Machine, s3: S3Server) -> None:
    here, there = machine("here"), machine("there")
    content = write(here, "clip.mp4", os.urandom(5_000_000))
    here.publish(JOB, "clip.mp4")
    s3.set(hold=True, enough=3_000_000)
    downloading = child(there, f"storage.obtain({JOB!r}, 'clip.mp4')")
    part = there.folder(JOB) / "clip.mp4.part"
    eventually(lambda: part.exists() and part.stat().st_size > 1_000_000, seconds=30)
    downloading.send_signal(signal.SIGKILL)
    downloading.communicate()
    assert listed(there) == ["clip.mp4.part"]
    s3.set(hold=False)
    there.obtain(JOB, "clip.mp4")
    assert read(there, "clip.mp4") == content
    assert listed(there) == ["clip.mp4"]


def test_a_file_wanted_by_many_is_downloaded_once(machine: Machine, s3: S3Server) -> None:
    here, there = machine("here"), machine("there")
    content = write(here, "clip.mp4", os.urandom(2_000_000))
    here.publish(JOB, "clip.mp4")
    s3.set(hold=True, downloads=0)
    process = child(there, f"print(flush=True); storage.obtain({JOB!r}, 'clip.mp4')")
    assert process.stdout is not None
    process.stdout.readline()
    with ThreadPoolExecutor() as pool:
        threads = [pool.submit(there.obtain, JOB, "clip.mp4") for _ in range(4)]
        time.sleep(0.3)  # whoever would download it too has the time to begin
        s3.set(hold=False)
        for thread in threads:
            thread.result()
    process.communicate()
    assert process.returncode == 0
    assert read(there, "clip.mp4") == content
    assert listed(there) == ["clip.mp4"]
    assert s3.set()["downloads"] == 1


def test_a_download_that_breaks_off_begins_again(
    machine: Machine, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = machine("here"), machine("there")
    content = write(here, "clip.mp4", os.urandom(5_000_000))
    here.publish(JOB, "clip.mp4")
    s3.set(cut=2, enough=3_000_000)
    there.obtain(JOB, "clip.mp4")
    assert read(there, "clip.mp4") == content
    there.forget(JOB)
    s3.set(cut=100)
    with pytest.raises(StorageError, match="no answer") as lost:
        there.obtain(JOB, "clip.mp4")
    assert lost.value.away
    assert s3.set()["cut"] == 100 - storage_module.ATTEMPTS


def test_a_file_that_is_not_what_was_published_is_refused(machine: Machine, s3: S3Server, bucket: str) -> None:
    here, there = machine("here"), machine("there")
    write(here, "audio", b"the true one")
    here.publish(JOB, "audio")
    digest = s3.client.head_object(Bucket=bucket, Key=f"avatar/{JOB}/audio")["Metadata"]
    for metadata in (digest, dict[str, str]()):
        s3.client.put_object(Bucket=bucket, Key=f"avatar/{JOB}/audio", Body=b"another one!", Metadata=metadata)
        with pytest.raises(StorageError, match="not what was published"):
            there.obtain(JOB, "audio")
        assert not (there.folder(JOB) / "audio").exists()


def test_a_large_file_passes_in_parts_through_little_memory(machine: Machine, s3: S3Server, bucket: str) -> None:
    here, there = machine("here"), machine("there")
    block = os.urandom(2**20)
    with (here.folder(JOB) / "video.1.mp4").open("wb") as video:
        for index in range(120):
            video.write(index.to_bytes(8, "big") + block[8:])
    moved = []
    for storage, move in (here, "publish"), (there, "obtain"):
        measured = f"""
            def peak():
                return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
            storage.check()
            before = peak()
            heard = []
            storage.{move}({JOB!r}, 'video.1.mp4', on_bytes=heard.append)
            print((peak() - before) // 1024, heard[-1])
        """
        output, _ = child(storage, measured).communicate()
        megabytes, heard = map(int, output.split())
        assert megabytes < 64
        moved.append(heard)
    assert moved == [120 * 2**20] * 2
    assert s3.client.head_object(Bucket=bucket, Key=f"avatar/{JOB}/video.1.mp4")["ETag"].endswith('-8"')
    assert (here.folder(JOB) / "video.1.mp4").read_bytes() == (there.folder(JOB) / "video.1.mp4").read_bytes()


def test_a_caller_hears_of_a_transfer_that_stands_still_and_may_end_it(
    machine: Machine, s3: S3Server, bucket: str
) -> None:
    here, there = machine("here"), machine("there")
    write(here, "large.mp4", b"x" * (2 * storage_module.PART_BYTES))
    write(here, "small.mp4", os.urandom(5_000_000))
    here.publish(JOB, "small.mp4")
    s3.set(hold=True, enough=3_000_000)
    for move, name in (here.publish, "large.mp4"), (there.obtain, "small.mp4"):
        heard: list[str] = []

        def hear(moved: int, heard: list[str] = heard) -> None:
            heard.append(threading.current_thread().name)
            if len(heard) == 3:
                raise KeyError("cancelled")

        with ThreadPoolExecutor(thread_name_prefix="caller") as caller:
            ended = caller.submit(move, JOB, name, on_bytes=hear).exception(timeout=20)  # the server would take 30 s
        assert isinstance(ended, KeyError)
        assert set(heard) == {"caller_0"}
    s3.set(hold=False)
    eventually(lambda: "Uploads" not in s3.client.list_multipart_uploads(Bucket=bucket), seconds=30)
    assert s3.keys(bucket) == [f"avatar/{JOB}/small.mp4"]
    there.obtain(JOB, "small.mp4")
    assert listed(there) == ["small.mp4"]


def test_a_link_downloads_for_a_while_and_for_anybody(machine: Machine, s3: S3Server) -> None:
    here = machine("here", s3_link_seconds=600)
    content = write(here, "video.3.mp4", os.urandom(10_000))
    here.publish(JOB, "video.3.mp4")
    link = here.link(JOB, "video.3.mp4", f"{JOB}.mp4")
    assert link is not None
    answer = httpx.get(link)
    assert answer.content == content
    assert answer.headers["Content-Type"] == "video/mp4"
    assert answer.headers["Content-Disposition"] == f'attachment; filename="{JOB}.mp4"'
    for mood, address in ({"ahead": 601}, link), ({"ahead": 0}, link.replace(JOB, OTHER)):
        s3.set(**mood)
        assert httpx.get(address).status_code == 403
    assert SECRET not in link


def test_an_endpoint_needs_no_name_for_each_bucket(machine: Machine, bucket: str) -> None:
    link = machine("here", s3_endpoint_url="http://storage.internal:9000").link(JOB, "video.3.mp4", "video.mp4")
    assert link is not None
    assert link.startswith(f"http://storage.internal:9000/{bucket}/avatar/{JOB}/video.3.mp4?")


def test_deleting_ends_the_uploads_of_runners_that_were_killed(machine: Machine, s3: S3Server, bucket: str) -> None:
    here = machine("here")
    client = s3.client
    for job_id in (JOB, OTHER):
        client.create_multipart_upload(Bucket=bucket, Key=f"avatar/{job_id}/video.1.mp4")
    here.delete(JOB)
    left = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert [upload["Key"] for upload in left] == [f"avatar/{OTHER}/video.1.mp4"]


def test_a_folder_reminds_of_a_bucket_that_could_not_be_emptied(
    machine: Machine, s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "ATTEMPTS", 1)
    here, there = machine("here"), machine("there")
    write(here, "audio", b"voice")
    here.publish(JOB, "audio")
    s3.set(busy=100)
    for storage in (here, there):
        with pytest.raises(StorageError):
            storage.delete(JOB)
        assert storage.jobs() == [JOB]
    s3.set(busy=0)
    there.delete(JOB)
    assert (there.jobs(), s3.keys(bucket)) == ([], [])


def test_other_programs_files_in_the_bucket_are_left_alone(machine: Machine, s3: S3Server, bucket: str) -> None:
    here = machine("here", s3_prefix="ours/")
    here.check()
    s3.client.put_object(Bucket=bucket, Key=f"theirs/{JOB}/audio", Body=b"")
    write(here, "audio", b"voice")
    here.publish(JOB, "audio")
    assert s3.keys(bucket) == [f"ours/{JOB}/audio", f"theirs/{JOB}/audio"]
    here.delete(JOB)
    assert s3.keys(bucket) == [f"theirs/{JOB}/audio"]


# What goes wrong, and what to do about it


def test_a_busy_bucket_is_asked_again_and_then_called_away(
    machine: Machine, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "ATTEMPTS", 2)
    here = machine("here")
    write(here, "audio", b"voice")
    s3.set(busy=1)
    here.publish(JOB, "audio")
    s3.set(busy=100)
    with pytest.raises(StorageError, match="overloaded") as refused:
        here.publish(JOB, "audio")
    assert refused.value.away


def test_a_server_that_is_down_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "ATTEMPTS", 2)
    here = machine("here", s3_endpoint_url="http://user:hidden@127.0.0.1:9")
    write(here, "audio", b"voice")
    calls: list[Callable[[], object]] = [
        here.check,
        lambda: here.publish(JOB, "audio"),
        lambda: here.obtain(JOB, "audio_2"),
        lambda: here.delete(JOB),
    ]
    for call in calls:
        with pytest.raises(StorageError, match=r"avatar/.* 127\.0\.0\.1:9: no answer.*AVATAR_S3_ENDPOINT_URL") as down:
            call()
        assert down.value.away
        assert "hidden" not in str(down.value)


@pytest.mark.parametrize(
    ("settings", "environment", "remedy"),
    [
        ({"s3_bucket": "no-such-bucket"}, {}, "no-such-bucket.*there is no such bucket; check AVATAR_S3_BUCKET"),
        ({"s3_bucket": "Not_A Bucket"}, {}, "Not_A Bucket.*make no sense.*AVATAR_S3"),
        ({"s3_endpoint_url": "127.0.0.1:9000"}, {}, "AVATAR_S3_ENDPOINT_URL.*https://host:port"),
        ({}, {"AWS_ACCESS_KEY_ID": "AKIAUNKNOWN"}, "refuses the credentials; check AWS_ACCESS_KEY_ID"),
        ({}, {"AWS_SECRET_ACCESS_KEY": "a-wrong-secret"}, "refuses the credentials; check AWS_ACCESS_KEY_ID"),
        ({}, {"AWS_ACCESS_KEY_ID": READER, "AWS_SECRET_ACCESS_KEY": READER_SECRET}, "access is denied.*PutObject"),
        ({}, {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials.*set AWS_ACCESS_KEY_ID"),
    ],
)
def test_what_is_set_up_wrongly_is_said_at_start(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    environment: dict[str, str],
    remedy: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=remedy) as refused:
        machine("here", **settings).check()
    assert not refused.value.away
    assert not any(secret in str(refused.value) for secret in (SECRET, READER_SECRET, "a-wrong-secret"))


def test_a_wrong_clock_is_said_at_start(machine: Machine, s3: S3Server) -> None:
    s3.set(ahead=3600)
    with pytest.raises(StorageError, match="clock is wrong"):
        machine("here").check()


@pytest.fixture(name="website", params=[200, 404])
def website_fixture(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that has never heard of S3."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html><body>Welcome!<br></body></html>")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_that_is_no_bucket_service_is_said_at_start(machine: Machine, website: str) -> None:
    with pytest.raises(StorageError, match="not an S3 service; check AVATAR_S3_ENDPOINT_URL"):
        machine("here", s3_endpoint_url=website).check()


def test_links_are_signed_for_the_buckets_own_region(
    machine: Machine, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Amazon's servers forward everything but links; here, boto3 takes our server for Amazon's."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.url)
    s3.client.create_bucket(Bucket="far-away", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    here = machine("here", s3_bucket="far-away", s3_endpoint_url=None)
    here.check()
    write(here, "video.1.mp4", b"content")
    here.publish(JOB, "video.1.mp4")
    link = here.link(JOB, "video.1.mp4", "video.mp4")
    assert link is not None
    assert "%2Feu-central-1%2Fs3%2F" in link
    assert httpx.get(link).content == b"content"
