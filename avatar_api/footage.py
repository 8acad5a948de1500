"""Footage: the pictures of a video at 25 per second, and where its scenes begin.

A video to be dubbed gives the model one picture for each clip, counted at 25 pictures per second of the video's own
time, whatever its frame rate. FFmpeg (PyAV) decodes it under the limits of `avatar_api.media`, as far as a picture is
asked for and no further. docs/MEDIA.md lists what happens to every odd file.
"""

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from io import FileIO
from itertools import dropwhile
from pathlib import Path
from typing import Protocol, Self, cast

import av
import numpy as np
from av import VideoFrame, VideoStream
from av.container import InputContainer
from av.sidedata.sidedata import SideDataContainer
from av.stream import Disposition
from numpy.typing import NDArray
from PIL import Image

from avatar_api.media import (
    MAX_PIXELS,
    check_size,
    damage_left_out,
    looks_like,
    open_container,
    open_file,
    over_white,
    packets,
    read_picture,
    refused,
)
from infinitetalk.timeline import FRAMES_PER_SECOND

LATE = Fraction(4, 1000)  # s: a picture that comes so much too late is in time; containers round their time stamps
SEEK_FROM = 20  # s: a picture further ahead is sought; nearer ones are reached by decoding what lies between
SEEK_BEFORE = 10  # s: seeking aims so much too early, to meet a picture that needs no other
LONGEST_REORDER = 1  # s: packets that jump back further do not belong to one recording

THUMBNAIL = 256  # pixels: the longer side; PySceneDetect's own default for what it compares
SHORTEST_SCENE = FRAMES_PER_SECOND  # frames

REMEDY = "send an MP4, MOV, WebM, MKV or AVI video, or a PNG, JPEG or WebP picture"

_Pixels = NDArray[np.uint8]
_Timed = tuple[int, VideoFrame]  # (when it is shown, in ticks of its stream's clock; the picture)


def read_reference(path: Path, param: str = "input_reference") -> "_Pixels | Footage":
    """Read what is to talk: a picture, by `read_picture`, or a video. The content decides; errors as theirs."""
    with open_file(path, param) as file:
        is_picture = looks_like(file).endswith("picture")
    return read_picture(path, param) if is_picture else Footage(path, param)


class Footage(Sequence[_Pixels]):
    """The pictures of a video at 25 per second, upright: a sequence of uint8 [height, width, 3] RGB.

    `footage[i]` is what a player shows i/25 s after the first picture; past the end it is the last one. A picture is
    decoded when it is asked for, so forwards is fast, and memory is that of a few pictures however long the video is.
    A context manager; without one, `close` it when done.
    """

    _shown: _Timed
    _next: _Timed | None

    def __init__(self, path: Path, param: str = "input_reference") -> None:
        """Read the file through once, without decoding it, for its length.

        Raises `InputError` for what is no video or cannot be decoded, for recordings whose clock jumps back, for sides
        under 16 pixels and for more than 50 megapixels (judged from the header, before decoding).
        """
        self._path, self._param = path, param
        with contextlib.ExitStack() as failed:
            self._file = failed.enter_context(open_file(path, param))
            self._container = _open_video(self._file, path, param)
            failed.callback(self.close)
            self._stream = _first_stream(self._container, path, param)
            self._tick = cast(Fraction, self._stream.time_base)  # s
            # AVI stores no times of display: FFmpeg makes them up, and wrong ones where pictures are reordered.
            self._by_decoding_times = self._container.format.name == "avi"
            start, end = self._measure()
            self._restart()
            self._origin, first = self._shown
            self._matrix = _display_matrix(first)
            self._size = _with_square_pixels(first, self._stream.sample_aspect_ratio)
            check_size(self._size, path, param)
            self.height, self.width = self._upright(first).shape[:2]
            seconds = (end - (start if self._by_decoding_times else self._origin)) * self._tick
            self._length = max(1, math.ceil((seconds - LATE) * FRAMES_PER_SECOND))
            failed.pop_all()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_Pixels]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> _Pixels:  # type: ignore[override]  # no slices: they would not fit in memory
        return self._upright(self._picture_at(index))

    def thumbnail(self, index: int) -> _Pixels:
        """The picture as it is stored, at most 256 pixels wide and high: far cheaper, and enough to compare."""
        shrink = max(1, max(self._size) / THUMBNAIL)
        width, height = (max(1, round(side / shrink)) for side in self._size)
        return _pixels(self._picture_at(index), "rgb24", width, height)

    def _picture_at(self, index: int) -> VideoFrame:
        if index < 0:
            raise IndexError(f"footage begins at picture 0; there is no {index}")
        seconds = Fraction(min(index, self._length - 1), FRAMES_PER_SECOND) + LATE
        time = self._origin + math.floor(seconds / self._tick)
        if time < self._shown[0] or (self._next and (time - self._next[0]) * self._tick > SEEK_FROM):
            self._go_before(time)
        while self._next and self._next[0] <= time:
            self._shown, self._next = self._next, next(self._pictures, None)
        return self._shown[1]

    def _measure(self) -> tuple[int, int]:
        """When the first picture begins and the last one ends, in ticks, as far as the file can be read."""
        rate = self._stream.average_rate
        usual = round(1 / rate / self._tick) if rate else 0
        latest = None
        start, end = sys.maxsize, -sys.maxsize
        for packet in packets(self._container, self._stream):
            time = packet.dts if self._by_decoding_times else packet.pts
            if time is None or packet.is_discard:  # discarded: an edit list leaves it out
                continue
            start, end = min(start, time), max(end, time + (packet.duration or usual))
            if packet.dts is not None:
                if latest is not None and packet.dts < latest - LONGEST_REORDER / self._tick:
                    problem = f"jumps back in time after {float((latest - start) * self._tick):.1f} s"
                    raise refused(self._path, self._param, f"{problem}; export it again as MP4", "damaged_file")
                latest = packet.dts
        return start, end

    def _restart(self) -> None:
        self._container.close()
        self._container = _open_video(self._file, self._path, self._param)
        self._stream = _first_stream(self._container, self._path, self._param)
        if not self._begin(self._decode()):
            problem = "holds no picture that can be decoded and has its time; export it again as MP4 with H.264"
            raise refused(self._path, self._param, problem, "damaged_file")

    def _begin(self, pictures: Iterator[_Timed]) -> bool:
        first = next(pictures, None)
        if first is None:
            return False
        self._pictures, self._shown = pictures, first
        self._next = next(pictures, None)
        return True

    def _go_before(self, time: int) -> None:
        """Go to a picture from which on all can be decoded, and which is not after `time`: if need be, to the first."""
        target = time - math.floor(SEEK_BEFORE / self._tick)
        if target > self._origin:
            with contextlib.suppress(av.FFmpegError):
                self._container.seek(target, stream=self._stream)
                # What comes before the first key picture may refer to pictures that were not decoded.
                sought = dropwhile(lambda picture: not picture[1].key_frame, self._decode())
                if self._begin(sought) and self._shown[0] <= time:
                    return
        self._restart()

    def _decode(self) -> Iterator[_Timed]:
        """All pictures in the order they are shown; damaged packets are left out."""
        time = None
        for packet in packets(self._container, self._stream):
            with damage_left_out():
                for picture in packet.decode():
                    stamp = picture.dts if self._by_decoding_times else picture.pts
                    if stamp is not None:
                        time = stamp
                    elif time is not None:
                        time += picture.duration
                    if time is not None:
                        yield time, picture

    def _upright(self, picture: VideoFrame) -> _Pixels:
        if any(component.is_alpha for component in picture.format.components):
            pixels = np.array(over_white(Image.fromarray(_pixels(picture, "rgba", *self._size))))
        else:
            pixels = _pixels(picture, "rgb24", *self._size)
        return _turned(pixels, self._matrix)

    def close(self) -> None:
        self._container.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _open_video(file: FileIO, path: Path, param: str) -> InputContainer:
    try:
        return open_container(file)
    except av.FFmpegError as error:
        problem = f"looks like {looks_like(file)}, and no video can be read from it; {REMEDY}"
        raise refused(path, param, problem) from error


