"""What each guidance scale does to the prediction."""

import pytest
import torch

from infinitetalk.geometry import BUCKETS
from infinitetalk.guidance import (
    CONDITIONAL,
    UNCONDITIONAL,
    WITHOUT_TEXT,
    WITHOUT_VOICE,
    ProjectedGuidance,
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


def test_projected_guidance_keeps_what_is_at_right_angles_to_the_prediction() -> None:
    guide = ProjectedGuidance(momentum=0, threshold=0)
    assert guide(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])).tolist() == [3, 0]
    bounded = ProjectedGuidance(momentum=0, threshold=1)
    torch.testing.assert_close(bounded(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])), torch.tensor([0.6, 0.0]))


def test_projected_guidance_remembers_the_steps_before() -> None:
    guide = ProjectedGuidance(momentum=-0.5, threshold=0)
    difference, conditional = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 1.0])
    assert [guide(difference, conditional)[0].item() for _ in range(3)] == [4, 2, 3]


def test_projected_guidance_adds_each_condition_to_the_conditional_prediction() -> None:
    conditional, without_text, unconditional = (torch.tensor(x) for x in ([1.0, 0.0], [1.0, -2.0], [1.0, -5.0]))
    guides = [ProjectedGuidance(0, 0), ProjectedGuidance(0, 0)]
    guided = combine([conditional, without_text, unconditional], 5.0, 4.0, guides)
    assert guided.tolist() == [1, (5 - 1) * 2 + (4 - 1) * 3]
    assert combine([conditional, without_text], 1.0, 4.0, guides).tolist() == [1, (4 - 1) * 2 - 0]


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
