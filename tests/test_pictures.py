"""What cameras, phones and drawing programs save becomes the RGB picture that a person would see, or is refused."""

import io
import struct
import time
import warnings
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from avatar_api.media import read_picture
from infinitetalk.errors import InputError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
LOSSLESS = {"webp": {"lossless": True}}


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **{**LOSSLESS.get(path.suffix[1:], {}), **options})  # type: ignore[arg-type]
    return path


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def encoded_png(pixels: NDArray[np.uint16], pixel_format: str) -> bytes:
    """A PNG of 16-bit channels, which Pillow cannot write."""
    encoder = av.CodecContext.create("png", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.height, encoder.width = pixels.shape[:2]
    encoder.pix_fmt, encoder.framerate = pixel_format, 1  # type: ignore[assignment]
    frame = av.VideoFrame.from_ndarray(pixels, pixel_format)
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size; there are next to no pixels behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def refusal(path: Path, code: str) -> str:
    """Why the picture is refused. Every message names the input and the file, and no folder of the server."""
    with pytest.raises(InputError) as refused:
        read_picture(path, "portrait")
    message = str(refused.value)
    assert (refused.value.param, refused.value.code) == ("portrait", code)
    assert message.startswith(f"portrait: '{path.name}' ")
    assert str(path.parent) not in message
    return message


@pytest.mark.parametrize("name", ["picture.png", "picture.webp"])
def test_lossless_pictures_keep_every_pixel(tmp_path: Path, name: str) -> None:
    pixels = read_picture(saved(noise(), tmp_path / name))
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, noise())


@pytest.mark.parametrize("name", ["picture.jpg", "picture.webp"])
@pytest.mark.parametrize("color", [RED, GREEN, BLUE, (200, 30, 90)])
def test_lossy_pictures_keep_their_colors(tmp_path: Path, name: str, color: tuple[int, int, int]) -> None:
    pixels = read_picture(saved(Image.new("RGB", (64, 48), color), tmp_path / name, lossless=False))
    assert pixels.shape == (48, 64, 3)
    assert np.abs(pixels - np.array(color)).max() <= 4


def test_the_content_decides_not_the_extension(tmp_path: Path) -> None:
    path = saved(noise(), tmp_path / "picture.png").rename(tmp_path / "picture.txt")
    np.testing.assert_array_equal(read_picture(path), noise())


# From the EXIF standard: the side of the upright picture on which the stored first row and first column lie.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}
OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}


def corner(pixels: NDArray[np.uint8], one: str, other: str) -> tuple[int, ...]:
    return tuple(pixels[-1 if "bottom" in (one, other) else 0, -1 if "right" in (one, other) else 0].tolist())


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("name", ["phone.png", "phone.webp", "phone.jpg"])
def test_phones_photographs_come_upright(tmp_path: Path, name: str, orientation: int) -> None:
    stored = Image.new("RGB", (64, 32), "white")
    stored.paste(RED, (0, 0, 16, 16))
    stored.paste(GREEN, (48, 0, 64, 16))  # the other end of the first row
    stored.paste(BLUE, (0, 16, 16, 32))  # the other end of the first column
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = read_picture(saved(stored, tmp_path / name, exif=exif))

    row, column = SIDES[orientation]
    assert pixels.shape == ((32, 64, 3) if row in ("top", "bottom") else (64, 32, 3))
    assert corner(pixels, row, column) == pytest.approx(RED, abs=4)
    assert corner(pixels, row, OPPOSITE[column]) == pytest.approx(GREEN, abs=4)
    assert corner(pixels, OPPOSITE[row], column) == pytest.approx(BLUE, abs=4)


@pytest.mark.parametrize("name", ["camera.png", "camera.webp", "camera.jpg"])
def test_exif_that_cannot_be_read_turns_nothing(tmp_path: Path, name: str) -> None:
    path = saved(noise(), tmp_path / name, exif=b"Exif\0\0what the camera left here")
    assert read_picture(path).shape == (48, 64, 3)


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    layers = Image.new("RGBA", (48, 16), (255, 0, 0, 255))
    layers.paste((255, 0, 0, 128), (16, 0, 32, 16))
    layers.paste((255, 0, 0, 0), (32, 0, 48, 16))
    for name in ("layers.png", "layers.webp"):
        pixels = read_picture(saved(layers, tmp_path / name, exact=True))
        np.testing.assert_allclose(pixels[8, [8, 24, 40]], [RED, (255, 127, 127), WHITE], atol=1)


def test_grey_with_transparency_is_laid_over_white(tmp_path: Path) -> None:
    pixels = read_picture(saved(Image.new("LA", (16, 16), (0, 64)), tmp_path / "grey.png"))
    np.testing.assert_allclose(pixels, 191, atol=1)


def test_palettes_become_colors_and_their_transparent_entry_white(tmp_path: Path) -> None:
    palette = Image.new("P", (32, 16), 0)
    palette.putpalette([*RED, *GREEN])
    palette.paste(1, (16, 0, 32, 16))
    opaque = read_picture(saved(palette, tmp_path / "opaque.png"))
    np.testing.assert_array_equal(opaque[8, [8, 24]], [RED, GREEN])
    keyed = read_picture(saved(palette, tmp_path / "keyed.png", transparency=1))
    np.testing.assert_array_equal(keyed[8, [8, 24]], [RED, WHITE])


