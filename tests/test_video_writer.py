"""A video is written while its frames arrive, plays everywhere, and is whole or not there at all."""

import resource
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from avatar_api.media import read_voice
from avatar_api.video_writer import VideoWriter
from infinitetalk.errors import InputError

Pixels = NDArray[np.uint8]
Samples = NDArray[np.float32]

COLORS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 0),
    (255, 255, 255),
    (0, 0, 0),
    (128, 128, 128),
    (200, 30, 90),
]


def film(frames: int, width: int = 64, height: int = 48) -> Pixels:
    """Noise in the left half, and a grey that tells the frame's number in the right."""
    pixels = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)
    pixels[:, :, width // 2 :] = (np.arange(frames) * 5 % 256)[:, None, None, None]
    return pixels


def sine(seconds: float, hertz: float, rate: int = 48000) -> Samples:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def sound_file(path: Path, *channels: Samples, rate: int = 48000) -> Path:
    soundfile.write(path, np.stack(channels, axis=1), rate, subtype="FLOAT")
    return path


def write(
    path: Path,
    frames: Pixels,
    sound: Path | Sequence[Path | None] | None = None,
    order: Literal["together", "in_turn"] = "together",
) -> Path:
    with VideoWriter(path, frames.shape[2], frames.shape[1], sound, order) as writer:
        writer.write(frames)
    return path


def pictures(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as video:
        return list(video.decode(video=0))


def heard(path: Path) -> Samples:
    """float32 [channels, samples] at 48 kHz."""
    with av.open(str(path)) as video:
        assert video.streams.audio[0].codec_context.sample_rate == 48000
        return np.concatenate([frame.to_ndarray() for frame in video.decode(audio=0)], axis=1).astype(np.float32)


def pitch(samples: Samples) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax()) * 48000 / len(samples)


def level(samples: Samples) -> float:
    return float(np.sqrt(np.mean(samples**2)))


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """A full disk, as far as this process can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_every_frame_is_there_in_order_at_25_per_second(tmp_path: Path) -> None:
    decoded = pictures(write(tmp_path / "video.mp4", film(60)))
    assert [frame.time for frame in decoded] == pytest.approx([number / 25 for number in range(60)])
    greys = [frame.to_ndarray(format="rgb24")[:, 40:].mean() for frame in decoded]
    assert greys == pytest.approx([number * 5 % 256 for number in range(60)], abs=3)


@pytest.mark.parametrize("color", COLORS)
def test_colors_survive(tmp_path: Path, color: tuple[int, int, int]) -> None:
    frames = np.full((3, 64, 64, 3), color, np.uint8)
    for frame in pictures(write(tmp_path / "video.mp4", frames)):
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - color).max() <= 3


def test_detail_survives(tmp_path: Path) -> None:
    rows, columns, channels = np.ogrid[:128, :128, :3]
    waves = 128 + 60 * np.sin(columns / 3) + 60 * np.sin(rows / 5) * np.cos(channels)
    frames = np.stack([np.roll(waves, shift, axis=1) for shift in range(20)]).astype(np.uint8)
    decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in pictures(write(tmp_path / "video.mp4", frames))])
    noise = np.mean((decoded.astype(float) - frames) ** 2)
    assert 10 * np.log10(255**2 / noise) > 36  # dB


def test_players_are_told_the_colors_and_the_format(tmp_path: Path) -> None:
    path = write(tmp_path / "video.mp4", film(3))
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.profile, context.pix_fmt) == ("h264", "High", "yuv420p")
        assert (context.width, context.height) == (64, 48)
        assert stream.average_rate == Fraction(25)
        # 1 is BT.709 among primaries, transfers and matrices, and limited among ranges.
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
    assert b"colrnclx\0\1\0\1\0\1\0" in path.read_bytes()  # the same, for players that ask the container


def test_playing_can_start_before_the_download_ends(tmp_path: Path) -> None:
    content = write(tmp_path / "video.mp4", film(3), sound_file(tmp_path / "a.wav", sine(1, 440))).read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_the_same_frames_and_sound_give_the_same_bytes(tmp_path: Path) -> None:
    sound = sound_file(tmp_path / "voice.wav", sine(3, 440), sine(3, 880))
    one = write(tmp_path / "one.mp4", film(80), sound)
    with VideoWriter(tmp_path / "two.mp4", 64, 48, sound) as writer:
        for frame in film(80):
            writer.write(frame[None])
    assert one.read_bytes() == (tmp_path / "two.mp4").read_bytes()


@pytest.mark.parametrize("seconds", [0.02, 1.98, 2.0, 2.01, 5.0])
@pytest.mark.parametrize("rate", [44100, 48000])
def test_picture_and_sound_end_together(tmp_path: Path, seconds: float, rate: int) -> None:
    sound = sound_file(tmp_path / "voice.wav", sine(seconds, 440, rate), rate=rate)
    path = write(tmp_path / "video.mp4", film(50), sound)
    with av.open(str(path)) as video:
        for stream in video.streams:
            assert stream.duration is not None
            assert stream.time_base is not None
            assert stream.duration * stream.time_base == 2
            assert stream.start_time == 0
        assert video.duration == 2_000_000  # microseconds


def test_a_shorter_sound_is_followed_by_silence(tmp_path: Path) -> None:
    samples = heard(write(tmp_path / "video.mp4", film(50), sound_file(tmp_path / "voice.wav", sine(1.03, 440))))[0]
    assert pitch(samples[:49000]) == pytest.approx(440, abs=2)
    for sounding in (samples[:48000], samples[48000:49200]):  # within the last frame of video, too
        assert level(sounding) == pytest.approx(0.5 / np.sqrt(2), rel=0.1)
    assert level(samples[51000:]) < 1e-3


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_lips_and_sound_stay_together(tmp_path: Path, rate: int) -> None:
    claps = np.zeros(round(4 * rate), np.float32)
    for second in (0.5, 3.5):
        start = round(second * rate)
        claps[start : start + rate // 100] = 0.9 * np.sin(np.arange(rate // 100))
    samples = heard(write(tmp_path / "video.mp4", film(100), sound_file(tmp_path / "claps.wav", claps, rate=rate)))[0]
    loud = np.flatnonzero(np.abs(samples) > 0.3) / 48000
    assert loud[loud < 2].min() == pytest.approx(0.5, abs=0.003)
    assert loud[loud > 2].min() == pytest.approx(3.5, abs=0.003)


def test_the_sound_keeps_its_quality_and_its_sides(tmp_path: Path) -> None:
    """12 kHz is beyond what the model's 16 kHz voice can hold."""
    sound = sound_file(tmp_path / "voice.wav", sine(2, 440), sine(2, 12_000))
    left, right = heard(write(tmp_path / "video.mp4", film(50), sound))
    assert pitch(left) == pytest.approx(440, abs=2)
    assert pitch(right) == pytest.approx(12_000, abs=2)


@pytest.mark.parametrize(("channels", "layout", "bit_rate"), [(1, "mono", 128_000), (2, "stereo", 192_000)])
def test_mono_stays_mono_and_stereo_stereo(tmp_path: Path, channels: int, layout: str, bit_rate: int) -> None:
    noise = (0.1 * np.random.default_rng(0).standard_normal((channels, 96000))).astype(np.float32)
    with av.open(str(write(tmp_path / "video.mp4", film(50), sound_file(tmp_path / "voice.wav", *noise)))) as video:
        context = video.streams.audio[0].codec_context
        assert (context.name, context.layout.name) == ("aac", layout)
        assert context.bit_rate == pytest.approx(bit_rate, rel=0.1)


@pytest.mark.parametrize("channels", [6, 8])
def test_surround_sound_becomes_stereo(tmp_path: Path, channels: int) -> None:
    """The order of WAV: front left, front right, centre, bass, then the back. Films keep their voices in the centre."""
    silence = np.zeros(48000, np.float32)
    places: list[Samples] = [sine(1, 300), sine(1, 600), sine(1, 440) / np.float32(10)]
    places += [silence] * (channels - 3)
    left, right = heard(write(tmp_path / "video.mp4", film(25), sound_file(tmp_path / "film.wav", *places)))
    assert pitch(left) == pytest.approx(300, abs=2)
    assert pitch(right) == pytest.approx(600, abs=2)
    for side in (left, right):
        spectrum = np.abs(np.fft.rfft(side[:48000]))
        assert spectrum[440] == pytest.approx(spectrum.max() / 10 / np.sqrt(2), rel=0.1)


@pytest.mark.parametrize(("channels", "speaking"), [(3, 2), (4, 3), (5, 0), (16, 15)])
def test_other_numbers_of_channels_are_averaged_on_both_sides(tmp_path: Path, channels: int, speaking: int) -> None:
    sides = [sine(1, 440) if channel == speaking else np.zeros(48000, np.float32) for channel in range(channels)]
    samples = heard(write(tmp_path / "video.mp4", film(25), sound_file(tmp_path / "film.wav", *sides)))
    assert samples.shape[0] == 2
    assert pitch(samples[0]) == pytest.approx(440, abs=2)
    assert min(level(samples[0]), level(samples[1])) == pytest.approx(0.5 / channels / np.sqrt(2), rel=0.05)


def test_samples_above_full_scale_are_clipped(tmp_path: Path) -> None:
    sound = sound_file(tmp_path / "loud.wav", sine(1, 440) * 32768)
    samples = heard(write(tmp_path / "video.mp4", film(25), sound))[0]
    assert pitch(samples) == pytest.approx(440, abs=2)
    assert np.abs(samples).max() < 2


def test_two_voices_together_are_added_and_the_shorter_goes_on_in_silence(tmp_path: Path) -> None:
    voices = [
        sound_file(tmp_path / "long.wav", sine(2, 440) / np.float32(2)),
        sound_file(tmp_path / "short.wav", sine(1, 1000, rate=16000) / np.float32(2), rate=16000),
    ]
    one = heard(write(tmp_path / "one.mp4", film(50), voices))
    other = heard(write(tmp_path / "other.mp4", film(50), voices[::-1]))
    np.testing.assert_array_equal(one, other)
    assert one.shape[0] == 1
    spectrum = np.abs(np.fft.rfft(one[0][:48000]))
    assert sorted(np.argsort(spectrum)[-2:]) == [440, 1000]
    assert spectrum[440] == pytest.approx(spectrum[1000], rel=0.05)
    assert level(one[0][:45600]) == pytest.approx(0.25, rel=0.02)  # two sines of 0.25
    assert pitch(one[0][52800:93600]) == pytest.approx(440, abs=2)
    assert level(one[0][52800:93600]) == pytest.approx(0.25 / np.sqrt(2), rel=0.02)


def test_two_loud_voices_together_are_clipped_at_full_scale(tmp_path: Path) -> None:
    one, other = sine(2, 440) * np.float32(1.8), sine(2, 300) * np.float32(1.8)
    voices = [sound_file(tmp_path / "one.wav", one), sound_file(tmp_path / "other.wav", other)]
    clipped = sound_file(tmp_path / "clipped.wav", np.clip(one + other, -1, 1))
    assert np.abs(one + other).max() > 1.7
    added = write(tmp_path / "added.mp4", film(50), voices)
    assert added.read_bytes() == write(tmp_path / "video.mp4", film(50), clipped).read_bytes()


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("seconds", [0.5, 0.98765])
def test_a_voice_in_turn_begins_at_the_sample_where_the_model_heard_the_other_end(
    tmp_path: Path, rate: int, seconds: float
) -> None:
    first = sound_file(tmp_path / "first.wav", np.zeros(round(seconds * rate), np.float32), rate=rate)
    noise = (0.2 * np.random.default_rng(0).standard_normal(24000)).astype(np.float32)
    second = sound_file(tmp_path / "second.wav", noise)
    samples = heard(write(tmp_path / "video.mp4", film(50), [first, second], "in_turn"))[0]
    start = int(np.correlate(samples, noise, "valid").argmax())
    assert start == 3 * len(read_voice(first))


def test_voices_in_turn_are_heard_whole_and_then_there_is_silence(tmp_path: Path) -> None:
    voices = [sound_file(tmp_path / f"{hertz}.wav", sine(0.7, hertz)) for hertz in (440, 1000, 2000)]
    samples = heard(write(tmp_path / "video.mp4", film(75), voices, "in_turn"))[0]
    for turn, hertz in enumerate((440, 1000, 2000)):
        own = samples[33600 * turn + 1000 : 33600 * (turn + 1) - 1000]
        assert pitch(own) == pytest.approx(hertz, abs=2)
        assert level(own) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)
    assert level(samples[33600 * 3 + 2000 :]) < 1e-3


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_voice_is_silence_as_long_as_the_other(tmp_path: Path, missing: int) -> None:
    voice = sound_file(tmp_path / "voice.wav", sine(1, 440))
    voices = [None if number == missing else voice for number in range(2)]
    together = heard(write(tmp_path / "together.mp4", film(50), voices))[0]
    np.testing.assert_array_equal(together, heard(write(tmp_path / "alone.mp4", film(50), voice))[0])
    turns = heard(write(tmp_path / "turns.mp4", film(50), voices, "in_turn"))[0]
    for turn, samples in enumerate((turns[2000:46000], turns[50000:94000])):
        assert level(samples) == pytest.approx(0 if turn == missing else 0.5 / np.sqrt(2), rel=0.02, abs=1e-3)


