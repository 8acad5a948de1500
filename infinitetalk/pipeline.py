"""A picture or a video, one voice or two, and a prompt → a talking video, clip by clip.

Tensors in, tensors out. Every constant is the published model's (InfiniteTalk, arXiv:2508.14033, over Wan2.1-I2V-14B):
the same seed gives the same noise, and in float32 the same pixels.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor
from transformers import CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel, Wav2Vec2Model

from infinitetalk import checkpoints
from infinitetalk.audio import VoiceFeatures, arrange, normalize_loudness
from infinitetalk.cache import TeaCache, coefficients
from infinitetalk.clips import Clip, ClipState, Speaker, Step
from infinitetalk.color import match_color
from infinitetalk.errors import InputError
from infinitetalk.geometry import output_size, resize_and_crop, speaker_regions
from infinitetalk.guidance import Pass, ProjectedGuidance, combine, default_shift, passes, timesteps
from infinitetalk.lora import Lora, applied
from infinitetalk.memory import CPU, IN_PLACE, Preset, call_on, describe, offload_blocks, select
from infinitetalk.parallel import Ranks
from infinitetalk.quantization import Quantization
from infinitetalk.settings import Settings
from infinitetalk.timeline import Timeline, plan_scenes
from infinitetalk.transformer import TEMPORAL_STRIDE, InfiniteTalkTransformer3DModel

__all__ = ["Clip", "ClipState", "InfiniteTalkPipeline", "Speaker", "Step"]

TEXT_TOKENS = 512
CLIP_SIDE = 224
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VAE_STRIDE = 8


@dataclass(frozen=True)
class _Conditions:
    """What all denoising steps of a clip have in common; in the transformer's type, with a batch dimension of 1."""

    prompt: Tensor  # [1, 512, text width]
    negative_prompt: Tensor
    picture: Tensor  # [1, 257, CLIP width]
    latents: Tensor  # [1, 4 + 16, T, h, w]: which frames are given, and the given picture followed by grey
    audio: Tensor  # [1, speakers, frames, window, layers, channels]
    regions: Tensor | None  # bool [2, h / 2, w / 2] of two speakers


@dataclass(frozen=True)
class _Share:
    """The forwards of a clip's steps that one rank computes: all of them, or some."""

    passes: Sequence[Pass]
    conditions: _Conditions
    cache: TeaCache | None

    def begin(self, transformer: InfiniteTalkTransformer3DModel) -> None:
        if transformer.is_cache_enabled:  # one of diffusers' own, to which every clip is a new video
            transformer._reset_stateful_cache()

    def __call__(self, transformer: InfiniteTalkTransformer3DModel, latents: Tensor, time: Tensor) -> list[Tensor]:
        """→ for each pass float32 [16, T, h, w], the velocity from picture to noise."""
        return [self._predict(transformer, latents, time, guided) for guided in self.passes]

    def _predict(
        self, transformer: InfiniteTalkTransformer3DModel, latents: Tensor, time: Tensor, guided: Pass
    ) -> Tensor:
        given, audio, regions = self.conditions.latents, self.conditions.audio, self.conditions.regions
        branch = "multi" if regions is not None and "multi" in transformer.config.audio_branches else "single"
        if not guided.voice:  # the silence of one speaker, even where there are two
            audio, regions = torch.zeros_like(audio[:, :1]), None
        with transformer.cache_context(str(guided)):
            prediction = transformer(
                torch.cat([latents[None].to(given.dtype), given], dim=1),
                time[None],
                self.conditions.prompt if guided.prompt else self.conditions.negative_prompt,
                self.conditions.picture,
                audio,
                branch,
                regions,
                self.cache,
            )
        return prediction[0].float()


_Split = list[tuple[Sequence[Pass], TeaCache | None]]


