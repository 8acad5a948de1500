"""Every value of a request is judged in one place, and refused with its name, itself and what would be right."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from avatar_api.requests import VideoRequest, with_few_steps
from infinitetalk.errors import InputError
from infinitetalk.settings import FEW_STEPS, Settings


def test_a_request_that_says_nothing_gets_the_published_defaults() -> None:
    assert VideoRequest.judge({}).settings() == Settings()


def test_values_may_come_as_text_as_forms_send_them() -> None:
    request = VideoRequest.judge({"steps": "8", "shift": "3.5", "seed": "7", "max_seconds": "2.02", "size": "128x64"})
    assert request.settings() == Settings(size="128x64", steps=8, shift=3.5, seed=7, max_frames=50)


def test_balanced_skips_forwards_and_changes_nothing_else() -> None:
    assert VideoRequest.judge({"quality": "balanced"}).settings() == Settings(teacache=0.2)
    assert VideoRequest.judge({"quality": "exact"}).settings() == Settings()


class TestFast:
    @pytest.mark.parametrize("name", FEW_STEPS)
    def test_takes_what_its_lora_wants_where_the_caller_says_nothing(self, name: str) -> None:
        few_steps = FEW_STEPS[name]
        asked = {"quality": "fast", "seed": 7, "shift": None}
        request = VideoRequest.judge(with_few_steps(asked, few_steps))
        assert request.settings() == replace(Settings(seed=7), **few_steps.settings)

    def test_leaves_what_the_caller_says(self) -> None:
        asked = {"quality": "fast", "steps": "6", "text_guidance": 3, "audio_guidance": 2.5, "shift": 5}
        settings = VideoRequest.judge(with_few_steps(asked, FEW_STEPS["lightx2v"])).settings()
        assert settings == Settings(steps=6, text_guidance=3, audio_guidance=2.5, shift=5)

    def test_is_refused_where_there_is_no_lora(self) -> None:
        with pytest.raises(InputError, match="this server has no LoRA for it; use 'exact' or 'balanced'") as refusal:
            with_few_steps({"quality": "fast"}, None)
        assert refusal.value.param == "quality"

    @pytest.mark.parametrize("quality", ["exact", "balanced"])
    def test_is_no_matter_to_the_others(self, quality: str) -> None:
        assert with_few_steps({"quality": quality}, FEW_STEPS["fusionx"]) == {"quality": quality}
        assert with_few_steps({}, FEW_STEPS["fusionx"]) == {}


def test_two_speakers_have_boxes_and_an_order() -> None:
    given = {"boxes": [[0, 0, 0.5, 1], None], "order": "in_turn"}
    request = VideoRequest.judge({"speakers": given})
    assert request == VideoRequest.judge({"speakers": json.dumps(given)}), "forms send it as text"
    assert request == VideoRequest.judge(json.loads(json.dumps(request.model_dump()))), "and jobs keep it as JSON"
    assert request.speakers.boxes == [(0, 0, 0.5, 1), None]
    assert request.settings().audio_order == "in_turn"
    assert VideoRequest.judge({"speakers": ""}) == VideoRequest.judge({})


@pytest.mark.parametrize(
    ("speakers", "message"),
    [
        ("{", "speakers is not JSON"),
        ("[1]", "a valid dictionary"),
        ({"boxes": [[0, 0, 1, 1]]}, "at least 2 items"),
        ({"boxes": [[0, 0, 1], None]}, "speakers.boxes.0.3 is"),
        ({"boxes": [None, [0, 0, 1, 1.5]]}, "speakers.boxes.1.3 is 1.5; it should be less than or equal to 1"),
        ({"order": "at once"}, "'together' or 'in_turn'"),
        ({"box": []}, "there is no parameter 'speakers.box'; there are boxes, order"),
    ],
)
def test_speakers_that_cannot_be_are_refused(speakers: Any, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        VideoRequest.judge({"speakers": speakers})
    assert message in str(refusal.value)
    assert refusal.value.param.startswith("speakers")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "many"}, "steps is 'many'; it should be a valid integer"),
        ({"steps": 0}, "steps is 0; it should be greater than or equal to 1"),
        ({"steps": 10_000}, "less than or equal to 200"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "it should be less than"),
        ({"size": "64"}, "use '480p', '720p' or WIDTHxHEIGHT"),
        ({"size": "48x64"}, "from 64 to 1280"),
        ({"size": "64x1296"}, "from 64 to 1280"),
        ({"size": "100x100"}, "multiples of 16"),
        ({"text_guidance": "nan"}, "a finite number"),
        ({"audio_guidance": -1}, "greater than or equal to 0"),
        ({"color_correction": 2}, "less than or equal to 1"),
        ({"max_seconds": 0}, "greater than or equal to 0.04"),
        ({"shift": 0}, "greater than 0"),
        ({"prompt": "a" * 4001}, "at most 4000 characters"),
        ({"prompt": 7}, "a valid string"),
        ({"quality": "best"}, "'exact', 'balanced' or 'fast'"),
        ({"sede": 1}, "there is no parameter 'sede'; there are audio_guidance, color_correction"),
    ],
)
def test_a_wrong_value_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        VideoRequest.judge(values)
    assert refusal.value.param == next(iter(values))
    assert message in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_a_name_that_is_no_text_is_refused_by_its_escape() -> None:
    with pytest.raises(InputError, match=r"there is no parameter '\\ud800'; a name should be text") as refusal:
        VideoRequest.judge(json.loads(r'{"\ud800": 1}'))
    assert refusal.value.param == r"\ud800"


def test_judging_a_request_does_not_wait_for_torch() -> None:
    program = "import sys, avatar_api.requests, avatar_api.media; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
