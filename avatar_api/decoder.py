"""Decoding in a process of its own: whatever a caller's file does to its decoder, the service goes on.

FFmpeg, libsndfile and Pillow parse what strangers send. They do it in a child with limits of memory and time, which
has none of the service's secrets in its environment and ends with its parent; `fork_server` starts it in milliseconds.
It answers in JSON and plain numbers: no answer is ever executed. A file's faults arrive as the `InputError`s that they
are; a child that runs into a limit, or crashes, becomes one.

    with Decoder(seconds=120) as decoder:
        pictures = decoder.open(folder / "input_reference", "input_reference")
        voice = decoder.read_voice(folder / "audio", "audio")
"""

import contextlib
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from avatar_api.footage import Footage, read_reference
from avatar_api.fork_server import Child, ForkServer, serve
from avatar_api.media import read_voice, refused
from avatar_api.video_writer import VideoWriter, open_written
from infinitetalk.errors import InputError
from infinitetalk.timeline import SAMPLE_RATE

MEMORY = 4 * 2**30
"""Bytes of address space of a child. Its libraries take a tenth, a voice of two hours another; the rest is for videos,
whose decoders keep up to 16 pictures."""
PATIENCE = 4
"""How many seconds may pass for each second that an answer may compute: other processes want the processors too."""
TICK = 0.2  # seconds between two calls of `on_wait`
LIVES = 2  # a child that somebody else killed is started again, once

# All of the environment that the child gets: what finds and reads its code, and what keeps threads from reserving
# memory that nobody uses.
INHERITED = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH")
FRUGAL = {"MALLOC_ARENA_MAX": "2", "OPENBLAS_NUM_THREADS": "1"}

_SERVER = ForkServer(
    __spec__.name, lambda: {name: os.environ[name] for name in INHERITED if name in os.environ} | FRUGAL
)
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # signals that no decoder causes

_Pixels = NDArray[np.uint8]
_Samples = NDArray[np.float32]


class DecoderError(RuntimeError):
    """The child failed, and no file of a caller's is to blame."""


class Decoder:
    """A child that decodes, one request after the other; started when it is needed.

    A context manager.
    """

    def __init__(self, seconds: int, on_wait: Callable[[], None] = lambda: None) -> None:
        """seconds: of computing for one answer. `on_wait` is called with each request, and several times a second
        while the answer is awaited; what it raises ends the child."""
        self._seconds, self._on_wait = seconds, on_wait
        self._child: Child | None = None

    def open(self, path: Path, param: str) -> "Pictures":
        """`footage.read_reference`, its errors included."""
        return Pictures(self, path, param, *self._ask("open", path, param))

    def picture(self, path: Path, param: str, index: int) -> _Pixels:
        """uint8 [height, width, 3] RGB, of a picture or of a video's pictures at 25 per second."""
        return self._ask("picture", path, param, index)

    def thumbnail(self, path: Path, param: str, index: int) -> _Pixels:
        """Of a video, `Footage.thumbnail`."""
        return self._ask("thumbnail", path, param, index)

    def read_voice(self, path: Path, param: str) -> _Samples:
        """`media.read_voice`, its errors included."""
        return self._ask("voice", path, param)

    def voice_seconds(self, path: Path, param: str, max_seconds: float) -> float:
        """How long a voice lasts, `max_seconds` at most. Errors as `media.read_voice`."""
        return float(self._ask("voice_seconds", path, param, max_seconds))

    def join(self, video: Path, segments: Sequence[Path], sounds: Sequence[Path | None], order: str) -> int:
        """Join silent pieces of a video by `media.VideoWriter`, with sound; returns how many frames it has."""
        blamed = next(sound for sound in sounds if sound is not None)
        names = [None if sound is None else _absolute(sound) for sound in sounds]
        try:
            pieces = [_absolute(segment) for segment in segments]
            return int(self._ask("join", blamed, "audio", _absolute(video), pieces, names, order))
        except BaseException:  # a child that is killed cannot clean up
            video.with_name(f"{video.name}.part").unlink(missing_ok=True)
            raise

    def _ask(self, task: str, path: Path, param: str, *further: Any) -> Any:
        request = json.dumps([task, _absolute(path), param, *further]).encode() + b"\n"
        for _ in range(LIVES):
            try:
                answer = self._exchange(request)
                break
            except (EOFError, ConnectionError):
                ended_by = self._end()
            except TimeoutError:
                self._end()
                ended_by = -signal.SIGXCPU
            except BaseException:
                self._end()
                raise
            if ended_by >= 0:
                raise DecoderError(f"The decoder ended with exit code {ended_by}; the log may say why.")
            if ended_by == -signal.SIGXCPU:
                problem = f"takes more than {self._seconds} s to decode; send a shorter or a smaller one"
                raise refused(path, param, problem, "too_slow")
            if -ended_by not in _FROM_OUTSIDE:
                _SERVER.renew()  # who tries to take a decoder over shall not meet the same addresses again
                crash = signal.Signals(-ended_by).name
                problem = f"makes its decoder crash ({crash}); export it again, as PNG, MP4 (H.264) or WAV"
                raise refused(path, param, problem, "damaged_file")
        else:  # the kernel does so when memory runs out, and takes this child first
            problem = "needs more memory than there is now; send a smaller one, or try again later"
            raise refused(path, param, problem, "too_large")
        if isinstance(answer, InputError | OSError):
            raise answer
        return answer

    def _exchange(self, request: bytes) -> Any:
        """The child's answer. Raises EOFError or ConnectionError if it has died, TimeoutError if it takes too long."""
        channel = (self._child or self._start()).channel
        deadline = time.monotonic() + PATIENCE * self._seconds
        channel.sendall(request)
        self._on_wait()
        while not wait([channel], TICK):
            self._on_wait()
            if time.monotonic() > deadline:
                raise TimeoutError
        kind, content = json.loads(self._read(*struct.unpack(">I", self._read(4))))
        if kind == "refused":
            return InputError(**content)
        if kind == "disk":
            return OSError(*content)
        if kind == "failed":
            raise DecoderError(f"The decoder failed:\n{content}")
        if kind == "array":
            return self._read_array(**content)
        return content

    def _read(self, count: int) -> bytes:
        content = self._answers.read(count)
        if len(content) < count:
            raise EOFError
        return content

    def _read_array(self, dtype: str, shape: list[int]) -> NDArray[Any]:
        if dtype not in ("uint8", "float32") or math.prod(shape) * np.dtype(dtype).itemsize > MEMORY:
            raise DecoderError(f"The decoder answered with {dtype} {shape}.")
        array = np.empty(shape, dtype)
        if self._answers.readinto(array.reshape(-1).view(np.uint8).data) < array.nbytes:
            raise EOFError
        return array

    def _start(self) -> Child:
        self._child = child = _SERVER.start(MEMORY, self._seconds)
        child.channel.settimeout(PATIENCE * self._seconds)  # for an answer that begins and does not end
        self._answers = child.channel.makefile("rb")
        return child

    def _end(self) -> int:
        """What the child ended with, as `Child.end` has it; as if it had been killed, where there is none."""
        child, self._child = self._child, None
        if child is None:
            return -signal.SIGKILL
        self._answers.close()
        return child.end()

    def close(self) -> None:
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Pictures(Sequence[_Pixels]):
    """What is to talk, open in the child: a picture, or a video's pictures at 25 per second, as `Footage` has them."""

    decoder: Decoder
    path: Path
    param: str
    moving: bool
    """Is it a video?"""
    length: int
    height: int
    width: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[_Pixels]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> _Pixels:  # type: ignore[override]  # as of Footage
        return self.decoder.picture(self.path, self.param, index)

    def thumbnail(self, index: int) -> _Pixels:
        return self.decoder.thumbnail(self.path, self.param, index)


