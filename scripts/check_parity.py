"""Runs every golden case of the published implementation through the public API, and says how far off we are.

    python scripts/check_parity.py GOLDENS_DIR [--only GLOB ...] [--device cuda]

A golden case is a recorded input and output: `<group>_cases.safetensors` or `e2e/<case>.safetensors` with a .json of
the same name beside it. Prints for each case the largest and mean absolute difference and the tolerance. Exit status:
0 if every case is within its tolerance, 1 if any is out or of a form unknown here. With `--device` the models compute
there, in float32 throughout (no TF32), as the recorded ones did.
"""

import argparse
import fnmatch
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from infinitetalk.errors import InputError  # first: our package silences what diffusers imports

# isort: split
import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors.torch import load_file
from torch import Tensor

from avatar_api.footage import read_reference
from avatar_api.media import read_voice
from infinitetalk import checkpoints, label_rope
from infinitetalk.audio import VoiceFeatures, arrange, frame_count, normalize_loudness
from infinitetalk.color import match_color
from infinitetalk.geometry import (
    BUCKETS,
    BUCKETS_480P,
    BUCKETS_720P,
    cover,
    nearest_bucket,
    output_size,
    resize_and_crop,
    source_pixels,
)
from infinitetalk.guidance import ProjectedGuidance, timesteps
from infinitetalk.lora import read_lora
from infinitetalk.pipeline import InfiniteTalkPipeline, Speaker, Step
from infinitetalk.settings import Settings
from infinitetalk.timeline import plan
from infinitetalk.transformer import InfiniteTalkTransformer3DModel, sinusoidal_embedding

CPU = torch.device("cpu")
EXACT = 0.0
FORWARD = 5e-5  # one pass of a network in float32
LATENTS = 2e-4  # after denoising: noise perturbed by 1e-6 already moves latents by 1.5e-5
VIDEO, VIDEO_MEAN = 2e-3, 1e-5


@dataclass(frozen=True)
class Difference:
    maximum: float
    mean: float
    tolerance: float
    mean_tolerance: float = float("inf")

    @property
    def within(self) -> bool:
        return self.maximum <= self.tolerance and self.mean <= self.mean_tolerance  # NaN is not within


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], list[Difference]]


def compare(actual: Any, expected: Any, tolerance: float = EXACT, mean_tolerance: float = float("inf")) -> Difference:
    actual, expected = (torch.as_tensor(value).cpu().double() for value in (actual, expected))
    if actual.shape != expected.shape:
        return Difference(float("inf"), float("inf"), tolerance, mean_tolerance)
    difference = (actual - expected).abs()
    return Difference(difference.max().item(), difference.mean().item(), tolerance, mean_tolerance)


def agree(actual: object, expected: object) -> Difference:
    return Difference(0.0, 0.0, EXACT) if actual == expected else Difference(float("inf"), float("inf"), EXACT)


