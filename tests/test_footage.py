"""A video of any make becomes its pictures at 25 per second, upright, or is refused; its cuts are found."""

import math
import os
import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from PIL import Image

from avatar_api import footage as footage_module
from avatar_api.footage import Footage, read_reference, scene_starts
from avatar_api.media import read_picture, read_voice
from avatar_api.video_writer import VideoWriter
from infinitetalk.errors import InputError
from tests.conftest import REPOSITORY

Pixels = NDArray[np.uint8]

BITS = 11
TEXTURE = np.kron(np.random.default_rng(0).integers(40, 216, (2, 11, 3)), np.ones((8, 8, 1))).astype(np.uint8)


def numbered(number: int) -> Pixels:
    """88x48: its number as black and white bars, over a texture that moves."""
    bars = np.array([255 * (number >> bit & 1) for bit in range(BITS)], np.uint8).repeat(8)
    top = np.broadcast_to(bars[None, :, None], (32, 88, 3))
    return np.concatenate([top, np.roll(TEXTURE, number, axis=1)])


def number_of(pixels: Pixels) -> int:
    middles = ((np.arange(BITS) + 0.5) / BITS * pixels.shape[1]).astype(int)
    bars = pixels[12:20, middles].mean(axis=(0, 2))
    return int(((bars > 127) << np.arange(BITS)).sum())


