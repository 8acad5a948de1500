"""A voice becomes one set of features per video frame, however long it is."""

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Model

from infinitetalk import audio
from infinitetalk.audio import VoiceFeatures, frame_count, normalize_loudness, standardize
from infinitetalk.pipeline import InfiniteTalkPipeline
from infinitetalk.timeline import SAMPLE_RATE


def voice(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise whose loudness comes and goes, as that of speech does."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.1 * noise * (1 + np.sin(2 * np.pi * 3 * time))).astype(np.float32)


def all_features(features: VoiceFeatures) -> torch.Tensor:
    return features.gather([[frame] for frame in range(len(features))])[:, 0]


def test_frames_are_counted_in_floating_point_as_the_published_code_does() -> None:
    assert [frame_count(samples) for samples in (639, 640, 16000, 18560, 36480)] == [0, 1, 25, 28, 56]


@pytest.mark.parametrize("gain", [0.01, 1.0, 5.0])
def test_any_voice_is_brought_to_the_same_loudness(gain: float) -> None:
    quiet, normal = normalize_loudness(voice(2) * np.float32(gain)), normalize_loudness(voice(2))
    np.testing.assert_allclose(quiet, normal, atol=2e-4)
    assert quiet.dtype == np.float32


def test_silence_and_very_short_voices_keep_their_loudness() -> None:
    for samples in (np.zeros(16000, np.float32), voice(2) * np.float32(1e-7), voice(0.4)):
        assert normalize_loudness(samples) is samples


def test_the_encoder_gets_unit_variance_unless_the_voice_is_nearly_silent() -> None:
    loud, faint = standardize(voice(1)), standardize(np.array([3e-4, -3e-4] * 800, np.float32))
    assert loud.std() == pytest.approx(1, abs=1e-4)
    assert faint.std() == pytest.approx((9e-8 / (9e-8 + 1e-7)) ** 0.5, abs=1e-4)
    assert not standardize(np.zeros(800, np.float32)).any()


@pytest.mark.parametrize("seconds", [0.04, 0.05, 0.1, 0.39, 1.0, 3.3])
def test_there_is_one_set_of_features_per_video_frame(pipeline: InfiniteTalkPipeline, seconds: float) -> None:
    samples = voice(seconds)
    with torch.no_grad():
        features = all_features(VoiceFeatures(pipeline.speech_encoder, samples))
    assert features.shape == (frame_count(len(samples)), 12, 32)
    assert features.isfinite().all()


@torch.no_grad()
def test_a_long_voice_is_encoded_in_windows_close_to_the_whole(
    pipeline: InfiniteTalkPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = voice(20)
    whole = all_features(VoiceFeatures(pipeline.speech_encoder, samples))
    monkeypatch.setattr(audio, "WINDOW_FRAMES", 150)
    monkeypatch.setattr(audio, "CONTEXT_FRAMES", 50)
    windowed = all_features(VoiceFeatures(pipeline.speech_encoder, samples))
    assert windowed.shape == whole.shape
    shift = torch.linalg.vector_norm(windowed - whole) / torch.linalg.vector_norm(whole)
    misplaced = torch.linalg.vector_norm(windowed[1:] - whole[:-1]) / torch.linalg.vector_norm(whole)
    assert shift < 0.25, "random weights attend everywhere; a trained encoder is far less disturbed"
    assert shift < misplaced / 2, "one frame off would be worse"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths, in frames, of what was given to the encoder."""
    lengths: list[int] = []
    encode = audio.encode

    def counted(encoder: Wav2Vec2Model, samples: torch.Tensor, frames: int) -> torch.Tensor:
        lengths.append(frames)
        return encode(encoder, samples, frames)

    monkeypatch.setattr(audio, "encode", counted)
    return lengths


@torch.no_grad()
def test_two_minutes_are_encoded_whole_and_more_with_ten_seconds_around(
    pipeline: InfiniteTalkPipeline, encoded: list[int]
) -> None:
    VoiceFeatures(pipeline.speech_encoder, np.zeros(120 * 16000, np.float32)).gather([[0]])
    VoiceFeatures(pipeline.speech_encoder, np.zeros(200 * 16000, np.float32)).gather([[0, 4000]])
    assert encoded == [3000, 3500, 3500]


@torch.no_grad()
def test_only_the_windows_in_use_are_kept(
    pipeline: InfiniteTalkPipeline, monkeypatch: pytest.MonkeyPatch, encoded: list[int]
) -> None:
    monkeypatch.setattr(audio, "WINDOW_FRAMES", 25)
    monkeypatch.setattr(audio, "CONTEXT_FRAMES", 5)
    features = VoiceFeatures(pipeline.speech_encoder, voice(8))
    for frame in range(199):
        features.gather([[frame, frame + 1]])
    assert len(encoded) == 8, "each window once"
    assert max(encoded) == 35, "and no more of the voice than the window and its surroundings"


def test_features_come_back_in_the_order_asked_for(pipeline: InfiniteTalkPipeline) -> None:
    with torch.no_grad():
        features = VoiceFeatures(pipeline.speech_encoder, voice(2))
        together = features.gather([[3, 7], [7, 3]])
    assert torch.equal(together[0, 0], together[1, 1])
    assert torch.equal(together[0, 1], together[1, 0])
    assert not torch.equal(together[0, 0], together[0, 1])
