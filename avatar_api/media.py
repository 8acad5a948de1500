"""Media files: a picture in, a voice in, a video out.

Pictures go through Pillow. Voices go through libsndfile where it knows the format and FFmpeg (PyAV) where it does not,
as the reference model's loader does. Videos are written by FFmpeg while the frames arrive. Whatever is wrong with a
caller's file ends in an `InputError` naming the input, the file and the remedy; docs/MEDIA.md lists every case.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from io import FileIO
from itertools import chain, repeat
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeVar, cast

import av
import numpy as np
import soundfile
import soxr
from av import AudioFrame, AudioStream, Packet, VideoFrame, VideoStream
from av.container import InputContainer
from av.video.frame import PictureType
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from numpy.typing import NDArray
from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from infinitetalk.errors import InputError

SAMPLE_RATE = 16000  # Hz: what wav2vec2 hears
FRAMES_PER_SECOND = 25

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

SOUND_RATE = 48000  # Hz: the AAC track of a video
SOUND_PER_FRAME = SOUND_RATE // FRAMES_PER_SECOND  # samples: 1920, exact, so the sound cannot drift from the picture
SOUND_BIT_RATE = {"mono": 128_000, "stereo": 192_000}  # bits/s
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}  # by channels; other numbers have no agreed places
# So that the same frames give the same bytes: x264's output depends on its number of threads, and its AVX-512 code does
# not always repeat its own (the encoder in PyAV 18.1, small frames). SSE4.2 repeats, is on every x86 server, and is as
# fast here.
ENCODER_THREADS = 4
ENCODER_OPTIONS = {"preset": "medium", "crf": "18", "profile": "high", "x264-params": "asm=SSE4.2"}

SHRINKING_TRIES = 5
CONTAINER_BITS = 6_000  # per second, of an MP4's index, about

REORDERED_FRAMES = 2  # at most so many frames does the preset's encoder decode before it shows the first

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
    rate, _, blocks = _open_sound(path, param)
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


class _Sound(NamedTuple):
    """A sound file that is being read."""

    rate: int  # Hz
    channels: int
    blocks: Iterator[_Samples]  # float32 [samples, channels], as they are decoded; at least one


def _open_sound(path: Path, param: str) -> _Sound:
    blocks = _checked_blocks(path, param)
    rate, first = next(blocks)
    return _Sound(rate, first.shape[1], chain([first], (block for _, block in blocks)))


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
            yield frame.sample_rate, _samples(frame).reshape(frame.samples, -1)


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


class VideoWriter:
    """Write an MP4 as its frames arrive: H.264 (BT.709, 25 fps) and, of `sound`, AAC at 48 kHz.

    A context manager. The video is written beside `path`, under a name ending in `.part`, and renamed when the `with`
    block ends well; otherwise it is removed. The sound is decoded as the frames arrive, at its own quality, mono as
    mono and anything else as stereo; it is cut, or continued in silence, to end with the picture. The same frames and
    sound give the same bytes.

    Several sounds are heard `together`, added sample by sample, or `in_turn`: the next begins where the 16 kHz voice of
    the one before, as `read_voice` gives it, ends.

    Frames are either written or, from silent videos that this class wrote, appended as they are encoded: a long video
    can be made piece by piece and joined at the end.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        sound: Path | Sequence[Path | None] | None,
        order: Literal["together", "in_turn"] = "together",
    ) -> None:
        """`width` and `height` in pixels, multiples of 16; `sound` as for `read_voice`, None for a silent film.

        Of several sounds, None is silence as long as the first that is there. Raises ValueError for another size.
        Entering raises `InputError` (param "audio", "audio_2", …) for a sound that cannot be read; leaving raises
        RuntimeError if no frame was written. A full disk is an OSError.
        """
        if min(width, height) < 16 or width % 16 or height % 16:
            raise ValueError(f"width and height must be multiples of 16, not {width}x{height}")
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._width, self._height = width, height
        self._sound_files = sound if isinstance(sound, Sequence) else [sound]
        self._order = order
        self._sound: Iterator[_Samples] | None = None
        self.frames = 0
        """How many are written so far."""

    def __enter__(self) -> Self:
        # An absolute path: FFmpeg would take "a:b.mp4" for protocol "a".
        self._container = av.open(str(self._part.absolute()), "w", format="mp4", options={"movflags": "+faststart"})
        self._rgb_to_yuv = VideoReformatter()
        self._encoder: VideoStream | None = None
        self._copied: VideoStream | None = None
        if any(self._sound_files):
            sounds = _open_sounds(self._sound_files)
            self._layout = "mono" if all(sound.channels == 1 for sound in sounds) else "stereo"
            self._sound = _sound_track(sounds, self._layout, self._order)
        return self

    def write(self, frames: _Pixels) -> None:
        """Encode `frames`, uint8 [n, height, width, 3] RGB, and as much sound; nothing is kept. Else ValueError."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (self._height, self._width, 3):
            expected = f"uint8 [n, {self._height}, {self._width}, 3]"
            raise ValueError(f"frames must be {expected}, not {frames.dtype} {list(frames.shape)}")
        if self._encoder is None:
            self._encoder = self._add_encoder()
            self._add_sound()
        for image in frames:
            picture = self._rgb_to_yuv.reformat(
                VideoFrame.from_ndarray(image, "rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            picture.pts = self.frames
            self._container.mux(self._encoder.encode(picture))
            self._end_frame()

    def append(self, video: Path) -> None:
        """Append the pictures of a silent video of the same size that a VideoWriter wrote, without encoding them again.

        It begins with a picture that needs no other and its last one refers to none beyond, so the pieces of a video
        join without a seam.
        """
        with av.open(
            str(video.absolute()), options={"protocol_whitelist": "file", "format_whitelist": "mov"}
        ) as source:
            pictures = source.streams.video[0]
            if self._copied is None:
                self._copied = self._container.add_stream_from_template(pictures)
                self._add_sound()
            per_frame = round(1 / (FRAMES_PER_SECOND * cast(Fraction, pictures.time_base)))
            shift = self.frames * per_frame
            for packet in source.demux(pictures):
                if packet.pts is None:  # the empty packet at the end
                    continue
                packet.pts += shift
                packet.dts = (self.frames - REORDERED_FRAMES) * per_frame
                packet.stream = self._copied
                self._container.mux(packet)
                self._end_frame()

    def _add_encoder(self) -> VideoStream:
        stream = self._container.add_stream(
            "libx264", rate=FRAMES_PER_SECOND, width=self._width, height=self._height, options=ENCODER_OPTIONS
        )
        encoder = stream.codec_context
        encoder.thread_count = ENCODER_THREADS
        encoder.color_primaries = ColorPrimaries.BT709
        encoder.color_trc = ColorTrc.BT709
        encoder.colorspace = Colorspace.ITU709
        encoder.color_range = ColorRange.MPEG
        return stream

    def _add_sound(self) -> None:
        if self._sound is not None:
            self._audio = self._container.add_stream(
                "aac", rate=SOUND_RATE, layout=self._layout, bit_rate=SOUND_BIT_RATE[self._layout]
            )

    def _end_frame(self) -> None:
        """Encode the sound of the frame that was just written."""
        if self._sound is not None:
            sound = AudioFrame.from_ndarray(next(self._sound), "fltp", self._layout)
            sound.sample_rate = SOUND_RATE
            sound.pts = self.frames * SOUND_PER_FRAME
            self._container.mux(self._audio.encode(sound))
        self.frames += 1

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error_type is None:
                self._finish()
        finally:
            with contextlib.suppress(av.FFmpegError):  # what matters was raised above
                self._container.close()
            self._part.unlink(missing_ok=True)
            self._sound = None  # and with it the open file

    def _finish(self) -> None:
        if not self.frames:
            raise RuntimeError(f"no frame was written to {self._path.name}")
        if self._encoder is not None:
            self._container.mux(self._encoder.encode(None))
        if self._sound is not None:
            self._container.mux(self._audio.encode(None))
        self._container.close()
        self._part.replace(self._path)


def shrink(video: Path, smaller: Path, max_bytes: int) -> None:
    """Encode a video that VideoWriter wrote again, with as many bits as `max_bytes` has; the sound stays as it is.

    Raises ValueError if it cannot be made that small.
    """
    draft = smaller.with_name(f"{smaller.name}.part")
    share = 1.0
    try:
        for _ in range(SHRINKING_TRIES):
            _encode_again(video, draft, share * max_bytes)
            size = draft.stat().st_size
            if size <= max_bytes:
                draft.replace(smaller)
                return
            share *= 0.97 * max_bytes / size  # the encoder only comes close to what it is asked for
    finally:
        draft.unlink(missing_ok=True)
    raise ValueError(f"{video.name} does not become smaller than {size} bytes; {max_bytes} were asked for.")


def _encode_again(video: Path, target: Path, size: float) -> None:
    """size: bytes that the file is to have, about."""
    with (
        av.open(str(video.absolute()), options={"protocol_whitelist": "file", "format_whitelist": "mov"}) as source,
        av.open(str(target.absolute()), "w", format="mp4", options={"movflags": "+faststart"}) as made,
    ):
        pictures = source.streams.video[0]
        sounds = source.streams.audio[:1]
        seconds = pictures.frames / FRAMES_PER_SECOND
        sound_bits = sum(sound.bit_rate or 0 for sound in sounds)
        rate = max(1000, round(size * 8 / seconds - sound_bits - CONTAINER_BITS))
        options = ENCODER_OPTIONS | {"maxrate": str(round(1.5 * rate)), "bufsize": str(2 * rate)}
        del options["crf"]
        encoder = made.add_stream(
            "libx264",
            rate=FRAMES_PER_SECOND,
            width=pictures.width,
            height=pictures.height,
            bit_rate=rate,
            options=options,
        )
        encoder.codec_context.thread_count = ENCODER_THREADS
        for name in ("color_primaries", "color_trc", "colorspace", "color_range"):
            setattr(encoder.codec_context, name, getattr(pictures.codec_context, name))
        copied = [made.add_stream_from_template(sound) for sound in sounds]
        for packet in source.demux(pictures, *sounds):
            if packet.stream is pictures:
                for picture in cast(list[VideoFrame], packet.decode()):
                    picture.pict_type = PictureType.NONE  # the encoder places its own key pictures
                    made.mux(encoder.encode(picture))
            elif packet.pts is not None:
                (packet.stream,) = copied
                made.mux(packet)
        made.mux(encoder.encode(None))


def _open_sounds(files: Sequence[Path | None]) -> list[_Sound]:
    there = [(file, f"audio_{number}" if number > 1 else "audio") for number, file in enumerate(files, 1) if file]
    opened = iter([_open_sound(*file) for file in there])
    return [next(opened) if file else _muted(_open_sound(*there[0])) for file in files]


def _muted(sound: _Sound) -> _Sound:
    return sound._replace(blocks=map(np.zeros_like, sound.blocks))


def _sound_track(sounds: list[_Sound], layout: str, order: str) -> Iterator[_Samples]:
    """Yield float32 [channels, 1920] at 48 kHz: the sound of one frame of video after another, and then silence."""
    tracks = [_at_sound_rate(sound, layout) for sound in sounds]
    if order == "in_turn":
        tracks = [chain.from_iterable(tracks)]
    silence = np.zeros((_channels(layout), SOUND_PER_FRAME), np.float32)
    tracks = [chain(_by_frames(track, silence), repeat(silence)) for track in tracks]
    if len(tracks) == 1:
        return tracks[0]
    return (np.clip(np.sum(pieces, axis=0), -1, 1) for pieces in zip(*tracks, strict=True))


def _at_sound_rate(sound: _Sound, layout: str) -> Iterator[_Samples]:
    """Yield float32 [channels, any number] at 48 kHz, exactly as long as the voice that the model hears."""
    resampler = av.AudioResampler("fltp", layout, SOUND_RATE, frame_size=SOUND_PER_FRAME)
    heard = made = 0
    for block in sound.blocks:
        heard += len(block)
        if block.shape[1] not in LAYOUTS or block.shape[1] < _channels(layout):
            block = block.mean(axis=1, keepdims=True).repeat(2, axis=1)
        frame = AudioFrame.from_ndarray(np.clip(block, -1, 1).reshape(1, -1), "flt", LAYOUTS[block.shape[1]])
        frame.sample_rate = sound.rate
        for piece in resampler.resample(frame):
            made += piece.samples
            yield _samples(piece)
    for piece in resampler.resample(None):
        made += piece.samples
        yield _samples(piece)
    length = math.ceil(heard * SAMPLE_RATE / sound.rate) * (SOUND_RATE // SAMPLE_RATE)
    yield np.zeros((_channels(layout), length - made), np.float32)  # the resampler rounds down


def _by_frames(pieces: Iterator[_Samples], silence: _Samples) -> Iterator[_Samples]:
    """The same sound in pieces of one frame of video each; silence fills the last."""
    rest = silence[:, :0]
    for piece in pieces:
        rest = np.concatenate([rest, piece], axis=1)
        while rest.shape[1] >= SOUND_PER_FRAME:
            yield rest[:, :SOUND_PER_FRAME]
            rest = rest[:, SOUND_PER_FRAME:]
    yield np.concatenate([rest, silence[:, rest.shape[1] :]], axis=1)


def _channels(layout: str) -> int:
    return 1 if layout == "mono" else 2


def _block_length(channels: int) -> int:
    return max(1, BLOCK_VALUES // channels)


def _samples(frame: AudioFrame) -> _Samples:
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
