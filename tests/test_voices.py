"""Whatever a recorder, a phone or an editor saves becomes the 16 kHz mono voice that the model hears, or is refused."""

import struct
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr
from numpy.typing import NDArray

from avatar_api.media import read_voice
from infinitetalk.errors import InputError
from infinitetalk.timeline import SAMPLE_RATE

Samples = NDArray[np.float32]


def sine(seconds: float, rate: int, hertz: float = 440, channels: int = 1) -> Samples:
    """float32 [samples, channels], amplitude 0.5."""
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return wave.astype(np.float32)[:, None].repeat(channels, axis=1)


def noise(samples: int, channels: int = 1) -> Samples:
    return (0.1 * np.random.default_rng(0).standard_normal((samples, channels))).astype(np.float32)


def pitch(voice: Samples) -> float:
    """The dominant frequency, in Hz."""
    spectrum = np.abs(np.fft.rfft(voice * np.hanning(len(voice))))
    return float(spectrum.argmax()) * SAMPLE_RATE / len(voice)


def encode(
    path: Path, codec: str, rate: int, samples: Samples, layout: str = "stereo", picture: bool = False, title: str = ""
) -> Path:
    """Write sound through FFmpeg, and a grey picture beside it if asked."""
    container_format = {".m4a": "ipod", ".mkv": "matroska", ".ts": "mpegts", ".aac": "adts"}.get(path.suffix)
    with av.open(str(path), "w", format=container_format) as container:
        video = container.add_stream("libx264", rate=25, width=64, height=64) if picture else None
        audio = container.add_stream(codec, rate=rate, layout=layout)
        assert isinstance(audio, av.AudioStream)
        if title:
            container.metadata["title"] = title
        if isinstance(video, av.VideoStream):
            for _ in range(len(samples) * 25 // rate):
                container.mux(video.encode(av.VideoFrame(64, 64, "yuv420p")))
            container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), "flt", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return path


def cut(path: Path, kept: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    return path


def refusal(path: Path, code: str) -> str:
    """Why the voice is refused. Every message names the input and the file, and no folder of the server."""
    with pytest.raises(InputError) as refused:
        read_voice(path, "audio_2")
    message = str(refused.value)
    assert (refused.value.param, refused.value.code) == ("audio_2", code)
    assert message.startswith(f"audio_2: '{path.name}' ")
    assert str(path.parent) not in message
    return message


def assert_is_the_tone(voice: Samples, seconds: float) -> None:
    assert voice.dtype == np.float32
    assert voice.ndim == 1
    assert voice.flags.writeable
    assert len(voice) / SAMPLE_RATE == pytest.approx(seconds, abs=0.04)
    middle = voice[len(voice) // 4 : -len(voice) // 4]
    assert pitch(middle) == pytest.approx(440, abs=2)
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM"])
def test_wav_of_every_kind(tmp_path: Path, subtype: str) -> None:
    soundfile.write(tmp_path / "voice.wav", sine(2, 44100, channels=2), 44100, subtype=subtype)
    assert_is_the_tone(read_voice(tmp_path / "voice.wav"), 2)


@pytest.mark.parametrize("name", ["voice.flac", "voice.ogg", "voice.mp3", "voice.aiff", "voice.w64"])
def test_the_other_formats_of_libsndfile(tmp_path: Path, name: str) -> None:
    soundfile.write(tmp_path / name, sine(2, 44100, channels=2), 44100)
    assert_is_the_tone(read_voice(tmp_path / name), 2)


@pytest.mark.parametrize(
    ("name", "codec", "picture"),
    [
        ("voice.m4a", "aac", False),
        ("voice.aac", "aac", False),
        ("voice.webm", "libopus", False),
        ("voice.opus", "libopus", False),
        ("voice.mkv", "flac", False),
        ("video.mp4", "aac", True),
        ("video.mov", "pcm_s16le", True),
        ("video.mkv", "libopus", True),
        ("video.avi", "pcm_s16le", True),
        ("video.ts", "aac", True),
    ],
)
def test_the_formats_of_ffmpeg_and_the_sound_of_videos(tmp_path: Path, name: str, codec: str, picture: bool) -> None:
    path = encode(tmp_path / name, codec, 48000, sine(2, 48000, channels=2), picture=picture)
    assert_is_the_tone(read_voice(path), 2)


def test_the_content_decides_not_the_extension(tmp_path: Path) -> None:
    for name in ("voice.raw", "voice.m3u8", "voice"):
        soundfile.write(tmp_path / name, sine(1, 44100), 44100, format="WAV")
        assert_is_the_tone(read_voice(tmp_path / name), 1)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000, 96000, 192000])
