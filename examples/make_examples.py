"""Make the examples' media again: the pictures are drawn here, the voices are spoken by espeak-ng.

    python examples/make_examples.py

Needs the project's environment, and espeak-ng on the path (apt-get install espeak-ng).
"""

import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from avatar_api.video_writer import VideoWriter

HERE = Path(__file__).parent
SENTENCE = "Hello! A picture and a voice go in, and a talking video comes out."
ANSWER = "And two voices make two people talk."

SIZE = 768
SCALE = 4  # everything is drawn this much larger and scaled down at the end: smooth edges
MIDDLE = SIZE / 2

Point = tuple[float, float]
Colour = tuple[int, int, int]
Line = Sequence[Point]
Lock = tuple[Line, Line]


class Look(NamedTuple):
    """The colours of a person."""

    skin: Colour = (232, 184, 155)
    skin_light: Colour = (250, 217, 192)
    skin_shade: Colour = (196, 132, 104)
    skin_deep: Colour = (140, 80, 62)
    blush: Colour = (226, 118, 104)
    lip: Colour = (196, 92, 88)
    lip_light: Colour = (232, 148, 138)
    lip_dark: Colour = (132, 48, 50)
    hair: Colour = (74, 46, 34)
    hair_light: Colour = (142, 92, 60)
    hair_dark: Colour = (38, 22, 18)
    knit: Colour = (38, 104, 112)
    knit_light: Colour = (82, 152, 154)
    knit_dark: Colour = (18, 62, 72)
    iris: Colour = (92, 62, 36)
    iris_light: Colour = (176, 122, 66)


FIRST = Look()
SECOND = Look(
    skin=(176, 122, 90),
    skin_light=(208, 158, 124),
    skin_shade=(134, 84, 58),
    skin_deep=(86, 48, 34),
    blush=(168, 84, 66),
    lip=(150, 66, 62),
    lip_light=(190, 108, 98),
    lip_dark=(92, 34, 34),
    hair=(36, 30, 32),
    hair_light=(84, 76, 82),
    hair_dark=(16, 12, 14),
    knit=(176, 116, 40),
    knit_light=(218, 168, 92),
    knit_dark=(112, 66, 20),
    iris=(58, 38, 24),
    iris_light=(120, 80, 44),
)
INK = (34, 20, 18)


# Drawing: a mask says where and how strongly, `paint` puts a colour there.


def spline(points: Line, closed: bool = True) -> list[Point]:
    """A smooth curve through the points (Catmull-Rom), 16 steps from each to the next."""

    def between(a: float, b: float, c: float, d: float, t: float) -> float:
        return b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))

    around = [points[-1], *points, *points[:2]] if closed else [points[0], *points, points[-1]]
    curve = []
    for (ax, ay), (bx, by), (cx, cy), (dx, dy) in zip(around, around[1:], around[2:], around[3:], strict=False):
        curve += [(between(ax, bx, cx, dx, k / 16), between(ay, by, cy, dy, k / 16)) for k in range(16)]
    return curve if closed else [*curve, points[-1]]


def mirrored(points: Line) -> list[Point]:
    """The right half of an outline, from top to bottom, and the same on the left."""
    return [*points, *((2 * MIDDLE - x, y) for x, y in reversed(points) if x != MIDDLE)]


def blank() -> Image.Image:
    return Image.new("L", (SIZE * SCALE, SIZE * SCALE))


def soften(mask: Image.Image, blur: float) -> Image.Image:
    return mask.filter(ImageFilter.GaussianBlur(blur * SCALE)) if blur else mask


def area(points: Line, blur: float = 0) -> Image.Image:
    """The inside of a smooth outline."""
    mask = blank()
    ImageDraw.Draw(mask).polygon([(x * SCALE, y * SCALE) for x, y in spline(points)], fill=255)
    return soften(mask, blur)


def ellipse(x: float, y: float, width: float, height: float, blur: float = 0) -> Image.Image:
    """Around a centre; width and height are radii."""
    mask = blank()
    box = [(x - width) * SCALE, (y - height) * SCALE, (x + width) * SCALE, (y + height) * SCALE]
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return soften(mask, blur)


def stroke(points: Line, start: float, middle: float, end: float, blur: float = 0) -> Image.Image:
    """A smooth line whose width goes from `start` over `middle` to `end`."""
    mask = blank()
    draw = ImageDraw.Draw(mask)
    curve = spline(points, closed=False)
    dense = [
        (ax + (bx - ax) * k / 6, ay + (by - ay) * k / 6) for (ax, ay), (bx, by) in pairwise(curve) for k in range(6)
    ]
    for i, (x, y) in enumerate(dense):
        t = i / len(dense)
        width = start + (middle - start) * 2 * t if t < 0.5 else middle + (end - middle) * (2 * t - 1)
        radius = width / 2 * SCALE
        draw.ellipse([x * SCALE - radius, y * SCALE - radius, x * SCALE + radius, y * SCALE + radius], fill=255)
    return soften(mask, blur)


