"""A pipeline that takes no time, for proofs about everything around it: jobs, files, HTTP, kills.

It takes the arguments of `InfiniteTalkPipeline.generate` and yields its clips; its pictures are noise instead of
people. Each clip's depend on the seed and on the state that the one before left, as the model's do: a video that was
begun again in the wrong place, or from the wrong state, is another video.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from infinitetalk.clips import Clip, ClipState, Speaker, Step
from infinitetalk.geometry import output_size
from infinitetalk.memory import IN_PLACE
from infinitetalk.settings import Settings
from infinitetalk.timeline import FRAMES_PER_SECOND, SAMPLE_RATE

FRAMES = 10  # of each clip
BLOCK = 8  # pixels that have one colour
STEP_SECONDS = 0.01


class StandIn:
    device, preset = torch.device("cpu"), IN_PLACE
    memory = "a stand-in: nothing is loaded"

    def __init__(self, notes: Path | None = None) -> None:
        """notes: a file that gets a line for every clip that is begun: the prompt, the clip's index, and the time."""
        self._notes = notes

    def generate(
        self,
        reference: np.ndarray | Sequence[np.ndarray],
        speakers: Sequence[Speaker],
        prompt: str,
        settings: Settings,
        *,
        scene_starts: Sequence[int],
        on_step: Callable[[Step], None],
        resume_from: ClipState | None,
    ) -> Iterator[Clip]:
        picture = reference if isinstance(reference, np.ndarray) else reference[0]
        height, width = output_size(settings.size, *picture.shape[:2])
        spoken = max(len(speaker.voice) for speaker in speakers if speaker.voice is not None)
        frames = min(-(-spoken * FRAMES_PER_SECOND // SAMPLE_RATE), settings.max_frames or spoken)
        clips = -(-frames // FRAMES)
        generator = torch.Generator().manual_seed(settings.seed)
        motion = torch.zeros(3, 1, height, width)
        if resume_from is not None:
            motion = resume_from.motion
            generator.set_state(resume_from.random_state)
        for index in range(resume_from.clip if resume_from else 0, clips):
            if self._notes is not None:
                with self._notes.open("a") as notes:
                    notes.write(f"{prompt} {index} {time.time()}\n")
            for step in range(settings.steps):
                time.sleep(STEP_SECONDS)
                on_step(Step(index, clips, step, settings.steps, motion))
            new = min(FRAMES, frames - index * FRAMES)
            noise = torch.rand(3, new, height // BLOCK, width // BLOCK, generator=generator)
            video = motion / 2 + noise.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3) - 0.5
            motion = video[:, -1:].clone()
            state = None if index + 1 == clips else ClipState(index + 1, motion, generator.get_state())
            yield Clip(index, clips, video, state)
