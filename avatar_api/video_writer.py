"""The video that comes out: H.264 and AAC in an MP4, written as its frames arrive, joined of pieces, or made smaller.

The same frames and sound give the same bytes, whoever writes them.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain, repeat
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, cast

import av
import numpy as np
from av import AudioFrame, VideoFrame, VideoStream
from av.container import InputContainer
from av.video.frame import PictureType
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from numpy.typing import NDArray

from avatar_api.media import Sound, open_sound, samples
from infinitetalk.timeline import FRAMES_PER_SECOND, SAMPLE_RATE

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
        with open_written(video) as source:
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


def open_written(video: Path) -> InputContainer:
    """Open a video that VideoWriter wrote, to read it; a context manager. An absolute path, as in `__enter__`."""
    return av.open(str(video.absolute()), options={"protocol_whitelist": "file", "format_whitelist": "mov"})


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
        open_written(video) as source,
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


def _open_sounds(files: Sequence[Path | None]) -> list[Sound]:
    there = [(file, f"audio_{number}" if number > 1 else "audio") for number, file in enumerate(files, 1) if file]
    opened = iter([open_sound(*file) for file in there])
    return [next(opened) if file else _muted(open_sound(*there[0])) for file in files]


def _muted(sound: Sound) -> Sound:
    return sound._replace(blocks=map(np.zeros_like, sound.blocks))


def _sound_track(sounds: list[Sound], layout: str, order: str) -> Iterator[_Samples]:
    """Yield float32 [channels, 1920] at 48 kHz: the sound of one frame of video after another, and then silence."""
    tracks = [_at_sound_rate(sound, layout) for sound in sounds]
    if order == "in_turn":
        tracks = [chain.from_iterable(tracks)]
    silence = np.zeros((_channels(layout), SOUND_PER_FRAME), np.float32)
    tracks = [chain(_by_frames(track, silence), repeat(silence)) for track in tracks]
    if len(tracks) == 1:
        return tracks[0]
    return (np.clip(np.sum(pieces, axis=0), -1, 1) for pieces in zip(*tracks, strict=True))


def _at_sound_rate(sound: Sound, layout: str) -> Iterator[_Samples]:
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
            yield samples(piece)
    for piece in resampler.resample(None):
        made += piece.samples
        yield samples(piece)
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
