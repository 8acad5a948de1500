"""What can be asked of a generation, with the published defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from infinitetalk.errors import InputError

NEGATIVE_PROMPT = (
    "bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)


@dataclass(frozen=True)
class Settings:
    """How to generate. The defaults are the published ones."""

    size: str = "480p"
    """"480p", "720p" (the bucket nearest to the picture's aspect ratio) or "WIDTHxHEIGHT", multiples of 16 pixels."""
    steps: int = 40
    shift: float | None = None
    """Pushes the noise levels towards the noisy end; None: 7 at 480p, 11 at 720p."""
    text_guidance: float = 5.0
    """1 turns text guidance off and saves a third of the time."""
    audio_guidance: float = 4.0
    projected_guidance: bool = False
    """Adaptive projected guidance in place of the plain kind, against oversaturation (see `guidance`)."""
    projection_momentum: float = -0.75
    projection_threshold: float = 55.0
    """0: differences of any length."""
    teacache: float = 0.0
    """Threshold of TeaCache (see `cache`): 0.2 is about twice as fast and 0.3 faster still, both lossy; 0 is exact."""
    audio_order: Literal["together", "in_turn"] = "together"
    """Do two speakers speak from the start, or the second after the first?"""
    color_correction: float = 1.0
    """0 to 1: how far each frame's colours are pulled back to the picture's."""
    seed: int = 42
    max_frames: int | None = None
    """Stop after this many frames at 25 per second; None: as long as the voice."""
    frames_per_clip: int = 81
    motion_frames: int = 9
    negative_prompt: str = NEGATIVE_PROMPT
    reference_quirks: bool = False
    """Keep what the published code does where it is arguably wrong: of two voices the first decides how many clips
    there are (see `timeline.plan`), and without text guidance TeaCache mixes the two kinds of forwards up."""

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise InputError("steps", f"steps is {self.steps}; it must be between 1 and 1000.")
        if self.shift is not None and not self.shift > 0:
            raise InputError("shift", f"shift is {self.shift}; it must be greater than 0.")
        if not self.teacache >= 0:
            raise InputError("teacache", f"teacache is {self.teacache}; it must be 0 (off) or greater.")
        if not self.projection_threshold >= 0:
            value = self.projection_threshold
            raise InputError("projection_threshold", f"projection_threshold is {value}; it must be 0 (off) or greater.")
        if self.audio_order not in ("together", "in_turn"):
            raise InputError("audio_order", f"audio_order is {self.audio_order!r}; use 'together' or 'in_turn'.")
        if not 0 <= self.color_correction <= 1:
            raise InputError("color_correction", f"color_correction is {self.color_correction}; use 0 to 1.")
        if not 0 <= self.seed < 2**63:
            raise InputError("seed", f"seed is {self.seed}; it must be between 0 and 2^63 - 1.")


@dataclass(frozen=True)
class FewSteps:
    """How a published LoRA that makes few steps enough is meant to be used (see `lora`)."""

    file: str
    """On the Hugging Face hub, as `models/import_models.py --lora` takes it."""
    scale: float
    settings: Mapping[str, Any]
    """Fields of `Settings`: `dataclasses.replace(settings, **few_steps.settings)`."""


# Guidance, shift and steps are those that InfiniteTalk's authors give. Text guidance 1 means two passes per step.
FEW_STEPS = {
    "fusionx": FewSteps(
        "vrgamedevgirl84/Wan14BT2VFusioniX/FusionX_LoRa/Wan2.1_I2V_14B_FusionX_LoRA.safetensors",
        scale=1.0,
        settings={"steps": 8, "shift": 2.0, "text_guidance": 1.0, "audio_guidance": 2.0},
    ),
    "lightx2v": FewSteps(
        "Kijai/WanVideo_comfy/Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors",
        scale=1.0,
        settings={"steps": 4, "shift": 2.0, "text_guidance": 1.0, "audio_guidance": 2.0},
    ),
}
