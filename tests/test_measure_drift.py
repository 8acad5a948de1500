"""Drift and seams of videos whose drift and seams are known."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from avatar_api.video_writer import VideoWriter
from infinitetalk.errors import InputError
from scripts.measure_drift import main, measure
from tests.conftest import REPOSITORY

Pixels = NDArray[np.uint8]

SIDE = 32
MINUTE = 1500  # frames

GROWTH = """
import re, sys
from pathlib import Path
from scripts.measure_drift import measure

Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the process that this one was forked from
peaks = []
for video in sys.argv[1:]:
    measure(Path(video))
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
print(peaks[1] - peaks[0])  # kB
"""


def write(path: Path, *pieces: Pixels) -> Path:
    with VideoWriter(path, SIDE, SIDE, None) as writer:
        for frames in pieces:
            writer.write(frames)
    return path


def flat(frames: int, red: int, green: int, blue: int) -> Pixels:
    return np.full((frames, SIDE, SIDE, 3), (red, green, blue), np.uint8)


def waves(frames: int, jumps_at: Sequence[int]) -> Pixels:
    """Waves that move a little with every frame, and by a quarter of their length in the frames `jumps_at`."""
    moved = np.full(frames, 0.1)
    moved[list(jumps_at)] = np.pi / 2
    phase = np.arange(SIDE) / 3 + np.cumsum(moved)[:, None]
    rows = (128 + 80 * np.sin(phase)).astype(np.uint8)
    return np.broadcast_to(rows[:, None, :, None], (frames, SIDE, SIDE, 3)).copy()


def test_a_video_that_stands_still_has_no_drift_and_no_seams(tmp_path: Path) -> None:
    drift = measure(write(tmp_path / "video.mp4", flat(200, 200, 120, 40)))
    assert drift.frames == 200
    assert [(minute.mean_color, minute.pixels) for minute in drift.minutes] == [(0, 0)]
    assert drift.seams is not None
    assert (drift.seams.borders, drift.seams.across, drift.seams.inside, drift.seams.ratio) == (2, 0, 0, None)


def test_drift_is_the_distance_in_lab_to_the_first_frame_by_minute(tmp_path: Path) -> None:
    video = write(
        tmp_path / "video.mp4",
        flat(MINUTE // 2, 0, 0, 0),  # Lab 0, 0, 0
        flat(MINUTE // 2, 255, 255, 255),  # 100, 0, 0
        flat(MINUTE, 119, 119, 119),  # 50.0, 0, 0
        flat(100, 255, 0, 0),  # 53.2, 80.1, 67.2
    )
    minutes = measure(video).minutes
    assert minutes[0].mean_color == pytest.approx(50, abs=0.05)
    assert [minute.mean_color for minute in minutes] == pytest.approx([50, 50, 117.3], abs=0.5)  # as encoded
    assert [minute.pixels for minute in minutes] == pytest.approx([minute.mean_color for minute in minutes])


def test_pixels_that_change_places_are_no_drift_of_the_mean_color(tmp_path: Path) -> None:
    frames = flat(100, 119, 119, 119)
    frames[:50, :, : SIDE // 2] = 171
    frames[50:, :, SIDE // 2 :] = 171
    (minute,) = measure(write(tmp_path / "video.mp4", frames)).minutes
    assert minute.mean_color < 0.5
    assert minute.pixels == pytest.approx(20 / 2, abs=0.7)  # half of the time, everywhere


@pytest.mark.parametrize(("clip_frames", "motion_frames"), [(81, 9), (33, 5)])
def test_a_jump_where_each_clip_begins_is_a_seam(tmp_path: Path, clip_frames: int, motion_frames: int) -> None:
    stride = clip_frames - motion_frames
    starts = [clip_frames, clip_frames + stride, clip_frames + 2 * stride]
    video = write(tmp_path / "video.mp4", waves(starts[-1] + 1, starts))
    seams = measure(video, clip_frames, motion_frames).seams
    assert seams is not None
    assert seams.borders == 3
    assert seams.inside == pytest.approx(
        0.1 * 80 * 2 / np.pi, rel=0.2
    )  # sine waves: what they moved, times the mean slope
    assert seams.across == pytest.approx(72, rel=0.2)  # of sin(x + π/2) - sin(x): 80 * √2 * 2 / π
    assert seams.ratio == pytest.approx(seams.across / seams.inside)


@pytest.mark.parametrize("jumps", [[80, 152, 224], [82, 154, 226], range(4, 300, 10)])
def test_jumps_elsewhere_are_no_seams(tmp_path: Path, jumps: Sequence[int]) -> None:
    seams = measure(write(tmp_path / "video.mp4", waves(300, jumps))).seams
    assert seams is not None
    assert seams.ratio == pytest.approx(1, abs=0.25)


def test_seams_do_not_count_as_inside(tmp_path: Path) -> None:
    jumps = [frame for frame in range(1, 200) if frame % 4 in (1, 2)]  # at every border, and in every third frame else
    seams = measure(write(tmp_path / "video.mp4", waves(200, jumps)), clip_frames=5, motion_frames=1).seams
    assert seams is not None
    assert seams.across > 4 * seams.inside


def test_a_single_clip_has_no_seams(tmp_path: Path) -> None:
    assert measure(write(tmp_path / "video.mp4", waves(81, []))).seams is None
    assert measure(write(tmp_path / "one.mp4", waves(1, []))).frames == 1


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    short, long = (write(tmp_path / f"{frames}.mp4", waves(frames, [])) for frames in (100, 5000))  # 0.3 and 15 MB
    run = subprocess.run([sys.executable, "-c", GROWTH, short, long], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 5000


def test_the_command_prints_a_line_for_each_minute(tmp_path: Path) -> None:
    video = write(tmp_path / "video.mp4", waves(1600, [81]))
    command = [sys.executable, "scripts/measure_drift.py", str(video)]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "1600 frames" in run.stdout
    assert [line.split("│")[1].strip() for line in run.stdout.splitlines() if "│" in line] == ["1", "2", "22"]


def test_json_has_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = write(tmp_path / "video.mp4", waves(50, [33]))
    assert main([str(video), "--json", "--clip-frames", "33", "--motion-frames", "5"]) == 0
    figures = json.loads(capsys.readouterr().out)
    drift = measure(video, 33, 5)
    assert drift.seams is not None
    assert figures["frames"] == 50
    assert figures["minutes"] == [{"mean_color": drift.minutes[0].mean_color, "pixels": drift.minutes[0].pixels}]
    assert figures["seams"]["ratio"] == drift.seams.ratio


def test_what_is_no_whole_video_is_refused(tmp_path: Path) -> None:
    names = ("text.mp4", "sound.wav", "fast.mp4", "cut_off.mp4", "cut_between.mp4")
    text, sound, fast, cut_off, cut_between = (tmp_path / name for name in names)
    text.write_text("no video")
    soundfile.write(sound, np.zeros(16000, np.float32), 16000)
    whole = write(tmp_path / "whole.mp4", np.random.default_rng(0).integers(0, 256, (60, SIDE, SIDE, 3), np.uint8))
    with av.open(str(whole)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.pos is not None]
    cut_off.write_bytes(whole.read_bytes()[: ends[49] + 7])
    cut_between.write_bytes(whole.read_bytes()[: ends[49]])
    with av.open(str(fast), "w") as container:
        stream = container.add_stream("libx264", rate=30, width=SIDE, height=SIDE)
        container.mux(stream.encode(av.VideoFrame(SIDE, SIDE, "yuv420p")))
        container.mux(stream.encode(None))

    for video, problem in [
        (tmp_path / "missing.mp4", "'missing.mp4' does not exist"),
        (text, "'text.mp4' cannot be decoded"),
        (sound, "'sound.wav' has no pictures"),
        (fast, "'fast.mp4' has 30 pictures a second"),
        (cut_off, "'cut_off.mp4' cannot be decoded"),
        (cut_between, "'cut_between.mp4' holds 50 of 60 pictures"),
    ]:
        with pytest.raises(InputError, match=problem):
            measure(video)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing.mp4"], "'missing.mp4' does not exist"),
        (["missing.mp4", "--clip-frames", "80"], "frames_per_clip is 80"),
        (["missing.mp4", "--motion-frames", "81"], "motion_frames is 81"),
    ],
)
def test_the_command_says_what_is_wrong(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    assert message in capsys.readouterr().err
