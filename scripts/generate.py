"""Generate a talking video from a picture, or from a video, and a voice or two.

    python scripts/generate.py examples/single_example_image.json --models DIR --output out/video.mp4
    python scripts/generate.py --picture me.png --voice me.wav --prompt "A man talks to the camera." --models DIR
    python scripts/generate.py --picture us.png --voice her.wav --voice-2 him.wav --in-turn --prompt "…" --models DIR
    python scripts/generate.py --picture film.mp4 --voice dubbed.wav --scenes --prompt "…" --models DIR

DIR holds the published snapshots: Wan2.1-I2V-14B-480P, InfiniteTalk and chinese-wav2vec2-base. The input file is JSON
in the published model's own format: {"prompt": ..., "cond_video": PICTURE OR VIDEO, "cond_audio": {"person1": VOICE,
"person2": VOICE}, "audio_type": "para" or "add", "bbox": {"person1": [first row, first column, last row, last column],
"person2": ...}}; boxes are in pixels of the picture, paths relative to the current folder or else to the file's own. A
video that comes without a voice is made to talk with its own sound.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder, and through a link in another

from infinitetalk.errors import InputError
from infinitetalk.geometry import Box
from infinitetalk.settings import FEW_STEPS, FewSteps, Settings
from infinitetalk.timeline import FRAMES_PER_SECOND
from scripts.command_line import Cast, InputFile, Models, exit_status, make_video, read_input_file


def read_input(options: argparse.Namespace) -> tuple[Cast, Settings]:
    """The inputs, each from its own option, else from the input file; and the settings."""
    given = InputFile() if options.input is None else read_input_file(options.input)
    voices = {"person1": options.voice, "person2": options.voice_2}
    boxes = {"person1": options.box, "person2": options.box_2}
    given = given._replace(
        prompt=options.prompt or given.prompt,
        picture=options.picture or given.picture,
        voices={**given.voices, **{person: voice for person, voice in voices.items() if voice}},
        boxes={**given.boxes, **{person: box for person, box in boxes.items() if box}},
    )
    cast = Cast.of(given, "use --{name}, or an input file that names it as {key}")

    if options.max_seconds is not None and not options.max_seconds >= 1 / FRAMES_PER_SECOND:
        raise InputError(
            "max_seconds", f"max_seconds is {options.max_seconds}; a video has at least one frame, 0.04 s."
        )
    chosen = {name: getattr(options, name) for name in ("steps", "shift", "text_guidance", "audio_guidance")}
    preset = {} if options.preset is None else read_preset(options).settings
    settings = Settings(
        **{**preset, **{name: value for name, value in chosen.items() if value is not None}},
        size=options.size,
        projected_guidance=options.projected_guidance,
        teacache=options.teacache,
        audio_order="in_turn" if options.in_turn else given.audio_order or "together",
        color_correction=options.color_correction,
        seed=options.seed,
        max_frames=None if options.max_seconds is None else round(options.max_seconds * FRAMES_PER_SECOND),
    )
    return cast, settings


def read_loras(options: argparse.Namespace) -> tuple[tuple[Path, float], ...]:
    """The LoRAs' files and scales."""
    usual = 1.0 if options.preset is None else read_preset(options).scale
    return tuple((path, usual if scale is None else scale) for path, scale in options.lora)


def read_preset(options: argparse.Namespace) -> FewSteps:
    preset = FEW_STEPS.get(options.preset)
    if preset is None:
        raise InputError("preset", f"preset is {options.preset!r}; use one of {', '.join(FEW_STEPS)}.")
    if not options.lora:
        raise InputError("preset", f"preset is {options.preset!r}, how its LoRA is used: give {preset.file} as --lora.")
    return preset


def lora_file(text: str) -> tuple[Path, float | None]:
    """FILE or FILE:SCALE."""
    file, colon, scale = text.rpartition(":")
    try:
        return (Path(file), float(scale)) if colon else (Path(text), None)
    except ValueError:  # the colon belongs to the file's name
        return Path(text), None


def fractions(text: str) -> Box:
    """LEFT,TOP,RIGHT,BOTTOM."""
    try:
        left, top, right, bottom = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not LEFT,TOP,RIGHT,BOTTOM, such as 0.1,0,0.45,1") from error
    return left, top, right, bottom


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="folder of the three snapshots")
    parser.add_argument("--output", type=Path, default=Path("out/video.mp4"), metavar="FILE", help="%(default)s")

    what = parser.add_argument_group("what the video is made of")
    what.add_argument("input", nargs="?", type=Path, help="input file (JSON); the options below override it")
    what.add_argument("--prompt", help="what the video shows")
    what.add_argument("--picture", type=Path, metavar="FILE", help="PNG, JPEG or WebP; or a video, to dub it")
    what.add_argument("--voice", type=Path, metavar="FILE", help="a sound file, or a video whose sound is used")
    what.add_argument("--voice-2", type=Path, metavar="FILE", help="the second speaker's")
    box = "where the first speaker is, as fractions of the picture: LEFT,TOP,RIGHT,BOTTOM (the left half)"
    what.add_argument("--box", type=fractions, metavar="BOX", help=box)
    what.add_argument("--box-2", type=fractions, metavar="BOX", help="the second speaker's (the right half)")
    what.add_argument("--in-turn", action="store_true", help="the second speaker begins when the first has ended")
    what.add_argument("--scenes", action="store_true", help="find the video's cuts and generate each scene on its own")

    how = parser.add_argument_group("how it is made")
    how.add_argument("--size", default="480p", help="480p, 720p or WIDTHxHEIGHT in multiples of 16 (%(default)s)")
    how.add_argument("--max-seconds", type=float, help="stop after this much video (as long as the voice)")
    how.add_argument("--seed", type=int, default=42, help="%(default)s")
    how.add_argument("--steps", type=int, help="denoising steps per clip (40)")
    how.add_argument("--shift", type=float, help="noise schedule shift (7 at 480p, 11 at 720p)")
    how.add_argument("--text-guidance", type=float, help="5; 1 turns it off")
    how.add_argument("--audio-guidance", type=float, help="4")
    how.add_argument("--projected-guidance", action="store_true", help="APG: guidance that saturates colours less")
    how.add_argument("--color-correction", type=float, default=1.0, help="0 to 1 (%(default)s)")
    how.add_argument("--teacache", type=float, default=0.0, help="skip steps that change little: 0.2 or 0.3 (0, exact)")
    lora = "change the weights: a .safetensors file, and how much of it (1); may be given several times"
    how.add_argument("--lora", type=lora_file, action="append", default=[], metavar="FILE[:SCALE]", help=lora)
    preset = "steps, shift, guidance and scale for a few-step LoRA: fusionx or lightx2v; options still override them"
    how.add_argument("--preset", help=preset)
    how.add_argument(
        "--quantization", choices=["fp8", "int8"], help="keep the transformer's weights in 8 bits; not exact"
    )
    memory = "what stays on the GPU: 24gb, 48gb, 80gb or 141gb (by the GPU's memory)"
    how.add_argument("--memory", metavar="PRESET", help=memory)
    how.add_argument("--device", help="cuda or cpu (cuda where there is one)")
    options = parser.parse_args(arguments)

    def run(console: Console) -> None:
        cast, settings = read_input(options)
        models = Models(
            options.models / "Wan2.1-I2V-14B-480P",
            options.models / "InfiniteTalk",
            options.models / "chinese-wav2vec2-base",
            options.device,
            read_loras(options),
            options.quantization,
            options.memory,
        )
        make_video(cast, settings, models, options.output, console, find_scenes=options.scenes)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
