"""Two hundred clients at once, and files of 200 MB: how long do they wait, and what does the server keep of them?

    python -m benchmarks.clients [--clients 200] [--megabytes 200] [--at-once 4]

Each client creates a video, polls it, follows its events to the end, and downloads it, over a connection of its own;
they all begin together. Then come uploads and a download of the given size, one and several at once, whose memory is
the growth of the API's peak (VmHWM). The server is `bentoml serve` with a stand-in for the pipeline. Exits non-zero
if an answer was wrong, or if the API's memory or open files did not come back.
"""

import argparse
import json
import statistics
import struct
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.kills import PICTURE, voice
from tests.served import MB, Served

FLAT_MB = 40.0
"""More than this must not become resident while a file of any size passes through."""
OPEN_FILES = 16
"""More than before may be open afterwards: the pools of the database and of threads."""
CHUNK = 2**20
ANSWER_SECONDS = 300


def visit(url: str, number: int, together: Barrier) -> list[tuple[str, float]]:
    """One client → what it asked for, and how long the answer took, in ms."""
    times: list[tuple[str, float]] = []
    videos = f"{url}/v1/videos"

    with httpx.Client(timeout=ANSWER_SECONDS) as client:

        def ask(what: str, method: str, address: str, **sent: object) -> httpx.Response:
            started = time.perf_counter()
            answer = client.request(method, address, **sent)  # type: ignore[arg-type]
            times.append((what, 1000 * (time.perf_counter() - started)))
            return answer.raise_for_status()

        form = {"prompt": f"Client {number}.", "size": "64x64", "steps": "2", "seed": str(number)}
        files = {"input_reference": PICTURE.read_bytes(), "audio": voice(2)}
        together.wait()
        video = ask("create", "POST", videos, data=form, files=files).json()["id"]
        ask("poll", "GET", f"{videos}/{video}")
        kinds = []
        with client.stream("GET", f"{videos}/{video}/events") as stream:
            for line in stream.iter_lines():
                if line.startswith("event: "):
                    kinds.append(line.removeprefix("event: "))
                elif line.startswith("data: ") and len(kinds) == 1:
                    assert json.loads(line.removeprefix("data: "))["id"] == video
        assert (kinds.count("clip"), kinds[-1]) == (2, "completed"), kinds
        assert ask("poll", "GET", f"{videos}/{video}").json()["status"] == "completed"
        assert ask("download", "GET", f"{videos}/{video}/content").content[4:8] == b"ftyp"
    return times


def all_visit(served: Served, clients: int) -> dict[str, list[float]]:
    together = Barrier(clients)
    with ThreadPoolExecutor(clients) as pool:
        visits = list(pool.map(lambda number: visit(served.url, number, together), range(clients)))
    times: dict[str, list[float]] = defaultdict(list)
    for what, taken in (entry for entries in visits for entry in entries):
        times[what].append(taken)
    return times


def padded_voice(megabytes: float) -> Iterator[bytes]:
    """A sound file that is short but large: a chunk that readers skip lies before the sound."""
    sound = voice(1)
    filling = int(megabytes * MB)
    whole = len(sound) + 8 + filling
    yield b"RIFF" + struct.pack("<I", whole - 8) + b"WAVE" + b"JUNK" + struct.pack("<I", filling)
    for start in range(0, filling, CHUNK):
        yield bytes(min(CHUNK, filling - start))
    yield sound[12:]


def upload(served: Served, megabytes: float, gone_after: int | None = None) -> httpx.Response | None:
    """Create a video with a voice of that size, sent piece by piece; gone_after: leave after so many pieces."""
    boundary = b"0f0f0f0f0f"

    def part(name: str, filename: str | None) -> bytes:
        head = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename else "")
        return b"\r\n--" + boundary + b"\r\nContent-Disposition: " + head.encode() + b"\r\n\r\n"

    def body() -> Iterator[bytes]:
        yield part("size", None) + b"64x64"
        yield part("input_reference", "a.png") + PICTURE.read_bytes()
        yield part("audio", "a.wav")
        for number, piece in enumerate(padded_voice(megabytes)):
            if number == gone_after:
                raise _GoneError
            yield piece
        yield b"\r\n--" + boundary + b"--\r\n"

    headers = {"Content-Type": f"multipart/form-data; boundary={boundary.decode()}"}
    try:
        return httpx.post(f"{served.url}/v1/videos", content=body(), headers=headers, timeout=ANSWER_SECONDS)
    except _GoneError:
        return None