@pytest.mark.parametrize(("mode", "grey"), [("L", 100), ("1", 255)])
def test_grey_and_black_and_white_pictures_become_rgb(tmp_path: Path, mode: str, grey: int) -> None:
    pixels = read_picture(saved(Image.new(mode, (32, 16), grey), tmp_path / "grey.png"))
    assert pixels.shape == (16, 32, 3)
    assert (pixels == grey).all()


@pytest.mark.parametrize(("pixel_format", "channels"), [("gray16be", 1), ("rgb48be", 3), ("rgba64be", 4)])
def test_16_bit_channels_are_scaled_not_clipped(tmp_path: Path, pixel_format: str, channels: int) -> None:
    ramp = np.arange(256, dtype=np.uint16)[None, :, None].repeat(16, 0).repeat(channels, 2) * 257
    if channels == 4:
        ramp[..., 3] = 65535
    path = tmp_path / "scan.png"
    path.write_bytes(encoded_png(ramp[..., 0] if channels == 1 else ramp, pixel_format))
    with Image.open(path) as image:
        assert image.mode == {1: "I;16", 3: "RGB", 4: "RGBA"}[channels]
    pixels = read_picture(path)
    np.testing.assert_array_equal(pixels[3], np.arange(256)[:, None].repeat(3, 1))


@pytest.mark.parametrize("color", [RED, GREEN, BLUE, WHITE, (0, 0, 0)])
def test_cmyk_jpegs_keep_their_colors(tmp_path: Path, color: tuple[int, int, int]) -> None:
    print_ready = Image.new("RGB", (32, 32), color).convert("CMYK")
    pixels = read_picture(saved(print_ready, tmp_path / "print.jpg"))
    assert np.abs(pixels - np.array(color)).max() <= 4


def test_color_profiles_are_ignored(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    np.testing.assert_array_equal(read_picture(saved(noise(), tmp_path / "icc.png", icc_profile=profile)), noise())


@pytest.mark.parametrize(("name", "format"), [("film.png", "PNG"), ("film.webp", "WEBP"), ("film.jpg", "MPO")])
def test_animations_and_multiple_pictures_give_the_first(tmp_path: Path, name: str, format: str) -> None:
    red, blue = Image.new("RGB", (32, 32), RED), Image.new("RGB", (32, 32), BLUE)
    path = saved(red, tmp_path / name, format=format, save_all=True, append_images=[blue], duration=100)
    with Image.open(path) as image:
        assert image.n_frames == 2  # type: ignore[attr-defined]
    assert np.abs(read_picture(path) - np.array(RED)).max() <= 4


def test_50_megapixels_are_read(tmp_path: Path) -> None:
    assert read_picture(saved(Image.new("1", (10_000, 5_000)), tmp_path / "poster.png")).shape == (5_000, 10_000, 3)


@pytest.mark.parametrize(("width", "height"), [(10_000, 5_001), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_more_are_refused_before_anything_is_decoded(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of_size(width, height))
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = refusal(tmp_path / "bomb.png", "too_large")
    assert f"{width}x{height}, {width * height:,} pixels; the limit is 50,000,000" in message
    assert time.process_time() - start < 0.5


def test_sides_have_at_least_16_pixels(tmp_path: Path) -> None:
    assert read_picture(saved(noise(16, 16), tmp_path / "smallest.png")).shape == (16, 16, 3)
    assert "15x400 pixels; each side needs at least 16" in refusal(
        saved(noise(15, 400), tmp_path / "a.png"), "too_small"
    )


def test_missing_files_folders_and_empty_files_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere.png", "not_found")
    (tmp_path / "folder.png").mkdir()
    assert "is not a file" in refusal(tmp_path / "folder.png", "not_a_file")
    (tmp_path / "empty.png").touch()
    assert "is empty (0 bytes)" in refusal(tmp_path / "empty.png", "empty_file")


@pytest.mark.parametrize(
    ("start", "looks_like"),
    [
        (b"<!DOCTYPE html><html>404</html>", "text"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "an MP4 video"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC picture"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "an AVIF picture"),
        (b"%PDF-1.7\n%\xc7\xec\x8f\xa2", "a PDF document"),
        (bytes(range(64)), "none of the formats known here"),
    ],
    ids=["text", "MP4", "HEIC", "AVIF", "PDF", "unknown"],
)
def test_other_files_are_refused_with_what_they_look_like(tmp_path: Path, start: bytes, looks_like: str) -> None:
    (tmp_path / "file.png").write_bytes(start)
    message = refusal(tmp_path / "file.png", "unsupported_format")
    assert f"looks like {looks_like}; send a PNG, JPEG or WebP picture" in message


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_other_picture_formats_are_refused(tmp_path: Path, format: str) -> None:
    path = saved(noise(), tmp_path / "file.png", format=format)
    assert f"looks like a {format} picture" in refusal(path, "unsupported_format")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.95])
def test_pictures_cut_off_are_refused_not_half_grey(tmp_path: Path, format: str, kept: float) -> None:
    buffer = io.BytesIO()
    noise().save(buffer, format)
    (tmp_path / "cut").write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * kept)])
    assert "cut off or damaged" in refusal(tmp_path / "cut", "damaged_file")