def film(
    path: Path,
    pictures: Iterable[Pixels],
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    times: Sequence[int] | None = None,
    clock: Fraction = Fraction(1, 25),
    rate: Fraction | int = 25,
    turned: tuple[int, bool, bool] | None = None,
    pixel_aspect: Fraction | None = None,
    faststart: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    """A video file; `times` count in `clock` seconds."""
    with av.open(str(path), "w", options={"movflags": "+faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        assert isinstance(stream, av.VideoStream)
        for number, pixels in enumerate(pictures):
            if not number:
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt = pixel_format
                stream.codec_context.time_base = clock
                if turned:
                    stream.set_display_rotation(*turned)
                if pixel_aspect:
                    stream.codec_context.sample_aspect_ratio = pixel_aspect
            frame = av.VideoFrame.from_ndarray(pixels, {3: "rgb24", 4: "rgba"}[pixels.shape[2]])
            frame = frame.reformat(format=pixel_format, threads=1)  # several do not always repeat themselves
            frame.pts, frame.time_base = number if times is None else times[number], clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if codec == "libsvtav1":  # as root it gives the process real-time priority, and then all others wait for this one
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def count_up(length: int) -> Iterable[Pixels]:
    return (numbered(number) for number in range(length))


def decoded(path: Path) -> list[Pixels]:
    """All pictures of the file in their order, by PyAV."""
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24").astype(np.uint8) for frame in video.decode(video=0)]


def numbers(path: Path) -> list[int]:
    with Footage(path) as footage:
        return [number_of(footage[index]) for index in range(len(footage))]


def refusal(path: Path, code: str) -> str:
    """Why the video is refused. Every message names the input and the file, and no folder of the server."""
    with pytest.raises(InputError) as refused:
        Footage(path, "film")
    message = str(refused.value)
    assert (refused.value.param, refused.value.code) == ("film", code)
    assert message.startswith(f"film: '{path.name}' ")
    assert str(path.parent) not in message
    return message


REORDERED = {"x264-params": "keyint=50:bframes=2:b-adapt=0:scenecut=0"}
CODECS = [
    ("h264.mp4", "libx264", "yuv420p", REORDERED),
    ("h264.mov", "libx264", "yuv420p", REORDERED),
    ("h264.mkv", "libx264", "yuv420p", REORDERED),
    ("h264.avi", "libx264", "yuv420p", REORDERED),
    ("h264.flv", "libx264", "yuv420p", REORDERED),
    ("h264.ts", "libx264", "yuv420p", REORDERED),
    ("h264-10-bit.mkv", "libx264", "yuv420p10le", REORDERED),
    ("h264-444.mp4", "libx264", "yuv444p", REORDERED),
    ("h264-open-gop.mp4", "libx264", "yuv420p", {"x264-params": "open-gop=1:keyint=50:bframes=2:b-adapt=0:scenecut=0"}),
    ("h264-open-gop.ts", "libx264", "yuv420p", {"x264-params": "open-gop=1:keyint=50:bframes=2:b-adapt=0:scenecut=0"}),
    ("h264-without-keys.mp4", "libx264", "yuv420p", {"x264-params": "intra-refresh=1:keyint=50"}),
    ("hevc.mp4", "libx265", "yuv420p", {"preset": "ultrafast", "x265-params": "log-level=none:keyint=50"}),
    ("hevc-10-bit.mp4", "libx265", "yuv420p10le", {"preset": "ultrafast", "x265-params": "log-level=none:keyint=50"}),
    ("vp8.webm", "libvpx", "yuv420p", {"g": "50", "deadline": "realtime"}),
    ("vp9.webm", "libvpx-vp9", "yuv420p", {"g": "50", "deadline": "realtime", "cpu-used": "8"}),
    ("av1.mp4", "libsvtav1", "yuv420p", {"g": "50", "preset": "13"}),
    ("mpeg4.avi", "mpeg4", "yuv420p", {"bf": "2"}),
    ("mpeg4.mp4", "mpeg4", "yuv420p", {"bf": "2"}),
    ("mpeg2.ts", "mpeg2video", "yuv420p", {"bf": "2"}),
    ("mjpeg.mov", "mjpeg", "yuvj444p", {}),
    ("prores.mov", "prores_ks", "yuv422p10le", {}),
    ("ffv1.mkv", "ffv1", "bgr0", {}),
    ("raw.avi", "rawvideo", "yuv420p", {}),
    ("flv.flv", "flv", "yuv420p", {}),
    ("wmv.asf", "wmv2", "yuv420p", {}),
    ("animation.mov", "qtrle", "rgb24", {}),
]


@pytest.mark.parametrize(("name", "codec", "pixel_format", "options"), CODECS, ids=[codec[0] for codec in CODECS])
def test_25_pictures_a_second_are_its_own_whatever_the_format(
    tmp_path: Path, name: str, codec: str, pixel_format: str, options: dict[str, str]
) -> None:
    """Bit for bit, forwards and backwards."""
    path = film(tmp_path / name, count_up(60), codec, pixel_format, options=options)
    own = decoded(path)
    with Footage(path) as footage:
        assert len(footage) == 60
        assert (footage.height, footage.width) == (48, 88)
        for index, pixels in enumerate(footage):
            assert pixels.dtype == np.uint8
            assert np.array_equal(pixels, own[index])
            assert number_of(pixels) == index
        for index in (59, 12, 55, 0):
            assert np.array_equal(footage[index], own[index])


def test_dvds_give_their_own_pictures(tmp_path: Path) -> None:
    """Detailed ones: MPEG's program streams tell the time only every 2 kB."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 128, 160, 3), np.uint8)
    path = film(tmp_path / "film.mpg", noise, "mpeg2video", options={"bf": "2", "qmax": "3"})
    with Footage(path) as footage:
        assert len(footage) == 30
        np.testing.assert_array_equal(list(footage), decoded(path))


LONG = [
    *(codec for codec in CODECS if codec[1] in ("libx264", "libvpx-vp9", "mpeg4") or codec[0] == "mpeg2.ts"),
    ("h264-rare-keys.ts", "libx264", "yuv420p", {"x264-params": "keyint=550:min-keyint=550:scenecut=0"}),
    ("mpeg4-rare-keys.ts", "mpeg4", "yuv420p", {"g": "550"}),
]


@pytest.mark.parametrize(("name", "codec", "pixel_format", "options"), LONG, ids=[codec[0] for codec in LONG])
def test_a_run_may_resume_anywhere(
    tmp_path: Path, name: str, codec: str, pixel_format: str, options: dict[str, str]
) -> None:
    """The same pictures as on the way there."""
    path = film(tmp_path / name, count_up(600), codec, pixel_format, options=options)
    own = decoded(path)
    with Footage(path) as footage:
        for index in (*range(0, 600, 72), 599, 530, 12, 563, 72, 0):
            assert np.array_equal(footage[index], own[index])
    for index in (513, 599):
        with Footage(path) as footage:
            assert np.array_equal(footage[index], own[index])


def test_the_conditioning_video_of_the_reference_gives_its_own_pictures() -> None:
    path = REPOSITORY / "tests/goldens/e2e/inputs/cond_video.mkv"
    with Footage(path) as footage:
        np.testing.assert_array_equal([footage[index] for index in range(len(footage))], decoded(path))


def test_past_the_end_the_last_picture_stays_and_before_the_start_is_nothing(tmp_path: Path) -> None:
    with Footage(film(tmp_path / "film.mp4", count_up(30))) as footage:
        assert [number_of(footage[index]) for index in (30, 2000, 5, 10**9)] == [29, 29, 5, 29]
        with pytest.raises(IndexError, match=r"begins at picture 0; there is no -1"):
            footage[-1]


@pytest.mark.parametrize("rate", [5, Fraction(25, 2), 24, Fraction(24000, 1001), 30, Fraction(30000, 1001), 50, 60])
@pytest.mark.parametrize(("name", "clock"), [("film.mp4", 90000), ("film.mkv", 1000), ("film.ts", 90000)])
def test_other_frame_rates_are_resampled_by_time(tmp_path: Path, rate: Fraction | int, name: str, clock: int) -> None:
    """The picture that a player shows at that time, for as long as it plays."""
    count = round(4 * rate)
    path = film(tmp_path / name, count_up(count), clock=1 / Fraction(rate), rate=rate, options={"bf": "0"})
    starts = [round(number / rate * clock) / clock for number in range(count)]
    length = math.ceil((count / rate - 0.004) * 25)
    with Footage(path) as footage:
        assert number_of(footage[length + 50]) == number_of(footage[length - 1])
    assert numbers(path) == [
        max(number for number, start in enumerate(starts) if start <= index / 25 + 0.004) for index in range(length)
    ]


def test_variable_frame_rates_are_resampled_by_time(tmp_path: Path) -> None:
    times = [0, 10, 30, 400, 401, 440, 1000, 1040, 1080]  # ms
    path = film(tmp_path / "film.mkv", count_up(len(times)), times=times, clock=Fraction(1, 1000))
    found = numbers(path)
    assert found == [max(number for number, time in enumerate(times) if time <= index * 40 + 4) for index in range(28)]
    assert found[:2] + found[9:12] + found[24:] == [0, 2, 2, 4, 5, 5, 6, 7, 8]


def test_time_stamps_that_a_container_rounds_are_those_of_25_pictures(tmp_path: Path) -> None:
    jitter = np.random.default_rng(0).integers(-2, 3, 200)  # ms
    times = [int(1021 + 40 * number + jitter[number]) for number in range(200)]
    path = film(tmp_path / "film.mkv", count_up(200), times=times, clock=Fraction(1, 1000))
    assert numbers(path) == list(range(200))


@pytest.mark.parametrize("name", ["film.mp4", "film.ts", "film.mkv", "film.flv"])
def test_time_begins_with_the_first_picture(tmp_path: Path, name: str) -> None:
    times = list(range(50, 90))
    assert numbers(film(tmp_path / name, count_up(40), times=times)) == list(range(40))


def test_a_single_picture_is_a_video_of_one(tmp_path: Path) -> None:
    for name, codec in (("film.mp4", "libx264"), ("film.flv", "flv"), ("film.mkv", "ffv1")):
        pixel_format = "bgr0" if codec == "ffv1" else "yuv420p"
        assert numbers(film(tmp_path / name, [numbered(77)], codec, pixel_format)) == [77]


def test_edit_lists_are_followed(tmp_path: Path) -> None:
    """As phones write them when a video is trimmed: what is cut away is in the file, but not shown."""
    path = film(tmp_path / "film.mp4", count_up(100), options={"bf": "0"})
    content = bytearray(path.read_bytes())
    entry = content.index(b"elst") + 12
    duration, start, rate = struct.unpack_from(">IiI", content, entry)
    assert (duration, start, rate) == (4000, 0, 65536)
    struct.pack_into(">Ii", content, entry, 2000, 30 * 512)
    path.write_bytes(content)
    assert numbers(path) == list(range(30, 80))


def test_a_later_start_than_the_sounds_is_left_out(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", count_up(40), times=[25 + number for number in range(40)])
    with av.open(str(path)) as video:
        assert video.streams.video[0].start_time == 25 * 512
    assert numbers(path) == list(range(40))


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("down", [False, True])
def test_phones_videos_come_upright(tmp_path: Path, turn: int, across: bool, down: bool) -> None:
    pixels = np.full((32, 64, 3), 128, np.uint8)
    pixels[:8, :16], pixels[:8, 48:], pixels[24:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    upright = np.rot90(pixels, turn // 90)  # counterclockwise
    upright = upright[:, ::-1] if across else upright
    upright = upright[::-1] if down else upright
    path = film(tmp_path / "phone.mov", [pixels] * 3, "libx264", "yuv444p", turned=(turn, across, down))
    with Footage(path) as footage:
        assert (footage.height, footage.width) == upright.shape[:2]
        assert footage[2].flags.c_contiguous
        np.testing.assert_allclose(footage[2], upright, atol=24)


def test_other_angles_are_turned_to_the_nearest_quarter(tmp_path: Path) -> None:
    path = film(tmp_path / "phone.mp4", [numbered(700)] * 3, turned=(80, False, False))
    with Footage(path) as footage:
        assert (footage.height, footage.width) == (88, 48)
        assert number_of(np.rot90(footage[0], -1)) == 700


@pytest.mark.parametrize(
    ("aspect", "size"), [(Fraction(16, 11), (48, 128)), (Fraction(8, 9), (54, 88)), (Fraction(1), (48, 88))]
)
def test_pixels_that_are_not_square_are_stretched_not_shrunk(
    tmp_path: Path, aspect: Fraction, size: tuple[int, int]
) -> None:
    for name in ("tv.mp4", "tv.ts", "tv.mkv"):
        with Footage(film(tmp_path / name, count_up(40), pixel_aspect=aspect)) as footage:
            assert (footage.height, footage.width) == size
            assert footage[2].shape == (*size, 3)
            assert number_of(footage[2]) == 2


def test_pixels_are_stretched_before_the_picture_is_turned(tmp_path: Path) -> None:
    path = film(tmp_path / "tv.mp4", count_up(3), pixel_aspect=Fraction(16, 11), turned=(90, False, False))
    with Footage(path) as footage:
        assert (footage.height, footage.width) == (128, 48)
        assert number_of(np.rot90(footage[2], -1)) == 2


@pytest.mark.parametrize(
    ("pixel_format", "codec"), [("yuv420p", "mpeg4"), ("yuvj420p", "mjpeg"), ("yuvj420p", "libx264")]
)
@pytest.mark.parametrize("grey", [0, 20, 128, 240, 255])
def test_limited_and_full_range_give_the_same_greys(tmp_path: Path, pixel_format: str, codec: str, grey: int) -> None:
    path = film(tmp_path / "film.mkv", [np.full((32, 32, 3), grey, np.uint8)] * 2, codec, pixel_format)
    with Footage(path) as footage:
        assert np.abs(footage[1].astype(int) - grey).max() <= 2


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_is_taken_as_it_is_stored(tmp_path: Path, transfer: str) -> None:
    def recording(name: str, tags: str) -> Path:
        options = {"x264-params": "asm=SSE4.2" + tags}  # repeatable, as in avatar_api.video_writer
        return film(tmp_path / name, count_up(3), pixel_format="yuv420p10le", options=options)

    path = recording("hdr.mp4", f":colorprim=bt2020:transfer={transfer}")
    with av.open(str(path)) as video:
        assert video.streams.video[0].codec_context.color_trc == {"smpte2084": 16, "arib-std-b67": 18}[transfer]
    with Footage(path) as footage, Footage(recording("sdr.mp4", "")) as sdr:
        np.testing.assert_array_equal(footage[2], sdr[2])


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 30, 90)])
def test_videos_made_here_keep_their_colors(tmp_path: Path, color: tuple[int, int, int]) -> None:
    with VideoWriter(tmp_path / "own.mp4", 64, 64, None) as writer:
        writer.write(np.full((3, 64, 64, 3), color, np.uint8))
    with Footage(tmp_path / "own.mp4") as footage:
        assert np.abs(footage[2].astype(int) - color).max() <= 3


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [
        ("title.mov", "qtrle", "argb"),
        ("title.mov", "png", "rgba"),
        ("title.mov", "prores_ks", "yuva444p10le"),
        ("title.mkv", "ffv1", "bgra"),
    ],
)
def test_transparency_is_laid_over_white(tmp_path: Path, name: str, codec: str, pixel_format: str) -> None:
    layers = np.zeros((32, 48, 4), np.uint8)
    layers[..., 0] = 255
    layers[..., 3] = np.repeat([255, 128, 0], 16)
    options = {"profile": "4444"} if codec == "prores_ks" else {}
    with Footage(film(tmp_path / name, [layers] * 2, codec, pixel_format, options=options)) as footage:
        colors = footage[1][16, [8, 24, 40]]
    np.testing.assert_allclose(colors, [(255, 0, 0), (255, 127, 127), (255, 255, 255)], atol=4)


def test_interlaced_pictures_are_taken_as_they_are(tmp_path: Path) -> None:
    path = film(tmp_path / "tape.ts", count_up(30), "mpeg2video", options={"flags": "+ildct+ilme"})
    with Footage(path) as footage:
        np.testing.assert_array_equal(list(footage), decoded(path))


def test_a_size_that_changes_is_scaled_to_the_first(tmp_path: Path) -> None:
    small = film(tmp_path / "small.ts", count_up(30))
    wide = np.full((80, 176, 3), 255, np.uint8)
    large = film(tmp_path / "large.ts", [wide] * 20, times=range(32, 52))
    (tmp_path / "film.ts").write_bytes(small.read_bytes() + large.read_bytes())
    assert decoded(tmp_path / "film.ts")[-1].shape == (80, 176, 3)
    with Footage(tmp_path / "film.ts") as footage:
        assert len(footage) == 50
        assert [number_of(footage[index]) for index in (0, 29)] == [0, 29]
        assert footage[45].shape == (48, 88, 3)
        assert footage[45].min() > 250


def test_pictures_that_grow_too_large_on_the_way_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = film(tmp_path / "small.ts", count_up(30))
    large = film(tmp_path / "large.ts", [np.full((80, 176, 3), 255, np.uint8)] * 20, times=range(32, 52))
    (tmp_path / "film.ts").write_bytes(small.read_bytes() + large.read_bytes())
    monkeypatch.setattr(footage_module, "MAX_PIXELS", 10_000)
    with Footage(tmp_path / "film.ts") as footage:
        assert number_of(footage[45]) == 29


def places(path: Path) -> list[int]:
    """Where in the file each packet lies, as far as its container tells."""
    with av.open(str(path)) as video:
        return [packet.pos for packet in video.demux(video=0) if packet.pos is not None]


@pytest.mark.parametrize("name", ["film.mkv", "film.ts", "film.avi", "film.flv", "film.mp4"])
@pytest.mark.parametrize("kept", [60, 150])
def test_a_file_cut_off_plays_as_far_as_it_goes(tmp_path: Path, name: str, kept: int) -> None:
    path = film(tmp_path / name, count_up(200), faststart=True, options={"g": "10"})
    path.write_bytes(path.read_bytes()[: places(path)[kept] + 1])
    found = numbers(path)
    assert found[: kept - 4] == list(range(kept - 4))
    assert len(found) <= kept + 4


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_a_recording_that_begins_in_the_middle_begins_with_its_first_whole_picture(tmp_path: Path, codec: str) -> None:
    path = film(tmp_path / "live.ts", count_up(100), codec, options={"g": "20", "bf": "2", "sc_threshold": "0"})
    path.write_bytes(path.read_bytes()[places(path)[27] :])
    found = numbers(path)
    assert found[0] in range(38, 43)
    assert found == list(range(found[0], 100))


def test_damage_in_the_middle_costs_only_pictures_around_it(tmp_path: Path) -> None:
    path = film(tmp_path / "film.ts", count_up(200), options={"g": "10"})
    content, start, end = bytearray(path.read_bytes()), *(places(path)[number] for number in (100, 110))
    content[start:end] = np.random.default_rng(0).bytes(end - start)
    path.write_bytes(content)
    found = numbers(path)
    assert len(found) == 200
    assert found != list(range(200))
    assert found[:95] + found[120:] == [*range(95), *range(120, 200)]


def without_times(path: Path, missing: range) -> None:
    """Take the time stamps of some pictures out of a TS file: the flags in the headers of MPEG's packets."""
    content, start, number = bytearray(path.read_bytes()), -1, 0
    while (start := content.find(b"\0\0\1\xe0", start + 1)) >= 0:
        if number in missing:
            content[start + 7] = 0
        number += 1
    path.write_bytes(content)


def test_pictures_without_a_time_follow_the_one_before(tmp_path: Path) -> None:
    path = film(tmp_path / "film.ts", count_up(40))
    without_times(path, range(10, 30, 3))
    assert numbers(path) == list(range(40))


def test_pictures_before_the_first_time_are_left_out(tmp_path: Path) -> None:
    path = film(tmp_path / "film.ts", count_up(40), options={"bf": "0"})
    without_times(path, range(3))
    assert numbers(path) == list(range(3, 40))


def test_a_video_without_times_is_refused(tmp_path: Path) -> None:
    path = film(tmp_path / "film.ts", count_up(40))
    without_times(path, range(40))
    assert "no picture that can be decoded and has its time; export it again" in refusal(path, "damaged_file")


def test_clocks_that_jump_back_are_refused(tmp_path: Path) -> None:
    """Recordings that were joined without a new clock: half of them would be lost in silence."""
    one = film(tmp_path / "one.ts", count_up(100)).read_bytes()
    (tmp_path / "two.ts").write_bytes(one + one)
    assert "jumps back in time after 3.9 s; export it again as MP4" in refusal(tmp_path / "two.ts", "damaged_file")


def test_resuming_late_in_a_long_video_reads_only_what_it_needs(tmp_path: Path) -> None:
    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])  # bytes

    path = film(tmp_path / "film.mkv", count_up(1500), "mjpeg", "yuvj420p")
    with Footage(path) as footage:
        before = read()
        assert number_of(footage[1400]) == 1400
        assert read() - before < path.stat().st_size / 2


def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    frames = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), np.uint8)
    path = film(tmp_path / "film.mkv", (frames[number % 4] for number in range(400)), "mpeg4")
    with Footage(path) as footage:
        assert footage[50].shape == (256, 256, 3)
        before = resident()
        for index in range(50, 400, 3):
            assert footage[index].any()
        assert resident() - before < 15e6  # the 400 pictures are 79 MB


