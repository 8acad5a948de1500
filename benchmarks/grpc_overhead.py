"""What a call costs over gRPC and over HTTP, side by side: one process with both servers, one caller, the same jobs.

    python -m benchmarks.grpc_overhead

The servers are those of the tests, on loopback, with the database in a file and the job's files in a folder. `generate`
is left out: its time is that of the video, plus half a look for it. The runner is the tests' own: no model is there.
"""

import hashlib
import io
import statistics
import tempfile
import threading
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import uvicorn
from rich.console import Console
from rich.table import Table

from avatar_api.auth import Authenticated, Keys
from avatar_api.http import OneErrorShape, create_app
from avatar_api.jobs import JobStore
from avatar_api.protos import avatar_pb2 as pb
from avatar_api.routes import create_router
from avatar_api.settings import ServiceSettings
from avatar_api.storage import Storage
from tests.test_grpc import MB, Caller, Serving, chunk, wanted
from tests.test_videos import Backend, picture

CALLS, TRANSFERS = 200, 5
KEY = "alice"
VIDEOS = "/v1/videos"


@contextmanager
def http_server(backend: Backend) -> Iterator[str]:
    async def ready() -> bool:
        return True

    app: Any = create_app(ready, [create_router(lambda: backend)])
    app = OneErrorShape(Authenticated(app, Keys([KEY])), backend.settings.max_upload_bytes)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def grpc_server(backend: Backend) -> Iterator[str]:
    serving = Serving(backend, (KEY,))
    try:
        yield serving.address
    finally:
        serving.end()


def sound(megabytes: int) -> bytes:
    noise = np.random.default_rng(0).normal(0, 3000, megabytes * MB // 2).astype(np.int16)
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(16000)
        written.writeframes(noise.tobytes())
    return file.getvalue()


def milliseconds(call: Callable[[], object], times: int) -> list[float]:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - started))
    return taken


def upload(voice: bytes) -> Iterator[pb.CreateVideoRequest]:
    yield wanted(max_seconds=1)
    yield chunk("input_reference", picture())
    for start in range(0, len(voice), MB):
        yield chunk("audio", voice[start : start + MB])
    yield pb.CreateVideoRequest(finish=True)


def finished(backend: Backend, megabytes: int) -> str:
    """A finished video of so many MB, or rather bytes in its place: nobody looks at them."""
    with backend.take() as claim:
        content = np.random.default_rng(0).bytes(megabytes * MB)
        (backend.storage.folder(claim.job.id) / "video.1.mp4").write_bytes(content)
        claim.complete({"video": "video.1.mp4", "frames": 25, "seconds": 1.0})
        return claim.job.id


def main() -> int:
    table = Table("call", "gRPC, ms", "HTTP, ms", title=f"median, least to most; {CALLS} calls, {TRANSFERS} transfers")
    with tempfile.TemporaryDirectory() as folder:
        settings = ServiceSettings(home=Path(folder), max_queued=10**6, max_queued_per_key=10**6)
        with closing(JobStore(settings.database)) as store:
            backend = Backend(settings, store, Storage(settings))
            headers = {"Authorization": f"Bearer {KEY}"}
            with (
                http_server(backend) as url,
                grpc_server(backend) as address,
                httpx.Client(base_url=url, headers=headers, timeout=60) as http,
                grpc.insecure_channel(address) as channel,
            ):
                for row in measure(backend, Caller(channel, KEY), http):
                    table.add_row(*row)
    Console(width=100).print(table)
    return 0


def measure(backend: Backend, caller: Caller, http: httpx.Client) -> Iterator[tuple[str, str, str]]:
    small, large = sound(1), sound(100)

    def create(voice: bytes) -> Callable[[], object]:
        return lambda: caller.CreateVideo(upload(voice))

    def post(voice: bytes) -> Callable[[], object]:
        form = {"prompt": "A man talks.", "size": "64x64", "max_seconds": "1"}
        return lambda: http.post(
            VIDEOS, data=form, files={"input_reference": picture(), "audio": voice}
        ).raise_for_status()

    yield "create, 1 MB of sound", *compare(create(small), post(small), CALLS // 4)
    yield "create, 100 MB of sound", *compare(create(large), post(large), TRANSFERS)
    video = finished(backend, 100)
    get, listing = pb.GetVideoRequest(id=video), pb.ListVideosRequest()
    yield "get", *compare(lambda: caller.GetVideo(get), lambda: http.get(f"{VIDEOS}/{video}"), CALLS)
    yield "list 20", *compare(lambda: caller.ListVideos(listing), lambda: http.get(VIDEOS), CALLS)

    def download() -> str:
        digest = hashlib.sha256()
        for part in caller.DownloadVideo(pb.DownloadVideoRequest(id=video)):
            digest.update(part.content)
        return digest.hexdigest()

    def get_content() -> str:
        digest = hashlib.sha256()
        with http.stream("GET", f"{VIDEOS}/{video}/content") as answer:
            for part in answer.iter_raw():
                digest.update(part)
        return digest.hexdigest()

    if download() != get_content():
        raise SystemExit("error: not the same video")
    yield "download 100 MB", *compare(download, get_content, TRANSFERS)


def compare(over_grpc: Callable[[], object], over_http: Callable[[], object], times: int) -> tuple[str, str]:
    over_grpc(), over_http()
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(times):  # by turns, so that a busy machine is so for both
        taken[0].extend(milliseconds(over_grpc, 1))
        taken[1].extend(milliseconds(over_http, 1))
    return shown(taken[0]), shown(taken[1])


def shown(taken: list[float]) -> str:
    return f"{statistics.median(taken):.1f}, {min(taken):.1f} to {max(taken):.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
