"""The published model's command line: its flags, defaults and input file, over real files and tiny models."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from avatar_api.footage import Footage
from avatar_api.media import read_picture, read_voice
from avatar_api.video_writer import VideoWriter
from infinitetalk.pipeline import InfiniteTalkPipeline, Speaker
from infinitetalk.settings import Settings
from scripts.generate_infinitetalk import main
from tests.conftest import REPOSITORY

SMALL = ("--size", "64x64", "--frame_num", "9", "--motion_frame", "5", "--sample_steps", "1")
HIGH, LOW = 880, 220  # Hz, the two speakers' voices


@pytest.fixture(autouse=True)
def at_the_repository_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two voices, of 15 and 10 frames, and a video of 12 frames, red and then blue, with a sound of its own."""
    for name, seconds, pitch in (("high.wav", 0.6, HIGH), ("low.wav", 0.4, LOW)):
        soundfile.write(
            tmp_path / name, 0.3 * np.sin(np.arange(int(seconds * 16000)) / 16000 * 2 * np.pi * pitch), 16000
        )
    colours = np.zeros((60, 96, 128, 3), np.uint8)
    colours[:30, ..., 0] = colours[30:, ..., 2] = 200
    with VideoWriter(tmp_path / "film.mp4", 128, 96, tmp_path / "high.wav") as writer:
        writer.write(colours)
    return tmp_path


def write_input(folder: Path, **entries: Any) -> Path:
    content = {"prompt": "Two people talk.", "cond_video": str(REPOSITORY / "examples" / "two_people.jpg"), **entries}
    (folder / "input.json").write_text(json.dumps(content))
    return folder / "input.json"


def models(snapshots: Path) -> tuple[str, ...]:
    names = {
        "ckpt_dir": "Wan2.1-I2V-14B-480P",
        "infinitetalk_dir": "InfiniteTalk",
        "wav2vec_dir": "chinese-wav2vec2-base",
    }
    return tuple(part for flag, name in names.items() for part in (f"--{flag}", str(snapshots / name)))


def generate(snapshots: Path, *arguments: str | Path) -> int:
    return main([*models(snapshots), *map(str, arguments)])


def frames_of(path: Path) -> int:
    with Footage(path) as footage:
        return len(footage)


def heard(path: Path, cut: float) -> list[set[int]]:
    """Which of the two pitches sound in a video, before and after a moment."""
    sound, samples = read_voice(path), int(cut * 16000)
    loudness = [np.abs(np.fft.rfft(part, 16000)) for part in (sound[:samples], sound[samples:])]  # one value per Hz
    return [{pitch for pitch in (HIGH, LOW) if part[pitch] > part.max() / 3} for part in loudness]


def test_the_guides_command_runs_through_a_link_in_another_folder(snapshots: Path, tmp_path: Path) -> None:
    (tmp_path / "generate_infinitetalk.py").symlink_to(REPOSITORY / "scripts" / "generate_infinitetalk.py")
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    command = [sys.executable, "generate_infinitetalk.py", "--task", "infinitetalk-14B", *models(snapshots)]
    command += ["--input_json", "examples/single_example_image.json", "--save_file", "test_output", *SMALL]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "ends after 0.36 s, the voice after 4.36 s: --mode streaming goes on to its end" in run.stdout
    assert frames_of(tmp_path / "test_output.mp4") == 9


