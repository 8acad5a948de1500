"""Generate a talking video from a picture and a voice.

    python scripts/generate.py examples/single_example_image.json --models DIR --output out/video.mp4
    python scripts/generate.py --picture me.png --voice me.wav --prompt "A man talks to the camera." --models DIR

DIR holds the published snapshots: Wan2.1-I2V-14B-480P, InfiniteTalk and chinese-wav2vec2-base. The input file is JSON
in the published model's own format: {"prompt": ..., "cond_video": PICTURE, "cond_audio": {"person1": VOICE}}, its
paths relative to the current folder.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as EtaColumn
from rich.text import Text

from infinitetalk.errors import CheckpointError, InputError


class Input(NamedTuple):
    picture: Path
    voice: Path
    prompt: str


class RateColumn(TextColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{1 / task.speed:.1f} s/step" if task.speed else "")


def read_input(options: argparse.Namespace) -> Input:
    """The three inputs: each from its own option, else from the input file."""
    example: dict[str, object] = {}
    if options.input is not None:
        try:
            example = json.loads(options.input.read_text())
            voices = example.get("cond_audio", {})
        except (OSError, ValueError, AttributeError) as error:
            raise InputError("input", f"{options.input} is not a JSON input file: {error}") from error
        if isinstance(voices, dict) and set(voices) - {"person1"}:
            raise InputError("input", f"{options.input} names {len(voices)} voices; one is supported.")
        example["voice"] = voices.get("person1") if isinstance(voices, dict) else None
    values = {
        name: getattr(options, name) or example.get(key)
        for name, key in (("picture", "cond_video"), ("voice", "voice"), ("prompt", "prompt"))
    }
    for name, value in values.items():
        if not isinstance(value, str):
            raise InputError(name, f"no {name} was given; use --{name}, or an input file that names one.")
    return Input(Path(str(values["picture"])), Path(str(values["voice"])), str(values["prompt"]))


def run(options: argparse.Namespace, console: Console) -> None:
    given = read_input(options)
    with console.status("Starting"):
        from avatar_api.media import VideoWriter, read_picture, read_voice
        from infinitetalk.geometry import output_size
        from infinitetalk.pipeline import InfiniteTalkPipeline, Speaker, Step
        from infinitetalk.settings import Settings
        from infinitetalk.timeline import FRAMES_PER_SECOND

    if options.max_seconds is not None and not options.max_seconds >= 1 / FRAMES_PER_SECOND:
        raise InputError(
            "max_seconds", f"max_seconds is {options.max_seconds}; a video has at least one frame, 0.04 s."
        )
    settings = Settings(
        size=options.size,
        steps=options.steps,
        shift=options.shift,
        text_guidance=options.text_guidance,
        audio_guidance=options.audio_guidance,
        color_correction=options.color_correction,
        seed=options.seed,
        max_frames=None if options.max_seconds is None else round(options.max_seconds * FRAMES_PER_SECOND),
    )
    picture = read_picture(given.picture, "picture")
    height, width = output_size(settings.size, *picture.shape[:2])
    voice = read_voice(given.voice, "voice")
    with console.status("Loading the models"):
        pipeline = InfiniteTalkPipeline.from_snapshots(
            options.models / "Wan2.1-I2V-14B-480P",
            options.models / "InfiniteTalk",
            options.models / "chinese-wav2vec2-base",
            options.device,
        )
    console.print(f"Models loaded on {pipeline.device} from {options.models}")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(""),
        TimeElapsedColumn(),
        TextColumn("left"),
        EtaColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Preparing", total=None)

        def on_step(step: Step) -> None:
            progress.update(
                task,
                description=f"Clip {step.clip + 1} of {step.clips}, step",
                completed=step.clip * step.steps + step.step + 1,
                total=step.clips * step.steps,
            )

        options.output.parent.mkdir(parents=True, exist_ok=True)
        frames = 0
        with VideoWriter(options.output, width, height, given.voice) as writer:
            for clip in pipeline.generate(picture, [Speaker(voice)], given.prompt, settings, on_step=on_step):
                writer.write(clip.frames)
                frames += len(clip.frames)
    console.print(f"{options.output}: {width}x{height}, {frames} frames, {frames / FRAMES_PER_SECOND:.2f} s")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", type=Path, help="input file (JSON)")
    parser.add_argument("--picture", help="PNG, JPEG or WebP; overrides the input file's")
    parser.add_argument("--voice", help="a sound file, or a video whose sound is used; overrides the input file's")
    parser.add_argument("--prompt", help="what the video shows; overrides the input file's")
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="folder of the three snapshots")
    parser.add_argument("--output", type=Path, default=Path("out/video.mp4"), metavar="FILE", help="%(default)s")
    parser.add_argument("--size", default="480p", help="480p, 720p or WIDTHxHEIGHT in multiples of 16 (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="denoising steps per clip (%(default)s)")
    parser.add_argument("--shift", type=float, help="noise schedule shift (7 at 480p, 11 at 720p)")
    parser.add_argument("--text-guidance", type=float, default=5.0, help="%(default)s; 1 turns it off")
    parser.add_argument("--audio-guidance", type=float, default=4.0, help="%(default)s")
    parser.add_argument("--color-correction", type=float, default=1.0, help="0 to 1 (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="%(default)s")
    parser.add_argument("--max-seconds", type=float, help="stop after this much video (as long as the voice)")
    parser.add_argument("--device", help="cuda or cpu (cuda where there is one)")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        run(options, console)
    except (InputError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; no video was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