def test_the_model_hears_what_the_published_loader_gives_it(tmp_path: Path, rate: int) -> None:
    """librosa.load(sr=16000): the mean of the channels, soxr HQ in one piece, ceil(samples * 16000 / rate) long."""
    sound = noise(3 * rate + 1, 2)
    soundfile.write(tmp_path / "voice.wav", sound, rate, subtype="FLOAT")
    whole = soxr.resample(sound.mean(axis=1), rate, SAMPLE_RATE, "HQ")
    length = -(-len(sound) * SAMPLE_RATE // rate)
    expected = np.pad(whole, (0, length - len(whole)))
    np.testing.assert_allclose(read_voice(tmp_path / "voice.wav"), expected, atol=1e-6)


def test_16_khz_is_left_as_it_is(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "voice.wav", noise(20_000), SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_array_equal(read_voice(tmp_path / "voice.wav"), noise(20_000)[:, 0])


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 8, 16])
def test_channels_are_averaged(tmp_path: Path, channels: int) -> None:
    sound = noise(40_000, channels)
    soundfile.write(tmp_path / "voice.wav", sound, SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_voice(tmp_path / "voice.wav"), sound.mean(axis=1), atol=1e-7)


def test_surround_sound_of_ffmpeg_is_averaged_too(tmp_path: Path) -> None:
    surround = np.zeros((48000, 6), np.float32)
    surround[:, 2] = sine(1, 48000)[:, 0]  # the centre, where films keep their voices
    voice = read_voice(encode(tmp_path / "film.mkv", "flac", 48000, surround, layout="5.1"))
    assert pitch(voice) == pytest.approx(440, abs=2)
    assert np.abs(voice).max() == pytest.approx(0.5 / 6, rel=0.05)


def test_max_seconds_ends_a_longer_voice_and_no_other(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "voice.flac", noise(44100 * 5, 2), 44100)
    whole = read_voice(tmp_path / "voice.flac")
    np.testing.assert_array_equal(read_voice(tmp_path / "voice.flac", max_seconds=1.5), whole[:24000])
    np.testing.assert_array_equal(read_voice(tmp_path / "voice.flac", max_seconds=60), whole)


@pytest.mark.parametrize("name", ["meeting.flac", "meeting.wav"])
def test_two_hours_cost_no_more_time_than_is_taken_of_them(tmp_path: Path, name: str) -> None:
    with soundfile.SoundFile(tmp_path / name, "w", 8000, 1) as meeting:
        meeting.write(sine(60, 8000))
        for _ in range(119):
            meeting.write(np.zeros(60 * 8000, np.int16))
    assert soundfile.info(tmp_path / name).duration == 7200
    start = time.process_time()
    assert_is_the_tone(read_voice(tmp_path / name, max_seconds=2), 2)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("name", ["lecture.flac", "lecture.mp3", "lecture.m4a"])