def paint(
    picture: Image.Image, colour: Colour, mask: Image.Image, strength: float = 1, inside: Image.Image | None = None
) -> None:
    """Put the colour where the mask is white, at most at that strength, and only inside the second mask."""
    if inside is not None:
        mask = ImageChops.multiply(mask, inside)
    if strength < 1:
        mask = mask.point(lambda value: round(value * strength))
    picture.paste(colour, mask=mask)


# The portrait, from back to front. Coordinates are pixels of the final picture.


def draw_background(picture: Image.Image) -> None:
    """An evening room out of focus: a gradient, a window's light, a few soft spots."""
    paint(picture, (206, 186, 168), Image.linear_gradient("L").resize(picture.size), 0.75)
    paint(picture, (250, 234, 210), ellipse(150, 190, 190, 240, blur=70), 0.8)
    paint(picture, (104, 130, 132), ellipse(690, 420, 170, 380, blur=80), 0.55)
    chance = random.Random(5)  # noqa: S311
    for _ in range(16):
        x, y, radius = chance.uniform(0, SIZE), chance.uniform(0, 620), chance.uniform(14, 44)
        glow = chance.choice([(255, 236, 200), (255, 214, 166), (214, 232, 228)])
        paint(picture, glow, ellipse(x, y, radius, radius, blur=5), chance.uniform(0.12, 0.3))


FACE = mirrored(
    [(384, 150), (446, 160), (490, 208), (505, 284), (502, 352), (487, 414), (460, 460), (424, 495), (384, 507)]
)
NECK = mirrored([(384, 430), (440, 440), (438, 520), (444, 566), (484, 592), (500, 640), (384, 680)])
BODY = mirrored(
    [(384, 600), (440, 592), (490, 590), (560, 612), (630, 642), (682, 690), (716, 768), (740, 880), (384, 920)]
)
# A lock of hair is what lies between two edges, both from the root to the tip. BACK and SIDE are also used mirrored.
BACK = (
    [(368, 112), (376, 200), (376, 330), (376, 440), (376, 540), (376, 628)],
    [(368, 91), (446, 97), (514, 146), (549, 256), (566, 420), (540, 606)],
)
SIDE = (
    [(500, 270), (508, 350), (504, 430), (494, 510), (482, 575), (472, 626)],
    [(536, 250), (553, 330), (564, 410), (570, 490), (563, 565), (540, 622)],
)
FRINGE_LEFT = (
    [(352, 176), (318, 204), (286, 250), (268, 304), (262, 360), (252, 420)],
    [(356, 97), (304, 114), (258, 164), (232, 236), (222, 316), (226, 396)],
)
FRINGE_RIGHT = (
    [(350, 176), (396, 196), (446, 214), (486, 246), (505, 304), (512, 420)],
    [(346, 97), (420, 99), (486, 128), (528, 196), (545, 286), (540, 396)],
)


def draw_lock(picture: Image.Image, look: Look, lock: Lock, strands: int, seed: int) -> Image.Image:
    """Fill the lock, then draw dark and light strands from root to tip, each a random share of the way across."""
    near, far = lock
    mask = area([*near, *far[::-1]], blur=0.7)
    paint(picture, look.hair, mask)
    chance = random.Random(seed)  # noqa: S311
    ends, dark, light = blank(), blank(), blank()
    for i in range(3 * strands):
        share = chance.random()
        line = [(ax + (bx - ax) * share, ay + (by - ay) * share) for (ax, ay), (bx, by) in zip(near, far, strict=True)]
        draw_strand(ImageDraw.Draw(dark if i % 3 else light), line, chance.randrange(40, 150), chance.randrange(2, 10))
        (ax, ay), (bx, by) = line[-2:]
        loose = chance.uniform(0.05, 0.2)  # beyond the tip, so that it does not look cut off
        beyond = (bx + (bx - ax) * loose, by + (by - ay) * loose)
        draw_strand(ImageDraw.Draw(ends), [line[-2], line[-1], beyond], 255, chance.randrange(2, 10))
    paint(picture, look.hair, soften(ends, 0.7), 0.8)
    paint(picture, look.hair_light, soften(light, 0.7), 0.7, mask)
    paint(picture, look.hair_dark, soften(dark, 0.7), 0.9, mask)
    return mask


