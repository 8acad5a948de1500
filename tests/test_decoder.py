"""Media decoded in a child: the same results, and no file that takes more than its own process down."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import soundfile
from PIL import Image

from avatar_api import decoder as decoding
from avatar_api.decoder import Decoder, DecoderError
from avatar_api.footage import Footage, scene_starts
from avatar_api.inputs import lay_down, pick_up
from avatar_api.media import damage_left_out, read_voice
from avatar_api.requests import VideoRequest
from avatar_api.video_writer import VideoWriter
from infinitetalk.errors import InputError
from tests.conftest import REPOSITORY, SmallDisk
from tests.waiting import eventually

PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
GENEROUS = 600  # seconds: these tests are not about time


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with Decoder(GENEROUS) as child:
        yield child


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture"
    Image.fromarray(PICTURE).save(path, "PNG")
    return path


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    path = tmp_path / "voice"
    soundfile.write(path, np.random.default_rng(1).normal(0, 0.1, (44100 * 2, 2)), 44100, format="WAV")
    return path


@pytest.fixture
def film(tmp_path: Path, voice: Path) -> Path:
    """Two scenes of 40 pictures, with sound."""
    path = tmp_path / "film"
    with VideoWriter(path, 96, 64, voice) as writer:
        writer.write(np.concatenate([np.full((40, 64, 96, 3), level, np.uint8) for level in (30, 220)]))
    return path


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten hours of silence at 1 kHz in some 40 kB: a voice of 2.3 GB, and more than a second's work."""
    path = tmp_path_factory.mktemp("bomb") / "voice.flac"
    with soundfile.SoundFile(path, "w", 1000, 1, format="FLAC") as file:
        for _ in range(10):
            file.write(np.zeros(3600 * 1000, np.float32))
    assert path.stat().st_size < 1_000_000
    return path


def child(decoder: Decoder) -> int:
    assert decoder._child is not None
    return decoder._child.pid


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


class Hit:
    """Sends the decoder a signal each time that it is waited for, so many times."""

    def __init__(self, blow: signal.Signals, times: int) -> None:
        self.decoder: Decoder | None = None
        self.blow, self.times = blow, times
        self.victims: list[int] = []

    def __call__(self) -> None:
        assert self.decoder is not None
        if self.times and self.decoder._child is not None:
            self.times -= 1
            self.victims.append(child(self.decoder))
            os.kill(self.victims[-1], self.blow)


def hit_while_reading(voice: Path, blow: signal.Signals, times: int) -> tuple[np.ndarray, list[int]]:
    hit = Hit(blow, times)
    with Decoder(GENEROUS, hit) as decoder:
        hit.decoder = decoder
        return decoder.read_voice(voice, "audio"), hit.victims


