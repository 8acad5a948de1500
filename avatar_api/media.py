"""Media files that come in: pictures and voices.

Pictures go through Pillow. Voices go through libsndfile where it knows the format and FFmpeg (PyAV) where it does not,
as the reference model's loader does. Whatever is wrong with a caller's file ends in an `InputError` naming the input,
the file and the remedy; docs/MEDIA.md lists every case.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np
import soundfile
import soxr
from av import AudioFrame, AudioStream, Packet, VideoStream
from av.container import InputContainer
from numpy.typing import NDArray
from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from infinitetalk.errors import InputError
from infinitetalk.timeline import FRAMES_PER_SECOND, SAMPLE_RATE

MAX_PIXELS = 50_000_000
MIN_SIDE = 16  # pixels

SHORTEST_VOICE = SAMPLE_RATE // FRAMES_PER_SECOND  # samples: one frame of video
SOURCE_RATES = (1_000, 1_000_000)  # Hz: below, a small file would swell to days of voice; above, nothing records speech
LOUDEST_SAMPLE = 2.0**32  # full scale is 1.0; floats holding 32-bit integers pass, NaN, infinity and garbage do not
BLOCK_VALUES = 2**17  # samples times channels decoded at a time

# All that FFmpeg may open: the file it is handed, as a container that holds its sound and pictures itself. Playlists
# (HLS, DASH, concat, SDP, …) would let an uploaded file name other files and addresses. Opening decodes a few pictures,
# but no larger ones.
FFMPEG_LIMITS = {
    "protocol_whitelist": "fd",
    "format_whitelist": "mov,matroska,ogg,mp3,aac,wav,flac,aiff,caf,amr,asf,avi,flv,mpegts,mpeg",
    "max_pixels": str(MAX_PIXELS),
}

_Samples = NDArray[np.float32]
_Pixels = NDArray[np.uint8]
_Stream = TypeVar("_Stream", AudioStream, VideoStream)

_PICTURES: dict[str, Callable[[FileIO], Image.Image]] = {
    "a PNG picture": PngImagePlugin.PngImageFile,
    "a JPEG picture": JpegImagePlugin.JpegImageFile,
    "a WebP picture": WebPImagePlugin.WebPImageFile,
}
_TURNS = {  # by EXIF orientation: what brings the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIGNATURES = [  # offset, bytes there, what the file is
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (8, b"WEBP", "a WebP picture"),
    (0, b"GIF8", "a GIF picture"),
    (0, b"BM", "a BMP picture"),
    (0, b"II*\0", "a TIFF picture"),
    (0, b"MM\0*", "a TIFF picture"),
    (4, b"ftypavif", "an AVIF picture"),
    (4, b"ftyphe", "a HEIC picture"),
    (4, b"ftypmif1", "a HEIC picture"),
    (4, b"ftyp", "an MP4 video"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (8, b"AVI ", "an AVI video"),
    (8, b"WAVE", "a WAV sound"),
    (0, b"fLaC", "a FLAC sound"),
    (0, b"OggS", "an OGG sound"),
    (0, b"ID3", "an MP3 sound"),
    (0, b"\xff\xfb", "an MP3 sound"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a ZIP archive"),
]


def read_picture(path: Path, param: str = "input_reference") -> _Pixels:
    """Read a PNG, JPEG or WebP picture: uint8 [height, width, 3] RGB, upright, transparency over white.

    Animations give their first frame, 16-bit channels their upper 8 bits; colour profiles are ignored. Raises
    `InputError` for anything else, for damaged files, sides under 16 pixels and more than 50 megapixels (judged from
    the header, before decoding).
    """
    with open_file(path, param) as file:
        kind = looks_like(file)
        if kind not in _PICTURES:
            raise refused(path, param, f"looks like {kind}; send a PNG, JPEG or WebP picture")
        try:
            # Not Image.open: its own size check would warn or raise before ours could name the size.
            image = _PICTURES[kind](file)
            check_size(image.size, path, param)
            image.load()
            return _rgb(image)
        except (InputError, MemoryError):
            raise
        except Exception as error:  # Pillow raises nearly any type on damaged data
            problem = f"looks like {kind}, cut off or damaged ({error}); send a whole one"
            raise refused(path, param, problem, "damaged_file") from error


def check_size(size: tuple[int, int], path: Path, param: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        problem = f"is {width}x{height}, {width * height:,} pixels; the limit is {MAX_PIXELS:,}: scale it down"
        raise refused(path, param, problem, "too_large")
    if min(width, height) < MIN_SIDE:
        problem = f"is {width}x{height} pixels; each side needs at least {MIN_SIDE}: send a larger one"
        raise refused(path, param, problem, "too_small")


def _rgb(image: Image.Image) -> _Pixels:
    # Not ImageOps.exif_transpose: it also rewrites the EXIF, and fails where cameras were careless.
    with contextlib.suppress(SyntaxError):  # EXIF that cannot be read turns nothing
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255, not scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.array(over_white(image) if image.has_transparency_data else image.convert("RGB"))


def over_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def read_voice(path: Path, param: str = "audio", max_seconds: float | None = None) -> _Samples:
    """Read a sound file, or the sound of a video: float32 [samples], mono, 16 kHz, full scale at ±1, as recorded.

    Equal to librosa.load(path, sr=16000), the reference model's loader: the mean of the channels, resampled by soxr at
    quality HQ, ceil(samples * 16000 / rate) long. A voice longer than `max_seconds` ends there; a file cut off in the
    middle plays as far as it goes. Memory is that of the result. Raises `InputError` for files that hold no readable
    sound, less than 0.04 s of it, or samples that are not numbers.
    """
    longest = None if max_seconds is None else round(max_seconds * SAMPLE_RATE)
    rate, _, blocks = open_sound(path, param)
    resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", "HQ")
    voice = bytearray()  # grows in place; arrays would be there twice while they are joined
    heard = 0
    for block in blocks:
        voice += resampler.resample_chunk(block.mean(axis=1)).data
        heard += len(block)
        if longest is not None and len(voice) >= longest * 4:
            break
    voice += resampler.resample_chunk(np.empty(0, np.float32), last=True).data

    samples = math.ceil(heard * SAMPLE_RATE / rate)
    if samples < SHORTEST_VOICE:
        lasts = f"lasts {samples / SAMPLE_RATE:.3f} s as far as it can be read"
        raise refused(path, param, f"{lasts}; a voice needs at least {1 / FRAMES_PER_SECOND} s", "too_short")
    if longest is not None:
        samples = min(samples, longest)
    del voice[samples * 4 :]
    voice.extend(bytes(samples * 4 - len(voice)))
    return np.frombuffer(voice, np.float32)


class Sound(NamedTuple):
    """A sound file that is being read."""

    rate: int  # Hz
    channels: int
    blocks: Iterator[_Samples]  # float32 [samples, channels], as they are decoded; at least one


def open_sound(path: Path, param: str) -> Sound:
    blocks = _checked_blocks(path, param)
    rate, first = next(blocks)
    return Sound(rate, first.shape[1], chain([first], (block for _, block in blocks)))


def _checked_blocks(path: Path, param: str) -> Iterator[tuple[int, _Samples]]:
    empty = True
    with open_file(path, param) as file:
        for rate, block in _decoded_blocks(file, path, param):
            low, high = SOURCE_RATES
            if not low <= rate <= high:
                raise refused(path, param, f"has a sample rate of {rate} Hz; send one from {low} to {high} Hz")
            if not (np.abs(block) <= LOUDEST_SAMPLE).all():
                problem = "holds samples that are infinite or not numbers; export it again"
                raise refused(path, param, problem, "damaged_file")
            if len(block):
                empty = False
                yield rate, block
    if empty:
        raise refused(path, param, "holds no sound that can be read; send a whole file", "damaged_file")


def _decoded_blocks(file: FileIO, path: Path, param: str) -> Iterator[tuple[int, _Samples]]:
    try:
        # By descriptor: from a name, soundfile takes the format off the extension.
        sound = soundfile.SoundFile(file.fileno(), closefd=False)
    except soundfile.LibsndfileError:
        return _ffmpeg_blocks(file, path, param)
    if not sound.frames:  # a recorder that was killed leaves a length of 0 in the header; FFmpeg reads on regardless
        return _ffmpeg_blocks(file, path, param)
    return _libsndfile_blocks(sound)


def _libsndfile_blocks(sound: soundfile.SoundFile) -> Iterator[tuple[int, _Samples]]:
    with sound:
        while True:
            start = sound.tell()
            block = np.empty((_block_length(sound.channels), sound.channels), np.float32)
            try:
                block = sound.read(out=block)
            except soundfile.LibsndfileError:  # cut off or damaged from here on: keep what came before
                yield sound.samplerate, block[: max(0, sound.tell() - start)]
                return
            if not len(block):
                return
            yield sound.samplerate, block


def _ffmpeg_blocks(file: FileIO, path: Path, param: str) -> Iterator[tuple[int, _Samples]]:
    voice = "a whole WAV, MP3, FLAC, M4A or OGG file, or a video with sound"
    try:
        container = open_container(file)
    except av.FFmpegError as error:
        problem = f"looks like {looks_like(file)}, and no sound can be read from it"
        raise refused(path, param, f"{problem}; send {voice}") from error
    with container:
        stream = container.streams.best("audio")
        if not isinstance(stream, AudioStream):
            raise refused(path, param, f"has no sound; send a voice: {voice}", "no_sound")
        for frame in _one_format(_decoded(container, stream)):
            yield frame.sample_rate, samples(frame).reshape(frame.samples, -1)


def open_container(file: FileIO) -> InputContainer:
    """Open what FFmpeg may open, else av.FFmpegError. Reading moves the position in `file`, which must stay open."""
    file.seek(0)
    return av.open("fd:", "r", options=FFMPEG_LIMITS | {"fd": str(file.fileno())}, metadata_errors="replace")


def packets(container: InputContainer, stream: _Stream) -> "Iterator[Packet[_Stream]]":
    """All packets that can be read: at a damaged or missing end they end."""
    # IndexError: PyAV's end of a file that gains a stream
    with contextlib.suppress(IndexError, av.FFmpegError):
        yield from container.demux(stream)


def _decoded(container: InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
    """Decode all that can be: a damaged packet is left out."""
    for packet in packets(container, stream):
        with damage_left_out():
            yield from packet.decode()


@contextlib.contextmanager
def damage_left_out() -> Iterator[None]:
    """What cannot be decoded is passed over, but for want of memory: that would be silence where there is sound."""
    try:
        yield
    except MemoryError:
        raise
    except av.FFmpegError:
        pass


def _one_format(frames: Iterator[AudioFrame]) -> Iterator[AudioFrame]:
    """Interleaved float32 in longer frames, all with the first one's rate and layout: joined files change them."""
    first = next(frames, None)
    if first is None:
        return
    target = ("flt", first.layout.name, first.sample_rate, _block_length(first.layout.nb_channels))
    resampler, known = av.AudioResampler(*target), _setup(first)
    for frame in chain([first], frames):
        if _setup(frame) != known:
            yield from _resampled(resampler, None)
            resampler, known = av.AudioResampler(*target), _setup(frame)
        yield from _resampled(resampler, frame)
    yield from _resampled(resampler, None)


