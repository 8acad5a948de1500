"""A video in place of a picture: which of its pictures each clip starts from, and scenes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import overload

import numpy as np
import pytest
import torch
from torch import Tensor

from infinitetalk.errors import InputError
from infinitetalk.pipeline import Clip, InfiniteTalkPipeline, Speaker
from tests.test_pipeline import SHORT, video, voice

FOOTAGE = np.random.default_rng(2).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
ONE_STEP = replace(SHORT, steps=1)  # clips of 17 frames, the first 5 of later ones taken over


class Recorded(Sequence[np.ndarray]):
    """Footage that remembers which of its pictures were looked at."""

    def __init__(self, frames: np.ndarray) -> None:
        self._frames = frames
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self._frames)

    @overload
    def __getitem__(self, number: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, number: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        assert isinstance(number, int)
        self.seen.append(number)
        frame: np.ndarray = self._frames[number]
        return frame


def dub(
    pipeline: InfiniteTalkPipeline, footage: np.ndarray | Sequence[np.ndarray], frames: int, **options: object
) -> Iterator[Clip]:
    return pipeline.generate(footage, [Speaker(voice(frames))], "", ONE_STEP, **options)  # type: ignore[arg-type]


def whole(pipeline: InfiniteTalkPipeline, footage: np.ndarray, frames: int, **options: object) -> Tensor:
    return video(dub(pipeline, footage, frames, **options))


def test_each_clip_starts_from_the_picture_of_its_time(pipeline: InfiniteTalkPipeline) -> None:
    footage = Recorded(FOOTAGE)
    list(dub(pipeline, footage, 41))
    assert set(footage.seen) == {0, 12, 24}
    assert len(footage.seen) <= 5, "and none is asked for more often than need be"


def test_after_its_end_the_last_picture_stands_still(pipeline: InfiniteTalkPipeline) -> None:
    footage = Recorded(FOOTAGE[:15])
    assert sum(clip.video.shape[1] for clip in dub(pipeline, footage, 41)) == 41
    assert set(footage.seen) == {0, 12, 14}


def test_a_video_longer_than_the_voice_ends_with_the_voice(pipeline: InfiniteTalkPipeline) -> None:
    assert whole(pipeline, FOOTAGE, 6).shape[1] == 6


def test_a_video_that_stands_still_is_a_picture(pipeline: InfiniteTalkPipeline) -> None:
    still = np.broadcast_to(FOOTAGE[0], (40, 64, 64, 3))
    assert torch.equal(whole(pipeline, still, 29), whole(pipeline, FOOTAGE[0], 29))


def test_later_pictures_move_later_clips_alone(pipeline: InfiniteTalkPipeline) -> None:
    changed = FOOTAGE.copy()
    changed[12] = 255 - changed[12]
    before, after = whole(pipeline, FOOTAGE, 29), whole(pipeline, changed, 29)
    assert torch.equal(before[:, :17], after[:, :17])
    assert not torch.equal(before[:, 17:], after[:, 17:])


def test_a_resumed_dubbing_goes_on_as_if_it_had_not_stopped(pipeline: InfiniteTalkPipeline) -> None:
    clips = list(dub(pipeline, FOOTAGE, 41))
    for stop, clip in enumerate(clips[:-1]):
        rest = list(dub(pipeline, FOOTAGE, 41, resume_from=clip.state))
        assert torch.equal(rest[0].video, clips[stop + 1].video)


class TestScenes:
    def test_each_scene_starts_anew_from_its_own_first_picture(self, pipeline: InfiniteTalkPipeline) -> None:
        footage = Recorded(FOOTAGE)
        clips = list(dub(pipeline, footage, 40, scene_starts=[0, 10, 30]))
        assert [clip.video.shape[1] for clip in clips] == [10, 17, 3, 10]
        assert {clip.clips for clip in clips} == {4}
        assert [clip.index for clip in clips] == [0, 1, 2, 3]
        assert set(footage.seen) == {0, 10, 22, 30}

    def test_what_a_scene_shows_does_not_reach_the_next(self, pipeline: InfiniteTalkPipeline) -> None:
        changed = FOOTAGE.copy()
        changed[:20] = 255 - changed[:20]
        before, after = (whole(pipeline, footage, 40, scene_starts=[0, 20]) for footage in (FOOTAGE, changed))
        assert not torch.equal(before[:, :20], after[:, :20])
        assert torch.equal(before[:, 20:], after[:, 20:])

    def test_the_voice_goes_on_across_the_cut(self, pipeline: InfiniteTalkPipeline) -> None:
        heard = whole(pipeline, FOOTAGE, 40, scene_starts=[0, 20])
        other = video(
            pipeline.generate(
                FOOTAGE,
                [Speaker(np.concatenate([voice(40)[: 20 * 640], voice(20)]))],
                "",
                ONE_STEP,
                scene_starts=[0, 20],
            )
        )
        assert not torch.equal(heard[:, 20:], other[:, 20:])

    def test_it_can_be_resumed_at_a_cut_and_within_a_scene(self, pipeline: InfiniteTalkPipeline) -> None:
        clips = list(dub(pipeline, FOOTAGE, 40, scene_starts=[0, 20]))
        assert len(clips) == 4
        for stop, clip in enumerate(clips[:-1]):
            rest = list(dub(pipeline, FOOTAGE, 40, scene_starts=[0, 20], resume_from=clip.state))
            assert torch.equal(rest[0].video, clips[stop + 1].video)

    def test_scenes_after_the_voice_are_left_out(self, pipeline: InfiniteTalkPipeline) -> None:
        assert whole(pipeline, FOOTAGE, 12, scene_starts=[0, 10, 12, 30]).shape[1] == 12

    @pytest.mark.parametrize("starts", [[], [5], [0, 10, 10], [0, 20, 10]])
    def test_starts_that_make_no_sense_are_refused(self, pipeline: InfiniteTalkPipeline, starts: list[int]) -> None:
        with pytest.raises(InputError, match="scene_starts is"):
            whole(pipeline, FOOTAGE, 12, scene_starts=starts)