@cache
def read_group(directory: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((directory / f"{name}.json").read_text()), load_file(directory / f"{name}.safetensors")


@cache
def pipeline(goldens: Path, device: torch.device) -> InfiniteTalkPipeline:
    wan = goldens / "ckpt_tiny"
    return InfiniteTalkPipeline(
        transformer(wan, device),
        checkpoints.load_vae(wan, device),
        checkpoints.load_text_encoder(wan, device, torch.float32),
        checkpoints.load_tokenizer(wan),
        checkpoints.load_image_encoder(wan, device, torch.float32),
        checkpoints.load_speech_encoder(goldens / "wav2vec2_tiny", device),
    )


@cache
def transformer(folder: Path, device: torch.device) -> InfiniteTalkTransformer3DModel:
    return checkpoints.load_transformer(folder, folder / "infinitetalk.safetensors", device, torch.float32)


# Each group's cases.


def wav2vec2_cases(goldens: Path, device: torch.device) -> Iterator[Case]:
    details, tensors = read_group(goldens, "wav2vec2_cases")

    def run(case: str, folder: Path) -> list[Difference]:
        voice = tensors[f"{case}.waveform"].numpy()
        features = VoiceFeatures(checkpoints.load_speech_encoder(folder, device), voice)
        heard = features.gather([[frame] for frame in range(frame_count(len(voice)))])[:, 0]
        return [compare(heard, tensors[f"{case}.embedding"], FORWARD)]

    for case in details["cases"]:
        for folder in sorted(goldens.glob("wav2vec2_tiny*/")):
            yield Case(f"{case}.{folder.name}", lambda case=case, folder=folder: run(case, folder))  # type: ignore[misc]


def vae_cases(goldens: Path, device: torch.device) -> Iterator[Case]:
    details, tensors = read_group(goldens, "vae_cases")

    def run(case: str) -> list[Difference]:
        vae = pipeline(goldens, device)
        latent = tensors[f"{case}.latent"][0].to(device)
        if case.startswith("dec"):
            return [compare(vae.decode_video(latent), tensors[f"{case}.video"][0], FORWARD)]
        if f"{case}.first_frame" in tensors:
            video = F.pad(tensors[f"{case}.first_frame"][0], (0, 0, 0, 0, 0, 4 * (latent.shape[1] - 1)))
        else:
            video = tensors[f"{case}.video"][0]
        return [compare(vae.encode_video(video.to(device)), latent, FORWARD)]

    for case in details["cases"]:
        yield Case(case, lambda case=case: run(case))  # type: ignore[misc]

    def statistics() -> list[Difference]:
        config = pipeline(goldens, device).vae.config
        return [compare(torch.tensor(getattr(config, name)), tensors[name]) for name in ("latents_mean", "latents_std")]

    yield Case("statistics", statistics)


def clip_cases(goldens: Path, device: torch.device) -> Iterator[Case]:
    details, tensors = read_group(goldens, "clip_cases")

    def run(case: str) -> list[Difference]:
        picture = tensors[f"{case}.image_u8"].to(device) / 127.5 - 1
        return [compare(pipeline(goldens, device).encode_picture(picture), tensors[f"{case}.features"], FORWARD)]

    for case in details["cases"]:
        yield Case(case, lambda case=case: run(case))  # type: ignore[misc]


def t5_cases(goldens: Path, device: torch.device) -> Iterator[Case]:
    details, tensors = read_group(goldens, "t5_cases")

    def run(index: int) -> list[Difference]:
        encoded = pipeline(goldens, device).encode_prompt(details["texts"][index])[0].cpu()
        context = tensors[f"context{index}"]
        return [
            agree(prompt_clean(details["texts"][index]), details["cleaned"][index]),
            compare(encoded, F.pad(context, (0, 0, 0, len(encoded) - len(context))), FORWARD),
        ]

    def run_ids() -> list[Difference]:
        ids, mask = tensors["rand.ids"], tensors["rand.mask"]
        encoder = pipeline(goldens, device).text_encoder
        hidden = encoder(ids.to(device), attention_mask=mask.to(device)).last_hidden_state.cpu()
        return [compare(hidden[mask.bool()], tensors["rand.hidden"][mask.bool()], FORWARD)]

    for index in range(len(details["texts"])):
        yield Case(f"context{index}", lambda index=index: run(index))  # type: ignore[misc]
    yield Case("rand", run_ids)


def frames_cases(goldens: Path, device: torch.device) -> Iterator[Case]:
    details, tensors = read_group(goldens, "frames")

    def run(case: dict[str, Any]) -> list[Difference]:
        lengths = case["audio_lengths"], case["frame_num"], case["motion_frame"], case["max_frames_num"]
        if "error" in case:
            try:
                plan(*lengths, reference_quirks=True)
            except InputError:
                return [agree("refused", "refused")]
            return [agree("accepted", case["error"])]
        timeline = plan(*lengths, reference_quirks=True)
        starts = [timeline.start(clip) for clip in range(timeline.clips)]
        expected_starts = case["cond_frame_indices"][: case["clips"]]
        differences = [agree((timeline.total_frames, starts), (case["total"], expected_starts))]
        for clip in range(case["clips"]):
            heard = [timeline.audio_window(clip, speaker) for speaker in range(len(case["audio_lengths"]))]
            differences.append(compare(heard, tensors[f"case{case['id']}.clip{clip}.audio_index"]))
        return differences

    for case in details["cases"]:
        yield Case(str(case["id"]), lambda case=case: run(case))  # type: ignore[misc]


def dit_cases(goldens: Path, device: torch.device, group: str) -> Iterator[Case]:
    details, tensors = read_group(goldens, f"{group}_cases")
    folder = goldens / ("ckpt_tiny" if group == "dit_small" else group)

    def run(name: str, case: dict[str, Any]) -> list[Difference]:
        model = transformer(folder, device)
        latents = torch.cat([tensors[f"{name}.x"][None], tensors[f"{name}.y"]], dim=1)
        context = tensors[f"{name}.context"]
        frames = torch.arange(case["audio_start"], case["audio_end"])[:, None] + torch.arange(-2, 3)
        if name.startswith("base_only"):
            audio = None
        elif case["null_audio"]:  # one silent speaker, also where there are two
            audio = torch.zeros(1, 1, *frames.shape, 1, model.config.audio_features)
        else:
            voices = [tensors[f"{name}.full_audio_emb{person + 1}"] for person in range(case["people"])]
            audio = torch.stack([voice[frames.clamp(0, len(voice) - 1)] for voice in voices])[None]
        regions = tensors[f"{name}.ref_target_masks"][:2, ::2, ::2] > 0 if case["people"] == 2 else None
        padded = F.pad(context, (0, 0, 0, 512 - len(context)))[None]
        inputs = (latents, tensors[f"{name}.t"], padded, tensors[f"{name}.clip_fea"], audio)
        placed = (given if given is None else given.to(device) for given in inputs)
        prediction = model(*placed, regions=regions if regions is None else regions.to(device))
        return [compare(prediction[0], tensors[f"{name}.out"], FORWARD)]

    for name, case in details["cases"].items():
        yield Case(name, lambda name=name, case=case: run(name, case))  # type: ignore[misc]


def e2e_cases(goldens: Path, device: torch.device) -> Iterator[Case]:
    for file in sorted((goldens / "e2e").glob("*.json")):
        yield Case(file.stem, lambda file=file: run_whole(goldens, device, file))  # type: ignore[misc]


def run_whole(goldens: Path, device: torch.device, file: Path) -> list[Difference]:
    details, tensors = read_group(file.parent, file.stem)
    if "args_second" in details:  # the second of two runs of one pipeline, which is to be as if it were the first
        teacache, _ = read_group(file.parent, "teacache")
        source, extra, buckets = (teacache[key] for key in ("input", "extra_args", "buckets"))
        runs = [("args_first", "video_first"), ("args_second", "video_second_fresh")]
    else:
        source, extra, buckets = (details[key] for key in ("input", "extra_args", "buckets"))
        runs = [("args", "video")]
    differences = []
    for arguments, video in runs:
        settings = whole_settings(details[arguments], extra)
        differences += run_once(goldens, device, details, tensors, source, settings, buckets, video)
    return differences


def whole_settings(arguments: dict[str, Any], extra: dict[str, Any]) -> Settings:
    return Settings(
        steps=arguments["sampling_steps"],
        shift=arguments["shift"],
        text_guidance=arguments["text_guide_scale"],
        audio_guidance=arguments["audio_guide_scale"],
        projected_guidance=extra["use_apg"],
        projection_momentum=extra["apg_momentum"],
        projection_threshold=extra["apg_norm_threshold"],
        teacache=extra["teacache_thresh"] if extra["use_teacache"] else 0,
        color_correction=arguments["color_correction_strength"],
        seed=arguments["seed"],
        max_frames=arguments["max_frames_num"],
        frames_per_clip=arguments["frame_num"],
        motion_frames=arguments["motion_frame"],
        reference_quirks=True,
    )


def run_once(
    goldens: Path,
    device: torch.device,
    details: dict[str, Any],
    tensors: dict[str, Tensor],
    source: dict[str, Any],
    settings: Settings,
    buckets: dict[str, Any],
    video: str,
) -> list[Difference]:
    pipe = pipeline(goldens, device)
    reference = read_reference(goldens / source["cond_video"])
    first = reference if isinstance(reference, np.ndarray) else reference[0]
    source_height, source_width = first.shape[:2]
    sizes = {float(ratio): bucket[0] for ratio, bucket in buckets.items()}
    height, width = nearest_bucket(source_height, source_width, sizes)
    settings = replace(settings, size=f"{width}x{height}")
    boxes = {
        person: (left / source_width, top / source_height, right / source_width, bottom / source_height)
        for person, (top, left, bottom, right) in source.get("bbox", {}).items()
    }
    speakers = [
        Speaker(torch.load(goldens / voice, weights_only=True), boxes.get(person))
        for person, voice in source["cond_audio"].items()
    ]
    differences = []
    if "timesteps" in tensors:
        differences.append(compare(timesteps(settings.steps, settings.shift or 0)[:-1], tensors["timesteps"]))

    def on_step(step: Step) -> None:
        last = step.step + 1 == step.steps
        name = f"clip{step.clip}." + ("final_latent" if last else f"step{step.step + 1}.latent_in")
        if name in tensors:
            differences.append(compare(step.latents, tensors[name], LATENTS))

    with Overridden(pipe.transformer, details["weight_override"]):
        clips = pipe.generate(reference, speakers, source["prompt"], settings, on_step=on_step)
        generated = torch.cat([clip.video for clip in clips], dim=1)
    return [*differences, compare(generated, tensors[video], VIDEO, VIDEO_MEAN)]


def lora_cases(goldens: Path) -> Iterator[Case]:
    """`lora/<case>`: the weights that are no longer the base's once `lora/lora.safetensors` is merged into it."""

    def run(case: str) -> list[Difference]:
        details, tensors = read_group(goldens / "lora", case)
        folder = goldens / details["base"]
        lora = read_lora(goldens / "lora" / "lora.safetensors", reference_quirks=True)
        model = checkpoints.load_transformer(
            folder, folder / "infinitetalk.safetensors", CPU, torch.float32, None, [(lora, details["alpha"])]
        )
        names = convert_wan_transformer_to_diffusers({name: name for name in tensors})
        return [compare(model.get_parameter(ours), tensors[name], 1e-6) for ours, name in names.items()]

    for file in sorted((goldens / "lora").glob("*.json")):
        yield Case(file.stem, lambda case=file.stem: run(case))  # type: ignore[misc]


class Overridden:
    """Multiplies one weight for a while: "time_projection.1.weight *= 0.01" in the published names."""

    def __init__(self, model: InfiniteTalkTransformer3DModel, override: str | None) -> None:
        self.factor = 1.0
        if override is not None:
            published, factor = override.split(" *= ")
            (name,) = convert_wan_transformer_to_diffusers({published: published})
            self.weight, self.factor = model.get_parameter(name), float(factor)

    def __enter__(self) -> None:
        if self.factor != 1:
            self.original = self.weight.clone()
            self.weight.mul_(self.factor)

    def __exit__(self, *_: object) -> None:
        if self.factor != 1:
            self.weight.copy_(self.original)


def helpers_cases(goldens: Path, device: torch.device) -> Iterator[Case]:
    """Functions on their own. A case is all that has the same first part of its name: resize0.image, resize0.out."""
    details, tensors = read_group(goldens, "helpers")
    names = dict.fromkeys([*details, *tensors])
    for ignored in ("functions", "tensors"):
        names.pop(ignored, None)
    grouped: dict[str, str] = {}
    for name in names:
        steps = re.fullmatch(r"timesteps\.shift(.+)\.steps(\d+)", name)
        grouped[name if steps else name.split(".")[0]] = name

    for case in grouped:
        yield Case(case, lambda case=case: run_helper(case, details, tensors))  # type: ignore[misc]


def run_helper(case: str, details: dict[str, Any], tensors: dict[str, Tensor]) -> list[Difference]:
    if case.startswith("timesteps"):
        shift, steps = case.removeprefix("timesteps.shift").split(".steps")
        return [compare(timesteps(int(steps), float(shift)), tensors[case])]
    if case == "bucket_table":
        differences = []
        for entry, name in itertools.product(details[case], ("480", "720")):
            source, expected = (entry["h"], entry["w"]), entry[name]
            target = output_size(f"{name}p", *source)
            differences.append(agree(target, tuple(expected["target"])))
            differences.append(agree(cover(source, target), (*expected["resized"], expected["top"], expected["left"])))
        return differences
    if case == "bucket_by_ratio":
        return [
            agree(
                nearest_bucket(round(float(ratio) * 1e6), 10**6, BUCKETS[f"{name}p"]), bucket(details, name, expected)
            )
            for name, ratios in details[case].items()
            for ratio, expected in ratios.items()
        ]
    if case.startswith("ASPECT_RATIO"):
        published = {float(ratio): tuple(bucket[0]) for ratio, bucket in details[case].items()}
        return [agree(BUCKETS_480P if case.endswith("627") else BUCKETS_720P, published)]
    if re.fullmatch(r"resize\d+", case):
        cropped = resize_and_crop(tensors[f"{case}.image_u8_hwc"].numpy(), *details[case]["target"])
        return [compare(cropped, tensors[f"{case}.out_u8"][0, :, 0] / 127.5 - 1, 1e-6)]
    if case == "color":
        return [
            compare(
                match_color(tensors["color.source"][0], tensors["color.reference"][0, :, 0], strength), out[0], 5e-6
            )
            for strength, out in (
                (float(name.removeprefix("color.out")), out)
                for name, out in tensors.items()
                if name.startswith("color.out")
            )
        ]
    if case == "loud_silence":
        silence = np.zeros(16000, np.float32)
        return [compare(normalize_loudness(silence), silence)]
    if case == "loud_short":  # the published code fails here; we leave so short a voice as loud as it is
        short = np.full(3200, 0.1, np.float32)
        return [compare(normalize_loudness(short), short)]
    if re.fullmatch(r"loud\d+", case):
        return [compare(normalize_loudness(tensors[f"{case}.in"].numpy()), tensors[f"{case}.out"], 1e-6)]
    if re.fullmatch(r"load\d+", case):  # named after the sample rate in kHz
        rate = next(rate for rate in (8000, 16000, 22050, 24000, 44100, 48000) if f"load{rate // 1000}" == case)
        with tempfile.TemporaryDirectory() as folder:
            wave = Path(folder) / "voice.wav"
            soundfile.write(wave, tensors[f"{case}.in_stereo"].numpy(), rate, "FLOAT")
            return [compare(normalize_loudness(read_voice(wave)), tensors[f"{case}.out"], 1e-6)]
    if case == "sinusoid":
        dim = tensors["sinusoid.out"].shape[1]
        return [compare(sinusoidal_embedding(tensors["sinusoid.t"], dim), tensors["sinusoid.out"], 1e-6)]
    if case == "rope3d":
        return [min(rope3d(tensors["rope3d.x"], tensors["rope3d.out"]), key=lambda difference: difference.maximum)]
    if case == "rope1d":
        angles = label_rope.rotary(tensors["rope1d.pos"], tensors["rope1d.x"].shape[-1])
        turned = label_rope.turn(tensors["rope1d.x"].transpose(1, 2), angles)
        return [compare(turned.transpose(1, 2), tensors["rope1d.out"], 1e-6)]
    if case == "normscale":
        low, high = label_rope.LABELS[1]
        return [compare(label_rope.spread(tensors["normscale.x"], low, high), tensors["normscale.out"], 1e-5)]
    if case == "refmap":
        regions = tensors["refmap.masks"] > 0
        looks = label_rope.attention_to_regions(tensors["refmap.q"], tensors["refmap.k"], regions)
        return [compare(looks, tensors["refmap.out"], 1e-6)]
    if re.fullmatch(r"maskresize\d+", case):
        mask, resized = tensors[f"{case}.mask"], tensors[f"{case}.out"]
        source, target = (mask.shape[1], mask.shape[2]), (resized.shape[1], resized.shape[2])
        rows, columns = source_pixels(source, target, stride=1)
        latent_rows, latent_columns = source_pixels(source, target, stride=8)
        return [
            compare(mask[:, rows][:, :, columns], resized),
            compare(mask[:, latent_rows][:, :, latent_columns], tensors[f"{case}.latent"]),
        ]
    if case == "multi":
        return [
            agree(*lay_out(name.removeprefix("multi."), expected))
            for name, expected in details.items()
            if name.startswith("multi.")
        ]
    if case == "apg":
        return list(projected_guidance(details, tensors))
    raise KeyError(f"no check is known for the case {case!r}")


def lay_out(name: str, expected: Any) -> tuple[object, object]:
    """What is spoken where in the two tracks of a conversation, ours and the published code's."""
    first, second = (np.ones(length, np.float32) for length in (20000, 16000))
    if "unequal" in name:  # refused there; here the shorter voice goes on in silence
        return [len(track) for track in arrange([first, second], "together")], [20000, 20000]
    voices: dict[str, list[np.ndarray | None]] = {
        "add": [first, second],
        "para": [first, first],
        "rightnone": [first, None],
        "leftnone_add": [None, second],
    }
    tracks = arrange(voices[name], "in_turn" if name.endswith("add") else "together")
    spoken = [np.flatnonzero(track) for track in tracks]
    ends = [[int(track[0]), int(track[-1])] if len(track) else None for track in spoken]
    return [len(tracks[0]), *ends], [expected["len1"], expected["nz1"], expected["nz2"]]


def projected_guidance(details: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[Difference]:
    guides: dict[str, ProjectedGuidance] = {}
    for name, step in ((name, details[name]) for name in details if name.startswith("apg.")):
        _, kind, number = name.split(".")
        guide = guides.setdefault(kind, ProjectedGuidance(step["momentum"], step["norm_threshold"]))
        guided = guide(tensors[f"apg.diff{number}"], tensors[f"apg.pred{number}"])
        yield compare(guided, tensors[f"apg.{kind}.out{number}"], 1e-6)


def bucket(details: dict[str, Any], name: str, ratio: str) -> tuple[int, ...]:
    return tuple(details["ASPECT_RATIO_627" if name == "480" else "ASPECT_RATIO_960"][ratio][0])


def rope3d(queries: Tensor, expected: Tensor) -> Iterator[Difference]:
    """One difference for each grid (frames, rows, columns) of so many tokens; the case does not say which it used."""
    tokens, head_dim = queries.shape[1], queries.shape[3]
    rope = WanRotaryPosEmbed(head_dim, (1, 1, 1), 1024)
    sizes = [size for size in range(1, tokens + 1) if tokens % size == 0]
    for frames, rows, columns in itertools.product(sizes, repeat=3):
        if frames * rows * columns == tokens:
            cosines, sines = rope(torch.empty(1, 1, frames, rows, columns))
            turned = apply_rotary_emb(queries, (cosines[0, :, 0], sines[0, :, 0]), sequence_dim=1)
            yield compare(turned, expected, 1e-5)


GROUPS: dict[str, Callable[[Path, torch.device], Iterator[Case]]] = {
    "wav2vec2_cases": wav2vec2_cases,
    "vae_cases": vae_cases,
    "clip_cases": clip_cases,
    "t5_cases": t5_cases,
    "helpers": helpers_cases,
    "frames": frames_cases,
    "dit_small_cases": lambda goldens, device: dit_cases(goldens, device, "dit_small"),
    "dit_hard_cases": lambda goldens, device: dit_cases(goldens, device, "dit_hard"),
    "e2e": e2e_cases,
}


def find_cases(goldens: Path, device: torch.device = CPU) -> Iterator[Case]:
    """Every case in the folder, as group/case; a file of an unknown form becomes a case that fails."""
    present = {file.stem for file in goldens.glob("*.safetensors")} | {"e2e"} & {
        file.name for file in goldens.iterdir()
    }
    if (goldens / "lora").is_dir():
        yield from (Case(f"lora/{case.name}", case.run) for case in lora_cases(goldens))
    for group in sorted(present):
        if group not in GROUPS:
            yield Case(group, lambda group=group: unknown(group))  # type: ignore[misc]
            continue
        for case in GROUPS[group](goldens, device):
            yield Case(f"{group.removesuffix('_cases')}/{case.name}", case.run)


@torch.no_grad()
def run_case(case: Case) -> list[Difference]:
    return case.run()


def unknown(group: str) -> list[Difference]:
    raise KeyError(f"no check is known for files named {group!r}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("goldens", type=Path, metavar="GOLDENS_DIR")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="GLOB", help="e.g. vae 'dit_small/single*' e2e/clip"
    )
    parser.add_argument("--device", type=torch.device, default=CPU, help="where the models compute (cpu)")
    options = parser.parse_args(arguments)
    torch.backends.cudnn.allow_tf32 = False  # the default in convolutions, and as coarse as float16
    if not options.goldens.is_dir():
        parser.error(f"{options.goldens} is not a folder")

    def selected(name: str) -> bool:
        parts = (name, *name.split("/"))
        return any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in options.only)

    cases = [case for case in find_cases(options.goldens, options.device) if selected(case.name)]
    if not cases:
        parser.error(f"no case in {options.goldens} matches {' '.join(options.only)}")
    passed, failed = 0, []
    print(f"{'case':40} {'max':>9} {'mean':>9} {'tolerance':>9}")
    for case in cases:
        try:
            differences = run_case(case)
        except (KeyError, OSError, ValueError, RuntimeError) as error:
            print(f"{case.name:40} cannot be read: {error!r}")
            failed.append(case.name)
            continue
        worst = max(differences, key=lambda difference: (not difference.within, difference.maximum))
        within = all(difference.within for difference in differences)
        print(
            f"{case.name:40} {worst.maximum:9.1e} {worst.mean:9.1e} {worst.tolerance:9.1e} {'' if within else '  OUT'}"
        )
        if within:
            passed += 1
        else:
            failed.append(case.name)
    print(f"\n{passed} within tolerance, {len(failed)} out or unknown")
    for name in failed:
        print(f"  out or unknown: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