def test_memory_is_that_of_the_voice(tmp_path: Path, name: str) -> None:
    if name.endswith(".m4a"):
        encode(tmp_path / name, "aac", 32000, sine(200, 32000), layout="mono")
    else:
        soundfile.write(tmp_path / name, sine(200, 32000), 32000)
    tracemalloc.start()
    voice = read_voice(tmp_path / name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(voice) / SAMPLE_RATE == pytest.approx(200, abs=0.04)
    assert peak < 1.15 * voice.nbytes + 4e6


def test_silence_is_a_voice(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros(44100), 44100)
    np.testing.assert_array_equal(read_voice(tmp_path / "silence.wav"), np.zeros(SAMPLE_RATE))


def test_a_voice_lasts_at_least_one_frame_of_video(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "shortest.wav", noise(1920), 48000)
    assert len(read_voice(tmp_path / "shortest.wav")) == 640
    soundfile.write(tmp_path / "click.wav", noise(1440), 48000)
    assert "lasts 0.030 s as far as it can be read; a voice needs at least 0.04 s" in refusal(
        tmp_path / "click.wav", "too_short"
    )


@pytest.mark.parametrize("name", ["call.wav", "call.flac", "call.ogg", "call.mp3", "call.webm", "call.aac", "call.mkv"])
def test_a_voice_cut_off_plays_as_far_as_it_goes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    sound = sine(4, 48000) + noise(4 * 48000) * np.float32(0.1)
    if path.suffix in (".webm", ".aac", ".mkv"):
        codec = {".webm": "libopus", ".aac": "aac", ".mkv": "flac"}[path.suffix]
        encode(path, codec, 48000, sound, layout="mono")
    else:
        soundfile.write(path, sound, 48000)
    whole = read_voice(path)
    part = read_voice(cut(path, 0.6))
    assert len(part) / len(whole) == pytest.approx(0.6, abs=0.15)  # OGG loses a page
    np.testing.assert_allclose(part[:-800], whole[: len(part) - 800], atol=1e-4)
    np.testing.assert_allclose(part, whole[: len(part)], atol=0.7)  # nothing but the voice at the very end either


def test_a_voice_cut_off_in_its_first_frame_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "call.wav", sine(4, 48000), 48000)
    assert "lasts 0.021 s" in refusal(cut(tmp_path / "call.wav", 2048 / 384_044), "too_short")
    assert "holds no sound" in refusal(cut(tmp_path / "call.wav", 44 / 2048), "damaged_file")
    soundfile.write(tmp_path / "call.mp3", sine(4, 48000), 48000)
    assert "looks like an MP3 sound" in refusal(cut(tmp_path / "call.mp3", 0.01), "unsupported_format")


def test_an_mp4_cut_off_has_lost_its_index_and_is_refused(tmp_path: Path) -> None:
    path = cut(encode(tmp_path / "call.m4a", "aac", 48000, sine(4, 48000, channels=2)), 0.6)
    assert "looks like an MP4 video, and no sound can be read from it" in refusal(path, "unsupported_format")


def test_damage_in_the_middle_costs_what_is_damaged(tmp_path: Path) -> None:
    path = encode(tmp_path / "call.aac", "aac", 48000, sine(4, 48000, channels=2))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    path.write_bytes(content)
    voice = read_voice(path)
    assert len(voice) / SAMPLE_RATE == pytest.approx(4, abs=0.3)
    for half in (voice[:30_000], voice[-24_000:]):
        assert pitch(half) == pytest.approx(440, abs=2)


def test_an_index_that_breaks_on_the_way_ends_the_voice_there(tmp_path: Path) -> None:
    path = encode(tmp_path / "call.m4a", "aac", 48000, sine(4, 48000), layout="mono")
    content = bytearray(path.read_bytes())
    size_of_packet_100 = content.index(b"stsz") + 16 + 100 * 4
    content[size_of_packet_100 : size_of_packet_100 + 4] = struct.pack(">I", 0x20000000)
    path.write_bytes(content)
    assert_is_the_tone(read_voice(path), 100 * 1024 / 48000)


def test_a_picture_may_join_the_sound_on_the_way(tmp_path: Path) -> None:
    sound = encode(tmp_path / "sound.flv", "aac", 44100, sine(30, 44100), layout="mono").read_bytes()
    later = encode(tmp_path / "video.flv", "aac", 44100, sine(0.1, 44100), layout="mono", picture=True).read_bytes()
    (tmp_path / "stream.flv").write_bytes(sound + later[13:])  # without the second header
    voice = read_voice(tmp_path / "stream.flv")
    assert len(voice) / SAMPLE_RATE == pytest.approx(30.1, abs=0.1)


@pytest.mark.parametrize("length", [0, 0xFFFFFFFF, 0x7FFFFFFF])
def test_wav_streamed_without_a_known_length_is_read_to_its_end(tmp_path: Path, length: int) -> None:
    path = tmp_path / "stream.wav"
    soundfile.write(path, sine(2, 44100), 44100)
    content = bytearray(path.read_bytes())
    for offset in (4, content.index(b"data") + 4):
        content[offset : offset + 4] = struct.pack("<I", length)
    path.write_bytes(content)
    assert_is_the_tone(read_voice(path), 2)


