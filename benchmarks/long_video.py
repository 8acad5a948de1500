"""Does memory stay flat for half an hour? Resident memory after every clip of a long video, and while it is made.

    python -m benchmarks.long_video [--minutes 30] [--size 64x64] [--two]

Makes a video the way scripts/generate.py does, from examples/portrait.png and a voice of its own, with tiny models
unless --models names others. Leaves long_video.mp4 (with .wav), .csv (a line per clip) and .svg (the plot) in the
output folder, and prints what grew, how long a clip took at the start and at the end, and the drift and seams of the
video. Tiny models have random weights: their pictures are noise, and drift and seams then only show the method.
"""

import argparse
import tempfile
import time
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from avatar_api.media import read_picture, read_voice
from avatar_api.video_writer import VideoWriter
from infinitetalk.geometry import output_size
from infinitetalk.pipeline import InfiniteTalkPipeline, Speaker
from infinitetalk.settings import Settings
from infinitetalk.timeline import SAMPLE_RATE
from scripts import make_tiny_snapshots
from scripts.measure_drift import measure, tables

PICTURE = Path(__file__).parent.parent / "examples" / "portrait.png"
SETTLED = 2  # the third clip: by then everything was used once, the carried motion frames too
SHORTEST = 0.5  # minutes
MB = 1e6


@dataclass(frozen=True)
class Sample:
    """One clip. Memory in MB: resident after it, the most resident while it was made, CUDA's after it."""

    seconds: float
    resident: float
    peak: float
    allocated: float
    reserved: float


def write_voice(path: Path, minutes: float, seed: int) -> Path:
    """Something like speech: syllables of buzz and hiss, four a second, phrases and pauses; no two minutes alike."""
    generator = np.random.default_rng(seed)
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1) as file:
        for minute in range(int(np.ceil(minutes))):
            seconds = minute * 60 + np.arange(round(60 * min(1, minutes - minute) * SAMPLE_RATE)) / SAMPLE_RATE
            pitch = 120 + 20 * np.sin(2 * np.pi * generator.uniform(0.1, 0.4) * seconds)
            buzz = 2 * (np.cumsum(pitch) / SAMPLE_RATE % 1) - 1
            hiss = generator.uniform(-1, 1, len(seconds))
            syllables = np.maximum(0, np.sin(2 * np.pi * 4 * seconds)) * (np.sin(2 * np.pi * 0.3 * seconds) > -0.5)
            file.write(0.3 * syllables * (0.8 * buzz + 0.2 * hiss))
    return path


def generate(
    pipeline: InfiniteTalkPipeline, voices: list[Path], size: str, steps: int, video: Path, console: Console
) -> list[Sample]:
    settings = Settings(size=size, steps=steps)
    picture = read_picture(PICTURE)
    height, width = output_size(size, *picture.shape[:2])
    speakers = [Speaker(read_voice(voice)) for voice in voices]
    samples: list[Sample] = []
    names = ",".join(field.name for field in fields(Sample))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress,
        VideoWriter(video, width, height, voices) as writer,
        video.with_suffix(".csv").open("w", buffering=1) as log,
    ):
        log.write(names + "\n")
        task = progress.add_task("First clip", total=None)
        started = time.monotonic()
        forget_peak()
        for clip in pipeline.generate(picture, speakers, "Someone talks.", settings):
            writer.write(clip.frames)
            on_gpu = (torch.cuda.memory_allocated() / MB, torch.cuda.memory_reserved() / MB)
            ended = time.monotonic()
            samples.append(Sample(ended - started, memory_in_use("VmRSS"), memory_in_use("VmHWM"), *on_gpu))
            log.write(",".join(f"{value:.3f}" for value in astuple(samples[-1])) + "\n")
            started = ended
            forget_peak()
            description = f"Clips, {samples[-1].seconds:.1f} s each, {samples[-1].resident:.0f} MB resident"
            progress.update(task, description=description, completed=len(samples), total=clip.clips)
    return samples


def memory_in_use(kind: str) -> float:
    """Linux only, in MB: "VmRSS", what is resident, mapped pages of files included, or "VmHWM", its peak."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(kind)) * 1024 / MB


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def table_of_growth(columns: dict[str, np.ndarray]) -> Table:
    table = Table("MB", "after clip 3", "at the end", "largest since", "growth, kB per clip")
    for name, values in columns.items():
        settled = values[SETTLED:]
        slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0]) * 1000
        figures = (f"{value:.1f}" for value in (settled[0], settled[-1], settled.max()))
        table.add_row(name, *figures, f"{slope:+.1f}")
    return table


def plot(columns: dict[str, np.ndarray], path: Path) -> None:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, values in columns.items():
        axes.plot(np.arange(1, len(values) + 1), values, label=name, linewidth=1)
    axes.set(xlabel="clip (72 frames, 2.88 s)", ylabel="MB", ylim=(0, None), xlim=(0, None))
    axes.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="of voice, at least 0.5 (%(default)s)")
    parser.add_argument("--size", default="64x64", help="480p, 720p or WIDTHxHEIGHT (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps per clip (%(default)s)")
    parser.add_argument("--two", action="store_true", help="two speakers, together")
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder of the three snapshots (tiny ones)")
    parser.add_argument("--output", type=Path, default=Path("out"), metavar="DIR", help="%(default)s")
    options = parser.parse_args()
    if not options.minutes >= SHORTEST:
        parser.error(f"--minutes is {options.minutes}; clips settle with the third, so it takes at least {SHORTEST}")

    console = Console()
    options.output.mkdir(parents=True, exist_ok=True)
    video = options.output / "long_video.mp4"
    voices = [
        write_voice(video.with_name(f"long_video_{number}.wav"), options.minutes, number)
        for number in range(1, 3 if options.two else 2)
    ]
    with tempfile.TemporaryDirectory() as folder:
        models = options.models or Path(folder)
        if options.models is None:
            make_tiny_snapshots.main([folder])
        pipeline = InfiniteTalkPipeline.from_snapshots(
            models / "Wan2.1-I2V-14B-480P", models / "InfiniteTalk", models / "chinese-wav2vec2-base"
        )
        samples = generate(pipeline, voices, options.size, options.steps, video, console)

    seconds, resident, peak, allocated, reserved = np.array([astuple(sample) for sample in samples]).T
    memory = {"resident, most": peak, "resident, after": resident}
    if pipeline.device.type == "cuda":
        memory |= {"CUDA, allocated": allocated, "CUDA, reserved": reserved}
    plot(memory, video.with_suffix(".svg"))
    console.print(table_of_growth(memory))
    start, end = seconds[SETTLED : SETTLED + 10].mean(), seconds[-10:].mean()
    console.print(f"{len(samples)} clips; {start:.2f} s each at the start, {end:.2f} s at the end (means of ten)")
    console.print(*tables(measure(video)), sep="\n")


if __name__ == "__main__":
    main()