class TestResults:
    """Exactly what decoding in this process gives."""

    def test_a_picture(self, decoder: Decoder, picture: Path) -> None:
        opened = decoder.open(picture, "image")
        assert (opened.moving, len(opened), opened.height, opened.width) == (False, 1, 64, 96)
        assert np.array_equal(opened[0], PICTURE)

    def test_a_video_picture_by_picture_and_its_scenes(self, decoder: Decoder, film: Path) -> None:
        opened = decoder.open(film, "image")
        with Footage(film) as footage:
            assert (opened.moving, len(opened)) == (True, len(footage))
            assert (opened.height, opened.width) == (footage.height, footage.width)
            for index in (0, 79, 40, 1000):
                assert np.array_equal(opened[index], footage[index])
            assert all(np.array_equal(*pair) for pair in zip(opened, footage, strict=True))
            assert scene_starts(opened, 80) == scene_starts(footage, 80) == [0, 40]

    def test_a_voice(self, decoder: Decoder, voice: Path) -> None:
        heard = decoder.read_voice(voice, "audio")
        assert heard.dtype == np.float32
        assert np.array_equal(heard, read_voice(voice))
        assert decoder.voice_seconds(voice, "audio", 10) == 2
        assert decoder.voice_seconds(voice, "audio", 0.5) == 0.5

    def test_clips_joined_with_a_sound_to_the_byte(self, decoder: Decoder, voice: Path, tmp_path: Path) -> None:
        segments = [tmp_path / "1.mp4", tmp_path / "2.mp4"]
        for level, segment in zip((30, 220), segments, strict=True):
            with VideoWriter(segment, 96, 64, None) as writer:
                writer.write(np.full((20, 64, 96, 3), level, np.uint8))
        here, there = tmp_path / "here.mp4", tmp_path / "there.mp4"
        with VideoWriter(here, 96, 64, [voice, None], "in_turn") as writer:
            for segment in segments:
                writer.append(segment)
        assert decoder.join(there, segments, [voice, None], "in_turn") == 40
        assert there.read_bytes() == here.read_bytes()

    def test_a_refusal_is_the_same_and_the_child_goes_on(self, decoder: Decoder, voice: Path, tmp_path: Path) -> None:
        text = tmp_path / "text"
        text.write_text("no sound")
        with pytest.raises(InputError) as here:
            read_voice(text, "audio_2")
        decoder.read_voice(voice, "audio")
        before = child(decoder)
        with pytest.raises(InputError) as there:
            decoder.read_voice(text, "audio_2")
        assert (there.value.param, str(there.value), there.value.code) == (
            here.value.param,
            str(here.value),
            here.value.code,
        )
        assert len(decoder.read_voice(voice, "audio")) == 32000
        assert child(decoder) == before