def test_several_processes_make_the_same_video(snapshots: Path, folder: Path) -> None:
    """torchrun starts them. They share the passes of a step, and one of them speaks."""
    example = write_input(folder, cond_audio={"person1": "low.wav"}, seed=1)
    flags = [*models(snapshots), *SMALL, "--device", "cpu", "--input_json", str(example), "--save_file"]
    assert main([*flags, str(folder / "alone")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "scripts/generate_infinitetalk.py", *flags, str(folder / "shared")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.count("seed is not used") == 1
    assert (folder / "shared.mp4").read_bytes() == (folder / "alone.mp4").read_bytes()


def test_every_flag_of_sampling_sets_what_it_names(
    snapshots: Path, pipeline: InfiniteTalkPipeline, folder: Path
) -> None:
    flags = ["--sample_steps", "6", "--sample_shift", "3", "--sample_text_guide_scale", "1.5", "--base_seed", "7"]
    flags += ["--sample_audio_guide_scale", "2.5", "--color_correction_strength", "0.5", "--use_apg"]
    flags += ["--size", "80x64", "--apg_momentum", "-0.5", "--apg_norm_threshold", "0.1", "--use_teacache"]
    flags += ["--teacache_thresh", "1e12", "--frame_num", "9", "--motion_frame", "1", "--mode", "streaming"]
    flags += ["--max_frame_num", "12"]
    settings = Settings(
        size="80x64",
        steps=6,
        shift=3,
        text_guidance=1.5,
        audio_guidance=2.5,
        projected_guidance=True,
        projection_momentum=-0.5,
        projection_threshold=0.1,
        teacache=1e12,
        color_correction=0.5,
        seed=7,
        max_frames=12,
        frames_per_clip=9,
        motion_frames=1,
    )
    assert_same_video(snapshots, pipeline, folder, flags, settings)


def test_the_defaults_are_the_published_ones(snapshots: Path, pipeline: InfiniteTalkPipeline, folder: Path) -> None:
    settings = Settings(
        size="64x64",
        steps=40,
        shift=7.0,
        text_guidance=5.0,
        audio_guidance=4.0,
        color_correction=1.0,
        seed=42,
        max_frames=9,
        frames_per_clip=9,
        motion_frames=5,
    )
    threshold = ("--teacache_thresh", "1e12", "--apg_norm_threshold", "0.1")  # of what is off
    flags = ("--size", "64x64", "--frame_num", "9", "--motion_frame", "5", *threshold)
    assert_same_video(snapshots, pipeline, folder, flags, settings)


def assert_same_video(
    snapshots: Path, pipeline: InfiniteTalkPipeline, folder: Path, flags: Sequence[str], settings: Settings
) -> None:
    """The command's file is, to the byte, what the pipeline makes with these settings."""
    voice, portrait = folder / "high.wav", REPOSITORY / "examples" / "portrait.png"
    example = write_input(folder, cond_video=str(portrait), cond_audio={"person1": str(voice)})
    assert generate(snapshots, "--input_json", example, "--save_file", folder / "command", *flags) == 0
    width, height = map(int, settings.size.split("x"))
    with VideoWriter(folder / "pipeline.mp4", width, height, voice) as writer:
        speakers = [Speaker(read_voice(voice))]
        for clip in pipeline.generate(read_picture(portrait), speakers, "Two people talk.", settings):
            writer.write(clip.frames)
    assert (folder / "command.mp4").read_bytes() == (folder / "pipeline.mp4").read_bytes()


@pytest.mark.parametrize(
    ("audio_type", "order", "frames", "cut", "voices"),
    [("add", "in_turn", 25, 0.6, [{HIGH}, {LOW}]), ("para", "together", 15, 0.4, [{HIGH, LOW}, {HIGH}])],
    ids=["one after the other", "at the same time"],
)
def test_two_people(
    snapshots: Path,
    pipeline: InfiniteTalkPipeline,
    folder: Path,
    audio_type: str,
    order: Literal["in_turn", "together"],
    frames: int,
    cut: float,
    voices: list[set[int]],
) -> None:
    """The video is as long as both voices, or as the longer one; boxes are in pixels of the picture, rows first."""
    files = {"person1": "high.wav", "person2": "low.wav"}
    boxes = {"person1": [150, 230, 440, 400], "person2": [20, 478, 400, 866]}
    example = write_input(folder, cond_audio=files, audio_type=audio_type, bbox=boxes)
    output = folder / "two.mp4"
    streaming = (*SMALL, "--mode", "streaming")
    assert generate(snapshots, "--input_json", example, "--save_file", output, *streaming) == 0
    assert frames_of(output) == frames
    assert heard(output, cut) == voices

    settings = Settings(size="64x64", steps=1, audio_order=order, frames_per_clip=9, motion_frames=5)
    high, low = folder / "high.wav", folder / "low.wav"
    speakers = [
        Speaker(read_voice(high), (230 / 896, 150 / 448, 400 / 896, 440 / 448)),
        Speaker(read_voice(low), (478 / 896, 20 / 448, 866 / 896, 400 / 448)),
    ]
    picture = read_picture(REPOSITORY / "examples" / "two_people.jpg")
    with VideoWriter(folder / "pipeline.mp4", 64, 64, [high, low], order) as writer:
        for clip in pipeline.generate(picture, speakers, "Two people talk.", settings):
            writer.write(clip.frames)
    assert output.read_bytes() == (folder / "pipeline.mp4").read_bytes()


def test_a_speaker_may_stay_silent(snapshots: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voices = {"person1": "None", "person2": "low.wav"}
    example = write_input(folder, cond_audio=voices, audio_type="para", tts_audio={"text": "Hello."})
    output = folder / "one of two.mp4"
    flags = (*SMALL, "--mode", "streaming", "--max_frame_num", "9")
    assert generate(snapshots, "--input_json", example, "--save_file", output, *flags) == 0
    assert heard(output, 0.2) == [{LOW}, {LOW}]
    printed = capsys.readouterr().out
    assert "tts_audio is not used" in printed
    assert "ends after 0.36 s, the voice after 0.40 s: a larger --max_frame_num goes on" in printed


def test_a_video_talks_with_its_own_sound_scene_by_scene(
    snapshots: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = write_input(folder, cond_video="film.mp4")
    output = folder / "dubbed.mp4"
    flags = (*SMALL, "--mode", "streaming", "--scene_seg", "--frame_num", "33")
    assert generate(snapshots, "--input_json", example, "--save_file", output, *flags) == 0
    assert "Scenes begin at 0.00 s, 1.20 s" in capsys.readouterr().out
    assert frames_of(output) == 60
    with Footage(output) as footage:  # colour correction: the first scene's pictures are red, the second's blue
        means = [footage[index].mean(axis=(0, 1)) for index in (10, 50)]
    assert means[0][0] > means[0][2] + 50
    assert means[1][2] > means[1][0] + 50


@pytest.mark.parametrize(
    "quantized",
    [("--quant", "int8"), ("--quant", "fp8", "--quant_dir", "quant_models/infinitetalk_single_fp8.safetensors")],
    ids=["at load", "published file"],
)
def test_weights_of_one_byte_take_loras_too(snapshots: Path, folder: Path, quantized: tuple[str, ...]) -> None:
    example = write_input(folder, cond_audio={"person1": "high.wav"})
    dim = json.loads((snapshots / "Wan2.1-I2V-14B-480P" / "config.json").read_text())["dim"]
    for name in ("one", "two"):
        save_file({"diffusion_model.blocks.0.ffn.2.diff_b": torch.ones(dim)}, folder / f"{name}.safetensors")
    quantized = (*quantized[:-1], str(snapshots / "InfiniteTalk" / quantized[-1])) if len(quantized) > 2 else quantized

    def video(*flags: str | Path) -> bytes:
        to = ("--input_json", example, "--save_file", folder / "video")
        assert generate(snapshots, *SMALL, *quantized, *to, *flags) == 0
        return (folder / "video.mp4").read_bytes()

    one, two = folder / "one.safetensors", folder / "two.safetensors"
    both = video("--lora_dir", one, two)
    assert both == video("--lora_dir", one, two, "--lora_scale", "1.2", "1.2")
    assert both != video("--lora_dir", one, two, "--lora_scale", "1.2", "0")
    assert video() == video("--lora_dir", one, "--lora_scale", "0")


def test_reference_quirks_refuse_a_voice_no_longer_than_a_clip(
    snapshots: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = write_input(folder, cond_audio={"person1": "low.wav"})
    assert generate(snapshots, "--input_json", example, *SMALL, "--frame_num", "13", "--reference_quirks") == 2
    assert "--input_json: a voice of 10 frames is no longer than a clip of 13" in capsys.readouterr().err


def test_flags_without_effect_say_so(snapshots: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the published examples among them: the video is the same without."""
    example = write_input(folder, cond_audio={"person1": "low.wav"})
    flags = ["--num_persistent_param_in_dit", "0", "--offload_model", "False", "--t5_cpu", "--print_timing"]
    flags += ["--audio_save_dir", "save_audio", "--enable_torch_deterministic", "--base_seed", "-1"]
    flags += ["--ulysses_size", "1", "--ring_size", "1", "--audio_mode", "localfile"]
    assert generate(snapshots, "--input_json", example, "--save_file", folder / "v.mp4", *SMALL, *flags) == 0
    assert frames_of(folder / "v.mp4") == 9
    lines = [line.split()[:4] for line in capsys.readouterr().out.splitlines() if line.startswith("--")]
    for flag in ("num_persistent_param_in_dit", "offload_model", "t5_cpu", "print_timing", "audio_save_dir"):
        assert [f"--{flag}", "has", "no", "effect:"] in lines
    assert len(lines) == 6  # and the seed that was drawn
    assert not (REPOSITORY / "save_audio").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--audio_mode", "tts"], "--audio_mode tts: nothing here turns text into speech; make the voice with any"),
        (["--ulysses_size", "8"], "--ulysses_size 8: attention is not divided among GPUs; leave it out: 'torchrun"),
        (["--ring_size", "2"], "--ring_size 2: attention is not divided among GPUs; leave it out: 'torchrun"),
        (["--dit_fsdp"], "--dit_fsdp: weights are not divided among GPUs; leave it out: --memory"),
        (["--t5_fsdp"], "--t5_fsdp: weights are not divided among GPUs; leave it out: --memory"),
        (["--dit_path", "dit.pth"], "--dit_path dit.pth: a pickle of a whole model is not opened; use --ckpt_dir"),
        (["--enable_torch_compile"], "--enable_torch_compile: nothing is compiled; leave it out: --use_teacache"),
        (["--quant_dir", "fp8.safetensors"], "--quant_dir was given without --quant; add --quant int8 or"),
        (["--lora_dir", "a", "b", "--lora_scale", "1", "1", "1"], "--lora_scale has 3 values for 2 files"),
        (["--lora_dir", "a.safetensors"], "a.safetensors is missing"),
        (["--size", "infinitetalk-1080"], "--size: size is 'infinitetalk-1080'; use"),
        (["--sample_steps", "0"], "--sample_steps: steps is 0"),
        (["--sample_shift", "0"], "--sample_shift: shift is 0"),
        (["--frame_num", "80"], "--frame_num: frames_per_clip is 80; it must be 4n + 1"),
        (["--motion_frame", "8"], "--motion_frame: motion_frames is 8; it must be 4n + 1"),
        (["--mode", "streaming", "--max_frame_num", "0"], "--max_frame_num: max_frames is 0"),
        (["--color_correction_strength", "2"], "--color_correction_strength: color_correction is 2"),
        (["--use_teacache", "--teacache_thresh", "-1"], "--teacache_thresh: teacache is -1"),
        (["--apg_norm_threshold", "-1"], "--apg_norm_threshold: projection_threshold is -1"),
        (["--memory", "8gb"], "--memory: memory is '8gb'; use 141gb"),
        (["--device", "abacus"], "--device: device is 'abacus'"),
    ],
)
def test_what_is_refused_is_named_with_what_does_instead(
    snapshots: Path, folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    example = write_input(folder, cond_audio={"person1": "high.wav"})
    before = set(folder.iterdir())
    assert generate(snapshots, "--input_json", example, "--save_file", folder / "video", *SMALL, *flags) == 2
    error = capsys.readouterr().err
    assert f"error: {message}" in error
    assert error.count("\n") == 1
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"cond_video": None}, "no picture was given; add it to the input file as cond_video"),
        ({"prompt": None}, "no prompt was given; add it to the input file as prompt"),
        ({"prompt": 5}, "prompt is 5; it must be a text"),
        ({"cond_audio": {}}, "no voice was given, and a picture has none of its own"),
        ({"cond_audio": {"person1": "None", "person2": None}}, "no voice was given, and a picture has none of its own"),
        ({"cond_audio": "high.wav"}, "cond_audio is 'high.wav'; it must be an object"),
        ({"cond_audio": {"person3": "high.wav"}}, "cond_audio names 'person3'"),
        ({"audio_type": "both"}, "audio_type is 'both'; it must be 'para'"),
        ({"bbox": {"person1": [0, 0, 9, 9]}}, "a box was given for the only speaker"),
        ({"bbox": {"person2": [0, 0, 9.5, 9]}}, "bbox of person2 is [0, 0, 9.5, 9]; it must be [first row, first"),
        ({"bbox": {"person2": [30, 20, 418, 900]}}, "bbox [30, 20, 418, 900] is not [first row, first column, last"),
        ({"bbox": {"person2": [0, 478, 866, 440]}}, "of the picture, which has 448 rows and 896 columns"),
        ({"bbox": {"person2": [0, 890, 448, 896]}}, "the box of speaker 2"),
    ],
)
def test_a_mistake_in_the_input_file_is_named_before_the_models_are_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], entries: dict[str, Any], message: str
) -> None:
    example = write_input(folder, **{"cond_audio": {"person1": "high.wav"}, **entries})
    assert generate(folder / "no models", "--input_json", example, *SMALL) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_in_neither_place_is_named_with_both(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    example = write_input(folder, cond_audio={"person1": "voices/me.wav"})
    assert generate(folder, "--input_json", example) == 2
    assert f"there is neither {here}/voices/me.wav nor {folder}/voices/me.wav" in capsys.readouterr().err


def test_a_file_in_the_current_folder_comes_before_one_beside_the_input_file(
    snapshots: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    shutil.copy(folder / "low.wav", "high.wav")
    example = write_input(folder, cond_audio={"person1": "high.wav"})
    assert generate(snapshots, "--input_json", example, "--save_file", "video", *SMALL) == 0
    assert heard(Path("video.mp4"), 0.2) == [{LOW}, {LOW}]


def test_without_a_name_the_video_is_called_after_its_prompt_and_the_time(
    snapshots: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = write_input(folder, cond_audio={"person1": "high.wav"})
    (folder / "results").mkdir()
    monkeypatch.chdir(folder / "results")
    assert generate(snapshots, "--input_json", example, *SMALL) == 0
    (video,) = Path.cwd().iterdir()
    assert video.name.startswith("infinitetalk-14B_64x64_1_1_Two_people_talk._20")
    assert video.suffix == ".mp4"
    with av.open(str(video)) as container:
        assert container.streams.video[0].frames == 9