def draw_strand(draw: ImageDraw.ImageDraw, line: Line, brightness: int, width: int) -> None:
    draw.line([(x * SCALE, y * SCALE) for x, y in spline(line, closed=False)], fill=brightness, width=width)


def flipped(lock: Lock) -> Lock:
    near, far = ([(2 * MIDDLE - x, y) for x, y in edge] for edge in lock)
    return near, far


def draw_hair_behind(picture: Image.Image, look: Look) -> None:
    for lock, seed in ((BACK, 1), (flipped(BACK), 2)):
        mask = draw_lock(picture, look, lock, 130, seed)
        paint(picture, look.hair_dark, ellipse(384, 520, 120, 150, blur=30), 0.9, mask)


def draw_hair_in_front(picture: Image.Image, look: Look) -> None:
    """With its shadows on the face and on the shoulders."""
    body, face = area(BODY), area(FACE)
    for side, lock in ((1, SIDE), (-1, flipped(SIDE))):
        near, far = lock
        paint(picture, look.knit_dark, area([(x + 5, y + 9) for x, y in [*near, *far[::-1]]], blur=9), 0.9, body)
        mask = draw_lock(picture, look, lock, 60, seed=3 + side)
        paint(picture, look.hair_dark, stroke(near, 10, 30, 24, blur=9), 0.8, mask)
        if side < 0:
            paint(picture, look.hair_light, stroke(far, 6, 22, 6, blur=9), 0.6, mask)
    for near, far in (FRINGE_LEFT, FRINGE_RIGHT):
        paint(picture, look.skin_deep, area([(x, y + 9) for x, y in [*near, *far[::-1]]], blur=8), 0.55, face)
    for lock, seed in ((FRINGE_LEFT, 6), (FRINGE_RIGHT, 7)):
        near, far = lock
        mask = draw_lock(picture, look, lock, 90, seed)
        paint(picture, look.hair_dark, stroke(near, 12, 8, 4, blur=5), 0.6, mask)
        shine = [((ax + 2 * bx) / 3, (ay + 2 * by) / 3) for (ax, ay), (bx, by) in zip(near, far, strict=True)]
        paint(
            picture, look.hair_light, stroke(shine[:4], 6, 30, 6, blur=10), 0.75 if lock is FRINGE_LEFT else 0.5, mask
        )


def draw_body(picture: Image.Image, look: Look) -> None:
    """Neck and a knitted jumper."""
    neck = area(NECK)
    paint(picture, look.skin, neck)
    paint(picture, look.skin_shade, ellipse(384, 478, 92, 62, blur=16), 0.95, neck)
    paint(picture, look.skin_deep, ellipse(384, 474, 74, 34, blur=14), 0.55, neck)
    paint(picture, look.skin_shade, ellipse(462, 560, 34, 90, blur=16), 0.7, neck)
    paint(picture, look.skin_light, ellipse(360, 570, 22, 30, blur=14), 0.5, neck)
    body = area(BODY)
    opening = area(mirrored([(384, 520), (450, 540), (484, 580), (452, 624), (384, 644)]))
    jumper = ImageChops.subtract(body, opening)
    paint(picture, look.knit, jumper)
    paint(picture, look.knit_dark, ellipse(600, 760, 120, 140, blur=50), 0.8, jumper)
    paint(picture, look.knit_dark, ellipse(384, 780, 200, 60, blur=50), 0.4, jumper)
    paint(picture, look.knit_light, ellipse(230, 660, 90, 44, blur=30), 0.7, jumper)
    for side in (-1, 1):
        fold = [(MIDDLE + side * x, y) for x, y in ((252, 660), (222, 716), (216, 790))]
        paint(picture, look.knit_dark, stroke(fold, 3, 9, 12, blur=5), 0.8, jumper)
    collar = [(276, 572), (300, 606), (336, 636), (384, 648), (432, 636), (468, 606), (492, 572)]
    paint(picture, look.knit_dark, stroke([(x, y + 12) for x, y in collar], 10, 14, 10, blur=5), 0.7, jumper)
    paint(picture, look.knit, stroke(collar, 20, 24, 20))
    paint(picture, look.knit_light, stroke([(x, y - 5) for x, y in collar], 3, 6, 3, blur=2), 0.7)
    shadow = stroke([(x, y - 15) for x, y in collar], 4, 8, 4, blur=4)
    paint(picture, look.skin_deep, shadow, 0.5, ImageChops.multiply(neck, opening))


