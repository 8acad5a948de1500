"""The published model's own command, with its flags and their defaults.

    python generate_infinitetalk.py --task infinitetalk-14B --size infinitetalk-720 \\
      --ckpt_dir models/Wan2.1-I2V-14B-480P --infinitetalk_dir models/InfiniteTalk \\
      --wav2vec_dir models/chinese-wav2vec2-base --input_json examples/single_example_image.json --save_file result

It runs from any folder, and through a link in another one. The input file is the published one:

    {"prompt": "…", "cond_video": PICTURE OR VIDEO, "cond_audio": {"person1": VOICE, "person2": VOICE},
     "audio_type": "para" or "add", "bbox": {"person1": [20, 30, 440, 418], "person2": [20, 478, 440, 866]}}

A bbox is [first row, first column, last row, last column] in pixels of the picture, whatever its size. Paths are
relative to the current folder, or else to the input file's own. A voice of "None" is someone who stays silent; a
video without any voice is made to talk with its own sound.

The video is the published code's, to rounding, wherever that does what it promises. Where it does not, this does: a
voice shorter than a clip is taken, the longer of two voices decides how long the video is, and TeaCache and a LoRA's
alpha work as they are meant to. --reference_quirks brings the published behaviour back, to compare: short voices are
refused, TeaCache mixes forwards up, alpha is ignored. The noise of a seed is what the published code draws on a CPU,
on any device; on a GPU that code draws other noise.
"""

import argparse
import random
import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, and through a link in another

from infinitetalk.errors import InputError
from infinitetalk.settings import Settings
from scripts.command_line import Cast, Models, exit_status, make_video, read_input_file

SIZES = {"infinitetalk-480": "480p", "infinitetalk-720": "720p"}
LARGEST_RANDOM_SEED = 99_999_999

FLAGS = {  # by the inputs' names in our own errors
    "size": "--size",
    "steps": "--sample_steps",
    "shift": "--sample_shift",
    "frames_per_clip": "--frame_num",
    "motion_frames": "--motion_frame",
    "max_frames": "--max_frame_num",
    "color_correction": "--color_correction_strength",
    "seed": "--base_seed",
    "teacache": "--teacache_thresh",
    "projection_threshold": "--apg_norm_threshold",
    "audio": "--input_json",
    "memory": "--memory",
    "device": "--device",
}

ATTENTION = (
    "attention is not divided among GPUs; leave it out: 'torchrun --nproc_per_node=3' divides the passes of a step"
)
WEIGHTS = "weights are not divided among GPUs; leave it out: --memory says how the model fits a small one"
REFUSED = {
    "ring_size": ATTENTION,
    "ulysses_size": ATTENTION,
    "dit_fsdp": WEIGHTS,
    "t5_fsdp": WEIGHTS,
    "dit_path": "a pickle of a whole model is not opened; use --ckpt_dir and --infinitetalk_dir, or --quant_dir",
    "enable_torch_compile": "nothing is compiled; leave it out: --use_teacache and few-step LoRAs (--lora_dir) help",
}
"""Flags that ask for what is not here, and what does instead."""

MEMORY = "has no effect: what stays on the GPU is chosen by its memory; --memory overrides that"
WITHOUT_EFFECT = {
    "offload_model": MEMORY,
    "num_persistent_param_in_dit": MEMORY,
    "t5_cpu": MEMORY,
    "audio_save_dir": "has no effect: nothing is saved beside the video",
    "print_timing": "has no effect: the progress bar shows the time per step",
}
"""Flags that change nothing of the video."""