def test_files_are_closed(tmp_path: Path) -> None:
    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    path = film(tmp_path / "film.ts", count_up(40))
    before = opened()
    with Footage(path) as footage:
        footage[30], footage[0]
        assert opened() == before + 2  # ours, and FFmpeg's copy
    assert opened() == before
    without_times(path, range(40))
    with pytest.raises(InputError) as kept:
        Footage(path)
    assert opened() == before, kept
    (tmp_path / "text.mp4").write_text("text")
    with pytest.raises(InputError) as kept:
        Footage(tmp_path / "text.mp4")
    assert opened() == before, kept


def test_pictures_stay_pictures_and_videos_videos_whatever_their_names(tmp_path: Path) -> None:
    Image.fromarray(numbered(3)).save(tmp_path / "video.mp4", format="PNG")
    reference = read_reference(tmp_path / "video.mp4")
    assert isinstance(reference, np.ndarray)
    np.testing.assert_array_equal(reference, numbered(3))

    reference = read_reference(film(tmp_path / "film.mp4", count_up(5)).rename(tmp_path / "picture.png"))
    assert isinstance(reference, Footage)
    assert number_of(reference[4]) == 4
    reference.close()


@pytest.mark.parametrize("name", ["animation.webp", "animation.png"])
def test_animated_pictures_stay_pictures(tmp_path: Path, name: str) -> None:
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=100)
    reference = read_reference(tmp_path / name)
    assert isinstance(reference, np.ndarray)
    np.testing.assert_array_equal(reference, read_picture(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>404</html>", "looks like text"),
        (b"%PDF-1.7\n%\xc7\xec\x8f\xa2", "looks like a PDF document"),
        (b"PK\x03\x04" + bytes(60), "looks like a ZIP archive"),
        (bytes(range(64)), "looks like none of the formats known here"),
        (b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n", "looks like text"),
        (b"ffconcat version 1.0\nfile film.mp4\n", "looks like text"),
    ],
    ids=["text", "PDF", "ZIP", "unknown", "HLS", "concat"],
)
def test_files_of_other_kinds_are_refused_with_what_they_look_like(
    tmp_path: Path, content: bytes, message: str
) -> None:
    film(tmp_path / "film.mp4", count_up(3))
    (tmp_path / "file.mp4").write_bytes(content)
    told = refusal(tmp_path / "file.mp4", "unsupported_format")
    assert f"{message}, and no video can be read from it; send an MP4, MOV, WebM, MKV or AVI video" in told
    with pytest.raises(InputError, match="or a PNG, JPEG or WebP picture"):
        read_reference(tmp_path / "file.mp4")


def test_gif_pictures_are_refused_as_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "loop.gif")
    with pytest.raises(InputError, match=r"reference: 'loop\.gif' looks like a GIF picture; send a PNG") as refused:
        read_reference(tmp_path / "loop.gif", "reference")
    assert refused.value.param == "reference"


