"""What each guidance scale does to the prediction."""

import pytest
import torch

from infinitetalk.geometry import BUCKETS
from infinitetalk.guidance import (
    CONDITIONAL,
    UNCONDITIONAL,
    WITHOUT_TEXT,
    WITHOUT_VOICE,
    combine,
    default_shift,
    passes,
    timesteps,
)
from infinitetalk.settings import Settings


def test_three_passes_in_the_published_order_and_two_without_text_guidance() -> None:
    assert passes(5.0) == (CONDITIONAL, WITHOUT_TEXT, UNCONDITIONAL)
    assert passes(1.0) == (CONDITIONAL, WITHOUT_VOICE)


def test_scales_of_one_give_the_conditional_prediction() -> None:
    predictions = list(torch.randn(3, 4))
    torch.testing.assert_close(combine(predictions, 1.0, 1.0), predictions[0])
    torch.testing.assert_close(combine(predictions[:2], 1.0, 1.0), predictions[0])


def test_each_scale_multiplies_its_own_difference() -> None:
    conditional, without_text, unconditional = (torch.tensor([value]) for value in (7.0, 3.0, 2.0))
    assert combine([conditional, without_text, unconditional], 5.0, 4.0).item() == 2 + 5 * 4 + 4 * 1
    assert combine([conditional, without_text], 1.0, 4.0).item() == 3 + 4 * 4


def test_timesteps_fall_from_1000_to_0() -> None:
    times = timesteps(40, 7.0)
    assert len(times) == 41
    assert times[0] == 1000
    assert times[-1] == 0
    assert all(times[:-1] > times[1:])


def test_a_larger_shift_stays_noisy_for_longer() -> None:
    assert timesteps(8, 11.0)[4] > timesteps(8, 7.0)[4] > timesteps(8, 1.0)[4]


def test_a_shift_of_one_leaves_the_steps_even() -> None:
    assert timesteps(4, 1.0)[:-1].tolist() == pytest.approx([1000, 667, 334, 1], abs=1e-3)


@pytest.mark.parametrize(("size", "shift"), [("480p", 7.0), ("720p", 11.0)])
def test_every_published_size_gets_its_published_shift(size: str, shift: float) -> None:
    assert {default_shift(*bucket) for bucket in BUCKETS[size].values()} == {shift}


def test_the_defaults_are_the_published_ones() -> None:
    defaults = Settings()
    assert (defaults.steps, defaults.text_guidance, defaults.audio_guidance, defaults.seed) == (40, 5.0, 4.0, 42)
    assert (defaults.frames_per_clip, defaults.motion_frames, defaults.color_correction) == (81, 9, 1.0)
    assert (defaults.size, defaults.shift, defaults.max_frames, defaults.reference_quirks) == (
        "480p",
        None,
        None,
        False,
    )