def yes_or_no(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def judge(options: argparse.Namespace, console: Console) -> None:
    """Say what a flag without effect does; refuse what is not here. Raises InputError."""
    for name, instead in REFUSED.items():
        value = getattr(options, name, 1)
        if value is True or value != 1:  # a size of 1, of --ulysses_size and --ring_size, divides nothing
            raise InputError(name, f"--{name}{'' if value is True else f' {value}'}: {instead}.")
    if options.audio_mode == "tts":
        instead = "make the voice with any text-to-speech program, and name its sound file in cond_audio"
        raise InputError("audio_mode", f"--audio_mode tts: nothing here turns text into speech; {instead}.")
    for name, why in WITHOUT_EFFECT.items():
        if name in options:
            console.print(f"--{name} {why}.", soft_wrap=True, highlight=False)


def loras(options: argparse.Namespace) -> tuple[tuple[Path, float], ...]:
    """The LoRAs' files and scales: one scale for all of them, or one each."""
    files, scales = options.lora_dir or [], options.lora_scale
    if len(scales) == 1:
        scales = scales * len(files)
    if len(scales) != len(files):
        raise InputError("lora_scale", f"--lora_scale has {len(scales)} values for {len(files)} files; give one each.")
    return tuple(zip(files, scales, strict=True))


def audio_weights(options: argparse.Namespace) -> Path:
    """--infinitetalk_dir; or, as published, the quantised model in its place."""
    if options.quant_dir is not None and options.quant is None:
        raise InputError("quant_dir", "--quant_dir was given without --quant; add --quant int8 or --quant fp8.")
    path: Path | None = options.quant_dir or options.infinitetalk_dir
    if path is None:
        raise InputError("infinitetalk_dir", "--infinitetalk_dir was not given; it is the folder of InfiniteTalk.")
    return path


def output_file(options: argparse.Namespace, prompt: str) -> Path:
    """--save_file, which ends in .mp4 whether or not that is said; by default named after the prompt and the time."""
    name = options.save_file
    if name is None:
        words = prompt.replace(" ", "_").replace("/", "_")[:50]
        name = f"{options.task}_{options.size}_1_1_{words}_{time.strftime('%Y%m%d_%H%M%S')}"
    return Path(name if name.endswith(".mp4") else f"{name}.mp4")


def run(options: argparse.Namespace, console: Console) -> None:
    judge(options, console)
    given = read_input_file(options.input_json)
    for key in given.not_used:
        console.print(f"{options.input_json}: {key} is not used.", soft_wrap=True)
    cast = Cast.of(given, "add it to the input file as {key}")
    if options.enable_torch_deterministic:
        import torch

        torch.backends.cudnn.deterministic = True
    seed = options.base_seed
    if seed < 0:
        seed = random.randint(0, LARGEST_RANDOM_SEED)  # noqa: S311
        console.print(f"--base_seed {seed}")
    settings = Settings(
        size=SIZES.get(options.size, options.size),
        steps=options.sample_steps,
        shift=options.sample_shift,
        text_guidance=options.sample_text_guide_scale,
        audio_guidance=options.sample_audio_guide_scale,
        projected_guidance=options.use_apg,
        projection_momentum=options.apg_momentum,
        projection_threshold=options.apg_norm_threshold,
        teacache=options.teacache_thresh if options.use_teacache else 0.0,
        audio_order=given.audio_order or "together",
        color_correction=options.color_correction_strength,
        seed=seed,
        max_frames=options.frame_num if options.mode == "clip" else options.max_frame_num,
        frames_per_clip=options.frame_num,
        motion_frames=options.motion_frame,
        reference_quirks=options.reference_quirks,
    )
    models = Models(
        options.ckpt_dir,
        audio_weights(options),
        options.wav2vec_dir,
        options.device,
        loras(options),
        options.quant,
        options.memory,
        options.reference_quirks,
    )
    longer = "--mode streaming goes on to its end" if options.mode == "clip" else "a larger --max_frame_num goes on"
    make_video(
        cast,
        settings,
        models,
        output_file(options, cast.prompt),
        console,
        find_scenes=options.scene_seg,
        if_cut=f"{longer}.",
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("models")
    model.add_argument("--task", default="infinitetalk-14B", choices=["infinitetalk-14B"], help="%(default)s")
    model.add_argument("--ckpt_dir", type=Path, required=True, help="folder of Wan2.1-I2V-14B-480P")
    published = "folder of InfiniteTalk, or one of its files, such as single/infinitetalk.safetensors"
    model.add_argument("--infinitetalk_dir", type=Path, help=published)
    model.add_argument("--wav2vec_dir", type=Path, required=True, help="folder of chinese-wav2vec2-base")
    model.add_argument("--quant", choices=["int8", "fp8"], help="keep weights in 8 bits")
    model.add_argument("--quant_dir", type=Path, help="with --quant: one of InfiniteTalk's quant_models, as a file")
    model.add_argument("--lora_dir", type=Path, nargs="+", help="LoRAs, .safetensors files")
    model.add_argument("--lora_scale", type=float, nargs="+", default=[1.2], help="one for all, or one each (1.2)")
    memory = "not published: what stays on the GPU, 24gb, 48gb, 80gb or 141gb (by the GPU's memory)"
    model.add_argument("--memory", metavar="PRESET", help=memory)
    model.add_argument("--device", help="not published: cuda or cpu (cuda where there is one)")

    video = parser.add_argument_group("the video")
    video.add_argument("--input_json", type=Path, default=Path("examples.json"), help="%(default)s")
    video.add_argument("--save_file", help="ends in .mp4 whether or not you write it (a name from prompt and time)")
    size = "infinitetalk-480, infinitetalk-720, or WIDTHxHEIGHT in multiples of 16, not published (%(default)s)"
    video.add_argument("--size", default="infinitetalk-480", help=size)
    mode = "clip: one clip, however long the voice; streaming: the whole voice (%(default)s)"
    video.add_argument("--mode", default="clip", choices=["clip", "streaming"], help=mode)
    video.add_argument("--frame_num", type=int, default=81, help="frames per clip, 4n + 1 (%(default)s)")
    video.add_argument("--motion_frame", type=int, default=9, help="frames that clips share, 4n + 1 (%(default)s)")
    longest = "streaming ends after so many frames, 25 a second (%(default)s: 40 seconds)"
    video.add_argument("--max_frame_num", type=int, default=1000, help=longest)
    video.add_argument("--base_seed", type=int, default=42, help="%(default)s; negative: a random one")
    video.add_argument("--scene_seg", action="store_true", help="find a video's cuts; generate each scene on its own")
    video.add_argument("--color_correction_strength", type=float, default=1.0, help="0 to 1 (%(default)s)")
    video.add_argument("--audio_mode", default="localfile", choices=["localfile", "tts"], help="%(default)s")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--sample_steps", type=int, default=40, help="%(default)s")
    sampling.add_argument("--sample_shift", type=float, help="7 for infinitetalk-480, 11 for infinitetalk-720")
    sampling.add_argument("--sample_text_guide_scale", type=float, default=5.0, help="%(default)s; with LoRAs 1")
    sampling.add_argument("--sample_audio_guide_scale", type=float, default=4.0, help="%(default)s; with LoRAs 2")
    sampling.add_argument("--use_teacache", action="store_true", help="skip steps that change little")
    sampling.add_argument("--teacache_thresh", type=float, default=0.2, help="%(default)s; more is faster and worse")
    sampling.add_argument("--use_apg", action="store_true", help="guidance that saturates colours less")
    sampling.add_argument("--apg_momentum", type=float, default=-0.75, help="%(default)s")
    sampling.add_argument("--apg_norm_threshold", type=float, default=55.0, help="%(default)s")
    sampling.add_argument("--enable_torch_deterministic", action="store_true", help="the same video at every run")
    sampling.add_argument("--reference_quirks", action="store_true", help="not published: see above")

    other = parser.add_argument_group("without effect")
    other.add_argument("--offload_model", type=yes_or_no, default=argparse.SUPPRESS)
    other.add_argument("--num_persistent_param_in_dit", type=int, default=argparse.SUPPRESS)
    other.add_argument("--t5_cpu", action="store_true", default=argparse.SUPPRESS)
    other.add_argument("--audio_save_dir", default=argparse.SUPPRESS)
    other.add_argument("--print_timing", action="store_true", default=argparse.SUPPRESS)

    missing = parser.add_argument_group("refused, with a word on what does instead")
    missing.add_argument("--ulysses_size", type=int, default=argparse.SUPPRESS)
    missing.add_argument("--ring_size", type=int, default=argparse.SUPPRESS)
    missing.add_argument("--dit_fsdp", action="store_true", default=argparse.SUPPRESS)
    missing.add_argument("--t5_fsdp", action="store_true", default=argparse.SUPPRESS)
    missing.add_argument("--dit_path", default=argparse.SUPPRESS)
    missing.add_argument("--enable_torch_compile", action="store_true", default=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return exit_status(partial(run, options), FLAGS)


if __name__ == "__main__":
    sys.exit(main())