def _absolute(path: Path) -> str:
    return str(path.absolute())  # the child's folder is another


def main(memory: int, seconds: int) -> None:
    """The child: answers requests from its standard input, a socket, until the other end is closed."""
    with contextlib.suppress(OSError):  # when memory runs out, better this process than the one with the models
        Path("/proc/self/oom_score_adj").write_text("1000")
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, memory)
    channel = socket.socket(fileno=sys.stdin.fileno()).makefile("rwb")
    for request in channel:
        task, path, param, *further = json.loads(request)
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + seconds)
        _limit(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY if task == "join" else 0)
        kind, content = _answer(task, Path(path), param, further, memory)
        array = np.empty(0, np.uint8)
        if isinstance(content, np.ndarray):
            kind, array, content = "array", content, {"dtype": content.dtype.name, "shape": content.shape}
        header = json.dumps([kind, content]).encode()
        channel.write(struct.pack(">I", len(header)) + header)
        channel.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        channel.flush()


def _limit(kind: int, value: int) -> None:
    """Only as far as it goes: a limit that this process was started with stands."""
    highest = resource.getrlimit(kind)[1]
    if highest != resource.RLIM_INFINITY and not 0 <= value <= highest:
        value = highest
    resource.setrlimit(kind, (value, highest))


def _answer(task: str, path: Path, param: str, further: Sequence[Any], memory: int) -> tuple[str, Any]:
    """What kind of answer it is, and the answer."""
    try:
        return "value", _TASKS[task](path, param, *further)
    except InputError as refusal:
        error = refusal
    except MemoryError:
        problem = f"needs more than {memory / 2**30:g} GB of memory to decode; send a smaller or a shorter one"
        error = refused(path, param, problem, "too_large")
    except OSError as trouble:  # the disk's
        return "disk", [trouble.errno, trouble.strerror, trouble.filename]
    except Exception:
        return "failed", traceback.format_exc()
    return "refused", {"param": error.param, "message": str(error), "code": error.code}


@lru_cache(1)  # a job has one
def _reference(path: Path, param: str) -> _Pixels | Footage:
    return read_reference(path, param)


def _open(path: Path, param: str) -> tuple[bool, int, int, int]:
    reference = _reference(path, param)
    if isinstance(reference, Footage):
        return True, len(reference), reference.height, reference.width
    return False, 1, *reference.shape[:2]


def _picture(path: Path, param: str, index: int) -> _Pixels:
    reference = _reference(path, param)
    return reference[index] if isinstance(reference, Footage) else reference


def _thumbnail(path: Path, param: str, index: int) -> _Pixels:
    return cast(Footage, _reference(path, param)).thumbnail(index)


def _voice_seconds(path: Path, param: str, max_seconds: float) -> float:
    return len(read_voice(path, param, max_seconds)) / SAMPLE_RATE


def _join(path: Path, param: str, video: str, segments: Sequence[str], sounds: Sequence[str | None], order: Any) -> int:
    with open_written(Path(segments[0])) as segment:
        picture = segment.streams.video[0]
        width, height = picture.width, picture.height
    files = [None if sound is None else Path(sound) for sound in sounds]
    with VideoWriter(Path(video), width, height, files, order) as writer:
        for piece in segments:
            writer.append(Path(piece))
    return writer.frames


_TASKS: dict[str, Callable[..., Any]] = {
    "open": _open,
    "picture": _picture,
    "thumbnail": _thumbnail,
    "voice": read_voice,
    "voice_seconds": _voice_seconds,
    "join": _join,
}

if __name__ == "__main__":
    serve(main)
