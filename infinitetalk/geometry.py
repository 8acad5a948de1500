"""Where the picture goes: output sizes, the resize and the centre crop that fit a picture to one, who speaks where.

Heights come before widths, as in tensor shapes, except in the text form of a size ("832x480" is width x height).
"""

import math
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from infinitetalk.errors import InputError

SPATIAL_STRIDE = 16
"""Pixels per transformer token along each side: 8 (VAE) x 2 (patch)."""

# The sizes the model was trained at: aspect ratio height / width, as the published tables round it → (height, width)
# in pixels. The areas are about 627² and 960² pixels.
BUCKETS_480P: dict[float, tuple[int, int]] = {
    0.26: (320, 1216), 0.38: (384, 1024), 0.50: (448, 896), 0.67: (512, 768), 0.82: (576, 704),
    1.00: (640, 640), 1.22: (704, 576), 1.50: (768, 512), 1.86: (832, 448), 2.00: (896, 448),
    2.50: (960, 384), 2.83: (1088, 384), 3.60: (1152, 320), 3.80: (1216, 320), 4.00: (1280, 320),
}  # fmt: skip
BUCKETS_720P: dict[float, tuple[int, int]] = {
    0.22: (448, 2048), 0.29: (512, 1792), 0.36: (576, 1600), 0.45: (640, 1408), 0.55: (704, 1280),
    0.63: (768, 1216), 0.76: (832, 1088), 0.88: (896, 1024), 1.00: (960, 960), 1.14: (1024, 896),
    1.31: (1088, 832), 1.50: (1152, 768), 1.58: (1216, 768), 1.82: (1280, 704), 1.91: (1344, 704),
    2.20: (1408, 640), 2.30: (1472, 640), 2.67: (1536, 576), 2.89: (1664, 576), 3.62: (1856, 512),
    3.75: (1920, 512),
}  # fmt: skip
BUCKETS = {"480p": BUCKETS_480P, "720p": BUCKETS_720P}

Box = tuple[float, float, float, float]
"""Left, top, right and bottom as fractions of the picture's width and height, from its top left corner."""


def nearest_bucket(height: int, width: int, buckets: dict[float, tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) whose aspect ratio is nearest to that of a `height` x `width` picture; the first on a tie."""
    ratio = height / width
    return buckets[min(buckets, key=lambda candidate: abs(candidate - ratio))]


def output_size(size: str, height: int, width: int) -> tuple[int, int]:
    """The (height, width) of the video for a picture of `height` x `width` pixels.

    `size` is "480p" or "720p" (the bucket nearest in aspect ratio) or "WIDTHxHEIGHT" in multiples of 16 pixels.
    Raises InputError("size") for anything else.
    """
    if size in BUCKETS:
        return nearest_bucket(height, width, BUCKETS[size])
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if match is None:
        raise InputError("size", f"size is {size!r}; use '480p', '720p' or WIDTHxHEIGHT such as '832x480'.")
    out_width, out_height = int(match[1]), int(match[2])
    if out_width < 16 or out_height < 16 or out_width % SPATIAL_STRIDE or out_height % SPATIAL_STRIDE:
        raise InputError("size", f"size is {size!r}; width and height must be multiples of {SPATIAL_STRIDE} pixels.")
    return out_height, out_width


def cover(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """How a picture is scaled to cover a target, both (height, width): scaled height and width, top and left to cut.

    Rounding up in floating point now and then gives one row or column too many; the published model saw it so.
    """
    scale = max(target[0] / source[0], target[1] / source[1])
    height, width = math.ceil(scale * source[0]), math.ceil(scale * source[1])
    return height, width, round((height - target[0]) / 2), round((width - target[1]) / 2)


def resize_and_crop(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale a picture until it covers `height` x `width`, then cut that out of its middle.

    picture: uint8 [h, w, 3] → float32 [3, height, width] in [-1, 1]. Bilinear with antialiasing, as Pillow does it.
    """
    scaled_height, scaled_width, top, left = cover((picture.shape[0], picture.shape[1]), (height, width))
    scaled = Image.fromarray(picture).resize((scaled_width, scaled_height), Image.Resampling.BILINEAR)
    cropped = np.asarray(scaled)[top : top + height, left : left + width]
    return (cropped.transpose(2, 0, 1).astype(np.float32) / 255 - 0.5) * 2


def speaker_regions(boxes: Sequence[Box | None], source: tuple[int, int], target: tuple[int, int]) -> np.ndarray:
    """Which of the transformer's tokens show each of two speakers.

    boxes: where each speaker is in the picture, None for the half that is theirs by default; source: the picture's
    (height, width); target: the video's → bool [2, target height / 16, target width / 16]. A token belongs to a box
    if the source pixel at the token's top left corner does, as published. Raises InputError("speakers") for a box that
    is not in the picture, or leaves its speaker no token of their own.
    """
    rows, columns = source_pixels(source, target)
    regions = np.zeros((len(boxes), len(rows), len(columns)), bool)
    for speaker, box in enumerate(boxes):
        first_row, first_column, last_row, last_column = _pixels(speaker, box, source)
        inside_rows = (rows >= first_row) & (rows < last_row)
        inside_columns = (columns >= first_column) & (columns < last_column)
        regions[speaker] = inside_rows[:, None] & inside_columns
    for speaker, box in enumerate(boxes):
        if not regions[speaker].any():
            problem = "shows nothing of the video: it is too small, or cut off where the picture is fitted to its size"
            raise InputError("speakers", f"the box of speaker {speaker + 1}, {_text(box)}, {problem}; enlarge it.")
    for speaker, other in ((0, 1), (1, 0)):
        if not (regions[speaker] & ~regions[other]).any():
            problem = f"lies wholly within that of speaker {other + 1}, {_text(boxes[other])}; move them apart"
            raise InputError("speakers", f"the box of speaker {speaker + 1}, {_text(boxes[speaker])}, {problem}.")
    return regions


def source_pixels(
    source: tuple[int, int], target: tuple[int, int], stride: int = SPATIAL_STRIDE
) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of a picture that every `stride`-th row and column of its fitted form come from.

    Rounded down, and in float32, as torch's "nearest" does.
    """
    height, width, top, left = cover(source, target)
    rows = np.arange(top, top + target[0], stride, dtype=np.float32) * np.float32(source[0] / height)
    columns = np.arange(left, left + target[1], stride, dtype=np.float32) * np.float32(source[1] / width)
    return np.minimum(rows, source[0] - 1).astype(int), np.minimum(columns, source[1] - 1).astype(int)


def _pixels(speaker: int, box: Box | None, source: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box in source pixels: first row, first column, last row, last column (the last two exclusive)."""
    height, width = source
    if box is None:  # the speaker's half of the picture, but for a margin of 5 % on each side
        half = width // 2
        start = speaker * half
        return int(0.05 * height), start + int(0.05 * half), int(0.95 * height), start + int(0.95 * half)
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        wanted = (
            "give [left, top, right, bottom] as fractions of the picture, each from 0 to 1, left < right, top < bottom"
        )
        raise InputError("speakers", f"the box of speaker {speaker + 1} is {_text(box)}; {wanted}.")
    return round(top * height), round(left * width), round(bottom * height), round(right * width)


def _text(box: Box | None) -> str:
    return "the default half" if box is None else str([round(side, 4) for side in box])