def test_rate_and_channels_may_change_on_the_way(tmp_path: Path) -> None:
    one = encode(tmp_path / "one.aac", "aac", 44100, sine(2, 44100, channels=2))
    two = encode(tmp_path / "two.aac", "aac", 24000, sine(2, 24000), layout="mono")
    (tmp_path / "joined.aac").write_bytes(one.read_bytes() + two.read_bytes())
    voice = read_voice(tmp_path / "joined.aac")
    assert len(voice) / SAMPLE_RATE == pytest.approx(4, abs=0.12)  # each part brings its encoder's padding
    for part in (voice[:30_000], voice[-30_000:]):
        assert pitch(part) == pytest.approx(440, abs=2)


def test_titles_in_an_old_encoding_do_not_matter(tmp_path: Path) -> None:
    path = encode(tmp_path / "song.m4a", "aac", 48000, sine(1, 48000, channels=2), title="Cafe Muller")
    path.write_bytes(path.read_bytes().replace(b"Cafe Muller", b"Caf\xe9 M\xfcller"))
    assert_is_the_tone(read_voice(path), 1)


def test_a_video_without_sound_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "silent.mp4"), "w") as container:
        video = container.add_stream("libx264", rate=25, width=64, height=64)
        assert isinstance(video, av.VideoStream)
        container.mux(video.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(video.encode(None))
    assert "has no sound; send" in refusal(tmp_path / "silent.mp4", "no_sound")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_are_no_sound_are_refused(tmp_path: Path, value: float) -> None:
    sound = noise(200_000)
    sound[150_000] = value
    soundfile.write(tmp_path / "broken.wav", sound, 44100, subtype="FLOAT")
    assert "infinite or not numbers" in refusal(tmp_path / "broken.wav", "damaged_file")


def test_samples_above_full_scale_are_kept(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "loud.wav", sine(1, SAMPLE_RATE) * 32768, SAMPLE_RATE, subtype="FLOAT")
    assert np.abs(read_voice(tmp_path / "loud.wav")).max() == pytest.approx(16384, rel=0.01)


@pytest.mark.parametrize("rate", [999, 1_000_001])
def test_sample_rates_of_nothing_that_records_speech_are_refused(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "odd.wav", noise(100_000), rate)
    message = refusal(tmp_path / "odd.wav", "unsupported_format")
    assert f"has a sample rate of {rate} Hz; send one from 1000 to 1000000 Hz" in message


def test_missing_files_folders_and_empty_files_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere.wav", "not_found")
    (tmp_path / "folder.wav").mkdir()
    assert "is not a file" in refusal(tmp_path / "folder.wav", "not_a_file")
    (tmp_path / "empty.wav").touch()
    assert "is empty (0 bytes)" in refusal(tmp_path / "empty.wav", "empty_file")


@pytest.mark.parametrize(
    ("start", "looks_like"),
    [
        (b"Hello, this is the text that I want spoken.", "text"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG picture"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1", "a JPEG picture"),
        (b"PK\x03\x04\x14\0\0\0\x08\0", "a ZIP archive"),
    ],
    ids=["text", "PNG", "JPEG", "ZIP"],
)
def test_files_of_other_kinds_are_refused_with_what_they_look_like(
    tmp_path: Path, start: bytes, looks_like: str
) -> None:
    (tmp_path / "voice.mp3").write_bytes(start * 20)
    message = refusal(tmp_path / "voice.mp3", "unsupported_format")
    assert f"looks like {looks_like}, and no sound can be read from it; send a whole WAV, MP3" in message


@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.ffconcat", "list.sdp"])
@pytest.mark.parametrize(
    "playlist",
    [
        "ffconcat version 1.0\nfile other.wav\n",
        "ffconcat version 1.0\nfile {folder}/other.wav\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nother.aac\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    ],
    ids=["a neighbour", "a path", "HLS", "SDP"],
)
def test_playlists_cannot_reach_other_files_or_the_network(tmp_path: Path, name: str, playlist: str) -> None:
    soundfile.write(tmp_path / "other.wav", sine(1, 44100), 44100)
    encode(tmp_path / "other.aac", "aac", 44100, sine(1, 44100, channels=2))
    (tmp_path / name).write_text(playlist.format(folder=tmp_path))
    assert "looks like text" in refusal(tmp_path / name, "unsupported_format")