class TestLimits:
    def test_a_voice_that_swells_beyond_the_memory_is_refused(
        self, bomb: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(decoding, "MEMORY", 2**30)
        with Decoder(GENEROUS) as decoder:
            with pytest.raises(InputError, match=r"^audio: 'voice.flac' needs more than 1 GB .* send a") as refusal:
                decoder.read_voice(bomb, "audio")
            assert (refusal.value.param, refusal.value.code) == ("audio", "too_large")
            assert decoder.voice_seconds(bomb, "audio", 60) == 60, "and the child goes on"

    def test_what_cannot_be_decoded_for_want_of_memory_is_not_left_out_as_damaged(self) -> None:
        with damage_left_out():
            raise av.error.InvalidDataError(1, "damaged")
        with pytest.raises(MemoryError), damage_left_out():
            raise av.error.MemoryError(12, "no memory")

    def test_a_picture_of_nearly_50_megapixels_fits(self, decoder: Decoder, tmp_path: Path) -> None:
        path = tmp_path / "large.png"
        Image.new("RGBA", (7000, 7000), (200, 100, 50, 255)).save(path, compress_level=1)
        assert decoder.open(path, "image")[0][-1, -1].tolist() == [200, 100, 50]

    def test_what_takes_too_long_to_compute_is_refused(self, bomb: Path) -> None:
        with Decoder(seconds=1) as decoder:
            with pytest.raises(InputError, match=r"^audio: 'voice.flac' takes more than 1 s .* send a") as refusal:
                decoder.read_voice(bomb, "audio")
            assert refusal.value.code == "too_slow"
            assert decoder.voice_seconds(bomb, "audio", 60) == 60, "by a new child"

    def test_what_waits_too_long_is_refused(self, voice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decoding, "PATIENCE", 0.0001)
        hit = Hit(signal.SIGSTOP, 1)
        with Decoder(GENEROUS, hit) as decoder:
            hit.decoder = decoder
            with pytest.raises(InputError, match="takes more than") as refusal:
                decoder.read_voice(voice, "audio")
        assert refusal.value.code == "too_slow"
        assert ended(hit.victims[0])

    def test_the_time_is_that_of_each_answer(self, voice: Path) -> None:
        with Decoder(seconds=2) as decoder:
            spent = 0.0
            while spent < 3:
                decoder.read_voice(voice, "audio")
                ticks = Path(f"/proc/{child(decoder)}/stat").read_text().rpartition(")")[2].split()[11:13]
                spent = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def test_limits_and_environment_of_the_child(
        self, picture: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("AVATAR_API_KEYS", "secret")
        decoding._SERVER.renew()  # the one that is there was started without it
        with Decoder(GENEROUS) as decoder:
            decoder.open(picture, "image")
            pid = child(decoder)
            assert resource.prlimit(pid, resource.RLIMIT_AS)[0] == decoding.MEMORY
            assert resource.prlimit(pid, resource.RLIMIT_CORE)[0] == 0
            assert resource.prlimit(pid, resource.RLIMIT_FSIZE)[0] == 0
            assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
            assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"


class TestDeaths:
    @pytest.mark.parametrize("crash", [signal.SIGSEGV, signal.SIGABRT])
    def test_a_crash_is_the_files_fault_and_says_what_to_do(self, bomb: Path, crash: signal.Signals) -> None:
        with pytest.raises(InputError, match=rf"^audio: 'voice.flac' .*{crash.name}.* export it again") as refusal:
            hit_while_reading(bomb, crash, 1)
        assert (refusal.value.param, refusal.value.code) == ("audio", "damaged_file")

    def test_a_child_killed_by_somebody_else_is_started_again(self, voice: Path) -> None:
        heard, victims = hit_while_reading(voice, signal.SIGKILL, 1)
        assert np.array_equal(heard, read_voice(voice))
        assert ended(victims[0])

    def test_a_film_is_opened_again_by_the_next_child(self, film: Path) -> None:
        with Decoder(GENEROUS) as decoder, Footage(film) as footage:
            opened = decoder.open(film, "image")
            os.kill(child(decoder), signal.SIGKILL)
            assert np.array_equal(opened[60], footage[60])

    def test_a_second_time_it_is_for_want_of_memory(self, bomb: Path) -> None:
        with pytest.raises(InputError, match="more memory than there is now; send a smaller one") as refusal:
            hit_while_reading(bomb, signal.SIGKILL, 2)
        assert refusal.value.code == "too_large"

    def test_a_fault_of_ours_is_not_the_callers(self, decoder: Decoder, film: Path) -> None:
        opened = decoder.open(film, "image")
        with pytest.raises(DecoderError, match="IndexError: footage begins at picture 0"):
            opened[-1]

    def test_it_dies_with_its_parent(self, picture: Path) -> None:
        script = f"""
import time
from pathlib import Path
from avatar_api.decoder import Decoder
decoder = Decoder(600)
decoder.open(Path({str(picture)!r}), "image")
print(decoder._child.pid, flush=True)
time.sleep(600)
"""
        parent = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE)
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        server = psutil.Process(pid).ppid()
        os.kill(pid, signal.SIGSTOP)  # it can do nothing about it itself
        assert not ended(pid)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        try:
            eventually(lambda: ended(pid) and ended(server))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def test_nobody_notices_that_the_fork_server_was_killed(self, voice: Path) -> None:
        with Decoder(GENEROUS) as decoder:
            heard = decoder.read_voice(voice, "audio")
            first, before = child(decoder), psutil.Process(child(decoder)).ppid()
            os.kill(first, signal.SIGSTOP)  # it can do nothing about it itself
            os.kill(before, signal.SIGKILL)
            eventually(partial(ended, first))
            assert np.array_equal(decoder.read_voice(voice, "audio"), heard)
            assert psutil.Process(child(decoder)).ppid() != before

    def test_after_a_crash_children_come_from_another_fork_server_and_those_there_go_on(
        self, decoder: Decoder, voice: Path, bomb: Path
    ) -> None:
        decoder.read_voice(voice, "audio")
        before, server = child(decoder), psutil.Process(child(decoder)).ppid()
        with pytest.raises(InputError, match="crash"):
            hit_while_reading(bomb, signal.SIGSEGV, 1)
        with Decoder(GENEROUS) as another:
            another.read_voice(voice, "audio")
            assert psutil.Process(child(another)).ppid() != server
        decoder.read_voice(voice, "audio")
        assert child(decoder) == before
        decoder.close()
        eventually(partial(ended, server))

    def test_many_at_once_have_a_child_each_and_none_is_left(self, voice: Path) -> None:
        def read(_: int) -> tuple[int, np.ndarray]:
            with Decoder(GENEROUS) as decoder:
                heard = decoder.read_voice(voice, "audio")
                return child(decoder), heard

        expected = read_voice(voice)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(read, range(40)))
        assert len({pid for pid, _ in answers}) == 40
        assert all(np.array_equal(heard, expected) for _, heard in answers)
        assert all(ended(pid) for pid, _ in answers)

    def test_a_child_goes_on_when_the_thread_that_asked_for_it_has_ended(self, decoder: Decoder, voice: Path) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(decoder.read_voice, voice, "audio").result()
        before = child(decoder)
        decoder.read_voice(voice, "audio")
        assert child(decoder) == before

    def test_what_is_raised_while_waiting_ends_the_child(self, bomb: Path) -> None:
        children: list[int] = []

        def cancelled() -> None:
            children.append(child(reading))
            raise InterruptedError

        with Decoder(GENEROUS, cancelled) as reading:
            with pytest.raises(InterruptedError):
                reading.read_voice(bomb, "audio")
            assert ended(children[0])

    def test_a_join_that_is_broken_off_leaves_nothing(self, film: Path, voice: Path, tmp_path: Path) -> None:
        video = tmp_path / "joined.mp4"
        draft = tmp_path / "joined.mp4.part"
        segment = tmp_path / "segment.mp4"
        with VideoWriter(segment, 96, 64, None) as writer:
            writer.write(np.full((20, 64, 96, 3), 30, np.uint8))

        def cancelled() -> None:
            eventually(draft.exists)
            raise InterruptedError

        with Decoder(GENEROUS, cancelled) as decoder, pytest.raises(InterruptedError):
            decoder.join(video, [segment] * 1000, [voice], "together")
        assert not video.exists()
        assert not draft.exists()


