"""A job's files: checked and laid into its folder when it is submitted, read from there by whoever runs it."""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from avatar_api.footage import Footage, read_reference, scene_starts
from avatar_api.media import SAMPLE_RATE, read_voice
from avatar_api.requests import VideoRequest
from infinitetalk.errors import InputError
from infinitetalk.geometry import output_size, speaker_regions
from infinitetalk.timeline import FRAMES_PER_SECOND

Source = Callable[[Path], object]
"""Writes a caller's file to a path."""


@dataclass(frozen=True)
class Inputs:
    """What a video is made from."""

    request: VideoRequest
    reference: NDArray[np.uint8] | Footage
    voice_files: Sequence[Path | None]
    """One per speaker; None for one who is silent."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the video."""
        return output_size(self.request.size, *self.source)

    def read_voices(self) -> list[NDArray[np.float32] | None]:
        return [None if voice is None else read_voice(voice) for voice in self.voice_files]

    def scene_starts(self, voices: Sequence[NDArray[np.float32] | None]) -> list[int]:
        if not self.request.scene_cuts or not isinstance(self.reference, Footage):
            return [0]
        spoken = sum(len(voice) for voice in voices if voice is not None)
        return scene_starts(self.reference, spoken * FRAMES_PER_SECOND // SAMPLE_RATE + 1)

    @property
    def source(self) -> tuple[int, int]:
        """Height and width of the picture or video."""
        if isinstance(self.reference, Footage):
            return self.reference.height, self.reference.width
        return self.reference.shape[0], self.reference.shape[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self.reference, Footage):
            self.reference.close()


def lay_down(
    request: VideoRequest, files: Mapping[str, Source], folder: Path, max_seconds: float, reference: str
) -> dict[str, Any]:
    """Put a caller's files into a job's folder, judge them with the request, and return the job's specification.

    files: by the caller's names for them, `reference` (a picture or a video), "audio" and "audio_2". Without a voice, a
    video speaks with its own. max_seconds: the longest voice that is taken, unless the request ends the video earlier.
    Raises InputError, and then leaves nothing behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, save in files.items():
            save(folder / name)
        if reference not in files:
            raise InputError(reference, f"no {reference} was sent; send a picture or a video.", "missing")
        two = "audio_2" in files or request.speakers.boxes is not None
        voices: list[str | None] = [name if name in files else None for name in ("audio", "audio_2")[: 2 if two else 1]]
        picture = read_reference(folder / reference, reference)
        if not any(voices):
            if not isinstance(picture, Footage):
                wanted = f"send a voice, or a video with sound as the {reference}"
                raise InputError("audio", f"no audio was sent; {wanted}.", "missing")
            voices[0] = reference
        with Inputs(request, picture, [None if name is None else folder / name for name in voices]) as inputs:
            seconds = 0.0
            for voice_name in voices:
                if voice_name is not None:
                    longest = 1 if request.max_seconds is not None else max_seconds + 1
                    voice = read_voice(folder / voice_name, "audio" if voice_name == reference else voice_name, longest)
                    lasts = len(voice) / SAMPLE_RATE
                    seconds = seconds + lasts if request.speakers.order == "in_turn" else max(seconds, lasts)
            if request.max_seconds is None and seconds > max_seconds:
                remedy = "send a shorter one, or end the video earlier with max_seconds"
                raise InputError(
                    "audio", f"audio lasts more than {max_seconds:g} s, the limit here; {remedy}.", "too_long"
                )
            if two:
                speaker_regions(request.speakers.boxes or [None, None], inputs.source, inputs.size)
    except BaseException:
        shutil.rmtree(folder)
        raise
    digests = {name: _digest(folder / name) for name in files}
    return {"request": request.model_dump(), "reference": reference, "voices": voices, "files": digests}


def pick_up(spec: Mapping[str, Any], folder: Path) -> Inputs:
    """The inputs of a job that `lay_down` specified."""
    voices = [None if name is None else folder / name for name in spec["voices"]]
    reference = read_reference(folder / spec["reference"], spec["reference"])
    return Inputs(VideoRequest.judge(spec["request"]), reference, voices)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
