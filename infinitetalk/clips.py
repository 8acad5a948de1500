"""What a run takes and gives: who speaks, finished clips and steps, and what the next clip needs of the one before.

Apart from the pipeline, whose libraries take seconds to import, for those who only handle its results.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from infinitetalk.geometry import Box


@dataclass(frozen=True)
class Speaker:
    """Someone who talks in the video."""

    voice: np.ndarray | Tensor | None
    """float32 [samples] at 16 kHz; or features already encoded, float32 [frames, layers, channels]; or None for someone
    who says nothing while the other speaks."""
    box: Box | None = None
    """Where they are, of two; None: in their half of the picture, the first on the left."""


@dataclass(frozen=True)
class ClipState:
    """What the next clip needs of the one before, and all it needs: a run goes on from here in any process."""

    clip: int
    """Index of the next clip."""
    motion: Tensor
    """float32 [3, motion_frames, height, width] in [-1, 1]: the last frames of the clip before."""
    random_state: Tensor
    """uint8, the noise generator's state."""

    def save(self, path: Path) -> None:
        tensors = {"motion": self.motion.contiguous(), "random_state": self.random_state}
        path.write_bytes(save(tensors, {"clip": str(self.clip)}))  # save_file hides that the disk is full

    @classmethod
    def load(cls, path: Path) -> "ClipState":
        with safe_open(path, framework="pt") as file:
            clip = int(file.metadata()["clip"])
        return cls(clip=clip, **load_file(path))


@dataclass(frozen=True)
class Clip:
    """One finished clip: the frames that come after those of the clip before."""

    index: int
    clips: int
    video: Tensor
    """float32 [3, frames, height, width] in [-1, 1], on the CPU."""
    state: ClipState | None
    """To resume from; None after the last clip."""

    @property
    def frames(self) -> np.ndarray:
        """uint8 [frames, height, width, 3], RGB."""
        levels = ((self.video + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
        return levels.permute(1, 2, 3, 0).contiguous().numpy()


@dataclass(frozen=True)
class Step:
    """A finished denoising step, for progress, previews, and to stop a run: what `on_step` raises ends it."""

    clip: int
    clips: int
    step: int
    steps: int
    latents: Tensor
    """float32 [16, frames / 4, height / 8, width / 8], as they are after the step."""
