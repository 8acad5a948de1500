"""Sizes as users write them, and pictures fitted to them."""

import numpy as np
import pytest

from infinitetalk.errors import InputError
from infinitetalk.geometry import output_size, resize_and_crop


@pytest.mark.parametrize(
    ("size", "picture", "expected"),
    [
        ("480p", (512, 512), (640, 640)),
        ("480p", (1080, 1920), (448, 896)),
        ("720p", (1080, 1920), (704, 1280)),
        ("720p", (1920, 1080), (1280, 704)),
        ("480p", (20, 3000), (320, 1216)),
        ("128x64", (512, 512), (64, 128)),
        ("1280x720", (512, 512), (720, 1280)),
    ],
)
def test_output_size(size: str, picture: tuple[int, int], expected: tuple[int, int]) -> None:
    assert output_size(size, *picture) == expected


@pytest.mark.parametrize(
    "size", ["", "480", "1080p", "100x100", "0x64", "8x8", "64x", "-64x64", "64×64", "64x64 ", "1e3x64"]
)
def test_other_sizes_are_refused_with_the_value_and_the_remedy(size: str) -> None:
    with pytest.raises(InputError, match=r"size is .*(multiples of 16|use '480p')") as refusal:
        output_size(size, 512, 512)
    assert refusal.value.param == "size"


def test_the_middle_of_the_picture_is_kept() -> None:
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[:, 100:200] = 255
    fitted = resize_and_crop(picture, 64, 64)
    assert fitted.shape == (3, 64, 64)
    assert fitted.min() > 0.7, "the black sides are cut off; antialiasing lets a trace of them in"
    assert fitted.mean() > 0.98


def test_levels_span_minus_one_to_one() -> None:
    picture = np.stack([np.full((64, 64), level, np.uint8) for level in (0, 128, 255)], axis=-1)
    assert resize_and_crop(picture, 64, 64)[:, 0, 0].tolist() == pytest.approx([-1, 128 / 127.5 - 1, 1], abs=1e-6)