def test_missing_files_folders_and_empty_files_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere.mp4", "not_found")
    (tmp_path / "folder.mp4").mkdir()
    assert "is not a file" in refusal(tmp_path / "folder.mp4", "not_a_file")
    (tmp_path / "empty.mp4").touch()
    assert "is empty (0 bytes)" in refusal(tmp_path / "empty.mp4", "empty_file")


def test_an_mp4_cut_off_before_its_index_is_refused(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", count_up(50))
    path.write_bytes(path.read_bytes()[:-200])
    assert "looks like an MP4 video, and no video can be read" in refusal(path, "unsupported_format")


def test_a_video_of_which_nothing_decodes_is_refused(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", count_up(50))
    content = bytearray(path.read_bytes())
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    assert "holds no picture that can be decoded" in refusal(path, "damaged_file")


def test_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mov", count_up(10))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    assert "is in a codec that is unknown here; export it again as MP4" in refusal(path, "unsupported_format")


def test_sounds_are_no_videos(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "voice.wav", np.zeros(16000), 16000)
    assert "has no pictures, or only a cover; send an MP4" in refusal(tmp_path / "voice.wav", "no_video")


def test_the_cover_of_a_record_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=48000, layout="mono")
        assert isinstance(sound, av.AudioStream)
        cover = container.add_stream("png", rate=1)
        assert isinstance(cover, av.VideoStream)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), "flt", "mono")
        frame.sample_rate = 48000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    with av.open(str(tmp_path / "song.m4a")) as song:
        assert len(song.streams.video) == 1
    assert "only a cover" in refusal(tmp_path / "song.m4a", "no_video")
    assert len(read_voice(tmp_path / "song.m4a")) >= 16000


