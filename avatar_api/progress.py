"""What callers are told while their video is made: the stage, the clip, the step, and how long it will still take."""

import time
from collections.abc import Callable
from typing import Any

from avatar_api import metrics

PREPARING, GENERATING, ENCODING, UPLOADING = "preparing", "generating", "encoding", "uploading"


class Progress:
    """Learns from a job's own steps how long they take, and from its own clips how long the rest of a clip takes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self._steps = 0
        self._step_seconds = 0.0
        self._between = 0.0  # seconds that clips took beside their steps
        self._clips_between = 0

    def step(self, clip: int, clips: int, step: int, steps: int) -> dict[str, Any]:
        """Step `step` of clip `clip` is done; both count from 0."""
        now = self._clock()
        taken, self._last = now - self._last, now
        if step == 0:  # with the decoding of the clip before, and for the first one the encoding of the prompt
            self._between += taken
            self._clips_between += 1
        else:
            self._steps += 1
            self._step_seconds += taken
            metrics.STEP_SECONDS.observe(taken)
        done = clip * steps + step + 1
        report = {
            "stage": GENERATING,
            "clip": clip + 1,
            "clips": clips,
            "step": step + 1,
            "steps": steps,
            "percent": round(100 * done / (clips * steps), 1),
        }
        if self._steps:
            a_step = self._step_seconds / self._steps
            a_clip = max(self._between / self._clips_between, a_step) + (steps - 1) * a_step
            left = (steps - step - 1) * a_step + (clips - clip - 1) * a_clip
            report["eta_seconds"] = round(left, 1)
        return report
