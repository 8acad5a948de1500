"""What a caller may ask for: the one place where a request's values are judged.

Files are judged in `avatar_api.media`, when they are read.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from infinitetalk.errors import InputError
from infinitetalk.geometry import BUCKETS, output_size
from infinitetalk.settings import FewSteps, Settings
from infinitetalk.timeline import FRAMES_PER_SECOND

SMALLEST_SIDE, LARGEST_SIDE = 64, 1280  # pixels, of a size given as WIDTHxHEIGHT

BALANCED_TEACACHE = 0.2  # about twice as fast

DEFAULTS = Settings()

Fraction = Annotated[float, Field(ge=0, le=1)]


class Speakers(BaseModel):
    """Where two speakers are, and when they speak."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    boxes: Annotated[
        list[tuple[Fraction, Fraction, Fraction, Fraction] | None] | None,
        Field(
            min_length=2,
            max_length=2,
            description="[left, top, right, bottom] of each speaker, as fractions of the picture; null: their half.",
        ),
    ] = None
    order: Annotated[
        Literal["together", "in_turn"], Field(description="From the start both, or the second after the first.")
    ] = "together"


class VideoRequest(BaseModel):
    """The values of a request beside its files; the published defaults where it says nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompt: Annotated[str, Field(max_length=4000, description="What the video shows.")] = ""
    size: Annotated[str, Field(description="480p, 720p, or WIDTHxHEIGHT in multiples of 16 from 64 to 1280.")] = "480p"
    steps: Annotated[int, Field(ge=1, le=200, description="Denoising steps per clip.")] = DEFAULTS.steps
    seed: Annotated[int, Field(ge=0, lt=2**63, description="The same seed gives the same noise.")] = DEFAULTS.seed
    text_guidance: Annotated[float, Field(ge=1, le=20, description="1 turns it off.")] = DEFAULTS.text_guidance
    audio_guidance: Annotated[float, Field(ge=0, le=20, description="How closely lips follow the voice.")] = (
        DEFAULTS.audio_guidance
    )
    shift: Annotated[float | None, Field(gt=0, le=100, description="Noise schedule; by size if not given.")] = None
    color_correction: Annotated[
        float, Field(ge=0, le=1, description="How far each frame's colours are pulled back to the picture's.")
    ] = DEFAULTS.color_correction
    max_seconds: Annotated[
        float | None, Field(ge=1 / FRAMES_PER_SECOND, description="End the video early; else as long as the voice.")
    ] = None
    speakers: Annotated[Speakers, Field(description="Of two speakers: where they are, and when they speak.")] = (
        Speakers()
    )
    scene_cuts: Annotated[bool, Field(description="Of a video: generate each of its scenes on its own.")] = False
    webhook_url: Annotated[str | None, Field(max_length=2000, description="Told when the video is finished.")] = None
    quality: Annotated[
        Literal["exact", "balanced", "fast"],
        Field(
            description="`exact`: as published. `balanced`: forwards that would change little are left out (TeaCache). "
            "`fast`: few steps with a LoRA, where the server has one, whose own steps, shift and guidance then hold "
            "unless given."
        ),
    ] = "exact"

    @field_validator("size")
    @classmethod
    def _known_size(cls, size: str) -> str:
        height, width = output_size(size, 1, 1)
        if size not in BUCKETS and not all(SMALLEST_SIDE <= side <= LARGEST_SIDE for side in (height, width)):
            raise InputError(
                "size", f"size is {size!r}; width and height must be from {SMALLEST_SIDE} to {LARGEST_SIDE} pixels."
            )
        return size

    @field_validator("speakers", mode="before")
    @classmethod
    def _from_form(cls, speakers: Any) -> Any:
        """A form sends JSON as text."""
        if not isinstance(speakers, str):
            return speakers
        try:
            return json.loads(speakers or "{}")
        except (ValueError, RecursionError) as error:
            message = f'speakers is not JSON ({error}); send {{"boxes": [[left, top, right, bottom], …], "order": …}}.'
            raise InputError("speakers", message) from None

    @classmethod
    def judge(cls, values: dict[str, Any]) -> Self:
        """A request from what the caller sent. Raises InputError for the first value that cannot be."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _input_error(error) from None

    def settings(self) -> Settings:
        """As the pipeline takes them; the weights that `quality` wants are not among them."""
        return Settings(
            size=self.size,
            steps=self.steps,
            shift=self.shift,
            text_guidance=self.text_guidance,
            audio_guidance=self.audio_guidance,
            color_correction=self.color_correction,
            seed=self.seed,
            teacache=BALANCED_TEACACHE if self.quality == "balanced" else 0.0,
            audio_order=self.speakers.order,
            max_frames=None if self.max_seconds is None else round(self.max_seconds * FRAMES_PER_SECOND),
        )


def with_few_steps(values: dict[str, Any], few_steps: FewSteps | None) -> dict[str, Any]:
    """The values a caller sent, and for `quality=fast` those that its LoRA wants where the caller gave none.

    few_steps: the server's. Raises InputError where it has none.
    """
    if values.get("quality") != "fast":
        return values
    if few_steps is None:
        remedy = "use 'exact' or 'balanced', or have its operator set AVATAR_FAST_LORA"
        raise InputError("quality", f"quality is 'fast', and this server has no LoRA for it; {remedy}.")
    return {**few_steps.settings, **{name: value for name, value in values.items() if value is not None}}


def _input_error(error: ValidationError) -> InputError:
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    param = ".".join(str(part) for part in first["loc"])
    if not first["loc"]:  # JSON can name half a surrogate pair, which no answer could repeat
        name = ascii(first["input"])
        return InputError(name[1:-1], f"there is no parameter {name}; a name should be text.", "unknown_parameter")
    if first["type"] == "extra_forbidden":
        fields = Speakers.model_fields if len(first["loc"]) > 1 else VideoRequest.model_fields
        known = ", ".join(sorted(fields))
        return InputError(param, f"there is no parameter {param!r}; there are {known}.", "unknown_parameter")
    shown = repr(first["input"])
    if len(shown) > 60:
        shown = shown[:60] + "…"
    wanted = first["msg"][0].lower() + first["msg"][1:]
    return InputError(param, f"{param} is {shown}; {wanted.replace('input should', 'it should')}.")
