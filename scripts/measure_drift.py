"""Do the colours of a long video drift, and do its clips show seams? Figures for a finished video.

    python scripts/measure_drift.py out/video.mp4 [--json]

Drift: the distance in CIE Lab (ΔE of 1976; 2 is just visible) to the first picture, for each minute. Once between the
pictures' mean colours, which is what colour correction holds, and once pixel by pixel, which motion raises too.

Seams: how far a picture is from the one before, in 8-bit levels, where a clip begins and everywhere else. Without
seams the two are alike, and their ratio is 1. Clips are counted as the pipeline makes them from one scene.
"""

import argparse
import json
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from av import VideoStream
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from avatar_api.media import open_container, open_file, refused
from infinitetalk.color import lab_from_rgb
from infinitetalk.errors import InputError
from infinitetalk.timeline import FRAMES_PER_SECOND, plan

COLOR_EVERY = 5
"""Drift is slow, and exact Lab takes ten times as long as decoding: every fifth picture is measured."""
COLORS_PER_MINUTE = 60 * FRAMES_PER_SECOND // COLOR_EVERY

OnFrame = Callable[[int, int], None]
"""Told how many frames are measured, and of how many."""

_Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Minute:
    """ΔE to the first picture, the mean over a minute."""

    mean_color: float
    pixels: float


@dataclass(frozen=True)
class Seams:
    """Mean absolute differences of a picture to the one before, in 8-bit levels."""

    borders: int
    across: float
    """The mean over all borders between clips."""
    inside: float
    """The median elsewhere; cuts within clips do not move it."""
    ratio: float | None
    """None where nothing moves inside."""


@dataclass(frozen=True)
class Drift:
    frames: int
    minutes: list[Minute]
    seams: Seams | None
    """None for a video of one clip."""


def measure(video: Path, clip_frames: int = 81, motion_frames: int = 9, on_frame: OnFrame | None = None) -> Drift:
    """Measure a video of clips of `clip_frames`, of which each but the first repeats `motion_frames` unseen.

    Two pictures are held at a time, and a few bytes for each frame. Raises InputError for what is no whole video.
    """
    plan([1], clip_frames, motion_frames)  # judged before an hour of video is read
    distances, differences = array("d"), array("d")
    for frame, (picture, frames) in enumerate(_pictures(video)):
        if frame == 0:
            first, before = _lab(picture), picture
        differences.append(cv2.norm(picture, before, cv2.NORM_L1) / picture.size)
        before = picture
        if frame % COLOR_EVERY == 0:
            drift = _lab(picture) - first
            distances.extend([float(drift.mean(dim=1).norm()), float(drift.norm(dim=0).mean())])
        if on_frame is not None:
            on_frame(frame + 1, frames)

    by_color = np.array(distances).reshape(-1, 2)
    minutes = [by_color[start : start + COLORS_PER_MINUTE] for start in range(0, len(by_color), COLORS_PER_MINUTE)]
    return Drift(
        len(differences),
        [Minute(*minute.mean(axis=0).tolist()) for minute in minutes],
        _seams(np.array(differences), clip_frames, motion_frames),
    )


def _seams(differences: NDArray[np.float64], clip_frames: int, motion_frames: int) -> Seams | None:
    """differences: [frames], of each frame to the one before."""
    timeline = plan([len(differences)], clip_frames, motion_frames)
    starts = [timeline.start(clip) + timeline.new_frames(clip).start for clip in range(1, timeline.clips)]
    if not starts:
        return None
    across = float(differences[starts].mean())
    inside = float(np.median(np.delete(differences, [0, *starts])))  # there is none before the first
    return Seams(len(starts), across, inside, across / inside if inside else None)


def _lab(picture: _Pixels) -> Tensor:
    """uint8 [height, width, 3] → float64 [3, pixels]. Not OpenCV's Lab, which is up to 0.5 off even in float32."""
    return lab_from_rgb(torch.from_numpy(picture).double().div(255).flatten(0, 1).T)


def _pictures(path: Path) -> Iterator[tuple[_Pixels, int]]:
    """Every picture of a video, uint8 [height, width, 3] RGB, with how many there are."""
    param, remedy, count = "video", "measure a whole video as the pipeline writes it", 0
    with open_file(path, param) as file:
        try:
            with open_container(file) as container:
                stream = container.streams.best("video")
                if not isinstance(stream, VideoStream):
                    raise refused(path, param, f"has no pictures; {remedy}")
                if stream.average_rate != FRAMES_PER_SECOND:
                    raise refused(path, param, f"has {stream.average_rate} pictures a second, not 25; {remedy}")
                for frame in container.decode(stream):
                    count += 1
                    yield frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False), stream.frames
        except av.FFmpegError as error:
            raise refused(path, param, f"cannot be decoded ({error.strerror}); {remedy}", "damaged_file") from error
        if count < max(1, stream.frames):
            raise refused(path, param, f"holds {count} of {stream.frames} pictures; {remedy}", "damaged_file")


def tables(drift: Drift) -> list[Table]:
    """The figures, to be printed."""
    by_minute = Table("minute", "ΔE of mean colours", "mean ΔE of pixels")
    for number, minute in enumerate(drift.minutes, 1):
        by_minute.add_row(str(number), f"{minute.mean_color:.2f}", f"{minute.pixels:.2f}")
    by_border = Table("borders", "across, levels", "inside, levels", "ratio")
    if drift.seams is not None:
        seams = drift.seams
        ratio = "nothing moves inside" if seams.ratio is None else f"{seams.ratio:.2f}"
        by_border.add_row(str(seams.borders), f"{seams.across:.2f}", f"{seams.inside:.2f}", ratio)
    return [by_minute, by_border]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, help="a finished video, 25 pictures a second")
    parser.add_argument("--clip-frames", type=int, default=81, help="frames of a clip (%(default)s)")
    parser.add_argument("--motion-frames", type=int, default=9, help="of them the clip before's (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("Measuring", total=None)
            drift = measure(
                options.video,
                options.clip_frames,
                options.motion_frames,
                lambda done, frames: progress.update(task, completed=done, total=frames),
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(asdict(drift), indent=2))
    else:
        print(f"{options.video}: {drift.frames} frames")
        Console().print(*tables(drift), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