@pytest.mark.parametrize("order", ["together", "in_turn"])
def test_one_voice_of_a_list_is_that_voice(tmp_path: Path, order: Literal["together", "in_turn"]) -> None:
    voice = sound_file(tmp_path / "voice.wav", sine(1.7, 440, rate=44100), rate=44100)
    listed = write(tmp_path / "listed.mp4", film(50), [voice], order)
    assert listed.read_bytes() == write(tmp_path / "alone.mp4", film(50), voice).read_bytes()


@pytest.mark.parametrize("voices", [[], [None], [None, None]])
def test_no_voice_of_a_list_is_no_sound(tmp_path: Path, voices: list[Path | None]) -> None:
    with av.open(str(write(tmp_path / "video.mp4", film(3), voices))) as video:
        assert [stream.type for stream in video.streams] == ["video"]


@pytest.mark.parametrize("order", ["together", "in_turn"])
def test_beside_a_stereo_voice_a_mono_one_keeps_its_level_on_both_sides(
    tmp_path: Path, order: Literal["together", "in_turn"]
) -> None:
    mono = sound_file(tmp_path / "mono.wav", sine(1, 440))
    stereo = sound_file(tmp_path / "stereo.wav", sine(1, 1000) / np.float32(2), np.zeros(48000, np.float32))
    left, right = heard(write(tmp_path / "video.mp4", film(50), [mono, stereo], order))
    for side in (left, right):
        assert np.abs(np.fft.rfft(side[:48000]))[440] / 24000 == pytest.approx(0.5, rel=0.02)
    start = 48000 if order == "in_turn" else 0
    assert np.abs(np.fft.rfft(left[start : start + 48000]))[1000] / 24000 == pytest.approx(0.25, rel=0.02)
    assert np.abs(np.fft.rfft(right[start : start + 48000]))[1000] / 24000 < 0.01


