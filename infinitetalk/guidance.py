"""Classifier-free guidance over two conditions, text and voice: which forwards a step needs, how they are combined."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

LARGE_AREA = 640 * 960
"""Pixels: the geometric mean of 640 x 640 and 960 x 960, the square sizes that the two shifts are published for."""


@dataclass(frozen=True)
class Pass:
    """One forward of the transformer: does it see the prompt (else the negative prompt), and does it hear the voice?"""

    prompt: bool
    voice: bool


CONDITIONAL = Pass(prompt=True, voice=True)
WITHOUT_TEXT = Pass(prompt=False, voice=True)
WITHOUT_VOICE = Pass(prompt=True, voice=False)
UNCONDITIONAL = Pass(prompt=False, voice=False)


def passes(text_scale: float) -> tuple[Pass, ...]:
    """The forwards of one denoising step: three, or two where text guidance is off (a scale of 1)."""
    if _is_one(text_scale):
        return CONDITIONAL, WITHOUT_VOICE
    return CONDITIONAL, WITHOUT_TEXT, UNCONDITIONAL


def combine(predictions: list[Tensor], text_scale: float, audio_scale: float) -> Tensor:
    """The guided prediction from those of `passes(text_scale)`, in that order and all of one shape.

    Three passes: uncond + s_t (cond - without_text) + s_a (without_text - uncond).
    Two passes: without_voice + s_a (cond - without_voice).
    """
    if len(predictions) == 2:
        conditional, without_voice = predictions
        return without_voice + audio_scale * (conditional - without_voice)
    conditional, without_text, unconditional = predictions
    text, voice = conditional - without_text, without_text - unconditional
    return unconditional + text_scale * text + audio_scale * voice


def timesteps(steps: int, shift: float) -> np.ndarray:
    """float32 [steps + 1] noise levels from 1000 down to 0: evenly spaced, then shifted towards the noisy end.

    t = s·x / (1 + (s - 1)·x) with x in (0, 1] (Esser et al. 2024, eq. 23). The final 0 is where the last step ends.
    """
    even = np.linspace(1000, 1, steps, dtype=np.float32) / np.float32(1000)
    shifted = np.float32(shift) * even / (1 + np.float32(shift - 1) * even) * np.float32(1000)
    return np.append(shifted, np.float32(0))


def default_shift(height: int, width: int) -> float:
    """The published shift for a video of that size in pixels: 7 at about 480p, 11 at about 720p."""
    return 7.0 if height * width <= LARGE_AREA else 11.0


def _is_one(scale: float) -> bool:
    return abs(scale - 1) < 1e-5
