"""What can be sent to break the server? Thousands of mutated requests and media files, to the real one over HTTP.

    python -m benchmarks.mutations [--requests 10000] [--seed 0] [--only sqlite|postgresql]

Requests are mutated in their values (missing, doubled, huge, of the wrong type, NaN, deep JSON), headers, encodings,
multipart frames, paths and queries, and are cut off in the middle; pictures, sounds and videos have their bits
flipped, are cut, spliced, and have sizes in their headers changed. Three in four go to /v1/videos, the others to
/generate. No answer may be a 5xx, hang, or have another shape than docs/API.md promises; no process may die; a job
that was taken must not fail for want of a better check; and in the end the API holds no more memory, files and
folders than before. Exits non-zero otherwise. The seed and the number of a request make it again: --first N
--requests 1.
"""

import argparse
import contextlib
import io
import json
import random
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import quote

import av
import httpx
import numpy as np
import soundfile
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.kills import databases
from tests.served import Footprint, Served

Chance = random.Random
SIDE = 32  # pixels of the pictures
SECONDS = 0.5  # of sound
ANSWER_SECONDS = 60  # after which a request hangs
THREADS = 8
WARM = 500  # requests, until everything was used once
GROWTH_MB, GROWTH_FILES = 60.0, 8
"""What may remain after thousands of requests: an allocator's holes, and a pool's connections."""
LIMIT = 2**21  # bytes of a request


@dataclass
class Report:
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """The request's number, and what was wrong."""
    before: Footprint | None = None
    after: Footprint | None = None
    files_left: int = 0
    jobs: Counter[str] = field(default_factory=Counter)


# Media