def _first_stream(container: InputContainer, path: Path, param: str) -> VideoStream:
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise refused(path, param, f"has no pictures, or only a cover; {REMEDY}", "no_video")
    stream = streams[0]
    if stream.codec_context is None:
        raise refused(path, param, "is in a codec that is unknown here; export it again as MP4 with H.264")
    size = stream.codec_context.width, stream.codec_context.height
    if not all(size):  # FFmpeg forgets a size beyond its own limit
        problem = f"has no size that can be read, or more than {MAX_PIXELS:,} pixels: scale it down"
        raise refused(path, param, problem, "too_large")
    check_size(size, path, param)
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # for sizes that change on the way
    return stream


def _pixels(picture: VideoFrame, pixel_format: str, width: int, height: int) -> _Pixels:
    # One thread: FFmpeg 8's scaler with several does not always repeat itself.
    return np.asarray(picture.to_ndarray(format=pixel_format, width=width, height=height, threads=1), np.uint8)


def _with_square_pixels(picture: VideoFrame, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """(width, height) that nothing is lost in."""
    square = Fraction(1)
    aspect = pixel_aspect or square
    return round(picture.width * max(aspect, square)), round(picture.height * max(1 / aspect, square))


def _display_matrix(picture: VideoFrame) -> list[int]:
    """[a, b, u, c, d, v, x, y, w]: the stored pixel (p, q) is shown at (ap + cq + x, bp + dq + y), of MP4's header."""
    side_data = cast(SideDataContainer, picture.side_data)
    if "DISPLAYMATRIX" not in side_data:
        return [1, 0, 0, 0, 1, 0, 0, 0, 1]
    return np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), np.int32).tolist()


def _turned(pixels: _Pixels, matrix: list[int]) -> _Pixels:
    """Turned and flipped in quarters of a circle; other angles count as the nearest."""
    across, down = matrix[0], matrix[4]
    if abs(matrix[1]) + abs(matrix[3]) > abs(across) + abs(down):
        pixels = pixels.swapaxes(0, 1)
        across, down = matrix[3], matrix[1]
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


class Thumbnails(Protocol):
    """What scenes are found in: `Footage`, or what stands for it."""

    def __len__(self) -> int: ...

    def thumbnail(self, index: int, /) -> _Pixels: ...


def scene_starts(footage: Thumbnails, frames: int) -> list[int]:
    """The numbers of the pictures with which scenes begin, among the first `frames`; 0 is always the first.

    PySceneDetect's adaptive detector: a cut stands out from the pictures around it, so that neither fades nor a moving
    camera count. No scene is shorter than a second.
    """
    from scenedetect import AdaptiveDetector, FrameTimecode  # takes as long to import as all that decodes

    detector = AdaptiveDetector(min_scene_len=SHORTEST_SCENE)
    starts = [0]
    for index in range(min(frames, len(footage))):
        bgr = np.ascontiguousarray(footage.thumbnail(index)[..., ::-1])
        cuts = detector.process_frame(FrameTimecode(index, float(FRAMES_PER_SECOND)), bgr)
        starts += [cut.frame_num for cut in cuts]
    return starts
