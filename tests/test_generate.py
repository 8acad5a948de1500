"""The command line: a video from the example, and a plain word for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from scripts.generate import main
from tests.conftest import REPOSITORY

EXAMPLE = "examples/single_example_image.json"


def test_the_command_runs_from_the_repository_root() -> None:
    command = [sys.executable, "scripts/generate.py", "--help"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "--picture" in run.stdout


@pytest.fixture(autouse=True)
def at_the_repository_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def generate(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def test_the_example_becomes_a_video_with_sound_as_long_as_the_voice(
    snapshots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "folder" / "video.mp4"
    assert generate(EXAMPLE, "--models", snapshots, "--size", "64x64", "--steps", "1", "--output", output) == 0
    assert "64x64, 109 frames, 4.36 s" in capsys.readouterr().out
    voice = soundfile.info(REPOSITORY / "examples" / "voice.wav").duration
    with av.open(str(output)) as container:
        picture, sound = container.streams.video[0], container.streams.audio[0]
        assert (picture.width, picture.height) == (64, 64)
        assert picture.average_rate == 25
        for stream in (picture, sound):
            assert stream.duration is not None and stream.time_base is not None
            assert abs(float(stream.duration * stream.time_base) - voice) < 0.04
        heard = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(sound)])
    assert heard.std() > 0.01


def test_options_stand_in_for_the_input_file(
    snapshots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "half.wav", np.zeros(8000, np.float32), 16000)
    status = generate(
        *("--picture", "examples/portrait.png", "--voice", tmp_path / "half.wav", "--prompt", "A woman is silent."),
        *("--models", snapshots, "--size", "64x64", "--steps", "1", "--max-seconds", "0.2"),
        *("--output", tmp_path / "silent.mp4"),
    )
    assert status == 0
    assert "5 frames, 0.20 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([EXAMPLE, "--size", "100x100"], "multiples of 16"),
        ([EXAMPLE, "--steps", "0"], "steps is 0"),
        ([EXAMPLE, "--seed", "-1"], "seed is -1"),
        ([EXAMPLE, "--max-seconds", "0"], "max_seconds is 0"),
        ([EXAMPLE, "--max-seconds", "nan"], "max_seconds is nan"),
        ([EXAMPLE, "--picture", "missing.png"], "'missing.png' does not exist"),
        ([EXAMPLE, "--voice", "examples/portrait.png"], "voice: 'portrait.png'"),
        ([EXAMPLE, "--picture", "examples/voice.wav"], "picture: 'voice.wav' looks like a WAV sound"),
        (["missing.json"], "missing.json"),
        (["examples/README.md"], "not a JSON input file"),
        ([], "no picture was given"),
        ([EXAMPLE, "--device", "abacus"], "device is 'abacus'"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(
    snapshots: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert generate(*arguments, "--models", snapshots, "--output", tmp_path / "video.mp4") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


def test_missing_models_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(EXAMPLE, "--models", tmp_path / "nowhere", "--output", tmp_path / "video.mp4") == 2
    assert str(tmp_path / "nowhere" / "Wan2.1-I2V-14B-480P") in capsys.readouterr().err


def test_a_second_voice_is_refused_not_ignored(
    snapshots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = json.loads((REPOSITORY / EXAMPLE).read_text())
    example["cond_audio"]["person2"] = "examples/voice.wav"
    (tmp_path / "two.json").write_text(json.dumps(example))
    assert generate(tmp_path / "two.json", "--models", snapshots, "--output", tmp_path / "video.mp4") == 2
    assert "2 voices; one is supported" in capsys.readouterr().err