def draw_face(picture: Image.Image, look: Look) -> None:
    """Skin, lit from the upper left."""
    face = area(FACE)
    paint(picture, look.skin, face)
    paint(picture, look.skin_shade, ImageChops.subtract(face, ellipse(366, 320, 116, 176, blur=26)), 0.7, face)
    paint(picture, look.skin_shade, ImageChops.subtract(face, ellipse(352, 316, 140, 200, blur=18)), 0.6, face)
    paint(picture, look.skin_light, ellipse(356, 236, 70, 40, blur=26), 0.85, face)
    paint(picture, look.skin_light, ellipse(312, 374, 30, 22, blur=14), 0.8, face)
    paint(picture, look.skin_light, ellipse(446, 376, 24, 18, blur=14), 0.5, face)
    paint(picture, look.skin_light, ellipse(380, 482, 22, 12, blur=9), 0.6, face)
    for x in (306, 462):
        paint(picture, look.blush, ellipse(x, 392, 32, 24, blur=17), 0.42, face)


def draw_eye(picture: Image.Image, look: Look, x: float, outward: int) -> None:
    """One eye; outward is -1 for the one on the left of the picture, 1 for the other."""

    def at(dx: float, dy: float) -> Point:
        return x + outward * dx, 322 + dy

    paint(picture, look.skin_shade, ellipse(x, 314, 40, 20, blur=9), 0.55)
    outline = [at(-31, 6), at(-18, -9), at(2, -15), at(20, -9), at(32, 2), at(20, 11), at(0, 14), at(-18, 11)]
    eye = area(outline)
    paint(picture, (250, 246, 240), eye)
    paint(picture, (206, 186, 176), ellipse(*at(-30, 4), 12, 14, blur=5), 0.8, eye)
    paint(picture, (206, 186, 176), ellipse(*at(30, 4), 12, 14, blur=5), 0.8, eye)
    paint(picture, INK, ellipse(x, 321, 16.5, 16.5, blur=0.6), 0.9, eye)
    paint(picture, look.iris, ellipse(x, 321, 14.6, 14.6, blur=1), 1, eye)
    paint(picture, look.iris_light, ellipse(x, 328, 10, 7, blur=3), 0.9, eye)
    paint(picture, INK, ellipse(x, 321, 6.8, 6.8, blur=0.5), 1, eye)
    shadow = stroke([at(-32, -2), at(-18, -14), at(2, -20), at(22, -13), at(36, -2)], 10, 12, 10, blur=4)
    paint(picture, INK, shadow, 0.45, eye)
    paint(picture, (255, 255, 255), ellipse(x - 5.5, 315, 4, 4.4, blur=0.5), 0.95)
    paint(picture, (255, 255, 255), ellipse(x + 6, 327, 2, 2, blur=0.7), 0.6)
    paint(picture, INK, stroke([at(-32, 6), at(-19, -9.5), at(2, -16), at(21, -10), at(37, -3)], 1.6, 5, 1.2, blur=0.4))
    crease = [at(-26, -8), at(-12, -20), at(6, -24.5), at(24, -19), at(37, -9)]
    paint(picture, look.skin_deep, stroke(crease, 0.8, 2.2, 0.8, blur=0.8), 0.7)
    paint(
        picture,
        look.skin_deep,
        stroke([at(-20, 12), at(0, 15.5), at(20, 12), at(31, 4)], 0.6, 1.6, 1.4, blur=0.7),
        0.65,
    )
    paint(picture, look.skin_shade, stroke([at(-24, 20), at(-4, 26), at(18, 23)], 1, 3, 1, blur=2.4), 0.5)
    brow = [at(-34, -36), at(-8, -45), at(18, -46), at(43, -31), at(18, -39), at(-8, -37.5), at(-34, -28.5)]
    paint(picture, look.hair, area(brow, blur=1.4), 0.85)


def draw_nose(picture: Image.Image, look: Look) -> None:
    paint(picture, look.skin_shade, stroke([(404, 330), (401, 362), (406, 392)], 5, 13, 10, blur=8), 0.6)
    paint(picture, look.skin_shade, stroke([(362, 322), (370, 350), (366, 372)], 3, 6, 3, blur=7), 0.35)
    paint(picture, look.skin_shade, ellipse(384, 412, 28, 9, blur=6), 0.7)
    paint(picture, look.skin_light, stroke([(380, 318), (379, 356), (380, 392)], 6, 9, 12, blur=5), 0.75)
    paint(picture, look.skin_light, ellipse(380, 393, 9, 7, blur=3.5), 0.9)
    for side in (-1, 1):
        nostril = [(MIDDLE + side * x, y) for x, y in ((8, 409), (14, 405.5), (20, 409))]
        wing = [(MIDDLE + side * x, y) for x, y in ((25, 393), (28.5, 402), (23, 411))]
        paint(picture, look.skin_deep, stroke(nostril, 1.4, 5, 1.6, blur=1.2), 0.8)
        paint(picture, look.skin_deep, stroke(wing, 0.8, 2.4, 1, blur=1.6), 0.5)