def _setup(frame: AudioFrame) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _resampled(resampler: av.AudioResampler, frame: AudioFrame | None) -> list[AudioFrame]:
    try:
        return resampler.resample(frame)
    except av.FFmpegError:  # damage that decodes can claim channels that nothing converts: left out as well
        return []


def _block_length(channels: int) -> int:
    return max(1, BLOCK_VALUES // channels)


def samples(frame: AudioFrame) -> _Samples:
    return frame.to_ndarray().astype(np.float32, copy=False)


def open_file(path: Path, param: str) -> FileIO:
    if not path.exists():
        raise refused(path, param, "does not exist; check the path", "not_found")
    if not path.is_file():
        raise refused(path, param, "is not a file; name one file", "not_a_file")
    if not path.stat().st_size:
        raise refused(path, param, "is empty (0 bytes); send it again", "empty_file")
    return FileIO(path)  # unbuffered: libsndfile and FFmpeg seek in the same descriptor


def looks_like(file: FileIO) -> str:
    file.seek(0)
    start = file.read(64)
    file.seek(0)
    for offset, signature, name in _SIGNATURES:
        if start.startswith(signature, offset):
            return name
    if all(byte >= 32 or byte in b"\t\n\r" for byte in start):
        return "text"
    return "none of the formats known here"


def refused(path: Path, param: str, problem: str, code: str = "unsupported_format") -> InputError:
    return InputError(param, f"{param}: {path.name or '.'!r} {problem}.", code)
