"""What it costs to run on RunPod: per second of video, and by the month, against a network volume and hosted services.

    python scripts/estimate.py                                        the guide's example: 100 GPU hours a month, L40S
    python scripts/estimate.py --gpu H100 --minutes 120 --size 720p   by minutes of video a month
    python scripts/estimate.py --gpu L40S --dollars-per-hour 1.90     at the price of the day
    python scripts/estimate.py --gpu H100 --minutes 60 --steps 4 --passes 2    with quality=fast

Where docs/PERFORMANCE.md has no measured speed for a GPU, it is reckoned: the work of the passes, over the card's
published rate, times what Diffusers reaches of that rate on an H100. Every figure is printed with where it comes from.
"""

import argparse
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

DATE = "2026-11-27"  # of the prices below, as they were known then; RunPod's catalog has those of the day
GUIDE, LISTED = "the project's guide", "RunPod's list of 2025, unchecked"

PASS_PFLOP = {"480p": 1.89, "720p": 6.8}  # of the transformer, 81 frames at 640x640 and at 960x960
CLIP_SECONDS = 72 / 25  # that a clip adds to the video
REST_SECONDS = {"480p": 11.3, "720p": 25.4}
"""Of a clip, beside its steps: VAE, colours, writing. 480p on an H100 (docs/PERFORMANCE.md), 720p by its pixels."""
PASSES = 3  # of each step: with text and voice, without text, without both; two if text guidance is off
REACHED = 0.39
"""Of a card's published rate. Diffusers on an H100 takes 9.77 s for a step of two passes of about 1.89 PFLOP."""

DOCKER_HUB = 5.0  # dollars a month, Pro
NETWORK_VOLUME = 43.0  # dollars a month: the guide's 500 GB, which its models would need
START_SECONDS = 120.0  # until a worker that has the image is ready: 57 GB at the 1.1 GB/s of safetensors, and imports
HOSTED = {"480p": 0.03, "720p": 0.06}  # dollars per second of video, WaveSpeed


@dataclass(frozen=True)
class Gpu:
    type_id: str
    """RunPod's name of the card."""
    pool: str
    """RunPod's name of the cards that a serverless worker may get in its place."""
    tflops: float
    """Published: bfloat16, dense."""
    dollars_per_second: float
    price_from: str


GPUS = {
    "RTX4090": Gpu("NVIDIA GeForce RTX 4090", "ADA_24", 165.2, 0.00031, LISTED),
    "L40S": Gpu("NVIDIA L40S", "ADA_48_PRO", 362.0, 0.00019, GUIDE),
    "A100": Gpu("NVIDIA A100 80GB PCIe", "AMPERE_80", 312.0, 0.00076, LISTED),
    "H100": Gpu("NVIDIA H100 80GB HBM3", "ADA_80_PRO", 989.4, 0.00116, LISTED),
    "H200": Gpu("NVIDIA H200", "HOPPER_141", 989.4, 0.00155, LISTED),
}
MEASURED = {("H100", "480p"): 3.55, ("H200", "480p"): 3.56, ("H200", "720p"): 12.5}
"""(GPU, size) → seconds per pass, from docs/PERFORMANCE.md."""


@dataclass(frozen=True)
class Speed:
    """Seconds of GPU per second of video."""

    seconds: float
    source: str


def speed(gpu: str, size: str, steps: int = 40, passes: int = PASSES) -> Speed:
    if (gpu, size) in MEASURED:
        a_pass, source = MEASURED[gpu, size], "passes measured, docs/PERFORMANCE.md"
    else:
        a_pass = PASS_PFLOP[size] * 1e3 / (GPUS[gpu].tflops * REACHED)
        source = f"reckoned: {PASS_PFLOP[size]} PFLOP a pass, {REACHED:.0%} of {GPUS[gpu].tflops:g} TFLOPS"
    return Speed((a_pass * steps * passes + REST_SECONDS[size]) / CLIP_SECONDS, source)


@dataclass(frozen=True)
class Month:
    """Dollars."""

    gpu: float
    embedded: float
    """With the models in the image: the GPU, and Docker Hub."""
    volume: float
    """With the models on a network volume."""


def month(gpu_hours: float, dollars_per_second: float) -> Month:
    used = gpu_hours * 3600 * dollars_per_second
    return Month(used, used + DOCKER_HUB, used + NETWORK_VOLUME)


def report(options: argparse.Namespace) -> list[Table]:
    gpu = GPUS[options.gpu]
    price = gpu.dollars_per_second if options.dollars_per_hour is None else options.dollars_per_hour / 3600
    price_from = f"{gpu.price_from}, {DATE}" if options.dollars_per_hour is None else "as given"
    made = speed(options.gpu, options.size, options.steps, options.passes)
    hours = options.hours if options.minutes is None else options.minutes * 60 * made.seconds / 3600
    minutes = hours * 60 / made.seconds
    starts = options.cold_starts * START_SECONDS / 3600
    costs = month(hours + starts, price)

    each = Table(
        "", "", "from", title=f"{options.gpu}, {options.size}, {options.steps} steps of {options.passes} passes"
    )
    each.add_row("a second of GPU", f"${price:.5f}, ${price * 3600:.3f} an hour", price_from)
    each.add_row("a second of video", f"{made.seconds:.0f} s of GPU", made.source)
    each.add_row("", f"${made.seconds * price:.3f}", "both")
    each.add_row("the same, hosted", f"${HOSTED[options.size]:.2f}", "WaveSpeed, 2026-11")
    each.add_row("a cold start", f"{START_SECONDS:.0f} s, ${START_SECONDS * price:.3f}", "reckoned; image on the host")

    monthly = Table("a month", "dollars", "about", title=f"{hours:.0f} GPU hours, {minutes:.0f} minutes of video")
    for name, dollars in (
        ("the GPU", costs.gpu),
        (f"and Docker Hub Pro, ${DOCKER_HUB:g}: models in the image", costs.embedded),
        (f"or a network volume, ${NETWORK_VOLUME:g}: models on it", costs.volume),
        ("saved by the image", costs.volume - costs.embedded),
        ("the minutes, hosted", minutes * 60 * HOSTED[options.size]),
    ):
        monthly.add_row(name, f"{dollars:.2f}", f"{dollars:.0f}")
    return [each, monthly]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="L40S", help="%(default)s")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--hours", type=float, default=100.0, help="of GPU a month (%(default)g)")
    amount.add_argument("--minutes", type=float, help="of video a month, instead")
    parser.add_argument("--size", choices=PASS_PFLOP, default="480p", help="%(default)s")
    parser.add_argument("--steps", type=int, default=40, help="%(default)s")
    parser.add_argument("--passes", type=int, choices=(1, 2, 3), default=PASSES, help="per step (%(default)s)")
    parser.add_argument("--cold-starts", type=int, default=0, help="a month, paid for (%(default)s)")
    parser.add_argument("--dollars-per-hour", type=float, help="of the GPU, instead of the table's")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    console = Console(width=120)
    for table in report(parse(arguments)):
        console.print(table)


if __name__ == "__main__":
    main()
