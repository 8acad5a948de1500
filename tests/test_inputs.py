"""A job's files: judged before it is queued, and found again by whoever runs it."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from avatar_api.decoder import Pictures
from avatar_api.inputs import lay_down, pick_up
from avatar_api.requests import VideoRequest
from avatar_api.video_writer import VideoWriter
from infinitetalk.errors import InputError

PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A picture, two voices of 1 and 2 s, and a video of two scenes with and without sound."""
    found = {name: tmp_path / name for name in ("picture", "first", "second", "film", "silent film")}
    Image.fromarray(PICTURE).save(found["picture"], "PNG")
    for seconds, name in ((1, "first"), (2, "second")):
        soundfile.write(
            found[name], np.random.default_rng(seconds).normal(0, 0.1, seconds * 16000), 16000, format="WAV"
        )
    scenes = np.concatenate([np.full((40, 64, 96, 3), level, np.uint8) for level in (30, 220)])
    for name, sound in (("film", found["second"]), ("silent film", None)):
        with VideoWriter(found[name], 96, 64, sound) as writer:
            writer.write(scenes)
    return found


def submit(folder: Path, values: dict[str, object], **files: Path) -> dict[str, object]:
    """As the service does it; the specification goes through the database as JSON."""
    request = VideoRequest.judge({"size": "64x64", **values})
    sources = {name: partial(shutil.copyfile, file) for name, file in files.items()}
    spec: dict[str, object] = json.loads(json.dumps(lay_down(request, sources, folder, 60, "image")))
    return spec


def test_one_voice_and_a_picture(files: dict[str, Path], tmp_path: Path) -> None:
    spec = submit(tmp_path / "job", {"steps": 3}, image=files["picture"], audio=files["first"])
    with pick_up(spec, tmp_path / "job") as inputs:
        assert np.array_equal(inputs.reference, PICTURE)
        assert inputs.request.steps == 3
        (voice,) = inputs.read_voices()
        assert voice is not None
        assert len(voice) == 16000
        assert inputs.scene_starts([voice]) == [0]


def test_two_voices_and_boxes(files: dict[str, Path], tmp_path: Path) -> None:
    speakers = {"boxes": [[0, 0, 0.5, 1], [0.5, 0, 1, 1]], "order": "in_turn"}
    sent = {"image": files["picture"], "audio": files["first"], "audio_2": files["second"]}
    with pick_up(submit(tmp_path / "job", {"speakers": speakers}, **sent), tmp_path / "job") as inputs:
        assert [len(voice) for voice in inputs.read_voices() if voice is not None] == [16000, 32000]
    assert inputs.request.speakers.boxes == [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    assert [voice and voice.name for voice in inputs.voice_files] == ["audio", "audio_2"]


@pytest.mark.parametrize("silent", [0, 1])
def test_of_two_speakers_one_may_be_silent(files: dict[str, Path], tmp_path: Path, silent: int) -> None:
    speaks = ("audio_2", "audio")[silent]
    boxes = {"boxes": [None, None]}
    sent = {"image": files["picture"], speaks: files["first"]}
    with pick_up(submit(tmp_path / "job", {"speakers": boxes}, **sent), tmp_path / "job") as inputs:
        assert [voice is None for voice in inputs.read_voices()] == [silent == 0, silent == 1]


def test_a_video_speaks_with_its_own_sound_unless_a_voice_is_sent(files: dict[str, Path], tmp_path: Path) -> None:
    lengths = []
    for name, sent in (("own", {}), ("given", {"audio": files["first"]})):
        with pick_up(submit(tmp_path / name, {}, image=files["film"], **sent), tmp_path / name) as inputs:
            assert isinstance(inputs.reference, Pictures)
            lengths += [len(voice) / 16000 for voice in inputs.read_voices() if voice is not None]
    assert lengths == pytest.approx([3.2, 1], abs=0.05)


def test_scenes_are_looked_for_where_they_are_asked_for(files: dict[str, Path], tmp_path: Path) -> None:
    for cuts, expected in ((False, [0]), (True, [0, 40])):
        folder = tmp_path / str(cuts)
        with pick_up(submit(folder, {"scene_cuts": cuts}, image=files["film"]), folder) as inputs:
            assert inputs.scene_starts(inputs.read_voices()) == expected


@pytest.mark.parametrize(
    ("values", "names", "param", "reason"),
    [
        ({}, {"audio": "first"}, "image", "send a picture or a video"),
        ({}, {"image": "picture"}, "audio", "send a voice, or a video with sound"),
        ({}, {"image": "silent film"}, "audio", "has no sound"),
        ({}, {"image": "first", "audio": "first"}, "image", "looks like a WAV sound|no pictures"),
        ({}, {"image": "picture", "audio": "picture"}, "audio", "looks like a PNG picture"),
        ({}, {"image": "picture", "audio": "first", "audio_2": "picture"}, "audio_2", "looks like a PNG picture"),
        (
            {"speakers": {"boxes": [[0, 0, 0.5, 1], [0, 0, 0.5, 1]]}},
            {"image": "picture", "audio": "first"},
            "speakers",
            "lies wholly within",
        ),
    ],
)
def test_files_that_cannot_be_are_refused_and_leave_nothing(
    files: dict[str, Path],
    tmp_path: Path,
    values: dict[str, object],
    names: dict[str, str],
    param: str,
    reason: str,
) -> None:
    with pytest.raises(InputError, match=reason) as refusal:
        submit(tmp_path / "job", values, **{name: files[file] for name, file in names.items()})
    assert refusal.value.param == param
    assert not (tmp_path / "job").exists()
