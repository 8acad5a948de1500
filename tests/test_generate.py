"""The command line: a video from the example, and a plain word for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from avatar_api.media import read_picture, read_voice
from avatar_api.video_writer import VideoWriter
from infinitetalk.pipeline import InfiniteTalkPipeline, Speaker
from infinitetalk.settings import Settings
from scripts.generate import main
from tests.conftest import REPOSITORY

EXAMPLE = "examples/single_example_image.json"
TWO = "examples/multi_example_image.json"


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
        ([EXAMPLE, "--picture", "examples/voice.wav"], "picture: 'voice.wav' has no pictures"),
        (["missing.json"], "missing.json"),
        (["examples/README.md"], "not a JSON input file"),
        ([], "no picture was given; use --picture, or an input file that names it as cond_video"),
        ([EXAMPLE, "--voice-2", "missing.wav"], "voice_2: 'missing.wav' does not exist"),
        ([EXAMPLE, "--box", "0,0,0.5,1"], "a box was given for the only speaker"),
        ([TWO, "--box-2", "0.5,0,0.4,1"], "the box of speaker 2 is [0.5, 0.0, 0.4, 1.0]"),
        (["--picture", "examples/portrait.png", "--prompt", "A"], "no voice was given, and a picture has none of its"),
        (["--picture", "examples/portrait.mp4", "--prompt", "A"], "voice: 'portrait.mp4' has no sound"),
        ([EXAMPLE, "--preset", "quick"], "preset is 'quick'; use one of fusionx, lightx2v"),
        ([EXAMPLE, "--preset", "fusionx"], "how its LoRA is used: give vrgamedevgirl84/"),
        ([EXAMPLE, "--lora", "missing.safetensors:0.5"], "missing.safetensors is missing"),
        ([EXAMPLE, "--teacache", "-1"], "teacache is -1"),
        ([EXAMPLE, "--memory", "8gb"], "memory is '8gb'"),
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


def test_every_option_reaches_the_pipeline(
    snapshots: Path, pipeline: InfiniteTalkPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two people in turn, and a preset's steps, shift and guidance but for the one that is overridden."""
    dim = json.loads((snapshots / "Wan2.1-I2V-14B-480P" / "config.json").read_text())["dim"]
    lora = tmp_path / "changes:nothing.safetensors"
    save_file({"diffusion_model.blocks.0.ffn.2.diff_b": torch.zeros(dim)}, lora)
    for name in ("one.wav", "two.wav"):
        noise = np.random.default_rng(len(name)).normal(0, 0.1, 3200)
        soundfile.write(tmp_path / name, noise, 16000)
    one, two, output = tmp_path / "one.wav", tmp_path / "two.wav", tmp_path / "command.mp4"
    options: list[str | Path] = [
        "--picture",
        "examples/two_people.jpg",
        "--voice",
        one,
        "--voice-2",
        two,
        "--prompt",
        "They talk.",
    ]
    options += ["--box", "0.3,0.1,0.45,1", "--box-2", "0.5,0,0.7,0.9", "--in-turn", "--size", "64x64", "--seed", "7"]
    options += ["--lora", lora, "--lora", f"{lora}:0.5", "--preset", "lightx2v", "--steps", "6", "--teacache", "1e12"]
    options += ["--projected-guidance", "--color-correction", "0.5", "--max-seconds", "0.36", "--models", snapshots]
    assert generate(*options, "--output", output) == 0
    assert "64x64, 9 frames, 0.36 s" in capsys.readouterr().out

    settings = Settings(
        size="64x64",
        steps=6,
        shift=2.0,
        text_guidance=1.0,
        audio_guidance=2.0,
        projected_guidance=True,
        teacache=1e12,
        audio_order="in_turn",
        color_correction=0.5,
        seed=7,
        max_frames=9,
    )
    speakers = [
        Speaker(read_voice(one), (0.3, 0.1, 0.45, 1.0)),
        Speaker(read_voice(two), (0.5, 0.0, 0.7, 0.9)),
    ]
    picture = read_picture(Path("examples/two_people.jpg"))
    with VideoWriter(tmp_path / "pipeline.mp4", 64, 64, [one, two], "in_turn") as writer:
        for clip in pipeline.generate(picture, speakers, "They talk.", settings):
            writer.write(clip.frames)
    assert output.read_bytes() == (tmp_path / "pipeline.mp4").read_bytes()


def test_the_example_of_a_video_is_dubbed_with_another_voice(
    snapshots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its options stand in for the input file's, which names nobody's box."""
    soundfile.write(tmp_path / "half.wav", np.zeros(8000, np.float32), 16000)
    example, voice = "examples/single_example_video.json", tmp_path / "half.wav"
    options = (example, "--voice", voice, "--scenes", "--size", "64x64")
    assert generate(*options, "--steps", "1", "--models", snapshots, "--output", tmp_path / "dubbed.mp4") == 0
    printed = capsys.readouterr().out
    assert "Scenes begin at 0.00 s\n" in printed
    assert "64x64, 12 frames, 0.48 s" in printed
