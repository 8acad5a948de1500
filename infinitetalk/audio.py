"""What the model hears: a 16 kHz voice becomes features of a speech encoder, 25 per second, one per video frame."""

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyloudnorm
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Wav2Vec2Model

from infinitetalk.timeline import FRAMES_PER_SECOND, SAMPLE_RATE

TARGET_LOUDNESS = -23.0
"""LUFS, the broadcast level of EBU R 128."""

WINDOW_FRAMES = 3000
"""A voice up to two minutes is encoded whole, exactly as published. A longer one is encoded two minutes at a time, so
that memory does not grow with its length (the encoder attends over everything it is given)."""
CONTEXT_FRAMES = 250
"""What such a window hears of its neighbours on either side, at least: ten seconds."""

_LOWEST_LOUDNESS = -100.0  # LUFS; below it a track counts as silent and is left as it is
_METER_SECONDS = 0.4  # gating block of ITU-R BS.1770; a shorter track has no loudness
_NORMALIZE_EPSILON = 1e-7


def normalize_loudness(voice: np.ndarray) -> np.ndarray:
    """Bring a voice to -23 LUFS (ITU-R BS.1770). float32 [samples] at 16 kHz → the same.

    Silence, and a voice shorter than the 0.4 s that the measure needs, come back unchanged.
    """
    if len(voice) <= _METER_SECONDS * SAMPLE_RATE:
        return voice
    loudness = pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(voice)
    if not abs(loudness) <= -_LOWEST_LOUDNESS:
        return voice
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "possible clipped samples": floats may exceed 1, nothing clips here
        normalized: np.ndarray = pyloudnorm.normalize.loudness(voice, loudness, TARGET_LOUDNESS)
    return normalized.astype(np.float32, copy=False)


def standardize(voice: np.ndarray) -> np.ndarray:
    """float32 [samples] → the same with mean 0 and variance 1 (Wav2Vec2FeatureExtractor with do_normalize)."""
    standard: np.ndarray = (voice - voice.mean()) / np.sqrt(voice.var() + _NORMALIZE_EPSILON)
    return standard.astype(np.float32, copy=False)


def arrange(voices: Sequence[np.ndarray | None], order: Literal["together", "in_turn"]) -> list[np.ndarray]:
    """Lay the voices of one conversation out in time: float32 [samples] each → the same, all of one length.

    Silence fills what a voice leaves: after it if they speak together, before or after it if they speak in turn. None
    is a speaker who stays silent, for as long as the other speaks.
    """
    length = max(len(voice) for voice in voices if voice is not None)
    tracks = [np.zeros(length, np.float32) if voice is None else voice for voice in voices]
    if order == "in_turn":
        ends = np.cumsum([len(track) for track in tracks])
        starts = [end - len(track) for end, track in zip(ends, tracks, strict=True)]
        length = int(ends[-1])
    else:
        starts = [0] * len(tracks)
    return [np.pad(track, (start, length - start - len(track))) for start, track in zip(starts, tracks, strict=True)]


def frame_count(samples: int) -> int:
    """Video frames in a voice of `samples` at 16 kHz.

    In floating point on purpose: 18560 samples are 28 frames here, where integers would say 29.
    """
    return int(samples / SAMPLE_RATE * FRAMES_PER_SECOND)


class VoiceFeatures:
    """The features of one voice, encoded as they are asked for; at most two windows are held.

    `len()` is the number of video frames. Precomputed features go straight into the pipeline instead.
    """

    def __init__(self, encoder: Wav2Vec2Model, voice: np.ndarray) -> None:
        """voice: float32 [samples] at 16 kHz, its loudness normalised."""
        self._samples = standardize(voice)
        self._encoder = encoder
        self._frames = frame_count(len(voice))
        self._windows: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self._frames

    def gather(self, frames: Sequence[Sequence[int]]) -> Tensor:
        """float32 [*shape of frames, layers, channels] for numbers of frames, on the encoder's device."""
        wanted = torch.tensor(frames)
        windows = wanted // WINDOW_FRAMES
        present = windows.unique().tolist()
        self._windows = {number: window for number, window in self._windows.items() if number in present}
        for number in present:
            if number not in self._windows:
                self._windows[number] = self._encode_window(number)
        example = self._windows[present[0]]
        features = example.new_empty(*wanted.shape, *example.shape[1:])
        for number in present:
            inside = windows == number
            features[inside.to(features.device)] = self._windows[number][wanted[inside] - number * WINDOW_FRAMES]
        return features

    def _encode_window(self, number: int) -> Tensor:
        """float32 [frames of the window, layers, channels]."""
        first, last = number * WINDOW_FRAMES, min((number + 1) * WINDOW_FRAMES, self._frames)
        # Always as much: windows of one size use each other's memory again, and the outer ones hear more.
        span = WINDOW_FRAMES + 2 * CONTEXT_FRAMES
        heard_first = max(0, min(first - CONTEXT_FRAMES, self._frames - span))
        heard_last = heard_first + span
        samples_per_frame = SAMPLE_RATE // FRAMES_PER_SECOND
        if heard_last >= self._frames:  # to the voice's very end, which may lie within a frame
            heard_last, heard = self._frames, self._samples[heard_first * samples_per_frame :]
        else:
            heard = self._samples[heard_first * samples_per_frame : heard_last * samples_per_frame]
        features = encode(self._encoder, torch.from_numpy(heard), heard_last - heard_first)
        return features[first - heard_first : last - heard_first].clone()


def encode(encoder: Wav2Vec2Model, samples: Tensor, frames: int) -> Tensor:
    """The outputs of every encoder layer, at the video's frame rate.

    samples: float32 [samples], normalised → float32 [frames, layers, channels] on the encoder's device. The
    convolutional features (about 50 per second) are stretched linearly to `frames` before the transformer sees them.
    """
    shortest = _receptive_field(encoder)
    if len(samples) < shortest:  # one frame is 640 samples; the first convolutions need 400 of them
        samples = F.pad(samples, (0, shortest - len(samples)))
    layers: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *call: layers.append(call[2])) for layer in encoder.encoder.layers]
    try:
        convolved = encoder.feature_extractor(samples[None].to(encoder.device))
        stretched = F.interpolate(convolved, size=frames, mode="linear", align_corners=True)
        hidden, _ = encoder.feature_projection(stretched.transpose(1, 2))
        encoder.encoder(hidden)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([layer[0] for layer in layers], dim=1)


def _receptive_field(encoder: Wav2Vec2Model) -> int:
    """Samples that one convolutional feature spans."""
    span = 1
    for kernel, stride in zip(reversed(encoder.config.conv_kernel), reversed(encoder.config.conv_stride), strict=True):
        span = (span - 1) * stride + kernel
    return span