class _GoneError(Exception):
    pass


def download(served: Served, video: str) -> int:
    """→ bytes."""
    with httpx.stream("GET", f"{served.url}/v1/videos/{video}/content", timeout=ANSWER_SECONDS) as answer:
        answer.raise_for_status()
        return sum(len(piece) for piece in answer.iter_bytes(CHUNK))


def finished(served: Served, video: str) -> None:
    deadline = time.monotonic() + ANSWER_SECONDS
    while (job := httpx.get(f"{served.url}/v1/videos/{video}").json())["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline, job
        time.sleep(0.1)
    assert job["status"] == "completed", job


def large_files(served: Served, megabytes: float, at_once: int) -> dict[str, float]:
    """By what was done: MB more that were resident meanwhile."""
    more: dict[str, float] = {}
    first = upload(served, 1)  # everything was used once
    assert first is not None
    video = first.raise_for_status().json()["id"]
    finished(served, video)

    def measured(what: str, work: object) -> None:
        assert callable(work)
        served.forget_peak()
        before = served.footprint().resident
        work()
        more[what] = served.footprint().peak - before

    def uploads(count: int) -> None:
        with ThreadPoolExecutor(count) as pool:
            for answer in pool.map(lambda _: upload(served, megabytes), range(count)):
                assert answer is not None
                assert answer.status_code == 200, answer.text

    def downloads(count: int) -> None:
        with ThreadPoolExecutor(count) as pool:
            assert set(pool.map(lambda _: download(served, video), range(count))) == {size}

    measured("one upload", lambda: uploads(1))
    measured(f"{at_once} uploads at once", lambda: uploads(at_once))
    measured("an upload whose caller leaves half-way", lambda: upload(served, megabytes, int(megabytes / 2)))
    (film,) = (served.home / "jobs" / video).glob("video.*.mp4")
    with film.open("r+b") as file:  # as if it were a long one: players skip what follows
        file.truncate(size := int(megabytes * MB))
    measured("one download", lambda: downloads(1))
    measured(f"{at_once} downloads at once", lambda: downloads(at_once))
    return more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200, help="%(default)s")
    parser.add_argument("--megabytes", type=float, default=200, help="of a large file (%(default)s)")
    parser.add_argument("--at-once", type=int, default=4, help="large files at the same time (%(default)s)")
    options = parser.parse_args()
    console, problems = Console(), []
    with tempfile.TemporaryDirectory() as folder, Served(Path(folder), max_queued_per_key=10**4) as served:
        all_visit(served, 10)
        before = served.footprint()
        started = time.monotonic()
        times = all_visit(served, options.clients)
        took = time.monotonic() - started
        after = served.footprint()
        table = Table(f"{options.clients} clients, {took:.0f} s", "answers", "p50 ms", "p99 ms")
        for what, taken in times.items():
            cuts = statistics.quantiles(taken, n=100, method="inclusive")
            table.add_row(what, str(len(taken)), f"{cuts[49]:.0f}", f"{cuts[98]:.0f}")
        console.print(table, f"before: {before}", f"after: {after}", sep="\n")
        if after.open_files > before.open_files + OPEN_FILES:
            problems.append("files stay open")

        more = large_files(served, options.megabytes, options.at_once)
        table = Table(f"{options.megabytes:.0f} MB", "MB more resident in the API")
        for what, megabytes in more.items():
            table.add_row(what, f"{megabytes:.0f}")
        console.print(table)
        problems += [f"{what}: not flat" for what, megabytes in more.items() if megabytes > FLAT_MB]
        left = [path for path in served.temporary.rglob("*") if path.is_file()]
        problems += [f"{path} is left" for path in left]
    if problems:
        raise SystemExit("; ".join(problems))


if __name__ == "__main__":
    main()
