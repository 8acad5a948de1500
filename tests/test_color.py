"""Colours are pulled back to those of the picture."""

import pytest
import torch

from infinitetalk.color import lab_from_rgb, match_color, rgb_from_lab


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


# sRGB → Lab by the formulas of IEC 61966-2-1 and CIE 15 in double precision: red, green, blue, white, a mixed colour,
# and colours on either side of the points where the formulas change over.
LAB_OF_RGB = [
    ((1, 0, 0), (53.240587944, 80.092308226, 67.202751044)),
    ((0, 1, 0), (87.735099488, -86.183029744, 83.179703175)),
    ((0, 0, 1), (32.295672565, 79.185590912, -107.857300207)),
    ((1, 1, 1), (100.0, -0.002454938, 0.004653421)),
    ((0.2, 0.4, 0.8), (45.031169617, 18.708085048, -57.849319689)),
    ((0.0401, 0.039, 0.0404), (2.75007492, 0.122816086, -0.108924214)),
    ((0.092028915, 0.092028915, 0.092028915), (7.97606836, -0.000506396, 0.000959874)),
    ((0, 0, 0), (0, 0, 0)),
]


@pytest.mark.parametrize(("rgb", "lab"), LAB_OF_RGB)
def test_lab_follows_the_standard_to_seven_digits(rgb: tuple[float, ...], lab: tuple[float, ...]) -> None:
    pixel = torch.tensor(rgb, dtype=torch.float64)[:, None]
    assert lab_from_rgb(pixel)[:, 0].tolist() == pytest.approx(lab, abs=2e-7)
    assert rgb_from_lab(lab_from_rgb(pixel))[:, 0].tolist() == pytest.approx(rgb, abs=1e-5)


def test_lab_and_back_is_the_same_colour_for_every_grey() -> None:
    greys = torch.linspace(0, 1, 1001, dtype=torch.float64).expand(3, -1)
    torch.testing.assert_close(rgb_from_lab(lab_from_rgb(greys)), greys, atol=2e-7, rtol=0)
