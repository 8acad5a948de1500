"""Any length of voice becomes clips that show each of its frames once."""

import pytest

from infinitetalk.errors import InputError
from infinitetalk.timeline import plan

LENGTHS = [1, 2, 40, 80, 81, 82, 152, 153, 154, 225, 226, 1000, 45000]


@pytest.mark.parametrize("length", LENGTHS)
def test_every_frame_of_the_voice_is_shown_once_and_in_order(length: int) -> None:
    timeline = plan([length])
    shown = [timeline.start(clip) + frame for clip in range(timeline.clips) for frame in timeline.new_frames(clip)]
    assert shown == list(range(length))


@pytest.mark.parametrize("length", LENGTHS)
def test_the_model_hears_each_shown_frame_and_two_on_either_side(length: int) -> None:
    timeline = plan([length])
    for clip in {0, timeline.clips // 2, timeline.clips - 1}:
        window = timeline.audio_window(clip, 0)
        assert len(window) == 81
        assert all(0 <= frame < length for heard in window for frame in heard)
        for new in timeline.new_frames(clip):
            frame = timeline.start(clip) + new
            assert window[new][2] == frame
            assert window[new][1] == max(frame - 1, 0)
            if frame + 1 < length:
                assert window[new][3] == frame + 1


def test_after_the_end_the_voice_plays_backwards() -> None:
    heard = [window[2] for window in plan([100]).audio_window(1, 0)]
    assert heard[:30] == [*range(72, 100), 99, 98]


def test_a_voice_shorter_than_a_clip_goes_back_and_forth() -> None:
    heard = [window[2] for window in plan([3]).audio_window(0, 0)]
    assert heard[:10] == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2]


@pytest.mark.parametrize(("max_frames", "clips"), [(1, 1), (40, 1), (81, 1), (82, 2), (153, 2), (154, 3)])
def test_max_frames_ends_the_video_early(max_frames: int, clips: int) -> None:
    timeline = plan([500], max_frames=max_frames)
    assert (timeline.total_frames, timeline.clips) == (max_frames, clips)


def test_there_is_no_cap_of_its_own() -> None:
    assert plan([25 * 3600 * 2]).total_frames == 180_000


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"voice_frames": [0]}, "audio"),
        ({"frames_per_clip": 80}, "frames_per_clip"),
        ({"motion_frames": 8}, "motion_frames"),
        ({"motion_frames": 81}, "motion_frames"),
        ({"max_frames": 0}, "max_frames"),
    ],
)
def test_what_the_model_cannot_take_is_refused_by_name(arguments: dict[str, object], param: str) -> None:
    with pytest.raises(InputError, match=param if param != "audio" else "voice") as refusal:
        plan(**({"voice_frames": [100]} | arguments))  # type: ignore[arg-type]
    assert refusal.value.param == param