@cache
def media() -> dict[str, list[bytes]]:
    """Whole files of many formats, by what they are."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), np.uint8)
    pictures = []
    for mode, kind, options in (
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {}),
        ("I;16", "PNG", {}),
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("CMYK", "JPEG", {}),
        ("RGB", "WEBP", {}),
        ("RGBA", "WEBP", {"lossless": True}),
    ):
        file = io.BytesIO()
        grey = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
        (grey if mode == "I;16" else Image.fromarray(pixels).convert(mode)).save(file, kind, **options)
        pictures.append(file.getvalue())
    wave = np.random.default_rng(1).normal(0, 0.1, (int(SECONDS * 16000), 2))
    sounds = []
    for kind, subtype in (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None)):
        file = io.BytesIO()
        soundfile.write(file, wave, 16000, format=kind, subtype=subtype)
        sounds.append(file.getvalue())
    sounds.append(_film("mp4", None, "aac", pixels, wave))
    films = [
        _film("mp4", "libx264", "aac", pixels, wave),
        _film("matroska", "libx264", "aac", pixels, wave),
        _film("avi", "mpeg4", "pcm_s16le", pixels, wave),
        _film("webm", "libvpx", "libopus", pixels, wave),
    ]
    return {"picture": pictures, "sound": sounds, "film": films}


def _film(container: str, video: str | None, audio: str, pixels: Any, wave: Any) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as film:
        if video is not None:
            pictures: Any = film.add_stream(video, rate=25, width=SIDE, height=SIDE, pix_fmt="yuv420p")
        rate = 48000
        sound: Any = film.add_stream(audio, rate=rate, layout="stereo")
        if video is not None:
            for number in range(int(SECONDS * 25)):
                frame = av.VideoFrame.from_ndarray(np.roll(pixels[..., :3], number, 0).copy(), "rgb24")
                film.mux(pictures.encode(frame))
            film.mux(pictures.encode(None))
        block = av.AudioFrame.from_ndarray(np.float32(wave.repeat(3, 0)).reshape(1, -1), "flt", "stereo")
        block.sample_rate = rate
        to = av.AudioResampler(sound.format, "stereo", rate, frame_size=sound.frame_size or 960)
        for piece in (*to.resample(block), *to.resample(None)):
            film.mux(sound.encode(piece))
        film.mux(sound.encode(None))
    return file.getvalue()


def mutated(chance: Chance, content: bytes) -> bytes:
    """A file with one to three things wrong."""
    mutations: list[Callable[[Chance, bytearray], bytes | bytearray]] = [
        _flip,
        _cut,
        _splice,
        _repeat,
        _blank,
        _resize,
        _swap,
    ]
    for mutate in chance.choices(mutations, k=chance.randint(1, 3)):
        content = bytes(mutate(chance, bytearray(content)))
    return content


def _flip(chance: Chance, content: bytearray) -> bytearray:
    for _ in range(chance.choice((1, 3, 30))):
        if content:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return content


def _cut(chance: Chance, content: bytearray) -> bytearray:
    return content[: chance.randint(0, len(content))]


def _splice(chance: Chance, content: bytearray) -> bytes:
    other = chance.choice([file for files in media().values() for file in files])
    return bytes(content[: chance.randint(0, len(content))]) + other[chance.randint(0, len(other)) :]


def _repeat(chance: Chance, content: bytearray) -> bytearray:
    start, end = sorted(chance.randint(0, len(content)) for _ in range(2))
    return content[:end] + content[start:]


def _blank(chance: Chance, content: bytearray) -> bytearray:
    start, end = sorted(chance.randint(0, len(content)) for _ in range(2))
    content[start:end] = bytes([chance.choice((0, 255))]) * (end - start)
    return content


def _resize(chance: Chance, content: bytearray) -> bytearray:
    """Another number where headers keep sizes."""
    size = chance.choice((1, 2, 4, 8))
    at = chance.randrange(max(1, min(len(content), 256)))
    value = chance.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 65535, 50000, chance.getrandbits(64)))
    content[at : at + size] = (value % 256**size).to_bytes(size, chance.choice(("big", "little")))
    return content


def _swap(chance: Chance, content: bytearray) -> bytes:
    """Another file altogether."""
    return chance.choice([file for files in media().values() for file in files])


# Requests

TEXTS = [
    *("", " ", "\0", "a\0b", "null", "[]", "{}", "NaN", "-1", "0", "1e400", "٣", "½", "²", "\ud800", "\U0001f600", "‮"),
    *("../../etc/passwd", "..\\..\\x", "%00", "%s%n", "${x}", "'; DROP TABLE jobs; --", "<script>", "\r\nX: 1", "480p"),
    *("1280x1280", "64x64", "0x0", "-64x64", "64x", "9" * 400, "9" * 5000, "a" * 5000, "[" * 3000, "true", "http://"),
    *(
        "http://127.0.0.1:1/",
        "https://[::1]:0/",
        "http://[",
        "http://a\0b/",
        "http://\ud800/",
        "http://256.256.256.256/",
    ),
    *("file:///etc/passwd", "data:", "data:,", "data:;base64,====", "data:;base64,AAAA", "data:,%", "ftp://x/y", "//x"),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.1, -0.0, 1e308, float("nan"), float("inf")),
    *([], {}, [[]], {"a": {}}, [None] * 1000, {"": ""}, {"image_url": 5}, {"image_url": None}, {"\ud800": 1}),
    *({"boxes": [[0, 0, 1, 1], None]}, {"boxes": [[0, 0, 0.5, 1], [0.5, 0, 1, 1]], "order": "in_turn"}),
    *({"boxes": [[float("nan")] * 4] * 2}, {"boxes": []}, {"boxes": [[1, 1, 0, 0]] * 2}, {"order": "x"}, {"x": 1}),
]
FIELDS = [
    *("prompt", "size", "steps", "seed", "text_guidance", "audio_guidance", "shift", "color_correction", "max_seconds"),
    *("speakers", "scene_cuts", "webhook_url", "quality", "model", "seconds", "input_reference", "audio", "audio_2"),
    *("image", "nothing", "", "\0", "__class__", "a" * 300, "ü", "\ud800"),
]
FILES = ["input_reference", "audio", "audio_2", "image", "prompt", "poster", ""]
NAMES = ["a.png", "../../../a.png", "/etc/passwd", "a\0.png", "C:\\a.png", "ü.png", "." * 300, "", "a;b=c.png", "CON"]
TYPES = ["image/png", "text/plain", "text/plain; charset=utf-16", "x", "", "multipart/form-data", "a/b; c=\xff"]
HEADERS = [
    *(("Idempotency-Key", value) for value in ("", "a", "a" * 255, "a" * 256, "\xff\xfe", "'", "a,b")),
    *(("Content-Type", value) for value in ("", "x", "application/json; charset=utf-16", "multipart/form-data")),
    *(("Content-Type", value) for value in ("multipart/form-data; boundary=", "multipart/form-data; boundary=\xff")),
    *(("Content-Type", value) for value in ("application/x-www-form-urlencoded", "text/html", "a" * 9000)),
    *(("Last-Event-ID", value) for value in ("-1", "0", "9" * 100, "\xb2", "1e3", "")),
    *(
        ("Range", value)
        for value in ("bytes=0-", "bytes=-1", "bytes=9-1", "bytes=0-0,1-1", "x", "bytes=" + "0-0," * 99)
    ),
    *(("Accept", value) for value in ("", "text/html", "*/*;q=x")),
    *(("Accept-Encoding", "gzip"), ("If-Range", "x"), ("If-None-Match", "*"), ("Cookie", "a" * 4000), ("Host", "\xff")),
    *(("Authorization", "Bearer \xff"), ("X-API-Key", "\xff"), ("X-Forwarded-For", "x"), ("Content-Encoding", "gzip")),
    *(("traceparent", "00-x"), ("baggage", "=;"), ("X-BentoML-Request-ID", "\xff"), ("Bento-Name", "x")),
]
METHODS = ["GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS", "TRACE", "FOO"]


@dataclass
class Sent:
    """A request, as bytes but for its length."""

    method: str
    path: str
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    cut: bool = False
    """The caller goes away in mid-body."""


class Requests:
    """Makes the request with a number: the same again for the same seed, but for the ids of videos."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.ids: list[str] = []
        """Of videos that are there."""

    def make(self, number: int) -> Sent:
        chance = Chance(f"{self._seed} {number}")
        kinds = [self._media, self._form, self._json, self._address]
        sent = chance.choices(kinds, (5, 4, 3, 3))[0](chance)
        if chance.random() < 0.2:
            name, value = chance.choice(HEADERS)
            sent.headers = [header for header in sent.headers if header[0] != name] + [(name, value)]
        if chance.random() < 0.05:
            sent.body = mutated(chance, sent.body)
        if chance.random() < 0.02:
            sent.method = chance.choice(METHODS)
        if len(sent.body) > 1 and chance.random() < 0.03:
            sent.cut = True
        return sent

    def _media(self, chance: Chance) -> Sent:
        """A right request with files that are not."""
        generate = chance.random() < 0.25
        files = {
            "image" if generate else "input_reference": chance.choice(media()[chance.choice(("picture", "film"))]),
            "audio": chance.choice(media()["sound"]),
        }
        if chance.random() < 0.2:
            files["audio_2"] = chance.choice(media()["sound"])
        for name in chance.sample(sorted(files), chance.randint(1, len(files))):
            files[name] = mutated(chance, files[name])
        fields = [("size", "64x64"), ("steps", "1"), ("scene_cuts", chance.choice(("true", "false")))]
        parts = [_part(name, value.encode()) for name, value in fields]
        parts += [_part(name, content, "a.bin") for name, content in files.items()]
        return _multipart("/generate" if generate else "/v1/videos", parts)

    def _form(self, chance: Chance) -> Sent:
        """A form with wrong values, names and frames."""
        generate = chance.random() < 0.25
        right = media()
        parts = [_part("size", b"64x64"), _part("steps", b"1")]
        parts.append(_part("image" if generate else "input_reference", right["picture"][0], "a.png"))
        parts.append(_part("audio", right["sound"][0], "a.wav"))
        for _ in range(chance.randint(1, 3)):
            wrong = chance.randrange(5)
            if wrong == 0:
                parts.pop(chance.randrange(len(parts))) if parts else None
            elif wrong == 1 and parts:
                parts.append(chance.choice(parts))
            elif wrong == 2:
                name = chance.choice(FILES)
                content = mutated(chance, chance.choice(right["picture"]))
                parts.append(_part(name, content, chance.choice(NAMES), chance.choice(TYPES)))
            else:
                value = chance.choice(TEXTS) if chance.random() < 0.7 else json.dumps(chance.choice(VALUES))
                parts.append(_part(chance.choice(FIELDS), value.encode(errors="surrogatepass")))
        if chance.random() < 0.02:
            parts *= chance.choice((20, 200))
        if chance.random() < 0.02:
            parts.append(_part("prompt", b"a" * chance.choice((2**20 + 1, LIMIT))))
        chance.shuffle(parts)
        sent = _multipart("/generate" if generate else "/v1/videos", parts)
        if chance.random() < 0.1:
            sent.body = mutated(chance, sent.body)
        return sent

    def _json(self, chance: Chance) -> Sent:
        path = "/generate" if chance.random() < 0.25 else "/v1/videos"
        values: dict[str, Any] = {"size": "64x64", "steps": 1}
        for _ in range(chance.randint(1, 4)):
            values[chance.choice(FIELDS)] = chance.choice(TEXTS + VALUES)
        body = json.dumps(values, ensure_ascii=chance.random() < 0.5).encode(errors="surrogatepass")
        if chance.random() < 0.3:
            whole = [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"1e999"]
            whole += [body.decode(errors="replace").encode("utf-16"), b"\xef\xbb\xbf" + body, body * 2, body[:-1]]
            body = chance.choice(whole)
        return Sent("POST", path, [("Content-Type", "application/json")], body)

    def _address(self, chance: Chance) -> Sent:
        """Odd ids in paths, odd queries."""
        texts = [*TEXTS, "video_" + "0" * 24, ".", "..", "%2e%2e%2f", "%", "%zz", "%ff"]
        name = chance.choice(self.ids) if self.ids and chance.random() < 0.5 else chance.choice(texts)
        path = f"/v1/videos/{_quoted(chance, name)}" + chance.choice(("", "/content", "/events", "/cancel", "/", "/x"))
        if chance.random() < 0.3:
            path = chance.choice(("/v1/videos", "/generate", "/ping", "/openapi.json", "/docs.json", "//", "/" + path))
        keys = ["limit", "after", "order", "variant", "partial", "x", ""]
        queries = [
            f"{chance.choice(keys)}={_quoted(chance, chance.choice([*texts, *self.ids[-1:]]))}"
            for _ in range(chance.randint(0, 3))
        ]
        method = "DELETE" if path.count("/") == 3 and chance.random() < 0.2 else "GET"
        method = "POST" if path.endswith("/cancel") else method
        return Sent(method, path + ("?" + "&".join(queries) if queries else ""))


