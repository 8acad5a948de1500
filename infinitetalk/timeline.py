"""How a voice of any length becomes overlapping clips. Plain arithmetic on frame numbers, no tensors.

Every clip has the same number of frames. Each clip after the first begins with the last `motion_frames` frames of the
one before, given to the model as they are and not shown again. When the voice ends inside the last clip it is played
backwards from there, so that the model never hears a sudden end; those frames are cut off again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from infinitetalk.errors import InputError

FRAMES_PER_SECOND = 25
SAMPLE_RATE = 16000  # Hz: what the speech encoder hears
AUDIO_WINDOW = 5
"""Audio frames that the model hears around each video frame: two before, itself, two after."""


@dataclass(frozen=True)
class Timeline:
    """The clips of one video, or of one scene of it."""

    voice_frames: tuple[int, ...]
    """The voices' lengths in video frames, one per speaker."""
    frames_per_clip: int
    motion_frames: int
    total_frames: int
    clips: int
    begins_at: int = 0
    """The video's frame that a scene begins at; its frames and the voices' are counted from the video's first."""

    @property
    def stride(self) -> int:
        """New frames per clip after the first."""
        return self.frames_per_clip - self.motion_frames

    def start(self, clip: int) -> int:
        """The first frame of a clip, its motion frames included."""
        return self.begins_at + clip * self.stride

    def new_frames(self, clip: int) -> range:
        """The frames of a clip that the video shows, counted from the clip's own first frame."""
        first = 0 if clip == 0 else self.motion_frames
        return range(first, min(self.frames_per_clip, self.total_frames - clip * self.stride))

    def audio_window(self, clip: int, speaker: int) -> list[list[int]]:
        """[frames_per_clip][5] numbers of the voice's frames that the model hears around each frame of a clip."""
        length = self.voice_frames[speaker]
        start, end = clip * self.stride, clip * self.stride + self.frames_per_clip
        reach = AUDIO_WINDOW // 2
        mirrored = clip == self.clips - 1 and end >= length

        def source(frame: int) -> int:
            if not mirrored:
                return self.begins_at + min(max(frame, 0), length - 1)
            position = max(frame, 0) % (2 * length)
            return self.begins_at + (position if position < length else 2 * length - 1 - position)

        return [[source(frame + offset) for offset in range(-reach, reach + 1)] for frame in range(start, end)]


def plan(
    voice_frames: Sequence[int],
    frames_per_clip: int = 81,
    motion_frames: int = 9,
    max_frames: int | None = None,
    reference_quirks: bool = False,
) -> Timeline:
    """Cut voices of the given lengths (in video frames, one per speaker) into clips.

    The video is as long as the longest voice, or `max_frames` if that is shorter. With `reference_quirks`, voices no
    longer than a clip are refused, and of two voices the first decides how many clips there are, as the published
    code does. Raises InputError for lengths that the model cannot take.
    """
    for name, frames in (("frames_per_clip", frames_per_clip), ("motion_frames", motion_frames)):
        if frames < 1 or frames % 4 != 1:
            raise InputError(name, f"{name} is {frames}; it must be 4n + 1 (the VAE packs 4 frames into one latent).")
    if motion_frames >= frames_per_clip:
        raise InputError("motion_frames", f"motion_frames is {motion_frames}; a clip has only {frames_per_clip}.")
    if max_frames is not None and max_frames < 1:
        raise InputError("max_frames", f"max_frames is {max_frames}; it must be at least 1.")
    if min(voice_frames) < 1:
        raise InputError("audio", "a voice is shorter than one video frame (0.04 s).", "too_short")
    if reference_quirks and min(voice_frames) <= frames_per_clip:
        raise InputError(
            "audio", f"a voice of {min(voice_frames)} frames is no longer than a clip of {frames_per_clip}."
        )

    deciding = voice_frames[0] if reference_quirks else max(voice_frames)
    wanted = deciding if max_frames is None else min(deciding, max_frames)
    stride = frames_per_clip - motion_frames
    clips = 1 + max(0, -(-(wanted - frames_per_clip) // stride))
    if reference_quirks:
        limits = [clips * stride + motion_frames, voice_frames[-1]]
        total = min(limits if max_frames is None else [*limits, max_frames])
    else:
        total = wanted
    return Timeline(tuple(voice_frames), frames_per_clip, motion_frames, total, clips)


def plan_scenes(
    scene_starts: Sequence[int],
    voice_frames: Sequence[int],
    frames_per_clip: int,
    motion_frames: int,
    max_frames: int | None,
    reference_quirks: bool,
) -> list[Timeline]:
    """A timeline for each scene of a video, from the scenes' first frames; otherwise as `plan`.

    A scene that begins after the voice's end is left out.
    """
    if not scene_starts or scene_starts[0] != 0 or any(later <= start for start, later in pairwise(scene_starts)):
        problem = "give each scene's first frame, in their order, the first one 0"
        raise InputError("scene_starts", f"scene_starts is {list(scene_starts)}; {problem}.")
    whole = plan(voice_frames, frames_per_clip, motion_frames, max_frames, reference_quirks)
    if len(scene_starts) == 1:
        return [whole]
    bounds = [start for start in scene_starts if start < whole.total_frames] + [whole.total_frames]
    return [
        replace(plan([end - start] * len(voice_frames), frames_per_clip, motion_frames), begins_at=start)
        for start, end in pairwise(bounds)
    ]
