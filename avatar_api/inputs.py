"""A job's files: checked and laid into its folder when it is submitted, read from there by whoever runs it."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avatar_api.footage import Footage, read_reference, scene_starts
from avatar_api.media import read_voice
from avatar_api.requests import VideoRequest
from infinitetalk.errors import InputError
from infinitetalk.geometry import output_size, speaker_regions
from infinitetalk.timeline import FRAMES_PER_SECOND

SAMPLE_RATE = 16000


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
        return output_size(self.request.size, *self._source)

    def read_voices(self) -> list[NDArray[np.float32] | None]:
        return [None if voice is None else read_voice(voice) for voice in self.voice_files]

    def scene_starts(self, voices: Sequence[NDArray[np.float32] | None]) -> list[int]:
        if not self.request.scene_cuts or not isinstance(self.reference, Footage):
            return [0]
        spoken = sum(len(voice) for voice in voices if voice is not None)
        return scene_starts(self.reference, spoken * FRAMES_PER_SECOND // SAMPLE_RATE + 1)

    @property
    def _source(self) -> tuple[int, int]:
        if isinstance(self.reference, Footage):
            return self.reference.height, self.reference.width
        return self.reference.shape[0], self.reference.shape[1]

    def close(self) -> None:
        if isinstance(self.reference, Footage):
            self.reference.close()


def lay_down(request: VideoRequest, files: Mapping[str, Path | None], folder: Path) -> dict[str, Any]:
    """Copy a caller's files into a job's folder, judge them with the request, and return the job's specification.

    files: by the caller's names for them, "image" (a picture or a video), "audio" and "audio_2". Without a voice, a
    video speaks with its own. Raises InputError, and then leaves no folder behind.
    """
    folder.mkdir(parents=True)
    try:
        stored = {name: shutil.copyfile(file, folder / name) for name, file in files.items() if file is not None}
        if "image" not in stored:
            raise InputError("image", "no image was sent; send a picture or a video.", "missing")
        two = "audio_2" in stored or request.speakers.boxes is not None
        voices = [name if name in stored else None for name in ("audio", "audio_2")[: 2 if two else 1]]
        reference = read_reference(stored["image"], "image")
        if not any(voices):
            if not isinstance(reference, Footage):
                raise InputError(
                    "audio", "no audio was sent; send a voice, or a video with sound as the image.", "missing"
                )
            voices[0] = "image"
        inputs = Inputs(request, reference, [None if name is None else folder / name for name in voices])
        try:
            for name in voices:
                if name is not None:
                    read_voice(folder / name, "audio" if name == "image" else name, max_seconds=1)
            if two:
                speaker_regions(request.speakers.boxes or [None, None], inputs._source, inputs.size)
        finally:
            inputs.close()
    except InputError:
        shutil.rmtree(folder)
        raise
    return {"request": request.model_dump(), "reference": "image", "voices": voices}


def pick_up(spec: Mapping[str, Any], folder: Path) -> Inputs:
    """The inputs of a job that `lay_down` specified."""
    voices = [None if name is None else folder / name for name in spec["voices"]]
    return Inputs(VideoRequest.judge(spec["request"]), read_reference(folder / spec["reference"], "image"), voices)