def test_the_voice_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    voice = sound_file(tmp_path / "voice.wav", sine(1, 440))
    (tmp_path / "other.mp3").write_text("not a sound")
    for voices, param in (([voice, tmp_path / "other.mp3"], "audio_2"), ([tmp_path / "other.mp3", None], "audio")):
        with pytest.raises(InputError, match=rf"^{param}: 'other\.mp3' looks like text") as refused:
            write(tmp_path / "video.mp4", film(3), voices)
        assert refused.value.param == param


@pytest.mark.parametrize(("name", "codec"), [("voice.m4a", "aac"), ("voice.webm", "libopus"), ("voice.mkv", "flac")])
def test_every_voice_that_is_read_can_be_the_sound(tmp_path: Path, name: str, codec: str) -> None:
    with av.open(str(tmp_path / name), "w", format="ipod" if name.endswith("m4a") else None) as container:
        stream = container.add_stream(codec, rate=48000, layout="mono")
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(sine(2, 440)[None], "flt", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    samples = heard(write(tmp_path / "video.mp4", film(50), tmp_path / name))[0]
    assert pitch(samples) == pytest.approx(440, abs=2)
    assert level(samples[9600:86400]) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


def test_without_a_sound_there_is_no_sound_track(tmp_path: Path) -> None:
    with av.open(str(write(tmp_path / "video.mp4", film(3)))) as video:
        assert [stream.type for stream in video.streams] == ["video"]


def test_frames_may_come_in_any_memory_order_and_number(tmp_path: Path) -> None:
    planes = np.ascontiguousarray(film(3).transpose(3, 0, 1, 2))  # [channel, frame, height, width], as tensors come
    with VideoWriter(tmp_path / "planes.mp4", 64, 48, None) as writer:
        writer.write(planes.transpose(1, 2, 3, 0))
        writer.write(film(0))
    assert (tmp_path / "planes.mp4").read_bytes() == write(tmp_path / "frames.mp4", film(3)).read_bytes()


@pytest.mark.parametrize("order", ["together", "in_turn"])
def test_memory_does_not_grow_with_length(tmp_path: Path, order: Literal["together", "in_turn"]) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    with soundfile.SoundFile(tmp_path / "lecture.flac", "w", 48000, 2) as lecture:
        for _ in range(10):
            lecture.write(np.zeros((48000 * 60, 2), np.int16))
    frames = film(20, 192, 192)
    with VideoWriter(tmp_path / "video.mp4", 192, 192, [tmp_path / "lecture.flac"] * 2, order) as writer:
        for _ in range(5):
            writer.write(frames)
        before = resident()
        tracemalloc.start()
        for _ in range(15):
            writer.write(frames)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        grown = resident() - before
    assert grown < 15e6  # the 300 frames are 33 MB, and the sound 230 MB
    assert peak < 8e6


def test_until_it_is_whole_the_video_has_another_name(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"yesterday's video")
    with VideoWriter(path, 64, 48, None) as writer:
        writer.write(film(80))
        assert sorted(file.name for file in tmp_path.iterdir()) == ["video.mp4", "video.mp4.part"]
        assert path.read_bytes() == b"yesterday's video"
    assert [file.name for file in tmp_path.iterdir()] == ["video.mp4"]
    assert len(pictures(path)) == 80


def test_an_error_on_the_way_leaves_no_video(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "video.mp4", 64, 48, None) as writer:
        writer.write(film(80))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_the_error_on_the_way_is_the_one_reported(tmp_path: Path) -> None:
    """Even if the disk is full as well, which shows when the file is closed."""
    with (
        files_at_most(100),  # the header
        pytest.raises(KeyboardInterrupt),
        VideoWriter(tmp_path / "video.mp4", 64, 48, None) as writer,
    ):
        writer.write(film(50))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_no_frames_are_no_video(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no frame was written to video\.mp4"):
        write(tmp_path / "video.mp4", film(0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [0.0, 0.02, 0.5, 0.9, 0.99])
def test_a_full_disk_is_an_error_and_leaves_no_video(tmp_path: Path, room: float) -> None:
    size = write(tmp_path / "video.mp4", film(200)).stat().st_size
    (tmp_path / "video.mp4").unlink()
    with files_at_most(int(room * size)), pytest.raises(OSError, match="File too large"):
        write(tmp_path / "video.mp4", film(200))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "frames",
    [
        film(1).astype(np.float32),
        film(1)[0],
        film(1, 48, 64),
        film(1)[..., :1],
    ],
    ids=["float32", "one frame", "width and height exchanged", "grey"],
)
def test_frames_of_another_kind_are_a_mistake_of_ours(tmp_path: Path, frames: Pixels) -> None:
    with (
        pytest.raises(ValueError, match=r"frames must be uint8 \[n, 48, 64, 3\], not "),
        VideoWriter(tmp_path / "video.mp4", 64, 48, None) as writer,
    ):
        writer.write(frames)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("width", "height"), [(65, 48), (64, 40), (0, 48), (64, -16)])
def test_sizes_are_multiples_of_16(tmp_path: Path, width: int, height: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of 16, not {width}x{height}"):
        VideoWriter(tmp_path / "video.mp4", width, height, None)


def test_a_sound_that_cannot_be_read_is_refused_before_a_frame_is_made(tmp_path: Path) -> None:
    (tmp_path / "voice.mp3").write_text("not a sound")
    with pytest.raises(InputError, match=r"audio: 'voice\.mp3' looks like text") as refused:
        VideoWriter(tmp_path / "video.mp4", 64, 48, tmp_path / "voice.mp3").__enter__()
    assert refused.value.param == "audio"
    assert [file.name for file in tmp_path.iterdir()] == ["voice.mp3"]


def test_a_sound_that_breaks_on_the_way_leaves_no_video(tmp_path: Path) -> None:
    samples = sine(30, 440)
    samples[-48000:] = np.nan
    sound = sound_file(tmp_path / "voice.wav", samples)
    with pytest.raises(InputError, match="infinite or not numbers"):
        write(tmp_path / "video.mp4", film(750, 16, 16), sound)
    assert [file.name for file in tmp_path.iterdir()] == ["voice.wav"]


def test_names_that_look_like_addresses_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("http:video.mp4"), film(3))
    assert [file.name for file in tmp_path.iterdir()] == ["http:video.mp4"]


def test_pieces_join_into_the_video_without_being_encoded_again(tmp_path: Path) -> None:
    """What jobs do: a silent piece for each clip, joined with the sound at the end."""
    frames = moving_frames(60)
    sound = tmp_path / "sound.wav"
    soundfile.write(sound, np.sin(np.arange(48000 * 3) * 0.05) * 0.3, 48000)
    pieces = [tmp_path / "0.mp4", tmp_path / "1.mp4", tmp_path / "2.mp4"]
    for piece, part in zip(pieces, (frames[:33], frames[33:34], frames[34:]), strict=True):
        with VideoWriter(piece, 64, 64, sound=None) as writer:
            writer.write(part)
    for name in ("joined.mp4", "again.mp4"):
        with VideoWriter(tmp_path / name, 64, 64, sound) as writer:
            for piece in pieces:
                writer.append(piece)
        assert writer.frames == 60
    assert (tmp_path / "joined.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()

    with av.open(str(tmp_path / "joined.mp4")) as container:
        stream = container.streams.video[0]
        pictures = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    assert [time for time, _ in pictures] == pytest.approx([index / 25 for index in range(60)])
    apart = []
    for piece in pieces:
        with av.open(str(piece)) as container:
            apart += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for (_, joined), alone in zip(pictures, apart, strict=True):
        assert np.array_equal(joined, alone), "the same pictures, bit for bit"
    with av.open(str(tmp_path / "joined.mp4")) as container:
        track = container.streams.audio[0]
        assert track.duration is not None and track.time_base is not None
        assert abs(float(track.duration * track.time_base) - 60 / 25) < 0.04


def moving_frames(count: int) -> np.ndarray:
    blocks = np.kron(np.random.default_rng(0).integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    return np.stack([np.roll(blocks, shift, axis=1) for shift in range(count)])