def draw_mouth(picture: Image.Image, look: Look) -> None:
    """Closed, with a hint of a smile."""
    paint(picture, look.skin_shade, ellipse(384, 470, 26, 6, blur=5), 0.7)
    paint(picture, look.skin_light, stroke([(384, 419), (384, 430)], 3, 5, 4, blur=3), 0.5)
    parting = [(334, 438), (352, 444), (368, 447), (384, 449), (400, 447), (416, 444), (434, 438)]
    upper = [(334, 438), (354, 436.5), (374, 433), (384, 435), (394, 433), (414, 436.5), (434, 438)]
    upper += [(410, 446.5), (384, 450), (358, 446.5)]
    lower = [(340, 441), (362, 447), (384, 449.5), (406, 447), (428, 441)]
    lower += [(414, 454), (397, 461.5), (384, 463), (371, 461.5), (354, 454)]
    lip = area(lower, blur=0.9)
    paint(picture, look.lip, lip, 0.9)
    paint(picture, look.lip_light, ellipse(380, 455, 20, 4.4, blur=3), 0.8, lip)
    paint(picture, look.lip, area(upper, blur=0.9), 0.95)
    paint(picture, look.lip_dark, area(upper, blur=0.9), 0.22)
    paint(picture, look.lip_dark, stroke(parting, 1.4, 2.4, 1.4, blur=0.6), 0.9)
    for side in (-1, 1):
        x = MIDDLE + side * 51
        paint(picture, look.skin_deep, ellipse(x, 437, 4, 3, blur=2), 0.6)
        dimple = [(x + side * 3, 428), (x + side * 7, 438), (x + side * 3, 449)]
        paint(picture, look.skin_shade, stroke(dimple, 1, 4, 1, blur=3), 0.6)


def draw_portrait(look: Look) -> Image.Image:
    """A woman looking at the camera, mouth closed: RGB, 768 x 768."""
    picture = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), (132, 150, 146))
    draw_background(picture)
    draw_hair_behind(picture, look)
    draw_body(picture, look)
    draw_face(picture, look)
    draw_eye(picture, look, 322, -1)
    draw_eye(picture, look, 446, 1)
    draw_nose(picture, look)
    draw_mouth(picture, look)
    draw_hair_in_front(picture, look)
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def draw_two_people() -> Image.Image:
    """Two women side by side: RGB, 896 x 448. The second is drawn mirrored, so that the backgrounds meet."""
    picture = Image.new("RGB", (2 * SIZE, SIZE))
    picture.paste(draw_portrait(FIRST))
    picture.paste(draw_portrait(SECOND).transpose(Image.Transpose.FLIP_LEFT_RIGHT), (SIZE, 0))
    return picture.resize((896, 448), Image.Resampling.LANCZOS)


def film(portrait: Image.Image, path: Path) -> None:
    """The camera comes slowly closer: a silent video of 2.4 seconds, 256 x 256."""
    with VideoWriter(path, 256, 256, sound=None) as writer:
        for margin in np.linspace(0, 48, 60):
            box = (margin, margin, SIZE - margin, SIZE - margin)
            closer = portrait.resize((256, 256), Image.Resampling.LANCZOS, box)
            writer.write(np.asarray(closer)[None])


# The voices.


def speak(path: Path, voice: str, pitch: int, sentence: str) -> None:
    """A sentence as a WAV file: 22050 Hz, mono, 16 bits; 170 words a minute, no pause at the end."""
    espeak = shutil.which("espeak-ng")
    if espeak is None:
        sys.exit("espeak-ng is not installed: apt-get install espeak-ng")
    how = ["-v", voice, "-s", "170", "-p", str(pitch), "-a", "100", "-z"]
    subprocess.run([espeak, *how, "-w", str(path), sentence], check=True)


if __name__ == "__main__":
    speak(HERE / "voice.wav", "en-us+f3", 46, SENTENCE)
    speak(HERE / "voice_2.wav", "en-us+f2", 30, ANSWER)
    portrait = draw_portrait(FIRST)
    portrait.save(HERE / "portrait.png", optimize=True)
    film(portrait, HERE / "portrait.mp4")
    draw_two_people().save(HERE / "two_people.jpg", quality=90)
