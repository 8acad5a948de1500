"""Two people in one picture: whose voice is whose, who is where, and how long they talk."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from infinitetalk.audio import arrange
from infinitetalk.errors import InputError
from infinitetalk.geometry import Box, speaker_regions
from infinitetalk.label_rope import BACKGROUND, attention_to_regions, token_positions
from infinitetalk.pipeline import ClipState, InfiniteTalkPipeline, Speaker
from infinitetalk.settings import Settings
from tests.test_pipeline import PICTURE, SHORT, video, voice

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def talk(pipeline: InfiniteTalkPipeline, *speakers: Speaker, settings: Settings = SHORT) -> Tensor:
    return video(pipeline.generate(PICTURE, speakers, "Two people talk.", settings))


def other_voice(frames: int) -> np.ndarray:
    return voice(frames)[::-1].copy()


class TestWhoIsWhere:
    def test_by_default_each_has_a_half_but_for_its_margin(self) -> None:
        first, second = speaker_regions([None, None], (320, 320), (320, 320))
        assert first.shape == (20, 20)
        assert [np.flatnonzero(first.any(axis=axis))[[0, -1]].tolist() for axis in (0, 1)] == [[1, 9], [1, 18]]
        assert [np.flatnonzero(second.any(axis=axis))[[0, -1]].tolist() for axis in (0, 1)] == [[11, 19], [1, 18]]

    def test_a_box_is_given_as_fractions_of_the_source_picture(self) -> None:
        box: Box = (0.25, 0.5, 0.75, 1.0)
        first, _ = speaker_regions([box, (0, 0, 1, 0.25)], (640, 1280), (320, 640))
        assert np.argwhere(first).min(axis=0).tolist() == [10, 10]
        assert np.argwhere(first).max(axis=0).tolist() == [19, 29]
        assert first.sum() == 10 * 20

    def test_a_box_follows_the_crop(self) -> None:
        first, second = speaker_regions([LEFT, RIGHT], (320, 960), (320, 320))  # only the middle third is left
        assert first[:, :10].all()
        assert not first[:, 10:].any()
        assert second[:, 10:].all()

    @pytest.mark.parametrize(
        ("boxes", "reason"),
        [
            ([(0.5, 0.0, 1.2, 1.0), RIGHT], "speaker 1 is .*fractions"),
            ([LEFT, (-0.1, 0.0, 1.0, 1.0)], "speaker 2 is .*fractions"),
            ([(0.5, 0.0, 0.2, 1.0), RIGHT], "left < right"),
            ([LEFT, (0.5, 0.3, 0.6, 0.3)], "top < bottom"),
            ([(0.1, 0.1, float("nan"), 0.5), RIGHT], "fractions"),
            ([(0.13, 0.1, 0.14, 0.9), RIGHT], "speaker 1, .*shows nothing"),
            ([LEFT, LEFT], "speaker 1, .*lies wholly within that of speaker 2"),
            ([(0, 0, 1, 1), RIGHT], "speaker 2, .*lies wholly within that of speaker 1"),
            ([(0.0, 0.0, 0.5, 1.0), None], "speaker 2, the default half|no error"),
        ],
    )
    def test_a_box_that_cannot_be_is_refused_with_the_reason(self, boxes: list[Box | None], reason: str) -> None:
        if "no error" in reason:
            assert speaker_regions(boxes, (320, 320), (320, 320)).any()
            return
        with pytest.raises(InputError, match=reason) as refusal:
            speaker_regions(boxes, (320, 320), (320, 320))
        assert refusal.value.param == "speakers"

    def test_a_box_that_the_crop_cuts_away_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"speaker 1, .*cut off"):
            speaker_regions([(0.0, 0.0, 0.3, 1.0), RIGHT], (320, 960), (320, 320))

    def test_one_speaker_needs_no_box(self, pipeline: InfiniteTalkPipeline) -> None:
        with pytest.raises(InputError, match="only speaker") as refusal:
            talk(pipeline, Speaker(voice(5), box=LEFT))
        assert refusal.value.param == "speakers"

    def test_boxes_that_leave_no_background_are_fine(self, pipeline: InfiniteTalkPipeline) -> None:
        assert talk(pipeline, Speaker(voice(5), LEFT), Speaker(other_voice(5), RIGHT)).isfinite().all()


class TestPositions:
    def test_tokens_stand_near_the_speaker_that_they_look_at_most(self) -> None:
        looks = torch.tensor([[0.9, 0.1, 0.2, 0.5], [0.0, 0.8, 0.1, 0.1], [0.1, 0.1, 0.7, 0.2]])
        first, second, background, also_first = token_positions(looks).tolist()
        assert 0 <= also_first < first <= 4.001
        assert 20 <= second <= 24.001
        assert background == BACKGROUND

    def test_a_region_without_tokens_is_never_looked_at(self) -> None:
        query, key = torch.randn(1, 8, 2, 4), torch.randn(1, 8, 2, 4)
        regions = torch.tensor([[True, True, False, False], [False, False, True, True], [False] * 4])
        looks = attention_to_regions(query, key, regions)
        assert (looks[2] == 0).all()
        torch.testing.assert_close(2 * looks[0] + 2 * looks[1], torch.ones(8))


class TestWhoSpeaksWhen:
    def test_together_they_begin_at_once_and_silence_fills_the_shorter(self) -> None:
        first, second = arrange([np.ones(3, np.float32), np.ones(5, np.float32)], "together")
        assert first.tolist() == [1, 1, 1, 0, 0]
        assert second.tolist() == [1, 1, 1, 1, 1]

    def test_in_turn_the_second_begins_when_the_first_has_ended(self) -> None:
        first, second = arrange([np.ones(3, np.float32), np.ones(2, np.float32)], "in_turn")
        assert first.tolist() == [1, 1, 1, 0, 0]
        assert second.tolist() == [0, 0, 0, 1, 1]

    @pytest.mark.parametrize(("order", "frames"), [("together", 25), ("in_turn", 35)])
    def test_the_video_is_as_long_as_the_conversation(
        self, pipeline: InfiniteTalkPipeline, order: Literal["together", "in_turn"], frames: int
    ) -> None:
        settings = replace(SHORT, steps=1, audio_order=order)
        assert talk(pipeline, Speaker(voice(10)), Speaker(voice(25)), settings=settings).shape[1] == frames

    def test_someone_without_a_voice_is_as_silent_as_with_a_silent_one(self, pipeline: InfiniteTalkPipeline) -> None:
        for mute, silent in ((0, 1), (1, 0)):
            speakers: list[list[Speaker]] = [[Speaker(voice(7))] * 2 for _ in range(2)]
            speakers[0][mute] = Speaker(None)
            speakers[1][mute] = Speaker(np.zeros_like(voice(7)))
            assert speakers[0][silent].voice is not None
            first, second = (talk(pipeline, *pair) for pair in speakers)
            assert torch.equal(first, second)
            assert first.isfinite().all()

    def test_somebody_has_to_speak(self, pipeline: InfiniteTalkPipeline) -> None:
        for speakers in ([Speaker(None)], [Speaker(None), Speaker(None)]):
            with pytest.raises(InputError, match="at least one speaker") as refusal:
                talk(pipeline, *speakers)
            assert refusal.value.param == "audio"

    def test_features_of_voices_must_fit_together(self, pipeline: InfiniteTalkPipeline) -> None:
        features = torch.zeros(9, 12, 32)
        for second in (torch.zeros(8, 12, 32), voice(9), None):
            with pytest.raises(InputError, match="both, and be of one length"):
                talk(pipeline, Speaker(features), Speaker(second))

    def test_another_order_of_speaking_is_refused(self) -> None:
        with pytest.raises(InputError, match="use 'together' or 'in_turn'"):
            Settings(audio_order="at once")  # type: ignore[arg-type]


class TestTwoVoices:
    def test_both_matter_and_so_does_whose_is_whose(self, pipeline: InfiniteTalkPipeline) -> None:
        first, second = voice(7), other_voice(7)
        videos = [
            talk(pipeline, Speaker(one), Speaker(other))
            for one, other in ((first, second), (second, first), (first, first), (second, second))
        ]
        for number, one in enumerate(videos):
            assert not any(torch.equal(one, other) for other in videos[number + 1 :])

    def test_where_they_are_matters(self, pipeline: InfiniteTalkPipeline) -> None:
        pair = voice(7), other_voice(7)
        halves, swapped = (
            talk(pipeline, Speaker(pair[0], first), Speaker(pair[1], second))
            for first, second in ((LEFT, RIGHT), (RIGHT, LEFT))
        )
        assert not torch.equal(halves, swapped)

    def test_two_speakers_are_heard_by_the_branch_trained_for_two(self, pipeline: InfiniteTalkPipeline) -> None:
        pair, one = (Speaker(voice(5)), Speaker(other_voice(5))), Speaker(voice(5))
        before = talk(pipeline, *pair), talk(pipeline, one)
        weight = pipeline.transformer.blocks[0].audio_cross_attn["multi"].proj.weight  # type: ignore[index, union-attr]
        kept = weight.clone()
        try:
            weight.mul_(2)
            after = talk(pipeline, *pair), talk(pipeline, one)
        finally:
            weight.copy_(kept)
        assert not torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])

    def test_a_resumed_conversation_goes_on_as_if_it_had_not_stopped(
        self, pipeline: InfiniteTalkPipeline, tmp_path: Path
    ) -> None:
        speakers = [Speaker(voice(20), LEFT), Speaker(other_voice(9), RIGHT)]
        first, second = pipeline.generate(PICTURE, speakers, "", SHORT)
        assert first.state is not None
        first.state.save(tmp_path / "state")
        (resumed,) = pipeline.generate(PICTURE, speakers, "", SHORT, resume_from=ClipState.load(tmp_path / "state"))
        assert torch.equal(resumed.video, second.video)