def test_nothing_slow_is_imported_for_decoding() -> None:
    code = "import avatar_api.decoder, json, sys; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY))
    assert "av" in modules
    assert not {"torch", "bentoml", "cv2", "scenedetect", "pydantic", "sqlalchemy"} & set(modules)


class TestJobs:
    """Requests and runners decode nothing themselves."""

    def test_a_bomb_fails_as_a_wrong_input_and_leaves_no_child(
        self, picture: Path, bomb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(decoding, "MEMORY", 2**30)
        files = {"image": partial(copy, picture), "audio": partial(copy, bomb)}
        request = VideoRequest(size="64x64", max_seconds=5)
        spec = lay_down(request, files, tmp_path / "job", 60, "image")
        with pick_up(spec, tmp_path / "job") as inputs:
            with pytest.raises(InputError, match="needs more than 1 GB of memory") as refusal:
                inputs.read_voices()
            pid = child(inputs.decoder)
        assert refusal.value.param == "audio"
        assert ended(pid)


def copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def test_a_full_disk_is_no_fault_of_the_files(decoder: Decoder, film: Path, voice: Path, small_disk: SmallDisk) -> None:
    silent = film.with_name("silent.mp4")
    with VideoWriter(silent, 96, 64, None) as writer:
        writer.write(np.random.default_rng(2).integers(0, 256, (30, 64, 96, 3), np.uint8))
    small_disk.fill()
    video = small_disk.folder / "video.mp4"
    with pytest.raises(OSError, match="No space left") as full:
        decoder.join(video, [silent], [voice], "together")
    assert full.value.errno == errno.ENOSPC
    small_disk.make_room()
    assert decoder.join(video, [silent], [voice], "together") == 30
