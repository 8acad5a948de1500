"""A job's files: checked and laid into its folder when it is submitted, read from there by whoever runs it.

Nothing is decoded here: a `Decoder` does, in a process of its own.
"""

import contextlib
import hashlib
import math
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from avatar_api.decoder import Decoder, Pictures
from avatar_api.footage import scene_starts
from avatar_api.requests import VideoRequest
from infinitetalk.errors import InputError
from infinitetalk.geometry import output_size, speaker_regions
from infinitetalk.timeline import FRAMES_PER_SECOND, SAMPLE_RATE

Source = Callable[[Path], object]
"""Writes a caller's file to a path."""

VOICES = ("audio", "audio_2")

DECODERS = threading.BoundedSemaphore(4)
"""For requests: so many decoders at a time, however many come at once."""
RUNNER_SECONDS = 3600
"""What one answer may cost a runner. It has accepted the job, and its video may take days; going on late in a film
without key pictures means decoding all that comes before."""


@dataclass(frozen=True)
class Inputs:
    """What a video is made from."""

    request: VideoRequest
    reference: NDArray[np.uint8] | Pictures
    voice_files: Sequence[Path | None]
    """One per speaker; None for one who is silent."""
    decoder: Decoder

    def read_voices(self) -> list[NDArray[np.float32] | None]:
        return [
            None if voice is None else self.decoder.read_voice(voice, param)
            for voice, param in zip(self.voice_files, VOICES, strict=False)
        ]

    def scene_starts(self, voices: Sequence[NDArray[np.float32] | None]) -> list[int]:
        if not self.request.scene_cuts or not isinstance(self.reference, Pictures):
            return [0]
        spoken = sum(len(voice) for voice in voices if voice is not None)
        return scene_starts(self.reference, spoken * FRAMES_PER_SECOND // SAMPLE_RATE + 1)

    def join(self, video: Path, segments: Sequence[Path]) -> int:
        """Make one video of its silent pieces and the voices; returns how many frames it has."""
        return self.decoder.join(video, segments, self.voice_files, self.request.speakers.order)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.decoder.close()


@dataclass(frozen=True)
class Planned:
    """The video that a request and its files will come to."""

    seconds: float
    height: int
    width: int


def lay_down(
    request: VideoRequest,
    files: Mapping[str, Source],
    folder: Path,
    max_seconds: float,
    reference: str,
    judge: Callable[[Planned], object] = lambda planned: None,
) -> dict[str, Any]:
    """Put a caller's files into a job's folder, judge them with the request, and return the job's specification.

    files: by the caller's names for them, `reference` (a picture or a video), "audio" and "audio_2". Without a voice, a
    video speaks with its own. max_seconds: the longest voice that is taken, unless the request ends the video earlier.
    judge: has the last word, and raises InputError. Raises InputError, and then leaves nothing behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, save in files.items():
            save(folder / name)
        if reference not in files:
            raise InputError(reference, f"no {reference} was sent; send a picture or a video.", "missing")
        two = "audio_2" in files or request.speakers.boxes is not None
        voices: list[str | None] = [name if name in files else None for name in VOICES[: 2 if two else 1]]
        with DECODERS, Decoder(decoding_seconds(max_seconds)) as decoder:
            picture = decoder.open(folder / reference, reference)
            if not any(voices):
                if not picture.moving:
                    wanted = f"send a voice, or a video with sound as the {reference}"
                    raise InputError("audio", f"no audio was sent; {wanted}.", "missing")
                voices[0] = reference
            seconds = 0.0
            for voice, param in zip(voices, VOICES, strict=False):
                if voice is not None:
                    longest = (max_seconds if request.max_seconds is None else request.max_seconds) + 1
                    lasts = decoder.voice_seconds(folder / voice, param, longest)
                    seconds = seconds + lasts if request.speakers.order == "in_turn" else max(seconds, lasts)
        if request.max_seconds is None and seconds > max_seconds:
            remedy = "send a shorter one, or end the video earlier with max_seconds"
            raise InputError("audio", f"audio lasts more than {max_seconds:g} s, the limit here; {remedy}.", "too_long")
        source = picture.height, picture.width
        height, width = output_size(request.size, *source)
        if two:
            speaker_regions(request.speakers.boxes or [None, None], source, (height, width))
        judge(Planned(min(seconds, request.max_seconds or seconds), height, width))
    except BaseException:
        shutil.rmtree(folder)
        raise
    digests = {name: _digest(folder / name) for name in files}
    return {"request": request.model_dump(), "reference": reference, "voices": voices, "files": digests}


def pick_up(spec: Mapping[str, Any], folder: Path, on_wait: Callable[[], None] = lambda: None) -> Inputs:
    """The inputs of a job that `lay_down` specified. `on_wait` is called while something is decoded; it may raise."""
    request = VideoRequest.judge(spec["request"])
    with contextlib.ExitStack() as failed:
        decoder = failed.enter_context(Decoder(RUNNER_SECONDS, on_wait))
        pictures = decoder.open(folder / spec["reference"], spec["reference"])
        reference = pictures if pictures.moving else pictures[0]
        failed.pop_all()
    return Inputs(request, reference, voice_files(spec, folder), decoder)


def voice_files(spec: Mapping[str, Any], folder: Path) -> list[Path | None]:
    """One per speaker; None for one who is silent."""
    return [None if name is None else folder / name for name in spec["voices"]]


def decoding_seconds(media_seconds: float) -> int:
    """What one answer may cost while a request waits for it, in seconds of computing.

    Ten times what decoding a voice of that length takes, three times what joining clips with it takes, and two minutes
    for pictures (docs/PERFORMANCE.md).
    """
    return 120 + math.ceil(media_seconds / 10)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