def test_sizes_are_judged_from_the_header_before_decoding(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mov", count_up(3), "qtrle", "rgb24")
    content = path.read_bytes()
    at = content.index(b"rle ", content.index(b"stsd")) + 28
    assert struct.unpack_from(">HH", content, at) == (88, 48)
    for width, height, code, message in (
        (7072, 7071, "too_large", "has no size that can be read, or more than 50,000,000 pixels: scale it down"),
        (15, 400, "too_small", "15x400 pixels; each side needs at least 16"),
    ):
        path.write_bytes(content[:at] + struct.pack(">HH", width, height) + content[at + 4 :])
        assert message in refusal(path, code)


def test_sizes_are_those_of_square_pixels(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", [np.zeros((400, 400, 3), np.uint8)] * 3, pixel_aspect=Fraction(400, 1))
    assert "is 160000x400, 64,000,000 pixels; the limit is 50,000,000" in refusal(path, "too_large")


@pytest.mark.parametrize("name", ["film.mp4", "film.mkv", "film.avi"])
def test_a_video_without_sound_is_no_voice(tmp_path: Path, name: str) -> None:
    path = film(tmp_path / name, count_up(30))
    with pytest.raises(InputError, match=r"has no sound; send a voice: a whole WAV, MP3") as refused:
        read_voice(path, "audio")
    assert (refused.value.param, refused.value.code) == ("audio", "no_sound")


def scene(seed: int) -> Pixels:
    """A picture of its own, 120x160."""
    random = np.random.default_rng(seed)
    return np.kron(random.integers(0, 256, (6, 8, 3)), np.ones((20, 20, 1))).astype(np.uint8)


def shaken(pixels: Pixels, number: int) -> Pixels:
    """As from a camera in a hand."""
    return np.roll(pixels, (number // 3 % 2, number // 2 % 3), axis=(0, 1))


def cuts(path: Path, frames: int = 10_000) -> list[int]:
    with Footage(path) as footage:
        return scene_starts(footage, frames)


@pytest.mark.parametrize("name", ["film.mp4", "film.webm"])
def test_cuts_begin_scenes(tmp_path: Path, name: str) -> None:
    pictures = [shaken(scene(number // 40), number) for number in range(160)]
    codec = "libx264" if name.endswith("mp4") else "libvpx"
    path = film(tmp_path / name, pictures, codec)
    assert cuts(path) == [0, 40, 80, 120]
    assert cuts(path, frames=100) == [0, 40, 80]


def test_cuts_are_counted_at_25_pictures_a_second(tmp_path: Path) -> None:
    pictures = [shaken(scene(number // 60), number) for number in range(180)]
    path = film(tmp_path / "film.mp4", pictures, clock=Fraction(1, 30), rate=30)
    assert cuts(path) == [0, 50, 100]


def test_large_pictures_have_the_same_cuts(tmp_path: Path) -> None:
    pictures = [shaken(scene(number // 40), number).repeat(6, axis=0).repeat(6, axis=1) for number in range(80)]
    assert cuts(film(tmp_path / "film.mp4", pictures, options={"preset": "ultrafast"})) == [0, 40]


@pytest.mark.parametrize("rate", [10, 25])
def test_one_scene_is_one_scene(tmp_path: Path, rate: int) -> None:
    for name, picture in {
        "still": lambda number: scene(0),
        "shaken": lambda number: shaken(scene(0), number),
        "panned": lambda number: np.roll(scene(0), 4 * number, axis=1),
    }.items():
        path = film(tmp_path / f"{name}.mp4", map(picture, range(100)), clock=Fraction(1, rate), rate=rate)
        assert cuts(path) == [0], name


def test_fades_are_no_cuts(tmp_path: Path) -> None:
    def mixed(one: Pixels, other: Pixels, share: float) -> Pixels:
        return (one * (1 - share) + other * share).astype(np.uint8)

    black = np.zeros_like(scene(0))
    shares = np.linspace(0, 1, 30)
    pictures = [mixed(black, scene(0), share) for share in shares]
    pictures += [mixed(scene(0), scene(1), share) for share in shares]
    pictures += [mixed(scene(1), black, share) for share in shares]
    path = film(tmp_path / "film.mp4", [shaken(picture, number) for number, picture in enumerate(pictures)])
    assert cuts(path) == [0]


def test_no_scene_is_shorter_than_a_second(tmp_path: Path) -> None:
    pictures = [shaken(scene(number // 10), number) for number in range(100)]
    starts = cuts(film(tmp_path / "film.mp4", pictures))
    assert len(starts) > 2
    assert min(np.diff(starts)) >= 25