def _quoted(chance: Chance, text: str) -> str:
    """For a URL, well or badly."""
    if text.isascii() and text.isprintable() and " " not in text and chance.random() < 0.3:
        return text
    return quote(text.encode(errors="surrogatepass"), safe=chance.choice(("", "/")))


def _part(name: str, content: bytes, filename: str | None = None, kind: str | None = None) -> bytes:
    head = f'Content-Disposition: form-data; name="{name}"'
    head += "" if filename is None else f'; filename="{filename}"'
    head += "" if kind is None else f"\r\nContent-Type: {kind}"
    return head.encode(errors="surrogatepass") + b"\r\n\r\n" + content


def _multipart(path: str, parts: list[bytes]) -> Sent:
    boundary = b"0f0f0f0f0f"
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"
    return Sent("POST", path, [("Content-Type", f"multipart/form-data; boundary={boundary.decode()}")], body)


def send(url: str, sent: Sent) -> tuple[int, dict[str, str], bytes]:
    """The answer's status, headers and body; status 0 if there is none, as there need not be when the caller left."""
    host, _, port = url.removeprefix("http://").partition(":")
    lines = [f"{sent.method} {sent.path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in [("Host", host), *sent.headers, ("Connection", "close")]]
    head = "\r\n".join([*lines, f"Content-Length: {len(sent.body)}", "", ""]).encode("latin-1", "replace")
    with socket.create_connection((host, int(port)), ANSWER_SECONDS) as connection:
        if sent.cut:
            connection.sendall(head + sent.body[: len(sent.body) // 2])
            return 0, {}, b""
        with contextlib.suppress(ConnectionError):  # refused in mid-body: the answer is there all the same
            connection.sendall(head + sent.body)
        answer = HTTPResponse(connection, method=sent.method)
        answer.begin()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def judge(sent: Sent, status: int, headers: dict[str, str], body: bytes) -> str | None:
    """What is wrong with an answer."""
    if status >= 500:
        return f"{status}: {body[:300]!r}"
    if status < 400 or sent.method == "HEAD":
        return None
    if body == b"Invalid HTTP request received.":  # uvicorn's: what was sent is no HTTP, so no app has seen it
        return None
    try:
        right = is_of_the_caller(json.loads(body)["error"]) and headers["content-type"] == "application/json"
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        return f"{status}, not in our shape: {body[:300]!r}"
    return None


def is_of_the_caller(error: Any) -> bool:
    """Is this the object that tells callers of a mistake of theirs, and of nothing else?"""
    return (
        set(error) == {"type", "code", "message", "param"}
        and error["type"] == "invalid_request_error"
        and len(error["message"]) > 10
        and not any(trace in error["message"] for trace in ("Traceback", 'File "'))
    )


# The proof


def prove(
    home: Path,
    database_url: str | None,
    seed: int,
    numbers: range,
    progress: Callable[[range], Any] = lambda numbers: numbers,
) -> Report:
    """Send the requests with these numbers to a server of their own."""
    settings: dict[str, Any] = {"max_seconds": 5, "max_upload_bytes": LIMIT, "fetch_seconds": 2}
    settings |= {"max_queued": 10**6, "max_queued_per_key": 10**6}
    settings |= {"database_url": database_url} if database_url else {}
    report, requests = Report(), Requests(seed)

    def one(number: int) -> None:
        sent = requests.make(number)
        try:
            status, headers, body = send(served.url, sent)
            problem = judge(sent, status, headers, body)
        except TimeoutError:
            status, problem = -1, f"no answer within {ANSWER_SECONDS} s"
        except (OSError, HTTPException) as error:
            status, problem = -1, f"no answer: {error!r}"
            if any(name == "Host" for name, _ in sent.headers):  # two are no HTTP: uvicorn refuses, and reads no body
                problem = None
        report.statuses[_kind(status)] += 1
        if problem is not None:
            report.wrong.append(f"{number}: {sent.method} {sent.path[:200]} {sent.headers}: {problem}")
        if status == 200 and sent.method == "POST" and sent.path == "/v1/videos":
            requests.ids.append(json.loads(body)["id"])

    with Served(home, **settings) as served, ThreadPoolExecutor(THREADS) as pool:
        batches = [numbers[start : start + WARM] for start in range(0, len(numbers), WARM)]
        for batch in progress(batches):  # type: ignore[arg-type]
            list(pool.map(one, batch))
            _finish(served, report)
            requests.ids.clear()
            if report.before is None:
                report.before = served.footprint()
        report.after, report.files_left = served.footprint(), served.files()
        if not served.alive():
            report.wrong.append("a process died")
        _, *uncaught = served.log.split("Exception in ASGI application")
        report.wrong += [f"uncaught: {trace[-2000:]}" for trace in uncaught]
    grown = report.after.resident - report.before.resident if report.before else 0
    if grown > GROWTH_MB:
        report.wrong.append(f"{grown:.0f} MB more are resident")
    if report.before and report.after.open_files > report.before.open_files + GROWTH_FILES:
        report.wrong.append(f"{report.after.open_files} files are open, {report.before.open_files} before")
    if report.files_left:
        report.wrong.append(f"{report.files_left} files are left")
    return report


def _finish(served: Served, report: Report) -> None:
    """Wait for the jobs that were taken, see how they ended, and delete them."""
    videos = f"{served.url}/v1/videos"
    deadline = time.monotonic() + 300
    with httpx.Client(timeout=60) as client:
        while listed := client.get(videos, params={"limit": 100}).raise_for_status().json()["data"]:
            assert time.monotonic() < deadline, listed[:3]
            for job in listed:
                if job["status"] in ("completed", "failed", "cancelled"):
                    report.jobs[job["status"]] += 1
                    if job["error"] and job["error"]["type"] != "invalid_request_error":
                        report.wrong.append(f"job failed: {job}")
                    client.delete(f"{videos}/{job['id']}").raise_for_status()
            time.sleep(0.1)


def _kind(status: int) -> str:
    return {0: "the caller left", -1: "none"}.get(status, str(status))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="on each database (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first one (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    parser.add_argument("--only", choices=["sqlite", "postgresql"], help="one database")
    options = parser.parse_args()
    console, numbers = Console(), range(options.first, options.first + options.requests)
    broken = False
    with tempfile.TemporaryDirectory() as folder, databases(options.only) as addresses:
        for name, address in addresses.items():
            progress = partial(track, description=name, console=Console(stderr=True))
            report = prove(Path(folder) / name, address, options.seed, numbers, progress)
            table = Table(name, "")
            for status, count in sorted(report.statuses.items()):
                table.add_row(f"answers: {status}", str(count))
            for state, count in report.jobs.items():
                table.add_row(f"jobs: {state}", str(count))
            for when, footprint in (("after the first 500", report.before), ("after all", report.after)):
                table.add_row(f"the API, {when}", str(footprint))
            table.add_row("files left", str(report.files_left))
            table.add_row("wrong", str(len(report.wrong)))
            console.print(table)
            for problem in report.wrong[:50]:
                console.print(problem, markup=False, highlight=False)
            broken |= bool(report.wrong)
    if broken:
        raise SystemExit("A promise is broken.")


if __name__ == "__main__":
    main()
