"""Colours are pulled back to those of the picture."""

import torch

from infinitetalk.color import match_color


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_frame_that_drifted_gets_the_pictures_colours_back() -> None:
    picture = noise(3, 32, 32) * 0.5
    drifted = (picture * 0.8 + 0.1)[:, None]
    matched = match_color(drifted, picture, 1.0)
    before, after = (drifted[:, 0] - picture).abs().mean(), (matched[:, 0] - picture).abs().mean()
    assert after < before / 10


def test_strength_zero_changes_nothing_and_half_goes_half_way() -> None:
    video, picture = noise(3, 2, 8, 8, seed=1), noise(3, 8, 8, seed=2)
    assert torch.equal(match_color(video, picture, 0.0), video)
    half, full = match_color(video, picture, 0.5), match_color(video, picture, 1.0)
    torch.testing.assert_close(half, (video + full) / 2, atol=1e-5, rtol=0)


def test_a_picture_of_one_colour_turns_the_video_into_it() -> None:
    picture = torch.tensor([0.2, -0.4, 0.6])[:, None, None].expand(3, 8, 8)
    matched = match_color(noise(3, 1, 8, 8), picture, 1.0)
    torch.testing.assert_close(matched[:, 0], picture, atol=1e-4, rtol=0)


def test_a_grey_frame_has_no_colour_to_scale_and_takes_the_pictures_mean() -> None:
    grey = torch.zeros(3, 1, 8, 8)
    picture = torch.tensor([0.2, -0.4, 0.6])[:, None, None].expand(3, 8, 8)
    torch.testing.assert_close(match_color(grey, picture, 1.0)[:, 0], picture, atol=1e-4, rtol=0)


def test_frames_are_matched_one_by_one() -> None:
    video, picture = noise(3, 3, 8, 8, seed=1), noise(3, 8, 8, seed=2)
    together = match_color(video, picture, 1.0)
    apart = torch.cat([match_color(video[:, i : i + 1], picture, 1.0) for i in range(3)], dim=1)
    assert torch.equal(together, apart)