class InfiniteTalkPipeline:
    """The published model, ready to generate. Load it with `from_snapshots`."""

    def __init__(
        self,
        transformer: InfiniteTalkTransformer3DModel,
        vae: AutoencoderKLWan,
        text_encoder: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        image_encoder: CLIPVisionModel,
        speech_encoder: Wav2Vec2Model,
        preset: Preset = IN_PLACE,
    ) -> None:
        """preset: says where the parts given lie. They compute where VAE and speech encoder are."""
        self.transformer = transformer
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.image_encoder = image_encoder
        self.speech_encoder = speech_encoder
        self.preset = preset
        self.ranks = Ranks()
        """Where the forwards are computed; `parallel` has others that spread them over several GPUs."""
        self.device: torch.device = vae.device
        self.memory = describe(preset, self.device)
        """Where the parts lie, and what it takes: a line for the log."""
        self.dtype: torch.dtype = transformer.patch_embedding.weight.dtype
        statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=self.device)
        self._latents_mean, self._latents_std = statistics[:, None, :, None, None, None]

    @classmethod
    def from_snapshots(
        cls,
        wan: Path,
        infinitetalk: Path,
        wav2vec2: Path,
        device: str | torch.device | None = None,
        memory: str | None = None,
        quantization: Quantization | None = None,
        loras: Sequence[tuple[Lora, float]] = (),
        on_loaded: Callable[[str, float], object] = lambda part, seconds: None,
    ) -> "InfiniteTalkPipeline":
        """Load the published snapshots (`infinitetalk`: its folder, or one file of audio weights).

        On a GPU, the default where there is one, in the published precisions: transformer and T5 bfloat16, CLIP
        float16, VAE and speech encoder float32. On a CPU everything is float32. `memory` names one of `memory.PRESETS`
        in place of that for the GPU; `quantization` makes the transformer's weights of one byte; `loras` are
        merged into it, each at its scale; `on_loaded` is told of each part, and the seconds that it took. Raises
        CheckpointError, and InputError for a device or a preset that is not there.
        """
        try:
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            message = f"device is {str(device)!r}, which this machine does not have; use 'cuda' or 'cpu'."
            raise InputError("device", message) from error
        preset = select(memory, device)
        waiting = CPU if preset.offload_encoders else device
        half, clip_half = (torch.float32, torch.float32) if device.type == "cpu" else (torch.bfloat16, torch.float16)
        placed = CPU if preset.offload_blocks else device

        def timed(part: str, load: Callable[..., Any], *arguments: Any) -> Any:
            begun = time.monotonic()
            loaded = load(*arguments)
            on_loaded(part, time.monotonic() - begun)
            return loaded

        transformer = timed(
            "transformer", checkpoints.load_transformer, wan, infinitetalk, placed, half, quantization, loras
        )
        if preset.offload_blocks:
            offload_blocks(transformer, device)
        return cls(
            transformer,
            timed("vae", checkpoints.load_vae, wan, device),
            timed("text_encoder", checkpoints.load_text_encoder, wan, waiting, half),
            checkpoints.load_tokenizer(wan),
            timed("image_encoder", checkpoints.load_image_encoder, wan, waiting, clip_half),
            timed("speech_encoder", checkpoints.load_speech_encoder, wav2vec2, device),
            preset,
        )

    @contextmanager
    def with_loras(self, loras: Sequence[tuple[Lora, float]]) -> Iterator[None]:
        """Inside a `with` block it generates with these LoRAs, each at its scale; after it, exactly as before.

        All forwards are computed here, since no other rank has them. Raises CheckpointError where one does not fit.
        """
        ranks = self.ranks
        with applied(self.transformer, loras):
            self.ranks = Ranks()
            try:
                yield
            finally:
                self.ranks = ranks

    def close(self) -> None:
        """Free the models' memory, on the GPU and beside it, for whoever holds this. It cannot generate any more."""
        self.ranks.close()
        del self.transformer, self.vae, self.text_encoder, self.image_encoder, self.speech_encoder
        gc.collect()  # a module and its hooks refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def generate(
        self,
        reference: np.ndarray | Sequence[np.ndarray],
        speakers: Sequence[Speaker],
        prompt: str,
        settings: Settings = Settings(),
        *,
        scene_starts: Sequence[int] = (0,),
        on_step: Callable[[Step], None] | None = None,
        resume_from: ClipState | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Clip]:
        """Yield the video clip by clip; memory does not grow with its length.

        reference: the picture that talks, uint8 [height, width, 3]; or a video's pictures at 25 per second, anything
        with a length that gives such pictures by number. Of a video, each clip starts from the picture of its time, or
        from the last one if the voice goes on. speakers: one or two. `scene_starts` are the first frames of the video's
        scenes, each generated on its own; `generator` overrides the noise of `settings.seed`; `resume_from` goes on
        after the clip that carried it, given the same other arguments, as if there had been no interruption. Raises
        InputError for what cannot be generated.
        """
        pictures = [reference] if isinstance(reference, np.ndarray) and reference.ndim == 3 else reference
        source_height, source_width = pictures[0].shape[:2]
        height, width = output_size(settings.size, source_height, source_width)
        shift = settings.shift if settings.shift is not None else default_shift(height, width)
        regions = self._regions(speakers, (source_height, source_width), (height, width))
        voices = self._voices(speakers, settings)
        timelines = plan_scenes(
            scene_starts,
            [len(voice) for voice in voices],
            settings.frames_per_clip,
            settings.motion_frames,
            settings.max_frames,
            settings.reference_quirks,
        )
        clips = [(timeline, number) for timeline in timelines for number in range(timeline.clips)]
        generator = generator or torch.Generator("cpu").manual_seed(settings.seed)
        if resume_from is not None:
            generator.set_state(resume_from.random_state)
            motion = resume_from.motion.to(self.device)

        prompt_features = self.encode_prompt(prompt)
        negative_features = prompt_features
        if not all(forward.prompt for forward in passes(settings.text_guidance)):
            negative_features = self.encode_prompt(settings.negative_prompt)

        @lru_cache(2)  # the clip's and the scene's first; of a picture that stands still, the only one
        def picture_at(frame: int) -> Tensor:
            return torch.from_numpy(resize_and_crop(pictures[frame], height, width)).to(self.device)

        @lru_cache(1)
        def told_of(frame: int) -> tuple[Tensor, Tensor]:
            picture = picture_at(frame)
            return self.encode_picture(picture), self._given_latents(picture, settings.frames_per_clip)

        split = self._split(settings, height, width)
        for index in range(resume_from.clip if resume_from else 0, len(clips)):
            timeline, number = clips[index]
            frame, opening = (min(at, len(pictures) - 1) for at in (timeline.start(number), timeline.begins_at))
            if number == 0:
                motion = picture_at(opening)[:, None]
            picture_features, given = told_of(frame)
            heard = [voice.gather(timeline.audio_window(number, speaker)) for speaker, voice in enumerate(voices)]
            conditions = _Conditions(
                prompt_features,
                negative_features,
                picture_features,
                given,
                torch.stack(heard)[None].to(self.device, self.dtype),
                regions,
            )
            motion_latents = self.encode_video(motion)
            noise = self._draw_noise(generator, timeline, number, settings.steps, height, width)
            if not settings.reference_quirks:
                split = self._split(settings, height, width)

            def report(step: int, latents: Tensor, clip: int = index) -> None:
                if on_step is not None:
                    on_step(Step(clip, len(clips), step, settings.steps, latents))

            latents = self._denoise(noise, motion_latents, conditions, settings, shift, split, report)
            video = match_color(self.decode_video(latents), picture_at(opening), settings.color_correction)
            if not bool(torch.isfinite(video).all()):
                raise FloatingPointError(f"clip {index + 1} of {len(clips)} came out as NaN.")
            motion = video[:, -settings.motion_frames :].clone()  # a view would keep the whole clip
            new = timeline.new_frames(number)
            last = index + 1 == len(clips)
            state = None if last else ClipState(index + 1, motion.cpu(), generator.get_state())
            yield Clip(index, len(clips), video[:, new.start : new.stop].cpu(), state)
            del video

    def encode_prompt(self, prompt: str) -> Tensor:
        """→ [1, 512, text width], the prompt's features followed by zeros, which the transformer does attend to."""
        tokens = self.tokenizer(
            prompt_clean(prompt),
            padding="max_length",
            max_length=TEXT_TOKENS,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        outputs = call_on(self.device, self.text_encoder, tokens.input_ids, attention_mask=tokens.attention_mask)
        hidden = outputs.last_hidden_state
        return (hidden * tokens.attention_mask[..., None]).to(self.dtype)

    def encode_picture(self, picture: Tensor) -> Tensor:
        """picture: float32 [3, height, width] in [-1, 1] → [1, 257, CLIP width].

        The picture is squashed to a square (bicubic, not antialiased); the last block and norm of CLIP are not used.
        """
        square = F.interpolate(picture[None], (CLIP_SIDE, CLIP_SIDE), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        pixels = ((square / 2 + 0.5) - mean) / std
        pixels = pixels.to(self.image_encoder.dtype)
        features = call_on(self.device, self.image_encoder, pixels, output_hidden_states=True)
        return features.hidden_states[-2].to(self.dtype)

    def encode_video(self, video: Tensor) -> Tensor:
        """video: float32 [3, 4n + 1, height, width] in [-1, 1] → float32 latents [16, n + 1, height / 8, width / 8]."""
        mode = self.vae.encode(video[None]).latent_dist.mode()
        return ((mode - self._latents_mean) / self._latents_std)[0]

    def decode_video(self, latents: Tensor) -> Tensor:
        """The inverse of `encode_video`, clipped to [-1, 1]."""
        height, width = (VAE_STRIDE * side for side in latents.shape[-2:])
        decode = self.vae.tiled_decode if self.preset.tiles(height, width) else self.vae.decode
        return decode(latents[None] * self._latents_std + self._latents_mean).sample[0]

    def _voices(self, speakers: Sequence[Speaker], settings: Settings) -> "Sequence[VoiceFeatures | _GivenFeatures]":
        """The features of each speaker's voice, all of one length."""
        given = [speaker.voice for speaker in speakers if isinstance(speaker.voice, Tensor)]
        if given:
            lengths = {len(features) for features in given}
            if len(given) < len(speakers) or (len(lengths) > 1 and not settings.reference_quirks):
                raise InputError("speakers", "features of two voices must be given for both, and be of one length.")
            return [_GivenFeatures(features) for features in given]
        samples = [speaker.voice for speaker in speakers if not isinstance(speaker.voice, Tensor)]
        if all(voice is None for voice in samples):
            raise InputError("audio", "no voice was given; at least one speaker needs one.", "missing")
        loud = [None if voice is None else normalize_loudness(voice) for voice in samples]
        return [VoiceFeatures(self.speech_encoder, voice) for voice in arrange(loud, settings.audio_order)]

    def _regions(self, speakers: Sequence[Speaker], source: tuple[int, int], target: tuple[int, int]) -> Tensor | None:
        """Where each of two speakers is: bool [2, height / 16, width / 16]."""
        if len(speakers) == 2:
            boxes = [speaker.box for speaker in speakers]
            return torch.from_numpy(speaker_regions(boxes, source, target)).to(self.device)
        if len(speakers) != 1:
            raise InputError("speakers", f"{len(speakers)} speakers were given; the model takes one or two.")
        if speakers[0].box is not None:
            raise InputError("speakers", "a box was given for the only speaker; boxes tell two speakers apart.")
        return None

    def _split(self, settings: Settings, height: int, width: int) -> _Split:
        """A step's forwards, in order: those of each rank that gets any, with a memory of their own."""
        needed = passes(settings.text_guidance)
        ranks = min(self.ranks.size, len(needed))
        shares = [needed[len(needed) * rank // ranks : len(needed) * (rank + 1) // ranks] for rank in range(ranks)]
        if not settings.teacache:
            return [(share, None) for share in shares]
        if settings.reference_quirks and ranks > 1:
            reason = "the published TeaCache has one memory for all forwards; turn it off, or use one GPU"
            raise InputError(
                "reference_quirks", f"reference_quirks is on, with TeaCache on {self.ranks.size} GPUs: {reason}."
            )
        polynomial = coefficients(height, width)
        kinds = [3] if settings.reference_quirks else map(len, shares)
        caches = [TeaCache(settings.teacache, polynomial, of, settings.steps) for of in kinds]
        return list(zip(shares, caches, strict=True))

    def _given_latents(self, picture: Tensor, frames: int) -> Tensor:
        """[1, 4 + 16, T, h, w]: a mask that is 1 where a frame is given, and the picture followed by grey, encoded."""
        clip = torch.zeros(3, frames, *picture.shape[1:], device=self.device)
        clip[:, 0] = picture
        latents = self.encode_video(clip)
        mask = torch.zeros(TEMPORAL_STRIDE, *latents.shape[1:], device=self.device)
        mask[:, 0] = 1  # in later clips too: their motion frames are held in place, not marked
        return torch.cat([mask, latents])[None].to(self.dtype)

    def _draw_noise(
        self, generator: torch.Generator, timeline: Timeline, clip: int, steps: int, height: int, width: int
    ) -> Tensor:
        """The noise of one clip, float32 [16, T, h, w]; advances the generator as the published code does.

        That code also draws noise for the motion frames of later clips, once and then at every step, and never uses
        it. Drawing it here too keeps all later clips on the published stream.
        """

        def draw(frames: int) -> Tensor:
            shape = (
                self.vae.config.z_dim,
                1 + (frames - 1) // TEMPORAL_STRIDE,
                height // VAE_STRIDE,
                width // VAE_STRIDE,
            )
            return torch.randn(shape, generator=generator, device=generator.device)

        noise = draw(timeline.frames_per_clip)
        if clip > 0:
            for _ in range(1 + steps):
                draw(timeline.motion_frames)
        return noise.to(self.device)

    def _denoise(
        self,
        latents: Tensor,
        motion_latents: Tensor,
        conditions: _Conditions,
        settings: Settings,
        shift: float,
        split: _Split,
        report: Callable[[int, Tensor], None],
    ) -> Tensor:
        """Noise → latents, by Euler steps along the predicted velocity; the motion frames stay as given throughout."""
        given = motion_latents.shape[1]
        times = torch.from_numpy(timesteps(settings.steps, shift)).to(self.device)
        projected = [
            ProjectedGuidance(settings.projection_momentum, settings.projection_threshold)
            for _ in range(2 if settings.projected_guidance else 0)
        ]
        shares = [_Share(own, conditions, cache) for own, cache in split]
        predict = self.ranks.begin(self.transformer, shares)
        latents = latents.clone()
        latents[:, :given] = motion_latents
        for step in range(settings.steps):
            velocity = combine(
                predict(latents, times[step]), settings.text_guidance, settings.audio_guidance, projected
            )
            latents = latents - velocity * ((times[step] - times[step + 1]) / 1000)
            latents[:, :given] = motion_latents
            report(step, latents)
        return latents


class _GivenFeatures:
    """Features that the caller encoded, in place of `VoiceFeatures`."""

    def __init__(self, features: Tensor) -> None:
        self._features = features

    def __len__(self) -> int:
        return len(self._features)

    def gather(self, frames: Sequence[Sequence[int]]) -> Tensor:
        return self._features[torch.tensor(frames)]
