"""Classifier-free guidance over two conditions, text and voice: which forwards a step needs, how they are combined."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
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


@dataclass
class ProjectedGuidance:
    """Adaptive projected guidance (arXiv:2410.02416) along one condition; it remembers, so each clip takes a new one.

    Of the difference that the condition makes, only the part at right angles to the conditional prediction is used,
    which is the part that does not oversaturate; its length is bounded, and earlier steps are partly taken back.
    """

    momentum: float
    """Share of the steps before; negative to take back."""
    threshold: float
    """Largest length (2-norm over all elements) of a difference; 0: any."""
    _average: Tensor | None = None

    def __call__(self, difference: Tensor, conditional: Tensor) -> Tensor:
        """[C, T, h, w] each → the part of the difference that guides."""
        if self._average is not None:
            difference = difference + self.momentum * self._average
        self._average = difference
        if self.threshold > 0:
            difference = difference * (self.threshold / difference.norm()).clamp(max=1)
        direction = torch.nn.functional.normalize(conditional.double().flatten(), dim=0).view_as(difference)
        parallel = (difference.double() * direction).sum() * direction
        return (difference.double() - parallel).to(difference.dtype)


def combine(
    predictions: list[Tensor],
    text_scale: float,
    audio_scale: float,
    projected: Sequence[ProjectedGuidance] = (),
) -> Tensor:
    """The guided prediction from those of `passes(text_scale)`, in that order and all of one shape.

    Three passes: uncond + s_t (cond - without_text) + s_a (without_text - uncond).
    Two passes: without_voice + s_a (cond - without_voice).
    `projected`, one for the text and one for the voice, makes it projected guidance:
    cond + (s_t - 1) projected(cond - without_text) + (s_a - 1) projected(without_text - uncond).
    """
    conditional, last = predictions[0], predictions[-1]
    scales = [audio_scale] if len(predictions) == 2 else [text_scale, audio_scale]
    differences = [more - less for more, less in pairwise(predictions)]
    if projected:
        guides = projected[-len(differences) :]
        terms = zip(guides, differences, scales, strict=True)
        return conditional + sum((scale - 1) * guide(difference, conditional) for guide, difference, scale in terms)
    guided = last
    for difference, scale in zip(differences, scales, strict=True):
        guided = guided + scale * difference
    return guided


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
